"""Several processes: they write the bits of one, and if one dies the others stop, name it, and keep what they have."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arithmetic import distinct_problems, question
from support import FULL, forked
from support.caches import own_cache
from support.rank_runs import HANG, ROOT, finish, free_port, lines, numbers, opened, records, start, stop, wait_for

from specrej_eval import cli
from specrej_eval.api import RunPlan
from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD
from specrej_eval.commands import status
from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.ranks import Peer, RankError, Watch
from specrej_eval.records.outputs import OutputsFolder

PROMPTS = [question(operands) for operands in distinct_problems("test", 120, seed=3)]
FEW = PROMPTS[: 16 if FULL else 8]
N = "8" if FULL else "4"

Counted = Callable[[str, int], None]
Measured = Callable[[str, float], None]


def run_words(folder: Path, prompts: list[str] = PROMPTS) -> tuple[list[str], Callable[[int], Path]]:
    """Words of `specrej-eval run` on the demo pair as local folders, of which nobody has digests."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    for source in (DEMO_POLICY, DEMO_REWARD):
        if not (folder / source.name).is_dir():
            shutil.copytree(source, folder / source.name)
    words = ["--prompts", str(folder / "prompts.json"), "--output", str(folder / "out"), "--logprobs", "true"]
    words += ["--pretrained", str(folder / DEMO_POLICY.name), "--reward_model", str(folder / DEMO_REWARD.name)]
    words += ["--n", N, "--until", "\n", "--batch_size", "1"]
    return ["-m", "specrej_eval", "run", *words], lambda rank: folder / "out" / f"specrej_outputs_rank{rank}.jsonl"


def lm_eval_words(folder: Path) -> tuple[list[str], Callable[[int], Path]]:
    tasks = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "120"]
    words = ["--model", "specrej", "--model_args", "n=16,batch_size=1,journal=run.jsonl", *tasks]
    return ["-m", "lm_eval", *words], lambda rank: folder / f"run_rank{rank}.jsonl"


@pytest.fixture(scope="module", autouse=True)
def cache_of_ones_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of these tests' files are none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", own_cache(tmp_path_factory.mktemp("cache")))
        yield


