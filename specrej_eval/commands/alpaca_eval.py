"""`specrej-eval alpaca-eval ...`: alpaca_eval's command line in a process where it is repaired for certain."""

from __future__ import annotations

import sys

from specrej_eval.harness.startup import activate

SUMMARY = "run alpaca_eval's own command, repaired and with our decoders, whether or not the startup hook works"
EXAMPLES = ("specrej-eval alpaca-eval evaluate_from_model model_configs/spr.yaml",)
add_arguments = None


def run(words: list[str]) -> int:
    """Hand `words` to alpaca_eval. Its exit codes are ours: it raises SystemExit with them."""
    activate()
    from alpaca_eval.main import main

    sys.argv = ["alpaca_eval", *words]
    main()
    return 0
