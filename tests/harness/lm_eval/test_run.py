"""lm-eval's --seed and --gen_kwargs: what each value decides, through a real ``simple_evaluate`` on the demo pair."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support import FULL
from support.lm_eval_tasks import task

from specrej_eval import stopping
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.harness.lm_eval import run as lm_eval_run
from specrej_eval.harness.lm_eval.model import SpecRejLM
from specrej_eval.harness.lm_eval.requests import _LENGTHS, KNOBS, SAMPLING
from specrej_eval.harness.patching import is_patched

Counted = Callable[[str, int], None]
SHORT = {"n": 3, "max_gen_toks": 12, "first_look": 6, "device": "cpu"}
GREEDY = {"until": ["\n"], "do_sample": False}
SAMPLED = {"until": ["\n"], "do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_gen_toks": 10}
OWN = [GREEDY, pytest.param(SAMPLED, marks=pytest.mark.full)]


@pytest.fixture(autouse=True)
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the startup hook does it, whatever is installed."""
    lm_eval_run.wrap_simple_evaluate(lm_eval.evaluator)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluate(
    gen_kwargs: Any = None, *, own: dict[str, Any] = GREEDY, model: Any = "specrej", args: Any = None, **options: Any
) -> dict[str, Any]:
    """The results' ``specrej`` block."""
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={**SHORT, **(args or {})} if isinstance(model, str) else None,
        tasks=[task(questions=["1+1=?"], generation_kwargs=dict(own))],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        gen_kwargs=gen_kwargs,
        **options,
    )
    assert results is not None
    block: dict[str, Any] = results["config"]["specrej"]
    return block


def resolved(block: dict[str, Any]) -> dict[str, Any]:
    return dict(block["per_task"]["toy"]["resolved"])


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    yield


# seeds


@pytest.mark.parametrize(
    ("args", "options", "gen_kwargs", "seed", "origin"),
    [
        ({}, {}, None, 0, "the default"),
        ({}, {"torch_random_seed": 1234}, None, 0, "the default"),
        ({}, {"torch_random_seed": None}, None, 0, "the default"),
        ({}, {"torch_random_seed": 7}, None, 7, "lm_eval --seed"),
        ({}, {"torch_random_seed": 0}, None, 0, "lm_eval --seed"),
        ({}, {"random_seed": 7, "numpy_random_seed": 7, "fewshot_random_seed": 7}, None, 0, "the default"),
        ({"seed": 3}, {"torch_random_seed": 7}, None, 3, "model_args"),
        ({"seed": 0}, {"torch_random_seed": 7}, None, 0, "model_args"),
        ({"seed": 3}, {"torch_random_seed": 7}, "seed=5", 5, "--gen_kwargs"),
    ],
)
def test_the_seed_and_where_it_comes_from(
    counted: Counted, args: dict[str, Any], options: dict[str, Any], gen_kwargs: Any, seed: int, origin: str
) -> None:
    block = evaluate(gen_kwargs, args=args, **options)
    assert (block["arguments"]["seed"], resolved(block)["seed"], block["seed_from"]) == (seed, seed, origin)
    counted("seeds resolved", 1)


def test_a_ready_made_model_keeps_its_own_seed_and_nothing_leaks_into_the_next_call() -> None:
    ready = SpecRejLM(seed=4, **SHORT)
    block = evaluate(model=ready, torch_random_seed=7)
    assert (block["arguments"]["seed"], block["seed_from"]) == (4, "model_args")
    assert lm_eval_run.current() is None
    assert evaluate(torch_random_seed=9)["arguments"]["seed"] == 9
    assert evaluate()["arguments"]["seed"] == 0
    with pytest.raises(ConfigError):
        evaluate("nonsense=1", torch_random_seed=9)
    assert lm_eval_run.current() is None
    assert SpecRejLM.create_from_arg_obj(dict(SHORT)).run_config.seed == 0


def test_where_lm_eval_finds_us_by_entry_points_the_seed_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.api.registry.load_plugins", lambda *_: None, raising=False)
    assert evaluate(torch_random_seed=11)["arguments"]["seed"] == 11


