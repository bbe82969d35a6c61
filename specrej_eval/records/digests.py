"""What files hold, as digests: SHA-256 of every byte, read again only when a file has changed.

A digest is remembered in the user's cache folder under the file's path, size, mtime, ctime, inode and device; restoring
a file's mtime does not hide a change, since no program can set its ctime. A file that changed within two seconds before
it was read is not remembered (the next change may leave the same times), and one that changes while it is read is read
again. A cache that cannot be read or written is done without. Files of the hub's cache are never read in full: the name
of a large file there is its SHA-256. Standard library and tqdm only.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specrej_eval import temporary
from specrej_eval.checked import object_in, object_or_empty
from specrej_eval.errors import CheckpointError
from specrej_eval.paths import cache, expanded, is_folder

SHOWN_FROM = 1 << 30
"""Bytes to be read from which on a progress bar is shown."""
REMEMBERED_FROM = 1 << 20
"""Bytes of a file from which on remembering its digest is worth a file in the cache."""
RACY_NS = 2_000_000_000
"""A file must have been left alone for so long before it was read: the clock of some file systems ticks that slowly."""

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.npz")
IRRELEVANT = (
    *("*.md", "*.rst", "*.html", "*.pdf", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "requirements*.txt"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4"),
    *("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.log", "*.lock", "*.tmp", "*.pyc", "*.ipynb", "*.sh"),
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite"),  # weights for other frameworks
    *("optimizer*", "scheduler.*", "scaler.pt", "rng_state*", "trainer_state.json", "trainer_log*", "training_args.*"),
    *("*_results.json", "results_*.json", "events.out.*", "specrej_*"),
)
"""Files of a checkpoint folder that no loader reads: texts about it, what training and evaluation left there."""

_CODE_IS_NOT_IN = ("checkpoint-*", "global_step*", "runs", "site-packages", "node_modules", "__pycache__", ".*")
_PIECE = 1 << 22
_READERS = 4

_known: dict[tuple[Any, ...], str] = {}
"""Of this process; the only memory where the cache folder cannot be written."""


def cache_folder() -> Path:
    """Where digests are remembered."""
    return cache("digests")


def checkpoint_files(
    folder: str | Path, *, subfolder: str = "", gguf_file: str = "", weights: bool = True, code: bool = False
) -> dict[str, Path]:
    """The files of a checkpoint folder that may decide what it computes: relative name -> path, sorted.

    Everything at the top level of the folder, and of ``subfolder``, but ``IRRELEVANT``, hidden files and other GGUF
    files than ``gguf_file``; below that, chat templates and the shards that an index names. Other folders in it are
    other checkpoints or none.

    Args:
        weights: without them, for a folder that is named for its tokenizer.
        code: with all Python files at any depth, which run where remote code is allowed.
    """
    root = expanded(folder)
    found: dict[str, Path] = {}
    for top in dict.fromkeys((root, root / subfolder)):
        if not top.is_dir():
            continue
        named = [path for path in top.iterdir() if path.is_file() and _matters(path.name, code=code)]
        named += [path for path in top.glob("additional_chat_templates/*.jinja") if path.is_file()]
        if weights:
            named += _shards(top)
        found.update({path.relative_to(root).as_posix(): path for path in named})
    found = {name: path for name, path in found.items() if not fnmatch.fnmatchcase(name, "*.gguf")}
    if gguf_file and (root / gguf_file).is_file():
        found[gguf_file] = root / gguf_file
    if code:
        found.update({path.relative_to(root).as_posix(): path for path in _python_files(root)})
    if not weights:
        found = {name: path for name, path in found.items() if not _matches(Path(name).name, WEIGHTS)}
    return dict(sorted(found.items()))


def of_folder(folder: str | Path, **which: Any) -> dict[str, str] | None:
    """Digests of ``checkpoint_files``, by names relative to the folder: moving it changes nothing. None if it is none.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return of_files(checkpoint_files(folder, **which), what=str(folder)) if is_folder(folder) else None


