"""Let the kernel and cow run the same steps, and compare all that can be seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support import SECTOR, count, trace
from support.model import Nonsense
from support.shrink import shrink

import cow

from .programs import Guide, Program, Step, sensible
from .uml import Kernel


class Difference(AssertionError):
    """Kernel and cow do not agree; `kind` tells one disagreement from another."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class Replayer(trace.Replayer):
    """Runs the steps of a random trace on cow; there are more verbs than in the recorded ones."""

    def do_w(self, name: str, offset: int, length: int, seed: int) -> str:
        if not name.startswith("@"):
            return super().do_w(name, offset, length, seed)
        with Path(self.words[name]).open("r+b") as file:
            file.seek(offset)
            return f"w {file.write(trace.fill(length, seed))}"

    def do_wipe(self, name: str) -> list[str]:
        if not name.startswith("@"):
            self.dm.device(name).pwrite(bytes(SECTOR), 0)
            return []
        with Path(self.words[name]).open("r+b") as file:
            file.write(bytes(SECTOR))
        return []

    def do_d(self, name: str, offset: int, length: int) -> list[str]:
        self.dm.device(name).discard(offset, length)
        return []

    def do_rename(self, name: str, new_name: str) -> list[str]:
        self.dm.rename(name, new_name)
        self.devices[self.devices.index(name)] = new_name
        return []

    def do_clear(self, name: str) -> list[str]:
        self.dm.clear(name)
        return []

    def do_waitmerge(self, name: str) -> list[str]:
        # Not by its status: that of a store which overflowed does not tell how far a merge is.
        return [self.numbered(self.dm.wait_merge(name, timeout=240), 0)]

    def do_inactive(self) -> list[str]:
        lines = self.dm.table(inactive=True).splitlines()
        return [self.numbered(line, 1) for line in lines]

    def do_info(self, name: str) -> list[Any]:
        info = self.dm.info(name)
        count = info.nr_targets if info.live else 0
        states = [info.live, info.inactive, info.suspended]
        return [info.minor, info.open_count, info.event_nr, count, *states]


class ModelReplayer(Replayer):
    """Runs them on the model, which all other random programs are compared with."""

    def __init__(self, program: Program, record: trace.Trace) -> None:
        self.guide = Guide(program)
        super().__init__(record, self.guide.model, {n: f"@{n}" for n in program.images}, "/nosuch")

    def do_w(self, name: str, offset: int, length: int, seed: int) -> str:
        return f"w {self.guide.do(['w', name, offset, length, seed]) or length}"

    def do_wipe(self, name: str) -> list[str]:
        self.guide.do(["wipe", name])
        return []

    def do_d(self, name: str, offset: int, length: int) -> list[str]:
        self.dm.device(name).discard_range(offset, length)
        return []

    def do_waitmerge(self, name: str) -> list[str]:
        return [self.numbered(self.dm.status(name), 0)]


def place(program: Program, folder: Path) -> dict[str, Path]:
    """Write the images of a program into a new folder."""
    folder.mkdir()
    for name, data in program.contents().items():
        (folder / f"{name}.img").write_bytes(data)
    return {name: folder / f"{name}.img" for name in program.images}


def record(
    images: Iterable[str], steps: Sequence[Step], answers: Sequence[Any], name: str
) -> trace.Trace:
    return trace.Trace(name, dict.fromkeys(images, (0, 0)), list(steps), list(answers), {})


def replayer(
    dm: cow.Mapper,
    images: dict[str, Path],
    steps: Sequence[Step] = (),
    answers: Sequence[Any] = (),
    name: str = "",
) -> Replayer:
    """Return what runs steps on a mapper, with these images."""
    paths = {image: str(path) for image, path in images.items()}
    return Replayer(record(images, steps, answers, name), dm, paths, "/nosuch")


def run(runner: Replayer, kind: str = "") -> None:
    """Run the steps; raise Difference where an answer is not that of the kernel."""
    try:
        runner.run()
    except AssertionError as error:
        verb = re.search(r"step \d+ \['(\w+)'", str(error))
        raise Difference(str(error), kind + (verb[1] if verb else "")) from None


