"""A run killed at a random moment, resumed and put on a page: the page of a run that nothing happened to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from arithmetic import distinct_problems, question
from support import FULL

from specrej_eval import cli

pytestmark = pytest.mark.full
PROMPTS = [question(operands) for operands in distinct_problems("test", 12, seed=7)]
RUNS = {
    "bo": ["--strategy", "best_of_n", "--n", "8", "--score_every", "20"],
    "spr": ["--strategy", "speculative_rejection", "--alpha", "0.5", "--n", "16"],
}


def command(folder: Path, prompts: Path, words: list[str]) -> list[str]:
    own = [sys.executable, "-m", "specrej_eval", "run", "--prompts", str(prompts), "--output", str(folder)]
    return [*own, *words, "--max_gen_toks", "96", "--batch_size", "3", "--until", '["\\n"]']


def unmeasured(folder: Path) -> str:
    """The page of the runs in a folder, without its section of what the machine measured."""
    out = folder.with_suffix(".html")
    assert cli.main(["report", str(folder / "bo"), str(folder / "spr"), "--html", str(out)]) == 0
    before, found, rest = out.read_text(encoding="utf-8").partition('<section id="measured">')
    assert found
    return before + rest.partition("</section>")[2]


@pytest.mark.timeout(1800)
def test_a_killed_and_resumed_comparison_has_the_same_page(tmp_path: Path, counted: Callable[[str, int], None]) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("instruction\n" + "".join(f'"{text}"\n' for text in PROMPTS))
    for name, words in RUNS.items():
        subprocess.run(command(tmp_path / "whole" / name, prompts, words), check=True, capture_output=True)
    wanted = unmeasured(tmp_path / "whole")
    chance = random.Random(11)
    kills = 0
    for number in range(4 if FULL else 2):
        for name, words in RUNS.items():
            folder = tmp_path / f"killed{number}" / name
            for _ in range(2):
                process = subprocess.Popen(
                    command(folder, prompts, words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                rows = folder / "specrej_trajectories.jsonl"
                while process.poll() is None and not rows.is_file():  # not while it is still importing
                    time.sleep(0.02)
                time.sleep(chance.random() * 1.5)
                kills += process.poll() is None
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
                process.wait()
            subprocess.run(command(folder, prompts, words), check=True, capture_output=True)
        assert unmeasured(tmp_path / f"killed{number}") == wanted
    assert kills
    counted("runs killed, resumed and put on a page", kills)
