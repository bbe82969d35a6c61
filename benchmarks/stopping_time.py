"""How long our commands take to end after Ctrl-C and SIGTERM, with what they have finished saved.

    python benchmarks/stopping_time.py [--runs 5] [--commands run score] [--output stopping.json]

Each command is started on the demo pair in an empty folder, and sent the signal once it has kept a few answers. Prints
the median and the longest of the seconds until the process was gone, the median of the processor's seconds within them,
and the machine's load: on a machine that does other work, only the processor's seconds say much. Timings are printed,
never asserted; the promise is 5 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from demo_pair.arithmetic import distinct_problems, question

from specrej_eval.checkpoint import DEMO_REWARD

ROOT = Path(__file__).parent.parent
QUESTIONS = [question(operands) for operands in distinct_problems("test", 200, seed=3)]


def run(folder: Path) -> tuple[list[str], Path, int]:
    """Words of the command, the file it keeps answers in, and the lines after which it is stopped."""
    (folder / "prompts.json").write_text(json.dumps(QUESTIONS))
    words = ["--prompts", "prompts.json", "--output", "out", "--n", "16", "--until", "\n", "--batch_size", "1"]
    return ["-m", "specrej_eval", "run", *words], folder / "out" / "specrej_outputs.jsonl", 3


def lm_eval(folder: Path) -> tuple[list[str], Path, int]:
    tasks = ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", "200"]
    arguments = "n=16,batch_size=1,journal=run.jsonl"
    return ["-m", "lm_eval", "--model", "specrej", "--model_args", arguments, *tasks], folder / "run.jsonl", 4


def alpaca_eval(folder: Path) -> tuple[list[str], Path, int]:
    rows = [
        {"dataset": "sums", "instruction": text, "output": "I do not know.", "generator": "none"} for text in QUESTIONS
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    entry = {
        "prompt_template": "{instruction}",
        "fn_completions": "specrej_completions",
        "completions_kwargs": {"n": 16, "batch_size": 1, "until": ["\n"]},
    }
    (folder / "spr.yaml").write_text(json.dumps({"spr": entry}))  # JSON is YAML
    words = ["--evaluation_dataset", "data.json", "--annotators_config", "specrej_reward_judge", "--output_path", "out"]
    words = ["-m", "alpaca_eval.main", "evaluate_from_model", str(folder / "spr.yaml"), *words]
    return words, folder / "out" / "specrej_outputs.jsonl", 3


def score(folder: Path) -> tuple[list[str], Path, int]:
    rows = [{"prompt": text, "response": f" {number}"} for text in QUESTIONS for number in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", "pairs.jsonl", "--output", "scored.jsonl", "--reward_model", str(DEMO_REWARD)]
    return ["-m", "specrej_eval", "score", *words], folder / "scored.jsonl", 128


COMMANDS = {function.__name__: function for function in (run, lm_eval, alpaca_eval, score)}


def seconds_to_end(command: str, signum: signal.Signals) -> tuple[float, float, int]:
    """Seconds from the signal until the process is gone, those of them that it had a core, and its exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words, kept, enough = COMMANDS[command](folder)
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'autoload'}", "XDG_CACHE_HOME": name}
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=errors
            )
        while not kept.is_file() or kept.read_bytes().count(b"\n") < enough:
            if process.poll() is not None:
                sys.exit(f"{command} ended before it was stopped:\n{(folder / 'errors').read_text()[-2000:]}")
            time.sleep(0.005)
        before = psutil.Process(process.pid).cpu_times()
        began = time.perf_counter()
        process.send_signal(signum)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        used = usage.ru_utime + usage.ru_stime - before.user - before.system
        return time.perf_counter() - began, used, process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each command with each signal; default: %(default)s")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--output", type=Path, help="write all seconds to this JSON file too")
    options = parser.parse_args()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored: do not pass that on
    found: dict[str, dict[str, list[float]]] = {}
    for command in options.commands:
        for signum in (signal.SIGINT, signal.SIGTERM):
            seconds, cpu = [], []
            for _ in range(options.runs):
                took, used, code = seconds_to_end(command, signum)
                if code != 128 + signum:
                    sys.exit(f"{command} ended with {code} after {signum.name}, not with {128 + signum}")
                seconds.append(took)
                cpu.append(used)
            found[f"{command} {signum.name}"] = {"seconds": seconds, "cpu_seconds": cpu}
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            print(
                f"{command:<12} {signum.name:<8} median {statistics.median(seconds):5.2f} s   "
                f"longest {max(seconds):5.2f} s   "
                f"of the processor {statistics.median(cpu):5.2f} s   load {load:.1f} per core",
                flush=True,
            )
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
