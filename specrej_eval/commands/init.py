"""`specrej-eval init`: our lm-eval tasks and alpaca_eval configurations in a folder of your own, to run and to edit."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from specrej_eval.errors import ConfigError
from specrej_eval.paths import FOLDERS, expanded, folder
from specrej_eval.wording import counted

SUMMARY = "write our lm-eval tasks and alpaca_eval configurations into a folder, to run and to edit"
EXAMPLES = (
    "specrej-eval init",
    "specrej-eval init my-evaluation --force",
)


def files() -> Iterator[tuple[Path, Path]]:
    """What there is to write: each file of ours, and its place below the user's folder."""
    for name in FOLDERS:
        ours = folder(name)
        for path in sorted(ours.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path, Path(name) / path.relative_to(ours)


def write(target: Path, *, force: bool = False) -> tuple[list[Path], list[Path]]:
    """Copy our files into a folder; equal ones are passed over.

    Args:
        force: overwrite files that differ from ours.

    Returns:
        The files written, and those left as they are because they differ from ours.

    Raises:
        ConfigError: a file or folder cannot be written.
    """
    written, kept = [], []
    for ours, place in files():
        path = target / place
        try:
            if path.is_file() and path.read_bytes() == ours.read_bytes():
                continue
            if path.exists() and not force:
                kept.append(path)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ours, path)
        except OSError as error:
            raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from error
        written.append(path)
    return written, kept


def next_steps(target: Path) -> list[tuple[str, str]]:
    """What to do next, each with its command as it is typed."""
    tasks = shlex.quote(str(target / "tasks"))
    configuration = shlex.quote(str(target / "model_configs" / "spr.yaml"))
    demo = f"lm_eval --model specrej --include_path {tasks} --output_path results/demo"
    return [
        ("the demo models on a task of their own", f"{demo} --tasks specrej_arithmetic --limit 100"),
        ("what came of it", "specrej-eval report results/demo"),
        (
            "prompts of yours, from a JSON, JSONL, CSV or TSV file: their mean reward",
            f"{demo} --tasks specrej_prompts --metadata prompts=prompts.csv",
        ),
        ("the same prompts, with an archive of the answers", "specrej-eval run --prompts prompts.csv --alpha 0.5"),
        ("AlpacaEval's prompts and judge", f"alpaca_eval evaluate_from_model {configuration}"),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    parser.add_argument("--force", action="store_true", help="overwrite files that you have changed")


def run(args: argparse.Namespace) -> int:
    target: Path = expanded(args.folder)
    written, kept = write(target, force=args.force)
    for name in FOLDERS:
        below = sum(path.relative_to(target).parts[0] == name for path in written)
        print(f"{target / name}: {counted(below, 'file')} written" if below else f"{target / name}: nothing to write")
    for path in kept:
        print(f"not overwritten, since you changed it: {path}")
    if kept:
        print("`specrej-eval init --force` overwrites these.")
    for what, command in next_steps(target):
        print(f"\n# {what}\n{command}")
    return 0
