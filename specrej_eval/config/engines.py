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
    on_off,
    text,
    whole,
)

AUTO_BACKEND = "auto"
SDPA = "sdpa"
"""PyTorch's own attention, on every device."""
CPP = "cpp"
"""A C++ kernel of ours for CPUs, compiled on the machine."""

AUTO_ENGINE = "auto"
TRANSFORMERS = "transformers"
VLLM = "vllm"
VLLM_SERVER = "vllm-server"
SGLANG_SERVER = "sglang-server"
OPENAI_SERVER = "openai-server"
SERVERS = (VLLM_SERVER, SGLANG_SERVER, OPENAI_SERVER)
ENGINES = (TRANSFORMERS, VLLM, *SERVERS)
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


def _of_servers(default: Any, kind: Kind, help: str, **others: Any) -> Any:
    """A field about a server that decodes."""
    return argument(default, kind, help, decides=Decides.PLACE, engines=SERVERS, **others)


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    engine: str = argument(
        AUTO_ENGINE,
        choice(AUTO_ENGINE, *ENGINES, also={"hf": TRANSFORMERS, "sglang": SGLANG_SERVER}),
        "Who decodes: ``transformers`` (our own engine, on a transformers model), ``vllm`` (in this process), "
        "``vllm-server``, ``sglang-server`` or ``openai-server`` (one that runs); ``auto`` = ``transformers``.",
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
        "Kernels of our engine's attention: ``sdpa`` everywhere; ``flash_attn``, ``flashinfer``, ``triton`` on a GPU; "
        "``cpp`` on a CPU. ``auto`` = on a GPU one that ``doctor --attention`` found right there, on a CPU ``cpp`` if "
        "``compile`` allows it, else ``sdpa``.",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.POLICY),
        engines=(TRANSFORMERS,),
    )
    compile: str = argument(
        "auto",
        on_off("auto", "on", "off"),
        "On a CPU, C++ kernels, compiled once on this machine (2 seconds): ``auto`` = where g++ is there, ``on`` = or "
        "an error. On a GPU, decode steps replayed as CUDA graphs: ``auto`` = where ``doctor --attention`` found them "
        "right, ``on`` = untried too. ``off`` = neither. Last bits differ; with ``auto`` a journal is gone on with as "
        "it was begun.",
        decides=Decides.PLACE,
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
    engine_url: str | None = _of_servers(
        None,
        text,
        "Address of the server that decodes, such as ``http://localhost:8000``; its key is read from the environment "
        "variable ``SPECREJ_ENGINE_API_KEY``.",
        none="must be given for an engine that is a server",
        private=True,
    )
    engine_looks: str = _of_servers(
        "auto",
        choice("auto", "pause", "resubmit"),
        "How a server comes to a look: ``pause`` = all its clients wait while rows are scored, ``resubmit`` = rows are "
        "asked for anew from what they have; ``auto`` = ``pause`` where the server can.",
    )
    engine_timeout: float = _of_servers(
        60.0,
        number("above 0", lambda value: value > 0),
        "Seconds without a token of any row, or without an answer, after which a server is asked anew.",
    )
    engine_retries: int = _of_servers(
        5, whole(0), "Further tries, with growing pauses, before a server that decodes counts as failed."
    )
    engine_key_over_http: bool = _of_servers(
        False,
        as_bool,
        "True: the key for ``engine_url`` goes to any host, unencrypted too; else to ``https`` and this machine alone.",
    )


OF_VLLM = tuple(name for name, made in declared(EngineArguments).items() if made.engines == (VLLM,))
"""Passed on to vLLM under these very names."""
