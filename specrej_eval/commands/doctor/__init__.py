"""`specrej-eval doctor`: looks at the installation it runs in, and says what is wrong and what to do about it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import shutil
import site
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from specrej_eval.commands.doctor.findings import Finding, Status, show
from specrej_eval.config.engines import SDPA
from specrej_eval.wording import counted

SUMMARY = "check the installation (versions, startup hook, devices, demo weights), a model, or attention on your GPU"
EXAMPLES = (
    "specrej-eval doctor",
    "specrej-eval doctor --reward Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    "specrej-eval doctor --pretrained Qwen/Qwen3-1.7B --dtype bfloat16",
    "specrej-eval doctor --attention",
)


def check_versions() -> Iterator[Finding]:
    """Python and every package we declare, against the range we declare for it."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        ours = importlib.metadata.distribution("specrej-eval")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("broken", "specrej-eval", "runs from a checkout that is not installed; pip install -e .")
        return
    yield Finding("ok", "specrej-eval", f"{ours.version} at {Path(__file__).resolve().parents[2]}")

    python = ".".join(map(str, sys.version_info[:3]))
    wanted = ours.metadata["Requires-Python"] or ""
    if python in SpecifierSet(wanted):
        yield Finding("ok", "python", f"{python} at {sys.executable}")
    else:
        yield Finding("broken", "python", f"{python}; supported is {wanted}")

    for requirement in map(Requirement, ours.requires or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("broken", requirement.name, f'not installed; pip install "{requirement}"')
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding("ok", requirement.name, version)
        else:
            remedy = f'pip install "{requirement.name}{requirement.specifier}"'
            yield Finding("broken", requirement.name, f"{version} is outside {requirement.specifier}; {remedy}")


def check_startup_hook() -> Iterator[Finding]:
    """Where the .pth file is, whether it ran, and whether lm-eval now knows our models. Activates nothing itself."""
    fallback = "`specrej-eval lm-eval ...` works without it"
    switch = os.environ.get("SPECREJ_EVAL_AUTOLOAD")
    autoload = sys.modules.get("_specrej_eval_autoload")
    off = bool(autoload and not autoload.enabled())
    if switch is not None:
        yield Finding("note", "SPECREJ_EVAL_AUTOLOAD", f"{switch!r}: the hook is {'off' if off else 'on'}")

    files = startup_files()
    for file in files:
        yield Finding("ok", "startup file", str(file))
    if not files:
        yield Finding("note", "startup file", f"specrej_eval.pth is in no site directory; {fallback}")
    if len(files) > 1:
        yield Finding("note", "startup file", "more than one: harmless, but one of the installs is probably left over")

    if autoload is not None and autoload.installed():
        yield Finding("ok", "import hook", f"watches {', '.join(autoload.HOOKS)}")
    else:
        yield Finding("note", "import hook", f"not installed in this interpreter; {fallback}")

    script = shutil.which("lm_eval")
    if script and Path(script).parent != Path(sys.executable).parent:
        detail = f"{script} belongs to another environment than this {sys.executable}, and may not know us"
        yield Finding("note", "lm_eval command", f"{detail}; {fallback}")

    try:
        importlib.import_module("lm_eval.models")
        registry = importlib.import_module("lm_eval.api.registry")
    except Exception as error:
        yield Finding("broken", "lm_eval --model", f"lm-eval cannot be imported: {error!r}")
        return
    from specrej_eval.harness.lm_eval import LM_EVAL_MODELS

    known = [name for name in LM_EVAL_MODELS if name in registry.model_registry]
    if hasattr(registry, "load_plugins"):
        yield Finding("ok", "lm_eval --model", "this lm-eval finds us by entry point; the startup hook does nothing")
    elif len(known) == len(LM_EVAL_MODELS):
        yield Finding("ok", "lm_eval --model", ", ".join(known))
    elif files and not off:
        yield Finding("broken", "lm_eval --model", f"specrej is not registered although the hook is there; {fallback}")
    else:
        yield Finding("note", "lm_eval --model", f"plain lm_eval does not know specrej; {fallback}")

    for target in dict.fromkeys(LM_EVAL_MODELS.values()):
        module, _, name = target.partition(":")
        try:
            getattr(importlib.import_module(module), name)
            yield Finding("ok", name, f"imports from {module}")
        except Exception as error:
            yield Finding("broken", name, f"{module} cannot be imported: {error!r}")


def check_alpaca_eval() -> Iterator[Finding]:
    """Whether alpaca_eval is imported with our repairs and knows our decoders. Activates nothing itself."""
    fallback = "`specrej-eval alpaca-eval ...` works without it"
    autoload = sys.modules.get("_specrej_eval_autoload")
    watched = autoload is not None and autoload.installed()
    try:
        importlib.import_module("alpaca_eval.main")
        decoders = importlib.import_module("alpaca_eval.decoders")
    except Exception as error:
        if watched:
            yield Finding("broken", "alpaca_eval", f"cannot be imported: {error!r}")
        else:  # without the hook this is what alpaca_eval 0.6.6 does beside setuptools 82
            yield Finding("note", "alpaca_eval", f"cannot be imported without the startup hook ({error}); {fallback}")
        return
    from specrej_eval.harness.alpaca_eval.registration import DECODERS
    from specrej_eval.harness.startup import failed_repairs

    for repair, reason in failed_repairs.items():
        yield Finding("broken", "alpaca_eval repair", f"{repair}: {reason}")
    for name in DECODERS:
        try:
            decoders.get_fn_completions(name)
        except Exception as error:
            status: Status = "broken" if watched else "note"
            yield Finding(status, "alpaca_eval", f"does not know fn_completions {name!r} ({error}); {fallback}")
            return
    if not failed_repairs:
        yield Finding("ok", "alpaca_eval", f"repaired; knows {', '.join(DECODERS)}")


def startup_files() -> list[Path]:
    """Our startup files in the directories where `site` reads such files (3.15 and later prefer .start)."""
    name = "specrej_eval.start" if sys.version_info >= (3, 15) else "specrej_eval.pth"
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    candidates = dict.fromkeys(Path(folder).resolve() / name for folder in folders)
    return [file for file in candidates if file.is_file()]


def check_devices() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    cpu = f"{os.cpu_count()} cores, {in_gib(memory.total)} memory, {in_gib(memory.available)} available"
    try:
        import torch
    except Exception as error:
        yield Finding("ok", "cpu", cpu)
        yield Finding("broken", "torch", f"cannot be imported: {error!r}")
        return
    threads = torch.get_num_threads()
    yield Finding("ok", "cpu", f"{cpu}, torch uses {counted(threads, 'thread')}")
    yield _same_bits(threads)
    if not torch.cuda.is_available():
        build = "is built for CPU only" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        yield Finding("note", "cuda", f"no device; torch {torch.__version__} {build}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        detail = f"{properties.name}, {capability}, {in_gib(total)} memory, {in_gib(free)} free"
        yield Finding("ok", f"cuda:{index}", detail)


def _same_bits(threads: int) -> Finding:
    """What results will call ``promises``; only a loaded model can tell which it is."""
    from specrej_eval.kv.probe import MOST_THREADS

    ask = "`specrej-eval doctor --pretrained M` measures it for a model, and results say which it was"
    if threads <= MOST_THREADS:
        return Finding("ok", "promises", f"bits in float32 on the CPU, else uniforms; {ask}")
    remedy = f"OMP_NUM_THREADS={MOST_THREADS} may give bits in float32 on the CPU"
    return Finding("note", "promises", f"uniforms, since torch uses {threads} threads; {remedy}; {ask}")


def check_attention() -> Iterator[Finding]:
    try:
        import torch

        from specrej_eval.kv import choose
    except Exception as error:
        yield Finding("broken", "attention", f"cannot be imported: {error!r}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in choose.all_backends():
        if reason := backend.why_not_on(device):
            yield Finding("note", backend.name, reason)
        elif choose.is_verified(backend, device) or backend.name == SDPA:
            yield Finding("ok", backend.name, f"on {choose.device_name(device)}")
        else:
            told = "never found right on this GPU with these versions; `specrej-eval doctor --attention` tries it"
            yield Finding("note", backend.name, told)


def check_files() -> Iterator[Finding]:
    from specrej_eval import paths
    from specrej_eval.demo import POLICY_DIR, REWARD_DIR
    from specrej_eval.errors import SpecRejError

    for role, folder in (("demo policy", POLICY_DIR), ("demo reward", REWARD_DIR)):
        weights = folder / "model.safetensors"
        if weights.is_file() and (folder / "config.json").is_file():
            yield Finding("ok", role, f"{folder} ({weights.stat().st_size / 1e6:.1f} MB)")
        else:
            yield Finding("broken", role, f"no weights in {folder}; reinstall specrej-eval")
    for name in paths.FOLDERS:
        try:
            yield Finding("ok", name, str(paths.folder(name)))
        except SpecRejError as error:
            yield Finding("broken", name, str(error))


def in_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


# The hook is looked at first: later checks import packages, which must not change what it finds.
SECTIONS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("Startup hook", check_startup_hook),
    ("alpaca_eval", check_alpaca_eval),
    ("Versions", check_versions),
    ("Devices", check_devices),
    ("Attention backends", check_attention),
    ("Files", check_files),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (parser.description or "") + " The exit code is 1 if something needed is broken."
    from specrej_eval.commands.doctor import attention as attention_doctor
    from specrej_eval.commands.doctor import policy as policy_doctor
    from specrej_eval.options import add_reward_options

    add_reward_options(parser, reward_model="--reward")
    policy_doctor.add_arguments(parser)
    attention_doctor.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from specrej_eval.commands.doctor import attention as attention_doctor
    from specrej_eval.commands.doctor import policy as policy_doctor
    from specrej_eval.commands.doctor import reward as reward_doctor

    asked: dict[str, Callable[[argparse.Namespace], int]] = {
        "attention": attention_doctor.run,
        "pretrained": policy_doctor.run,
        "reward_model": reward_doctor.run,
    }
    if codes := [look(args) for name, look in asked.items() if name in args]:
        return max(codes)
    return show(((title, check()) for title, check in SECTIONS), well="Everything needed works.")
