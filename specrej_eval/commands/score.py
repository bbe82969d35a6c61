"""`specrej-eval score`: any reward model on a file of prompts with responses. Each row comes back with its reward.

Rows are written in the input's order as they are scored; a command that was stopped goes on when it is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from specrej_eval import stopping
from specrej_eval.checked import an_object
from specrej_eval.config import RunConfig
from specrej_eval.core import finite_or_none
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.options import add_reward_options, load_reward, reward_config
from specrej_eval.paths import expanded
from specrej_eval.records import lock
from specrej_eval.records.fingerprint import check_same, of_models
from specrej_eval.records.jsonl import Appender, as_text, mend, scan, write_atomically
from specrej_eval.records.prompt_files import read_rows
from specrej_eval.wording import counted

if TYPE_CHECKING:
    from specrej_eval.rewards.base import Pair, RewardModel

SUMMARY = "score a file of prompts with responses with any reward model"
EXAMPLES = (
    "specrej-eval score --reward_model Skywork/Skywork-Reward-V2-Qwen3-0.6B --input pairs.jsonl",
    "specrej-eval score --reward_model http://localhost:8000 --input pairs.csv --output scores.jsonl",
)

PROMPTS = ("messages", "prompt", "instruction", "question")
RESPONSES = ("response", "output", "completion", "answer")
"""Fields looked for, the first that a row has."""
CHUNK = 128
"""Rows scored together, and written together."""


class Entry(NamedTuple):
    """One row of the input."""

    where: str
    """``line 3``, as messages call it."""
    record: Mapping[str, Any]
    pair: Pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Score a file of prompts with responses. A row has one of {', '.join(PROMPTS)} and one of "
        f"{', '.join(RESPONSES)}; messages that end with an assistant's turn need no response beside them. "
        "The exit code is 1 if rows could not be scored."
    )
    files = parser.add_argument_group("files")
    files.add_argument("--input", required=True, metavar="FILE", help="JSONL, JSON, CSV or TSV")
    files.add_argument("--output", metavar="FILE", help="JSONL (default: the input's name with .scored.jsonl)")
    files.add_argument(
        "--column", default="reward", metavar="NAME", help="of the scores in the output (default: reward)"
    )
    files.add_argument("--force", action="store_true", help="start again if the output exists")
    files.add_argument(
        "--on_error",
        default="stop",
        choices=("stop", "skip"),
        help="a row that cannot be scored: stop (default), or skip = reward null, and the reason in 'error'",
    )
    add_reward_options(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command.

    Raises:
        ConfigError, CheckpointError: before the reward model is loaded; a bad row is named by its place.
        RewardError: the reward failed; what was scored before is in the output.
    """
    options = vars(args)
    config = reward_config(options)
    source = expanded(args.input)
    target = expanded(args.output) if args.output else source.with_suffix(".scored.jsonl")
    entries = read_pairs(source, column=args.column)
    if target.exists() and target.samefile(source):
        raise ConfigError(f"--output {str(target)!r} is the input itself.", hint="name another file.")
    with lock.holding(target, argument="output"):
        return _score(args, config, source, target, entries)


def _score(args: argparse.Namespace, config: RunConfig, source: Path, target: Path, entries: list[Entry]) -> int:
    from specrej_eval.rewards.choose import resolve_reward

    plan = resolve_reward(config, token=vars(args).get("token"))
    fingerprint = {**_fingerprint(config, source, args), **plan.deciding}
    done = _begin(target, fingerprint, overwrite=args.force)
    by_rank = config.reward_ensemble == "rank"
    if by_rank and len(done) < len(entries):  # ranks are among all answers to a prompt, wherever they stand
        target.unlink(missing_ok=True)
        done = []
    if len(done) < len(entries):
        if config.reward_model is None:
            tqdm.write("DEMO: the embedded demo reward scores; it knows nothing but small sums.", file=sys.stderr)
        reward = load_reward(config, plan=plan)
        if not reward.reads_text:
            raise ConfigError(
                f"reward_model={reward.name!r} scores from numbers recorded while decoding, which a file lacks.",
                hint="name a reward model that reads text.",
            )
        with (
            Appender(str(target), argument="output") as file,
            stopping.keeping(len(entries), target, answers=len(done), what="rows") as kept,
            tqdm(total=len(entries), initial=len(done), desc="score", unit="row") as bar,
        ):
            size = len(entries) if by_rank else CHUNK
            for start in range(len(done), len(entries), size):
                chunk = entries[start : start + size]
                for entry, found in _scored(reward, chunk, on_error=args.on_error, together=by_rank):
                    result = {args.column: found} if isinstance(found, float) else {args.column: None, "error": found}
                    with stopping.held():  # on disk before it is counted, whatever ends the process
                        done.append({**entry.record, **result})
                        file.write(as_text(done[-1]) + "\n")
                        kept.add()
                    bar.update(1)
    return _report(target, done, args.column)


def read_pairs(source: Path, *, column: str = "reward") -> list[Entry]:
    """The rows of a file.

    Raises:
        ConfigError: no such file, or a row without prompt or response, with a value of the wrong kind, or with a field
            that has the name of the scores; names the row.
    """
    entries = []
    for where, record in read_rows(source):
        place = f"{str(source)!r}, {where}"
        if not isinstance(record, dict):
            raise ConfigError(f"{place}: must be an object, got {str(record)[:60]!r}.")
        if column in record:
            raise ConfigError(
                f"{place}: already has a field {column!r}.", hint="give the scores another name with --column."
            )
        entries.append(Entry(where, record, _pair(record, place)))
    return entries


