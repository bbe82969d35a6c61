"""The commands and the Python of README and docs are run, in the order in which they stand, on the embedded pair.

A fence of commands that cannot run here says so in a comment above it, ``<!-- not run: reason -->``; one that needs a
file names it, ``<!-- with prompts.csv -->``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import FULL, ROOT
from support.lm_eval_package import first_on_path

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("specrej_eval/*/README.md")]
)
FENCE = re.compile(
    r"(?:<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>console|python|bash|sh)\n(?P<code>.*?)^```$", re.M | re.S
)
OURS = ("specrej-eval ", "lm_eval ", "lm-eval ", "alpaca_eval ", "python ", "pytest ", "make ")
SUMS = ["Q: 12 + 45 + 33 + 10 + 20 + 30 + 40 + 50 = ?", "Q: 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18 = ?"]
FROM_FILE = re.search(r"^```yaml\n(.*?)^```$", (ROOT / "docs/arguments.md").read_text(encoding="utf-8"), re.M | re.S)
assert FROM_FILE is not None, "docs/arguments.md shows a run in a file"
FILES = {
    "run.yaml": re.sub(r"^limit: \d+", "limit: 2", FROM_FILE[1], flags=re.M),
    "prompts.csv": "instruction\n" + "".join(f"{text}\n" for text in SUMS),
    "mine.json": json.dumps([{"instruction": text, "output": "240", "generator": "reference"} for text in SUMS]),
}


class Fence(NamedTuple):
    language: str
    note: str
    code: str


def fences(page: Path) -> list[Fence]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Fence(match["language"], match["note"] or "", match["code"]) for match in found]


def runs(fence: Fence) -> bool:
    return not fence.note.startswith("not run: ")


ALWAYS = ROOT / "README.md"
WITH_CODE = [page for page in PAGES if any(runs(fence) for fence in fences(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_fence_that_is_not_run_says_why(page: Path) -> None:
    for fence in fences(page):
        if fence.note.startswith("not run"):
            assert re.fullmatch(r"not run: \S.*", fence.note), fence.note
        elif fence.note.startswith("with "):
            assert fence.note.removeprefix("with ") in FILES, fence.note


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path
        assert file.exists(), f"{page.name} links to {path}, which is not there"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}, but {path} has no such heading"


def test_the_readme_fits_a_visitors_patience() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def short(code: str) -> str:
    """The same commands on a few problems."""
    code = re.sub(r"--limit \d+", "", code)
    return re.sub(
        r"^((?:lm_eval|specrej-eval compare) .*--tasks specrej_arithmetic)", r"\1 --limit 2", code, flags=re.M
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page == ALWAYS else [pytest.mark.full])
        for page in WITH_CODE
        if FULL or page == ALWAYS
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_run(
    page: Path, tmp_path: Path, few_tasks: Path, counted: Callable[[str, int], None]
) -> None:
    for name in ("tasks", "model_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= first_on_path(few_tasks)
    number = 0
    for fence in filter(runs, fences(page)):
        if fence.language == "python":
            words = [sys.executable, "-c", fence.code]
            number += 1
        else:
            code = short(fence.code)
            lines = re.sub(r"\\\n", " ", code).splitlines()
            lines = [line for line in lines if line.strip() and not line.startswith("make ")]
            assert all(line.startswith(OURS) for line in lines), (
                f"a fence of commands holds something else: {fence.code}"
            )
            words = ["bash", "-ec", "\n".join(lines)]
            number += len(lines)
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{fence.code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    counted("commands of README and docs run", number)


def test_the_pages_speeds_are_those_of_the_committed_results() -> None:
    page = " ".join((ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").split())
    peers = ("generate", "vllm", "vllm_small_blocks", "before")
    decoding = {
        "311 x 64": ("decode_throughput", "311x64"),
        "900 x 24": ("decode_throughput_900x24", "900x24"),
        "1,900 x 64": ("decode_throughput_1900x64", "1900x64"),
        "40 x 200": ("decode_throughput_40x200", "40x200"),
        "311 x 64, float32": ("decode_throughput_float32", "311x64"),
        "311 x 64, shape of Qwen3-0.6B, 32 tokens a row": ("decode_throughput_qwen3", "311x64"),
    }
    for name, (file, shape) in decoding.items():
        measured = results(file)["shapes"][shape]["peers"]
        ratios = [f"{measured[peer]['ours_over_this']['median']:.2f}" if peer in measured else "" for peer in peers]
        assert f"| {name} | {' | '.join(ratios)} |".replace("|  |", "| |").replace("|  |", "| |") in page, (
            name,
            ratios,
        )
    many = {
        peer: told["ours_over_this"]["median"]
        for peer, told in results("many_prompts")["peers"].items()
        if peer != "ours"
    }
    assert f"is {many['vllm']:.2f} times as fast as vLLM" in page
    assert f"{many['generate']:.1f} times as fast as `generate`" in page
    assert f"takes {results('specrej_vs_reference')['ours_over_reference']['median']:.1f} times as long" in page


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return found
