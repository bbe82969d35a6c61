"""Arguments about who decodes, and where and how models compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specrej_eval import registry
from specrej_eval.config.argument import (
    Decides,
    Kind,
    Takes,
    argument,
    as_bool,
    as_is,
    choice,
    declared,
    number,
    text,
    whole,
)

AUTO_BACKEND = "auto"
SDPA = "sdpa"
"""PyTorch's own attention, on every device."""

AUTO_ENGINE = "auto"
TRANSFORMERS = "transformers"
VLLM = "vllm"
VLLM_SERVER = "vllm-server"
SGLANG_SERVER = "sglang-server"
ENGINES = (TRANSFORMERS, VLLM, VLLM_SERVER, SGLANG_SERVER)
"""Who can decode; ``engines.choose`` knows where each one lies."""

NOT_TAKEN = {
    "data_parallel_size": "prompts are split over processes instead, each with an engine of its own: start several "
    "with `torchrun --nproc_per_node N -m lm_eval ...` or `accelerate launch`.",
}
"""Arguments of engines that we do not pass on, and what to do instead."""


def engine_of(name: str) -> str:
    """Who decodes under a value of ``engine``."""
    return TRANSFORMERS if name == AUTO_ENGINE else name


def _of_vllm(default: Any, kind: Kind, help: str, *, decides: Decides = Decides.PLACE, **others: Any) -> Any:
    """A field that is passed on to vLLM."""
    return argument(default, kind, help, decides=decides, engines=(VLLM,), **others)


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    engine: str = argument(
        AUTO_ENGINE,
        choice(AUTO_ENGINE, *ENGINES, also={"hf": TRANSFORMERS, "sglang": SGLANG_SERVER}),
        "Who decodes: ``transformers`` (our own engine, on a transformers model), ``vllm`` (in this process), "
        "``vllm-server`` or ``sglang-server`` (one that runs); ``auto`` = ``transformers``.",
        decides=Decides.MODELS,
    )
    device: str | None = argument(
        None,
        text,
        "Device of the models.",
        none="cuda if there is one, else cpu",
        decides=Decides.PLACE,
        takes=(Takes.RUN, Takes.ALONE, Takes.POLICY),
        private=True,
    )
    attn_implementation: str | None = argument(
        None,
        as_is,
        "Attention of the model outside our engine (log-likelihood requests).",
        none="transformers' choice",
        decides=Decides.PLACE,
        engines=(TRANSFORMERS,),
    )
    attention_backend: str = argument(
        AUTO_BACKEND,
        choice(
            among=lambda: (AUTO_BACKEND, *registry.names("specrej_eval.kv.attention")),
            also={"flash-attn": "flash_attn", "flash_attention_2": "flash_attn"},
        ),
        "Kernels of our engine's attention on a GPU: ``sdpa``, ``flash_attn``, ``flashinfer``, ``triton``; ``auto`` = "
        "one that ``doctor --attention`` found right on this GPU, else ``sdpa``.",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.POLICY),
        engines=(TRANSFORMERS,),
    )
    tensor_parallel_size: int = _of_vllm(1, whole(), "GPUs over which each layer of the language model is split.")
    pipeline_parallel_size: int = _of_vllm(
        1, whole(), "Groups of GPUs over which the language model's layers are divided."
    )
    distributed_executor_backend: str | None = _of_vllm(
        None,
        text,
        "Who runs the processes of several GPUs: ``mp``, or ``ray`` for several nodes.",
        none="vLLM's choice",
    )
    quantization: str | None = _of_vllm(
        None,
        text,
        "How the weights are quantised: ``fp8``, ``awq``, ``gptq`` and so on.",
        none="as the checkpoint says",
        decides=Decides.MODELS,
    )
    max_model_len: int | None = _of_vllm(
        None, whole(), "Context of the model in tokens.", none="the checkpoint's", decides=Decides.MODELS
    )
    gpu_memory_utilization: float | None = _of_vllm(
        None,
        number("above 0 and at most 1", lambda value: 0 < value <= 1),
        "Share of each GPU's memory that the language model and its KV cache may take.",
        none="vLLM's",
    )
    enforce_eager: bool = _of_vllm(False, as_bool, "True: no CUDA graphs and no compilation.")


OF_VLLM = tuple(name for name, made in declared(EngineArguments).items() if made.engines == (VLLM,))
"""Passed on to vLLM under these very names."""
