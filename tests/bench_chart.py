"""The chart of scripts/bench: how fast each job is by volfs and by each peer, as a multiple of the best peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = {
    "volfs": "#d1495b",
    "rbd-fuse": "#30638e",
    "nbdfuse+qemu-nbd": "#5b8fb9",
    "qemu-storage-daemon": "#a3c4dc",
    "fio rbd": "#b8b8b8",  # librbd itself
}
OURS_AND_LIMIT = ("volfs", "fio rbd")
BAR = 0.8  # of the height that a job has
INCHES = 0.62  # of a job's height
DRIVERS = {"rbd": "RBD", "iscsi": "iSCSI"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw what scripts/bench has measured, a panel for each driver, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drivers = result["drivers"]
    most = max(len(each["jobs"]) for each in drivers.values())
    figure = Figure(figsize=(7 * len(drivers), INCHES * most + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(drivers), squeeze=False)[0]
    for axes, (driver, measured) in zip(panels, drivers.items(), strict=True):
        _panel(axes, DRIVERS[driver], measured["jobs"])
    bars, names = figure.axes[0].get_legend_handles_labels()  # RBD has them all, if it is there
    figure.legend(bars, names, loc="outside upper center", ncols=len(names), fontsize=8)
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    figure.supxlabel(f"times as fast as the best of the other programs\n{machine}", fontsize=7)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["medians"]))
    height = BAR / len(names)
    for number, name in enumerate(names):
        shown = [(place, row) for place, row in enumerate(rows) if name in row["medians"]]
        speeds = [row["medians"][name] / _best(row["medians"]) for _, row in shown]
        places = [place - BAR / 2 + (number + 0.5) * height for place, _ in shown]
        axes.barh(places, speeds, height, color=COLORS[name], label=name)
        if name == "volfs":
            for place, speed, (_, row) in zip(places, speeds, shown, strict=True):
                text = f" {row['medians'][name]:,.0f} {row['unit']}"
                axes.text(speed, place, text, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["job"] for row in rows])
    axes.invert_yaxis()
    axes.set_title(title)
    axes.margins(x=0.16)
    axes.spines[["top", "right"]].set_visible(False)


def _best(medians: Mapping[str, float]) -> float:
    """Of the other programs."""
    return max(speed for name, speed in medians.items() if name not in OURS_AND_LIMIT)
