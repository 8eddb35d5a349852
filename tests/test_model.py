"""Random programs on the engine and on the model: every byte and every line agrees after each step.

A program is a list of operations in plain values, so that a failing one can be printed, shrunk
and pasted into a test. Tables name images as @b, @c0 …
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SECTOR, count, fill, trace, wait_merge
from support.model import Merge, Model, Nonsense, Snapshot
from support.shrink import shrink

import cow

Op = tuple[Any, ...]
Images = dict[str, tuple[int, int]]

CHUNKS = (1, 1, 2, 4, 8, 16)
FEATURES = ("", "", " 1 discard_zeroes_cow", " 2 discard_zeroes_cow discard_passdown_origin")
MAPPER_VERBS = frozenset(
    ("create", "load", "resume", "suspend", "clear", "remove", "rename", "set_uuid")
)
COW_IMAGES = ("c0", "c1", "c2", "c3")


# --- running a program --------------------------------------------------------------------------


class Difference(AssertionError):
    """Engine and model do not agree; `kind` tells one disagreement from another."""

    def __init__(self, text: str, kind: str = "answer") -> None:
        super().__init__(text)
        self.kind = kind


class World:
    """The same images and devices twice: in the engine, and in the model."""

    def __init__(self, folder: Path, images: Images, durability: str) -> None:
        self.paths = {name: str(folder / f"{name}.img") for name in images}
        self.durability = durability
        contents = {}
        for name, (size, seed) in images.items():
            contents[self.paths[name]] = fill(size, seed) if seed else bytes(size)
            Path(self.paths[name]).write_bytes(contents[self.paths[name]])
        self.model = Model(contents)
        self.dm = cow.Mapper(durability=durability)

    def close(self) -> None:
        self.dm.close()

    def table(self, text: str) -> str:
        return re.sub(r"@(\w+)", lambda word: self.paths[word[1]], text)

    def run(self, program: list[Op]) -> None:
        """Run a program; raise Difference at the first step where the two do not agree."""
        for number, op in enumerate(program):
            try:
                expected = outcome(lambda op=op: self.model_do(*op))
            except Nonsense:
                continue
            answer = outcome(lambda op=op: self.engine_do(*op))
            where = f"step {number} {op}"
            if answer != expected:
                raise Difference(f"{where}: {short(answer)}, model {short(expected)}")
            self.compare(where)

    def model_do(self, verb: str, *args: Any) -> Any:
        """Do one operation in the model."""
        if verb in MAPPER_VERBS:
            return getattr(self.model, verb)(*[self.table(word) for word in args])
        return getattr(self, f"model_{verb}")(*args)

    def engine_do(self, verb: str, *args: Any) -> Any:
        """Do one operation in the engine, to the end of the merges it starts."""
        if verb not in MAPPER_VERBS:
            return getattr(self, f"engine_{verb}")(*args)
        getattr(self.dm, verb)(*[self.table(word) for word in args])
        self.settle()
        return None

    def settle(self) -> None:
        """Wait for the merges that a resume started."""
        for name in self.dm.names():
            if " snapshot-merge " in self.dm.status(name) and not self.dm.info(name).suspended:
                wait_merge(self.dm, name)

    def model_read(self, name: str, offset: int, length: int) -> bytes:
        return self.model.device(name).pread(length, offset)

    def engine_read(self, name: str, offset: int, length: int) -> bytes:
        return self.dm.device(name).pread(length, offset)

    def model_write(self, name: str, offset: int, length: int, seed: int) -> int:
        return self.model.device(name).pwrite(fill(length, seed), offset)

    def engine_write(self, name: str, offset: int, length: int, seed: int) -> int:
        return self.dm.device(name).pwrite(fill(length, seed), offset)

    def model_write_zeroes(self, name: str, offset: int, length: int) -> None:
        self.model.device(name).write_zeroes(offset, length)

    def engine_write_zeroes(self, name: str, offset: int, length: int) -> None:
        self.dm.device(name).write_zeroes(offset, length)

    def model_discard(self, name: str, offset: int, length: int) -> None:
        self.model.device(name).discard_range(offset, length)

    def engine_discard(self, name: str, offset: int, length: int) -> None:
        self.dm.device(name).discard(offset, length)

    def model_flush(self, name: str) -> None:
        self.model.device(name).flush()

    def engine_flush(self, name: str) -> None:
        self.dm.device(name).flush()

    def model_write_many(self, name: str, offsets: list[int], size: int, seed: int) -> None:
        data = [fill(size, seed + index) for index in range(len(offsets))]
        self.model.device(name).write_many(offsets, data)

    def engine_write_many(self, name: str, offsets: list[int], size: int, seed: int) -> None:
        rows = b"".join(fill(size, seed + index) for index in range(len(offsets)))
        data = np.frombuffer(rows, np.uint8).reshape(len(offsets), size)
        self.dm.device(name).write_many(np.array(offsets, np.uint64), data)

    def model_read_many(self, name: str, offsets: list[int], size: int) -> list[bytes]:
        return self.model.device(name).read_many(offsets, size)

    def engine_read_many(self, name: str, offsets: list[int], size: int) -> list[bytes]:
        rows = self.dm.device(name).read_many(np.array(offsets, np.uint64), size)
        return [row.tobytes() for row in rows]

    def model_wipe(self, image: str, seed: int) -> None:
        label = self.paths[image]
        self.model.wipe(label, wiped(self.model.images[label].size, seed))

    def engine_wipe(self, image: str, seed: int) -> None:
        path = Path(self.paths[image])
        data = wiped(path.stat().st_size, seed)
        with path.open("r+b") as file:
            file.write(data)

    def model_reopen(self) -> None:
        self.model.close()

    def engine_reopen(self) -> None:
        self.dm.close()
        self.dm = cow.Mapper(durability=self.durability)

    # what is compared after each step

    def compare(self, where: str) -> None:
        """Compare names, states, lines, the bytes of every device and the bytes on disk."""
        same(where, "names", list(self.dm.names()), sorted(self.model.devices))
        for name in sorted(self.model.devices):
            for slot in (False, True):
                for verb in ("status", "table"):
                    mine = getattr(self.dm, verb)(name, inactive=slot)
                    theirs = getattr(self.model, verb)(name, inactive=slot)
                    same(where, f"{verb} of {name}", mine, theirs)
            info = self.dm.info(name)
            for field, value in vars(self.model.info(name)).items():
                same(where, f"{field} of {name}", getattr(info, field), value)
            self.compare_bytes(where, name)
        for label, image in self.model.images.items():
            data = Path(label).read_bytes()
            known = image.size if image.known is None else image.known
            same_bytes(where, f"image {Path(label).name}", data[:known], bytes(image.data[:known]))

    def compare_bytes(self, where: str, name: str) -> None:
        size = self.model.devices[name].size
        try:
            expected = outcome(lambda: self.model.device(name).pread(size, 0))
        except Nonsense:
            return
        answer = outcome(lambda: self.dm.device(name).pread(size, 0))
        if isinstance(answer, bytes) and isinstance(expected, bytes):
            same_bytes(where, f"device {name}", answer, expected)
        else:
            same(where, f"reading {name}", answer, expected)


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or ("errno", N) where it fails as the kernel fails."""
    try:
        return call()
    except OSError as error:
        return ("errno", error.errno)


