"""`specrej-eval run` and lm_eval as several processes, and what they wrote, held against each other bit by bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from support import ROOT
from support.caches import own_cache

HANG = 60
"""Seconds after which a process that should have ended counts as one that hangs, on however busy a machine."""

WATCHING = """
import os, sys

def hook(event, arguments, folder=os.environ.get("SPECREJ_TEST_OPENS"), rank=os.environ.get("RANK", "0")):
    if folder and event == "open" and str(arguments[0]).endswith(".safetensors"):
        frame, modules = sys._getframe(1), set()
        while frame is not None:
            modules.add(frame.f_globals.get("__name__"))
            frame = frame.f_back
        by = "digest" if "specrej_eval.records.digests" in modules else "other"
        with open(os.path.join(folder, f"opens{rank}"), "a") as file:
            file.write(f"{by} {arguments[0]}\\n")

sys.addaudithook(hook)

if os.environ.get("SPECREJ_TEST_DIES"):
    import signal, time

    after, *kept = os.environ["SPECREJ_TEST_DIES"].split(os.pathsep)
    fsync = os.fsync

    def enough(path):
        with open(path, "rb") as file:
            return file.read().count(b"\\n") >= int(after)

    def dies(descriptor):
        fsync(descriptor)
        if os.path.exists(kept[0]) and enough(kept[0]):
            while not all(os.path.exists(path) and enough(path) for path in kept):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = dies
"""
"""A ``sitecustomize`` that writes down which weight files Python code opens, and whether for their digests.

``SPECREJ_TEST_DIES=LINES:FILE:FILE...``: the process kills itself where something reaches the disk, once each of these
files has so many lines; the first one is its own.
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(
    words: Sequence[str], *, ranks: int, cwd: Path, dies: Mapping[int, Sequence[object]] | None = None
) -> list[subprocess.Popen[str]]:
    """Processes that find each other by their environment: nothing but they themselves watches them.

    They have caches of their own below ``cwd``, and note in ``cwd/opensRANK`` which weight files they open.

    Args:
        dies: rank -> when it kills itself, as ``WATCHING`` says.
    """
    port, processes = free_port(), []
    watching = cwd / "watching" / "sitecustomize.py"
    watching.parent.mkdir(exist_ok=True)
    watching.write_text(WATCHING)
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        env = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (watching.parent, ROOT, ROOT / "autoload"))),
            "HF_HOME": str(cwd / f"hf{rank}"),
            "XDG_CACHE_HOME": own_cache(cwd / "cache"),
            "SPECREJ_TEST_OPENS": str(cwd),
            "SPECREJ_TEST_DIES": os.pathsep.join(map(str, (dies or {}).get(rank, ()))),
        }
        # to files: a full pipe would stop a process that nobody reads from
        with (cwd / f"errors{rank}").open("w") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *words], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=errors, text=True
                )
            )
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], *, cwd: Path) -> None:
    """Wait until all of them have ended well."""
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=800) == 0, (cwd / f"errors{rank}").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(ready: Callable[[], bool], processes: Sequence[subprocess.Popen[str]], *, cwd: Path) -> None:
    """Until they have come so far; if they do not, none of them is left behind."""
    deadline = time.monotonic() + 600
    try:
        while not ready():
            assert time.monotonic() < deadline, "it has never come so far"
            for rank, process in enumerate(processes):
                assert process.poll() is None, (cwd / f"errors{rank}").read_text()[-3000:]
            time.sleep(0.01)
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise


def stop(processes: Sequence[subprocess.Popen[str]], signum: signal.Signals) -> float:
    """Signal all of them at once, as a launcher does; the seconds until the last has ended."""
    began = time.monotonic()
    for process in processes:
        process.send_signal(signum)
    for process in processes:
        process.wait(timeout=HANG)
    return time.monotonic() - began


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def records(folder: Path) -> dict[str, str]:
    """What a run wrote of every row of every prompt, whichever of its processes did, without seconds and bytes.

    Key -> text in which two floats are alike only if their bits are: JSON numbers are their shortest exact form.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("specrej_trajectories*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue  # what a kill within a write leaves
            record = json.loads(line)
            if "trajectories" not in (result := record.get("result") or {}):
                continue  # a header
            for name in ("seconds", "peak_bytes"):
                del result["ledger"][name]
            text = json.dumps(result, sort_keys=True)
            assert found.setdefault(record["key"], text) == text, f"{path.name} contradicts another file"
    return found


def numbers(found: dict[str, str]) -> int:
    """How many token ids, log-probs and rewards the records hold; every row must have them."""
    rows = [row for text in found.values() for row in json.loads(text)["trajectories"]]
    assert rows and all(row["token_ids"] and len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
    assert all(row["reward"] is not None for row in rows)
    return sum(2 * len(row["token_ids"]) + 1 for row in rows)


def opened(cwd: Path, rank: int) -> dict[str, list[str]]:
    """``digest`` and ``other`` -> the weight files that this rank's Python code opened for it, each time."""
    found: dict[str, list[str]] = {"digest": [], "other": []}
    path = cwd / f"opens{rank}"
    for line in path.read_text().splitlines() if path.is_file() else ():
        by, _, name = line.partition(" ")
        found[by].append(name)
    return found
