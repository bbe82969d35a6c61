"""kill -9 at any moment, the same command again, and the final answers are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alpaca_eval.main
import lm_eval
import lm_eval.evaluator
import pytest
import yaml
from arithmetic import distinct_problems, question
from lm_eval.tasks import TaskManager
from support import FULL, ROOT, forked

from specrej_eval import cli
from specrej_eval.core import GenerationResult
from specrej_eval.engines.transformers import engine as transformers_engine
from specrej_eval.harness.alpaca_eval import decoder as alpaca_eval_decoder
from specrej_eval.harness.alpaca_eval import judge as alpaca_eval_judge
from specrej_eval.harness.lm_eval import model as lm_eval_model
from specrej_eval.records import journal
from specrej_eval.records.outputs import OutputsFolder, open_run

PROMPTS = [question(operands) for operands in distinct_problems("test", 60, seed=4)]
IMPORTED = (transformers_engine, alpaca_eval_decoder, alpaca_eval_judge, lm_eval_model, lm_eval.evaluator)
"""Here once, and not in each process that is forked."""
COSTS = ("seconds", "peak_bytes")  # of an answer: what differs from run to run

Counted = Callable[[str, int], None]


def without_costs(record: dict[str, Any]) -> dict[str, Any]:
    ledger = {name: value for name, value in record["ledger"].items() if name not in COSTS}
    return {**{name: value for name, value in record.items() if name not in COSTS}, "ledger": ledger}


def of_journal(path: Path) -> dict[str, dict[str, Any]]:
    """A whole journal: nothing is damaged, torn, or answered twice."""
    found = journal.read(path)
    assert not (found.scan.damaged or found.scan.torn or found.contradicting or found.repeated)
    results: dict[str, GenerationResult] = {key: entry.result for key, entry in found.entries.items()}
    return {key: without_costs(result.to_dict()) for key, result in sorted(results.items())}


class Command:
    """A command in a folder of its own: its words, the file its answers go to one by one, and what it leaves."""

    name: str
    records: str
    header = 0
    """Lines of ``records`` that are no answers."""
    place: int
    """A moment amid its answers."""

    def __init__(self, *, prompts: int, n: int, max_gen_toks: int) -> None:
        self.prompts = PROMPTS[:prompts]
        self.n, self.max_gen_toks = n, max_gen_toks

    def prepare(self, folder: Path) -> None:
        folder.mkdir()

    def words(self) -> list[str]:
        raise NotImplementedError

    def call(self) -> int:
        """The same in a forked process, in its working folder."""
        raise NotImplementedError

    def left(self, folder: Path) -> Any:
        raise NotImplementedError


class Run(Command):
    name, records, place = "run", "out/specrej_outputs.jsonl", 17

    def prepare(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "prompts.json").write_text(json.dumps(self.prompts))

    def words(self) -> list[str]:
        sizes = ["--n", str(self.n), "--max_gen_toks", str(self.max_gen_toks), "--batch_size", "2", "--until", "\n"]
        return ["-m", "specrej_eval", "run", "--prompts", "prompts.json", "--output", "out", *sizes]

    def call(self) -> int:
        return cli.main(self.words()[2:])

    def left(self, folder: Path) -> Any:
        record, answers = open_run(folder / "out")
        assert record.complete and not OutputsFolder(folder / "out").problems()
        return (
            [without_costs(item.to_dict()) for item in answers],
            of_journal(folder / "out" / "specrej_trajectories.jsonl"),
            without_costs({"ledger": record.totals}),
        )


class LmEval(Command):
    name, records, header, place = "lm_eval", "run.jsonl", 1, 5

    def words(self) -> list[str]:
        # the length is the task's own; a smaller one on the command line is for speed
        args = f"n={self.n},batch_size=2,journal=run.jsonl"
        task = [
            "--tasks",
            "specrej_arithmetic",
            "--include_path",
            str(ROOT / "tasks"),
            "--limit",
            str(len(self.prompts)),
        ]
        kwargs = ["--gen_kwargs", f"max_gen_toks={self.max_gen_toks}"]
        out = ["--log_samples", "--output_path", "out"]
        return ["-m", "lm_eval", "--model", "specrej", "--model_args", args, *task, *kwargs, *out]

    def call(self) -> int:
        # the command's own way, but for its index of all tasks and its look at the machine: seconds each
        lm_eval.evaluator.add_env_info = lambda results: None
        found = lm_eval.simple_evaluate(
            model="specrej",
            model_args={"n": self.n, "batch_size": 2, "journal": "run.jsonl"},
            tasks=["specrej_arithmetic"],
            task_manager=TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False),
            limit=len(self.prompts),
            gen_kwargs={"max_gen_toks": self.max_gen_toks},
            bootstrap_iters=0,
        )
        if found is None:  # the first rank has the results
            return 0
        samples = found["samples"]["specrej_arithmetic"]
        Path("out").mkdir(exist_ok=True)
        Path("out/results_.json").write_text(json.dumps({"results": found["results"]}))
        Path("out/samples_.jsonl").write_text("".join(json.dumps(row, default=str) + "\n" for row in samples))
        return 0

    def left(self, folder: Path) -> Any:
        results = max((folder / "out").rglob("results_*.json"))
        samples = max((folder / "out").rglob("samples_*.jsonl"))
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        assert len(rows) == len(self.prompts)
        return json.loads(results.read_text())["results"], rows, of_journal(folder / "run.jsonl")


class EvaluateFromModel(Command):
    name, records, place = "evaluate_from_model", "results/spr/specrej_outputs.jsonl", 13

    def prepare(self, folder: Path) -> None:
        folder.mkdir()
        rows = [{"instruction": text, "output": "I do not know.", "generator": "reference"} for text in self.prompts]
        (folder / "ref.json").write_text(json.dumps(rows))
        kwargs = {"n": self.n, "max_gen_toks": self.max_gen_toks, "batch_size": 2, "until": ["\n"]}
        entry = {"prompt_template": "{instruction}", "fn_completions": "specrej_completions"}
        (folder / "spr.yaml").write_text(yaml.safe_dump({"spr": {**entry, "completions_kwargs": kwargs}}))

    def words(self) -> list[str]:
        options = ["--evaluation_dataset", "ref.json", "--annotators_config", "specrej_reward_judge"]
        return ["-m", "alpaca_eval.main", "evaluate_from_model", "spr.yaml", *options]

    def call(self) -> int:
        alpaca_eval.main.evaluate_from_model(
            "spr.yaml",
            evaluation_dataset="ref.json",
            annotators_config="specrej_reward_judge",
            is_return_instead_of_print=True,
        )
        return 0

    def left(self, folder: Path) -> Any:
        results = folder / "results" / "spr"
        record, answers = open_run(results)
        assert record.complete and not OutputsFolder(results).problems()
        annotations = json.loads((results / "specrej_reward_judge" / "annotations.json").read_text())
        return (
            [without_costs(item.to_dict()) for item in answers],
            (results / "model_outputs.json").read_bytes(),
            [row["preference"] for row in annotations],
        )


COMMANDS: list[type[Command]] = [Run, LmEval, EvaluateFromModel]


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What forked runs print is shown if the test fails, and not before."""
    yield


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.name)
def test_killed_whenever_something_reaches_the_disk(
    kind: type[Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: None, counted: Counted
) -> None:
    """Every such moment, one at a time and twice in a row, with lines cut short too; a few of them in `make test`."""
    command = kind(prompts=4, n=3, max_gen_toks=16)
    command.prepare(tmp_path / "whole")
    monkeypatch.chdir(tmp_path / "whole")
    assert not forked.killed(command.call, 10**6)
    whole = command.left(tmp_path / "whole")
    draw = random.Random(kind.name)
    place = 0 if FULL else kind.place
    kills = 0
    while True:
        folder = tmp_path / f"at {place}"
        command.prepare(folder)
        monkeypatch.chdir(folder)
        if not forked.killed(command.call, place, torn=draw.choice((0, 0, 1, 40))):
            break
        kills += 1 + forked.killed(command.call, draw.randrange(2 * place + 2))
        assert not forked.killed(command.call, 10**6)
        assert command.left(folder) == whole, f"killed at moment {place}"
        shutil.rmtree(folder)
        if not FULL:
            break
        place += 1
    counted(f"kills -9: {command.name}", kills)
    assert kills > (8 if FULL else 0)


def of_all_ranks(command: Command, folder: Path) -> dict[str, dict[str, Any]]:
    """The answers behind a run, whichever of its processes has written them; two never contradict each other."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("run*.jsonl" if isinstance(command, LmEval) else "specrej_trajectories*.jsonl")):
        for key, result in of_journal(path).items():
            assert found.setdefault(key, result) == result, f"{path.name} contradicts another file"
    return dict(sorted(found.items()))


def shown(command: Command, folder: Path) -> Any:
    """What the user sees of a run: its answers, or lm-eval's results and samples."""
    if isinstance(command, Run):
        record, answers = open_run(folder / "out")
        assert record.complete and not OutputsFolder(folder / "out").problems()
        return [without_costs(item.to_dict()) for item in answers]
    results, samples = ((folder / "out").rglob(pattern) for pattern in ("results_*.json", "samples_*.jsonl"))
    rows = sorted(map(json.loads, max(samples).read_text().splitlines()), key=lambda row: row["doc_id"])
    return json.loads(max(results).read_text())["results"], rows


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [Run, LmEval], ids=lambda kind: kind.name)
def test_two_ranks_killed_whenever_something_reaches_the_disk(
    kind: type[Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: None, counted: Counted
) -> None:
    """The first rank at every such moment, and then the other, as when a machine is gone; gone on with by two or one,
    in turn. One moment in `make test`."""
    command = kind(prompts=8 if FULL else 4, n=3, max_gen_toks=16)
    command.prepare(tmp_path / "whole")
    monkeypatch.chdir(tmp_path / "whole")
    assert not forked.killed(command.call, 10**6)
    whole = shown(command, tmp_path / "whole"), of_all_ranks(command, tmp_path / "whole")
    place = 0 if FULL else 2
    kills = 0
    while True:
        folder = tmp_path / f"at {place}"
        command.prepare(folder)
        monkeypatch.chdir(folder)
        first, *others = forked.together(command.call, 2, killed_at=place)
        if first == 0:
            assert others == [0]
            break
        assert first == -signal.SIGKILL
        kills += 2
        if place % 2:
            assert not forked.killed(command.call, 10**6)
        else:
            assert forked.together(command.call, 2) == [0, 0]
        assert (shown(command, folder), of_all_ranks(command, folder)) == whole, f"killed at moment {place}"
        shutil.rmtree(folder)
        if not FULL:
            break
        place += 1
    counted(f"kills -9: {command.name}, two ranks", kills)
    assert kills >= (16 if FULL else 2)


# the commands themselves


def started(command: Command, folder: Path) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'autoload'}",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "errors").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, *command.words()], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=errors
        )


