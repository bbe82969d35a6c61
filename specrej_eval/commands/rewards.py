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

OTHER = {
    "likelihood": "mean log-probability of the row's own tokens; costs nothing",
    "self_certainty": "how far the language model's own predictions are from uniform; costs nothing",
    "deepconf": "the row's least sure stretch of tokens (deepconf_window=); costs nothing",
    "pkg.module:function": "function(conversation, responses) -> one number per response",
    "http://host:port": "a reward server: vLLM, SGLang, TEI or OpenRLHF",
    "judge:MODEL@http://host:port/v1": "a language model behind an OpenAI-compatible server, asked for a grade",
    "a+0.5*b": "several of these: a weighted sum, or reward_ensemble=rank",
}
"""Rewards that are no checkpoint, by the form of their ``reward_model=``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="*", help="only these families; all if none is named")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print (default: text)")


def run(args: argparse.Namespace) -> int:
    """Raises:
    ConfigError: an unknown family (nearest one suggested).
    """
    from specrej_eval.rewards.base import families, load_family

    listed = {
        name: {"reads": family.READS, "examples": list(family.EXAMPLES), "needs": family.NEEDS}
        for name in args.family or families()
        for family in [load_family(name)]
    }
    if args.format == "json":
        print(json.dumps({"families": listed, "other": {} if args.family else OTHER}, indent=2))
        return 0
    print("Checkpoints: reward_model= a hub name or a folder. The family is found by itself; reward_family= decides.\n")
    for name, entry in listed.items():
        print(f"  {name}")
        print(_indented(str(entry["reads"])))
        print(_indented("such as: " + ", ".join(entry["examples"])))
        if entry["needs"]:
            print(_indented(f"needs: {entry['needs']}"))
    if not args.family:
        print("\nRewards without a checkpoint:\n")
        for form, what in OTHER.items():
            print(f"  {form}\n{_indented(what)}")
    return 0


def _indented(text: str) -> str:
    # names of checkpoints stay in one piece
    return textwrap.fill(
        text, 110, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False, break_long_words=False
    )
