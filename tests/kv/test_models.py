"""What is read off a transformers model, and mended where a version of transformers gets it wrong."""

from __future__ import annotations

from importlib import metadata

import pytest
from support.engine_models import build

from specrej_eval.kv.models import with_softcap


@pytest.mark.parametrize(
    ("name", "version", "attention", "expected"),
    [
        ("gemma2", "5.17.0", "sdpa", "eager"),
        ("gemma2", "5.20.1", "sdpa", "eager"),
        ("gemma2", "5.21.0", "sdpa", "sdpa"),
        ("gemma2", "5.17.0", "eager", "eager"),
        ("llama", "5.17.0", "sdpa", "sdpa"),
    ],
)
def test_a_softcap_that_old_sdpa_attention_leaves_out_is_heeded(
    name: str, version: str, attention: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, attention=attention)
    monkeypatch.setattr(metadata, "version", lambda package: version)
    assert with_softcap(model).config._attn_implementation == expected
