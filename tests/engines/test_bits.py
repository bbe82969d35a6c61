"""A row's logits are the same bits whatever else is in the batch: CPU, float32, one and two threads."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FULL
from support.engine_models import (
    ARCHITECTURES,
    Architecture,
    build,
    forced_token,
    prompt_of,
    shared_model,
    skip_unless_known,
)
from support.engine_runs import PROMPTS, Recorder, generate, make_engine, outcome
from support.smollm2 import smollm2_folder  # noqa: F401
from support.tiny_models import tiny_causal_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from specrej_eval.core import GenerationResult
from specrej_eval.engines.transformers import model as model_module
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.engines.transformers.groups import Group
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv.attention import sdpa
from specrej_eval.kv.attention.base import AttentionParams

Counted = Callable[..., None]
N = 16
LENGTH = 16
SHAPES = {
    "head_dim 16": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16},
    "head_dim 32": {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 96, "head_dim": 32},
    "odd sizes": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 54, "head_dim": 20},
}


THREADS = int(os.environ.get("SPECREJ_TEST_THREADS", "1"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@cache
def model(shape: str) -> Any:
    return tiny_causal_lm("llama", **SHAPES[shape])


def run(shape: str, prompts: list[str] = PROMPTS, **arguments: Any) -> tuple[list[GenerationResult], Recorder]:
    engine = make_engine(model(shape), path="shared_prefix")
    with Recorder(engine) as seen:
        results = generate(
            engine, prompts, until=["e7"], **{"n": N, "first_look": None, "max_gen_toks": LENGTH, **arguments}
        )
    return results, seen


def same_bits(one: Recorder, other: Recorder, *, subset: bool = False) -> None:
    """Every step in both (all steps, unless ``subset``: those of ``other``) has the same logits, bit for bit."""
    assert other.logits
    if not subset:
        assert one.logits.keys() == other.logits.keys()
    different = [key[1:] for key, logits in other.logits.items() if not torch.equal(one.logits[key], logits)]
    assert not different


EACH = pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[pytest.mark.full] if shape == "head_dim 32" else []) for shape in SHAPES]
)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(THREADS != 1, reason="runs the others")
def test_two_threads() -> None:
    """Tests of one shape and of experts again, in a process whose threads sleep while they wait (cores may be busy)."""
    chosen = "odd or mixtral or experts or qwen2_moe or cache_lines"
    prompts = str(Path(__file__).parents[1] / "kv" / "test_prefill.py")
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, prompts, "-k", chosen],
        env={**os.environ, **environment, "SPECREJ_TEST_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{12 if FULL else 11} passed" in done.stdout


# ---- every architecture and path -----------------------------------------------------------------------------------

SOME = [
    "llama",
    "mistral",
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "qwen2_moe",
    "qwen3_next",
    "mamba",
    "bloom",
]
COMPANY = [[0], [3, 2], [5, 6, 7], list(range(8, 13)), list(range(13, 22)), list(range(1, 18)), list(range(20, 44))]


def forced_logits(runner: ModelRunner, rows: list[int], steps: int = 3) -> dict[tuple[int, int], torch.Tensor]:
    """Logits by (row, step): tokens that depend on row and step are fed, some rows leave and some fork on the way."""
    found = {}
    with torch.inference_mode(), runner.active():
        group = Group(runner.prefill(prompt_of(21)), list(rows), capacity=steps + 2, device=runner.device)
        for step in range(steps):
            if step == 2 and len(rows) > 2:
                group.drop([1])
                group.select(list(reversed(range(group.num_rows))), group.row_ids[::-1], steps + 2)
            tokens = torch.tensor([forced_token(row, step) for row in group.row_ids])
            group.rows.tokens[:, step] = tokens.int()
            group.num_sampled += 1
            logits = runner.step([group], tokens)
            group.advance()
            found.update({(row, step): mine.clone() for row, mine in zip(group.row_ids, logits, strict=True)})
    return found


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if FULL or arch.name in SOME], ids=lambda a: a.name)
def test_rows_of_every_architecture_and_path_are_bits(arch: Architecture, counted: Counted) -> None:
    skip_unless_known(arch)
    paths = {arch.path, "replicated", "recompute"} if FULL else {arch.path, "recompute"}
    for path in sorted(paths):
        runner = ModelRunner(shared_model(arch.name), path=path)  # type: ignore[arg-type]
        if THREADS == 2 and path != "shared_prefix" and runner.promises == "uniforms":
            # the model's own attention: on some CPUs torch's gives a row other bits on its second thread
            counted("architectures and paths that promise no bits on two threads")
            continue
        assert runner.promises == "bits"
        together = forced_logits(runner, list(range(70)))
        for rows in COMPANY:
            alone = forced_logits(runner, rows)
            shared = alone.keys() & together.keys()
            assert len(shared) >= 2 * len(rows)
            assert [key for key in shared if not torch.equal(alone[key], together[key])] == [], (path, rows)
            counted("rows compared bitwise", len(shared))
        counted("architectures and paths compared bitwise")


def test_experts_need_their_own_padding() -> None:
    runner = ModelRunner(shared_model("mixtral"), path="shared_prefix")
    assert runner.promises == "bits"
    runner._expert_configs = []
    assert runner._probe_promise() == "uniforms"


def test_experts_are_the_models_own_outside() -> None:
    runner = ModelRunner(shared_model("mixtral"), path="shared_prefix")
    before = runner.model.config._experts_implementation
    with runner.active():
        assert runner.model.config._experts_implementation == "specrej_padded" != before
    assert runner.model.config._experts_implementation == before


def test_what_is_promised_is_in_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_engine(model("head_dim 32")).describe()["promises"] == "bits"
    half = tiny_causal_lm("llama").to(torch.bfloat16)
    assert make_engine(half).promises == "uniforms"
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert make_engine(model("head_dim 32")).promises == "uniforms"
    torch.set_num_threads(threads)
    monkeypatch.setattr(model_module, "ROW_ALIGN", 1)  # then rows do differ, and the probe must see it
    assert make_engine(model("head_dim 32")).promises == "uniforms"


# ---- whole runs ----------------------------------------------------------------------------------------------------

MANY = [f"{word} {index}: why?" for index in range(50) for word in ("Rivers", "Two plus", "x" * 40, "Say")]
RUN = {"n": 5, "max_gen_toks": 8, "first_look": 3, "alpha": 0.5}


def run_requests(name: str, prompts: list[str], **arguments: Any) -> tuple[dict[str, Any], Recorder]:
    engine = make_engine(run_model(name))
    with Recorder(engine) as seen:
        results = generate(engine, prompts, until=["e7"], **{**RUN, **arguments})
    return {prompt: outcome(result) for prompt, result in zip(prompts, results, strict=True)}, seen


@cache
def run_model(name: str) -> Any:
    return build(name, vocab_size=261)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"] if FULL else ["mixtral"])
def test_requests_do_not_depend_on_how_they_are_run(name: str, tmp_path: Path, counted: Counted) -> None:
    """batch_size 1, 4, 16; shuffled; the shares of 2 and 4 ranks; resumed after an interruption."""
    prompts = MANY if FULL else MANY[:12]
    want, want_seen = run_requests(name, prompts, batch_size=4)

    def compare(part: list[str], *, steps: bool = True, **arguments: Any) -> None:
        got, seen = run_requests(name, part, **arguments)
        assert got == {prompt: want[prompt] for prompt in part}
        if steps:
            same_bits(want_seen, seen, subset=True)
            counted("rows compared bitwise", len(seen.logits))
            if len(part) == len(prompts) and "journal" not in arguments:
                assert seen.logits.keys() == want_seen.logits.keys()
        counted("requests compared", len(part))

    for batch_size in (1, 16):
        compare(prompts, batch_size=batch_size)
    shuffled = random.Random(3).sample(prompts, len(prompts))
    compare(shuffled, batch_size=4)
    for world_size in (2, 4):
        for rank in range(world_size):
            compare(prompts[rank::world_size], batch_size=4)
    journal = str(tmp_path / "journal.jsonl")
    compare(shuffled[: len(prompts) // 3], batch_size=4, journal=journal)
    compare(prompts, batch_size=16, journal=journal)


@EACH
def test_alpha_0_is_best_of_n_under_any_budget(shape: str) -> None:
    prompts = PROMPTS[1:3]
    zero, zero_seen = run(shape, prompts, alpha=0)
    best, best_seen = run(shape, prompts, strategy="best_of_n")
    same_bits(zero_seen, best_seen)
    assert [outcome(result) for result in zero] == [outcome(result) for result in best]
    for prompt, whole in zip(prompts, best, strict=True):
        budget = whole.ledger.prompt_tokens + 5 * LENGTH + 3  # holds 5 of 16 rows
        for arguments in ({"alpha": 0}, {"strategy": "best_of_n"}):
            [waves], seen = run(shape, [prompt], kv_budget_tokens=budget, **arguments)
            assert [round_.rows for round_ in waves.rounds] == [5, 5, 5, 1]
            assert outcome(waves)["trajectories"] == outcome(whole)["trajectories"]
            same_bits(best_seen, seen, subset=True)


@EACH
def test_rejected_rows_are_prefixes(shape: str) -> None:
    whole, whole_seen = run(shape, PROMPTS[:2], alpha=0)
    cut, cut_seen = run(shape, PROMPTS[:2], alpha=0.5, first_look=4)
    same_bits(whole_seen, cut_seen, subset=True)
    rejected = 0
    for full, short in zip(whole, cut, strict=True):
        for row, other in zip(full.trajectories, short.trajectories, strict=True):
            if other.finish_reason == "rejected":
                rejected += 1
                assert other.token_ids == row.token_ids[: other.num_tokens]
            else:
                assert (other.token_ids, other.finish_reason) == (row.token_ids, row.finish_reason)
    assert rejected >= N


@EACH
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_company_changes_nothing(shape: str, alpha: float) -> None:
    arguments = {"alpha": alpha, "first_look": 4 if alpha else None, "n": 6}
    together, together_seen = run(shape, batch_size=4, **arguments)
    one_by_one, one_by_one_seen = run(shape, batch_size=1, **arguments)
    same_bits(together_seen, one_by_one_seen)
    assert [outcome(result) for result in together] == [outcome(result) for result in one_by_one]
    [alone], alone_seen = run(shape, [PROMPTS[2]], batch_size=4, **arguments)
    same_bits(together_seen, alone_seen, subset=True)
    assert outcome(alone) == outcome(together[2])


def test_a_change_of_one_bit_would_show() -> None:
    _, seen = run("head_dim 16", PROMPTS[:1], n=4)
    _, again = run("head_dim 16", PROMPTS[:1], n=4)
    same_bits(seen, again)
    key = next(iter(again.logits))
    changed = again.logits[key].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(torch.inf))
    again.logits[key] = changed
    with pytest.raises(AssertionError):
        same_bits(seen, again)


def test_without_padding_the_bits_do_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    # the reason for ROW_ALIGN; if this fails, torch has changed and the padding may go
    monkeypatch.setattr(model_module, "ROW_ALIGN", 1)
    _, whole = run("head_dim 32", PROMPTS[1:2], alpha=0)
    _, few = run("head_dim 32", PROMPTS[1:2], alpha=0, n=1)
    with pytest.raises(AssertionError):
        same_bits(whole, few, subset=True)


@pytest.mark.full
def test_smollm2(smollm2_folder: Path) -> None:  # noqa: F811
    """A real model: Speculative Rejection's rows are those of Best-of-N, in company or alone, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    prompts = ["The capital of France is", "Once upon a time, in a small town by the sea,"]

    def record(prompts: list[str], **arguments: Any) -> tuple[list[GenerationResult], Recorder]:
        engine = TransformersEngine(model, tokenizer)
        with Recorder(engine) as seen:
            return generate(engine, prompts, max_gen_toks=8, n=6, **arguments), seen

    whole, whole_seen = record(prompts, strategy="best_of_n", first_look=None)
    cut, cut_seen = record(prompts[1:], alpha=0.5, first_look=3)
    same_bits(whole_seen, cut_seen, subset=True)
    for full, short in zip(whole[1].trajectories, cut[0].trajectories, strict=True):
        assert short.token_ids == full.token_ids[: short.num_tokens]
    assert sum(t.finish_reason == "rejected" for t in cut[0].trajectories) >= 3
    assert len({tuple(t.token_ids) for t in whole[0].trajectories}) > 1


@pytest.mark.parametrize("prefix", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("heads", [(4, 1, 16), (3, 3, 20), (1, 4, 32)], ids=str)
def test_attention_of_any_shape_does_not_depend_on_the_rows(prefix: int, heads: tuple[int, int, int]) -> None:
    kv_heads, groups, width = heads
    rows, suffix = 70, 5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = (
        draw(rows, kv_heads, groups, width),
        draw(kv_heads, prefix, width),
        draw(kv_heads, prefix, width),
    )
    own_key, own_value = draw(rows, kv_heads, 16, width), draw(rows, kv_heads, 16, width)

    def attend(places: list[int]) -> torch.Tensor:
        mine = own_key[places][:, :, :suffix], own_value[places][:, :, :suffix]
        return sdpa.decode(query[places], key, value, *mine, AttentionParams(width**-0.5))

    whole = attend(list(range(rows)))
    for places in ([0], [3, 2], [69, 5, 17], list(range(5)), list(range(60, 2, -3)), list(range(1, 64))):
        assert torch.equal(attend(places), whole[places]), f"{len(places)} rows"
