"""How the report's figures look: one palette for light and dark, matplotlib to inline SVG.

Figures are drawn in the light palette; in the SVG each of its colours is replaced by a CSS variable
that the page defines for both colour schemes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#68707c", "#9aa4b2"),
    "line": ("#d9dee5", "#303844"),
    "faint": ("#eef1f5", "#1d232b"),
    "page": ("#fefefe", "#101419"),
    "blue": ("#2463eb", "#7ea8ff"),
    "red": ("#d92d20", "#ff8a80"),
    "green": ("#067d55", "#4fd1a1"),
    "amber": ("#c26a05", "#f2b661"),
    "violet": ("#7a3fe0", "#bda2ff"),
    "age0": ("#86c5f5", "#86c5f5"),
    "age1": ("#3f93e8", "#3f93e8"),
    "age2": ("#5f5fe3", "#8080f0"),
    "age3": ("#9138d6", "#b069ea"),
    "age4": ("#c22a8f", "#e060b4"),
    "age5": ("#e0455a", "#f0707f"),
}
"""Name -> (light, dark)."""

C = {name: light for name, (light, _) in PALETTE.items()}
"""The colours to draw with."""

FULL = 10.6
HALF = 5.15
"""Widths in inches, 100 CSS pixels each."""

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.edgecolor": C["line"],
    "axes.labelcolor": C["muted"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlecolor": C["ink"],
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": C["faint"],
    "grid.linewidth": 1.0,
    "text.color": C["ink"],
    "xtick.color": C["line"],
    "ytick.color": C["line"],
    "xtick.labelcolor": C["muted"],
    "ytick.labelcolor": C["muted"],
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Generator[Sheet]:
    """Open a figure; its `svg` is there after the block."""
    with mpl.rc_context(_RC):
        sheet = Sheet(width, height, rows, columns)
        yield sheet
        sheet.close()


class Sheet:
    """A figure under construction."""

    def __init__(self, width: float, height: float, rows: int, columns: int) -> None:
        self.figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(self.figure)
        axes = self.figure.subplots(rows, columns, squeeze=False)
        self.axes: list[Axes] = [axis for row in axes for axis in row]
        self.svg = ""

    def close(self) -> None:
        """Render."""
        self.svg = _inline(self.figure)


def age_colour(age: int) -> str:
    """Return the colour of a token age; ages above 5 share one."""
    return C[f"age{min(max(age, 0), 5)}"]


def legend_above(axis: Axes, columns: int = 2) -> None:
    """Name the curves above the axis, where they cover nothing."""
    axis.legend(
        frameon=False,
        labelcolor=C["muted"],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        borderpad=0.0,
    )


def css_variables() -> str:
    """Return the palette as CSS, for both colour schemes."""
    light = "".join(f"--{name}:{value[0]};" for name, value in PALETTE.items())
    dark = "".join(f"--{name}:{value[1]};" for name, value in PALETTE.items())
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def standalone(svg: str, font: str = "system-ui, sans-serif") -> str:
    """Return an SVG that carries its own colours, for use as an image."""
    style = (
        f"<style>{css_variables().replace(':root', 'svg')}"
        f"svg{{background:var(--page)}}text{{font-family:{font} !important}}</style>"
    )
    box = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)
    assert box is not None
    size = f' width="{float(box.group(1)):.0f}" height="{float(box.group(2)):.0f}"'
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace(">", f"{size}>{style}", 1)


def _inline(figure: Figure) -> str:
    buffer = io.StringIO()
    # A salt makes ids reproducible; the figure's own text keeps those of two figures apart.
    salt = "|".join(f"{a.get_title('left')}{a.get_xlabel()}{a.get_ylabel()}" for a in figure.axes)
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    head = (
        f'<svg {view_box.group(0)} xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    )
    svg = f"{head}>{body}"
    by_light = {light: name for name, (light, _) in PALETTE.items()}
    return re.sub("|".join(by_light), lambda found: f"var(--{by_light[found.group(0)]})", svg)