def wiped(size: int, seed: int) -> bytes:
    """Return an image of old data whose first sector is zero, so that a store starts afresh."""
    return bytes(SECTOR) + fill(size, seed)[SECTOR:]


def short(value: Any) -> str:
    """Show a value in a few words."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)[:300]


def same(where: str, what: str, mine: Any, model: Any) -> None:
    if mine != model:
        text = f"{where}: {what} is {short(mine)}, model {short(model)}"
        raise Difference(text, what.split(" ", maxsplit=1)[0])


def same_bytes(where: str, what: str, mine: bytes, model: bytes) -> None:
    """Compare bytes; a difference is told by the sectors where it begins and ends."""
    if mine == model:
        return
    same(where, f"length of {what}", len(mine), len(model))
    wrong = np.flatnonzero(np.frombuffer(mine, np.uint8) != np.frombuffer(model, np.uint8))
    raise Difference(
        f"{where}: {what} differs in {len(wrong)} bytes from {wrong[0]} "
        f"(sector {wrong[0] // SECTOR}) to {wrong[-1]}",
        what.split(" ", maxsplit=1)[0],
    )


# --- making a program ---------------------------------------------------------------------------


class Author:
    """Writes a random program, running it on a model of its own to know what makes sense."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        rng = self.rng
        self.sectors = rng.choice((64, 96, 100, 128, 200, 201))
        self.images: Images = {"b": (self.sectors * SECTOR, 1), "d": (256 * SECTOR, 2)}
        for name in COW_IMAGES:
            sectors = rng.choice((33, 34, 35, 36, 68, 69, 70, 37, 64, 130, 200, 300, 400))
            self.images[name] = (sectors * SECTOR, 0)
        self.model = Model(
            {
                f"@{name}": fill(size, seed) if seed else bytes(size)
                for name, (size, seed) in self.images.items()
            }
        )
        self.program: list[Op] = []

    def write(self, steps: int) -> list[Op]:
        """Return a program of at least `steps` operations."""
        self.stack()
        while len(self.program) < steps:
            for op in self.next_ops():
                self.add(op)
        return self.program

    def add(self, op: Op) -> None:
        """Append an operation and let the model do it."""
        self.program.append(op)
        verb, *args = op
        try:
            if verb in ("write", "write_zeroes", "discard", "write_many"):
                self.change(verb, *args)
            elif verb == "wipe":
                label = f"@{args[0]}"
                self.model.wipe(label, wiped(self.model.images[label].size, args[1]))
            elif verb == "reopen":
                self.model.close()
                self.stack()
            elif verb not in ("read", "read_many", "flush"):
                getattr(self.model, verb)(*args)
        except (OSError, Nonsense):
            pass

    def change(self, verb: str, name: str, *args: Any) -> None:
        device = self.model.device(name)
        if verb == "write":
            device.pwrite(fill(args[1], args[2]), args[0])
        elif verb == "write_zeroes":
            device.write_zeroes(*args)
        elif verb == "discard":
            device.discard_range(*args)
        else:
            offsets, size, seed = args
            data = [fill(size, seed + index) for index in range(len(offsets))]
            device.write_many(offsets, data)

    def stack(self) -> None:
        """Put the origin on the images: base-real in one piece or several, base over it."""
        total = self.sectors
        kind = self.rng.randrange(3)
        if kind == 0:
            table = f"0 {total} linear @b 0"
        elif kind == 1:
            table = f"0 32 linear @b {total - 32}\n32 {total - 32} linear @b 0"
        else:
            table = (
                f"0 16 linear @b 4\n16 32 striped 2 4 @b 40 @d 8\n48 8 zero\n"
                f"56 {total - 56} linear @d 100"
            )
        self.add(("create", "base-real", table))
        self.add(("create", "base", f"0 {total} snapshot-origin base-real"))

    # what there is

    def snapshots(self) -> list[Snapshot]:
        """Return the live snapshot targets, those of the merge included."""
        return [
            target
            for device in self.model.devices.values()
            for target in device.live or []
            if isinstance(target, Snapshot)
        ]

    def free_cows(self) -> list[str]:
        used = {snapshot.cow.label for snapshot in self.model.snapshots}
        return [name for name in COW_IMAGES if f"@{name}" not in used]

    def snapshot_names(self) -> list[str]:
        return sorted({s.device.label for s in self.snapshots() if not isinstance(s, Merge)})

    def open_names(self) -> list[str]:
        """Return the devices that can be read and written now."""
        names = []
        for name, device in sorted(self.model.devices.items()):
            if device.size and not any(each.suspended for each in device.below()):
                names.append(name)
        return names

    def letters(self) -> str:
        return self.rng.choice(("P", "P", "PO", "N"))

    def features(self) -> str:
        return self.rng.choice(FEATURES)

    # one choice, a few operations

    def next_ops(self) -> Iterator[Op]:
        choices = {
            self.io: 50,
            self.new_snapshot: 8,
            self.drop_snapshot: 4,
            self.reopen_snapshot: 4,
            self.reload_snapshot: 4,
            self.move_snapshot: 2,
            self.stack_snapshot: 2,
            self.merge_snapshot: 4,
            self.end_merge: 3,
            self.wipe: 3,
            self.pause: 3,
            self.go_on: 4,
            self.nonsense: 3,
            self.name: 1,
            self.reopen: 1,
        }
        yield from self.rng.choices(list(choices), list(choices.values()))[0]()

    def io(self) -> Iterator[Op]:
        names = self.open_names()
        if not names:
            yield from self.go_on()
            return
        favoured = [name for name in names if name != "base-real"] or names
        rng, name = self.rng, self.rng.choice(favoured)
        size = self.model.devices[name].size
        unit = rng.choice((1, SECTOR, SECTOR, 8 * SECTOR))
        offset = rng.randrange(size // unit) * unit
        limit = min(size - offset, rng.choice((SECTOR, 4096, 8192, 32768)))
        length = max(1, rng.randint(1, max(1, limit // unit)) * unit)
        length = min(length, size - offset)
        kind = rng.randrange(20)
        seed = rng.randrange(1, 1000)
        if kind < 11:
            yield ("write", name, offset, length, seed)
        elif kind < 12:
            yield ("write_zeroes", name, offset, length)
        elif kind < 14:
            first = offset // SECTOR * SECTOR
            count = min(-(-length // SECTOR) * SECTOR, size - first)
            yield ("discard", name, first, count)
        elif kind < 15:
            yield ("flush", name)
        elif kind < 16:
            yield ("read", name, offset, length + rng.choice((0, 0, size)))
        elif kind < 17:
            yield ("write", name, size - length + 1, length, seed)
        else:
            each = min(rng.choice((SECTOR, 1024, 4096)), size)
            offsets = [
                rng.randrange((size - each) // SECTOR + 1) * SECTOR
                for _ in range(rng.randint(1, 6))
            ]
            if kind == 17:
                yield ("read_many", name, offsets, each)
            elif self.odd_lengths():
                for offset in offsets:
                    yield ("write", name, offset, each, seed)
            else:
                yield ("write_many", name, offsets, each, seed)

    def odd_lengths(self) -> bool:
        """Tell whether a snapshot ends inside a chunk.

        There the bytes of its last copy beyond its end depend on the order inside a batch of
        writes or of merge runs.
        """
        return any(s.length % 16 and s.length < self.sectors for s in self.model.snapshots)

    def new_snapshot(self) -> Iterator[Op]:
        cows = self.free_cows()
        if not cows or "base" not in self.model.devices:
            return
        rng, image = self.rng, self.rng.choice(cows)
        name = next(n for n in ("s0", "s1", "s2", "s3", "s4") if n not in self.model.devices)
        length = self.sectors if rng.random() < 0.7 else rng.randint(8, self.sectors)
        letter = self.letters()
        chunk = rng.choice(CHUNKS if letter == "N" else (*CHUNKS, 0))
        table = f"0 {length} snapshot base-real @{image} {letter} {chunk}{self.features()}"
        quiet = rng.random() < 0.7
        if quiet:
            yield ("suspend", "base")
        yield ("create", name, table)
        if quiet:
            yield ("resume", "base")

    def drop_snapshot(self) -> Iterator[Op]:
        if names := self.snapshot_names():
            yield ("remove", self.rng.choice(names))

    def one(self) -> Snapshot | None:
        names = self.snapshot_names()
        if not names:
            return None
        live = self.model.devices[self.rng.choice(names)].live
        assert live is not None
        return live[0] if isinstance(live[0], Snapshot) else None

    def again(self, target: Snapshot, letter: str) -> str:
        """Return a table for the COW device of `target` once more, with other words around it."""
        chunk = target.store.chunk if letter == "N" else self.rng.choice((0, *CHUNKS))
        return (
            f"0 {target.length} snapshot {target.origin.label} {target.cow.label} "
            f"{letter} {chunk}{self.features()}"
        )

    def reopen_snapshot(self) -> Iterator[Op]:
        """Remove a snapshot and create it again from its COW device."""
        target = self.one()
        if target is not None:
            letter = "N" if target.store.letter == "N" else self.rng.choice(("P", "PO"))
            yield ("remove", target.device.label)
            yield ("create", target.device.label, self.again(target, letter))

    def reload_snapshot(self) -> Iterator[Op]:
        """Load the same COW device over itself; the exceptions are handed over at resume."""
        target = self.one()
        if target is not None and target.store.chunk:
            letter = "N" if target.store.letter == "N" else self.rng.choice(("P", "PO"))
            name = target.device.label
            yield ("load", name, self.again(target, letter))
            yield self.rng.choice((("clear", name), ("resume", name), ("resume", name)))

    def move_snapshot(self) -> Iterator[Op]:
        """Hand the exceptions over to another device, which may ask too early."""
        target = self.one()
        if target is None or not target.store.chunk or "moved" in self.model.devices:
            return
        name = target.device.label
        yield ("create", "moved", f"0 {target.length} zero")
        yield ("load", "moved", self.again(target, target.store.letter))
        if self.rng.random() < 0.3:
            yield ("resume", "moved")
        if self.rng.random() < 0.2:
            yield ("remove", name)
        yield ("suspend", name)
        yield ("resume", "moved")
        if self.rng.random() < 0.5:
            yield ("resume", name)
        yield ("remove", name)

    def stack_snapshot(self) -> Iterator[Op]:
        """Put a snapshot on a snapshot."""
        cows = self.free_cows()
        target = self.one()
        if not cows or target is None or "t" in self.model.devices:
            return
        name = target.device.label
        letter = self.rng.choice(("P", "N"))
        table = f"0 {target.length} snapshot {name} @{self.rng.choice(cows)} {letter} "
        yield ("create", "o", f"0 {target.length} snapshot-origin {name}")
        yield ("create", "t", table + str(self.rng.choice(CHUNKS)))

    def merge_snapshot(self) -> Iterator[Op]:
        """Merge a snapshot into base, from disk or by handover."""
        persistent = [
            target
            for target in self.snapshots()
            if target.origin.label == "base-real"
            and target.store.letter != "N"
            and target.kind == "snapshot"
            and target.store.chunk
        ]
        if not persistent or self.odd_lengths():
            return
        target = self.rng.choice(persistent)
        name = target.device.label
        table = f"0 {self.sectors} snapshot-merge base-real {target.cow.label} P "
        table += f"{target.store.chunk}{self.features()}"
        if self.rng.random() < 0.5:
            yield ("suspend", "base")
            yield ("remove", name)
            yield ("load", "base", table)
            yield ("resume", "base")
        else:
            yield ("load", "base", table)
            yield ("suspend", name)
            yield ("suspend", "base")
            yield ("resume", "base")
            yield ("resume", name)
            yield ("remove", name)

    def end_merge(self) -> Iterator[Op]:
        if any(isinstance(target, Merge) for target in self.model.devices["base"].live or []):
            yield ("load", "base", f"0 {self.sectors} snapshot-origin base-real")
            yield ("resume", "base")

    def wipe(self) -> Iterator[Op]:
        if cows := self.free_cows():
            yield ("wipe", self.rng.choice(cows), self.rng.randrange(1, 100))

    def pause(self) -> Iterator[Op]:
        if names := self.snapshot_names():
            yield ("suspend", self.rng.choice(names))

    def go_on(self) -> Iterator[Op]:
        for name, device in sorted(self.model.devices.items()):
            if device.suspended:
                yield ("resume", name)

    def nonsense(self) -> Iterator[Op]:
        """Yield something that is refused, and must change nothing."""
        yield self.rng.choice(
            (
                ("remove", "base-real"),
                ("remove", "nosuch"),
                ("create", "base", "0 8 zero"),
                ("create", "gap", "0 8 zero\n9 8 zero"),
                ("create", "bad", "0 8 snapshot base-real @c0 P 7"),
                ("load", "base", "0 8 nosuch"),
                ("load", "base", "0 8 snapshot-origin nosuch"),
                ("load", "base", f"0 {self.sectors} snapshot-merge base-real @c0 N 8"),
                ("resume", "nosuch"),
                ("rename", "base", "base-real"),
            )
        )

    def name(self) -> Iterator[Op]:
        if names := [
            n for n in self.snapshot_names() if not self.model.users(self.model.devices[n])
        ]:
            name = self.rng.choice(names)
            yield self.rng.choice((("rename", name, f"{name}x"), ("set_uuid", name, f"U-{name}")))

    def reopen(self) -> Iterator[Op]:
        yield ("reopen",)


def check(seed: int, folder: Path, durability: str, steps: int) -> None:
    """Run the program of `seed`; where engine and model differ, fail with a shorter program."""
    author = Author(seed)
    program = author.write(steps)
    runs = 0

    def difference(ops: list[Op]) -> Difference | None:
        nonlocal runs
        runs += 1
        place = folder / str(runs)
        place.mkdir()
        world = World(place, author.images, durability)
        try:
            world.run(ops)
        except Difference as error:
            return error
        finally:
            world.close()
            shutil.rmtree(place)
        return None

    count("random programs compared with the model")
    count("operations of random programs compared with the model", len(program))
    if first := difference(program):
        least = shrink(
            program, lambda ops: (found := difference(ops)) is not None and found.kind == first.kind
        )
        lines = "".join(f"    {op!r},\n" for op in least)
        raise AssertionError(
            f"seed {seed}: {first}\nshrunk: {difference(least)}\n"
            f"images = {author.images}\nprogram = [\n{lines}]"
        )


# --- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", trace.names())
def test_the_model_answers_a_kernel_trace_as_the_kernel_did(name):
    golden = trace.load(name)
    images = trace.contents(golden)
    model = Model(images)
    trace.Replayer(golden, model, {image: image for image in images}, "nosuch").run()
    trace.compare_final(golden, {image: bytes(model.images[image].data) for image in images})


@pytest.mark.parametrize("number", range(30))
def test_a_program_does_what_the_model_does(number, tmp_path):
    check(number, tmp_path, "process", 80)


@pytest.mark.parametrize("number", range(30))
def test_a_new_program_does_what_the_model_does(number, seed, tmp_path):
    check((seed << 8) + number, tmp_path, "process", 80)


@pytest.mark.parametrize("number", range(1000, 1004))
def test_a_program_with_power_durability_does_what_the_model_does(number, tmp_path):
    check(number, tmp_path, "power", 50)


def test_a_long_program_does_what_the_model_does(seed, tmp_path):
    check(seed, tmp_path, "process", 400)


def test_shrinking_keeps_only_the_operations_that_fail_together():
    program = list(range(50))
    assert shrink(program, lambda ops: 7 in ops and 31 in ops) == [7, 31]
