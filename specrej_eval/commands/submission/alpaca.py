"""Builds and checks the files of a pull request to AlpacaEval's leaderboard.

The folder mirrors github.com/tatsu-lab/alpaca_eval: the answers, the model's configuration, and, once the leaderboard's
judge has seen the answers, its annotations and the two CSV files with one row more. Refused are answers that are not
AlpacaEval's 805 instructions in order, each answered once by the generator of this name; that are not what the run
recorded beside them answered; or that come from an unfinished run or from the embedded demo pair.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from specrej_eval.commands.submission import alpaca_checks, leaderboard_rows
from specrej_eval.commands.submission.alpaca_checks import COLUMNS, JUDGE, NUM_INSTRUCTIONS
from specrej_eval.commands.submission.tree import Tree, read_rows
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.harness.alpaca_eval import config as alpaca_config
from specrej_eval.records.jsonl import as_text
from specrej_eval.redaction import secrets_of
from specrej_eval.wording import counted, inert_lines

PACKAGE = "src/alpaca_eval"
APPEND = "append"
"""Rows for a file whose other rows are not to be had here."""
GLM = "length_controlled_v1"
"""The leaderboard's model of length."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_FAILED_JUDGMENTS = 5  # the leaderboard has entries with 804 judgments; far fewer is a subset


@dataclass
class Submission:
    """What is in the folder, and what its user has to know."""

    tree: Tree
    outputs: Path
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    read = parser.add_argument_group("what to check")
    read.add_argument("--name", required=True, help="the generator's name: the top-level key of its configuration")
    read.add_argument("--model_outputs", metavar="FILE", help="default: results/NAME/model_outputs.json")
    read.add_argument(
        "--model_config", metavar="FILE", help="its YAML file (default: the one in model_configs/ with this name)"
    )
    read.add_argument(
        "--reference_outputs",
        metavar="FILE",
        help=f"JSON with AlpacaEval's {NUM_INSTRUCTIONS} instructions (default: the data set in the hub's cache)",
    )
    beside = f"{JUDGE}/{{}} beside the outputs, if it is there"
    read.add_argument(
        "--annotations", metavar="FILE", help=f"the judge's (default: {beside.format('annotations.json')})"
    )
    read.add_argument(
        "--leaderboard", metavar="FILE", help=f"CSV with the new row (default: {beside.format('leaderboard.csv')})"
    )
    read.add_argument(
        "--weights",
        metavar="FILE",
        help="CSV with the new row of the length-controlled model's weights (default: where alpaca_eval wrote it)",
    )
    read.add_argument(
        "--alpaca_eval_repo",
        metavar="DIR",
        help="a checkout of alpaca_eval, whose CSV files get the new rows (default: the installed package's)",
    )
    read.add_argument(
        "--unverified", action="store_true", help="accept outputs without the record of the run that made them"
    )


def run(args: argparse.Namespace) -> int:
    submission = build(args)
    submission.tree.write()
    print(inert_lines(report(args.name, submission)))
    return 0


