"""`specrej-eval lm-eval ...`: lm-eval's command line in a process where our models are registered for certain."""

from __future__ import annotations

import sys

from specrej_eval.harness.startup import activate

SUMMARY = "run lm-eval's own command with our models registered, whether or not the startup hook works"
EXAMPLES = ("specrej-eval lm-eval --model specrej --model_args alpha=0.5 --tasks gsm8k",)
add_arguments = None


def run(words: list[str]) -> int:
    """Hand `words` to lm-eval. Its exit codes are ours: it raises SystemExit with them."""
    activate()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *words]
    cli_evaluate()
    return 0
