"""The `specrej-eval` command: finds the subcommand, then imports the one module that carries it out.

A subcommand is one entry of COMMANDS and a module with `add_arguments(parser)` and `run(args) -> exit code`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from specrej_eval import stopping
from specrej_eval.errors import SpecRejError, nearest


class Command(NamedTuple):
    module: str
    summary: str
    examples: tuple[str, ...] = ()
    pass_through: bool = False  # the module takes the remaining words as they are: run(words)


COMMANDS = {
    "lm-eval": Command(
        "specrej_eval.commands.lm_eval",
        "run lm-eval's own command with our models registered, whether or not the startup hook works",
        pass_through=True,
    ),
    "run": Command(
        "specrej_eval.commands.run",
        "answer a file of prompts and keep the answers, with every row behind them, in one folder",
        pass_through=True,
    ),
    "alpaca-eval": Command(
        "specrej_eval.commands.alpaca_eval",
        "run alpaca_eval's own command, repaired and with our decoders, whether or not the startup hook works",
        pass_through=True,
    ),
    "score": Command(
        "specrej_eval.commands.score",
        "score a file of prompts with responses with any reward model",
        (
            "specrej-eval score --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B --input pairs.jsonl",
            "specrej-eval score --reward_model http://localhost:8000 --input pairs.csv --output scores.jsonl",
        ),
    ),
    "report": Command(
        "specrej_eval.commands.report",
        "print one table of the runs found under a folder",
        ("specrej-eval report results/demo", "specrej-eval report results --format markdown"),
    ),
    "gather": Command(
        "specrej_eval.commands.gather",
        "put runs together: shards one after another, of several seeds the best answer to each prompt",
        (
            "specrej-eval gather results/shard0 results/shard1 --output results/whole",
            "specrej-eval gather results/bo960-seed* --output results/bo3840",
        ),
    ),
    "export": Command(
        "specrej_eval.commands.export",
        "write the answers of runs as alpaca_eval's model outputs or reference outputs",
        (
            "specrej-eval export alpaca results/spr results/bo16 --output outputs.json",
            "specrej-eval export alpaca results/bo120 --name Bo120 --output reference.json",
        ),
    ),
    "journal": Command(
        "specrej_eval.commands.journal",
        "look into a journal of finished requests, check it for damage, or put several of one run together",
        (
            "specrej-eval journal show run.jsonl",
            "specrej-eval journal verify run.jsonl results/spr",
            "specrej-eval journal merge run_rank0.jsonl run_rank1.jsonl --output whole.jsonl",
        ),
    ),
    "submission": Command(
        "specrej_eval.commands.submission",
        "check a finished run and lay out its files for AlpacaEval's leaderboard, or lm-eval's for publication",
        (
            "specrej-eval submission alpaca --name my-model-SpR --out alpaca_pr --model_config my-model.yaml",
            "specrej-eval submission lm-eval results/mine --out submission",
        ),
    ),
    "init": Command(
        "specrej_eval.commands.init",
        "write our lm-eval tasks and alpaca_eval configurations into a folder, to run and to edit",
        ("specrej-eval init", "specrej-eval init my-evaluation --force"),
    ),
    "rewards": Command(
        "specrej_eval.commands.rewards",
        "list the reward models there are: what each family reads, example checkpoints, what it needs",
        ("specrej-eval rewards", "specrej-eval rewards armorm qwen_math_prm"),
    ),
    "doctor": Command(
        "specrej_eval.commands.doctor",
        "check the installation (versions, startup hook, devices, demo weights), a reward model or a language model",
        (
            "specrej-eval doctor",
            "specrej-eval doctor --reward Skywork/Skywork-Reward-V2-Qwen3-0.6B",
            "specrej-eval doctor --pretrained Qwen/Qwen3-1.7B --dtype bfloat16",
        ),
    ),
    "path": Command(
        "specrej_eval.commands.path",
        "print the folder of our lm-eval tasks or alpaca_eval configurations",
        ("specrej-eval path tasks", 'lm_eval --include_path "$(specrej-eval path tasks)" ...'),
    ),
}


EXAMPLES = """\
examples:
  specrej-eval doctor
  specrej-eval lm-eval --model specrej --model_args alpha=0.5 --tasks specrej_arithmetic \\
      --include_path "$(specrej-eval path tasks)" --log_samples --output_path results/demo
  specrej-eval report results/demo

`specrej-eval COMMAND --help` tells more about one command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from specrej_eval import __version__

        print(f"specrej-eval {__version__}")
        return 0

    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        close = nearest(name, COMMANDS)
        hint = f"did you mean `specrej-eval {close}`?" if close else f"known commands: {', '.join(COMMANDS)}"
        print(f"specrej-eval: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2

    # a harness behind our command takes care of itself, as it does behind its own
    ours = contextlib.nullcontext() if COMMANDS[name].module.endswith("_eval") else stopping.signals()
    try:
        with stopping.command() if argv is None else contextlib.nullcontext(), ours:
            return dispatch(name, rest)
    except SpecRejError as error:
        print(f"specrej-eval {name}: {error}", file=sys.stderr)
        return 1
    except stopping.Stopped as stopped:
        return stopping.leave(f"specrej-eval {name}", stopped)
    except KeyboardInterrupt:
        print(f"specrej-eval {name}: stopped. {stopping.STOPPED}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as in `specrej-eval report DIR | head`
        sys.stderr.close()
        return 1


def dispatch(name: str, words: list[str]) -> int:
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    if command.pass_through:
        return int(module.run(words))
    parser = argparse.ArgumentParser(
        prog=f"specrej-eval {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="\n  ".join(("examples:", *command.examples)) if command.examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(words)))


def help_text() -> str:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: specrej-eval COMMAND ...\n\n"
        "Speculative Rejection and Best-of-N inside lm-evaluation-harness and alpaca_eval.\n\n"
        f"commands:\n{listing}\n\n{EXAMPLES}"
    )


if __name__ == "__main__":
    sys.exit(main())