def build(args: argparse.Namespace) -> Submission:
    """Check everything and plan the files; nothing is written.

    Raises:
        SpecRejError: the first thing that is wrong, with file and row.
    """
    name = args.name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r} is not a valid folder name.", hint="use letters and digits, with . _ + - in between."
        )
    outputs = Path(args.model_outputs or Path("results", name, "model_outputs.json"))
    rows = read_rows(outputs, what="model outputs", hint="`alpaca_eval evaluate_from_model CONFIG.yaml` writes it.")
    record = alpaca_checks.find_run(name=name, file=outputs, unverified=args.unverified)
    references = alpaca_checks.read_references(args.reference_outputs)
    alpaca_checks.check_outputs(rows, references, name=name, file=outputs)
    answers = alpaca_checks.check_answers(rows, file=outputs) if record is not None else []
    config = alpaca_config.find(args.model_config, name)
    if record is not None:
        alpaca_config.check_same_run(config, record)
    else:
        config.fingerprint()  # its arguments are at least valid, and of no demo

    submission = Submission(Tree(args.output, force=args.force, lookalikes=args.allow_lookalikes), outputs)
    tree, notes = submission.tree, submission.notes
    tree.secrets |= secrets_of(config.completions_kwargs)
    if record is None:
        notes.append("--unverified: nothing says how these outputs were made, and configs.yaml says so")
    if worse := [number for number, answer in enumerate(answers, start=1) if answer.degraded]:
        notes.append(
            f"{counted(len(worse), 'answer')} gave up rows for want of memory (degraded), the first in row {worse[0]}"
        )
    if cut := sum(answer.finish_reason == "length" for answer in answers):
        notes.append(f"{counted(cut, 'answer was', 'answers were')} cut at their length limit")
    if paths := alpaca_config.local_paths(config):
        notes.append(f"nobody else has the folder in {', '.join(paths)}: name the model on the hub")

    tree.add(f"{PACKAGE}/models_configs/{name}/configs.yaml", alpaca_config.render(config, record, answers))
    tree.add(f"{PACKAGE}/models_configs/{name}/prompt.txt", config.template)
    canonical = [{column: row[column] for column in COLUMNS} for row in rows]
    text = as_text(canonical, indent=2)
    tree.add(f"results/{name}/model_outputs.json", text, f"{counted(len(rows), 'answer')} in AlpacaEval's order")
    add_annotations(submission, args, outputs, canonical)
    add_leaderboard(submission, args, outputs, canonical)
    add_weights(submission, args, outputs)
    return submission


def add_annotations(
    submission: Submission, args: argparse.Namespace, outputs: Path, rows: list[dict[str, str]]
) -> None:
    target = f"results/{args.name}/{JUDGE}/annotations.json"
    submission.tree.drop(target)
    file = given_or_found(args.annotations, outputs.parent / JUDGE / "annotations.json", "--annotations")
    if file is None:
        submission.missing.append("annotations.json")
        return
    annotations = read_rows(file, what="annotations", hint="alpaca_eval writes it.")
    failed = alpaca_checks.check_annotations(annotations, rows, name=args.name, file=file)
    if failed:
        submission.notes.append(f"the judge has no preference for {counted(failed, 'answer')}")
    submission.tree.copy(target, file, "the judge's annotations")


def add_leaderboard(
    submission: Submission, args: argparse.Namespace, outputs: Path, rows: list[dict[str, str]]
) -> None:
    file = given_or_found(args.leaderboard, outputs.parent / JUDGE / "leaderboard.csv", "--leaderboard")
    row = leaderboard_rows.read_row(file, args.name) if file is not None else None
    if file is None or row is None:
        if args.leaderboard is not None:
            raise ConfigError(f"--leaderboard {args.leaderboard!r} has no row of {args.name!r}.")
        submission.missing.append("the leaderboard's row")
        return
    length = int(sum(len(row["output"]) for row in rows) / len(rows))
    if row.get("avg_length", "").removesuffix(".0") != str(length):
        raise ConfigError(
            f"{str(file)!r}: avg_length of {args.name!r} is {row.get('avg_length')!r}, but these outputs have {length} "
            "characters on average.",
            hint="the row belongs to other outputs; run alpaca_eval with --is_overwrite_leaderboard.",
        )
    judged = row.get("n_total", "").removesuffix(".0")
    if not judged.isdigit() or int(judged) < NUM_INSTRUCTIONS - _FAILED_JUDGMENTS:
        raise ConfigError(
            f"{str(file)!r}: n_total of {args.name!r} is {row.get('n_total')!r}, not {NUM_INSTRUCTIONS}.",
            hint="the judge has to see all answers: leave out --max_instances.",
        )
    if row.get("glm_name", GLM) != GLM:  # a column of ours
        raise ConfigError(
            f"{str(file)!r}: the length-controlled win rate of {args.name!r} comes from {row['glm_name']!r}.",
            hint="leave out --metric_kwargs, and evaluate on AlpacaEval's own data set.",
        )
    row["mode"] = "community"
    base = base_of(args, leaderboard_rows.LEADERBOARD)
    if base is None:
        raise SpecRejError("the installed alpaca_eval has no leaderboard.", hint="give --alpaca_eval_repo DIR.")
    if args.alpaca_eval_repo is None and leaderboard_rows.altered(leaderboard_rows.LEADERBOARD):
        submission.notes.append(
            "alpaca_eval has written other rows into its installed leaderboard: look at the diff before you commit, or "
            "give --alpaca_eval_repo DIR"
        )
    text = leaderboard_rows.with_row(base.read_text(encoding="utf-8"), args.name, row, source=repr(str(file)))
    submission.tree.add(f"{PACKAGE}/{leaderboard_rows.LEADERBOARD}", text, "one row added or replaced")


