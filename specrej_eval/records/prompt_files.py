"""Files of prompts: JSON, JSONL, CSV and TSV, read whole and checked before a model is loaded. Standard library only.

A JSON file is a list of objects or of strings, a JSONL file one of these a line, a CSV or TSV file a table with header.
The prompt stands in the column ``instruction``, or in ``prompt``. AlpacaFarm's ``input`` beside ``instruction`` is a
part of the question ("... of the following text:"), and is appended after an empty line where it is not empty: so
AlpacaEval made its instructions out of AlpacaFarm's (``{instruction}\\n\\n{input}``, in alpaca_eval's README).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from specrej_eval.core import Question
from specrej_eval.errors import ConfigError, nearest
from specrej_eval.paths import check_path, expanded
from specrej_eval.wording import counted, start_of

logger = logging.getLogger(__name__)

COLUMNS = ("instruction", "prompt")
"""Where the prompt stands unless another column is named; the first that the file has."""
INPUT = "input"


FileRow = tuple[str, Any]
"""How messages call a row (``row 3``, from 1, header left out; ``line 3`` of a JSONL file), and what stands there."""


def read_prompts(path: str | Path, *, prompt_column: str | None = None, limit: int | None = None) -> list[Question]:
    """The prompts of a file, in its order; equal ones are kept, with one warning.

    Args:
        path: a ``.json``, ``.jsonl``, ``.csv`` or ``.tsv`` file in UTF-8, with or without a byte order mark.
        prompt_column: the column of the prompts, if it is neither ``instruction`` nor ``prompt``.
        limit: only the first so many.

    Raises:
        ConfigError: no such file or column, a format we do not read, no rows, or a row without a prompt; names file
            and row.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.")
    file = _checked_path(expanded(path))
    rows = list(itertools.islice(_rows(file), limit))
    if not rows:
        raise ConfigError(f"{str(file)!r} holds no prompts.", hint="it needs at least one row.")
    column = _column(file, rows[0], prompt_column)
    questions = [_question(file, row, column, index) for index, row in enumerate(rows)]
    _mention_duplicates(file, rows, questions)
    return questions


def read_rows(path: str | Path) -> list[FileRow]:
    """All rows of a file as they stand there, each with what messages call it: ``row 3``, or ``line 3`` of JSONL.

    Raises:
        ConfigError: no such file, a format we do not read, or no rows.
    """
    file = _checked_path(expanded(path))
    rows = list(_rows(file))
    if not rows:
        raise ConfigError(f"{str(file)!r} is empty.", hint="it needs at least one row.")
    return rows


def _checked_path(file: Path) -> Path:
    check_path(file, argument="prompts")
    if file.suffix.lower() not in _READERS:
        raise ConfigError(
            f"{str(file)!r}: prompts are read from {', '.join(_READERS)} files, not from {file.suffix or 'this'!r}.",
            hint="the end of the name tells the format; rename the file, or convert it.",
        )
    if file.is_file():
        return file
    if file.exists():
        raise ConfigError(f"{str(file)!r} is not a file of prompts but a folder.")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"there is no file {str(file)!r}.", hint=f"{str(folder)!r} does not exist either.")
    close = nearest(file.name, [entry.name for entry in folder.iterdir() if entry.is_file()])
    raise ConfigError(
        f"there is no file {str(file)!r}.",
        hint=f"did you mean {str(file.with_name(close))!r}?"
        if close
        else f"relative paths start from {str(Path.cwd())!r}.",
    )


# formats


def _rows(file: Path) -> Iterator[FileRow]:
    try:
        text = file.read_bytes().decode("utf-8-sig")  # line breaks in a cell stay as they are
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{str(file)!r} is not text in UTF-8 (byte {error.start}).",
            hint="save it again as UTF-8; in a spreadsheet program, choose `CSV UTF-8`.",
        ) from error
    except OSError as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error
    return _READERS[file.suffix.lower()](file, text)


def _json_rows(file: Path, text: str) -> Iterator[FileRow]:
    content = _parsed(text, repr(str(file)), hint="one object a line is JSONL: name such a file .jsonl.")
    if not isinstance(content, list):
        raise ConfigError(
            f"{str(file)!r} must hold a JSON list, got {_kind(content)}.",
            hint='for example [{"instruction": "Say hello."}, {"instruction": "Say goodbye."}]',
        )
    return ((f"row {number}", value) for number, value in enumerate(content, 1))


def _jsonl_rows(file: Path, text: str) -> Iterator[FileRow]:
    # not splitlines(): JSON may hold U+2028 and the like as they are
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number}"
            yield where, _parsed(line, f"{str(file)!r}, {where}", hint="each line is one JSON value.")


def _parsed(text: str, what: str, *, hint: str) -> Any:
    try:
        # NaN is what pandas writes for an empty cell; it is no JSON, and could not be written into our records
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid JSON: {error}.", hint=hint) from error


