"""`specrej-eval rewards`: every kind of reward model there is, what it reads, and what it needs of the user."""

from __future__ import annotations

import argparse
import json
import textwrap

SUMMARY = "list the reward models there are: what each family reads, example checkpoints, what it needs"
EXAMPLES = (
    "specrej-eval rewards",
    "specrej-eval rewards armorm qwen_math_prm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="*", help="only these families; all if none is named")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print (default: text)")


def run(args: argparse.Namespace) -> int:
    """Raises:
    ConfigError: an unknown family (nearest one suggested).
    """
    from specrej_eval.rewards.checkpoints.family import family_names, load_family
    from specrej_eval.rewards.choose import kinds

    forms = {form: what for kind in kinds().values() for form, what in kind.FORMS.items()}
    listed = {
        name: {"reads": family.READS, "examples": list(family.EXAMPLES), "needs": family.NEEDS}
        for name in args.family or family_names()
        for family in [load_family(name)]
    }
    if args.format == "json":
        print(json.dumps({"families": listed, "other": {} if args.family else forms}, indent=2))
        return 0
    print("Checkpoints: reward_model= a hub name or a folder. The family is detected; reward_family= overrides that.\n")
    for name, entry in listed.items():
        print(f"  {name}")
        print(_indented(str(entry["reads"])))
        print(_indented("such as: " + ", ".join(entry["examples"])))
        if entry["needs"]:
            print(_indented(f"needs: {entry['needs']}"))
    if not args.family:
        print("\nRewards without a checkpoint:\n")
        for form, what in forms.items():
            print(f"  {form}\n{_indented(what)}")
    return 0


def _indented(text: str) -> str:
    # names of checkpoints stay in one piece
    return textwrap.fill(
        text, 110, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False, break_long_words=False
    )
