"""`specrej-eval path`: prints where our lm-eval tasks or alpaca_eval configurations lie."""

from __future__ import annotations

import argparse

from specrej_eval.paths import FOLDERS, folder

SUMMARY = "print the folder of our lm-eval tasks or alpaca_eval configurations"
EXAMPLES = (
    "specrej-eval path tasks",
    'lm_eval --include_path "$(specrej-eval path tasks)" ...',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", choices=FOLDERS, help="which folder to print")


def run(args: argparse.Namespace) -> int:
    print(folder(args.folder))
    return 0