def replay(
    program: Program,
    steps: list[Step],
    answers: list[Any],
    images: dict[str, Path],
    durability: str = "process",
) -> None:
    """Run steps on cow and compare each answer with that of the kernel."""
    with cow.Mapper(durability=durability) as dm:
        run(replayer(dm, images, steps, answers, f"seed {program.seed}"))


def replay_on_model(
    program: Program, steps: list[Step], answers: list[Any], images: dict[str, Path]
) -> None:
    """Run steps on the model and compare each answer, and what `images` of the kernel hold now."""
    name = f"seed {program.seed}, the model"
    runner = ModelReplayer(program, record(program.images, steps, answers, name))
    try:
        run(runner, "model ")
    except Nonsense as error:
        raise Difference(f"{name}: {error}", "model nonsense") from None
    for image in program.images:
        compare_bytes(
            program, image, images[image], bytes(runner.dm.images[f"@{image}"].data), name
        )


def compare_images(program: Program, kernels: dict[str, Path], ours: dict[str, Path]) -> None:
    """Compare all bytes that are determined: of a store that ended invalid, its header."""
    for image in program.images:
        name = f"seed {program.seed}"
        compare_bytes(program, image, kernels[image], ours[image].read_bytes(), name)


def compare_bytes(program: Program, image: str, kernels: Path, ours: bytes, name: str) -> None:
    known = program.known[image]
    theirs, mine = kernels.read_bytes()[:known], ours[:known]
    if theirs != mine:
        wrong = np.flatnonzero(np.frombuffer(theirs, np.uint8) != np.frombuffer(mine, np.uint8))
        raise Difference(
            f"{name}: image {image} differs in {len(wrong)} bytes, from {wrong[0]} "
            f"(sector {wrong[0] // SECTOR}) to {wrong[-1]}",
            "image",
        )


class Judge:
    """Holds the kernel that answers; it is booted when it is needed, and again after a hang."""

    place = staticmethod(place)
    replay = staticmethod(replay)
    compare_images = staticmethod(compare_images)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.kernel: Kernel | None = None

    def running(self) -> Kernel:
        if self.kernel is not None and self.kernel.failed:
            self.kernel.kill()
            self.kernel = None
        if self.kernel is None:
            self.kernel = Kernel(self.folder)
        return self.kernel

    def close(self) -> None:
        if self.kernel is not None:
            self.kernel.close()
            self.kernel = None

    def new_folder(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}"

    def ask(self, images: dict[str, Path], steps: list[Step]) -> list[Any]:
        """Let the kernel run steps on images."""
        return self.running().run(images, steps)

    def difference(
        self, program: Program, steps: list[Step], durability: str = "process"
    ) -> Difference | None:
        """Run steps on both sides; return what differs."""
        theirs = place(program, self.new_folder())
        ours = place(program, self.new_folder())
        answers = self.ask(theirs, steps)
        try:
            replay(program, steps, answers, ours, durability)
            compare_images(program, theirs, ours)
            replay_on_model(program, steps, answers, theirs)
        except Difference as error:
            return error
        finally:
            for path in [*theirs.values(), *ours.values()]:
                path.unlink()
        return None

    def check(self, program: Program, durability: str = "process") -> None:
        """Fail, with a shorter program, where kernel and cow do not agree."""
        first = self.difference(program, program.steps, durability)
        if first is None:
            count("programs compared with the kernel")
            count("steps of programs compared with the kernel", len(program.steps))
            return

        def fails(steps: list[Step]) -> bool:
            left = sensible(program, steps)
            found = self.difference(program, left, durability) if left else None
            return found is not None and found.kind == first.kind

        least = sensible(program, shrink(program.steps, fails, 100)) or program.steps
        lines = "".join(f"    {step!r},\n" for step in least)
        raise AssertionError(
            f"{first}\nshrunk: {self.difference(program, least, durability)}\n"
            f"images = {program.images}\nsteps = [\n{lines}]"
        )
