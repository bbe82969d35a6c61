"""Several processes on one journal with join=True: the records of one, and nothing decoded twice, however they end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from arithmetic import distinct_problems, question
from support import FULL, ROOT, forked
from support.simulated import Process, make_generator, request

from specrej_eval import cli, load
from specrej_eval import generator as generators
from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult
from specrej_eval.errors import LimitReached, RewardError
from specrej_eval.records import journal, lock
from specrej_eval.records.outputs import OutputsFolder, open_run

Counted = Callable[[str, int], None]
PROMPTS = [f"prompt {number}" for number in range(12)]


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "POLL", 0.01)
    monkeypatch.setattr(lock, "PATIENCE", 0.2)


def without_costs(result: GenerationResult) -> dict[str, Any]:
    told = result.to_dict()
    for name in ("seconds", "peak_bytes"):
        del told["ledger"][name]
    return told


def of_files(folder: Path, pattern: str = "run*.jsonl") -> dict[str, dict[str, Any]]:
    """All answers of a journal's files. None is damaged, and none stands there twice."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(pattern)):
        contents = journal.read(path)
        assert not (contents.scan.damaged or contents.contradicting or contents.repeated)
        assert not contents.entries.keys() & found.keys(), f"{path.name} repeats another file"
        found |= {key: without_costs(entry.result) for key, entry in contents.entries.items()}
    return found


def nothing_else(folder: Path) -> None:
    left = {path.name for path in folder.glob(".*")}
    assert not left, f"a regular end leaves nothing: {left}"


# simulated models: many processes, many kills


def processes() -> dict[str, Process]:
    def process(number: int) -> Process:
        return Process(
            length=lambda row: 3 + (row * 7 + number * 5) % 20,
            partial=lambda row, tokens: float((row * 31 + tokens * 17 + number * 13) % 101),
            final=lambda row: float((row * 37 + number * 11) % 103),
        )

    return {says: process(number) for number, says in enumerate(PROMPTS)}


def settings(folder: Path, **args: Any) -> RunConfig:
    given = {"n": 4, "max_gen_toks": 16, "batch_size": 2, "journal": str(folder / "run.jsonl"), **args}
    return RunConfig.from_args(given)[0]


def answers(config: RunConfig, says: Sequence[str] = PROMPTS) -> tuple[dict[str, Any], int]:
    """What a process has at its end, and how many prompts it decoded."""
    generator = make_generator(processes(), config)
    found = {}
    running = generator.run([request(config, text) for text in says], progress=False)
    for index, result in running:
        found[says[index]] = without_costs(result)
        time.sleep(0.001)  # the others' turn, on however few cores
    if (kept := generator._open_journal()) is not None:
        kept.close()
    return json.loads(json.dumps(found)), len(generator.engine.sessions)


