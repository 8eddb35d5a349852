"""Replay of the traces in tests/data/kernel-golden: what the real kernel answered, step by step.

A mapper is anything with the methods of cow.Mapper; the model is replayed in the same way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import fill, merge_is_over, poll, store_header, store_records

GOLDEN = Path(__file__).parent.parent / "data" / "kernel-golden"
ERRNOS = {os.strerror(code): code for code in errno.errorcode}


@dataclass
class Trace:
    """One trace: the images before it, its steps, the kernel's answers, the images after it."""

    name: str
    images: dict[str, tuple[int, int]]
    steps: list[list[Any]]
    answers: list[Any]
    final: dict[str, dict[str, Any]]


def names() -> list[str]:
    """Return the names of all traces."""
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def load(name: str) -> Trace:
    """Read one trace."""
    raw = json.loads((GOLDEN / f"{name}.json").read_text())
    images = {image: (size, seed) for image, (size, seed) in raw["images"].items()}
    return Trace(name, images, raw["steps"], raw["answers"], raw["final"])


def contents(trace: Trace) -> dict[str, bytes]:
    """Return what each image holds before the trace."""
    return {
        name: fill(size, seed) if seed else bytes(size)
        for name, (size, seed) in trace.images.items()
    }


class Replayer:
    """Runs the steps of a trace on `dm`; `paths` says where each image of the trace is."""

    def __init__(self, trace: Trace, dm: Any, paths: dict[str, str], missing: str) -> None:
        self.trace = trace
        self.dm = dm
        self.missing = missing
        self.words = {"@" + name.removeprefix("cow_"): str(paths[name]) for name in trace.images}
        self.numbers = {
            str(paths[name]): f"253:{16 * (index + 1)}" for index, name in enumerate(trace.images)
        }
        self.devices: list[str] = []

    def run(self) -> None:
        """Run every step and compare its answer with the kernel's."""
        for number, step in enumerate(self.trace.steps):
            answer, expected = self.answer(step), self.expected(number)
            if answer != expected:
                raise AssertionError(
                    f"{self.trace.name}: step {number} {step} answers\n  {answer!r}\n"
                    f"where the kernel answered\n  {expected!r}"
                )

    def expected(self, number: int) -> Any:
        """Return the kernel's answer; a refusal by dmsetup becomes its errno."""
        answer = self.trace.answers[number]
        if isinstance(answer, dict):
            if answer["rc"] == 0:
                return answer["out"]
            text = re.search(r"failed: (.*)", answer["out"][0])
            assert text is not None, answer
            return ERRNOS[text[1]]
        return answer

    def answer(self, step: list[Any]) -> Any:
        """Run one step and put what came of it in the words of the trace."""
        verb, *rest = step
        try:
            return getattr(self, f"do_{verb}")(*rest)
        except OSError as error:
            return f"{verb} E{error.errno}" if verb in ("r", "w") else error.errno

    def do_create(self, name: str, table: str) -> list[str]:
        self.dm.create(name, self.table(table))
        self.devices.append(name)
        return []

    def do_reload(self, name: str, table: str) -> list[str]:
        self.dm.load(name, self.table(table))
        return []

    def do_suspend(self, name: str) -> list[str]:
        self.dm.suspend(name)
        return []

    def do_resume(self, name: str) -> list[str]:
        self.dm.resume(name)
        return []

    def do_remove(self, name: str) -> list[str]:
        self.dm.remove(name)
        self.devices.remove(name)
        return []

    def do_w(self, name: str, offset: int, length: int, seed: int) -> str:
        return f"w {self.dm.device(name).pwrite(fill(length, seed), offset)}"

    def do_r(self, name: str, offset: int, length: int) -> str:
        data = self.dm.device(name).pread(length, offset)
        return f"r {len(data)} {zlib.crc32(data):08x}"

    def do_status(self) -> list[str]:
        return [self.numbered(line, 1) for line in self.dm.status().splitlines()]

    def do_table(self) -> list[str]:
        return [self.numbered(line, 1) for line in self.dm.table().splitlines()]

    def do_waitmerge(self, name: str) -> list[str]:
        poll(lambda: merge_is_over(self.dm.status(name)))
        return [self.numbered(self.dm.status(name), 0)]

    def table(self, text: str) -> str:
        """Put our image paths and device names where the trace has @IMAGE and %NAME."""
        text = re.sub(r"@\w+", lambda word: self.words.get(word[0], self.missing), text)
        return re.sub(r"%([\w-]+)", r"\1", text)

    def numbered(self, line: str, prefix: int) -> str:
        """Put the major:minor of the trace where our line has an image path or a device name.

        Only the words after START LENGTH TYPE are devices; `prefix` words stand before START.
        """
        words = line.split(" ")
        for index in range(prefix + 3, len(words)):
            word = words[index]
            if word in self.devices:
                words[index] = f"254:{self.dm.info(word).minor}"
            elif match := re.fullmatch(r"7:(\d+)", word):
                words[index] = f"253:{16 * (int(match[1]) + 1)}"
            else:
                words[index] = self.numbers.get(word, word)
        return " ".join(words)


def compare_final(trace: Trace, images: dict[str, bytes]) -> None:
    """Compare what the images hold after the trace with what the kernel left.

    Of a store that ended invalid only the header counts: how much of the last request had
    reached it depends on the kernel's timing.
    """
    for name, final in trace.final.items():
        data = images[name]
        where = f"{trace.name}: image {name}"
        if "valid" in final:
            _, valid, version, chunk_size = store_header(data)
            header = {"valid": valid, "version": version, "chunk_size": chunk_size}
            assert header == {key: final[key] for key in header}, where
            if not valid:
                continue
            assert [list(record) for record in store_records(data)] == final["exceptions"], where
        assert hashlib.sha256(data).hexdigest() == final["sha256"], where