def _pair(record: Mapping[str, Any], place: str) -> Pair:
    from specrej_eval.rewards.base import Pair

    prompt = next((name for name in PROMPTS if record.get(name) is not None), None)
    response = next((name for name in RESPONSES if record.get(name) is not None), None)
    if prompt is None:
        raise ConfigError(f"{place}: has no {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}.", hint=_fields(record))
    messages = _messages(record[prompt], place) if prompt == "messages" else None
    if response is None and messages and messages[-1]["role"] == "assistant":
        return Pair(tuple(messages[:-1]), messages[-1]["content"])
    if response is None:
        raise ConfigError(f"{place}: has no {', '.join(RESPONSES[:-1])} or {RESPONSES[-1]}.", hint=_fields(record))
    for name in (prompt, response):
        if name != "messages" and not isinstance(record[name], str):
            raise ConfigError(f"{place}: {name!r} must be a text, got {str(record[name])[:60]!r}.")
    if messages is None:
        messages = [{"role": "user", "content": record[prompt]}]
    return Pair(tuple(messages), record[response])


def _messages(value: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value or not all(map(_is_turn, value)):
        raise ConfigError(
            f"{place}: 'messages' must be a list of messages, got {str(value)[:60]!r}.",
            hint='for example [{"role": "user", "content": "Say hello."}]',
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _fields(record: Mapping[str, Any]) -> str:
    return f"it has {', '.join(map(repr, record))}." if record else "it is empty."


def _fingerprint(config: RunConfig, source: Path, args: argparse.Namespace) -> dict[str, Any]:
    models = of_models(config, {})
    deciding = {
        name: value for name, value in models.items() if name not in ("pretrained", "pretrained_files", "dtype")
    }
    return {**deciding, "input": hashlib.sha256(source.read_bytes()).hexdigest(), "column": args.column}


def _begin(target: Path, fingerprint: dict[str, Any], *, overwrite: bool) -> list[dict[str, Any]]:
    """The rows that an earlier run wrote; from now on the output belongs to this run.

    Raises:
        ConfigError: the output is of another run, or of none.
    """
    sidecar = target.with_name(f"{target.name}.run.json")
    if overwrite:
        target.unlink(missing_ok=True)
    if not target.exists():
        write_atomically(sidecar, json.dumps(fingerprint, indent=1, default=str) + "\n")
        return []
    try:
        then = an_object(json.loads(sidecar.read_text(encoding="utf-8")), sidecar.name)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{str(target)!r} exists, and nothing says which reward model wrote it ({sidecar.name} is missing).",
            hint="replace it with --force, or give another --output.",
        ) from error
    check_same(then, fingerprint, what=repr(str(target)), remedy="replace it with --force, or give another --output.")
    found = scan(target, argument="output", checksums=False)
    if found.damaged:
        raise ConfigError(
            f"output={str(target)!r} is not one of our files (line {found.damaged[0].number} is not a JSON object).",
            hint="name another file, or delete this one.",
        )
    mend(target, found)
    return [line.record for line in found.lines]


def _scored(
    reward: RewardModel, chunk: Sequence[Entry], *, on_error: str, together: bool = False
) -> Iterator[tuple[Entry, float | str]]:
    """Each row with its score, or with the reason why it has none.

    Args:
        together: the rows' scores hang on each other, so one that fails is everyone's failure.

    Raises:
        RewardError: the reward failed as a whole, or a row could not be scored and ``on_error`` is ``stop``; rows
            before it have been yielded.
    """
    try:
        scores = reward.score_pairs([entry.pair for entry in chunk])
    except RewardError as error:
        if together or _of_the_server(error):
            raise
        if len(chunk) > 1:
            for entry in chunk:
                yield from _scored(reward, [entry], on_error=on_error)
            return
        if on_error == "stop":
            raise RewardError(f"{chunk[0].where}: {error.args[0]}", hint=error.hint or _SKIP) from error
        yield chunk[0], str(error.args[0])
        return
    for place, (entry, score) in enumerate(zip(chunk, scores, strict=True)):
        why = reward.why_nan(place)
        if math.isnan(score) and on_error == "stop":
            raise RewardError(f"{entry.where}: {reward.name} scored it with NaN{why}.", hint=_SKIP)
        yield entry, f"NaN{why}" if finite_or_none(score) is None else float(score)


def _of_the_server(error: RewardError) -> bool:
    """Whether every row would fail like this: the server is not there, does not let us in, or is broken."""
    from specrej_eval.rewards.http import ServerError

    return isinstance(error, ServerError) and error.status not in (400, 413, 422)


_SKIP = "--on_error skip continues and leaves such rows without a reward."


def _report(target: Path, records: Sequence[Mapping[str, Any]], column: str) -> int:
    scores = [record[column] for record in records if record.get(column) is not None]
    failed = len(records) - len(scores)
    if scores:
        mean = math.fsum(scores) / len(scores)
        print(f"{counted(len(scores), 'row')} scored: mean {mean:.4f}, min {min(scores):.4f}, max {max(scores):.4f}")
    print(f"{counted(len(records), 'row')} in {target}")
    if failed:
        print(f"{counted(failed, 'row')} could not be scored; their 'error' says why", file=sys.stderr)
    return 1 if failed else 0
