"""What programs make happen: counted, so that no kind of event is left out unseen.

python -m kernel.tally [COUNT [FIRST]]        with tests/ on the PYTHONPATH: print the table
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from support.model import Merge, Snapshot

from .author import FEATURES, LARGEST_CHUNKS, Author
from .programs import Guide, Program, Step

LETTERS = ("P", "PO", "N")
CHUNKS = tuple(1 << n for n in range(max(LARGEST_CHUNKS).bit_length()))
ORIGINS = {
    "linear": "an origin in one piece",
    "linear linear": "an origin in pieces",
    "linear linear linear": "an origin in pieces",
    "striped linear": "an origin with stripes",
    "linear zero linear": "an origin with zeros inside",
    "mirror linear": "an origin with a mirror",
    "linear error linear": "an origin with a bad place",
    "linear flakey linear": "an origin that drops writes",
}
EVENTS = (
    *dict.fromkeys(ORIGINS.values()),
    "an origin's table swapped",
    *(f"a store {letter}" for letter in LETTERS),
    *(f"chunks of {chunk}" for chunk in CHUNKS),
    "a store on a device",
    "a store on a device with a bad place",
    "a store opened again",
    "an invalid store opened",
    "a snapshot shorter than its origin",
    "a snapshot of a snapshot",
    "a snapshot with another target behind it",
    "a table refused",
    "a resume refused",
    "a snapshot removed",
    "a snapshot renamed",
    "a store reloaded, P to P",
    "a store reloaded, P to PO",
    "a store reloaded, PO to P",
    "a store reloaded, PO to PO",
    "a store reloaded, N to N",
    "a store moved to another device",
    "a full or invalid store handed over",
    "a handover cancelled",
    "an inactive table cleared",
    "an own write copied",
    *(f"an origin write copied for {count}" for count in (1, 2, 3, 4)),
    *(f"{letter} full by an own write" for letter in LETTERS),
    *(f"{letter} full by an origin write" for letter in LETTERS),
    "PO invalid after overflow",
    "full by a merge",
    "a merge from disk",
    "a merge by handover",
    "a merge through several areas",
    "a merge copied for 1 sibling",
    "a merge copied for 2 siblings",
    "a merge copied for 3 siblings",
    "a merge of an invalid store",
    "a merge that left exceptions to nobody",
    "a merge ended",
    "a merge failed",
    "a merge that had failed",
    "a merge stopped, then resumed",
    "a merge stopped, then begun again from disk",
    "an own write that met a bad place",
    "an origin write that met a bad place",
    "a discard in the store",
    "a discard of what is not in the store",
    "a discard passed down",
    "a discard during a merge",
    "a discard refused",
)


class Facts(NamedTuple):
    """What is known of a snapshot at one moment."""

    target: Snapshot
    device: str
    active: bool
    letter: str
    state: str
    exceptions: int
    areas: int

    @property
    def ended(self) -> bool:
        return self.state in ("Invalid", "Overflow")

    @property
    def room(self) -> bool:
        """Whether there is a chunk left for one more exception."""
        used, total = map(int, self.state.split(" ")[0].split("/"))
        return total - used >= self.target.store.chunk


class Witness:
    """Runs a program on the model, and names what happens with the devices it happens to."""

    def __init__(self, program: Program) -> None:
        self.guide = Guide(program)
        self.failed: set[str] = set()

    def facts(self) -> dict[int, Facts]:
        return {
            id(target): Facts(
                target,
                target.device.label,
                target.active,
                target.store.letter,
                target.status(),
                len(target.exceptions),
                getattr(target.store, "area", 0) + 1,
            )
            for target in self.guide.model.snapshots
        }

    def see(self, step: Step) -> Iterator[tuple[str, set[str]]]:
        """Run one step; yield the events it makes."""
        before, was = self.facts(), self.was(step)
        refused = False
        try:
            self.guide.do(step)
        except OSError:
            refused = True
        after = self.facts()
        names = getattr(self, f"after_{step[0]}", self.nothing)
        for event in names(step, before, after, refused, was):
            yield event, {step[1], "base", *self.changed(before, after)}

    def was(self, step: Step) -> set[str]:
        """Return what there is to say of the device of a step before it."""
        device = self.guide.model.devices.get(step[1]) if len(step) > 1 else None
        if device is None:
            return set()
        words = {"waiting"} if device.inactive is not None else set()
        return words | ({"merging"} if self.guide.merges(step[1]) else set())

    @staticmethod
    def changed(before: dict[int, Facts], after: dict[int, Facts]) -> set[str]:
        return {fact.device for key, fact in after.items() if before.get(key) != fact}

    def nothing(self, *_: object) -> Iterator[str]:
        return iter(())

    def after_create(self, step, before, after, refused, was) -> Iterator[str]:
        if refused:
            yield "a table refused"
            return
        if step[1] == "base-real":
            live = self.guide.model.devices["base-real"].live or []
            yield ORIGINS[" ".join(target.kind for target in live)]
        for key in after.keys() - before.keys():
            new = after[key]
            if new.state != "Invalid" and new.target.store.chunk:
                yield f"a store {new.letter}"
                yield f"chunks of {new.target.store.chunk}"
            if kinds := {t.kind for t in getattr(new.target.cow, "live", None) or []}:
                yield f"a store on a device{' with a bad place' * ('error' in kinds)}"
            if new.state == "Invalid":
                yield "an invalid store opened"
            elif new.exceptions:
                yield "a store opened again"
            if new.target.length * 512 < new.target.origin.size:
                yield "a snapshot shorter than its origin"
            if len(self.guide.model.devices[new.device].live or []) > 1:
                yield "a snapshot with another target behind it"
            if new.target.kind == "snapshot-merge":
                yield "a merge stopped, then begun again from disk"
            if any(fact.device == new.target.origin.label for fact in after.values()):
                yield "a snapshot of a snapshot"

    def after_reload(self, step, before, after, refused, was) -> Iterator[str]:
        if refused:
            yield "a table refused"

    def after_resume(self, step, before, after, refused, was) -> Iterator[str]:
        if refused:
            yield "a resume refused"
            return
        target = (self.guide.model.devices[step[1]].live or [None])[0]
        fact = after.get(id(target))
        if fact is None:
            if "merging" in was:
                yield "a merge ended"
            elif "waiting" in was and step[1] in ("base", "base-real"):
                yield "an origin's table swapped"
        elif before[id(target)].active and isinstance(target, Merge) and "waiting" not in was:
            yield "a merge stopped, then resumed"
        elif not before[id(target)].active:
            sources = [
                each
                for key, each in before.items()
                if key != id(target) and each.target.cow is fact.target.cow
            ]
            yield from self.taken_over(fact, sources)
            if fact.target.kind == "snapshot-merge":
                yield from self.merged((sources or [before[id(target)]])[0], before, after)
                yield f"a merge {'by handover' if sources else 'from disk'}"

    def taken_over(self, fact: Facts, sources: list[Facts]) -> Iterator[str]:
        for source in sources:
            if source.ended:
                yield "a full or invalid store handed over"
            if fact.target.kind == "snapshot" and source.device == fact.device:
                yield f"a store reloaded, {source.letter} to {fact.letter}"
            elif fact.target.kind == "snapshot":
                yield "a store moved to another device"

    def merged(self, old: Facts, before, after) -> Iterator[str]:
        if old.state == "Invalid":
            yield "a merge of an invalid store"
            return
        label, failed = old.target.cow.label, self.guide.model.devices["base"].live[0].merge_failed
        if failed:
            self.failed.add(label)
            yield "a merge failed"
            return
        if label in self.failed:
            self.failed.remove(label)
            yield "a merge that had failed"
        siblings = [
            (before[key], fact)
            for key, fact in after.items()
            if key in before and fact.active and fact.target.origin is old.target.origin
            and fact.target.cow is not old.target.cow
        ]  # fmt: skip
        copied = sum(now.exceptions > then.exceptions for then, now in siblings)
        if copied:
            yield f"a merge copied for {copied} sibling{'s' * (copied > 1)}"
        if any(now.ended and not then.ended for then, now in siblings):
            yield "full by a merge"
        if old.exceptions and not copied:
            yield "a merge that left exceptions to nobody"
        if old.areas > 1:
            yield "a merge through several areas"

    def after_remove(self, step, before, after, refused, was) -> Iterator[str]:
        if refused:
            return
        gone = [fact for key, fact in before.items() if key not in after and fact.active]
        if gone:
            yield "a snapshot removed"
        if any(
            before[key].state != "Invalid" and fact.state == "Invalid"
            for key, fact in after.items()
        ):
            yield "a handover cancelled"

    def after_rename(self, step, before, after, refused, was) -> Iterator[str]:
        if not refused:
            yield "a snapshot renamed"

    def after_clear(self, step, before, after, refused, was) -> Iterator[str]:
        if len(after) < len(before):
            yield "an inactive table cleared"

    def after_w(self, step, before, after, refused, was) -> Iterator[str]:
        copied = 0
        for key, now in after.items():
            then = before[key]
            own = now.device == step[1]
            copied += now.exceptions > then.exceptions and not own
            if own and now.exceptions > then.exceptions:
                yield "an own write copied"
            if then.state == "Overflow" and now.state == "Invalid":
                yield "PO invalid after overflow"
            elif now.ended and not then.ended and then.room:
                yield f"an {'own' if own else 'origin'} write that met a bad place"
            elif now.ended and not then.ended:
                yield f"{now.letter} full by an {'own' if own else 'origin'} write"
        if step[1] == "base" and copied:
            yield f"an origin write copied for {copied}"

    def after_d(self, step, before, after, refused, was) -> Iterator[str]:
        if refused:
            yield "a discard refused"
            return
        target = (self.guide.model.devices[step[1]].live or [None])[0]
        if isinstance(target, Merge):
            yield "a discard during a merge"
        elif isinstance(target, Snapshot):
            first, last = step[2] // target.unit, (step[2] + step[3] - 1) // target.unit
            inside = any(chunk in target.exceptions for chunk in range(first, last + 1))
            yield f"a discard {'in the store' if inside else 'of what is not in the store'}"
            if FEATURES[-1].split()[-1] in target.features:
                yield "a discard passed down"


def crossings(program: Program) -> Counter[str]:
    """Count the stores that a part of a program takes over from another part, and what for.

    "opened": with exceptions in it; "continued": with more of them later; "merged".
    """
    witness = Witness(program)
    part = 0
    lived: dict[str, int] = {}
    taken: dict[str, int] = {}
    found: Counter[str] = Counter()
    for step in program.steps:
        part += step == ["mark"]
        before = {fact.target.cow.label: fact for fact in witness.facts().values()}
        for _ in witness.see(step):
            pass
        if step == ["mark"]:
            found["continued"] += sum(count > 0 for count in taken.values())
            taken = {}
        for fact in witness.facts().values():
            label = fact.target.cow.label
            if label not in before and fact.exceptions and lived.get(label, part) < part:
                found["opened"] += 1
                taken[label] = 0
            elif label in taken and label in before:
                taken[label] += max(0, fact.exceptions - before[label].exceptions)
                merging = fact.target.kind == "snapshot-merge" and before[label].exceptions
                found["merged"] += bool(merging and not fact.exceptions)
            lived[label] = part
    found["continued"] += sum(count > 0 for count in taken.values())
    return found


class Tally:
    """Counts the events of many programs; `followed` are those with reads or writes behind them."""

    def __init__(self) -> None:
        self.programs = 0
        self.steps = 0
        self.times: Counter[str] = Counter()
        self.within: Counter[str] = Counter()
        self.followed: Counter[str] = Counter()

    def watch(self, program: Program) -> None:
        """Count what one program does."""
        witness = Witness(program)
        waiting: list[tuple[str, set[str]]] = []
        seen: set[str] = set()
        for step in program.steps:
            if step[0] in ("r", "w", "d"):
                self.followed.update(event for event, devices in waiting if step[1] in devices)
                waiting = [each for each in waiting if step[1] not in each[1]]
            for event, devices in witness.see(step):
                self.times[event] += 1
                seen.add(event)
                waiting.append((event, devices))
        self.within.update(seen)
        self.programs += 1
        self.steps += len(program.steps)

    def lacking(self) -> list[str]:
        """Return the events that did not occur, or without any I/O behind them."""
        return [event for event in EVENTS if not self.followed[event]]

    def lines(self) -> list[str]:
        """Return a table: event, how often, in how many programs, how often with I/O behind it."""
        assert set(self.times) <= set(EVENTS), set(self.times) - set(EVENTS)
        head = f"{'event':44}{'times':>8}{'programs':>10}{'then I/O':>10}"
        return [head] + [
            f"{event:44}{self.times[event]:8}{self.within[event]:10}{self.followed[event]:10}"
            for event in EVENTS
        ]


def main(count: int = 1000, first: int = 0) -> None:
    tally = Tally()
    for seed in range(first, first + count):
        tally.watch(Author(seed).write())
    print("\n".join(tally.lines()))
    print(f"{tally.programs} programs, {tally.steps} steps")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
