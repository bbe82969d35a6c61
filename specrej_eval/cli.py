"""The `specrej-eval` command: its subcommands are the modules of `commands/`, imported when they are asked for.

Each has SUMMARY, EXAMPLES, `add_arguments(parser)` and `run(args) -> exit code`. Where `add_arguments` is None, the
words are another program's, and go to `run` as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from specrej_eval import commands, stopping
from specrej_eval.errors import ConfigError, SpecRejError, nearest
from specrej_eval.paths import check_path
from specrej_eval.wording import inert

COMMANDS = {
    info.name.replace("_", "-"): f"{commands.__name__}.{info.name}" for info in pkgutil.iter_modules(commands.__path__)
}
"""Command -> module."""

RENAMED = {"out": "output", "overwrite": "force"}
"""Options of earlier versions -> their names now."""
_PATHS = ("FILE", "FILE.json", "DIR", "RUN", "RESULTS_DIR")
"""What help calls a value that is a path."""
_OF_THE_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What is wrong with a disk, and with no program."""

EXAMPLES = """\
examples:
  specrej-eval doctor
  specrej-eval lm-eval --model specrej --model_args alpha=0.5 --tasks specrej_arithmetic \\
      --include_path "$(specrej-eval path tasks)" --log_samples --output_path results/demo
  specrej-eval report results/demo

`specrej-eval COMMAND --help` tells more about one command.
"""


class Command(Protocol):
    """What a module of `commands/` has."""

    SUMMARY: str
    EXAMPLES: Sequence[str]
    add_arguments: Callable[[argparse.ArgumentParser], None] | None
    run: Callable[[Any], int]


class Help(argparse.RawDescriptionHelpFormatter):
    """Every option with its default, unless its own words name one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.help and "default" not in action.help and action.default is not argparse.SUPPRESS
        return f"{action.help} (default: %(default)s)" if unsaid and action.default else action.help


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

    try:
        with stopping.command() if argv is None else contextlib.nullcontext():
            command = load(name)
            if command.add_arguments is None:  # a harness takes care of itself, as it does behind its own command
                return int(command.run(rest))
            with stopping.signals():
                return int(command.run(parse(name, rest)))
    except (SpecRejError, KeyboardInterrupt) as error:
        return stopping.leave(f"specrej-eval {name}", error)
    except BrokenPipeError:  # the reader went away, as in `specrej-eval report DIR | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_PLACE or error.filename is None:
            raise
        where = inert(repr(error.filename))
        print(f"specrej-eval {name}: {where} cannot be read or written: {error.strerror}.", file=sys.stderr)
        return 1


def load(name: str) -> Command:
    return cast(Command, importlib.import_module(COMMANDS[name]))


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command that has options of its own."""
    command = load(name)
    parser = argparse.ArgumentParser(
        prog=f"specrej-eval {name}",
        description=command.SUMMARY[0].upper() + command.SUMMARY[1:] + ".",
        epilog="\n  ".join(("examples:", *command.EXAMPLES)),
        formatter_class=Help,
        allow_abbrev=False,
    )
    assert command.add_arguments is not None, f"{name} takes its words as they are"
    command.add_arguments(parser)
    return parser


def parse(name: str, words: Sequence[str]) -> argparse.Namespace:
    """The options given. ``--top-k`` is ``--top_k``; names of earlier versions are taken, with a note.

    A command's parser may have a default ``hints``: what to say of options that it does not have.

    Raises:
        ConfigError: an unknown option; suggests the name that may be meant.
    """
    parser = parser_of(name)
    known = {action.dest: action for action in _options(parser)}
    hints: Mapping[str, str] = parser.get_default("hints") or {}
    options, unknown = parser.parse_known_args(list(_as_now(words, known)))
    for word in unknown:
        if word.startswith("--"):
            given = word[2:].partition("=")[0]
            close = nearest(given, known)
            hint = hints.get(given) or (f"did you mean --{close}?" if close else "")
            raise ConfigError(
                f"unknown option {word.partition('=')[0]!r}.", hint=f"{hint} `--help` lists all options.".lstrip()
            )
    if unknown:
        raise ConfigError(f"unexpected {unknown[0]!r}.", hint="options are written --name value.")
    for action in _actions(parser):
        if action.type is Path or action.metavar in _PATHS:
            value = getattr(options, action.dest, None)
            for path in value if isinstance(value, list) else [value]:
                if path is not None and path is not argparse.SUPPRESS:
                    check_path(path, argument=action.dest)
    return options


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in _actions(parser) if action.option_strings)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
        else:
            yield action


def _as_now(words: Sequence[str], known: Mapping[str, argparse.Action]) -> Iterator[str]:
    """The words in today's spelling."""
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            yield word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        now = RENAMED.get(name, name)
        if name not in known and now in known:
            print(f"note: --{name} is called --{now} now", file=sys.stderr)
            if known[now].nargs == 0:  # it was a truth value
                value = value if equals else left.pop(0) if left and left[0].lower() in _TRUTHS else "true"
                if _TRUTHS.get(value.lower(), True):
                    yield f"--{now}"
                continue
            name = now
        yield f"--{name}{equals}{value}"


_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def help_text() -> str:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {load(name).SUMMARY}" for name in COMMANDS)
    return (
        "usage: specrej-eval COMMAND ...\n\n"
        "Speculative Rejection and Best-of-N inside lm-evaluation-harness and alpaca_eval.\n\n"
        f"commands:\n{listing}\n\n{EXAMPLES}"
    )


if __name__ == "__main__":
    sys.exit(main())
