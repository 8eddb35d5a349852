"""Races: `cow`, its limits and its peers take turns on the same work, round by round.

The speed of a machine drifts while it works; in turns it drifts for all of them. Each round another
of them begins, so that nobody always comes behind one who left the caches as it likes them.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from suite.results import COW, LIMIT, PEER, Figures, Point, Result

Work = Callable[[], object]


def nothing() -> None:
    """Do nothing: there is nothing to prepare."""


@dataclass(frozen=True)
class Entrant:
    """Somebody who does the work of a race, each time after an untimed preparation."""

    name: str
    role: str
    run: Work
    prepare: Work = nothing
    count: int | None = None  # how much it does in a round, where that is not what `cow` does
    missing: str = ""  # why it does not run


def limit(name: str, run: Work, prepare: Work = nothing) -> Entrant:
    """Return an entrant that does nothing but the plain work."""
    return Entrant(name, LIMIT, run, prepare)


def peer(name: str, run: Work, prepare: Work = nothing) -> Entrant:
    """Return an entrant that people could use instead."""
    return Entrant(name, PEER, run, prepare)


def other(name: str, run: Work, prepare: Work = nothing, *, count: int | None = None) -> Entrant:
    """Return `cow` again, in circumstances that ours are compared with."""
    return Entrant(name, COW, run, prepare, count)


def absent(name: str, reason: str, role: str = PEER) -> Entrant:
    """Return an entrant that cannot run here."""
    return Entrant(name, role, nothing, missing=reason)


class RaceTrack:
    """Runs races and keeps their results; pytest-benchmark shows ours and the others too.

    `before_each` is done after each preparation, untimed.
    """

    def __init__(
        self,
        benchmark,
        section: str,
        results: list[Result],
        rounds: int,
        before_each: Work = nothing,
    ) -> None:
        self.benchmark = benchmark
        self.section = section
        self.results = results
        self.rounds = rounds
        self.before_each = before_each

    def __call__(
        self,
        what: str,
        ours: Work | Entrant,
        *others: Entrant,
        count: int,
        unit: str = "B",
        repeat: int = 1,
        prepare: Work = nothing,
        point: Point | None = None,
    ) -> None:
        """Time `ours` and the others.

        `count` is what one round does: bytes, or with another `unit` ("/chunk") that many of it;
        a round of something short is repeated `repeat` times.
        """
        if not isinstance(ours, Entrant):
            ours = Entrant("cow", COW, ours, prepare)
        laps: dict[str, list[float]] = {entrant.name: [] for entrant in others}
        running = [entrant for entrant in others if not entrant.missing]
        order = deque(running)

        def take_turns() -> None:
            order.rotate(-1)
            for entrant in order:
                entrant.prepare()
                self.before_each()
                start = time.perf_counter()
                entrant.run()
                laps[entrant.name].append(time.perf_counter() - start)
            ours.prepare()
            self.before_each()

        benchmark = self.benchmark
        benchmark.group = what
        benchmark.extra_info.update(count=count, unit=unit)
        rounds = repeat * self.rounds
        benchmark.pedantic(ours.run, setup=take_turns, rounds=rounds, warmup_rounds=1)
        if benchmark.disabled:
            rounds_of_ours = [1.0]  # nothing was timed
            laps = {name: [1.0] for name in laps}
        else:
            rounds_of_ours = benchmark.stats.stats.data
            for entrant in running:
                del laps[entrant.name][0]  # the warm-up round
                self.add_to_group(entrant.name, laps[entrant.name])
        figures = [Figures(ours.name, COW, [lap / (ours.count or count) for lap in rounds_of_ours])]
        for entrant in others:
            costs = [lap / (entrant.count or count) for lap in laps[entrant.name]]
            figures.append(
                Figures(
                    entrant.name,
                    entrant.role,
                    [] if entrant.missing else costs,
                    missing=entrant.missing,
                )
            )
        self.results.append(Result(self.section, what, unit, figures, point))

    def add_to_group(self, name: str, laps: list[float]) -> None:
        """Give an entrant its own line in pytest-benchmark's table, beside ours.

        A benchmark fixture times one function; the turns of the others are taken in the setup of
        ours, so the seconds they took are handed in here.
        """
        twin = copy.copy(self.benchmark)
        twin.name = f"{self.benchmark.name}: {name}"
        twin.fullname = f"{self.benchmark.fullname}: {name}"
        stats = twin._make_stats(iterations=1)
        for lap in laps:
            stats.update(lap)


def together(*works: Work) -> Work:
    """Return a function that does all of these at once, each in a thread of its own."""

    def run() -> None:
        failed: list[BaseException] = []

        def guarded(work: Work) -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in works[1:]]
        for thread in threads:
            thread.start()
        guarded(works[0])
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    return run


class Beside:
    """Work that goes on in a thread while something else is timed.

    `step` does a piece and says whether there is more; `prepare` starts it, `stop` ends it and
    tells how many pieces it did.
    """

    def __init__(self, step: Callable[[], bool]) -> None:
        self.step = step

    def start(self) -> None:
        self.steps = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self) -> None:
        while not self.ended.is_set() and self.step():
            self.steps += 1

    def stop(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.steps
