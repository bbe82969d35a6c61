"""model_configs/: every file is one that our decoders take, and says what the table it is made from says."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

from specrej_eval.config import RunConfig, checked_until
from specrej_eval.errors import ConfigError
from specrej_eval.harness.alpaca_eval.config import STRATEGIES, arguments_of

FOLDER = ROOT / "model_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
DEMO = {"spr.yaml": "DEMO-specrej", "bon.yaml": "DEMO-best-of-n"}
# a float that YAML 1.1 reads as text: an exponent without a dot and a sign
FLOAT_TRAP = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

spec = importlib.util.spec_from_file_location("table_of_model_configs", ROOT / ".ci" / "model_configs.py")
assert spec is not None and spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def content(path: Path) -> tuple[str, dict[str, Any]]:
    """Generator and entry of a file."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict) and len(loaded) == 1, f"{path.name} must have one top-level key"
    ((generator, entry),) = loaded.items()
    return generator, entry


def configured(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """A file's arguments, checked as the decoder checks them; nothing is loaded."""
    _, entry = content(path)
    return arguments_of(entry["fn_completions"], entry["completions_kwargs"])[:2]


def test_files_and_readme_are_those_of_the_table() -> None:
    files = made.files()
    assert {path.name for path in FILES} == {*files, *DEMO}
    for name, text in files.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"{name}: run `python .ci/model_configs.py`"
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert made.with_table(readme) == readme, "README.md: run `python .ci/model_configs.py`"
    assert all(f"`{path.name}`" in readme for path in FILES)


def test_the_table_holds_all_pairs_of_the_paper() -> None:
    paper = [configured(path)[0] for path in FILES if path.name.startswith(("spr-", "bon-"))]
    by_strategy = Counter((config.pretrained, config.reward_model, config.strategy) for config in paper)
    models = ("mistralai/Mistral-7B-v0.3", "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct")
    rewards = ("weqweasdas/RM-Mistral-7B", "sfairXC/FsfairX-LLaMA3-RM-v0.1", "RLHFlow/ArmoRM-Llama3-8B-v0.1")
    for model in models:
        for reward in rewards:
            for strategy in STRATEGIES.values():
                assert by_strategy[model, reward, strategy] == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_what_alpaca_eval_and_our_decoders_need(path: Path) -> None:
    generator, entry = content(path)
    assert set(entry) <= {"prompt_template", "fn_completions", "completions_kwargs", "pretty_name", "link"}
    assert "{instruction}" in entry["prompt_template"]
    assert entry["pretty_name"]
    config, host = configured(path)
    assert config.strategy == ("speculative_rejection" if path.name.startswith("spr") else "best_of_n")
    assert set(host) <= {"enable_thinking"}
    checked_until(entry["completions_kwargs"].get("until"))
    if path.name in DEMO:
        assert generator == DEMO[path.name]
        assert config.pretrained is None and config.reward_model is None
    else:
        assert "DEMO" not in generator
        assert config.pretrained and config.reward_model
        assert entry["link"].startswith("https://huggingface.co/")
        assert (config.dtype, config.reward_dtype) in {("bfloat16", "bfloat16"), ("float16", "float16")}
        assert config.max_gen_toks == 2048
    if config.strategy == "speculative_rejection":
        assert config.alpha == 0.5
    else:
        assert "alpha" not in entry["completions_kwargs"], "Best-of-N rejects nothing"
        # the name says how many rows there are
        assert path.name in DEMO or f"best-of-{config.n}-" in f"{generator}-"
    if not path.name.startswith(("bon-ultralm", "bon-storm")):
        assert (config.temperature, config.top_k, config.top_p) == (1.0, 50, 1.0), "the paper's sampling"


def test_generators_are_unique_and_not_on_the_leaderboard_already() -> None:
    generators = [content(path)[0] for path in FILES]
    assert len(set(generators)) == len(generators)
    origin = importlib.util.find_spec("alpaca_eval")
    assert origin is not None and origin.origin is not None
    known = {path.name for path in (Path(origin.origin).parent / "models_configs").iterdir()}
    assert len(known) > 100
    assert not known & set(generators), "alpaca_eval would skip it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_number_is_text(path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    _, entry = content(path)
    for name, value in entry["completions_kwargs"].items():
        assert not (isinstance(value, str) and FLOAT_TRAP.fullmatch(value)), f"{name}: {value}"
        if name not in ("pretrained", "reward_model", "dtype", "reward_dtype", "apply_chat_template"):
            assert value == "max" or not isinstance(value, str), f"{name}: {value!r}"


@pytest.mark.parametrize("entry", made.LEADERBOARD, ids=lambda entry: entry.generator)
def test_rerun_entries_have_alpaca_evals_own_prompt_template(entry: Any) -> None:
    origin = importlib.util.find_spec("alpaca_eval")
    assert origin is not None and origin.origin is not None
    folder = Path(origin.origin).parent / "models_configs"
    original = entry.generator.removesuffix("-rerun")
    theirs = yaml.safe_load((folder / original / "configs.yaml").read_text(encoding="utf-8"))[original]
    assert entry.template == (folder / theirs["prompt_template"]).read_text(encoding="utf-8")
    _, ours = content(FOLDER / f"{entry.stem}.yaml")
    assert ours["prompt_template"] == entry.template


def test_a_misspelt_argument_would_be_noticed(tmp_path: Path) -> None:
    text = (FOLDER / "spr.yaml").read_text(encoding="utf-8").replace("alpha:", "alhpa:")
    path = tmp_path / "spr.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="alhpa"):
        configured(path)
