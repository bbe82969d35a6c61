"""Arguments about where and how models compute."""

from __future__ import annotations

from dataclasses import dataclass

from specrej_eval import registry
from specrej_eval.config.argument import Decides, Takes, argument, as_is, choice, text

AUTO_BACKEND = "auto"
SDPA = "sdpa"
"""PyTorch's own attention, on every device."""


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
        "Kernels of our engine's attention on a GPU: ``sdpa``, ``flash_attn``, ``flashinfer``, ``triton``; ``auto`` = "
        "one that ``doctor --attention`` found right on this GPU, else ``sdpa``.",
        decides=Decides.MODELS,
        takes=(Takes.RUN, Takes.POLICY),
    )
