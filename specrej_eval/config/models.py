"""Arguments about the language model: ours, and those of the host (lm-eval's ``HFLM``, or ``from_pretrained``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specrej_eval.config.argument import Decides, Takes, argument, as_bool, as_dict, as_is, checkpoint, choice

DTYPE = choice(
    *("auto", "float32", "bfloat16", "float16"),
    also={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"},
)


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    pretrained: str | None = argument(
        None,
        checkpoint,
        "Language model: a hub name or a folder.",
        none="the embedded demo model",
        decides=Decides.MODELS,
        elsewhere=("llm_name", "model", "model_dir", "model_name", "model_name_or_path"),
    )
    dtype: str = argument(
        "auto",
        DTYPE,
        "auto, float32, bfloat16 or float16; auto = float32 for the embedded model, else the checkpoint's.",
        decides=Decides.MODELS,
        elsewhere=("torch_dtype",),
    )
    trust_remote_code: bool = argument(
        False,
        as_bool,
        "Run code that comes with a checkpoint.",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.ALONE),
    )
    special_tokens_in_content: str | None = argument(
        None,
        choice("encode_as_text", "allow", "error"),
        "Special tokens such as ``<|im_end|>`` that a user or an answer spells: ``encode_as_text``, ``allow`` (control "
        "tokens) or ``error``.",
        none="text for rewards, judges and chat messages; as ``--model hf`` for prompts of a harness",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.ALONE),
    )


_GPTQ = "GPTQ checkpoints load by themselves (their config.json names the method; pip install gptqmodel)."
_LOGLIKELIHOOD = "only lm-eval's log-likelihood requests use it; use --model specrej."
_PLACING = "parallelize=True with max_memory_per_gpu= and max_cpu_memory=."


def _host(default: Any, help: str, kind: Any = as_is, *, places: bool = False, **others: Any) -> Any:
    return argument(default, kind, help, decides=Decides.PLACE if places else Decides.MODELS, **others)


@dataclass(frozen=True, kw_only=True)
class HostArguments:
    """Passed on to the loader as they are given."""

    add_bos_token: bool | None = _host(None, "Begin prompts with BOS.")
    autogptq: bool | str = _host(False, "Load with auto-gptq.", not_in_python=_GPTQ)
    backend: str | None = _host(
        None, "Kind of model.", places=True, not_in_python="only causal language models are decoded; leave it out."
    )
    chat_template_args: str = _host("{}", "Arguments of the chat template, a dict or its JSON text.", as_dict)
    delta: str | None = _host(
        None,
        "Weights to add to the model's.",
        checkpoint,
        not_in_python="add the delta weights to the base model once, save the sum, and give its folder as pretrained=.",
    )
    device_map: str | None = _host(None, "Where layers go.", places=True, not_in_lm_eval="use parallelize=True.")
    enable_thinking: bool | None = _host(None, "The chat template's switch of that name.")
    gguf_file: str | None = _host(None, "A GGUF file within ``pretrained``.")
    gptqmodel: bool = _host(False, "Load with gptqmodel.", not_in_python=_GPTQ)
    logits_cache: bool | None = _host(None, "Keep logits of equal prompts.", places=True, not_in_python=_LOGLIKELIHOOD)
    max_batch_size: int | None = _host(
        None,
        "Most prompts of ``--batch_size auto``.",
        places=True,
        not_in_python="use batch_size (prompts in flight) and n (rows of one prompt).",
    )
    max_cpu_memory: str | None = _host(
        None, "With ``parallelize``.", places=True, not_in_python="use max_memory={...} with device_map=auto."
    )
    max_length: int | None = _host(None, "Context of the model in tokens.")
    max_memory: str | None = _host(None, "Memory of each device.", places=True, not_in_lm_eval=f"use {_PLACING}")
    max_memory_per_gpu: str | None = _host(
        None, "With ``parallelize``.", places=True, not_in_python="use max_memory={...} with device_map=auto."
    )
    mixed_precision_dtype: str | None = _host(None, "Autocast of log-likelihood requests.", not_in_python="use dtype.")
    offload_folder: str | None = _host(None, "For weights that no memory holds.", places=True)
    parallelize: bool | None = _host(
        None, "Spread the layers over the GPUs.", places=True, not_in_python="use device_map=auto."
    )
    peft: str | None = _host(None, "An adapter: a hub name or a folder.", checkpoint)
    prefix_token_id: int | None = _host(None, "Token in the place of an empty context.")
    quantization_config: str | None = _host(
        None,
        "How to quantise, a dict or its JSON text.",
        as_dict,
        not_in_lm_eval="it reads the one in the checkpoint's config.json; or give a loaded model in Python.",
    )
    revision: str = _host("main", "Branch, tag or commit of the hub repository.")
    softmax_dtype: str | None = _host(
        None, "Precision of log-likelihood requests' softmax.", not_in_python=_LOGLIKELIHOOD
    )
    subfolder: str = _host("", "Folder within the checkpoint.")
    think_end_token: str | int | None = _host(None, "What ends a model's thinking, which is cut off the answer.")
    token: str | None = _host(None, "Of the hub, for gated checkpoints.", places=True, private=True)
    tokenizer: str | None = _host(None, "Another checkpoint's tokenizer: a hub name or a folder.", checkpoint)
    tp_plan: str | None = _host(None, "Tensor parallelism.", places=True, not_in_python="use device_map=auto.")
    truncation: bool = _host(
        False,
        "Truncate prompts in the tokenizer.",
        not_in_python="a prompt longer than the context is an error here; shorten it yourself.",
    )
    use_fast_tokenizer: bool = _host(True, "The tokenizer in Rust.")