def answers_in(command: Command, folder: Path) -> int:
    path = folder / command.records
    return max(0, path.read_bytes().count(b"\n") - command.header) if path.is_file() else 0


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [Run, LmEval], ids=lambda kind: kind.name)
def test_the_command_killed_again_and_again_ends_with_the_answers_of_one_that_was_not(
    kind: type[Command], tmp_path: Path, counted: Counted
) -> None:
    """Eight kills: after so many more answers and a random while, two of them before the first answer can be there."""
    command = kind(prompts=60, n=16, max_gen_toks=96)
    for name in ("whole", "killed"):
        command.prepare(tmp_path / name)
    assert started(command, tmp_path / "whole").wait(timeout=600) == 0, (tmp_path / "whole/errors").read_text()[-3000:]
    whole = command.left(tmp_path / "whole")
    folder, draw, last = tmp_path / "killed", random.Random(kind.name), 0
    for more in (None, 1, None, 5, 3, 8, 2, 9):
        process = started(command, folder)
        deadline = time.monotonic() + (300 if more is not None else draw.uniform(0.2, 4))
        while time.monotonic() < deadline and process.poll() is None:
            if more is not None and answers_in(command, folder) >= last + more:
                time.sleep(draw.uniform(0, 0.2))
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (folder / "errors").read_text()[-3000:]
        now = answers_in(command, folder)
        assert now >= last, "answers are gone"
        last = now
        counted(f"kills -9: {command.name}", 1)
    assert 28 <= last < len(command.prompts)
    assert started(command, folder).wait(timeout=600) == 0, (folder / "errors").read_text()[-3000:]
    assert command.left(folder) == whole
