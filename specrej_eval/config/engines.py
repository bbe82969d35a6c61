"""Arguments about where and how models compute."""

from __future__ import annotations

from dataclasses import dataclass

from specrej_eval.config.argument import Decides, Takes, argument, as_is, text


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
