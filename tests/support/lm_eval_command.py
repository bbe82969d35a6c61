"""The command ``lm_eval``: in a forked process that has imported everything already, and in one of its own in full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import lm_eval.__main__
import lm_eval.evaluator
import lm_eval.tasks.manager

from specrej_eval.engines.transformers import engine
from specrej_eval.harness.lm_eval import command, model
from support import FULL, forked

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


IMPORTED = (engine, model)
"""Here once, and not in each process that is forked."""
ARGV = (str(lm_eval.__main__.__file__),)
"""What ``python -m lm_eval`` has as its name."""


def work(few_tasks: Path) -> None:
    """The command in a forked process, by ``sys.argv``.

    Args:
        few_tasks: the fixture.
    """
    lm_eval.tasks.manager.__file__ = str(few_tasks / "lm_eval" / "tasks" / "manager.py")
    lm_eval.evaluator.add_env_info = lambda results: None  # it asks pip for all installed packages
    command.wrap_command(lm_eval.__main__)
    lm_eval.__main__.cli_evaluate()


def lm_eval_command(
    *words: str, cwd: Path, few_tasks: Path, env: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Run it offline, on the CPU, with one thread; what it says. It must succeed.

    Args:
        few_tasks: the fixture.
    """
    if FULL:
        whole = {**os.environ, **OFFLINE, "HF_HOME": str(cwd / "hf"), **env}
        argv = [sys.executable, "-m", "lm_eval", *words]
        done = subprocess.run(argv, cwd=cwd, env=whole, capture_output=True, text=True, timeout=250, check=False)
    else:
        done = forked.output(lambda: work(few_tasks), folder=cwd, env={**OFFLINE, **env}, argv=[*ARGV, *words])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
