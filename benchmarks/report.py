"""Write docs/benchmarks.md and its charts from several runs; run what is lacking.

    python benchmarks/report.py                   three full runs of everything, as far as needed
    python benchmarks/report.py --as-is           only what has been measured
    python benchmarks/report.py --scale small --output build/report       a look at the report

A run's figures stay in build/bench/SCALE; they count as long as the code that they are of is the
code that is there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from suite.charts import TITLES, draw, file_name
from suite.goals import GROUPS, judge
from suite.machine import ROOT, code_digest
from suite.results import Race, Run, lines, races
from suite.scale import SCALES

SUITES = {"bench": ["benchmarks", "--benchmark-only"], "bench-peers": ["benchmarks/peers"]}
NOTES = ROOT / "benchmarks" / "notes.md"
GOAL = "Goal: "

INTRODUCTION = """\
# Benchmarks

Written by `make bench-report`, with the words of `benchmarks/notes.md`: edit those, not this.

Every figure stands beside its limit (the plain work: memcpy, `numpy.take`, `pwrite`, a barrier) and
its peers, on the same work in the same run: they take turns, round by round. A ratio is the median
of the rounds' ratios: above 1 `cow` is faster. A spread is that of the runs' medians, from the
lowest to the highest, or that of the quartiles of the rounds where there is one run.
"""
COMMANDS = """
    make bench            # in process
    make bench-peers      # beside other programs, the kernel, reflinks (root, for mounting)
    make bench-report     # both, as often as needed, and this page

Images are in `/dev/shm`, chunks have 4 KiB and durability is `"process"` where nothing else is
said. Servers and the fio that asks them share two cores; all go through the page cache."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--runs", type=int, default=3, help="runs of everything (default: 3)")
    parser.add_argument("--as-is", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="default: docs/")
    options = parser.parse_args()
    runs = [run for suite in SUITES for run in collect(suite, options)]
    if not runs:
        print("report: nothing has been measured", file=sys.stderr)
        return 1
    if len({str(run.machine) for run in runs}) > 1:
        print("report: these runs are of different machines", file=sys.stderr)
        return 1
    found = races(runs)
    charts = draw(found, options.output / "benchmarks")
    page = options.output / "benchmarks.md"
    page.write_text("\n".join(write(runs, found, charts, read_notes())) + "\n")
    print(f"report: {page}")
    return 0


# ---------------------------------------------------------------- runs


def collect(suite: str, options: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs of a suite; measure those that are lacking or of other code."""
    code = code_digest()
    for number in range(1, options.runs + 1):
        path = ROOT / "build" / "bench" / options.scale / f"{suite}-{number}.json"
        run = Run.read(path) if path.exists() else None
        if (run is None or run.code != code) and not options.as_is:
            print(f"report: {suite}, run {number} of {options.runs}", flush=True)
            measure(SUITES[suite], options.scale, path)
            run = Run.read(path)
        if run is not None and run.code == code:
            yield run


def measure(words: Sequence[str], scale: str, path: Path) -> None:
    """Run a suite; what it prints goes to a file beside its figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "pytest", *words, "--scale", scale]
    log = path.with_suffix(".log")
    with log.open("w") as output:
        done = subprocess.run(
            [*command, "--results", str(path)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise SystemExit(f"report: the benchmarks failed; all they said is in {log}")


# ---------------------------------------------------------------- notes


def read_notes() -> dict[str, str]:
    """Return the text under each heading of the notes; every goal that is named must exist."""
    parts = re.split(r"^## (.+)$", NOTES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    notes = {
        head.strip(): text.strip() for head, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    names = {goal.name for goals in GROUPS.values() for goal in goals}
    for head in notes:
        if head.startswith(GOAL) and head.removeprefix(GOAL) not in names:
            raise SystemExit(f"report: {NOTES.name} has a note on no goal: {head!r}")
    return notes


# ---------------------------------------------------------------- the page


def write(
    runs: Sequence[Run], found: Sequence[Race], charts: Sequence[str], notes: dict[str, str]
) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from head(runs)
    yield from goals(found, notes)
    yield from growth(found, charts)
    yield from figures(found)
    for title, text in notes.items():
        if not title.startswith(GOAL):
            yield from ("", f"## {title}", "", text)


def head(runs: Sequence[Run]) -> Iterator[str]:
    first = runs[0]
    counts = [sum(1 for run in runs if is_peers(run) is peers) for peers in (False, True)]
    loads = [run.load for run in runs]
    yield INTRODUCTION
    yield "| | |"
    yield "|---|---|"
    for name, value in first.machine.items():
        yield f"| {name} | {value} |"
    yield f"| runs | {counts[0]} in process, {counts[1]} beside peers, scale {first.scale} |"
    yield f"| load average when a run began | {min(loads):.2f} to {max(loads):.2f} |"
    yield COMMANDS


def is_peers(run: Run) -> bool:
    """Tell whether a run is one beside peers."""
    return any(result.section.startswith(("Over", "Beside")) for result in run.results)


def goals(found: Sequence[Race], notes: dict[str, str]) -> Iterator[str]:
    """Yield a table for each group of goals, and the reasons behind it."""
    yield from ("", "## Goals")
    for title, group in GROUPS.items():
        verdicts = [verdict for goal in group if (verdict := judge(goal, found))]
        if not verdicts:
            continue
        yield from ("", f"### {title}", "")
        yield from table(
            ("goal", "reached", "peer", "limit", "met"),
            [(v.goal.text, *v.cells()) for v in verdicts],
        )
        for verdict in verdicts:
            note = notes.get(GOAL + verdict.goal.name)
            if note is None and verdict.met is False:
                note = "No reason has been written down yet (`benchmarks/notes.md`)."
            if note:
                yield from ("", f"**{verdict.goal.text}.** {note}")


def growth(found: Sequence[Race], charts: Sequence[str]) -> Iterator[str]:
    yield from ("", "## How cost grows")
    yield from ("", "Whole lines are `cow`, broken ones the limit or the peer on the same work.")
    for chart in charts:
        yield from (
            "",
            f"### {TITLES[chart][0]}",
            "",
            f"![{TITLES[chart][0]}](benchmarks/{file_name(chart)})",
            "",
        )
        yield from race_table([r for r in found if r.point and r.point.chart == chart])


def figures(found: Sequence[Race]) -> Iterator[str]:
    """Yield a table for each section, of what is in no chart."""
    for section in dict.fromkeys(race.section for race in found):
        rest = [race for race in found if race.section == section and race.point is None]
        if rest:
            yield from ("", f"## {section}", "")
            yield from race_table(rest)


def race_table(chosen: Sequence[Race]) -> Iterator[str]:
    rows = []
    for race in chosen:
        first, *others = lines(race)
        rows += [(race.what, *first), *(("", *line) for line in others)]
    yield from table(("", "", "figure", "spread", "`cow` is … × as fast", "server CPU"), rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table without its empty last columns."""
    used = max(n + 1 for n in range(len(heads)) for row in rows if row[n])
    yield f"| {' | '.join(heads[:used])} |"
    yield "|" + "---|" * used
    for row in rows:
        yield f"| {' | '.join(row[:used])} |"


if __name__ == "__main__":
    raise SystemExit(main())