def test_a_simple_evaluate_of_another_signature_is_left_alone_and_told_of() -> None:
    def simple_evaluate(config: Any) -> None: ...

    other = types.ModuleType("lm_eval.evaluator")
    other.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]  # a stand-in
    lm_eval_run.wrap_simple_evaluate(other)
    assert other.simple_evaluate is simple_evaluate and not is_patched(other, "simple_evaluate")


def test_the_wrap_keeps_the_signature_and_other_models_see_nothing() -> None:
    assert "torch_random_seed" in inspect.signature(lm_eval.simple_evaluate).parameters
    seen = []

    class Spy(HFLM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            seen.append(lm_eval_run.current())
            return ["x"] * len(requests)

    from specrej_eval import demo

    lm_eval.simple_evaluate(
        model=Spy(pretrained=str(demo.POLICY_DIR), device="cpu"),
        tasks=[task(questions=["1+1=?"])],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        gen_kwargs="num_beams=4",
    )
    assert seen == [None]


# gen_kwargs: every name we know takes effect, or is refused

WIN: dict[str, tuple[str, Any]] = {
    "alpha": ("0.25", 0.25),
    "first_look": ("4", 4),
    "force_sampling_args": ("True", None),
    "kv_budget_tokens": ("80", 80),
    "logprobs": ("True", None),
    "n": ("2", 2),
    "n_max": ("64", 64),
    "on_greedy": ("sample", None),
    "on_nan": ("drop", None),
    "score_every": ("8", None),
    "seed": ("9", 9),
    "strategy": ("best_of_n", "best_of_n"),
    "temperature": ("0.7", 0.7),
    "top_p": ("0.9", 0.9),
    "top_k": ("5", 5),
    "min_p": ("0.1", 0.1),
    "max_gen_toks": ("11", 11),
    "max_new_tokens": ("11", 11),
    "max_tokens": ("11", 11),
    "max_completion_tokens": ("11", 11),
    "variance_reduce": ("True", True),
    "until": ("=", ["="]),
    "do_sample": ("True", None),
}


def test_the_table_of_names_is_whole() -> None:
    assert WIN.keys() == {*KNOBS, *SAMPLING, *_LENGTHS, "until", "do_sample"}


@pytest.mark.parametrize("own", OWN, ids=["greedy task", "sampling task"])
@pytest.mark.parametrize("name", sorted(WIN))
def test_an_explicit_value_wins(counted: Counted, name: str, own: dict[str, Any]) -> None:
    text, expected = WIN[name]
    # the names of first_look and the budget say one thing twice
    args: dict[str, Any] = {"first_look": None} if name in ("kv_budget_tokens", "strategy") else {}
    block = evaluate({"until": text} if name == "until" else f"{name}={text}", own=own, args=args)
    found = resolved(block)
    shown = "max_gen_toks" if name in _LENGTHS else name
    if expected is not None:
        assert found[shown] == expected
    counted("gen_kwargs tried", 1)


@pytest.mark.parametrize("own", OWN, ids=["greedy task", "sampling task"])
@pytest.mark.parametrize(
    "explicit",
    ["do_sample=False", "temperature=0", "do_sample=False,temperature=0", "on_greedy=greedy,do_sample=False"],
)
@pytest.mark.parametrize(
    "on_greedy", ["error", *(pytest.param(value, marks=pytest.mark.full) for value in ("sample", None))]
)
def test_explicit_greedy_is_greedy(counted: Counted, own: dict[str, Any], explicit: str, on_greedy: str | None) -> None:
    found = resolved(evaluate(explicit, own=own, args={"on_greedy": on_greedy} if on_greedy else {}))
    assert (found["temperature"], found["n"], found["strategy"]) == (0.0, 1, "best_of_n")
    counted("gen_kwargs tried", 1)


def test_a_tasks_own_greedy_default_is_still_sampled() -> None:
    block = evaluate(own=GREEDY)
    assert resolved(block)["temperature"] == 1.0
    assert block["per_task"]["toy"]["greedy_overridden"] == 1


def test_an_explicit_value_wins_over_force_sampling_args() -> None:
    found = resolved(evaluate("temperature=0.6,top_k=4", own=SAMPLED, args={"force_sampling_args": True}))
    assert (found["temperature"], found["top_k"], found["top_p"]) == (0.6, 4, 1.0)


FOREIGN = (
    "num_beams=4", "repetition_penalty=1.2", "num_return_sequences=3", "no_repeat_ngram_size=2", "length_penalty=0.5",
    "early_stopping=True", "typical_p=0.9", "epsilon_cutoff=0.1", "penalty_alpha=0.6", "diversity_penalty=0.5",
    "bad_words_ids=3", "min_new_tokens=4", "min_length=4", "max_length=64", "max_time=3", "use_cache=False",
    "frequency_penalty=0.4", "presence_penalty=0.4", "stop=x", "nonsense=1", "alhpa=0.3",
)  # fmt: skip
CONTRARY = (
    "do_sample=True,temperature=0", "do_sample=False,temperature=0.7", "do_sample=False,on_greedy=sample",
    "temperature=0,on_greedy=error", "max_gen_toks=8,max_new_tokens=9", "do_sample=False,n=4",
    "do_sample=False,top_p=0.9", "temperature=0,top_k=3", "do_sample=False,alpha=0.3", "temperature=0,min_p=0.1",
    "do_sample=False,first_look=4", "temperature=0,strategy=speculative_rejection", "temperature=0,kv_budget_tokens=90",
    "strategy=best_of_n,alpha=0.3",
)  # fmt: skip
BAD = (
    "alpha=1", "alpha=x", "n=0", "n=1.5", "first_look=0", "temperature=-1", "temperature=warm", "top_p=0", "top_p=2",
    "top_k=-3", "min_p=2", "max_gen_toks=0", "max_gen_toks=many", "seed=x", "strategy=best", "on_greedy=never",
    "on_nan=skip", "do_sample=maybe", "logprobs=perhaps", "kv_budget_tokens=1", "force_sampling_args=maybe",
    "dtype=float16", "reward_model=x", "batch_size=2",
)  # fmt: skip


@pytest.mark.parametrize("explicit", [*FOREIGN, *CONTRARY, *BAD])
def test_what_cannot_take_effect_is_refused_before_weights_load(
    counted: Counted, no_weights: None, explicit: str
) -> None:
    name = explicit.partition("=")[0]
    for own in (GREEDY, SAMPLED) if FULL else (GREEDY,):
        with pytest.raises(SpecRejError) as caught:
            evaluate(explicit, own=own)
        assert name in str(caught.value) or "gen_kwargs" in str(caught.value)
        counted("gen_kwargs tried", 1)


def test_what_only_a_known_task_makes_wrong_is_told_before_weights_load(no_weights: None) -> None:
    with pytest.raises(ConfigError, match="task 'toy'"):
        evaluate("kv_budget_tokens=60", own={**SAMPLED, "max_gen_toks": 4000}, args={"first_look": None, "n": None})


def test_foreign_names_of_a_task_stay_a_warning() -> None:
    assert any("num_beams" in text for text in evaluate(own={**GREEDY, "num_beams": 4})["warnings"])


# the device


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


NO_DEVICE = {"n": 3, "max_gen_toks": 12, "first_look": 6, "device": None}


def test_a_device_that_is_named_and_not_there_is_refused(no_gpu: None, no_weights: None) -> None:
    for device in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(ConfigError, match=f"device={device}: this machine has no CUDA devices"):
            evaluate(args=NO_DEVICE, device=device)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], False),
        (["--config", "with.yaml"], True),
        (["-C", "with.yaml"], True),
        (["--config=with.yaml"], True),
        (["--config", "without.yaml"], False),
        (["--config", "not_there.yaml"], False),
        (["--device", "cuda:0"], True),
        (["--device=cuda:0"], True),
    ],
)
def test_the_commands_default_device_is_told_from_one_that_is_named(
    words: list[str], given: bool, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with.yaml").write_text("device: cuda:0\n")
    (tmp_path / "without.yaml").write_text("tasks: toy\n")
    monkeypatch.setattr("sys.argv", ["lm_eval", "--model", "specrej", *words])
    with stopping.command():
        if given:
            with pytest.raises(ConfigError, match="this machine has no CUDA devices"):
                evaluate(args=NO_DEVICE, device="cuda:0")
        else:
            assert evaluate(args=NO_DEVICE, device="cuda:0")["arguments"]["device"] == "cpu"