def of_files(files: Mapping[str, Path], *, what: str = "") -> dict[str, str]:
    """Name -> SHA-256 of the whole file, in hex; a progress bar names ``what`` where much has to be read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, str] = {}
    unread: dict[str, Path] = {}
    for name, path in files.items():
        try:
            digest = _blob_digest(path) or _remembered(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        if digest is None:
            unread[name] = path
        else:
            found[name] = digest
    total = sum(path.stat().st_size for path in unread.values())
    with (
        tqdm(
            total=total,
            desc=f"reading {what} in full, once (its digest is remembered)",
            unit="B",
            unit_scale=True,
            disable=total < SHOWN_FROM,
            leave=False,
        ) as bar,
        ThreadPoolExecutor(_READERS) as pool,
    ):  # hashlib lets go of the interpreter's lock
        found.update(zip(unread, pool.map(lambda path: _read(path, bar.update), unread.values()), strict=True))
    return {name: found[name] for name in files}


def of_file(path: str | Path) -> str:
    """SHA-256 of one whole file. Raises as ``of_files``."""
    return of_files({"": expanded(path)}, what=str(path))[""]


def hub_commit(name: str, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """The commit that a hub repository's revision stands for: as the hub says, or offline as it was last fetched.

    None where neither knows it.
    """
    from huggingface_hub import HfApi, constants

    revision = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    key = ("commit", str(constants.HF_HUB_CACHE), name, revision)
    if key not in _known:
        commit = None
        if not constants.HF_HUB_OFFLINE:
            try:
                commit = HfApi().model_info(name, revision=revision, token=token, timeout=10).sha
            except Exception:  # the hub's client has many kinds of failure; loading will say what it is
                commit = None
        if commit is None:
            ref = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / revision
            try:
                return ref.read_text(encoding="utf-8").strip() or None  # not kept: it may be fetched anew
            except (OSError, ValueError):
                return None
        _known[key] = commit
    return _known[key]


def hub_file(name: str, file: str, commit: str, token: str | bool | None = None) -> Path | None:
    """One small file of a hub repository's commit: from the cache, else fetched. None if it cannot be had."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cache = str(constants.HF_HUB_CACHE)
    try:
        found = try_to_load_from_cache(name, file, cache_dir=cache, revision=commit)
        if found is None and not constants.HF_HUB_OFFLINE:
            found = hf_hub_download(name, file, cache_dir=cache, revision=commit, token=token)
    except Exception:  # the hub's client has many kinds of failure; most often there is no such file
        return None
    return Path(found) if isinstance(found, str) else None


def _matters(name: str, *, code: bool) -> bool:
    return not name.startswith(".") and not _matches(name, IRRELEVANT) and (code or not name.endswith(".py"))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _shards(folder: Path) -> Iterator[Path]:
    """Weight files that an index names, which may lie deeper."""
    for index in folder.glob("*.index.json"):
        named = object_or_empty(object_in(index).get("weight_map"))  # checked, with words, where checkpoints are
        shards = {folder / shard for shard in named.values() if isinstance(shard, str)}
        yield from (shard for shard in shards if shard.is_file())


def _python_files(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _matches(name, _CODE_IS_NOT_IN)]
        yield from (Path(place) / name for name in files if name.endswith(".py"))


def _blob_digest(path: Path) -> str | None:
    """Of a large file in the hub's cache: what its link points to is named by its SHA-256."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    hub = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return blob.name if hub and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _state(path: Path) -> tuple[Any, ...]:
    stat = path.stat()
    return (
        str(path.absolute()),
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
        stat.st_ino,
        stat.st_dev,
    )


def _entry(path: str) -> Path:
    return cache_folder() / f"{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:32]}.json"


def _remembered(path: Path) -> str | None:
    state = _state(path)
    if state in _known:
        return _known[state]
    if state[1] < REMEMBERED_FROM:
        return None
    try:
        entry = json.loads(_entry(state[0]).read_text(encoding="utf-8"))
        digest = entry["sha256"]
        good = entry["state"] == list(state) and re.fullmatch(r"[0-9a-f]{64}", digest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if good:
        _known[state] = digest
    return digest if good else None


def _remember(state: tuple[Any, ...], digest: str) -> None:
    _known[state] = digest
    if state[1] < REMEMBERED_FROM:
        return
    try:
        entry = _entry(state[0])
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary.partial(entry)
        partial.write_text(json.dumps({"state": list(state), "sha256": digest}) + "\n", encoding="utf-8")
        partial.replace(entry)  # in one step: another process sees the old entry or the new one
    except (OSError, ValueError):
        return  # a folder that cannot be written, a full disk, a name that is no text: done without


def _read(path: Path, advance: Callable[[int], Any]) -> str:
    try:
        for _ in range(3):
            began, before = time.time_ns(), _state(path)
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                piece = bytearray(min(_PIECE, before[1] + 1))
                view = memoryview(piece)
                while length := file.readinto(piece):
                    digest.update(view[:length])
                    advance(length)
            if _state(path) == before:
                if began - max(before[2], before[3]) > RACY_NS:
                    _remember(before, digest.hexdigest())
                return digest.hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
    raise CheckpointError(f"{str(path)!r} is changing while it is read.", hint="wait until it is completely written.")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} cannot be read: {error}.", hint="its content decides answers.")
