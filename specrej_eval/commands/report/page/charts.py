"""The charts of a page: numbers in, marks out. Nothing is measured here.

Each is drawn twice, wide and narrow, so that a telephone shows letters of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from specrej_eval.commands.report.page.scene import Anchor, Box, Dot, Line, Mark, Scene, Shape, Text, text_width

WIDE, NARROW = 560, 344
"""Pixels: of a column of two on a screen 1,280 wide, and of a telephone's 400."""
MOST_NAMES = 10
"""Points that are all named; of more, those that none beats."""
SHAPES: dict[str, Shape] = {"best_of_n": "circle", "rejecting": "diamond", "other": "square"}
_DASHES = ("", "6 3", "2 3", "9 3 2 3")


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction: what numbers it holds, and where they are drawn."""

    label: str
    low: float
    high: float
    start: float = 0.0
    end: float = 1.0
    log: bool = False
    share: bool = False
    """Numbers are shares, and written as percentages."""

    def at(self, value: float) -> float:
        low, high, value = (math.log(each) for each in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value,
        )  # fmt: skip
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        if self.log:
            found = [m * 10.0**p for p in range(-3, 22) for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            return found if len(found) <= most else [tick for tick in found if f"{tick:e}"[0] == "1"] or found[::3]
        step = nice_step((self.high - self.low) / max(1, most - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [place * step for place in range(first, last + 1)]

    def told(self, value: float) -> str:
        return f"{100 * value:.4g}%" if self.share else in_short(value)


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below a rough step."""
    if rough <= 0 or not math.isfinite(rough):
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)


def in_short(value: float) -> str:
    """A number for an axis or a cell: ``1,234``, ``45k``, ``3.2M``, ``1.5G``, ``2.1T``."""
    size = abs(value)
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.3g}{unit}"
    return f"{value:,.0f}" if size >= 100 else f"{value + 0.0:.3g}"


