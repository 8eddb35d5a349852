"""What a run has measured: kept as JSON, put together from several runs, and shown.

A cost is what one of the unit costs: seconds, or the amount that the unit names. Less is better
everywhere, and a ratio is always the other's cost over ours: above 1 `cow` is faster.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite.scale import GIB

COW, LIMIT, PEER = "cow", "limit", "peer"
AMOUNTS = ("MiB", "B each", "× linear")
RATES = ("request", "exception")


@dataclass
class Figures:
    """What one entrant of a race cost, round by round; nothing where it is `missing`."""

    name: str
    role: str  # COW, LIMIT or PEER
    costs: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds of the server for one of the unit
    missing: str = ""


@dataclass(frozen=True)
class Point:
    """Where a result stands in a chart: `x` on the line `line`."""

    chart: str
    line: str
    x: float


@dataclass
class Result:
    """One race; the first of the figures are ours."""

    section: str
    what: str
    unit: str
    figures: list[Figures]
    point: Point | None = None


@dataclass
class Run:
    """The results of one run, and what it ran on."""

    machine: dict[str, str]
    scale: str
    code: str  # digest of what was measured
    load: float  # load average when it began
    results: list[Result]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Run:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["results"] = [
            Result(
                **result
                | {
                    "figures": [Figures(**figures) for figures in result["figures"]],
                    "point": Point(**result["point"]) if result["point"] else None,
                }
            )
            for result in fields["results"]
        ]
        return cls(**fields)


# ---------------------------------------------------------------- several runs


@dataclass(frozen=True)
class Measured:
    """A median with its spread: the quartiles of the rounds, or the extremes of several runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]]) -> Measured:
        if len(runs) > 1:
            medians = [statistics.median(rounds) for rounds in runs]
            return cls(statistics.median(medians), min(medians), max(medians))
        (rounds,) = runs
        if len(rounds) < 2:
            return cls(rounds[0], rounds[0], rounds[0])
        low, median, high = statistics.quantiles(rounds, method="inclusive")
        return cls(median, low, high)


class Race:
    """The same race in one run or several."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.section, self.what = results[0].section, results[0].what
        self.unit, self.point = results[0].unit, results[0].point
        self.names = list(dict.fromkeys(f.name for result in results for f in result.figures))

    def figures(self, name: str) -> list[Figures]:
        """Return an entrant's figures from each run that has some."""
        every = [f for result in self.results for f in result.figures if f.name == name]
        return [f for f in every if f.costs] or every[:1]

    def role(self, name: str) -> str:
        return self.figures(name)[0].role

    def missing(self, name: str) -> str:
        return self.figures(name)[0].missing

    def present(self, *roles: str) -> list[str]:
        """Return the entrants of these roles that have figures, without ours."""
        return [n for n in self.names[1:] if self.role(n) in roles and not self.missing(n)]

    def cost(self, name: str | None = None) -> Measured:
        """Return an entrant's cost, ours without a name."""
        return Measured.of([f.costs for f in self.figures(name or self.names[0])])

    def cpu(self, name: str | None = None) -> Measured | None:
        runs = [f.cpu for f in self.figures(name or self.names[0]) if f.cpu]
        return Measured.of(runs) if runs else None

    def ratio(self, name: str, ours: str | None = None) -> Measured | None:
        """Return the entrant's cost over ours, worked out round by round."""
        ratios = []
        for result in self.results:
            costs = {f.name: f.costs for f in result.figures}
            both = costs.get(name), costs.get(ours or self.names[0])
            if all(both):
                ratios.append([theirs / own for theirs, own in zip(*both, strict=True)])
        return Measured.of(ratios) if ratios else None

    def fastest(self, names: Iterable[str]) -> str | None:
        """Return whoever costs least."""
        return min(names, key=lambda name: self.cost(name).median, default=None)


def races(runs: Sequence[Run]) -> list[Race]:
    """Put the results of the same race together, in the order in which they first appear."""
    found: dict[str, list[Result]] = {}
    for run in runs:
        for result in run.results:
            found.setdefault(result.what, []).append(result)
    return [Race(results) for results in found.values()]


# ---------------------------------------------------------------- shown


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-9)} ns"


def digits(value: float) -> str:
    """Return three digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shown(cost: float, unit: str) -> str:
    """Return a cost as people read it: bytes and requests as a rate, all else as it is."""
    if unit == "B":
        return f"{digits(1 / cost / GIB)} GiB/s"
    if unit in RATES:
        rate = 1 / cost
        for letter, size in (("M", 1e6), ("k", 1e3)):
            if rate >= size:
                return f"{digits(rate / size)} {letter}/s"
        return f"{digits(rate)} /s"
    if unit in AMOUNTS:
        return f"{digits(cost)} {unit}"
    return duration(cost) + unit


def shown_spread(value: Measured, unit: str) -> str:
    """Return a cost's spread as percentages of its median."""
    if not value.median:
        return ""
    low, high = value.low / value.median - 1, value.high / value.median - 1
    if unit == "B" or unit in RATES:
        low, high = value.median / value.high - 1, value.median / value.low - 1
    return f"{100 * low:+.0f} {100 * high:+.0f} %"


def shown_ratio(ratio: Measured | None) -> str:
    if ratio is None:
        return ""
    return f"{digits(ratio.median)} ({digits(ratio.low)}–{digits(ratio.high)})"


def lines(race: Race) -> list[tuple[str, ...]]:
    """Return a row for each entrant: who, cost, spread, our speed over theirs, server's CPU."""
    rows = []
    for name in race.names:
        if race.missing(name):
            rows.append((name, f"not available: {race.missing(name)}", "", "", ""))
            continue
        cost, cpu = race.cost(name), race.cpu(name)
        rows.append(
            (
                name if race.role(name) != LIMIT else f"{name} (limit)",
                shown(cost.median, race.unit),
                shown_spread(cost, race.unit),
                "" if name == race.names[0] else shown_ratio(race.ratio(name)),
                duration(cpu.median) if cpu else "",
            )
        )
    return rows
