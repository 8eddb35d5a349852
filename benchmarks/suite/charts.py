"""Charts of how cost grows, as small PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suite.results import LIMIT, PEER, Race
from suite.scale import GIB, amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What each chart is called, and what its x axis says.
TITLES = {
    "image size": ("The size of the image", "bytes"),
    "exceptions": ("The number of exceptions", "exceptions in the store"),
    "snapshots": ("The number of snapshots", "snapshots of one origin"),
    "chunk size": ("The size of a chunk", "bytes"),
    "fragmentation": ("Fragmentation", "chunks that lie side by side in the store"),
    "kernel": ("The number of snapshots, beside the kernel", "snapshots of one origin"),
}
MARKERS = "osD^v"
NAMES = {LIMIT: "the limit", PEER: "the kernel"}


def file_name(chart: str) -> str:
    return f"{chart.replace(' ', '-')}.png"


def draw(races: Sequence[Race], folder: Path) -> list[str]:
    """Draw every chart that has points; return which."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for chart in TITLES:
        lines: dict[str, list[Race]] = {}
        for race in races:
            if race.point and race.point.chart == chart:
                lines.setdefault(race.point.line, []).append(race)
        if not lines:
            continue
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        plot(figure.add_subplot(), chart, lines)
        path = folder / file_name(chart)
        figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
        drawn.append(chart)
    return drawn


def plot(axes: Axes, chart: str, lines: dict[str, list[Race]]) -> None:
    """Draw the lines of a chart: ours whole, the limit and the kernel broken.

    Lines in the same unit are drawn in it; others as multiples of what ours cost at their first
    point.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    units = {race.unit for races in lines.values() for race in races}
    unit = units.pop() if len(units) == 1 else None
    for number, (line, races) in enumerate(lines.items()):
        races = sorted(races, key=place)
        first = races[0].cost().median
        for who, style in (("", "-"), (LIMIT, "--"), (PEER, ":")):
            points = [
                (place(race), in_unit(race.cost(name).median, unit, first))
                for race in races
                if (name := entrant(race, who))
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=f"C{number}",
                    linewidth=1.3 if who else 2,
                    marker=None if who == LIMIT else MARKERS[number],
                    label=f"{line}, {NAMES[who]}" if who else line,
                )
    places = sorted({place(race) for races in lines.values() for race in races})
    title, x_label = TITLES[chart]
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label(unit))
    if 0 not in places:
        axes.set_xscale("log", base=2)
    in_bytes = x_label == "bytes"
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [amount(int(x)) if in_bytes else f"{int(x):,}" for x in places])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, (low * high) ** 0.5 / 2), max(high, (low * high) ** 0.5 * 2))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def place(race: Race) -> float:
    assert race.point is not None
    return race.point.x


def entrant(race: Race, who: str) -> str | None:
    """Return who is drawn: ours, or the fastest of a role."""
    return race.fastest(race.present(who)) if who else race.names[0]


def in_unit(cost: float, unit: str | None, first: float) -> float:
    if unit is None:
        return cost / first
    if unit == "B":
        return 1 / cost / GIB
    return cost if unit.startswith("×") else cost * 1e6


def y_label(unit: str | None) -> str:
    if unit is None:
        return "cost, × that of the first point"
    if unit == "B":
        return "GiB/s"
    return f"cost, {unit}" if unit.startswith("×") else f"µs{unit}"