def scientific(value: float) -> str:
    """A large number with three digits: ``2.40G``, ``45.1k``."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:#.3g}".rstrip(".") + unit
    return f"{value:.0f}"


def _around(values: Sequence[float], *, zero: bool = False, margin: float = 0.08) -> tuple[float, float]:
    low, high = min(values), max(values)
    if zero:
        low = min(low, 0.0)
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room), high + room


@dataclass(frozen=True, slots=True)
class Point:
    """One method in a chart of quality against cost."""

    name: str
    family: str
    x: float
    y: float
    low: float | None
    high: float | None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """One method in a chart of lines."""

    name: str
    family: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bars:
    """One method in a chart of stacked bars."""

    name: str
    parts: Sequence[float]


@dataclass(frozen=True, slots=True)
class Cloud:
    """Rows in a scatter; the answers stand out."""

    points: Sequence[tuple[float, float]]
    answers: Sequence[tuple[float, float]] = field(default_factory=tuple)


def _frame(scene: Scene, x: Axis, y: Axis) -> None:
    """Grid, ticks and names of the axes; the name of the upright one stands above it, so that it reads."""
    for tick in y.ticks():
        at = y.at(tick)
        scene.add(Line([(x.start, at), (x.end, at)], "grid", 1.0))
        scene.add(Text(x.start - 8, at + 4, y.told(tick), "soft", "end"))
    for tick in x.ticks(6 if scene.width > 400 else 5):
        at = x.at(tick)
        scene.add(Line([(at, y.start), (at, y.start + 4)], "pale", 1.0))
        scene.add(Text(at, y.start + 18, x.told(tick), "soft", "middle"))
    scene.add(Line([(x.start, y.start), (x.end, y.start)], "pale", 1.0))
    scene.add(Text(x.end, y.start + 36, x.label, "soft", "end"), Text(8, 16, y.label, "soft"))


def _axes(scene: Scene, x: Axis, y: Axis, *, right: float = 16.0) -> tuple[Axis, Axis]:
    """The axes at their places: room on the left for the longest number."""
    y = replace(y, start=scene.height - 46.0, end=30.0)
    left = 16 + max((text_width(y.told(tick)) for tick in y.ticks()), default=0.0)
    return replace(x, start=left, end=scene.width - right), y


def frontier(points: Sequence[Point]) -> set[int]:
    """Places of the points than which none is both cheaper and better."""
    best = set()
    for place, point in enumerate(points):
        beaten = any(
            other.x <= point.x and other.y >= point.y and (other.x, other.y) != (point.x, point.y) for other in points
        )
        if not beaten:
            best.add(place)
    return best


def pareto(title: str, points: Sequence[Point], *, x_label: str, y_label: str, share: bool, width: int) -> Scene:
    """Quality against cost: the upper left is better. Whiskers are 95 % intervals; full marks are not beaten by another
    in both."""
    described = "; ".join(f"{point.name}: {in_short(point.x)}, {in_short(point.y)}" for point in points)
    scene = Scene(width, 330 if width == WIDE else 320, title, f"{y_label} against {x_label}. {described}")
    heights = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    costs = [point.x for point in points]
    log = min(costs) > 0 and max(costs) > 6 * min(costs)
    low, high = (min(costs) / 1.4, max(costs) * 1.4) if log else _around(costs, zero=True, margin=0.12)
    bottom, top = _around(heights)
    if share:
        bottom, top = max(bottom, -0.02), min(top, 1.02)
    x, y = _axes(scene, Axis(x_label, low, high, log=log), Axis(y_label, bottom, top, share=share))
    _frame(scene, x, y)
    ours = sorted((x.at(point.x), y.at(point.y)) for point in points if point.family == "best_of_n")
    if len(ours) > 1:
        scene.add(Line(ours, "best_of_n", 1.0, "2 3"))
    best = frontier(points)
    named = [p for place, p in enumerate(points) if place in best or len(points) <= MOST_NAMES]
    for point in named:
        if point.low is not None and point.high is not None:
            at = x.at(point.x)
            scene.add(Line([(at, y.at(point.low)), (at, y.at(point.high))], point.family, 1.4))
    taken = [(x.at(p.x) - 7, y.at(p.y) - 7, x.at(p.x) + 7, y.at(p.y) + 7) for p in points]
    for place, point in enumerate(points):
        shape, hollow = SHAPES[point.family], place not in best
        scene.add(Dot(x.at(point.x), y.at(point.y), point.family, 5.5, shape, hollow=hollow, title=point.title))
    ends = [(p, y.at(p.high), y.at(p.low)) for p in named if p.low is not None and p.high is not None]
    lines = [(x.at(point.x) - 1, top, x.at(point.x) + 1, bottom) for point, top, bottom in ends]
    for (x1, y1), (x2, y2) in pairwise(ours):  # in short pieces, whose boxes hold little else
        steps = [(x1 + (x2 - x1) * i / 12, y1 + (y2 - y1) * i / 12) for i in range(13)]
        lines += [(a, min(b, d), c, max(b, d)) for (a, b), (c, d) in pairwise(steps)]
    for point in sorted(named, key=lambda point: (-point.y, point.x)):
        at, height = x.at(point.x), y.at(point.y)
        reach = (y.at(point.high), y.at(point.low)) if point.high is not None and point.low is not None else None
        scene.add(_label(point.name, point.family, (at, height), reach or (height, height), taken, lines, (x, y)))
    return scene


_Rectangle = tuple[float, float, float, float]


def _label(
    name: str,
    role: str,
    mark: tuple[float, float],
    reach: tuple[float, float],
    taken: list[_Rectangle],
    lines: Sequence[_Rectangle],
    axes: tuple[Axis, Axis],
) -> Text:
    """A name beside its mark, or at an end of its whisker, where it covers least."""
    (x, y), (at, height) = axes, mark
    wide = text_width(name)
    places: list[tuple[float, float, Anchor, float]] = [
        (at, reach[0] - 9, "middle", 3.0),
        (at, reach[1] + 9, "middle", 3.5),
    ]
    for lift in (0, -14, 14, -28, 28, -42, 42):
        places += [
            (at + 11, height + lift, "start", abs(lift) / 6),
            (at - 11, height + lift, "end", abs(lift) / 6 + 0.5),
        ]
    tries: list[tuple[float, _Rectangle, Text]] = []
    for edge, middle, anchor, cost in places:
        left = edge - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        box = (left, middle - 7, left + wide, middle + 6)
        outside = max(0.0, x.start - 4 - box[0]) + max(0.0, box[2] - x.end - 12)
        outside += max(0.0, y.end - 8 - box[1]) + max(0.0, box[3] - y.start)
        cost += 40 * outside + sum(_overlap(box, other) for other in taken)
        cost += 0.5 * sum(_overlap(box, other) for other in lines)
        tries.append((cost, box, Text(edge, middle + 4, name, role, anchor)))
    _, box, text = min(tries, key=lambda one: one[0])
    taken.append(box)
    return text


def _overlap(one: _Rectangle, other: _Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return 20 + width * height / 4 if width > 0 and height > 0 else 0.0


def survival(title: str, curves: Sequence[Curve], *, width: int) -> Scene:
    """Share of the rows that no look has rejected yet, against tokens decoded."""
    described = "; ".join(f"{curve.name} ends at {100 * curve.points[-1][1]:.3g}%" for curve in curves)
    scene = Scene(width, 330 if width == WIDE else 320, title, described)
    longest = max(point[0] for curve in curves for point in curve.points)
    names = max(text_width(curve.name) for curve in curves)
    right = min(names + 18, width * 0.42)
    x, y = _axes(
        scene,
        Axis("tokens decoded of a row", 0, longest or 1.0),
        Axis("rows not rejected", 0, 1.04, share=True),
        right=right,
    )
    _frame(scene, x, y)
    seen: dict[str, int] = {}
    ends: list[tuple[float, str, str]] = []
    for curve in curves:
        dash = _DASHES[seen.get(curve.family, 0) % len(_DASHES)]
        seen[curve.family] = seen.get(curve.family, 0) + 1
        drawn: list[tuple[float, float]] = []
        for cost, share in curve.points:
            if drawn:
                drawn.append((x.at(cost), drawn[-1][1]))
            drawn.append((x.at(cost), y.at(share)))
        if drawn[-1][0] < x.end:
            drawn.append((x.end, drawn[-1][1]))
        scene.add(Line(drawn, curve.family, 2.0, dash))
        ends.append((drawn[-1][1], curve.name, curve.family))
    scene.add(*_end_labels(ends, x.end + 8, (y.end, y.start), width - x.end - 10))
    return scene


def _end_labels(
    ends: Sequence[tuple[float, str, str]], at: float, bounds: tuple[float, float], room: float
) -> list[Mark]:
    """Names at the ends of lines, moved apart where they would cover each other."""
    ordered = sorted(ends, key=lambda end: end[0])
    heights = [height for height, _, _ in ordered]
    for _ in range(200):
        moved = False
        for place in range(1, len(heights)):
            gap = 15 - (heights[place] - heights[place - 1])
            if gap > 0.01:
                heights[place - 1] -= gap / 2
                heights[place] += gap / 2
                moved = True
        over = max(0.0, heights[-1] - bounds[1]) if heights else 0.0
        if over > 0.01:
            heights[-1] -= over
            moved = True
        if not moved:
            break
    texts = zip(heights, ordered, strict=True)
    return [Text(at, height + 4, _cut(name, room), role) for height, (_, name, role) in texts]


def _cut(name: str, room: float) -> str:
    if text_width(name) <= room:
        return name
    while len(name) > 1 and text_width(f"{name}…") > room:
        name = name[:-1]
    return f"{name.rstrip()}…"


@dataclass(frozen=True, slots=True)
class Agreements:
    """One method in a chart of correlations: (tokens, lower quartile, median, upper quartile)."""

    name: str
    family: str
    points: Sequence[tuple[float, float, float, float]]


def correlations(title: str, lines: Sequence[Agreements], *, width: int) -> Scene:
    """Correlation of partial and final score along an answer: medians over prompts, and their middle half."""
    described = "; ".join(f"{line.name}: {line.points[-1][2]:.2f} at {line.points[-1][0]:g} tokens" for line in lines)
    scene = Scene(width, 330 if width == WIDE else 320, title, described)
    longest = max(point[0] for line in lines for point in line.points)
    lowest = min(0.0, *(point[1] for line in lines for point in line.points))
    right = min(max(text_width(line.name) for line in lines) + 18, width * 0.42)
    x, y = _axes(
        scene,
        Axis("tokens at the look", 0, longest * 1.04),
        Axis("Pearson's r with the final score", lowest - 0.02 if lowest < 0 else 0.0, 1.04),
        right=right,
    )
    _frame(scene, x, y)
    ends = []
    for line in lines:
        for tokens, low, _, high in line.points:
            scene.add(Line([(x.at(tokens), y.at(low)), (x.at(tokens), y.at(high))], line.family, 1.2))
        drawn = [(x.at(tokens), y.at(middle)) for tokens, _, middle, _ in line.points]
        if len(drawn) > 1:
            scene.add(Line(drawn, line.family, 1.0, "2 3"))
        scene.add(*(Dot(*at, line.family, 4.5, SHAPES[line.family]) for at in drawn))
        ends.append((drawn[-1][1], line.name, line.family))
    scene.add(*_end_labels(ends, x.end + 6, (y.end, y.start), width - x.end - 8))
    return scene


def scatter(title: str, cloud: Cloud, *, x_label: str, y_label: str, role: str, width: int) -> Scene:
    """Partial against final score, each less the mean over its prompt's rows."""
    scene = Scene(width, 330 if width == WIDE else 320, title, f"{y_label} against {x_label}, {len(cloud.points)} rows")
    everything = [*cloud.points, *cloud.answers]
    x, y = _axes(
        scene,
        Axis(x_label, *_around([point[0] for point in everything], margin=0.05)),
        Axis(y_label, *_around([point[1] for point in everything], margin=0.05)),
    )
    _frame(scene, x, y)
    for at, crossed in ((x.at(0.0), True), (y.at(0.0), False)):
        if crossed and x.start < at < x.end:
            scene.add(Line([(at, y.start), (at, y.end)], "grid", 1.0))
        if not crossed and y.end < at < y.start:
            scene.add(Line([(x.start, at), (x.end, at)], "pale", 1.0))
    scene.add(*(Dot(x.at(a), y.at(b), "pale", 2.6, faint=True) for a, b in cloud.points))
    scene.add(*(Dot(x.at(a), y.at(b), role, 3.2) for a, b in cloud.answers))
    words = "the answers"
    scene.add(Dot(x.end - text_width(words) - 10, 12, role, 4), Text(x.end, 16, words, role, "end"))
    return scene