@dataclasses.dataclass
class Killed:
    """A run of which one rank was killed with SIGKILL."""

    folder: Path
    victim: int
    said: list[str] = dataclasses.field(default_factory=list)
    """By the others."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """From the kill until each of them had ended."""


def kill_one(
    words: list[str],
    kept: Callable[[int], Path],
    *,
    victim: int,
    ranks: int,
    after: int,
    cwd: Path,
    itself: bool = False,
) -> Killed:
    """Start ranks, kill one; the others must end by themselves, and not with 0.

    Args:
        after: so many lines are kept by each.
        itself: it is the victim that does it: where few prompts are left, who watches on a busy machine is too late.
    """
    others = [kept(rank) for rank in range(ranks) if rank != victim]
    dies = {victim: (after, kept(victim), *others)} if itself else None
    processes = start(words, ranks=ranks, cwd=cwd, dies=dies)
    found = Killed(cwd, victim)
    try:
        if itself:
            assert processes[victim].wait(timeout=600) == -signal.SIGKILL, (cwd / f"errors{victim}").read_text()[-3000:]
        else:
            wait_for(lambda: all(lines(kept(rank)) >= after for rank in range(ranks)), processes, cwd=cwd)
            processes[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        for rank, process in enumerate(processes):
            process.wait(timeout=HANG)
            if rank == victim:
                continue
            found.seconds.append(time.monotonic() - began)
            assert process.returncode not in (0, -signal.SIGKILL, -signal.SIGABRT)
            found.said.append((cwd / f"errors{rank}").read_text())
            assert lines(kept(rank)) >= after
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def check(killed: Killed, counted: Counted, measured: Measured) -> None:
    victim = killed.victim
    for text, seconds in zip(killed.said, killed.seconds, strict=True):
        # killed before it had said where it runs, it has no process id that the others could know
        named = f"rank {victim} (pid " in text or (victim == 0 and "rank 0, which holds the run's store" in text)
        assert named, text[-3000:]
        assert "has died" in text
        assert "Traceback" not in text, text[-3000:]
        # torch's C++ says once that the store is gone, if it is asked at the very moment its holder dies
        assert text.count("frame #0") <= 1, text[-3000:]
        assert "answers" in text and "run the same command again" in text
        measured("seconds from a rank's death to the end of another", seconds)
    counted("ranks killed", 1)


# a rank that dies; one launch serves these three


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    words, kept = run_words(folder, FEW)
    return kill_one(words, kept, victim=1, ranks=2, after=1, cwd=folder, itself=True)


def test_a_dead_rank_is_named_by_the_other(killed: Killed, counted: Counted, measured: Measured) -> None:
    check(killed, counted, measured)


def test_only_the_first_rank_reads_weights_for_their_digests(killed: Killed) -> None:
    only_rank_0_read_weights(killed.folder, ranks=2)


def test_what_two_ranks_left_one_completes_in_another_order_with_the_same_bits(
    killed: Killed, alone: dict[str, str], counted: Counted
) -> None:
    before = records(killed.folder / "out")
    assert 2 <= len(before) < len(FEW)
    words, _ = run_words(killed.folder, random.Random(3).sample(FEW, len(FEW)))
    assert cli.main(words[2:]) == 0
    after = records(killed.folder / "out")
    assert after == alone
    assert {key: after[key] for key in before} == before
    counted("numbers of several processes compared bitwise with one's", numbers(after))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The records of one process that was never disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    words, _ = run_words(folder, FEW)
    assert cli.main(words[2:]) == 0
    found = records(folder / "out")
    assert len(found) == len(FEW)
    return found


def only_rank_0_read_weights(folder: Path, *, ranks: int) -> None:
    """For digests, and each file once; that the others load weights as well is theirs."""
    weights = {str(folder / source.name / "model.safetensors") for source in (DEMO_POLICY, DEMO_REWARD)}
    assert sorted(opened(folder, 0)["digest"]) == sorted(weights)
    for rank in range(1, ranks):
        assert not opened(folder, rank)["digest"]


def test_the_comparison_sees_the_last_bit_of_one_number(alone: dict[str, str], tmp_path: Path) -> None:
    key, text = next(iter(alone.items()))
    result = json.loads(text)
    result["ledger"] |= {"seconds": {}, "peak_bytes": 0}
    for name in ("reward", "logprobs"):
        changed = json.loads(json.dumps(result))
        row = changed["trajectories"][1]
        row[name] = last_bit(row[name]) if name == "reward" else [last_bit(row[name][0]), *row[name][1:]]
        (tmp_path / "specrej_trajectories.jsonl").write_text(json.dumps({"key": key, "result": changed}) + "\n")
        assert records(tmp_path)[key] != text
    (tmp_path / "specrej_trajectories.jsonl").write_text(json.dumps({"key": key, "result": result}) + "\n")
    assert records(tmp_path)[key] == text


def last_bit(value: float) -> float:
    return math.nextafter(value, math.inf)


# full


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_records_hold_the_same_bits_in_every_world(
    tmp_path: Path, alone: dict[str, str], counted: Counted, ranks: int
) -> None:
    """Order and batch_size differ too: each share meets other prompts in its batches than one process does."""
    words, _ = run_words(tmp_path, random.Random(ranks).sample(FEW, len(FEW)))
    finish(start([*words, "--batch_size", "3"], ranks=ranks, cwd=tmp_path), cwd=tmp_path)
    found = records(tmp_path / "out")
    assert found == alone
    files = sorted((tmp_path / "out").glob("specrej_trajectories*.jsonl"))
    assert [lines(path) - 1 for path in files] == [len(FEW) // ranks] * ranks
    only_rank_0_read_weights(tmp_path, ranks=ranks)
    counted("numbers of several processes compared bitwise with one's", numbers(found))
    if ranks > 1:  # nothing to do; with digests in the cache, nobody reads a weight file for them
        for path in tmp_path.glob("opens*"):
            path.unlink()
        finish(start(words, ranks=ranks, cwd=tmp_path), cwd=tmp_path)
        assert not any(opened(tmp_path, rank)["digest"] for rank in range(ranks))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (4, 2), (2, 4), (1, 4, 1)], ids=str)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_in_another_world_with_the_same_bits(
    tmp_path: Path, alone: dict[str, str], counted: Counted, worlds: tuple[int, ...], signum: signal.Signals
) -> None:
    """Each world but the last is stopped; each has the prompts in another order."""
    out = tmp_path / "out"

    def answered() -> int:
        return sum(map(lines, [*out.glob("specrej_outputs_rank*.jsonl"), out / "specrej_outputs.jsonl"]))

    for place, ranks in enumerate(worlds):
        words, _ = run_words(tmp_path, random.Random(place).sample(FEW, len(FEW)))
        processes = start(words, ranks=ranks, cwd=tmp_path)
        if place == len(worlds) - 1:
            finish(processes, cwd=tmp_path)
            break
        wanted = answered() + 3
        wait_for(lambda wanted=wanted: answered() >= wanted, processes, cwd=tmp_path)
        stop(processes, signum)
        counted("ranks killed" if signum == signal.SIGKILL else "signals sent", ranks)
        assert all(process.returncode in (-signum, 128 + signum, 1) for process in processes)
        assert wanted <= answered() < len(FEW)
    found = records(out)
    assert found == alone
    counted("numbers of several processes compared bitwise with one's", numbers(found))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_under_lm_eval_too_only_the_first_rank_reads_weights_for_their_digests(tmp_path: Path) -> None:
    for source in (DEMO_POLICY, DEMO_REWARD):
        shutil.copytree(source, tmp_path / source.name)
    models = f"pretrained={tmp_path / DEMO_POLICY.name},reward_model={tmp_path / DEMO_REWARD.name}"
    tasks = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "4"]
    words = ["-m", "lm_eval", "--model", "specrej", "--model_args", f"{models},n=2,journal=run.jsonl", *tasks]
    finish(start([*words, "--use_cache", "cache"], ranks=2, cwd=tmp_path), cwd=tmp_path)
    only_rank_0_read_weights(tmp_path, ranks=2)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_under_torchrun_alone_each_rank_on_a_cpu_answers_its_share(tmp_path: Path) -> None:
    """accelerate's launcher says that it is a CPU's run, torchrun does not."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    tasks = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "6"]
    words = ["--model", "specrej", "--model_args", "n=4,device=cpu,journal=run.jsonl", *tasks]
    env = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [sys.executable, *launcher, "-m", "lm_eval", *words, "--output_path", "results"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [lines(tmp_path / f"run_rank{rank}.jsonl") - 1 for rank in (0, 1)] == [3, 3]
    (path,) = tmp_path.glob("results/**/results_*.json")
    block = json.loads(path.read_text())["config"]["specrej"]
    assert (block["world_size"], block["totals"]["requests"]) == (2, 6)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [run_words, lm_eval_words])
