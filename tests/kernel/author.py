"""Who writes random programs for the real kernel: what is asked of it, and how often.

Everything is drawn from one random.Random of the program's own seed, and nothing else: the same
seed gives the same program on every machine, as long as this module and the model stay as they are.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import support
from support import SECTOR
from support.model import Merge, Model, Nonsense, Snapshot

from . import places
from .programs import Guide, Program, Step

STEPS = 60
COWS = ("c0", "c1", "c2", "c3")
FEATURES = ("", "", " 1 discard_zeroes_cow", " 2 discard_zeroes_cow discard_passdown_origin")
LARGEST_REQUEST = 2 << 20
LARGEST_CHUNKS = (
    (1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16)
    + (32, 32, 64, 64, 128, 128, 256, 256)
    + (512, 1024, 2048)
)
"""Sectors: one is drawn for a program, whose chunks are that large or up to 16 times smaller."""


def version() -> str:
    """Return a few letters that change with whatever a program of the same seed depends on."""
    here, there = Path(__file__).parent, Path(support.__file__).parent
    files = [here / f"{name}.py" for name in ("author", "places", "programs")]
    files += (there / "model.py", there / "__init__.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


class Author:
    """Writes one program for a seed. The first of its dice decides how large the chunks are."""

    def __init__(self, seed: int, parts: int = 1) -> None:
        self.rng = rng = random.Random(seed)
        self.largest = rng.choice(LARGEST_CHUNKS)
        self.chunks = [c for c in (self.largest >> n for n in range(5)) if c]
        count = rng.randint(4, 9) if self.huge else rng.randint(8, 40)
        self.sectors = max(64, self.largest * count) + rng.choice((0, 0, rng.randrange(40)))
        self.pieces, self.mended = places.below_an_origin(rng, self.sectors, self.largest)
        images = {"b": (self.sectors * SECTOR, 1), "d": ((self.sectors + 64) * SECTOR, 2)}
        for name in COWS:
            images[name] = (places.store_sectors(rng, self.largest) * SECTOR, rng.choice((0, 0, 3)))
        self.beds = {
            name: places.below_a_store(rng, f"@{name}", images[name][0] // SECTOR, self.largest)
            for name in COWS
        }
        self.flawed = "error" in f"{self.pieces}{self.beds}"
        self.program = Program(seed, images)
        self.guide = Guide(self.program)
        self.parts = parts
        for name in COWS:
            if images[name][1]:
                self.add(["wipe", f"@{name}"])

    @property
    def model(self) -> Model:
        return self.guide.model

    @property
    def huge(self) -> bool:
        """Whether there are chunks so large that a program of many steps takes long."""
        return self.largest >= 512

    def write(self, steps: int = STEPS) -> Program:
        """Return a program of about that many steps, or half of them where chunks are huge."""
        steps = steps // 2 if self.huge else steps
        for part in range(self.parts):
            if part:
                self.take_apart()
                self.add(["mark"])
            self.put_together()
            for _ in range(self.rng.randint(1, 2 if places.bad_range(self.pieces) else 4)):
                for step in list(self.new_snapshot()):
                    self.add(step)
            end = len(self.program.steps) + steps // self.parts
            while len(self.program.steps) < end:
                self.act()
                if self.rng.random() < 0.5:
                    self.look()
            self.look(whole=True)
        self.program.known = {
            name: self.model.images[f"@{name}"].known
            if self.model.images[f"@{name}"].known is not None
            else size
            for name, (size, _) in self.program.images.items()
        }
        return self.program

    def add(self, step: Step) -> bool:
        """Append a step if it makes sense; return whether it did and was not refused."""
        if step[0] in ("w", "d") and not step[1].startswith("@"):
            step = self.simple(step)
        try:
            self.guide.do(step)
        except Nonsense:
            return False
        except OSError:
            self.program.steps.append(step)
            return False
        self.program.steps.append(step)
        if step[0] == "resume" and self.guide.merges(step[1]):
            for each in self.interrupt(step[1]):
                self.guide.do(each)
                self.program.steps.append(each)
            self.program.steps.append(["waitmerge", step[1]])
        return True

    def simple(self, step: Step) -> Step:
        """Return the step, or one for a single sector if it would end a snapshot half-way, or fail.

        How much of such a request is done is not determined, nor how many chunks are copied before;
        nor the order in which the chunks of one request reach a snapshot below an origin.
        """
        if step[:2] == ["w", "o"]:
            unit = min((s.unit for s in self.guide.snapshots() if s.unit), default=SECTOR)
            step = [*step[:3], min(step[3], unit - step[2] % unit), step[4]]
        near = [
            s
            for s in self.guide.snapshots()
            if s.status().count("/") == 1 and self.free(s) * s.unit <= step[3] + 4 * s.unit
        ]
        live = getattr(self.model.devices.get(step[1]), "live", None) or []
        if not near and not self.flawed and len(live) < 2:
            return step
        twin, failed = copy.deepcopy(self.guide), False
        before = twin.states()
        try:
            twin.do(step)
        except OSError:
            failed = True
        except Nonsense:
            pass
        if twin.states() == before and not failed:
            return step
        if step[0] == "w":
            return [*step[:3], SECTOR, step[4]]
        return [*step[:3], SECTOR]

    @staticmethod
    def free(snapshot: Snapshot) -> int:
        """Return how many chunks a store still has, data and metadata alike."""
        used, total = snapshot.status().split(" ")[0].split("/")
        return (int(total) - int(used)) // max(1, snapshot.store.chunk)

    # the stack, and its end

    def put_together(self) -> None:
        """Put the origin on its images: base-real of one piece or several, base over it."""
        self.add(["create", "base-real", self.pieces])
        self.add(["create", "base", f"0 {self.sectors} snapshot-origin %base-real"])
        for image in COWS:
            if self.beds[image]:
                self.add(["create", self.bed(image), self.beds[image]])
                if self.magic(image) not in (bytes(4), b"SnAp"):
                    self.add(["wipe", self.bed(image)])
            magic = self.magic(image)
            if magic == b"SnAp" and self.rng.random() < 0.8:
                yielded = self.create(self.free_name(), image, self.rng.choice(("P", "PO")), 0)
                for step in yielded:
                    self.add(step)

    def take_apart(self) -> None:
        """Remove every device, those on top first."""
        for _ in range(len(self.model.devices)):
            for name, device in sorted(self.model.devices.items()):
                if device.inactive is not None:
                    self.add(["clear", name])
                if not self.model.users(device):
                    self.add(["remove", name])
        assert not self.model.devices

    # what there is

    def bed(self, image: str) -> str:
        """Return what a store is on: an image, or a device on it."""
        return f"on-{image}" if self.beds[image] else f"@{image}"

    def magic(self, image: str) -> bytes:
        return self.model.block(self.bed(image)).read(0, 4)

    @staticmethod
    def word(label: str) -> str:
        """Return the word of a table for an image or a device."""
        return label if label.startswith("@") else f"%{label}"

    def free_cows(self) -> list[str]:
        used = {snapshot.cow.label for snapshot in self.model.snapshots}
        return [name for name in COWS if self.bed(name) not in used]

    def free_name(self) -> str:
        return next(n for n in ("s0", "s1", "s2", "s3", "s4") if n not in self.model.devices)

    def snapshot_names(self) -> list[str]:
        """Return the devices that are a snapshot, but not of another snapshot."""
        return sorted(
            {
                s.device.label
                for s in self.guide.snapshots()
                if not isinstance(s, Merge) and s.origin.label == "base-real"
            }
        )

    def open_names(self) -> list[str]:
        """Return the devices that can be read and written now."""
        return [
            name
            for name, device in sorted(self.model.devices.items())
            if device.size and not any(each.suspended for each in device.below())
            if not name.startswith("on-")
        ]

    def one(self) -> Snapshot | None:
        names = self.snapshot_names()
        if not names:
            return None
        target = (self.model.devices[self.rng.choice(names)].live or [None])[0]
        return target if isinstance(target, Snapshot) and target.store.chunk else None

    # a few steps at a time

    def act(self) -> None:
        """Choose what comes next, and add it; then mostly some reads and writes."""
        choices: dict[Callable[[], Iterator[Step]], int] = {
            self.io: 40,
            self.discard: 8,
            self.fill_up: 10,
            self.new_snapshot: 10,
            self.drop_snapshot: 3,
            self.reopen_snapshot: 5,
            self.reload_snapshot: 4,
            self.reload_origin: 2,
            self.move_snapshot: 3,
            self.stack_snapshot: 2,
            self.unstack: 1,
            self.rename_snapshot: 1,
            self.merge_snapshot: 7 if self.parts == 1 else 12,
            self.end_merge: 3,
            self.wipe: 3,
            self.pause: 3,
            self.go_on: 4,
            self.nonsense: 2,
        }
        action = self.rng.choices(list(choices), list(choices.values()))[0]
        actions = [action] if self.guide.snapshots() else [self.new_snapshot, action]
        if action != self.io and self.rng.random() < 0.8:
            actions.append(self.io)
        for each in actions:
            for step in each():
                self.add(step)

    def look(self, whole: bool = False) -> None:
        """Ask for lines, numbers and bytes."""
        rng, names = self.rng, sorted(self.model.devices)
        self.add(["status"])
        if whole or rng.random() < 0.3:
            self.add([rng.choice(("table", "table", "inactive"))])
        for name in names if whole else rng.sample(names, min(1, len(names))):
            self.add(["info", name])
        open_names = self.open_names()
        for name in open_names if whole else rng.sample(open_names, min(1, len(open_names))):
            for step in self.read(name, whole or rng.random() < 0.7):
                self.add(step)

    def read(self, name: str, whole: bool = True) -> Iterator[Step]:
        """Read a device up to its end; before, in and after a bad place by themselves."""
        size = self.model.devices[name].size
        start = 0 if whole else self.rng.randrange(size // SECTOR) * SECTOR
        for edge in (*(places.bad_range(self.pieces) or ()), size // SECTOR):
            if start < edge * SECTOR <= size:
                yield ["r", name, start, edge * SECTOR - start]
                start = edge * SECTOR

    def io(self) -> Iterator[Step]:
        names = [name for name in self.open_names() if name != "base-real"]
        if not names:
            yield from self.go_on()
            return
        rng = self.rng
        for _ in range(rng.randint(1, 4)):
            name = rng.choice(names)
            sectors = self.model.devices[name].size // SECTOR
            unit = rng.choice((1, 8, *self.chunks))
            start = rng.randrange(sectors) // unit * unit
            most = rng.choice((1, unit, unit, 2 * unit, 8 * unit, 5 * self.largest))
            length = rng.randint(1, most) if rng.random() < 0.5 else most
            length = max(1, min(length, sectors - start, LARGEST_REQUEST // SECTOR))
            if rng.random() < 0.85:
                yield ["w", name, start * SECTOR, length * SECTOR, rng.randrange(1, 1000)]
            else:
                yield ["r", name, start * SECTOR, length * SECTOR]

    def discard(self) -> Iterator[Step]:
        """Discard whole chunks, or a part of one: what starts amid a chunk ends with it.

        A discard as long as a chunk that starts amid one zeroes another chunk, too, on all kernels.
        """
        rng, targets = self.rng, self.guide.snapshots()
        names = self.open_names()
        targets = [t for t in targets if t.device.label in names and t.store.chunk]
        able = [t for t in targets if t.features]
        if not targets:
            return
        target = rng.choice(able if able and rng.random() < 0.8 else targets)
        chunk, sectors = target.store.chunk, target.device.size // SECTOR
        start = rng.randrange(sectors)
        if target.exceptions and rng.random() < 0.5:
            inside = rng.choice(list(target.exceptions)) * chunk + rng.randrange(chunk)
            start = min(inside, sectors - 1)
        if rng.random() < 0.6:
            start = start // chunk * chunk
            length = min(sectors - start, chunk * rng.randint(1, 6) - rng.choice((0, 0, 1)))
        else:
            length = rng.randint(1, max(1, min(sectors, (start // chunk + 1) * chunk) - start))
        if length:
            yield ["d", target.device.label, start * SECTOR, length * SECTOR]

    def fill_up(self) -> Iterator[Step]:
        """Write to new chunks, of a snapshot or of its origin, until a small store is full."""
        rng, names = self.rng, self.open_names()
        small = [
            s
            for s in self.guide.snapshots()
            if s.device.label in names
            and s.device.label in self.snapshot_names()
            and "/" in s.status()
            and 0 < self.free(s) <= 32
        ]
        if not small:
            return
        target = rng.choice(small)
        name = target.device.label
        written = "base" if "base" in names and rng.random() < 0.3 else name
        chunks = range(-(-target.length // target.store.chunk))
        new = [chunk for chunk in chunks if chunk not in target.exceptions]
        for chunk in rng.sample(new, min(len(new), self.free(target) + 2)):
            sectors = min(target.store.chunk, target.length - chunk * target.store.chunk)
            length = rng.choice((1, sectors)) * SECTOR
            yield ["w", written, chunk * target.unit, length, rng.randrange(1, 1000)]
        yield ["status"]
        yield from self.read(name)

    def features(self) -> str:
        return self.rng.choice(FEATURES)

    def letter(self) -> str:
        return self.rng.choice(("P", "P", "PO", "PO", "N"))

    def create(
        self, name: str, image: str, letter: str, chunk: int, length: int | None = None
    ) -> Iterator[Step]:
        """Create a snapshot while the origin is suspended."""
        running = [n for n in ("base",) if not self.model.devices[n].suspended]
        cow, length = self.word(self.bed(image)), length or self.sectors
        table = f"0 {length} snapshot %base-real {cow} {letter} {chunk}{self.features()}"
        if self.rng.random() < 0.1:
            # Up to whole chunks: the kernel copies the rest of one while it is written.
            table += f"\n{length} {self.largest - length % self.largest} linear @d 0"
        for each in running:
            yield ["suspend", each]
        yield ["create", name, table]
        for each in running:
            yield ["resume", each]

    def new_snapshot(self) -> Iterator[Step]:
        cows = self.free_cows()
        if not cows or len(self.guide.snapshots()) > 3:
            return
        rng = self.rng
        image = rng.choice(cows)
        letter = self.letter()
        chunk = rng.choice(self.chunks)
        if letter != "N" and self.largest >= 32 and rng.random() < 0.1:
            chunk = 0
        magic = self.magic(image)
        if letter != "N" and magic not in (bytes(4), b"SnAp") and rng.random() < 0.8:
            yield from self.wipe(image)
        length = None
        if chunk and rng.random() < 0.25:
            length = max(1, rng.randint(1, self.sectors // chunk)) * chunk
            length = min(length, self.sectors)
        yield from self.create(self.free_name(), image, letter, chunk, length)

    def drop_snapshot(self) -> Iterator[Step]:
        if names := self.snapshot_names():
            yield ["remove", self.rng.choice(names)]

    def again(self, target: Snapshot, letter: str) -> str:
        """Return a table for the same COW device once more, with other words around it."""
        chunk = target.store.chunk if letter == "N" else self.rng.choice((0, *self.chunks))
        return (
            f"0 {target.length} snapshot %{target.origin.label} {self.word(target.cow.label)} "
            f"{letter} {chunk}{self.features()}"
        )

    def reopen_snapshot(self) -> Iterator[Step]:
        """Remove a snapshot and create it again from its COW device."""
        if target := self.one():
            letter = "N" if target.store.letter == "N" else self.rng.choice(("P", "PO"))
            name, table = target.device.label, self.again(target, letter)
            running = not self.model.devices["base"].suspended
            yield ["remove", name]
            if running:
                yield ["suspend", "base"]
            yield ["create", name, table]
            if running:
                yield ["resume", "base"]

    def reload_snapshot(self) -> Iterator[Step]:
        """Load the same COW device over itself; the exceptions are handed over at resume."""
        if target := self.one():
            letter = "N" if target.store.letter == "N" else self.rng.choice(("P", "PO"))
            name = target.device.label
            yield ["reload", name, self.again(target, letter)]
            yield ["inactive"]
            yield [self.rng.choice(("clear", "resume", "resume")), name]

    def reload_origin(self) -> Iterator[Step]:
        """Swap the origin's table, or the one below it, for one that says the same."""
        if any(isinstance(target, Merge) for target in self.model.devices["base"].live or []):
            return
        tables = {
            "base": f"0 {self.sectors} snapshot-origin %base-real",
            "base-real": places.cut(self.pieces),
        }
        name = self.rng.choice(sorted(tables))
        yield ["reload", name, tables[name]]
        yield ["inactive"]
        yield ["resume", name]
        yield ["table"]

    def move_snapshot(self) -> Iterator[Step]:
        """Hand the exceptions over to another device, which may ask too early."""
        target = self.one()
        if target is None or "moved" in self.model.devices:
            return
        rng, name = self.rng, target.device.label
        yield ["create", "moved", f"0 {target.length} zero"]
        yield ["reload", "moved", self.again(target, target.store.letter)]
        if rng.random() < 0.3:
            yield ["resume", "moved"]
        if rng.random() < 0.2:
            yield ["remove", name]
        yield ["suspend", name]
        yield ["resume", "moved"]
        if rng.random() < 0.5:
            yield ["resume", name]
        yield ["status"]
        yield ["remove", name]

    def stack_snapshot(self) -> Iterator[Step]:
        """Put a snapshot on a snapshot; not over a bad place, which costs ours both."""
        cows, target, bad = self.free_cows(), self.one(), places.bad_range(self.pieces)
        if not cows or target is None or bad or "t" in self.model.devices:
            return
        name, rng = target.device.label, self.rng
        cow = self.word(self.bed(rng.choice(cows)))
        chunk = min(128, rng.choice(self.chunks))  # larger ones: see places.below_an_origin
        words = f"%{name} {cow} {self.letter()} {chunk}"
        # What is passed down through two snapshots comes in pieces as long as the upper chunks;
        # where the lower ones are smaller the kernel zeroes their neighbours (facts, 4.4).
        words += rng.choice(("", " 1 discard_zeroes_cow"))
        yield ["create", "o", f"0 {target.length} snapshot-origin %{name}"]
        yield ["suspend", "o"]
        yield ["create", "t", f"0 {target.length} snapshot {words}"]
        yield ["resume", "o"]

    def unstack(self) -> Iterator[Step]:
        """Remove a snapshot of a snapshot, and its origin."""
        if "t" in self.model.devices:
            yield ["remove", "t"]
            yield ["remove", "o"]

    def merge_snapshot(self) -> Iterator[Step]:
        """Merge a snapshot into base, from disk or by handover."""
        persistent = [
            target
            for target in self.guide.snapshots()
            if target.origin.label == "base-real"
            and target.store.letter != "N"
            and target.kind == "snapshot"
            and target.store.chunk
        ]
        if not persistent:
            return
        target = self.rng.choice(persistent)
        end = self.sectors * SECTOR
        if end % target.unit and any(s.device.size > end for s in self.guide.snapshots()):
            return  # the kernel copies for it from behind the origin, which fails, and loses it
        name = target.device.label
        table = f"0 {self.sectors} snapshot-merge %base-real {self.word(target.cow.label)} P "
        table += f"{target.store.chunk}{self.features()}"
        bad = places.bad_range(self.pieces)
        if bad and len(self.guide.snapshots()) > 1:
            # We give siblings copies for some runs ahead, the kernel for that which fails, only.
            yield from self.mend_origin()
        elif bad and self.rng.random() < 0.7:
            # All of a chunk is written: nothing of the bad place has to be read for it.
            chunk = self.rng.randrange(*bad) // target.store.chunk
            yield ["w", name, chunk * target.unit, target.unit, self.rng.randrange(1, 1000)]
        if self.rng.random() < 0.5:
            yield ["suspend", "base"]
            yield ["remove", name]
            yield ["reload", "base", table]
            yield ["resume", "base"]
        else:
            yield ["reload", "base", table]
            yield ["suspend", name]
            yield ["suspend", "base"]
            yield ["resume", "base"]
            yield ["resume", name]
            yield ["remove", name]
        yield from self.mend(table)

    def mend(self, merge: str) -> Iterator[Step]:
        """Let a merge that failed end: give the origin good images, and merge from disk again.

        How much of what failed reached the origin is not determined, but none of that is seen: it
        is in the store.
        """
        target = (self.model.devices["base"].live or [None])[0]
        if not isinstance(target, Merge) or not target.merge_failed:
            return
        yield ["status"]
        for _ in range(self.rng.randint(1, 3)):
            yield from (step for step in self.io() if step[1] == "base")
        yield from self.mend_origin()
        for table in (f"0 {self.sectors} snapshot-origin %base-real", merge):
            yield ["reload", "base", table]
            yield ["resume", "base"]

    def mend_origin(self) -> Iterator[Step]:
        self.pieces = self.mended
        yield ["reload", "base-real", self.pieces]
        yield ["resume", "base-real"]

    def interrupt(self, name: str) -> Iterator[Step]:
        """Stop a merge that has begun and go on with it, maybe from disk; how far it is, who knows.

        At its end everything is as if nobody had stopped it, which is what the model does.
        """
        (target,) = self.model.devices[name].live or []
        way = self.rng.random() if target.status().count("/") else 1
        if way < 0.3:
            for _ in range(self.rng.randint(1, 3)):
                yield ["suspend", name]
                yield ["resume", name]
        elif way < 0.5 and target.sharing() == (target, None):
            yield ["remove", name]
            words = f"%base-real {self.word(target.cow.label)} P {target.store.chunk}"
            yield ["create", name, f"0 {self.sectors} snapshot-merge {words}"]

    def end_merge(self) -> Iterator[Step]:
        if any(isinstance(target, Merge) for target in self.model.devices["base"].live or []):
            yield ["reload", "base", f"0 {self.sectors} snapshot-origin %base-real"]
            yield ["resume", "base"]

    def wipe(self, image: str = "") -> Iterator[Step]:
        """Let the next store on an image start afresh: zero its first sector.

        An image whose contents are not determined is written anew as a whole.
        """
        if cows := self.free_cows():
            image = image or self.rng.choice(cows)
            name, bed = f"@{image}", self.bed(image)
            size, known = self.model.images[name].size, self.model.images[name].known
            if known is not None:
                if bed != name:
                    yield ["remove", bed]
                for start in range(0, size, LARGEST_REQUEST):
                    yield ["w", name, start, min(LARGEST_REQUEST, size - start), 5]
                if bed != name:
                    yield ["create", bed, self.beds[image]]
            yield ["wipe", bed]

    def rename_snapshot(self) -> Iterator[Step]:
        if names := self.snapshot_names():
            yield ["rename", self.rng.choice(names), self.free_name()]

    def pause(self) -> Iterator[Step]:
        if names := self.snapshot_names():
            yield ["suspend", self.rng.choice(names)]

    def go_on(self) -> Iterator[Step]:
        for name, device in sorted(self.model.devices.items()):
            if device.suspended:
                yield ["resume", name]

    def nonsense(self) -> Iterator[Step]:
        """Yield something that is refused, and must change nothing."""
        yield self.rng.choice(places.refused(self.sectors))
