"""Marks on a plane, and how they become SVG or PNG: charts are lists of marks, drawn alike in every format.

A mark names the role of its colour; what the role looks like is the page's matter (light and dark), or the file's.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from specrej_eval.errors import MissingDependencyError

Anchor = Literal["start", "middle", "end"]
Shape = Literal["circle", "diamond", "square"]

LIGHT = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1c2430",
    "soft": "#5a6675",
    "grid": "#e3e7ec",
    "best_of_n": "#0072b2",
    "rejecting": "#c2500a",
    "other": "#007a5a",
    "pale": "#9aa7b6",
    "first": "#0072b2",
    "second": "#e69f00",
    "third": "#8fa3b8",
    "fourth": "#d3dae2",
}
"""Role -> colour. Hues of Okabe & Ito (2008), told apart by colour-blind readers; each has a mark or a word as well."""
DARK = {
    "page": "#14181e",
    "panel": "#1c222b",
    "ink": "#e8ecf1",
    "soft": "#a3afbd",
    "grid": "#2e3742",
    "best_of_n": "#5cb8ee",
    "rejecting": "#ff9b57",
    "other": "#3ecf9f",
    "pale": "#66768a",
    "first": "#5cb8ee",
    "second": "#f0b53d",
    "third": "#7489a0",
    "fourth": "#475463",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True)
class Line:
    points: Sequence[tuple[float, float]]
    role: str
    width: float = 1.5
    dash: str = ""
    """As in SVG: ``4 3``."""


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    role: str
    radius: float = 5.0
    shape: Shape = "circle"
    hollow: bool = False
    faint: bool = False
    title: str = ""
    """Shown where the pointer rests."""


@dataclass(frozen=True, slots=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    role: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float
    """Of the baseline."""
    text: str
    role: str = "ink"
    anchor: Anchor = "start"
    size: float = 12.0
    bold: bool = False
    turned: bool = False
    """Reads upwards."""


Mark = Line | Dot | Box | Text


@dataclass(slots=True)
class Scene:
    """One chart. Coordinates are pixels from the upper left corner."""

    width: int
    height: int
    title: str
    description: str
    marks: list[Mark] = field(default_factory=list)

    def add(self, *marks: Mark) -> None:
        self.marks.extend(marks)


def text_width(text: str, size: float = 12.0) -> float:
    """About how wide a text is: no font is asked, so that a page is the same everywhere."""
    wide = sum(unicodedata.east_asian_width(mark) in "WF" for mark in text)
    thin = sum(mark in "iljtfr.,:;|!'()[] " for mark in text)
    return size * (0.635 * len(text) + 0.365 * wide - 0.26 * thin)


def number(value: float) -> str:
    """A coordinate: at most two digits after the point, never -0."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")


def as_svg(scene: Scene, *, alone: bool = False, extra_class: str = "") -> str:
    """The chart as an SVG element.

    Args:
        alone: for a file of its own: with its colours, and a background. Within the page, colours are the page's.
    """
    size = f'viewBox="0 0 {scene.width} {scene.height}" width="{scene.width}" height="{scene.height}"'
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    described = f"<title>{escape(scene.title)}</title><desc>{escape(scene.description)}</desc>"
    parts = [f'<svg{namespace} class="chart{extra_class}" role="img" {size}>{described}']
    if alone:
        parts.append(f"<style>{style(LIGHT, prefix='')}</style>")
        parts.append(f'<rect width="{scene.width}" height="{scene.height}" class="f-page"/>')
    parts += [_svg(mark) for mark in scene.marks]
    return "\n".join([*parts, "</svg>"])


def style(colours: dict[str, str], *, prefix: str = "svg.chart ") -> str:
    """The rules of a chart's classes."""
    rules = [f"{prefix}text{{font-family:{FONT};font-size:12px;font-variant-numeric:tabular-nums}}"]
    for role in LIGHT:
        value = colours.get(role, f"var(--{role})")
        rules.append(f"{prefix}.f-{role}{{fill:{value}}}{prefix}.s-{role}{{stroke:{value}}}")
    rules.append(f"{prefix}.open{{fill:{colours.get('page', 'var(--page)')}}}{prefix}.line{{fill:none}}")
    rules.append(f"{prefix}.faint{{fill-opacity:.45}}{prefix}.bold{{font-weight:600}}")
    return "\n".join(rules)


