"""What can be said of a checkpoint before its weights are loaded: names, folders, config.json, file lengths.

The language model and the reward model are held to the same rules with the same words, hence in neither's room.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrej_eval.errors import CheckpointError, ConfigError, nearest
from specrej_eval.paths import PACKAGE, expanded, is_folder, is_there
from specrej_eval.wording import counted

DEMO_POLICY = PACKAGE / "demo" / "policy"
"""The embedded language model (``specrej_eval.demo.POLICY_DIR``, which rooms below the front do not import)."""
DEMO_REWARD = PACKAGE / "demo" / "reward"
"""The embedded reward model (``specrej_eval.demo.REWARD_DIR``)."""

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
INDEX_PATTERNS = ("*.safetensors.index.json", "pytorch_model*.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can name a hub repository: ``owner/name``, or a bare name of the hub's early days (``gpt2``)."""
    return _HUB_NAME.fullmatch(name) is not None


def check_folder(argument: str, name: str) -> Path | None:
    """The folder that ``name`` means, or None if it names a hub repository.

    Raises:
        CheckpointError: the folder is missing (the nearest one beside it is suggested), or is a file.
    """
    folder = expanded(name)
    if is_folder(name):
        return folder
    if is_there(name):
        raise CheckpointError(
            f"{argument} must be a checkpoint folder or a hub name, got the file {name!r}.",
            hint=f"give its folder: {str(folder.parent)!r}. A GGUF file goes into gguf_file=.",
        )
    if is_hub_name(name):
        return None
    raise CheckpointError(f"{argument}: there is no folder {name!r}.", hint=folder_hint(name))


def folder_hint(name: str) -> str:
    """What lies beside a folder that does not exist."""
    parent = expanded(name).absolute().parent
    if not parent.is_dir():
        return f"{str(parent)!r} does not exist either."
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    best = nearest(Path(name).name, siblings)
    return f"did you mean {str(parent / best)!r}?" if best else f"no folder in {str(parent)!r} has a name like it."


def read_config(
    argument: str, name: str, *, revision: str | None = None, subfolder: str = "", token: str | bool | None = None
) -> dict[str, Any]:
    """The checkpoint's ``config.json``; of a hub repository, this file alone is fetched.

    Raises:
        CheckpointError: no such folder or repository, no ``config.json``, or one that is not a JSON object.
    """
    folder = check_folder(argument, name)
    if folder is None:
        return _hub_config(argument, name, revision=revision, subfolder=subfolder, token=token)
    path = folder / subfolder / "config.json"
    if not path.is_file():
        hint = "save_pretrained writes it; a folder of GGUF files needs gguf_file=."
        if (path.parent / "adapter_config.json").is_file():
            hint = "this is an adapter: give its base model here and the adapter as peft=."
        raise CheckpointError(f"{argument}: {str(path)!r} is missing, so this is not a model's folder.", hint=hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{argument}: {str(path)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{argument}: {str(path)!r} must hold a JSON object, got {type(config).__name__}.")
    return config


def _hub_config(
    argument: str, name: str, *, revision: str | None, subfolder: str, token: str | bool | None
) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        # the raw dict: an architecture that transformers does not know must not fail here, but where it is used
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision, subfolder=subfolder, token=token)
    except Exception as error:  # the hub's client has many kinds of failure; all of them mean the same here
        raise CheckpointError(
            f"{argument}: {name!r} is not a folder; could not download its config.json from the hub: "
            f"{_first_line(error)}",
            hint="check the name, the network (is HF_HUB_OFFLINE set?) and your access. If you meant a folder: "
            f"{folder_hint(name)}",
        ) from error
    return dict(config)


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names in ``config.json``; empty if it names none."""
    found = config.get("architectures") or ()
    return tuple(str(entry) for entry in found) if isinstance(found, (list, tuple)) else (str(found),)


def check_weights(argument: str, folder: Path) -> None:
    """Hold the weight files to what their headers promise, without reading a tensor.

    Raises:
        CheckpointError: no weight file; a shard that the index names is missing; a Git LFS pointer in place of the
            weights; a safetensors file that is shorter than its header says. Each names the file.
    """
    for pattern in INDEX_PATTERNS:
        for index in sorted(folder.glob(pattern)):
            for shard in sorted(_shards(argument, index)):
                if not (folder / shard).is_file():
                    raise CheckpointError(
                        f"{argument}: {str(folder / shard)!r} is missing; {index.name} names it.",
                        hint="the download or copy is not complete.",
                    )
    files = sorted({path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)})
    if not files:
        raise CheckpointError(
            f"{argument}: there is no weight file in {str(folder)!r}.", hint=f"looked for {', '.join(WEIGHT_PATTERNS)}."
        )
    for path in files:
        _check_weight_file(argument, path)


def _shards(argument: str, index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{argument}: {str(index)!r} is not an index of weight files: {error!r}.") from error


def _check_weight_file(argument: str, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":  # safetensors would read these 8 bytes as an absurd header length
            raise CheckpointError(
                f"{argument}: {str(path)!r} is a Git LFS pointer, not the weights.", hint="run `git lfs pull` there."
            )
        if path.suffix != ".safetensors":
            return
        length = int.from_bytes(start, "little")
        try:
            if len(start) < 8 or 8 + length > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(
                f"{argument}: {str(path)!r} is not a readable safetensors file: {error}.",
                hint="the download or copy is not complete.",
            ) from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise CheckpointError(
            f"{argument}: {str(path)!r} has {counted(size, 'byte')}, but its header promises {expected:,}.",
            hint="the download or copy is not complete.",
        )


_STAMPED = (*WEIGHT_PATTERNS, *INDEX_PATTERNS, "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
_SAMPLE_BYTES = 1 << 20


def stamp(name: str | None) -> str | None:
    """A digest of what lies in a checkpoint folder, so that a record made with other weights is noticed.

    Names, sizes, and the first and last megabyte of every file; None for anything that is not a folder (a hub name is
    told apart by its revision).
    """
    if name is None or not is_folder(name):
        return None
    digest = hashlib.sha256()
    folder = expanded(name)
    for path in sorted({path for pattern in _STAMPED for path in folder.glob(pattern)}):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_SAMPLE_BYTES)
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(f"{path.name}\0{size}\0".encode() + head + file.read())
    return digest.hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer file in a folder; any text may be asked for as one."""
    return any(os.path.isfile(folder / name) for name in TOKENIZER_FILES)


def check_tokenizer_files(argument: str, folder: Path) -> None:
    """Raises:
    CheckpointError: no tokenizer file in the folder.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{argument}: there is no tokenizer in {str(folder)!r}.",
            hint=f"looked for {', '.join(TOKENIZER_FILES)}.",
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def device_of(device: str | None) -> str:
    """``device``, or cuda if there is one, else cpu.

    Raises:
        ConfigError: as ``check_device``.
    """
    import torch

    if device is not None:
        check_device("device", device)
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(argument: str, device: str) -> None:
    """Raises:
    ConfigError: not a device torch knows, or not there.
    """
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{argument} must be a torch device, got {device!r}.", hint=_first_line(error)) from error
    if parsed.type == "cuda":
        count = torch.cuda.device_count()
        if (parsed.index or 0) >= count:
            raise ConfigError(
                f"{argument}={device}: this machine has {count or 'no'} CUDA device{'s' * (count != 1)}.",
                hint="device=cpu always works.",
            )
