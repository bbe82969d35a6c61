"""`specrej-eval memory`: the formulas against models that are there, and the docs' table against the formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import ROOT
from support.tiny_models import save, tiny_causal_lm, tiny_reward_model, tiny_tokenizer

from specrej_eval.cli import main
from specrej_eval.commands.memory import GB, KNOWN, Sizes, fit
from specrej_eval.errors import CheckpointError

DOCS = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
SETTINGS = [
    *(("llama-8b", gpu_gb, 1) for gpu_gb in (80, 141)),
    *(("llama-70b", gpu_gb, gpus) for gpu_gb, gpus in ((80, 4), (141, 2), (141, 4))),
]


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_kv_bytes_are_those_of_real_models(arch: str, tied: bool) -> None:
    model = tiny_causal_lm(arch, tie_word_embeddings=tied, head_dim=8)
    found = Sizes.of("tiny", model.config.to_dict(), bits=32, kv_bits=32)
    extra = sum(p.numel() for name, p in model.named_parameters() if "q_norm" in name or "k_norm" in name)
    assert found.parameters == sum(p.numel() for p in model.parameters()) - extra
    cache = model(model.dummy_inputs["input_ids"][:1], use_cache=True).past_key_values
    tokens = model.dummy_inputs["input_ids"].shape[1]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.kv_bytes_per_token * tokens == held


def test_a_reward_model_has_a_score_in_the_place_of_logits() -> None:
    model = tiny_reward_model()
    found = Sizes.of("tiny", model.config.to_dict(), bits=32, head=False)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_the_known_shapes_are_those_of_llama() -> None:
    assert Sizes.of("8b", KNOWN["llama-8b"]).parameters == 8_030_261_248
    assert Sizes.of("70b", KNOWN["llama-70b"]).parameters == 70_553_706_496
    assert Sizes.of("8b", KNOWN["llama-8b"]).kv_bytes_per_token == 131_072
    assert Sizes.of("70b", KNOWN["llama-70b"]).kv_bytes_per_token == 327_680


def row(name: str, gpu_gb: int, gpus: int) -> str:
    """A line of the docs' table."""
    policy, reward = Sizes.of(name, KNOWN[name]), Sizes.of("llama-8b", KNOWN["llama-8b"], head=False)
    found = fit(policy, reward, gpu_gb * GB * gpus)
    cells = [
        f"{name.removeprefix('llama-').upper()}",
        f"{gpus} x {gpu_gb} GB",
        f"{found.weight_bytes / GB:.1f} GB",
        f"{policy.kv_bytes_per_token:,}",
        f"{found.tokens:,}",
        *(f"{found.rows(1024, look):,}" for look in (256, 1024, 2048)),
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_table_in_the_docs_is_what_the_formulas_give(setting: tuple[str, int, int]) -> None:
    assert row(*setting) in DOCS


def test_the_command_prints_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["memory", "--pretrained", "llama-8b", "--reward_model", "llama-8b", "--gpu_gb", "80", "--format", "json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"| {told['kv_tokens']:,} |" in row("llama-8b", 80, 1)
    assert told["rows_at"]["2048"] == fit(
        Sizes.of("8b", KNOWN["llama-8b"]), Sizes.of("8b", KNOWN["llama-8b"], head=False), 80 * GB
    ).rows(1024, 2048)
    assert main(["memory", "--pretrained", "llama-8b"]) == 0
    assert "131,072 bytes" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--pretrained", "llama-70b", "--gpu_gb", "141"]) == 1
    assert "more GPUs or fewer bits" in capsys.readouterr().out


def test_other_kinds_of_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="num_local_experts"):
        Sizes.of("moe", {**KNOWN["llama-8b"], "num_local_experts": 8})
    with pytest.raises(CheckpointError, match="does not say 'num_hidden_layers'"):
        Sizes.of("x", {"hidden_size": 8})
    assert main(["memory", "--pretrained", "llama-8b", "--gpus", "0"]) == 1
    assert "gpus must be at least 1" in capsys.readouterr().err
    folder = save(tiny_causal_lm(), tiny_tokenizer(), tmp_path)
    assert main(["memory", "--pretrained", str(folder), "--gpu_gb", "1"]) == 0
