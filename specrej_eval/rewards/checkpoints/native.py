"""Reward models that transformers has no class for: its body, and heads of our own, both from the original checkpoint.

The published checkpoints bring remote code for their heads, most of which no longer imports on transformers 5. Here
the body is transformers' (``LlamaModel`` and its kind: attention, dtypes and sharded files as everywhere), and the
head's tensors are read by their original names, straight into float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from specrej_eval.errors import CheckpointError, ConfigError
from specrej_eval.paths import expanded
from specrej_eval.rewards.checkpoints.family import RewardCheckpoint
from specrej_eval.rewards.checkpoints.forward import Head, PositionsOf
from specrej_eval.rewards.checkpoints.loading import load_checkpoint, no_weights
from specrej_eval.rewards.checkpoints.memory import Allowance
from specrej_eval.rewards.checkpoints.renderer import Renderer, TextRenderer, max_length_of, renderer_options
from specrej_eval.rewards.checkpoints.reward import CheckpointReward

_SAFETENSORS = "*.safetensors"
_PICKLED = "pytorch_model*.bin"

_NOT_ARCHITECTURE = ("architectures", "auto_map", "model_type", "attn_implementation", "_attn_implementation")
"""Keys of ``config.json`` that would lead back to remote code, or to an attention kernel that may not be there."""


def body_config(name: str, raw: Mapping[str, Any], *, model_type: str | None = None) -> Any:
    """transformers' config of the body, with all further keys of ``config.json`` as attributes.

    Raises:
        CheckpointError: transformers has no such body.
    """
    kind = model_type or str(raw.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        raise CheckpointError(f"reward_model={name!r}: transformers has no model of type {kind!r} to put its head on.")
    return CONFIG_MAPPING[kind].from_dict({key: value for key, value in raw.items() if key not in _NOT_ARCHITECTURE})


def load_body(
    source: RewardCheckpoint,
    *,
    model_config: Any = None,
    state: Mapping[str, Tensor] | None = None,
    tokenizer_from: str | None = None,
    key_mapping: dict[str, str] | None = None,
) -> tuple[Any, Any]:
    """The body and the tokenizer; what else the checkpoint holds (head, language-model head) is left alone.

    Args:
        model_config: the body's config, if ``config.json`` is not it.
        state: the body's tensors under transformers' names, if the checkpoint's own files cannot be read as they are.
        tokenizer_from: another checkpoint whose tokenizer this one was trained with.
        key_mapping: original names of the body's tensors (patterns) -> transformers' names.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    if model_config is None:
        model_config = body_config(source.name, source.raw)
    given = {"config": model_config, "key_mapping": key_mapping, "state_dict": state and dict(state)}
    more = {name: value for name, value in given.items() if value is not None}
    body_class: Any = MODEL_MAPPING[type(model_config)]

    def load(name: str, *, trust_remote_code: bool, **options: Any) -> Any:
        # a body of transformers' own has no remote code to trust
        return body_class.from_pretrained(name if state is None else None, **options, **more)

    with _quiet():  # transformers would report the head's weights as unexpected
        return load_checkpoint(source, load, tokenizer_from=tokenizer_from)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def read_tensors(
    source: RewardCheckpoint, wanted: Callable[[str], bool], *, pattern: str | None = None
) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their original names, on the CPU, in the dtype they are stored in.

    Args:
        wanted: chooses by name; nothing else is read from safetensors files.
        pattern: the weight files, if they are not named as transformers names them (a raw ``.pt``). Pickled files are
            read with ``weights_only=True``: tensors, never code.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
    """
    try:
        files = _files(source, pattern or _SAFETENSORS) or _files(source, _PICKLED)
        found = {key: tensor for path in files for key, tensor in _tensors(path, wanted)}
    except Exception as error:  # the hub's client and the file formats fail in many ways
        raise CheckpointError(
            f"reward_model={source.name!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if not files:
        raise CheckpointError(
            f"reward_model={source.name!r} has no weight file.",
            hint=f"looked for {pattern or _SAFETENSORS}, {_PICKLED}.",
        )
    return found


def _files(source: RewardCheckpoint, pattern: str) -> list[Path]:
    folder = expanded(source.name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(source.name, allow_patterns=[pattern], ignore_patterns=["*/*"], token=source.token)
        )
    return sorted(folder.glob(pattern))


def _tensors(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                if wanted(key):
                    yield key, file.get_tensor(key)
        return
    for key, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
        if wanted(key):
            yield key, tensor


def load_head(
    source: RewardCheckpoint, head: nn.Module, prefix: str = "", *, rows: Sequence[int] | None = None
) -> nn.Module:
    """The head with its weights from the checkpoint, as ``fill``; no other tensor is read.

    Args:
        rows: of the tensors, that the head has (of a language-model head, those of a few tokens).

    Raises:
        CheckpointError: as ``read_tensors`` and ``fill``.
    """
    names = {prefix + key for key in head.state_dict()}
    tensors = read_tensors(source, names.__contains__)
    if rows is not None:
        tensors = {key: tensor[list(rows)] for key, tensor in tensors.items()}
    return fill(source, head, tensors, prefix)


def lm_head(source: RewardCheckpoint, body: Any, tokens: Sequence[int]) -> nn.Module:
    """The rows of the language-model head that give the logits of these tokens: hidden size -> (tokens).

    Raises:
        CheckpointError: as ``load_head``.
    """
    # tied embeddings are stored once
    prefix = "model.embed_tokens." if body.config.tie_word_embeddings else "lm_head."
    return load_head(source, nn.Linear(body.config.hidden_size, len(tokens), bias=False), prefix, rows=tokens)


def fill(source: RewardCheckpoint, head: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """The head with its weights, in float32 and eval mode.

    Args:
        prefix: what the original names have in front of the head's own.

    Raises:
        CheckpointError: a weight is missing, or has another shape than ``config.json`` calls for.
    """
    expected = head.state_dict()
    state = {key: tensors[prefix + key] for key in expected if prefix + key in tensors}
    # a BatchNorm's counter of training batches means nothing here, and not every file holds it
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise no_weights(source.name, [prefix + key for key in missing])
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"reward_model={source.name!r}: {prefix + key} has shape {tuple(tensor.shape)}, but its config.json "
                f"calls for {tuple(expected[key].shape)}.",
                hint="config.json and weights do not match, or the file was cut short.",
            )
    head.load_state_dict(state, strict=False)
    return head.float().eval().requires_grad_(False)


def assemble(
    source: RewardCheckpoint,
    body: Any,
    tokenizer: Any,
    head: Head,
    *,
    renderer_class: type[Renderer] = Renderer,
    positions_of: PositionsOf | None = None,
    template: str | None = None,
    **renderer: Any,
) -> CheckpointReward:
    """The reward model, its parts put together as every family here does.

    Args:
        head: see ``forward.Head``; a module is moved to the body's device.
        positions_of: None = the renderer's.
        template: the family's own chat template; the user's ``reward_template`` wins.
        renderer: further arguments of the renderer.
    """
    if isinstance(head, nn.Module):
        head.to(next(body.parameters()).device)
    inputs = renderer_class(
        tokenizer,
        name=source.name,
        vocab_size=int(body.get_input_embeddings().weight.shape[0]),
        max_length=max_length_of(body.config, tokenizer),
        **{"template": template, **renderer_options(source.config)},
        **renderer,
    )
    return CheckpointReward(
        body,
        head,
        inputs,
        positions_of=positions_of or inputs.positions_of,
        cache=source.config.reward_cache,
        compile=source.config.compile,
        allowance=Allowance.of(source.config, source.device),
    )


class LastToken(nn.Module):
    """A head that reads one position: ``layers`` on it, the first output is the score."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(rows, 1, hidden size) -> (rows,)"""
        # the mask says nothing: one position in every row
        scores: Tensor = self.layers(hidden[:, 0])[:, 0]
        return scores


