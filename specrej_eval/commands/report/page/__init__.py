"""`specrej-eval report --html`: the page people send around, and its plots as files. Records in, no model run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specrej_eval.commands.report.page import data as records
from specrej_eval.commands.report.page.charts import WIDE
from specrej_eval.commands.report.page.figures import chapters
from specrej_eval.commands.report.page.html import page
from specrej_eval.commands.report.page.scene import as_png, as_svg, check_png
from specrej_eval.commands.report.runs import Run
from specrej_eval.records.jsonl import check_writable, replace_bytes, write_atomically


def write(
    runs: Sequence[Run],
    baseline: Run,
    *,
    html: Path | None,
    plots: Path | None,
    formats: Sequence[str],
    megabytes: float,
) -> list[Path]:
    """Everything is made before the first file is written.

    Args:
        baseline: the run that others are held against; one of ``runs``.
        html: the page's file; None = no page.
        plots: the folder of the plots; None = no plots.
        formats: of the plots: ``svg``, ``png``.
        megabytes: most of the rows' data in the page.

    Returns:
        What was written.

    Raises:
        ConfigError: as ``data.read``; a file cannot be written.
        MissingDependencyError: PNG files are wanted, and there is no matplotlib.
    """
    if plots is not None and "png" in formats:
        check_png()
    if html is not None:
        check_writable(str(html), argument="html")
    found = records.read(runs)
    parts = chapters(found)
    method = next(method for method in found.methods if method.run is baseline)
    text = None if html is None else page(found, parts, baseline=method, megabytes=megabytes)
    files: dict[Path, bytes] = {}
    if plots is not None:
        for figure in (figure for part in parts for figure in part.figures):
            scene = figure.draw(WIDE)
            for ending in formats:
                drawn = as_png(scene) if ending == "png" else (as_svg(scene, alone=True) + "\n").encode()
                files[plots / f"{figure.name}.{ending}"] = drawn
    for path, content in files.items():
        replace_bytes(path, content)
    if html is not None and text is not None:
        write_atomically(html, text)
    return [*files, *([] if html is None else [html])]
