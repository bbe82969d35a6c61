"""`specrej-eval submission`: files of a finished run, checked and laid out as somebody else's repository wants them."""

from __future__ import annotations

import argparse

from specrej_eval.commands.submission import alpaca as submission_alpaca
from specrej_eval.commands.submission import lm_eval as submission_lm_eval

SUMMARY = "check a finished run and lay out its files for AlpacaEval's leaderboard, or lm-eval's for publication"
KINDS = {
    "alpaca": (
        submission_alpaca,
        "the files of a pull request to AlpacaEval's leaderboard",
        "specrej-eval submission alpaca --name my-model-SpR --output alpaca_pr --model_config my-model.yaml",
    ),
    "lm-eval": (
        submission_lm_eval,
        "results and samples of lm-eval, under a name that is not the bare model's",
        "specrej-eval submission lm-eval results/mine --output submission",
    ),
}
EXAMPLES = tuple(example for _, _, example in KINDS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, (module, summary, example) in KINDS.items():
        made = kinds.add_parser(
            kind,
            help=summary,
            description=module.__doc__,
            epilog=f"example:\n  {example}",
            formatter_class=parser.formatter_class,
        )
        module.add_arguments(made)
        written = made.add_argument_group("what to write")
        written.add_argument("--output", required=True, metavar="DIR", help="where the files go")
        written.add_argument("--force", action="store_true", help="replace our files that are already there")
        written.add_argument(
            "--allow_lookalikes",
            action="store_true",
            help="write files that hold what looks like a key or an address with a password, as an answer may; your "
            "own keys are refused all the same",
        )


def run(args: argparse.Namespace) -> int:
    return int(KINDS[args.kind][0].run(args))
