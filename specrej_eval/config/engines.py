"""Arguments about where and how models compute."""

from __future__ import annotations

from dataclasses import dataclass

from specrej_eval import registry
from specrej_eval.config.argument import Decides, Takes, argument, as_is, choice, on_off, text

AUTO_BACKEND = "auto"
SDPA = "sdpa"
"""PyTorch's own attention, on every device."""
CPP = "cpp"
"""A C++ kernel of ours for CPUs, compiled on the machine."""


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
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
    )
    compile: str = argument(
        "auto",
        on_off("auto", "on", "off"),
        "C++ kernels for a CPU, compiled once on this machine (2 seconds): ``auto`` = where g++ is there, ``on`` = or "
        "an error, ``off`` = never. They differ from PyTorch's in last bits.",
        decides=Decides.PLACE,
        takes=(Takes.RUN, Takes.POLICY),
        later=True,
    )