@pytest.mark.parametrize("ranks", [2, 3])
def test_whichever_rank_dies_whenever_the_others_name_it(
    tmp_path: Path,
    counted: Counted,
    measured: Measured,
    command: Callable[[Path], tuple[list[str], Callable[[int], Path]]],
    ranks: int,
) -> None:
    draw = random.Random(ranks)
    for victim in range(ranks):
        folder = tmp_path / str(victim)
        folder.mkdir()
        words, kept = command(folder)
        after = draw.randrange(1, 12)
        check(kill_one(words, kept, victim=victim, ranks=ranks, after=after, cwd=folder), counted, measured)


# inside one process


def test_a_process_is_told_from_another_with_its_id() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Peer.of_this_process(0)
    assert me.alive
    other = Peer(1, me.host, process.pid, me.started + "0")
    assert not other.alive  # the id has been given out again
    process.kill()
    assert not Peer(1, me.host, process.pid, "1").alive  # a zombie
    process.wait()
    assert not Peer(1, me.host, process.pid, "1").alive


class DeadStore:
    """The store of a rank 0 that is killed before anybody has heard of it."""

    def __init__(self) -> None:
        self.calls = 0

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("Broken pipe")

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Broken pipe")


def test_rank_0_dead_before_anybody_has_heard_of_it_is_named_all_the_same() -> None:
    watch = Watch(1, 2, DeadStore())
    with pytest.raises(RankError, match="rank 0, which holds the run's store, has died"), watch.guard():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(ConfigError, match="own"), watch.guard():
        raise ConfigError("own")


def test_a_rank_that_dies_while_the_first_one_reads_files_is_named_under_lm_eval_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The digests of a model's files are waited for before the first request: there too all ranks are needed."""
    from specrej_eval.harness.lm_eval.model import SpecRejLM

    def closed(compute: object, **place: int) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("specrej_eval.records.fingerprint.from_first_rank", closed)
    lm = SpecRejLM.__new__(SpecRejLM)
    lm.__dict__.update(_rank=1, _world_size=2, _watch=Watch(1, 2, DeadStore()))
    lm.__dict__.update(run_config=RunConfig(), plan=RunPlan.of(RunConfig(), {}))
    for compute in (lm.fingerprint, lambda: lm._from_first_rank(lm.plan.of_models)):
        with pytest.raises(RankError, match="rank 0, which holds the run's store, has died"):
            compute()


