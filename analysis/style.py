"""How the figures look: one palette, one set of markers, one way to save.

The palette is seaborn's colour-blind one; markers and dashes differ with the colour, so that a figure printed in grey
still tells its lines apart. It is written out: importing seaborn imports scipy, which takes as long as all else here.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.patheffects as effects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from analysis.quantities import human_count

PALETTE = (
    "#0173b2",
    "#de8f05",
    "#029e73",
    "#d55e00",
    "#cc78bc",
    "#ca9161",
    "#fbafe4",
    "#949494",
    "#ece133",
    "#56b4e9",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
REFERENCE: dict[str, Any] = {"color": "0.35", "linestyle": (0, (5, 3)), "linewidth": 1.0}
HALO = [effects.withStroke(linewidth=2, foreground="white")]  # of text over lines
PNG_DPI = 200
MOST_TICKS = 4  # on a logarithmic axis: more would run into each other

_INK = ".15"
_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans", "Bitstream Vera Sans", "sans-serif"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "grid.color": "0.9",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.8,
    "ytick.minor.width": 0.8,
    "xtick.major.size": 4.8,
    "ytick.major.size": 4.8,
    "xtick.minor.size": 3.2,
    "ytick.minor.size": 3.2,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "patch.linewidth": 0.8,
    "svg.hashsalt": "scaling",  # without it every SVG gets ids of its own
}


@contextmanager
def applied() -> Iterator[None]:
    """Draw in the study's style; what the caller had set is back afterwards."""
    with mpl.rc_context(_SETTINGS):
        yield


def color(index: int) -> tuple[float, float, float]:
    red, green, blue = to_rgb(PALETTE[index % len(PALETTE)])
    return red, green, blue


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def log_axis(ax: Axes, low: float, high: float, most_ticks: int = MOST_TICKS) -> None:
    """A logarithmic x axis over [low, high] with room at both ends and a few ticks in words."""
    ax.set_xscale("log")
    ratio = high / low
    # More on the left, where the first point's name stands beside it.
    ax.set_xlim(low / (ratio**0.32 if ratio > 1 else 2.5), high * (ratio**0.2 if ratio > 1 else 2.5))
    steps = (1,) if ratio > 100 else (1, 3) if ratio > 6 else (1, 2, 5)
    first, last = ax.get_xlim()
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if first <= tick <= last]
    while len(ticks) > most_ticks:
        ticks = ticks[::2]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value, digits=1)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg, each whole; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    kinds: dict[str, dict[str, Any]] = {
        "png": {"dpi": PNG_DPI, "metadata": {"Software": None}},
        "svg": {"metadata": {"Date": None}},
    }
    with mpl.rc_context(_SETTINGS):
        figure.draw_without_rendering()
    figure.set_layout_engine(None)  # laid out once for both kinds; a placeholder ("none") would have each drawn twice
    for kind, options in kinds.items():
        content = io.BytesIO()
        with mpl.rc_context(_SETTINGS):
            figure.savefig(content, format=kind, facecolor="white", **options)
        path = stem.with_name(f"{stem.name}.{kind}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
        written.append(path)
    return written