def num_labels(raw: Mapping[str, Any]) -> int:
    """As transformers counts: ``id2label`` wins, ``num_labels`` next, 2 by default."""
    labels = raw.get("id2label")
    return len(labels) if labels is not None else int(raw.get("num_labels", 2))


def required(name: str, raw: Mapping[str, Any], *keys: str) -> None:
    """Raises:
    ConfigError: ``config.json`` lacks a key that the family cannot do without.
    """
    if absent := [key for key in keys if raw.get(key) is None]:
        raise ConfigError(
            f"reward_model={name!r}: its config.json does not say {', '.join(absent)}.",
            hint="is it a checkpoint of this reward_family?",
        )


def load_linear(
    source: RewardCheckpoint, prefix: str, template: str, *, bias: bool = False, **body: Any
) -> CheckpointReward:
    """A linear head at the last token of text in a template of the family's own.

    Args:
        prefix: of the head's weights.
        body: further arguments of ``load_body``.

    Raises:
        CheckpointError: files that cannot be loaded, weights that are missing or of another shape.
    """
    model, tokenizer = load_body(source, **body)
    head = load_head(source, nn.Linear(model.config.hidden_size, 1, bias=bias), prefix)
    return assemble(source, model, tokenizer, LastToken(head), renderer_class=TextRenderer, template=template)
