"""Language model and tokenizer for the Python API: torch and transformers alone, no harness.

Inside lm-eval its own ``HFLM`` loads the model, with the same arguments; ``resolve_engine`` serves both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from specrej_eval import checkpoint
from specrej_eval.config import HOST, RunConfig, as_dict
from specrej_eval.config.engines import CPP
from specrej_eval.engines import base
from specrej_eval.engines.tokenizers import load_error, load_tokenizer, template_args_of
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.errors import CheckpointError, ConfigError, MissingDependencyError
from specrej_eval.kv import choose
from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.memory import clear_error, is_out_of_memory
from specrej_eval.kv.models import with_softcap
from specrej_eval.kv.native import build, products
from specrej_eval.paths import is_folder

UNSUPPORTED = {name: made.not_in_python for name, made in HOST.items() if made.not_in_python}
"""Arguments of lm-eval's ``HFLM`` that have no meaning here, and what to use in their place."""


def check_host_arguments(host: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: an argument that only lm-eval's loader understands; the hint says what to use.
    """
    for name, value in host.items():
        if name in UNSUPPORTED and value is not None and value is not False:
            if name == "backend" and value in ("default", "causal"):
                continue
            raise ConfigError(f"{name}={value!r} is not supported in the Python API.", hint=UNSUPPORTED[name])


@dataclass(frozen=True, kw_only=True)
class EnginePlan(base.EnginePlan):
    """A language model of transformers. ``host`` are ``from_pretrained``'s arguments, as in lm-eval's ``--model_args``,
    all but ``UNSUPPORTED``; ``dtype`` is never ``auto`` of the embedded model."""

    attention: AttentionBackend
    graphs: bool
    """Whether decode steps are replayed as CUDA graphs, where the model lets them."""
    template_args: Mapping[str, Any]
    """Of the chat template."""

    def load(self, *, content_rule: str) -> TransformersEngine:
        """Load weights and tokenizer, and try the model out.

        Args:
            content_rule: what ``special_tokens_in_content=None`` means.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError, OutOfMemoryError: as ``load_model``.
        """
        host = self.host
        model, tokenizer = self.load_model()
        return TransformersEngine(
            model,
            tokenizer,
            max_length=host.get("max_length"),
            attention=self.attention,
            graphs=self.graphs,
            think_end_token=host.get("think_end_token"),
            add_bos_token=host.get("add_bos_token"),
            chat_template_args=self.template_args,
            special_tokens_in_content=self.config.special_tokens_in_content or content_rule,
        )

    def environment(self) -> dict[str, Any]:
        """What ``attention_backend=auto`` and ``compile=auto`` came to, and who multiplies where that changes bits. See
        ``base.EnginePlan``."""
        found = {"attention_backend": self.attention.name}
        if self.device == "cpu":
            found["compile"] = "on" if self.config.compile != "off" and build.why_not() is None else "off"
        elif self.device.startswith("cuda"):
            found["compile"] = "on" if self.graphs else "off"
        if self.device == "cpu" and self.dtype != "float32":
            ours = self.attention.name == CPP and products.why_not() is None
            found["products"] = CPP if ours else "torch"
        return found

    def load_model(self) -> tuple[Any, Any]:
        """The language model, in eval mode on its device, and its tokenizer.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError: what only loading finds (the original error is
                chained).
            OutOfMemoryError: the weights do not fit on the device.
        """
        config, host = self.config, self.host
        hub: dict[str, Any] = {
            "revision": host.get("revision") or "main",
            "subfolder": host.get("subfolder") or "",
            "token": host.get("token"),
        }
        shared = {**hub, "trust_remote_code": config.trust_remote_code}
        if host.get("gguf_file") is None and not is_folder(self.name):
            _check_kind(self.name, checkpoint.read_config("pretrained", self.name, **hub), config)
        tokenizer = load_tokenizer(self.name, shared, host)
        model = _load_model(self, shared)
        if host.get("peft"):
            model = _with_adapter(model, str(host["peft"]), tokenizer, token=shared["token"])
        if not host.get("device_map"):
            model = _placed(model, self.device, self.name)
        return model.eval(), tokenizer


def engine_of_model(plan: base.EnginePlan, model: Any, tokenizer: Any, **text: Any) -> TransformersEngine:
    """The engine over a model that somebody else has loaded by ``plan``; ``text`` as in ``TransformersEngine``."""
    assert isinstance(plan, EnginePlan)
    model = with_softcap(model, asked=plan.config.attn_implementation is not None)
    return TransformersEngine(model, tokenizer, attention=plan.attention, graphs=plan.graphs, **text)


def resolve_engine(config: RunConfig, host: Mapping[str, Any], *, check: bool = True) -> EnginePlan:
    """Everything that can be said of the language model before its weights load.

    A hub name passes: what it names is checked when it is loaded.

    Args:
        check: False where the model is there already.

    Raises:
        CheckpointError: a folder, ``config.json``, weight file, tokenizer, adapter or GGUF file that is missing or
            broken; a checkpoint that is not a causal language model.
        ConfigError: the checkpoint needs remote code, which is off; a device that is not there, or on which the
            ``attention_backend`` does not run; ``chat_template_args`` that are no dict.
        MissingDependencyError: a package that a GGUF file, an adapter or ``attention_backend`` needs.
    """
    name = config.pretrained if config.pretrained is not None else str(checkpoint.DEMO_POLICY)
    if check:
        _check_checkpoint(name, config, host)
    template_args = template_args_of(host)
    # a model that is there already lies where it lies
    device = checkpoint.device_of(config.device) if check else config.device or checkpoint.device_of(None)
    attention = choose.resolve(config.attention_backend, device, config.compile)
    return EnginePlan(
        name=name,
        dtype="float32" if config.dtype == "auto" and config.pretrained is None else config.dtype,
        device=device,
        attention=attention,
        graphs=choose.replays(attention, device, config.compile),
        template_args=template_args,
        config=config,
        host=host,
    )


def _check_checkpoint(name: str, config: RunConfig, host: Mapping[str, Any]) -> None:
    if host.get("peft"):
        _check_adapter(str(host["peft"]))
    tokenizer = host.get("tokenizer")
    if isinstance(tokenizer, str) and (tokenizer_folder := checkpoint.check_folder("tokenizer", tokenizer)):
        checkpoint.check_tokenizer_files("tokenizer", tokenizer_folder)
    if host.get("gguf_file"):
        _check_gguf(name, str(host["gguf_file"]))
        return
    folder = checkpoint.check_folder("pretrained", name)
    if folder is None:
        return
    subfolder = str(host.get("subfolder") or "")
    _check_kind(name, checkpoint.read_config("pretrained", name, subfolder=subfolder), config)
    checkpoint.check_weights("pretrained", folder / subfolder)
    if not tokenizer:
        checkpoint.check_tokenizer_files("pretrained", folder / subfolder)


def _load_model(plan: EnginePlan, shared: Mapping[str, Any]) -> Any:
    name, config, host = plan.name, plan.config, plan.host
    arguments: dict[str, Any] = {**shared, "dtype": plan.dtype}
    for key in ("device_map", "gguf_file", "max_memory", "offload_folder"):
        if host.get(key):
            arguments[key] = host[key]
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = config.attn_implementation
    elif host.get("gguf_file"):
        arguments["attn_implementation"] = "sdpa"  # else transformers looks for a GGUF attention kernel on the hub
    if host.get("quantization_config"):
        arguments["quantization_config"] = _quantization(host["quantization_config"])
    with _memory_for(name):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
        except Exception as error:  # files, formats and remote code fail in many ways
            if is_out_of_memory(error):
                raise
            raise load_error("pretrained", name, error, what="model") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"pretrained={name!r} has no weights for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; "
            "they would be random.",
            hint="a shard is missing, or the checkpoint was saved without its language-model head.",
        )
    return with_softcap(model, asked=config.attn_implementation is not None)


def _placed(model: Any, device: str, name: str) -> Any:
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return model  # quantised weights were put on their device while they were loaded, and may not move
    with _memory_for(name):
        return model.to(device)


def _quantization(value: Any) -> Any:
    if not isinstance(value, (str, Mapping)):
        return value  # already a config of transformers
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(as_dict("quantization_config", value))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"quantization_config cannot be read: {error}",
            hint='it needs a quant_method, e.g. {"quant_method": "bitsandbytes", "load_in_8bit": true}.',
        ) from error


def _with_adapter(model: Any, adapter: str, tokenizer: Any, *, token: Any) -> Any:
    from peft import PeftModel

    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # an adapter trained with added tokens
    try:
        return PeftModel.from_pretrained(model, adapter, token=token)
    except Exception as error:  # peft fails in many ways
        raise load_error("peft", adapter, error, what="adapter") from error


def _check_kind(name: str, raw: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse what is not a causal language model, by its ``config.json``.

    Raises:
        CheckpointError: an encoder-decoder, an encoder, a classifier, a base model without a head, an unknown type.
        ConfigError: its code comes with the checkpoint, and remote code is off.
    """
    classes = checkpoint.architectures(raw)
    model_type = raw.get("model_type")
    listed = f"{', '.join(classes) or 'no architectures'}; model_type {model_type}"
    seq2seq = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if raw.get("is_encoder_decoder") or (model_type in seq2seq and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise CheckpointError(
            f"pretrained={name!r} is an encoder-decoder ({listed}).", hint="only causal language models are decoded."
        )
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    known = {entry for value in named for entry in ((value,) if isinstance(value, str) else value)}
    if any(entry in known for entry in classes) or (not classes and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        if config.trust_remote_code:
            return
        raise ConfigError(
            f"pretrained={name!r} ({listed}) comes with its own code.",
            hint="trust_remote_code=True runs that code; read it first.",
        )
    if any("ForSequenceClassification" in entry or "Reward" in entry for entry in classes):
        hint = "this looks like a reward model: give it as reward_model=, and a language model here."
    else:
        hint = "only causal language models are decoded: no encoders, no base models saved without a head."
    raise CheckpointError(f"pretrained={name!r} is not a causal language model ({listed}).", hint=hint)


def _check_gguf(name: str, gguf_file: str) -> None:
    missing = [package for package in ("accelerate", "gguf") if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"gguf_file={gguf_file!r} needs {' and '.join(missing)}.", hint=f"pip install {' '.join(missing)}"
        )
    folder = checkpoint.check_folder("pretrained", name)
    if folder is None:
        return
    path = folder / gguf_file
    if not path.is_file():
        found = sorted(entry.name for entry in folder.glob("*.gguf"))
        raise CheckpointError(
            f"gguf_file: there is no file {str(path)!r}.",
            hint=f"GGUF files there: {', '.join(found) or 'none'}; gguf_file is a name within pretrained=.",
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"gguf_file: {str(path)!r} is not a GGUF file.", hint="is the download complete?")


def _check_adapter(name: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(f"peft={name!r} needs the package peft.", hint="pip install peft")
    folder = checkpoint.check_folder("peft", name)
    if folder is not None and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"peft: {str(folder / 'adapter_config.json')!r} is missing.", hint="is this an adapter?")
    if folder is not None and not list(Path(folder).glob("adapter_model.*")):
        raise CheckpointError(f"peft: there is no adapter_model file in {str(folder)!r}.")


def _memory_for(name: str) -> AbstractContextManager[None]:
    return clear_error(
        f"loading the weights of pretrained={name!r}", "dtype=bfloat16, quantization_config, or device_map=auto."
    )
