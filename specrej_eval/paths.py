"""Where the files that are not code lie (in a wheel beside the package, in a checkout beside the package's folder), and
how a name that stands in data becomes part of a path: nowhere else.

A path that the user gives is the user's own, and is taken as it is. A name that was read (from a results file, a
record, a configuration: a strategy, a task, a generator) goes through ``file_name`` where we choose what a thing is
called, and through ``below`` where the name must stay as it is."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path

from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.wording import start_of

FOLDERS = ("tasks", "model_configs")
PACKAGE = Path(__file__).resolve().parent
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn the direction of writing, so that a path is read as another."""
LONGEST = 200
"""Most characters of a file name made here: file systems take 255 bytes, and files are called after it with an end."""


def expanded(name: str | Path) -> Path:
    """The path with a leading ``~`` resolved; as it is where there is no such user (``Path.expanduser`` fails then)."""
    return Path(os.path.expanduser(name))


def is_folder(name: str | Path) -> bool:
    """Whether a name is a folder's. Any text may be asked: what is too long for a path is none (pathlib fails)."""
    return os.path.isdir(expanded(name))


def is_there(name: str | Path) -> bool:
    """Whether a name is that of a file or folder; see ``is_folder``."""
    return os.path.exists(expanded(name))


def file_name(text: str) -> str:
    """Any text as one file name that every file system takes: ASCII letters, digits and ``_ . -``, never ``..``.

    >>> file_name("../../etc/passwd"), file_name("a b"), file_name("..")
    ('etc-passwd', 'a-b', 'model')
    """
    return shortened(re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "model")


def shortened(name: str) -> str:
    """A file name of at most ``LONGEST`` characters; where it is cut, a digest of the whole keeps two of them apart."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def below(folder: str | Path, name: str, *, what: str) -> Path:
    """``folder/name`` for a name that was read somewhere, which may have folders of its own in it.

    Args:
        what: where the name stands, for the message: ``the generator's name``.

    Raises:
        ConfigError: it does not lie below the folder (``..``, an absolute path), or no file can be called so.
    """
    parts = name.replace("\\", "/").split("/")
    wrong = (
        "it leads out of its folder"
        if ".." in parts or os.path.isabs(name) or Path(name).drive
        else "it has a control character in it"
        if _odd(name)
        else "it is longer than a file name may be"
        if max(len(part.encode()) for part in parts) > 255 or len(name.encode()) > 1000
        else "it names no file"
        if not name.strip("./ ")
        else ""
    )
    if wrong:
        raise ConfigError(
            f"{what} {shortened(name)!r} cannot be part of a path: {wrong}.",
            hint="use letters and digits, with . _ + - in between.",
        )
    return Path(folder) / name


def check_path(path: str | Path, *, argument: str) -> None:
    """Whether a path that the user gives can be one at all; whether it is there is another question.

    Raises:
        ConfigError: it is too long, has a character that cannot be printed, or is no text.
    """
    text = str(path)
    wrong = ""
    if odd := _odd(text):
        wrong = f"it has the character {odd!r} in it, which cannot be printed"
    elif any(len(part.encode()) > 255 for part in Path(text).parts):
        wrong = "a name in it is longer than 255 bytes"
    elif len(text.encode()) > 4095:
        wrong = "it is longer than 4,095 bytes"
    if wrong:
        raise ConfigError(
            f"{argument}={start_of(text)} cannot be a path: {wrong}.", hint="give it another name, or a shorter one."
        )


def _odd(text: str) -> str:
    """The first character that would break a message, a log or a JSON file that holds the path; empty if none does."""
    return next(
        (mark for mark in text if mark in _TURNING or unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp")), ""
    )


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs; True where it cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def is_same(name: str, folder: Path) -> bool:
    """Whether a name that was read is that of a folder of ours; any text may be asked."""
    try:
        return Path(name).resolve() == folder
    except (OSError, ValueError, RuntimeError):
        return False


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether an existing file lies in a folder or below it, wherever links lead; False where it cannot be said."""
    try:
        return Path(path).resolve(strict=True).is_relative_to(Path(folder).resolve(strict=True))
    except (OSError, ValueError, RuntimeError):  # no such file, NUL in its name, a link to itself
        return False


def cache(name: str) -> Path:
    """A file or folder of what may be lost: below ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "specrej-eval" / name


def folder(name: str) -> Path:
    """The folder of lm-eval tasks (`tasks`) or of alpaca_eval configurations (`model_configs`)."""
    candidates = (PACKAGE / f"_{name}", PACKAGE.parent / name)  # a wheel's copy; an editable install's original
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise SpecRejError(
        f"the folder {name!r} is missing; looked for {' and '.join(map(str, candidates))}",
        hint="reinstall specrej-eval; its wheel contains this folder",
    )
