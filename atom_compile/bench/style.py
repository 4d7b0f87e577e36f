"""What the figures share: colours that a marker or a hatch doubles, captions, PNG and SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DPI = 150
_LINE_HEIGHT = 2.75
_LEGEND_MARK, _LETTER = 0.6, 0.08  # inches
_INK = "#000000"  # what matplotlib draws frames, ticks and hatches in
_INK_IN_DARK = "#e6e8ec"
_GROUP_WIDTH = 0.8  # of the bars that stand together


class Look(NamedTuple):
    """How one variant is drawn, as a line and as a bar."""

    label: str
    line: str
    marker: str
    fill: str
    hatch: str


LOOKS = {
    "baseline": Look("16 bits", "#6b7280", "", "#e5e7eb", ""),
    "unfused": Look("plain operators", "#d97706", "s", "#fed7aa", "//"),
    "fused": Look("fused operators", "#1d4ed8", "o", "#93c5fd", ".."),
    "inductor": Look("16 bits, reduce-overhead", "#059669", "^", "#bbf7d0", "xx"),
    "static": Look("INT4, 16-bit cache", "#d97706", "s", "#fed7aa", "//"),
    "kv4": Look("INT4, INT4 cache", "#1d4ed8", "o", "#93c5fd", ".."),
}
FLOOR = "#111827"
# colour, marker and dashes: told apart without the colour
PEERS = (
    ("#059669", "^", "-"),
    ("#0891b2", "v", "--"),
    ("#be123c", "D", "-."),
    ("#7c3aed", "x", "-"),
    ("#a16207", "+", "--"),
    ("#db2777", "*", "-."),
)
_IN_DARK = {
    _INK: _INK_IN_DARK,
    FLOOR: _INK_IN_DARK,
    "#6b7280": "#a2a9b5",
    "#d97706": "#ffb454",
    "#1d4ed8": "#8ab4f8",
    "#059669": "#34d399",
    "#0891b2": "#22d3ee",
    "#be123c": "#fb7185",
    "#7c3aed": "#c4b5fd",
    "#a16207": "#facc15",
    "#db2777": "#f472b6",
    "#e5e7eb": "#374151",
    "#fed7aa": "#9a3412",
    "#93c5fd": "#1e40af",
    "#bbf7d0": "#065f46",
}


def new_figure(
    panels: int, columns: int = 4, width: float = 3.2, tall_first: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure and the axes of so many panels, row by row; the first is a column, if tall."""
    tall = tall_first and panels > 1
    columns = min(columns, panels) - tall
    lines = -(-(panels - tall) // columns)
    size = max(width * (columns + tall), 6.4), _LINE_HEIGHT * lines + 1.3
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines, columns + tall)
    axes = [figure.add_subplot(grid[:, 0])] if tall else []
    for number in range(panels - tall):
        line, column = divmod(number, columns)
        axes.append(figure.add_subplot(grid[line, column + tall]))
    return figure, axes


def finish(figure: Figure, caption: str) -> Figure:
    """With one legend of all panels above, and the caption below."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        width = _LEGEND_MARK + _LETTER * max(map(len, handles))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=max(1, int(figure.get_figwidth() / width)),
            frameon=False,
            fontsize="small",
        )
    figure.supxlabel(caption, fontsize="small")
    return figure


def label_axes(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x, fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def draw_bars(
    axes: Any,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    looks: Mapping[str, Look] = LOOKS,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """A group of bars for each of `groups`, one of each series; where a value is None, none.

    notes: of each series, what stands above its bars; their heights by default.
    """
    width = _GROUP_WIDTH / len(series)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        look = looks[name]
        bars = axes.bar(
            [at + offset for at in range(len(groups))],
            [math.nan if value is None else value for value in values],
            width,
            label=look.label,
            color=look.fill,
            edgecolor=_INK,
            linewidth=0.6,
            hatch=look.hatch,
        )
        shown = notes[name] if notes else [_short(value) for value in values]
        rotation = 90 if len(groups) * len(series) > 5 else 0
        axes.bar_label(bars, shown, fontsize="x-small", padding=2, rotation=rotation)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.3)  # room for what stands above the bars


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def save_figure(figure: Figure, path: Path) -> None:
    """As the suffix says: .png or .svg."""
    if path.suffix == ".svg":
        path.write_text(_svg(figure, path.stem, transparent=False), encoding="utf-8")
    else:
        figure.savefig(path, dpi=_DPI)


def inline_svg(figure: Figure, name: str) -> str:
    """For a page that is light or dark: each colour as a pair, on the page's ground."""
    text = _svg(figure, name, transparent=True)
    text = text[text.index("<svg") :]
    # the page's own size of text would not fit the places that were computed for it
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)
    for light, dark in _IN_DARK.items():
        text = re.sub(f'(: |=")({light})', rf"\1light-dark(\2, {dark})", text)
    return text


def _svg(figure: Figure, name: str, transparent: bool) -> str:
    """Text stays text, and the same figure gives the same file; `name` keeps its marks apart."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=transparent, metadata={"Date": None})
    return file.getvalue()
