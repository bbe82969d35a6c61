"""`specrej-eval submission lm-eval`, on the files of a real run of the embedded pair."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from specrej_eval import cli
from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD
from specrej_eval.harness.lm_eval.model import SpecRejLM
from specrej_eval.records.lm_eval_files import MARK

QUESTIONS = ["12 + 34 = ?", "50 + 7 = ?", "1 + 2 = ?"]
TASK = "sums"
EXPECTED = "SpR_alpha0.5_n4_small_judge"


def run_lm_eval(folder: Path, *, limit: int | None) -> None:
    """What ``lm_eval --model specrej --log_samples --output_path FOLDER`` does, on a task of three sums."""
    rows = [{"question": question, "answer": "x"} for question in QUESTIONS]
    task = {
        "task": TASK,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "loose")],
    }
    tracker = EvaluationTracker(output_path=str(folder))
    lm = SpecRejLM(
        n=4, max_gen_toks=24, trace_path=str(folder / "trace.jsonl"), journal=str(folder / "run.jsonl"), device="cpu"
    )
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        limit=limit,
        evaluation_tracker=tracker,
    )
    assert results is not None
    results["config"]["model"] = "specrej"  # simple_evaluate was given an object; the command line gives the name
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip for all packages
        folder = tmp_path_factory.mktemp("real")
        run_lm_eval(folder / "whole", limit=None)
        run_lm_eval(folder / "part", limit=2)
    return folder


class Run:
    """Files of a real run in ``results``, as if its models had been ``org/small`` and ``org/judge``."""

    def __init__(self, folder: Path, real: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder / "results"
        self.out = folder / "out"
        self._capsys = capsys
        shutil.copytree(real / "whole", self.folder)
        self.change(self._other_models)

    def _other_models(self, content: dict[str, Any]) -> None:
        block = content["config"]["specrej"]
        block["embedded_demo_pair"] = False
        block["reward_model"] = "org/judge"
        block["arguments"] |= {
            "pretrained": "org/small",
            "reward_model": "org/judge",
            "trace_path": str(self.folder / "trace.jsonl"),
            "journal": "run.jsonl",
        }
        content["model_name"] = "org/small"
        content["model_name_sanitized"] = "org__small"

    @property
    def results(self) -> Path:
        (path,) = self.folder.rglob("results_*.json")
        return path

    @property
    def samples(self) -> Path:
        (path,) = self.folder.rglob(f"samples_{TASK}_*.jsonl")
        return path

    def change(self, change: Callable[[dict[str, Any]], None], path: Path | None = None) -> None:
        path = path or self.results
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    def change_samples(self, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        """Change the lines, and what the results file knows of their hashes."""
        lines = [json.loads(line) for line in self.samples.read_text(encoding="utf-8").splitlines()]
        lines = change(lines) or lines
        self.samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        together = "".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)
        digest = hashlib.sha256(together.encode()).hexdigest()
        self.change(lambda content: content["task_hashes"].update({TASK: digest}))

    def copy_as(self, date: str, change: Callable[[dict[str, Any]], None]) -> None:
        """The same run once more, with another date."""
        before = self.results.stem.removeprefix("results_")
        results, samples = self.results, self.samples
        shutil.copy(samples, samples.with_name(samples.name.replace(before, date)))
        target = results.with_name(f"results_{date}.json")
        shutil.copy(results, target)
        self.change(change, target)

    def submit(self, *words: object) -> str:
        code, out, err = self._call(*words)
        assert code == 0, err
        return out

    def refused(self, *words: object) -> str:
        before = {path for path in self.out.rglob("*") if path.is_file()}
        code, out, err = self._call(*words)
        assert (code, out) == (1, "")
        assert {path for path in self.out.rglob("*") if path.is_file()} == before
        assert "hint: " in err
        return err

    def _call(self, *words: object) -> tuple[int, str, str]:
        code = cli.main(["submission", "lm-eval", str(self.folder), "--output", str(self.out), *map(str, words)])
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def finished(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, real, capsys)


# --- what is collected ---


def test_a_run_is_collected_under_a_name_of_its_own(finished: Run) -> None:
    text = finished.submit()
    folder = finished.out / EXPECTED
    date = finished.results.stem.removeprefix("results_")
    assert sorted(path.name for path in finished.out.rglob("*") if path.is_file()) == [
        f"results_{date}.json",
        f"samples_{TASK}_{date}.jsonl",
        f"specrej_journal_{date}.jsonl",
        f"specrej_trace_{date}.jsonl",
    ]
    before = json.loads(finished.results.read_text())
    after = json.loads((folder / f"results_{date}.json").read_text())
    assert after["model_name"] == after["model_name_sanitized"] == EXPECTED
    assert after[MARK]["pretrained"] == after[MARK]["lm_eval_model_name"] == "org/small"
    changed = {"model_name", "model_name_sanitized", MARK}
    assert {name: value for name, value in after.items() if name not in changed} == {
        name: value for name, value in before.items() if name not in changed
    }
    assert (folder / f"samples_{TASK}_{date}.jsonl").read_bytes() == finished.samples.read_bytes()
    assert (folder / f"specrej_trace_{date}.jsonl").read_bytes() == (finished.folder / "trace.jsonl").read_bytes()
    assert (folder / f"specrej_journal_{date}.jsonl").read_bytes() == (finished.folder / "run.jsonl").read_bytes()
    assert "greedy" in text, "what the run warned of is passed on"
    assert EXPECTED in text


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"strategy": "best_of_n"}, "Bo4_small_judge"),
        ({"alpha": 0.0}, "Bo4_small_judge"),
        ({"alpha": 0.25, "n": 64}, "SpR_alpha0.25_n64_small_judge"),
        ({"reward_model": "likelihood", "strategy": "best_of_n"}, "Bo4_small_likelihood"),
    ],
)
def test_the_name_says_what_was_run(finished: Run, arguments: dict[str, Any], name: str) -> None:
    finished.change(lambda content: content["config"]["specrej"]["arguments"].update(arguments))
    finished.submit()
    assert [path.name for path in finished.out.iterdir()] == [name]


def test_a_name_of_ones_own(finished: Run) -> None:
    finished.submit("--name", "mine")
    (results,) = finished.out.glob("mine/results_*.json")
    assert json.loads(results.read_text())["model_name"] == "mine"


def test_files_of_every_rank_are_collected(finished: Run) -> None:
    def ranks(content: dict[str, Any]) -> None:
        content["config"]["specrej"]["world_size"] = 2
        content["config"]["specrej"]["arguments"] |= {"trace_path": "trace_rank0.jsonl", "journal": None}

    finished.change(ranks)
    for rank in range(2):
        (finished.folder / f"trace_rank{rank}.jsonl").write_text(json.dumps({"event": "run", "rank": rank}) + "\n")
    finished.submit()
    traces = sorted(finished.out.rglob("specrej_trace*"))
    assert [path.stem[-6:] for path in traces] == ["_rank0", "_rank1"]
    assert [json.loads(path.read_text())["rank"] for path in traces] == [0, 1]
    assert not list(finished.out.rglob("specrej_journal*"))


def test_files_of_all_processes_that_joined_are_collected_and_none_of_the_users(finished: Run) -> None:
    def joined(content: dict[str, Any]) -> None:
        content["config"]["specrej"]["arguments"] |= {"journal": "run.jsonl", "join": True}

    finished.change(joined)
    whole = (finished.folder / "run.jsonl").read_bytes()
    (finished.folder / "run.jsonl").unlink()
    for name in ("run_joined0", "run_joined7", "run_backup"):
        (finished.folder / f"{name}.jsonl").write_bytes(whole)
    finished.submit()
    assert [path.stem.rpartition("_")[2] for path in sorted(finished.out.rglob("specrej_journal*"))] == [
        "joined0",
        "joined7",
    ]


def test_side_files_that_are_gone_are_said(finished: Run) -> None:
    (finished.folder / "trace.jsonl").unlink()
    assert "trace.jsonl" in finished.submit().partition("note: ")[2]


def test_of_several_runs_of_one_thing_the_newest_is_taken(finished: Run) -> None:
    old = finished.results.stem.removeprefix("results_")

    def newer(content: dict[str, Any]) -> None:
        content["date"] += 100
        content["config"]["specrej"]["arguments"]["batch_size"] = 1  # decides nothing

    new = "2031-01-01T00-00-00.000001"
    finished.copy_as(new, newer)
    text = finished.submit()
    assert f"results_{old}.json is an older run of the same: left out" in text
    assert [path.name for path in finished.out.rglob("results_*")] == [f"results_{new}.json"]
    assert [path.name for path in finished.out.rglob("samples_*")] == [f"samples_{TASK}_{new}.jsonl"]


def test_different_runs_get_folders_of_their_own(finished: Run) -> None:
    new = "2031-01-01T00-00-00.000001"
    finished.copy_as(new, lambda content: content["config"]["specrej"]["arguments"].update(strategy="best_of_n"))
    finished.submit()
    assert sorted(path.name for path in finished.out.iterdir()) == ["Bo4_small_judge", EXPECTED]


def test_degraded_and_truncated_answers_are_said(finished: Run) -> None:
    finished.change(lambda content: content["config"]["specrej"]["per_task"][TASK].update(degraded=2, truncated=1))
    text = finished.submit()
    assert "2 answers gave up rows for want of memory (degraded)" in text
    assert "1 prompt was cut" in text


@pytest.mark.parametrize("argument", ["journal", "trace_path"])
@pytest.mark.parametrize("how", ["absolute", "relative", "link", "of another kind", "unnameable"])
def test_a_file_that_is_not_the_runs_own_is_never_published(
    argument: str, how: str, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = finished.folder.parent / "secret.jsonl"
    # even a real journal or trace: what a results file names outside its folder is not its writer's to publish
    shutil.copy(finished.folder / {"journal": "run.jsonl", "trace_path": "trace.jsonl"}[argument], secret)
    named = {"absolute": str(secret), "relative": "../secret.jsonl", "unnameable": "x" * 5000 + "\0"}.get(how, "mine")
    monkeypatch.chdir(finished.folder)
    if how == "link":
        (finished.folder / named).symlink_to(secret)
    elif how == "of another kind":
        (finished.folder / named).write_text("root:x:0:0\n")
    arguments = {argument: named}
    finished.change(lambda content: content["config"]["specrej"]["arguments"].update(arguments))
    text = finished.submit()
    taken = {"journal": "specrej_journal", "trace_path": "specrej_trace"}
    assert not [*finished.out.rglob(f"{taken.pop(argument)}*")]
    assert [*finished.out.rglob(f"{taken.popitem()[1]}*")], "the other one is the run's own"
    assert f"{argument}=" in text.partition("note: ")[2] and "left out" in text


@pytest.mark.parametrize("ranks", ["many", -1, 10**12, [2], 1.5])
def test_a_number_of_processes_that_is_none_is_refused(ranks: object, finished: Run) -> None:
    finished.change(lambda content: content["config"]["specrej"].update(world_size=ranks))
    assert "world_size" in finished.refused()


@pytest.mark.parametrize("strategy", ["../../../x", "/etc", "a\0b", "x" * 400])
def test_the_name_of_a_strategy_leads_nowhere(strategy: str, finished: Run) -> None:
    before = {*finished.folder.parent.iterdir()}
    finished.change(lambda content: content["config"]["specrej"]["arguments"].update(strategy=strategy))
    finished.submit()
    (made,) = finished.out.iterdir()
    assert made.is_dir() and {*finished.folder.parent.iterdir()} - before == {finished.out}


def test_the_name_of_a_task_leads_nowhere(finished: Run) -> None:
    task = "../../secret"
    for name in ("n-samples", "configs", "results"):
        finished.change(lambda content, name=name: content[name].update({task: content[name].pop(TASK)}))  # type: ignore[misc]
    assert "cannot be part of a path" in finished.refused()


def test_samples_that_are_a_link_out_of_the_folder_are_refused(finished: Run) -> None:
    elsewhere = finished.folder.parent / "samples.jsonl"
    samples = finished.samples
    samples.rename(elsewhere)
    samples.symlink_to(elsewhere)
    assert "is a link out of the folder" in finished.refused()


def test_a_submission_inside_the_results_folder_is_no_run(finished: Run) -> None:
    finished.out = finished.folder / "out"
    finished.submit()
    finished.submit("--force")


# --- refusals ---


def test_the_real_run_is_of_the_embedded_pair(real: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for folder in ("whole", "part"):
        assert cli.main(["submission", "lm-eval", str(real / folder), "--output", str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert "embedded demo pair" in err and "results_" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("argument", "folder"), [("pretrained", DEMO_POLICY), ("reward_model", DEMO_REWARD)])
def test_the_embedded_pair_by_its_folder(finished: Run, argument: str, folder: Path) -> None:
    finished.change(lambda content: content["config"]["specrej"]["arguments"].update({argument: str(folder)}))
    assert "embedded demo pair" in finished.refused()


def test_a_run_with_a_limit(finished: Run, real: Path) -> None:
    shutil.rmtree(finished.folder)
    shutil.copytree(real / "part", finished.folder)
    finished.change(finished._other_models)
    error = finished.refused()
    assert "--limit 2" in error and finished.results.name in error


def test_a_choice_of_documents(finished: Run) -> None:
    finished.change(lambda content: content["n-samples"][TASK].update(original=1200))
    assert f"task '{TASK}' answered 3 of 1200 documents" in finished.refused()


def test_results_of_another_model(finished: Run) -> None:
    def other(content: dict[str, Any]) -> None:
        del content["config"]["specrej"]
        content["config"]["model"] = "hf"

    finished.change(other)
    error = finished.refused()
    assert "no 'specrej' (model 'hf')" in error and finished.results.name in error


def test_no_results(finished: Run, tmp_path: Path) -> None:
    finished.results.unlink()
    assert "no lm-eval results" in finished.refused()
    shutil.rmtree(finished.folder)
    assert "no such folder" in finished.refused()


def test_half_a_results_file(finished: Run) -> None:
    finished.results.write_text(finished.results.read_text()[:-20])
    assert finished.results.name in finished.refused()


def test_no_samples(finished: Run) -> None:
    finished.samples.unlink()
    error = finished.refused()
    assert "--log_samples" in error and f"samples_{TASK}_" in error


def test_samples_that_are_not_all_there(finished: Run) -> None:
    finished.change_samples(lambda lines: lines[:-1])
    error = finished.refused()
    assert "has 2 samples (filter 'loose')" in error and "says 3" in error


def test_a_document_twice(finished: Run) -> None:
    finished.change_samples(lambda lines: [*lines, lines[1]])
    error = finished.refused()
    assert "line 7 (document 1)" in error and "as in line 2" in error and finished.samples.name in error


@pytest.mark.parametrize("draws", [[""], [" "], ["fine", ""], []])
def test_an_empty_answer(finished: Run, draws: list[str]) -> None:
    def empty(lines: list[dict[str, Any]]) -> None:
        lines[2]["resps"] = [draws]

    finished.change_samples(empty)
    error = finished.refused()
    assert "line 3 (document 2)" in error and "'Q: 1 + 2 = ? A:' is empty" in error
    finished.submit("--allow_empty")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("doc_hash", lambda line: line["doc"].update(question="another")),
        ("prompt_hash", lambda line: line["arguments"]["gen_args_0"].update(arg_0="another")),
        ("prompt_hash", lambda line: line.update(arguments={})),
        ("target_hash", lambda line: line.update(target="another")),
        ("target_hash", lambda line: line.update(target_hash="0" * 64)),
    ],
)
def test_a_hash_that_does_not_match(finished: Run, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    finished.change_samples(lambda lines: change(lines[4]))
    error = finished.refused()
    assert f"line 5 (document 1): {name}" in error


def test_samples_of_another_results_file(finished: Run) -> None:
    finished.change(lambda content: content["task_hashes"].update({TASK: "0" * 64}))
    assert "task_hashes differ" in finished.refused()


def test_a_line_cut_short(finished: Run) -> None:
    finished.samples.write_text(finished.samples.read_text()[:-30])
    assert "line 6" in finished.refused()


def test_a_renamed_results_file(finished: Run) -> None:
    finished.results.rename(finished.results.with_name("results_best.json"))
    assert "lost the date" in finished.refused()


@pytest.mark.parametrize("name", ["org/small", "small", "Small"])
def test_the_bare_models_name(finished: Run, name: str) -> None:
    assert "the bare model's name" in finished.refused("--name", name)


@pytest.mark.parametrize("name", ["../up", "two words", ""])
def test_a_name_that_is_no_folder(finished: Run, name: str) -> None:
    assert "is not a valid folder name" in finished.refused("--name", name)


@pytest.mark.parametrize("words", [[], ["--name", "mine"]])
def test_two_runs_with_one_name(finished: Run, words: list[str]) -> None:
    finished.copy_as(
        "2031-01-01T00-00-00.000001",
        lambda content: content["config"]["specrej"]["arguments"].update(seed=7),
    )
    error = finished.refused(*words)
    assert "would both be called" in error and "seed: 0 in one, 7 in another" in error


def test_an_existing_folder_is_left_alone_without_force(finished: Run) -> None:
    finished.submit()
    (copy,) = finished.out.rglob("results_*.json")
    copy.write_text("{}")
    assert "--force" in finished.refused()
    assert copy.read_text() == "{}"
    finished.submit("--force")
    assert json.loads(copy.read_text())["model_name"] == EXPECTED


# --- secrets ---

PASSWORD, TOKEN = "Tr0ub4dor3", "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("secret", "where"),
    [
        ({"token": PASSWORD}, "a value under the name of a token"),
        ({"reward_model": f"http://me:{PASSWORD}@host"}, "an address with a password"),
        ({"token": TOKEN}, "a token of the Hugging Face hub"),
        ({"x": "sk-proj-" + PASSWORD * 3}, "an API key"),
    ],
)
def test_arguments_with_a_secret_are_refused(finished: Run, secret: dict[str, str], where: str) -> None:
    finished.change(lambda content: content["config"].update(model_args=secret))
    error = finished.refused()
    name = finished.results.name
    assert f"{EXPECTED}/{name}, line " in error and f"holds what looks like {where}" in error
    assert PASSWORD not in error and TOKEN not in error
    line = int(error.partition(", line ")[2].partition(",")[0])
    lines = json.dumps(json.loads(finished.results.read_text()), indent=2).splitlines()
    assert next(iter(secret.values())) in lines[line - 1]
    finished.submit("--allow_lookalikes")


@pytest.mark.parametrize("file", ["trace.jsonl", "run.jsonl", "samples"])
@pytest.mark.parametrize("own", [True, False])
def test_any_file_with_a_secret_is_refused(
    finished: Run, file: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished.samples if file == "samples" else finished.folder / file
    text = f"see http://me:{PASSWORD}@host"
    if own:
        monkeypatch.setenv("SPECREJ_REWARD_API_KEY", f'a "{PASSWORD}"')
        text = f'a "{PASSWORD}"'
    if file == "samples":
        finished.change_samples(lambda lines: lines[3].update(note=text))
        number = 4
    else:
        event = {"event": "round"} if file == "trace.jsonl" else {}  # what is no trace of ours is left out anyway
        number = len(path.read_text().splitlines()) + 1
        path.write_text(path.read_text() + json.dumps({**event, "note": text}) + "\n")
    error = finished.refused(*(["--allow_lookalikes"] if own else []))
    assert f"(from {str(path)!r}), line {number}, holds " in error and PASSWORD not in error
    assert ("the key in SPECREJ_REWARD_API_KEY" in error) is own
    if not own:
        finished.submit("--allow_lookalikes")
