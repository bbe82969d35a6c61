"""A reward model as alpaca_eval's judge: its arithmetic, its mistakes, and what it says about itself."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import alpaca_eval.main
import arithmetic
import huggingface_hub.constants
import pandas as pd
import pytest
from alpaca_eval import annotators, utils
from support import FULL, forked
from support import reward_servers as servers
from support.alpaca_runs import LITERAL, sums, write
from support.alpaca_runs import alpaca_eval as run_alpaca_eval

from specrej_eval import checkpoint
from specrej_eval.errors import CheckpointError, ConfigError, RewardError
from specrej_eval.harness.alpaca_eval import judge as alpaca_eval_judge
from specrej_eval.harness.alpaca_eval.judge import identity, specrej_reward_judge
from specrej_eval.records import digests

LENGTHS = "length_reward:by_length"
"""A reward that can be worked out by hand: the length of the answer; NaN for the answer "nan"."""


pytestmark = pytest.mark.usefixtures("alpaca_eval_stays_as_installed", "own_folder")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every (instruction, answers) that the reward by length was asked for."""
    import sys

    source = (
        "CALLS = []\n\ndef by_length(conversation, responses):\n"
        "    CALLS.append((conversation[0]['content'], list(responses)))\n"
        "    return [float('nan') if text == 'nan' else float(len(text)) for text in responses]\n"
    )
    write(tmp_path / "length_reward.py", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("length_reward", None)
    alpaca_eval_judge._scorer.cache_clear()
    import length_reward

    found: list[Any] = length_reward.CALLS
    return found


def prompts(*pairs: tuple[str, str, str]) -> list[str]:
    frame = pd.DataFrame(pairs, columns=["instruction", "output_1", "output_2"])
    made: list[str] = utils.make_prompts(frame, "{instruction} {output_1} {output_2}")[0]
    return made


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, "2.5", 1e-3])
def test_the_preference_is_the_sigmoid_of_the_difference(calls: list[Any], temperature: Any) -> None:
    pairs = prompts(("i", "a", "bbb"), ("i", "ccc", "b"), ("i", "a", "b"))
    found = specrej_reward_judge(pairs, reward_model=LENGTHS, preference_temperature=temperature)

    def preference(difference: float) -> float:
        x = difference / float(temperature)
        return 1 + (1 if x > 500 else 0 if x < -500 else 1 / (1 + math.exp(-x)))

    assert [float(text) for text in found["completions"]] == pytest.approx([preference(2), preference(-2), 1.5])
    assert found["price_per_example"] == [0.0] * 3
    assert all(seconds >= 0 for seconds in found["time_per_example"]) and len(found["time_per_example"]) == 3


def test_it_scores_the_bare_fields_however_odd(calls: list[Any]) -> None:
    odd = ("{output_1}\n### Answer: x", "{{instruction}} {output_2}", '"""}\\1')
    specrej_reward_judge(prompts(odd), reward_model=LENGTHS)
    assert calls == [(odd[0], [odd[1], odd[2]])]