ENDING = """
import os, signal, socket, sys, time
from datetime import timedelta
import torch.distributed as dist
from specrej_eval import ranks

ranks.POLL = 1e-5  # nearly always within the store
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]


def store(holds):
    return dist.TCPStore("127.0.0.1", port, None, holds, timedelta(seconds=60), wait_for_workers=False)


holder = os.fork()
if not holder:
    held = store(True)
    signal.pause()
try:
    for _ in range(int(sys.argv[1])):
        child = os.fork()
        if not child:
            ranks.Watch(1, 2, store(False))
            time.sleep(0.1)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
finally:
    if child:
        os.kill(holder, signal.SIGKILL)
"""
"""Processes that end well while their watch is busy with a real store; prints their exit codes."""


class SlowStore:
    """Each call of it takes a while, as one over a network does."""

    def __init__(self) -> None:
        self.inside = 0

    def set(self, key: str, value: str) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        self.inside += 1
        time.sleep(0.2)
        self.inside -= 1
        return False


def test_a_watch_is_out_of_the_store_before_the_interpreter_goes() -> None:
    registered: list[Callable[[], None]] = []
    store = SlowStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atexit.register", registered.append)
        watch = Watch(1, 2, store)
    assert registered == [watch.close]
    while not store.inside:
        time.sleep(0.001)
    watch.close()
    assert not store.inside and not watch._thread.is_alive()


@pytest.mark.full
def test_a_run_that_went_well_never_ends_with_an_abort(tmp_path: Path, counted: Counted) -> None:
    program = tmp_path / "ending.py"
    program.write_text(ENDING)
    processes = 100
    done = subprocess.run([sys.executable, str(program), str(processes)], capture_output=True, text=True, timeout=280)
    assert done.stdout.split() == ["0"] * processes, done.stderr[-2000:]
    counted("processes ended while their watch was busy", processes)


ON_A_CPU = {"ACCELERATE_USE_CPU": "true"}
"""Accelerate then takes WORLD_SIZE at its word, as its older releases do by themselves, and misses an address."""


@pytest.mark.usefixtures("few_tasks_here")
@pytest.mark.parametrize(
    ("command", "told"),
    [("run", {}), ("lm-eval", {}), pytest.param("lm-eval", ON_A_CPU, marks=pytest.mark.full)],
    ids=["run", "lm-eval", "lm-eval-on-a-cpu"],
)
def test_a_world_of_which_accelerate_sees_one_process_is_refused(
    command: str, told: dict[str, str], tmp_path: Path
) -> None:
    """WORLD_SIZE left in the environment, or a launcher that accelerate does not know: each would answer everything."""
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS[:2]))
    words = {
        "run": ["--prompts", "prompts.json", "--output", "out", "--n", "1"],
        "lm-eval": ["--model", "specrej", "--model_args", "n=1", "--tasks", "tiny", "--include_path", "tasks"],
    }
    (tmp_path / "tasks").mkdir()
    task = {"task": "tiny", "dataset_path": "json", "test_split": "test", "output_type": "generate_until"}
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}, "doc_to_text": "q"}
    (tmp_path / "data.jsonl").write_text('{"q": "1 + 1 =", "a": "2"}\n')
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps({**task, **files, "doc_to_target": "a"}))
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} & os.environ.keys()
    argv = ["specrej-eval", command, *words[command]]
    done = forked.output(lambda: cli.main(argv[1:]), folder=tmp_path, env={**told, "WORLD_SIZE": "2"}, argv=argv)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "2 processes were started (WORLD_SIZE), but to accelerate this is the only one" in done.stderr
    assert "or unset WORLD_SIZE" in done.stderr and not (tmp_path / "out").exists()


def test_a_limit_ends_all_ranks_at_a_requests_boundary_and_one_process_goes_on(tmp_path: Path) -> None:
    words, _ = run_words(tmp_path, FEW)
    codes = forked.together(lambda: cli.main([*words[2:], "--max_decode_tokens", "300"]), 2, said=tmp_path)
    assert codes == [75, 75], (tmp_path / "errors0").read_text()[-3000:]
    for rank in range(2):
        assert "this is not the result of the whole run" in (tmp_path / f"errors{rank}").read_text()
    store = OutputsFolder(tmp_path / "out")
    record = store.record()
    assert record is not None and not record.complete
    assert record.stopped == "max_decode_tokens=300"
    some = len(store.answers())
    assert 2 <= some < len(FEW)
    told = "\n".join(status.lines(tmp_path / "out"))
    assert f"{some} of {len(FEW)} answers" in told and told.count("dead") == 2
    assert cli.main(words[2:]) == 0
    record = OutputsFolder(tmp_path / "out").record()
    assert record is not None and record.complete and record.num_prompts == len(FEW) and not record.stopped
