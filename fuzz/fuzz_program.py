"""Bytes → a program of operations → the engine and the model must agree.

The first 8 bytes choose the images and what the origin stands on, every 8 bytes more one step.
Where `Author` of the model tests asks its random numbers, the bytes of the step answer. Answers and
status lines are compared after each operation, everything else at every fourth and at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scratch
from support import SECTOR, fill
from support.model import Model, Nonsense
from test_model import Author, Difference, World, outcome, same

MAX_LEN = 8 * 41
STEP = 8
PATTERN = fill(1010 * 56 + 401 * SECTOR, 3)


class Source:
    """Stands for random.Random: every answer takes one or two bytes, zeros when there are none."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.end = 0

    def next_step(self) -> bool:
        """Go to the next 8 bytes; False where there are none."""
        self.at, self.end = self.end, self.end + STEP
        return self.at < len(self.data)

    def below(self, count: int) -> int:
        value = 0
        for _ in range(1 if count <= 256 else 2):
            if self.at < min(self.end, len(self.data)):
                value = value << 8 | self.data[self.at]
                self.at += 1
        return value % count

    def random(self) -> float:
        return self.below(256) / 256

    def randrange(self, start: int, stop: int | None = None) -> int:
        return self.below(start) if stop is None else start + self.below(stop - start)

    def randint(self, first: int, last: int) -> int:
        return first + self.below(last - first + 1)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def choices(self, options: Sequence[Any], weights: Sequence[int]) -> list[Any]:
        place = self.below(sum(weights))
        for option, weight in zip(options, weights, strict=True):
            if place < weight:
                return [option]
            place -= weight
        raise AssertionError


class Decoder(Author):
    """An author whose choices are the bytes of the input."""

    def __init__(self, data: bytes) -> None:
        self.source = Source(data)
        self.source.next_step()
        super().__init__(0)

    @property
    def rng(self) -> Any:
        return self.source

    @rng.setter
    def rng(self, value: Any) -> None:
        pass

    def change(self, verb: str, name: str, *args: Any) -> None:
        # What is written does not matter to the choices.
        device = self.model.device(name)
        if verb == "write":
            device.pwrite(bytes(args[1]), args[0])
        elif verb == "write_many":
            device.write_many(args[0], [bytes(args[1])] * len(args[0]))
        else:
            super().change(verb, name, *args)

    def decode(self) -> list[Any]:
        """Return the program; its steps are added as they are read."""
        self.stack()
        while self.source.next_step():
            for op in self.next_ops():
                self.add(op)
        return self.program


class Pair(World):
    """Engine and model; what is written is cut from one long pattern, which is quick to have."""

    def model_write(self, name: str, offset: int, length: int, seed: int) -> int:
        return self.model.device(name).pwrite(content(length, seed), offset)

    def engine_write(self, name: str, offset: int, length: int, seed: int) -> int:
        return self.dm.device(name).pwrite(content(length, seed), offset)

    def model_write_many(self, name: str, offsets: list[int], size: int, seed: int) -> None:
        data = [content(size, seed + index) for index in range(len(offsets))]
        self.model.device(name).write_many(offsets, data)

    def engine_write_many(self, name: str, offsets: list[int], size: int, seed: int) -> None:
        rows = b"".join(content(size, seed + index) for index in range(len(offsets)))
        data = np.frombuffer(rows, np.uint8).reshape(len(offsets), size)
        self.dm.device(name).write_many(np.array(offsets, np.uint64), data)


def content(length: int, seed: int) -> bytes:
    start = seed * 56
    return PATTERN[start : start + length]


def run(data: bytes) -> None:
    author = Decoder(data)
    program = author.decode()
    world = Pair(scratch.folder(), author.images, "process")
    try:
        for number, op in enumerate(program):
            try:
                expected = outcome(lambda op=op: world.model_do(*op))
            except Nonsense:
                continue
            where = f"step {number} {op}"
            same(where, "answer", outcome(lambda op=op: world.engine_do(*op)), expected)
            same(where, "status", world.dm.status(), printed(world.model))
            if number % 4 == 3:
                world.compare(where)
        world.compare("the end")
    except Difference as error:
        lines = "".join(f"    {op!r},\n" for op in program)
        raise AssertionError(f"{error}\nimages = {author.images}\nprogram = [\n{lines}]") from error
    finally:
        world.close()


def printed(model: Model) -> str:
    """Return the status lines of all devices; one without a table has an empty line."""
    lines = []
    for name in sorted(model.devices):
        found = model.status(name).split("\n")
        lines += [f"{name}: {line}" for line in found]
    return "\n".join(lines)