def add_weights(submission: Submission, args: argparse.Namespace, outputs: Path) -> None:
    path = leaderboard_rows.WEIGHTS
    # with our repairs alpaca_eval writes it beside the leaderboard's row, without them into its own package
    below = Path("glm_weights", GLM, Path(path).name)
    candidates = [outputs.parent / JUDGE / below, outputs.parent / below]
    if found := leaderboard_rows.installed(path):
        candidates.append(found)
    if args.weights is not None:
        candidates = [Path(args.weights)]
    rows = {file: row for file in candidates if file.is_file() and (row := leaderboard_rows.read_row(file, args.name))}
    if not rows:
        if args.weights is not None:
            raise ConfigError(f"--weights {args.weights!r} is not a file with a row of {args.name!r}.")
        submission.missing.append("the row of the length-controlled model's weights")
        return
    file, row = next(iter(rows.items()))
    if args.alpaca_eval_repo is None:  # the package on PyPI has no such file, so its other rows are not known here
        text = leaderboard_rows.line(["", *row]) + leaderboard_rows.line([args.name, *row.values()])
        submission.tree.add(f"{APPEND}/{PACKAGE}/{path}", text, "a row to append to the file of this name")
        return
    base = base_of(args, path)
    if base is None:
        raise ConfigError(f"--alpaca_eval_repo {args.alpaca_eval_repo!r} has no {PACKAGE}/{path}.")
    text = leaderboard_rows.with_row(base.read_text(encoding="utf-8"), args.name, row, source=repr(str(file)))
    submission.tree.add(f"{PACKAGE}/{path}", text, "one row added or replaced")


def base_of(args: argparse.Namespace, path: str) -> Path | None:
    """The file that gets a row more."""
    if args.alpaca_eval_repo is None:
        return leaderboard_rows.installed(path)
    file = Path(args.alpaca_eval_repo, PACKAGE, path)
    return file if file.is_file() else None


def given_or_found(given: str | None, default: Path, argument: str) -> Path | None:
    if given is None:
        return default if default.is_file() else None
    if not Path(given).is_file():
        raise ConfigError(f"{argument}: there is no file {given!r}.")
    return Path(given)


def report(name: str, submission: Submission) -> str:
    """What lies where, and what to do next."""
    root = submission.tree.root
    lines = [f"checked; the files for {name} are in {root}:"]
    lines += [f"  {path}" + (f"  ({what})" if what else "") for path, what in submission.tree.contents]
    lines += [f"note: {note}" for note in submission.notes]
    if submission.missing:
        lines += [
            f"still missing: {', '.join(submission.missing)}. They come from the leaderboard's judge:",
            f"  alpaca_eval evaluate --model_outputs {submission.outputs} --annotators_config {JUDGE}",
            "  then run this command again with --force",
        ]
    tops = sorted({Path(path).parts[0] for path in submission.tree.paths} - {APPEND})
    lines += [
        "next, in a checkout of github.com/tatsu-lab/alpaca_eval:",
        f"  git switch -c {name}",
        f"  cp -r {' '.join(str((root / top).absolute()) for top in tops)} .",
    ]
    if any(path.startswith(f"{APPEND}/") for path in submission.tree.paths):
        lines.append(f"  append the last line of {root}/{APPEND}/.../{Path(leaderboard_rows.WEIGHTS).name} to its file")
    lines += [f"  git add {' '.join(tops)} && git commit -m 'Add {name}'", "  open the pull request"]
    return "\n".join(lines)
