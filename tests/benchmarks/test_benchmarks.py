"""The scripts in benchmarks/ run at tiny sizes and say what they are to say. Times are not looked at."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FULL, ROOT

PAIRED = ["decode_throughput", "many_prompts", "specrej_vs_reference", "roofline", "growth", "engines", "two_gpus"]
SMALL = ["--model", "tiny", "--pairs", "1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script as it runs: its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # else growth.py would start this process anew
    return importlib.import_module


@pytest.fixture
def written(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Runs a script with some words; what it wrote as JSON and as Markdown."""

    def run(name: str, *words: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL, *words, "--output", str(output)])
        try:
            script(name).main()
        except SystemExit as done:
            assert not done.code, done.code
        text = output.read_text()
        assert str(tmp_path) not in text and sys.executable not in text and str(ROOT) not in text, "a path of a machine"
        result = json.loads(text)
        for key in ("benchmark", "command", "model", "dtype", "device", "threads", "seed", "pairs"):
            assert key in result
        assert {"processor", "cores", "torch", "transformers", "python", "specrej_eval"} <= set(result["machine"])
        markdown = output.with_suffix(".md").read_text()
        assert "| --- |" in markdown and result["machine"]["torch"] in markdown
        return result, markdown

    return run


@pytest.mark.parametrize("name", PAIRED)
def test_every_script_says_what_it_does(
    name: str, script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as done:
        script(name).main()
    assert not done.value.code
    told = capsys.readouterr().out
    assert "--output" in told and f"python benchmarks/{name}.py" in told


# peers in processes of their own


@pytest.mark.slow
def test_peers_decode_the_same_work_and_absent_ones_are_skipped_by_name(
    written: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--peers", "ours", "generate", "vllm", "before", "--vllm_python", sys.executable]
    result, markdown = written("decode_throughput", *words, "--shapes", "20x3", "9x2", "--tokens", "2")
    told = capsys.readouterr().out
    assert "vllm is skipped: vllm cannot be imported" in told
    assert "before is skipped: no --baseline_path" in told
    assert list(result["shapes"]) == ["20x3", "9x2"]
    for found in result["shapes"].values():
        assert list(found["peers"]) == ["ours", "generate"]
        assert found["peers"]["generate"]["ours_over_this"]["median"] > 0
        assert all(len(peer["seconds"]) == 1 and peer["peak_mib"] > 0 for peer in found["peers"].values())
    assert markdown.count("| generate |") == 2 and "vllm" not in markdown.split("\n\n")[0]


@pytest.mark.slow
def test_many_prompts_share_their_shots_and_an_older_checkout_is_a_peer(written: Callable[..., Any]) -> None:
    others = ["generate"] if FULL else []  # a process each
    words = ["--peers", *others, "before", "--baseline_path", str(ROOT)]
    sizes = ["--prompts", "3", "--rows", "2", "--tokens", "3", "--generate_prompts", "1"]
    result, _ = written("many_prompts", *words, *sizes)
    assert result["tokens_in_common"] > 0.8 * result["prompt_tokens"]["median"]
    assert result["prompt_tokens"]["min"] > result["tokens_in_common"], "every prompt has a question of its own"
    run_by = {name: peer["prompts_run"] for name, peer in result["peers"].items()}
    assert run_by == {**dict.fromkeys(others, 1), "before": 3}
    [run] = result["runs"]
    assert run["before"]["tokens"] == 3 * 2 * 3
    assert all(3 * run[name]["tokens"] == run["before"]["tokens"] for name in others)


@pytest.mark.full
def test_a_peer_that_takes_too_long_or_dies_is_given_up_and_leaves_no_process(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers, bench = script("peers"), script("bench")
    made = bench.parser("")
    peers.add_options(made, ["ours"])
    options = made.parse_args([*SMALL, "--longest_run", "0.001"])
    job = {"prompts": [[5, 6, 7]], "rows": 2, "tokens": 3, "seed": 0}
    with peers.started(options, "tiny") as workers:
        process = workers["ours"]._process
        assert peers.warmed_up(workers, {"ours": job}) == {} == workers
    assert "not done after" in capsys.readouterr().out
    assert process.returncode is not None
    options.longest_run = 60
    with peers.started(options, "tiny") as workers:
        worker = workers["ours"]
        with pytest.raises(peers.Absent, match="it failed: KeyError"):
            worker.run({"prompts": [[5]]})
    assert worker._process.returncode is not None


# in this process


def test_a_steps_floor_is_never_above_what_its_parts_come_to(written: Callable[..., Any]) -> None:
    result, _ = written("roofline", "--shapes", "20x3", "--steps", "2", "--profile")
    found = result["shapes"]["20x3"]
    ceilings = result["ceilings"]
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 320 * 32
    assert ceilings["weights_of_products"] == weights
    own = ceilings["own_gflops"]["3"]
    assert 0 < own <= ceilings["gflops"]
    read = weights * 2 / (1e9 * ceilings["gigabytes_per_second"])
    assert found["floor_products_ms"] == pytest.approx(1000 * max(2 * weights * 3 / (1e9 * own), read))
    assert found["floor_products_best_ms"] < found["floor_ms"]
    assert found["over_products"] == pytest.approx(found["step_ms"]["median"] / found["floor_products_ms"])
    names = [name for name, _, _ in found["profile"]]
    assert any(name == "cpp::product" or "mm" in name or "linear" in name for name in names)


def test_growth_varies_one_thing_at_a_time(written: Callable[..., Any]) -> None:
    result, markdown = written("growth", "--rows", "2", "4", "--prompts", "8", "--lengths", "3")
    sizes = [(one["varied"], one["rows"], one["prompts"], one["lengths"]) for one in result["points"]]
    assert sizes == [("rows", 2, 8, 3), ("rows", 4, 8, 3), ("prompts", 4, 8, 3), ("lengths", 4, 8, 3)]
    assert result["bytes_per_token"] == result["engine_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    assert markdown.count("not judged") == 4, "a few kilobytes say nothing"


@pytest.mark.parametrize(("share", "code"), [(1.0, 0), (1.09, 0), (1.2, 1), (0.8, 1)])
def test_memory_beyond_the_formula_fails_the_run(
    share: float, code: int, script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    growth = script("growth")
    formula = 2 * 2 * 2 * 8 * 2 * (8 + 2 * 3)  # bytes of a prompt of 8 tokens and 2 rows of 3
    calls = iter(range(100))
    monkeypatch.setattr(growth, "JUDGED_FROM", 0)
    monkeypatch.setattr(growth, "bytes_held", lambda device: share * formula if next(calls) % 2 else 0)
    words = ["--rows", "2", "--prompts", "8", "--lengths", "3"]
    monkeypatch.setattr(sys, "argv", ["growth.py", *SMALL, *words])
    with pytest.raises(SystemExit) as done:
        growth.main()
    assert done.value.code == code


def test_the_ablation_ends_where_ours_begins(written: Callable[..., Any]) -> None:
    words = ["--dtype", "float32", "--rows", "8", "--looks", "2", "4", "8"]
    words += ["--prompt_tokens", *(["900", "--pairs", "2"] if FULL else ["300"])]
    result, _ = written("specrej_vs_reference", *words)
    assert result["largest_score_difference"] < 1e-4
    names = list(result["variants"])
    assert names[0] == "reference" and names[-1].startswith("ours") and len(names) == 7
    factors = [found["factor"]["median"] for found in result["variants"].values() if "factor" in found]
    assert math.prod(factors) == pytest.approx(result["product_of_factors"])
    assert len(factors) == len(names) - 1
    for pair in result["runs"]:
        published = [pair[name] for name in names[:4]]  # one seed, other ways: the same rows, so the same reward
        assert [one["reward"] for one in published] == pytest.approx([published[0]["reward"]] * 4, abs=1e-4)
        ours = [pair[name] for name in names[4:]]
        assert [one["reward"] for one in ours] == pytest.approx([ours[0]["reward"]] * 3, abs=1e-4)


@pytest.mark.full  # test_peers_... has processes of peers in `make test`, and what follows the comparison of engines
def test_engines_do_the_same_work_and_vllm_is_left_out_by_name_without_its_python(
    written: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dtype", "float32", "--prompts", "2", "--rows", "4", "--tokens", "9"]
    result, markdown = written("engines", *words)
    assert "engine_vllm is skipped: no --vllm_python" in capsys.readouterr().out
    assert set(result["speed"]) == {"speculative_rejection", "best_of_n"} and "**best_of_n**" in markdown
    told = result["speed"]["best_of_n"]["engine_transformers"]
    assert told["tokens"]["median"] == 2 * 4 * 9 and told["speed_ratio"]["median"] == 1
    assert result["speed"]["speculative_rejection"]["engine_transformers"]["tokens"]["median"] < 2 * 4 * 9


def test_the_interval_of_a_difference_is_in_standard_deviations_within_a_prompt(script: Callable[[str], Any]) -> None:
    engines = script("engines")
    assert engines.within_prompt_sd([[1.0, 3.0], [5.0], [10.0, 14.0]]) == pytest.approx(math.sqrt((2 + 8) / 2))
    near = engines.interval([0.1, -0.1] * 50, 2.0)
    assert near["difference"] == pytest.approx(0) and near["inside"]
    low, high = near["interval_90"]
    assert high == pytest.approx(1.6449 * 0.1 * math.sqrt(100 / 99) / 10 / 2) and low == -high
    assert not engines.interval([0.9, 0.7] * 50, 2.0)["inside"]
    assert not engines.interval([10.0, -10.0] * 5, 2.0)["inside"], "too few to say"


class Rewards:
    """An engine's process that rewards rows by the numbers of their prompts and is stopped after some runs."""

    def __init__(self, shift: float, runs: int) -> None:
        self.shift, self.runs = shift, runs

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        if not self.runs:
            raise KeyboardInterrupt
        self.runs -= 1
        places = range(job["first"], job["first"] + len(job["prompts"]))
        assert [ids for [ids] in job["prompts"]] == list(places)
        rows = [[float((7 * place + row) % 5) for row in range(job["rows"])] for place in places]
        survivors = rows if job["strategy"] == "best_of_n" else [one[:1] for one in rows]
        return {"seconds": 1.0, "best": [max(one) + self.shift for one in rows], "finished": survivors}


def test_rewards_of_two_engines_that_were_measured_are_not_measured_again(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines, output = script("engines"), tmp_path / "quality.json"
    monkeypatch.setattr(sys, "argv", ["engines.py"])
    prompts = [[place] for place in range(60)]  # parts of 25, 25 and 10, of two strategies

    def measured(runs: int, shift: float = 0.1, seed: int = 0) -> dict[str, Any]:
        made = script("bench").parser(None).parse_args(["--model", "tiny", "--seed", str(seed)])
        result = {**script("bench").header("engines", made), "versions": {}, "work": {"rows": 4, "seed": seed}}
        workers = {"engine_transformers": Rewards(0.0, runs), "engine_vllm": Rewards(shift, runs)}
        engines.compare(result, workers, prompts, output)
        assert workers["engine_vllm"].runs == 0
        return json.loads(output.read_text())

    with pytest.raises(KeyboardInterrupt):
        measured(3)
    half = json.loads(output.read_text())
    assert half["quality"]["best_of_n: answers"]["prompts"] == 25 and not list(tmp_path.glob("*.part"))
    with pytest.raises(SystemExit, match="another work"):
        measured(0, seed=1)
    whole = measured(3)
    output.unlink()
    assert measured(6)["rewards"] == whole["rewards"]
    told = whole["quality"]["speculative_rejection: answers"]
    assert told["prompts"] == 60 and told["mean_reward"]["engine_vllm"] - told["mean_reward"][
        "engine_transformers"
    ] == (pytest.approx(0.1))
    sd = engines.within_prompt_sd([[(7 * place + row) % 5 for row in range(4)] for place in range(60)])
    assert whole["within_prompt_sd"] == sd and told["difference"] == pytest.approx(0.1 / sd) and told["inside"]
    assert whole["quality"]["best_of_n: all rows"]["interval_90"] == [0, 0]
    assert "| best_of_n: answers | 60 |" in output.with_suffix(".md").read_text()


def test_engines_are_compared_with_two_rows_at_least(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["engines.py", "--quality", "10", "--rows", "1"])
    with pytest.raises(SystemExit):
        script("engines").main()
    assert "two --rows" in capsys.readouterr().err


def test_runs_alternate_so_that_nobody_is_always_first(script: Callable[[str], Any]) -> None:
    order: list[tuple[str, int]] = []

    def run(name: str) -> Callable[[int], dict[str, Any]]:
        return lambda pair: order.append((name, pair)) or {"seconds": 1.0}  # type: ignore[func-returns-value]

    pairs = script("bench").alternating({name: run(name) for name in "ab"}, 2, first=1)
    assert order == [("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert len(pairs) == 2 and set(pairs[0]) == {"a", "b"}


def test_random_models_are_the_same_in_every_process(script: Callable[[str], Any]) -> None:
    bench = script("bench")
    one, other = (bench.load_model("tiny", "float32", seed=3)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    another, _ = bench.load_model("tiny", "float32", seed=4)
    assert not torch.equal(one.lm_head.weight, another.lm_head.weight)


# two devices


@pytest.mark.slow
def test_scores_beside_decoding_are_compared_with_one_thing_after_the_other(written: Callable[..., Any]) -> None:
    sizes = {"prompts": 3, "prompt": 20, "rows": 4, "tokens": 12, "batch-size": 2}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    result, markdown = written("two_gpus", *words, "--dtype", "float32", "--threads", "1", "--reward-device", "cpu")
    assert result["same_answers"] == result["prompts"] == 3 and result["prompts_in_flight"] == 2
    (pair,) = result["runs"]
    assert pair.keys() == {"overlapped", "in turns"} and result["speedup"]["median"] > 0
    assert "3 of 3 answers are the same" in markdown
