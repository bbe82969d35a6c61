"""Makes docs/pictures: runs of the demo pair, the page of their report, and what a reader sees of it.

`make docs-pictures`. The runs take about a minute on two cores and stay in results/pictures, so that a second call only
draws. Needs the extras [plots] and [browser], and a Chromium.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "pictures"
PICTURES = ROOT / "docs" / "pictures"
TASK = ["--tasks", "specrej_arithmetic", "--include_path", "tasks", "--limit", "100", "--log_samples"]
RUNS = {
    "bo4": ("best_of_n", "n=4"),
    "bo8": ("best_of_n", "n=8"),
    "bo16": ("best_of_n", "n=16,score_every=20"),
    "spr16": ("specrej", "alpha=0.5,n=16"),
    "spr32": ("specrej", "alpha=0.5,n=32"),
}
PLOTS = ("reward-against-tokens", "exact_match--answer--against-flops", "survival", "correlation")
MOST_BYTES = 200_000
"""Of one picture."""


def main() -> None:
    check_browser()
    for name, (model, arguments) in RUNS.items():
        folder = RESULTS / name
        if not list(folder.rglob("results_*.json")):
            folder.mkdir(parents=True, exist_ok=True)
            told = f"{arguments},journal={folder / 'rows.jsonl'}"
            command = ["lm_eval", "--model", model, "--model_args", told, *TASK, "--output_path", str(folder)]
            subprocess.run(command, check=True, cwd=ROOT)
    page, plots = RESULTS / "page.html", RESULTS / "plots"
    folders = [str(RESULTS / name) for name in RUNS]
    report = [sys.executable, "-m", "specrej_eval", "report", *folders, "--baseline", "Best-of-N, n=16"]
    subprocess.run([*report, "--html", str(page), "--plots", str(plots)], check=True, cwd=ROOT)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        shutil.copyfile(plots / f"{name}.png", PICTURES / f"{name}.png")
    photograph(page)
    for path in sorted(PICTURES.glob("*.png")):
        size = path.stat().st_size
        print(f"{path.relative_to(ROOT)}  {size:,} bytes")
        assert size < MOST_BYTES, f"{path.name} is too large for a repository"


def check_browser() -> None:
    """Before anything is run: playwright, and a Chromium of the system's or playwright's own."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise SystemExit("The pictures need playwright: pip install -e '.[plots,browser]'.") from None
    try:
        with sync_playwright() as playwright:
            playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"]).close()
    except Error as error:
        raise SystemExit(
            "The pictures need a Chromium, and none starts: install the system's, name it in CHROMIUM=, or run "
            f"`playwright install chromium`.\n{str(error).splitlines()[0]}"
        ) from None


def chromium() -> str | None:
    """The system's; None = playwright's own."""
    named = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, named)), None)


def photograph(page: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.set_default_timeout(300_000)
            tab.goto(page.as_uri())
            tab.select_option("#order", "gap")
            for side in range(2):
                tab.locator(".side").nth(side).locator("tr.row").nth(1).click()
            save(tab, f"page-{width}-{scheme}", 0, 1400)
            top = tab.evaluate("document.querySelector('#viewer').getBoundingClientRect().top + scrollY")
            save(tab, f"viewer-{width}-{scheme}", top, 1250)
        browser.close()


def save(tab: Any, name: str, top: float, height: int) -> None:
    clip = {"x": 0, "y": top, "width": tab.viewport_size["width"], "height": height}
    path = PICTURES / f"{name}.png"
    tab.screenshot(path=str(path), full_page=True, clip=clip)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)  # few colours: half the bytes
    few.save(path, optimize=True)


if __name__ == "__main__":
    main()
