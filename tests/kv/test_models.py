"""What is read off a transformers model, and mended where a version of transformers gets it wrong."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
from transformers import AutoConfig

from specrej_eval.kv.models import with_softcap


class Model:
    """As far as its attention goes."""

    def __init__(self, kind: str, attention: str) -> None:
        self.config: Any = AutoConfig.for_model(kind)
        self.set_attn_implementation(attention)

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


@pytest.mark.parametrize(
    ("kind", "version", "attention", "expected"),
    [
        ("gemma2", "5.17.0", "sdpa", "eager"),
        ("gemma2", "5.20.1", "sdpa", "eager"),
        ("gemma2", "5.21.0", "sdpa", "sdpa"),
        ("gemma2", "5.17.0", "eager", "eager"),
        ("llama", "5.17.0", "sdpa", "sdpa"),
    ],
)
def test_a_softcap_that_old_sdpa_attention_leaves_out_is_heeded(
    kind: str, version: str, attention: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(kind, attention)
    monkeypatch.setattr(metadata, "version", lambda package: version)
    assert with_softcap(model).config._attn_implementation == expected
