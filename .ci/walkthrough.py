"""Runs the commands of docs/walkthrough.md and holds what they print against what stands there (`make docs-check`).

    python .ci/walkthrough.py            compare; exit code 1 where something differs
    python .ci/walkthrough.py --write    rewrite the outputs

Each ```console fence is run, in order, in one new folder; the ```text fence right below it is what they print on
stdout. What varies from run to run (seconds, speeds, memory, the machine's name, process ids) is masked on both sides
before they are compared, and column widths do not count.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "walkthrough.md"
STEP = re.compile(
    r"(?P<note><!-- not run[^\n]*-->\n)?^```console\n(?P<commands>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.M | re.S,
)
VARIES = (
    (re.compile(r"\babout \d[\d.,]* (s|min|h)\b"), "about # s"),
    (re.compile(r"\b\d[\d.,]* [GM]iB\b"), "# GiB"),
    (re.compile(r"\b\d[\d.,]* tokens/s\b"), "# tokens/s"),
    (re.compile(r"device_name=[^,\n]*, cpu_threads=\d+"), "device_name=#, cpu_threads=#"),
    (re.compile(r"process \d+ on \S+"), "process # on #"),
    (re.compile(r"last heard of \d+ (s|min|h) ago"), "last heard of # s ago"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.-]+"), "#"),
    # seconds, their share and the peak of memory in a comparison's rows, and the paper's ratios of seconds
    (re.compile(r"(\s(?:\d+%|-)\s+)[\d.,e+]+(\s+)(?:\d+%|-)(\s+[\d,]+\s+)\d+\.\d\d$", re.M), r"\1#\2#\3#"),
    (re.compile(r"(\]\s+)\d+\.\d\d \[[\d., ]+\](\s+)\d+\.\d\d \[[\d., ]+\]$", re.M), r"\1#\2#"),
    # seconds and the share of scoring in a report's rows
    (re.compile(r"(\d%\s+\|?\s*)\d[\d,]*\.\d(\s+\|?\s*)\d+%"), r"\1#\2#"),
    (re.compile(r"-{2,}:?"), "--"),
    (re.compile(r"[ \t]+"), " "),
)


def masked(text: str) -> list[str]:
    """Lines without what may differ."""
    for pattern, put in VARIES:
        text = pattern.sub(put, text)
    return [line.strip() for line in text.strip().splitlines()]


def outputs(page: str) -> list[str | None]:
    """What each step prints now; None where it is not run."""
    found: list[str | None] = []
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
    with tempfile.TemporaryDirectory(prefix="specrej-walkthrough-") as folder:
        for step in STEP.finditer(page):
            if step["note"]:
                found.append(None)
                continue
            print(step["commands"].strip(), file=sys.stderr, flush=True)
            done = subprocess.run(
                ["bash", "-ec", step["commands"]],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            found.append(done.stdout)
    return found


def rewritten(page: str, printed: list[str | None]) -> str:
    """The page with these outputs."""
    left = iter(printed)

    def with_output(step: re.Match[str]) -> str:
        output = next(left)
        if output is None:
            return step[0]
        shown = "\n".join(line.rstrip() for line in output.strip().splitlines())
        return f"```console\n{step['commands']}```\n" + (f"\n```text\n{shown}\n```\n" if shown else "")

    return STEP.sub(with_output, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the outputs in the page")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    now = rewritten(page, outputs(page))
    if args.write:
        PAGE.write_text(now, encoding="utf-8")
        return 0
    before, after = masked(page), masked(now)
    if before == after:
        print(f"{PAGE.name}: every output is today's")
        return 0
    print("\n".join(difflib.unified_diff(before, after, "as it stands", "as it is printed", lineterm="")))
    print(f"\n`python .ci/walkthrough.py --write` rewrites {PAGE.name}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