def _table_rows(file: Path, text: str, delimiter: str) -> Iterator[FileRow]:
    declared = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)  # a line that spreadsheet programs read and write
    if declared is not None:
        delimiter, text = declared[1], text[declared.end() :]
    table = iter(_cells(file, text, delimiter))
    header = next(table, [])
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ConfigError(f"{str(file)!r} has two columns {twice[0]!r}.", hint="rename one of them.")
    for number, cells in enumerate(filter(None, table), 1):  # empty lines do not count
        if len(cells) > len(names):
            raise ConfigError(
                f"{str(file)!r}, row {number}: {len(cells)} cells, but the header has {len(names)}.",
                hint=f"a text with {'a tab' if delimiter == chr(9) else repr(delimiter)} in it must be in quotes.",
            )
        padded = itertools.zip_longest(names, cells, fillvalue="")
        yield f"row {number}", {name: cell for name, cell in padded if name}


_READERS: dict[str, Callable[[Path, str], Iterator[FileRow]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": partial(_table_rows, delimiter=","),
    ".tsv": partial(_table_rows, delimiter="\t"),
}
"""End of a file's name -> what reads it."""


def _cells(file: Path, text: str, delimiter: str) -> Iterator[list[str]]:
    before = csv.field_size_limit(sys.maxsize)  # a prompt may be a whole book; the module's own limit is 131,072
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        yield from list(reader)
    except csv.Error as error:
        raise ConfigError(
            f"{str(file)!r}, line {reader.line_num}: not a well-formed table ({error}).",
            hint='a text in quotes ends with a quote, and has its own quotes doubled: "say ""hello""".',
        ) from error
    finally:
        csv.field_size_limit(before)


# rows


def _column(file: Path, row: FileRow, wanted: str | None) -> str | None:
    """The column of the prompts; None where the rows are strings."""
    value = row[1]
    if isinstance(value, str):
        if wanted is not None:
            raise ConfigError(
                f"{str(file)!r} is a list of strings, so prompt_column={wanted!r} names nothing.", hint="leave it out."
            )
        return None
    if not isinstance(value, dict):
        raise _wrong_row(file, row, "an object or a string")
    names = [str(name) for name in value]
    for name in COLUMNS if wanted is None else (wanted,):
        if name in value:
            return name
    listing = f"it has {', '.join(map(repr, names))}" if names else "it has no columns"
    if wanted is not None:
        close = nearest(wanted, names)
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(f"{str(file)!r} has no column {wanted!r}.", hint=f"{hint}{listing}.")
    hint = f"{listing}; prompt_column names another one."
    for delimiter in ",;\t|":
        if len(names) == 1 and delimiter in names[0]:
            hint = f"its cells look separated by {delimiter!r}: write `sep={delimiter}` into a first line of its own."
    raise ConfigError(f"{str(file)!r} has no column 'instruction' or 'prompt'.", hint=hint)


def _question(file: Path, row: FileRow, column: str | None, index: int) -> Question:
    where, value = row
    if column is None:
        if not isinstance(value, str):
            raise _wrong_row(file, row, "a string, as the rows before it")
        return Question(instruction=_text(file, where, value, "the prompt"), index=index)
    if not isinstance(value, dict):
        raise _wrong_row(file, row, "an object, as the rows before it")
    if column not in value:
        raise ConfigError(f"{str(file)!r}, {where}: there is no {column!r}.")
    others = {name: cell for name, cell in value.items() if name != column}
    instruction = _text(file, where, value[column], repr(column))
    if column == "instruction":
        extra = others.pop(INPUT, None)
        if extra is not None and not isinstance(extra, str):
            raise ConfigError(f"{str(file)!r}, {where}: {INPUT!r} must be a text, got {_kind(extra)}.")
        if extra is not None and extra.strip():
            instruction = f"{instruction}\n\n{extra}"
    return Question(instruction=instruction, index=index, fields=others)


def _text(file: Path, where: str, value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{str(file)!r}, {where}: {what} must be a text, got {_kind(value)}.")
    if not value.strip():
        raise ConfigError(f"{str(file)!r}, {where}: {what} is empty.", hint="remove the row, or fill it in.")
    if any("\ud800" <= mark <= "\udfff" for mark in value):
        raise ConfigError(
            f"{str(file)!r}, {where}: {what} has half of a surrogate pair in it, which is no text: {start_of(value)}.",
            hint="a character outside Unicode's first plane was cut in two; remove what is left of it, or restore it.",
        )
    return value


def _wrong_row(file: Path, row: FileRow, wanted: str) -> ConfigError:
    return ConfigError(f"{str(file)!r}, {row[0]}: must be {wanted}, got {_kind(row[1])}.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _mention_duplicates(file: Path, rows: Iterable[FileRow], questions: Iterable[Question]) -> None:
    first: dict[str, str] = {}
    again: list[str] = []
    for (where, _), question in zip(rows, questions, strict=True):
        before = first.setdefault(question.instruction, where)
        if before != where:
            again.append(f"{where} is {before} again")
    if again:
        logger.warning(
            "%s: %s repeated (%s%s); each repeat gets its own random draws.",
            file,
            counted(len(again), "prompt is", "prompts are"),
            again[0],
            ", ..." if len(again) > 1 else "",
        )
