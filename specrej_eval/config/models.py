"""Arguments about the language model: ours, and those of the host (lm-eval's ``HFLM``, or ``from_pretrained``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specrej_eval.config.argument import (
    Argument,
    Decides,
    Kind,
    Takes,
    argument,
    as_bool,
    as_dict,
    as_is,
    checkpoint,
    choice,
)
from specrej_eval.config.engines import TRANSFORMERS

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
        takes=(Takes.RUN, Takes.POLICY),
        elsewhere=("llm_name", "model", "model_dir", "model_name", "model_name_or_path"),
    )
    dtype: str = argument(
        "auto",
        DTYPE,
        "Precision: auto, float32, bfloat16 or float16; auto = float32 for the embedded model, else the checkpoint's.",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.POLICY),
        elsewhere=("torch_dtype",),
    )
    trust_remote_code: bool = argument(
        False,
        as_bool,
        "Run code that comes with a checkpoint.",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.ALONE, Takes.POLICY),
    )
    special_tokens_in_content: str | None = argument(
        None,
        choice("encode_as_text", "allow", "error"),
        "Special tokens such as ``<|im_end|>`` written out by a user or in an answer: ``encode_as_text``, ``allow`` "
        "(control tokens) or ``error``.",
        none="text for rewards, judges and chat messages; as ``--model hf`` for prompts of a harness",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.ALONE, Takes.POLICY),
    )


_GPTQ = "GPTQ checkpoints load by themselves (their config.json names the method; pip install gptqmodel)."
_LOGLIKELIHOOD = "only lm-eval's log-likelihood requests use it; use --model specrej."
_PLACING = "parallelize=True with max_memory_per_gpu= and max_cpu_memory=."


_OF_ALL_ENGINES = {
    *("add_bos_token", "chat_template_args", "enable_thinking", "think_end_token", "prefix_token_id", "max_length"),
    *("revision", "token", "tokenizer", "use_fast_tokenizer", "backend"),
}
"""How prompts are made and answers are cut does not belong to one engine. The rest is of transformers' loader."""


def _host(name: str, default: Any, help: str, kind: Kind = as_is, *, places: bool = False, **others: Any) -> Argument:
    decides = Decides.PLACE if places else Decides.MODELS
    takes = frozenset([Takes.RUN])
    engines = () if name in _OF_ALL_ENGINES else (TRANSFORMERS,)
    return Argument(
        name=name, default=default, kind=kind, help=help, decides=decides, takes=takes, engines=engines, **others
    )


_HOST = (
    _host("add_bos_token", None, "Begin prompts with BOS."),
    _host("autogptq", False, "Load with auto-gptq.", not_in_python=_GPTQ),
    _host(
        "backend",
        None,
        "Kind of model.",
        places=True,
        not_in_python="only causal language models are decoded; leave it out.",
    ),
    _host("chat_template_args", {}, "Arguments of the chat template, a dict or its JSON text.", as_dict),
    _host(
        "delta",
        None,
        "Weights to add to the model's.",
        checkpoint,
        not_in_python="add the delta weights to the base model once, save the sum, and give its folder as pretrained=.",
    ),
    _host("device_map", None, "Where layers go.", places=True, not_in_lm_eval="use parallelize=True."),
    _host("enable_thinking", None, "The chat template's switch of the same name."),
    _host("gguf_file", None, "A GGUF file within ``pretrained``."),
    _host("gptqmodel", False, "Load with gptqmodel.", not_in_python=_GPTQ),
    _host("logits_cache", None, "Keep logits of equal prompts.", places=True, not_in_python=_LOGLIKELIHOOD),
    _host(
        "max_batch_size",
        None,
        "Largest number of prompts under ``--batch_size auto``.",
        places=True,
        not_in_python="use batch_size (prompts in flight) and n (rows of one prompt).",
    ),
    _host(
        "max_cpu_memory",
        None,
        "Memory limit of the CPU, with ``parallelize``.",
        places=True,
        not_in_python="use max_memory={...} with device_map=auto.",
    ),
    _host("max_length", None, "Context of the model in tokens."),
    _host("max_memory", None, "Memory limit of each device.", places=True, not_in_lm_eval=f"use {_PLACING}"),
    _host(
        "max_memory_per_gpu",
        None,
        "Memory limit of each GPU, with ``parallelize``.",
        places=True,
        not_in_python="use max_memory={...} with device_map=auto.",
    ),
    _host("mixed_precision_dtype", None, "Autocast of log-likelihood requests.", not_in_python="use dtype."),
    _host("offload_folder", None, "Folder for weights that do not fit in memory.", places=True),
    _host("parallelize", None, "Spread the layers over the GPUs.", places=True, not_in_python="use device_map=auto."),
    _host("peft", None, "An adapter: a hub name or a folder.", checkpoint),
    _host("prefix_token_id", None, "Token that stands in for an empty context."),
    _host(
        "quantization_config",
        None,
        "How to quantise, a dict or its JSON text.",
        as_dict,
        not_in_lm_eval="it reads the one in the checkpoint's config.json; or give a loaded model in Python.",
    ),
    _host("revision", "main", "Branch, tag or commit of the hub repository."),
    _host("softmax_dtype", None, "Precision of log-likelihood requests' softmax.", not_in_python=_LOGLIKELIHOOD),
    _host("subfolder", "", "Folder within the checkpoint."),
    _host("think_end_token", None, "The text that ends a model's thinking; everything up to it is cut off the answer."),
    _host("token", None, "Access token of the hub, for gated checkpoints.", places=True, private=True),
    _host("tokenizer", None, "Another checkpoint's tokenizer: a hub name or a folder.", checkpoint),
    _host("tp_plan", None, "Tensor parallelism.", places=True, not_in_python="use device_map=auto."),
    _host(
        "truncation",
        False,
        "Truncate prompts in the tokenizer.",
        not_in_python="a prompt longer than the context is an error here; shorten it yourself.",
    ),
    _host("use_fast_tokenizer", True, "Use the tokenizer in Rust."),
)
HOST = {made.name: made for made in _HOST}
"""Arguments of lm-eval's ``HFLM`` (or of ``from_pretrained``), by name: passed on as they are given."""