def at_work(folder: Path, place: int) -> Callable[[], int]:
    """A process that joins, and writes down what it has at its end."""

    def work() -> int:
        draw = random.Random(place)
        mine = draw.sample(PROMPTS, len(PROMPTS))
        found, decoded = answers(settings(folder, join=True), mine)
        (folder / f"found{place}.json").write_text(json.dumps({"answers": found, "decoded": decoded}, sort_keys=True))
        return 0

    return work


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What one process comes to: its answers, and its records."""
    folder = tmp_path_factory.mktemp("alone")
    found, decoded = answers(settings(folder))
    assert decoded == len(PROMPTS)
    return found, of_files(folder)


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.full), 3])
def test_several_have_the_records_of_one_and_decode_nothing_twice(
    number: int, tmp_path: Path, alone: tuple[dict[str, Any], dict[str, dict[str, Any]]], counted: Counted
) -> None:
    for attempt in range(10 if FULL else 1):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        pids = [forked.start(at_work(folder, place)) for place in range(number)]
        assert [forked.ended(pid) for pid in pids] == [0] * number
        told = [json.loads((folder / f"found{place}.json").read_text()) for place in range(number)]
        assert all(each["answers"] == alone[0] for each in told), "each ends with all answers"
        assert sum(each["decoded"] for each in told) == len(PROMPTS)
        assert of_files(folder) == alone[1]
        nothing_else(folder)
        again = [answers(settings(folder, join=True)), answers(settings(folder))]
        assert all(found == alone[0] and decoded == 0 for found, decoded in again), "all is done"
        counted("runs of several processes that join", 1)


def test_killed_whenever_something_reaches_the_disk_the_others_take_its_prompts_over(
    tmp_path: Path, alone: tuple[dict[str, Any], dict[str, dict[str, Any]]], counted: Counted
) -> None:
    """One of three at every such moment, and another at some other one; a few of them in `make test`."""
    draw = random.Random(3)
    kills = 0
    for place in range(24) if FULL else (5,):
        folder = tmp_path / f"at {place}"
        folder.mkdir()
        moments = [forked.Moments(place), forked.Moments(draw.randrange(20)), None]
        pids = [forked.start(at_work(folder, each), moments=moments[each]) for each in range(3)]
        codes = [forked.ended(pid) for pid in pids]
        assert set(codes[:2]) <= {0, -signal.SIGKILL} and codes[2] == 0, codes
        kills += codes.count(-signal.SIGKILL)
        found = json.loads((folder / "found2.json").read_text())
        assert found["answers"] == alone[0], f"killed at moment {place}"
        assert of_files(folder) == alone[1], f"killed at moment {place}"
        assert answers(settings(folder, join=True)) == (alone[0], 0)
        shutil.rmtree(folder)
    counted("kills -9: processes that join", kills)
    assert kills >= (15 if FULL else 1)


def test_all_killed_at_once_and_begun_again_by_fewer_or_alone(
    tmp_path: Path, alone: tuple[dict[str, Any], dict[str, dict[str, Any]]]
) -> None:
    for again in (True, False):
        folder = tmp_path / str(again)
        folder.mkdir()
        pids = [forked.start(at_work(folder, place), moments=forked.Moments(9 + place)) for place in range(2)]
        assert [forked.ended(pid) for pid in pids] == [-signal.SIGKILL] * 2
        before = len(of_files(folder))
        found, decoded = answers(settings(folder, join=again))
        assert found == alone[0] and decoded == len(PROMPTS) - before
        assert of_files(folder) == alone[1]
        assert not [*folder.glob(".*.claims")], "what the killed ones had claimed is removed"


def test_who_has_a_prompt_and_fails_leaves_it_to_the_others(tmp_path: Path) -> None:
    """A reward that fails in one process alone: its prompts are decoded by the other, which waits for them."""
    ready, go = os.pipe()

    def fails() -> int:
        config = settings(tmp_path, join=True)
        generator = make_generator(processes(), config)

        def failing(*args: Any) -> list[float]:
            os.write(go, b".")
            time.sleep(0.2)  # the other has come to where nothing else is left
            raise RewardError("the server is gone")

        generator.reward.score = failing
        try:
            list(generator.run([request(config, text) for text in PROMPTS[:2]], progress=False))
        except RewardError:
            time.sleep(30)  # it lives on: its claims are given up all the same
            return 0
        return 1

    pid = forked.start(fails)
    try:
        assert os.read(ready, 1) == b"."
        found, decoded = answers(settings(tmp_path, join=True), PROMPTS[:2])
        assert len(found) == 2 and decoded == 2
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_limit_of_time_ends_who_waits_for_others(tmp_path: Path) -> None:
    from specrej_eval.records.claims import Claims

    config = settings(tmp_path, join=True, max_seconds=600)
    generator = make_generator(processes(), config)
    others = Claims(tmp_path / "run.jsonl")
    assert others.take(request(config, PROMPTS[0]).key)
    running = generator.run([request(config, text) for text in PROMPTS[:2]], progress=False)
    assert next(running)[0] == 1
    generator.started -= 601
    with pytest.raises(LimitReached, match=r"1 of 2 prompts are answered.*run_joined\*.jsonl"):
        next(running)
    others.give_up_all()


def test_the_progress_bar_says_for_whom_it_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from specrej_eval.records.claims import Claims

    config = settings(tmp_path, join=True, max_seconds=0.3)
    others = Claims(tmp_path / "run.jsonl")
    assert others.take(request(config, PROMPTS[0]).key)
    with pytest.raises(LimitReached):
        list(make_generator(processes(), config).run([request(config, PROMPTS[0])]))
    assert "waiting for 1 prompt of other processes" in capsys.readouterr().err
    others.give_up_all()


# real models


RUN = 8 if FULL else 3
TEXTS = [question(operands) for operands in distinct_problems("test", 30, seed=5)]


@pytest.mark.full
def test_real_models_write_the_bits_of_one_process(tmp_path: Path, counted: Counted) -> None:
    """Python, two processes with other batch sizes, the demo pair."""
    arguments = {"n": 4, "max_gen_toks": 16, "logprobs": True}
    texts = TEXTS if FULL else TEXTS[:6]
    (tmp_path / "alone").mkdir()
    load(**arguments, journal=str(tmp_path / "alone" / "run.jsonl")).generate(texts, until="\n")
    both = tmp_path / "both"
    both.mkdir()

    def work(batch_size: int) -> int:
        generator = load(**arguments, batch_size=batch_size, journal=str(both / "run.jsonl"), join=True)
        found = generator.generate(texts, until="\n")
        (both / f"texts{batch_size}.json").write_text(json.dumps([result.text for result in found]))
        return 0

    pids = [forked.start(lambda size=size: work(size)) for size in (1, 2)]
    assert [forked.ended(pid) for pid in pids] == [0, 0]
    assert of_files(both) == of_files(tmp_path / "alone") and len(of_files(both)) == len(texts)
    assert (both / "texts1.json").read_bytes() == (both / "texts2.json").read_bytes()
    counted("runs of several processes that join", 1)


def run(folder: Path, *words: str, limit: int = len(TEXTS)) -> int:
    """`specrej-eval run` in a folder of its own."""
    prompts = folder / "prompts.json"
    if not prompts.is_file():
        prompts.write_text(json.dumps(TEXTS))
    sizes = ["--n", "3", "--max_gen_toks", "16", "--batch_size", "1", "--until", "\n", "--limit", str(limit)]
    return cli.main(["run", "--prompts", str(prompts), "--output", str(folder / "out"), *sizes, *words])


def archive(folder: Path) -> Any:
    """What a run has left, which is complete: answers, rows, cost. No row stands there twice."""
    record, found = open_run(folder / "out")
    assert record.complete and not OutputsFolder(folder / "out").problems()
    costs = ("seconds", "peak_bytes")
    told = [item.to_dict() for item in found]
    for item in told:
        item["ledger"] = {name: value for name, value in item["ledger"].items() if name not in costs}
        del item["seconds"]
    totals = {name: value for name, value in record.totals.items() if name not in costs}
    return told, of_files(folder / "out", "specrej_trajectories*.jsonl"), totals


@pytest.fixture(scope="module")
def alone_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    assert run(folder, limit=RUN) == 0
    return archive(folder)


def test_commands_on_one_folder_leave_the_archive_of_one(tmp_path: Path, alone_run: Any, counted: Counted) -> None:
    """Two of `run --join true`, of which one may be killed whenever something reaches the disk; then a third one."""
    kills = 0
    for place in (None, *range(2, 60, 3)) if FULL else (9,):
        folder = tmp_path / str(place)
        folder.mkdir()
        moments = None if place is None else forked.Moments(place)
        pids = [
            forked.start(lambda folder=folder: run(folder, "--join", "true", limit=RUN), moments=each)
            for each in (moments, None)
        ]
        codes = [forked.ended(pid) for pid in pids]
        assert codes[0] in (0, -signal.SIGKILL) and codes[1] == 0
        kills += codes[0] != 0
        assert of_files(folder / "out", "specrej_trajectories*.jsonl") == alone_run[1]
        assert open_run(folder / "out")[0].complete
        assert run(folder, "--join", "true", limit=RUN) == 0, "nothing is to do"
        assert codes[0] or not [*(folder / "out").glob(".*"), *(folder / "out").glob("specrej_outputs_*")]
        assert archive(folder)[::2] == alone_run[::2], f"killed at moment {place}"
        counted("runs of several processes that join", 1)
    counted("kills -9: processes that join", kills)


@pytest.mark.full
def test_the_folder_of_processes_that_join_is_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, limit=1) == 0
    held = OutputsFolder(tmp_path / "out", join=True)
    record = held.record()
    assert record is not None
    begun, says = os.pipe()
    pid = forked.start(lambda: (held.begin(record), os.write(says, b"."), time.sleep(600)))
    try:
        assert os.read(begun, 1) == b"."
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for words in (["--seed", "0"], ["--force"]):
            assert run(tmp_path, *words, limit=2) == 1
            assert f"is in use by process {pid}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
        assert run(tmp_path, "--join", "true", limit=2) == 0
        assert run(tmp_path, "--join", "true", "--seed", "1") == 1
        assert "seed was 0, is now 1" in capsys.readouterr().err
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def lm_eval_words(**arguments: Any) -> list[str]:
    args = {"n": 8, "batch_size": 1, "journal": "run.jsonl", **arguments}
    given = ",".join(f"{name}={value}" for name, value in args.items())
    task = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "40"]
    return ["--model", "specrej", "--model_args", given, *task, "--log_samples"]


def started(folder: Path, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'autoload'}",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"errors {name}").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "lm_eval", *words, "--output_path", f"out {name}"],
            cwd=folder,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def shown(folder: Path, name: str) -> Any:
    results, samples = ((folder / f"out {name}").rglob(pattern) for pattern in ("results_*.json", "samples_*.jsonl"))
    rows = sorted(map(json.loads, max(samples).read_text().splitlines()), key=lambda row: row["doc_id"])
    return json.loads(max(results).read_text())["results"], rows


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_commands_of_lm_eval_share_a_task_and_survive_each_other(tmp_path: Path, counted: Counted) -> None:
    """Three commands; two are killed after a while, one of them is sent again. All that end show what one shows."""
    whole_folder = tmp_path / "alone"
    whole_folder.mkdir()
    assert started(whole_folder, "0", lm_eval_words()).wait(timeout=600) == 0
    folder = tmp_path / "joined"
    folder.mkdir()
    words = lm_eval_words(join="true")

    def recorded() -> int:
        return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in folder.glob("run*.jsonl"))

    running = [started(folder, str(place), words) for place in range(3)]
    try:
        for victim, after in ((0, 6), (1, 15)):
            deadline = time.monotonic() + 300
            while recorded() < after and time.monotonic() < deadline:
                time.sleep(0.01)
            running[victim].send_signal(signal.SIGKILL)
            running[victim].wait()
            counted("kills -9: processes that join", 1)
        running[0] = started(folder, "0", words)
        for place in (0, 2):
            assert running[place].wait(timeout=600) == 0, (folder / f"errors {place}").read_text()[-3000:]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert shown(folder, "0") == shown(folder, "2") == shown(whole_folder, "0")
    assert of_files(folder) == of_files(whole_folder)