def _svg(mark: Mark) -> str:
    if isinstance(mark, Line):
        points = " ".join(f"{number(x)},{number(y)}" for x, y in mark.points)
        dash = f' stroke-dasharray="{escape(mark.dash)}"' if mark.dash else ""
        return f'<polyline class="line s-{mark.role}" stroke-width="{number(mark.width)}"{dash} points="{points}"/>'
    if isinstance(mark, Box):
        at = f'x="{number(mark.x)}" y="{number(mark.y)}" width="{number(mark.width)}" height="{number(mark.height)}"'
        return _titled(f'<rect class="f-{mark.role}" {at}', "rect", mark.title)
    if isinstance(mark, Dot):
        look = f"open s-{mark.role}" if mark.hollow else f"f-{mark.role}"
        look += " faint" if mark.faint else ""
        stroke = ' stroke-width="1.8"' if mark.hollow else ""
        if mark.shape == "circle":
            at = f'cx="{number(mark.x)}" cy="{number(mark.y)}" r="{number(mark.radius)}"'
            return _titled(f'<circle class="{look}"{stroke} {at}', "circle", mark.title)
        corners = " ".join(f"{number(x)},{number(y)}" for x, y in _corners(mark))
        return _titled(f'<polygon class="{look}"{stroke} points="{corners}"', "polygon", mark.title)
    turned = f' transform="rotate(-90 {number(mark.x)} {number(mark.y)})"' if mark.turned else ""
    size = "" if mark.size == 12.0 else f' font-size="{number(mark.size)}"'
    look = f"f-{mark.role}" + (" bold" if mark.bold else "")
    at = f'x="{number(mark.x)}" y="{number(mark.y)}" text-anchor="{mark.anchor}"'
    return f'<text class="{look}" {at}{size}{turned}>{escape(mark.text)}</text>'


def _titled(opened: str, name: str, title: str) -> str:
    return f"{opened}><title>{escape(title)}</title></{name}>" if title else f"{opened}/>"


def _corners(dot: Dot) -> list[tuple[float, float]]:
    reach = dot.radius * (1.25 if dot.shape == "diamond" else 0.9)
    steps = ((0, -1), (1, 0), (0, 1), (-1, 0)) if dot.shape == "diamond" else ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return [(dot.x + reach * x, dot.y + reach * y) for x, y in steps]


def check_png() -> None:
    """Raises:
    MissingDependencyError: there is no matplotlib.
    """
    try:
        import matplotlib  # noqa: F401 - asked for only to know that it is there
    except ImportError as error:
        raise MissingDependencyError(
            "PNG files of the plots need matplotlib, which is not installed.",
            hint="install with: pip install 'specrej-eval[plots]'; or --plot_format svg, which needs nothing.",
        ) from error


def as_png(scene: Scene, *, scale: float = 2.0) -> bytes:
    """The chart as a PNG file, with the light colours.

    Raises:
        MissingDependencyError: there is no matplotlib.
    """
    check_png()
    from matplotlib import patches
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = 72 * scale
    figure = Figure(figsize=(scene.width / 72, scene.height / 72), dpi=dpi, facecolor=LIGHT["page"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.axis("off")
    for order, mark in enumerate(scene.marks):
        colour = LIGHT[mark.role]
        if isinstance(mark, Line):
            dash = [float(part) / mark.width for part in mark.dash.split()]
            xs, ys = zip(*mark.points, strict=True)
            axes.plot(
                xs, ys, color=colour, linewidth=mark.width, linestyle=(0, dash) if dash else "-", zorder=order,
                solid_capstyle="butt", solid_joinstyle="round",
            )  # fmt: skip
        elif isinstance(mark, Box):
            corner = (mark.x, mark.y)
            axes.add_patch(patches.Rectangle(corner, mark.width, mark.height, color=colour, lw=0, zorder=order))
        elif isinstance(mark, Dot):
            drawn = {
                "facecolor": LIGHT["page"] if mark.hollow else colour,
                "edgecolor": colour if mark.hollow else "none",
                "linewidth": 1.8 if mark.hollow else 0.0,
                "alpha": 0.45 if mark.faint else 1.0,
                "zorder": order,
            }
            if mark.shape == "circle":
                axes.add_patch(patches.Circle((mark.x, mark.y), mark.radius, **drawn))
            else:
                axes.add_patch(patches.Polygon(_corners(mark), closed=True, **drawn))
        else:
            place = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
            axes.text(
                mark.x, mark.y, mark.text, color=colour, fontsize=mark.size, ha=place, va="baseline", zorder=order,
                fontweight="bold" if mark.bold else "normal", rotation=90 if mark.turned else 0,
                rotation_mode="anchor", parse_math=False, family="DejaVu Sans", fontstretch="condensed",
            )  # fmt: skip
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=dpi, metadata={"Software": None})
    return written.getvalue()
