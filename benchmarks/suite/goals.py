"""The goals that figures are held to, and whether they are met.

A goal is judged by the worst of its races. Its name is its heading in benchmarks/notes.md, where
the reasons stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suite.results import LIMIT, PEER, Race, digits, duration, shown, shown_ratio
from suite.servers import COW_ORIGIN, COW_SNAPSHOT


@dataclass(frozen=True)
class Goal:
    """What is wanted of some races.

    `at_least` is our speed over that of the fastest of `against`: entrants whose names begin so, or
    all of a role. `at_most` is what one of the unit costs, or with `cpu` what it costs the server.
    """

    name: str
    text: str
    races: tuple[str, ...]
    against: tuple[str, ...] = ()
    at_least: float | Callable[[Race], float] = 0.0
    at_most: float = 0.0
    cpu: bool = False
    ours: tuple[str | None, ...] = (None,)  # entrants; None is the first


@dataclass(frozen=True)
class Verdict:
    """How a goal was judged: what was reached, and beside whom."""

    goal: Goal
    reached: str
    peer: str
    limit: str
    met: bool | None  # None where it was not measured

    def cells(self) -> tuple[str, ...]:
        met = {True: "yes", False: "NO", None: "not measured"}[self.met]
        return (self.reached, self.peer, self.limit, met)


@dataclass(frozen=True)
class Attempt:
    """How far one entrant of one race is beyond a goal: above 1 it meets it."""

    race: Race
    ours: str
    margin: float
    reached: str


def judge(goal: Goal, found: Sequence[Race]) -> Verdict | None:
    """Return how a goal is met, None where none of its races were run."""
    races = [race for race in found if race.what in goal.races]
    if not races:
        return None
    attempts = [
        attempt
        for race in races
        for name in goal.ours
        if (attempt := attempted(goal, race, name or race.names[0]))
    ]
    if not attempts:
        return Verdict(goal, missing(races, goal), "", "", None)
    worst = min(attempts, key=lambda attempt: attempt.margin)
    where = f"; {worst.race.what}" if len(goal.races) > 1 else ""
    who = f"; {worst.ours}" if len(goal.ours) > 1 else ""
    return Verdict(
        goal,
        worst.reached + where + who,
        beside(worst, PEER),
        beside(worst, LIMIT),
        worst.margin >= 1,
    )


def attempted(goal: Goal, race: Race, ours: str) -> Attempt | None:
    """Return how far an entrant gets; None where it, or whom it is held against, has no figures."""
    if ours not in race.names or race.missing(ours):
        return None
    if goal.at_most:
        cost = race.cpu(ours) if goal.cpu else race.cost(ours)
        if not cost or not cost.median:
            return None
        text = duration(cost.median) if goal.cpu else shown(cost.median, race.unit)
        return Attempt(race, ours, goal.at_most / cost.median, text)
    fastest = race.fastest(held_against(goal, race))
    ratio = race.ratio(fastest, ours) if fastest else None
    if not ratio:
        return None
    bound = goal.at_least if isinstance(goal.at_least, float) else goal.at_least(race)
    return Attempt(race, ours, ratio.median / bound, f"{shown_ratio(ratio)} × {fastest}")


def held_against(goal: Goal, race: Race) -> list[str]:
    """Return the entrants of a race that a goal names, those that have figures."""
    return [
        name
        for name in race.names
        if not race.missing(name)
        and (race.role(name) in goal.against or name.startswith(tuple(goal.against)))
    ]


def beside(attempt: Attempt, role: str) -> str:
    """Return the fastest of a role in the race, with our speed over its."""
    race = attempt.race
    name = race.fastest(race.present(role))
    if name is None:
        return ""
    ratio = race.ratio(name, attempt.ours)
    return f"{name}: {shown(race.cost(name).median, race.unit)}" + (
        f", we are {digits(ratio.median)} ×" if ratio else ""
    )


def missing(races: Sequence[Race], goal: Goal) -> str:
    """Return why a goal was not measured."""
    for race in races:
        for name in race.names:
            if reason := race.missing(name):
                return f"{name}: {reason}"
    return ""


# ---------------------------------------------------------------- the goals

READS = (
    "random 4 KiB reads of the origin",
    "random 4 KiB reads of a snapshot, untouched",
    "random 4 KiB reads of a snapshot, half of it in the store",
)
TARGETS = ("linear", "snapshot-origin", "snapshot, all in the store")
SEQUENTIAL = tuple(f"{work} 1 MiB, {target}" for work in ("read", "rewrite") for target in TARGETS)
OPEN = tuple(f"open a store of many exceptions, {order}" for order in ("ascending", "random"))
CREATE = ("create a snapshot of a huge sparse image", "create a snapshot after random first writes")
BOTH = (COW_SNAPSHOT, COW_ORIGIN)
NBDKIT = ("nbdkit --filter=cow, 4 KiB",)
QEMU = ("qemu-nbd, qcow2", "QEMU copy-before-write")
DEEP = ", depth 32"


def gained(race: Race) -> float:
    """Return what two threads have to gain: 1.7, or nearly what numpy.take gains from memory."""
    one, two = race.cost("numpy.take, one thread"), race.cost("numpy.take, two threads")
    return min(1.7, 0.9 * one.median / two.median)


IN_PROCESS = (
    Goal("random reads", "random reads ≥ 0.9 × numpy.take", READS, ("numpy.take",), 0.9),
    Goal("sequential", "sequential ≥ 0.95 × memcpy", SEQUENTIAL, ("memcpy",), 0.95),
    Goal(
        "rewrites",
        "rewrites within 10 % of a device without snapshots",
        (
            "rewrites 4 KiB on the origin",
            "rewrite 1 MiB, snapshot-origin",
            "rewrites 4 KiB on an origin with 1 snapshot",
        ),
        ("cow, no snapshot",),
        0.9,
    ),
    Goal(
        "first writes",
        "first writes with one snapshot ≥ 0.8 × the plain work in them",
        ("first writes 4 KiB on the origin, store with pages",),
        (LIMIT,),
        0.8,
    ),
    Goal(
        "first writes into a fresh store",
        "into a fresh store, populating its pages included, ≥ 0.7 ×",
        ("first writes 4 KiB on the origin, fresh store",),
        (LIMIT,),
        0.7,
    ),
    Goal(
        "lookup",
        "a lookup ≤ 25 ns a chunk",
        ("exception lookup, one in 4 chunks", "exception lookup, one in 256 chunks"),
        at_most=25e-9,
    ),
    Goal(
        "two readers",
        "2 reader threads ≥ 1.7 × one",
        ("random 4 KiB reads by two threads, in cache",),
        ("cow, one thread",),
        1.7,
    ),
    Goal(
        "two readers of memory",
        "2 reader threads: the same from memory, or 0.9 × what numpy.take gains there",
        ("random 4 KiB reads by two threads, in memory",),
        ("cow, one thread",),
        gained,
    ),
    Goal(
        "reader beside a writer",
        "a reader beside a breaking writer keeps ≥ 0.5 × of its speed",
        ("random 4 KiB reads beside a thread that breaks chunks",),
        ("cow, alone",),
        0.5,
    ),
)

AGAINST_PEERS = (
    Goal(
        "first writes and the kernel",
        "first writes ≥ 8 × the kernel's under user-mode-linux",
        ("kernel: first writes on an origin with 1 snapshot",),
        (PEER,),
        8.0,
    ),
    Goal(
        "first writes and reflinks",
        "first writes ≥ 3 × the fastest reflink, copies made",
        ("reflink: first writes 4 KiB, with a sync",),
        ("reflink",),
        3.0,
    ),
    Goal(
        "first writes and reflinks in the page cache",
        "first writes ≥ 3 × the fastest reflink, before it has copied anything",
        ("reflink: first writes 4 KiB",),
        ("reflink",),
        3.0,
    ),
    Goal("opening a store", "opening ≥ 30 M exceptions a second", OPEN, at_most=1 / 30e6),
    Goal(
        "merge and the kernel",
        "merge ≥ 3 × the kernel's rate",
        ("kernel: merge random exceptions",),
        (PEER,),
        3.0,
    ),
    Goal("creation", "creation of a snapshot ≤ 1 ms", CREATE, at_most=1e-3),
)

DURABLE = (
    Goal(
        "a durable batch",
        "durable: a batch of 1024 first writes ≥ 50 × the rate of one by one",
        ("a batch of first writes, durable",),
        ("cow, one by one",),
        50.0,
    ),
    Goal(
        "durable writers",
        "durable: 8 concurrent writers ≥ 4 × one",
        ("first writes by 8 threads, durable",),
        ("cow, one writer",),
        4.0,
    ),
)

SNAPSHOTS = (
    Goal(
        "first writes with 8 snapshots",
        "8 snapshots: first writes ≥ 0.9 × what 8 copies cost",
        ("first writes 4 KiB on an origin with 8 snapshots",),
        (LIMIT,),
        0.9,
    ),
    Goal(
        "rewrites with 8 snapshots",
        "8 snapshots: rewrites cost what they cost with one (≥ 0.95 ×)",
        ("rewrites 4 KiB on an origin with 8 snapshots",),
        ("cow, 1 snapshot",),
        0.95,
    ),
)

NBD_READS = tuple(f"NBD: random 4 KiB reads, {s}{DEEP}" for s in ("untouched", "half copied"))
NBD_FIRST = (f"NBD: first writes 4 KiB{DEEP}",)
NBD_REWRITES = (f"NBD: rewrites 4 KiB{DEEP}",)
NBD_SEQUENTIAL = tuple(
    f"NBD: {work}{DEEP}"
    for work in (
        "read 1 MiB, untouched",
        "read 1 MiB, copied",
        "rewrite 1 MiB",
        "first write 1 MiB",
    )
)
NBD_DEPTH_1 = tuple(
    f"NBD: {work}, depth 1"
    for work in (
        "random 4 KiB reads, untouched",
        "random 4 KiB reads, half copied",
        "first writes 4 KiB",
        "rewrites 4 KiB",
        "rewrite 1 MiB",
        "read 1 MiB, copied",
    )
)

OVER_NBD = (
    *(
        Goal(f"NBD {work}", f"NBD {work} ≥ {bound} × {whom}", races, against, bound, ours=BOTH)
        for work, races in (
            ("random reads", NBD_READS),
            ("first writes", NBD_FIRST),
            ("rewrites", NBD_REWRITES),
        )
        for bound, whom, against in (
            (1.2, "nbdkit's cow filter, 4 KiB blocks", NBDKIT),
            (3.0, "qemu-nbd on qcow2, and QEMU's copy-before-write", QEMU),
        )
    ),
    Goal(
        "NBD sequential",
        "NBD 1 MiB sequential ≥ 1.2 × the best peer",
        NBD_SEQUENTIAL,
        (PEER,),
        1.2,
        ours=BOTH,
    ),
    Goal(
        "NBD depth 1",
        "NBD at depth 1 no slower than any peer",
        NBD_DEPTH_1,
        (PEER,),
        1.0,
        ours=BOTH,
    ),
    Goal(
        "NBD server CPU",
        "NBD server CPU ≤ 6 µs a request",
        (*NBD_READS, *NBD_FIRST, *NBD_REWRITES),
        at_most=6e-6,
        cpu=True,
        ours=BOTH,
    ),
    Goal(
        "FUSE",
        "FUSE at depth 32 ≥ QEMU's FUSE export",
        tuple(
            f"FUSE: {work}{DEEP}"
            for work in (
                "random 4 KiB reads, untouched",
                "random 4 KiB reads, half copied",
                "first writes 4 KiB",
                "rewrites 4 KiB",
            )
        ),
        (PEER,),
        1.0,
    ),
)

EARLIER = (
    Goal(
        "one block a call",
        "one block through Python ≤ 1 µs",
        tuple(f"preadinto 4 KiB, {t}" for t in ("linear", "snapshot-origin", "snapshot")),
        at_most=1e-6,
    ),
    Goal("merge", "merge ≥ 1 GiB/s", ("merge random 4 KiB exceptions",), at_most=1 / (1 << 30)),
    Goal(
        "memory of an exception",
        "memory of an exception ≤ 16 bytes",
        ("memory of an exception, ascending", "memory of an exception, random"),
        at_most=16,
    ),
    Goal(
        "memory of a snapshot",
        "memory of a snapshot of 16 TiB ≤ 4 MiB",
        ("memory of a snapshot of a huge sparse image",),
        at_most=4,
    ),
)

GROUPS = {
    "In process": IN_PROCESS,
    "Against peers": AGAINST_PEERS,
    "Durable": DURABLE,
    "With 8 snapshots": SNAPSHOTS,
    "Serving": OVER_NBD,
    "Of earlier work": EARLIER,
}
GOALS = tuple(goal for goals in GROUPS.values() for goal in goals)
