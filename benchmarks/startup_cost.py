"""What our startup hook costs every Python process of the environment it is installed in.

    python benchmarks/startup_cost.py [--runs 40]

Prints the median of `python -c pass` with the hook, with the hook off, and without any startup file (`-S`, which also
leaves out everybody else's), then what `-X importtime` says about our module. Timings are printed, never asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time


def milliseconds(command: list[str], env: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, env=env)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=40, help="processes to start for each variant; default: %(default)s"
    )
    runs = parser.parse_args().runs

    on = {key: value for key, value in os.environ.items() if key != "SPECREJ_EVAL_AUTOLOAD"}
    variants = {
        "with the hook": ([sys.executable, "-c", "pass"], on),
        "SPECREJ_EVAL_AUTOLOAD=0": ([sys.executable, "-c", "pass"], on | {"SPECREJ_EVAL_AUTOLOAD": "0"}),
        "python -S": ([sys.executable, "-S", "-c", "pass"], on),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):  # interleaved, so that a busy moment of the machine meets all variants
        for name, (command, env) in variants.items():
            times[name].append(milliseconds(command, env))
    for name, values in times.items():
        quarter = statistics.quantiles(values, n=4)
        print(
            f"{name:<24} median {statistics.median(values):6.2f} ms   quartiles {quarter[0]:.2f} to {quarter[2]:.2f} ms"
        )

    command = [sys.executable, "-X", "importtime", "-c", "pass"]
    log = subprocess.run(command, check=True, env=on, capture_output=True, text=True).stderr
    ours = [line for line in log.splitlines() if line.endswith("_specrej_eval_autoload")]
    print(ours[0] if ours else "the hook is not installed in this environment")


if __name__ == "__main__":
    main()
