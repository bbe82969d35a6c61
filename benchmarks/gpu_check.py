"""What `make gpu-check` runs: everything of ours that only a GPU can tell, into one file that you can send us.

    python benchmarks/gpu_check.py        # writes gpu-check.json and gpu-check.log

`specrej-eval doctor --attention`, the tests that need a GPU, and the benchmarks. A step that fails does not stop the
others. Without a GPU it says so, and does what can be done without one. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specrej_eval import __version__
from specrej_eval.commands.doctor.attention import examine

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
PACKAGES = ("torch", "transformers", "triton", "flash-attn", "flashinfer-python", "lm-eval", "accelerate")


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    minutes: int


def steps() -> list[Step]:
    """In order of what we want to know most, should somebody run out of patience."""
    found = [
        Step("tests", (sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests/kv", "tests/engines"), 30)
    ]
    recorded = ("--steps", "256", "--compile")  # so many that recording graphs shows, but is not all there is
    benchmarks: dict[str, tuple[str, ...]] = {
        "attention_backends": ("attention_backends.py",),
        "roofline": ("roofline.py", *recorded, "on"),
        "roofline_without_graphs": ("roofline.py", *recorded, "off"),
        "decode_throughput": ("decode_throughput.py",),
        **({"two_gpus": ("two_gpus.py",)} if torch.cuda.device_count() > 1 else {}),
        "growth": ("growth.py",),
    }
    for name, (script, *options) in benchmarks.items():
        if (HERE / script).is_file():
            found.append(Step(name, (sys.executable, str(HERE / script), *options), 30))
    return found


def about() -> dict[str, Any]:
    """Machine and versions."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = []
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        gpus.append({"name": told.name, "capability": [told.major, told.minor], "gib": told.total_memory / 2**30})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "specrej_eval": __version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "driver": _driver(),
        "packages": versions,
    }


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def takes(command: tuple[str, ...], option: str) -> bool:
    return option in subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT).stdout


def run(step: Step, log: Any, device: str) -> dict[str, Any]:
    """Its exit code, seconds, what it measured, and the end of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / f"{step.name}.json"
        command = list(step.command)
        if "pytest" not in command:
            for option, value in (("--device", device), ("--output", str(output))):
                command += [option, value] if takes(step.command, option) else []
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=60 * step.minutes)
            code: int | str = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            code = f"stopped after {step.minutes} minutes"
        log.write(f"$ {' '.join(command)}\n{said}\nexit code: {code}\n\n")
        log.flush()
        try:
            measured = json.loads(output.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            measured = None
    return {
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "measured": measured,
        "end_of_output": said.splitlines()[-30:],
    }


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="default: %(default)s")
    options = made.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"about": about(), "device": device, "attention": [], "steps": {}}

    def keep() -> None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    keep()
    if device == "cpu":
        print("There is no GPU that torch can use here: benchmarks are left out, tests that need one skip themselves.")
    with options.output.with_suffix(".log").open("w", encoding="utf-8") as log:
        print("attention backends ...", flush=True)
        for report in examine(torch.device(device)):
            told = report.to_dict()
            found["attention"].append(told)
            keep()
            line = f"  {report.backend}: {report.why_not or ('right' if report.right else 'WRONG')}"
            print(line, flush=True)
            log.write(f"{line}\n{json.dumps(told)}\n\n")
        for step in steps():
            if device == "cpu" and step.name != "tests":
                found["steps"][step.name] = {"left_out": "there is no GPU"}
                continue
            print(f"{step.name} (at most {step.minutes} minutes) ...", flush=True)
            found["steps"][step.name] = run(step, log, device)
            keep()
            print(f"  exit code {found['steps'][step.name]['exit_code']}", flush=True)
    keep()
    failed = [name for name, step in found["steps"].items() if step.get("exit_code", 0) not in (0, 5)]
    wrong = [told["backend"] for told in found["attention"] if told["why_not"] is None and not told["right"]]
    print(f"\nWrote {options.output} and {options.output.with_suffix('.log')}; please send us both.")
    print(f"Failed: {', '.join([*wrong, *failed]) or 'nothing'}.")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