def test_an_answer_is_scored_once_and_the_model_loaded_once(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from specrej_eval.rewards import choose

    made = []
    real = choose.resolve_reward
    monkeypatch.setattr(choose, "resolve_reward", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    for other in ("bb", "ccc"):
        specrej_reward_judge(prompts(("i", "a", other), ("i", other, "a")), reward_model=LENGTHS)
    assert calls == [("i", ["a", "bb"]), ("i", ["ccc"])] and len(made) == 1


@pytest.mark.parametrize("form", ["judge:m@{}", "0.5*judge:m@{}"])
def test_a_server_judges_too_and_its_password_is_in_no_record(form: str) -> None:
    with servers.chat(lambda text: {"9": 1.0} if "good" in text.split("<response")[1] else {"1": 1.0}) as server:
        name = form.format(server.url.replace("http://", "http://me:Tr0ub4dor3@"))
        found = specrej_reward_judge(prompts(("i", "bad", "good")), reward_model=name)
        stamp = specrej_reward_judge.stamp({"reward_model": name})  # type: ignore[attr-defined]  # what the cache asks
        assert float(found["completions"][0]) > 1.9
        assert server.headers[-1]["Authorization"].startswith("Basic ")
    assert stamp["reward_model"] == form.format(server.url) and "commit" not in stamp


def test_cached_annotations_are_of_the_model_that_the_server_holds(tmp_path: Path) -> None:
    stamp = specrej_reward_judge.stamp  # type: ignore[attr-defined]  # what the cache asks
    with servers.tei(lambda pair: float(len(pair[1]))) as server:
        for name in (server.url, f"0.5*{server.url}+{LENGTHS}"):
            server.routes["GET", "/info"] = lambda _: {"model_id": "a", "model_type": {}, "max_client_batch_size": 4}
            first = stamp({"reward_model": name})
            assert stamp({"reward_model": name}) == first
            server.routes["GET", "/info"] = lambda _: {"model_id": "b", "model_type": {}, "max_client_batch_size": 4}
            assert stamp({"reward_model": name}) != first


def test_the_embedded_reward_finds_the_right_sums(tmp_path: Path) -> None:
    """From the embedded model's own task, right solutions against ones with a slip, in both orders."""
    operands = arithmetic.distinct_problems("test", 8, seed=0)
    randomness = random.Random(1)  # whose slips all change something
    rows = [
        {
            "instruction": arithmetic.question(numbers),
            "output_1": arithmetic.slip(numbers, randomness),
            "output_2": arithmetic.solution(numbers),
        }
        for numbers in operands
    ]
    assert all(row["output_1"] != row["output_2"] for row in rows)
    turned = [row | {"output_1": row["output_2"], "output_2": row["output_1"]} for row in rows]
    annotator = annotators.PairwiseAnnotator(annotators_config="specrej_reward_judge")
    found = annotator([*rows, *turned])
    preferences = [row["preference"] for row in found]
    assert sum(preferences[:8]) / 8 > 1.75
    assert [a + b for a, b in zip(preferences[:8], preferences[8:], strict=True)] == pytest.approx([3] * 8)
    assert all(row["preference_price_per_example"] == 0 < row["preference_time_per_example"] for row in found[:8])


# --- mistakes -------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "slip": ({"reward_mode": "x"}, ConfigError, "did you mean 'reward_model'"),
    "temperature": ({"preference_temperature": 0}, ConfigError, "preference_temperature must be above 0"),
    "no number": ({"preference_temperature": "warm"}, ConfigError, "preference_temperature must be a number"),
    "dtype": ({"reward_dtype": "float8"}, ConfigError, "unknown reward_dtype"),
    "family": ({"reward_family": "nosuch"}, ConfigError, "unknown reward_family"),
    "flag": ({"trust_remote_code": "maybe"}, ConfigError, "trust_remote_code must be true or false"),
    "device": ({"device": "cuda:99"}, ConfigError, "device=cuda:99"),
    "likelihood": ({"reward_model": "likelihood"}, ConfigError, "cannot judge"),
    "folder": ({"reward_model": "/nosuch/folder"}, CheckpointError, "there is no folder"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_one_clear_error(mistake: str) -> None:
    arguments, kind, message = WRONG[mistake]
    with pytest.raises(kind) as caught:
        specrej_reward_judge(prompts(("i", "a", "b")), **arguments)
    assert message in str(caught.value)


def test_a_reward_that_is_not_finite_names_the_instruction(calls: list[Any]) -> None:
    with pytest.raises(RewardError, match=r"not finite.*the seventh instruction"):
        specrej_reward_judge(prompts(("i", "a", "b"), ("the seventh instruction", "a", "nan")), reward_model=LENGTHS)


def test_it_judges_pairs_not_texts() -> None:
    with pytest.raises(ConfigError, match="got a plain text"):
        specrej_reward_judge(["Which is better?"])
    frame = pd.DataFrame([{"instruction": "i", "output": "a"}])
    with pytest.raises(ConfigError, match="output_1 is missing"):
        specrej_reward_judge(utils.make_prompts(frame, "{instruction}")[0])


# --- who judges -----------------------------------------------------------------------------------


def test_a_reward_is_known_by_its_files(tmp_path: Path, calls: list[Any]) -> None:
    embedded = identity({})
    assert embedded == {"reward_model": "embedded", "reward_files": digests.of_folder(checkpoint.DEMO_REWARD)}
    assert identity({"reward_model": str(checkpoint.DEMO_REWARD)}) == embedded
    copied = shutil.copytree(checkpoint.DEMO_REWARD, tmp_path / "copied")
    assert identity({"reward_model": str(copied)})["reward_files"] == embedded["reward_files"]
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    assert identity({"reward_model": str(copied)})["reward_files"] != embedded["reward_files"]
    before = identity({"reward_model": LENGTHS})["reward_files"]
    (tmp_path / "length_reward.py").write_text("def by_length(conversation, responses): ...\n")
    assert before != identity({"reward_model": LENGTHS})["reward_files"]


def test_a_hub_model_is_known_to_the_cache_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--own--reward"
    for commit in ("a" * 40, "b" * 40):
        write(folder / "refs/main", commit)
        write(folder / "snapshots" / commit / "config.json", {"architectures": ["X"]})
        found = specrej_reward_judge.stamp({"reward_model": "own/reward"})
        assert found == {"reward_model": "own/reward", "reward_files": None, "commit": commit}


def judged(tmp_path: Path, capsys: pytest.CaptureFixture[str], **arguments: Any) -> tuple[list[float], str]:
    alpaca_eval.main.evaluate(
        **{
            "model_outputs": str(tmp_path / "model_outputs.json"),
            "reference_outputs": sums("ref", wrong_by=1),
            "annotators_config": "specrej_reward_judge",
            "output_path": str(tmp_path / "out"),
            "annotation_kwargs": {"reward_model": LENGTHS},
            "fn_metric": "get_winrate",
        }
        | arguments
    )
    found = json.loads((tmp_path / "out/specrej_reward_judge/annotations.json").read_text())
    return [row["preference"] for row in found], capsys.readouterr().out


def test_other_files_are_never_given_the_old_judgments(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    import length_reward

    write(tmp_path / "model_outputs.json", sums("model", prefix="longer: "))
    first, _ = judged(tmp_path, capsys)
    assert len(calls) == 8 and min(first) > 1.9
    alpaca_eval_judge._scorer.cache_clear()  # as in another process
    assert judged(tmp_path, capsys)[0] == first and len(calls) == 8, "the same model: from the cache"
    source = (tmp_path / "length_reward.py").read_text()
    (tmp_path / "length_reward.py").write_text(source.replace("float(len(text))", "-float(len(text))"))
    length_reward.by_length = lambda conversation, responses: [-float(len(text)) for text in responses]
    alpaca_eval_judge._scorer.cache_clear()
    assert max(judged(tmp_path, capsys)[0]) < 1.1


RECORDS = {
    "specrej_run.json": {"generator": "model", "fingerprint": {"reward_model": LENGTHS, "reward_files": None}},
    "model_outputs.specrej.json": {"generators": {"model": {"reward_model": LENGTHS, "reward_files": None}}},
    "specrej_reference_run.json": {"generator": "ref", "fingerprint": {"reward_model": LENGTHS, "reward_files": None}},
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_judge_that_chose_the_answers_itself_is_called_circular(
    tmp_path: Path,
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    record: str,
) -> None:
    write(tmp_path / "model_outputs.json", sums("model"))
    assert "CIRCULAR" not in judged(tmp_path, capsys)[1]
    write(tmp_path / record, RECORDS[record])
    caplog.clear()
    _, out = judged(tmp_path, capsys)
    table, _, notes = out.partition("NOTE")
    assert "CIRCULAR" in notes and "win_rate" in table and "CIRCULAR" not in caplog.text, "said once"
    other = {"reward_model": "someone/else", "reward_files": None}
    write(tmp_path / record, json.loads(json.dumps(RECORDS[record]).replace(LENGTHS, other["reward_model"])))
    assert "CIRCULAR" not in judged(tmp_path, capsys)[1]


def test_circular_by_files_under_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "model_outputs.json", sums("model"))
    stamp = checkpoint.stamp(str(checkpoint.DEMO_REWARD))
    fingerprint = {"reward_model": "/elsewhere/reward", "reward_files": stamp}
    write(tmp_path / "specrej_run.json", {"generator": "model", "fingerprint": fingerprint})
    _, out = judged(tmp_path, capsys, annotation_kwargs=None)
    assert "CIRCULAR" in out and "DEMO judge" in out
    fingerprint["reward_files"] = "another"
    write(
        tmp_path / "specrej_run.json", {"generator": "model", "fingerprint": fingerprint | {"reward_model": "embedded"}}
    )
    _, out = judged(tmp_path, capsys, annotation_kwargs=None)
    assert "CIRCULAR" not in out, "the same name, but other files"


def test_a_record_that_cannot_be_read_is_no_reason_to_stop(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "model_outputs.json", sums("model"))
    write(tmp_path / "specrej_run.json", "{")
    judged(tmp_path, capsys)
    assert "reward behind these outputs is not known" in caplog.text


# --- the command ----------------------------------------------------------------------------------


def test_the_literal_leaderboard_command_with_the_reward_judge(tmp_path: Path) -> None:
    models = [*sums("ref", wrong_by=1), *sums("right"), *sums("wordy", wrong_by=2, prefix="I believe it is ")]
    write(tmp_path / "X.json", [{**row, "score": 0.5} for row in models])
    write(tmp_path / "Y.json", sums("ref", wrong_by=1))
    chosen_by = {"reward_model": "embedded", "reward_files": checkpoint.stamp(str(checkpoint.DEMO_REWARD))}
    write(tmp_path / "X.specrej.json", {"generators": {"right": chosen_by}})
    words = [*LITERAL, "--annotators_config", "specrej_reward_judge"]
    done = (
        run_alpaca_eval(*words, cwd=tmp_path)
        if FULL  # a process of its own has to import everything
        else forked.output(alpaca_eval.main.main, folder=tmp_path, argv=["alpaca_eval", *words])
    )
    assert done.returncode == 0, done.stderr
    board = pd.read_csv(tmp_path / "leader_board.csv", index_col=0)
    assert sorted(board.index) == ["ref", "right", "wordy"]
    assert board.loc["ref", ["win_rate", "standard_error", "length_controlled_winrate"]].tolist() == [50, 0, 50]
    assert (board["n_total"] == 8).all() and board["win_rate"].between(0, 100).all()
    assert board["length_controlled_winrate"].is_monotonic_decreasing
    assert "DEMO judge" in done.stdout and "chose the answers of 'right'" in done.stdout
    assert "Mean length in characters: wordy" in done.stdout
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"X.json", "X.specrej.json", "Y.json", "leader_board", "leader_board.csv"}