def bars(title: str, rows: Sequence[Bars], names: Sequence[str], *, x_label: str, width: int, unit: str = "") -> Scene:
    """Stacked bars with a name for each part above them."""
    roles = ("first", "second", "third", "fourth")
    tall = 26 if width == WIDE else 44
    described = "; ".join(f"{row.name}: {in_short(sum(row.parts))}" for row in rows)
    legend = sum(text_width(name) + 30 for name in names) > width - 20
    top = (48 if legend else 30) if len(names) > 1 else 12
    scene = Scene(width, top + tall * len(rows) + 50, title, f"{x_label}. {described}")
    at, height = 8.0, 14.0
    for name, role in zip(names, roles, strict=False):
        if len(names) == 1:
            break
        if at + text_width(name) + 20 > width - 8:
            at, height = 8.0, height + 18
        scene.add(Box(at, height - 9, 11, 11, role), Text(at + 16, height + 1, name, "soft"))
        at += text_width(name) + 32
    left = 8.0 if width != WIDE else 16 + min(max(text_width(row.name) for row in rows), width * 0.4)
    most = max(sum(row.parts) for row in rows) or 1.0
    room = text_width(in_short(most) + unit) + 12
    x = Axis(x_label, 0.0, most, left, width - room - 8)
    bottom = top + tall * len(rows)
    for tick in x.ticks(6 if width == WIDE else 4):
        scene.add(Line([(x.at(tick), top - 2), (x.at(tick), bottom)], "grid", 1.0))
        scene.add(Text(x.at(tick), bottom + 16, x.told(tick), "soft", "middle"))
    scene.add(Text(width - 8, bottom + 36, x_label, "soft", "end"))
    for place, row in enumerate(rows):
        y = top + tall * place
        if width == WIDE:
            scene.add(Text(left - 8, y + tall / 2 + 4, _cut(row.name, left - 12), "ink", "end"))
        else:
            scene.add(Text(left, y + 14, _cut(row.name, width - 16), "ink"))
        bar, start = (y + 4, left) if width == WIDE else (y + 20, left)
        for part, role, name in zip(row.parts, roles, names, strict=False):
            reach = x.at(part) - x.start
            if reach > 0:
                scene.add(Box(start, bar, reach, 18, role, f"{name}: {in_short(part)}{unit}"))
            start += reach
        scene.add(Text(start + 6, bar + 13, f"{in_short(sum(row.parts))}{unit}", "ink"))
    return scene
