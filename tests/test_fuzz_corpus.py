"""The harnesses of the fuzzer without the fuzzer: what it kept, and inputs made at random.

fuzz/corpus has a folder for each harness: files with long hexadecimal names are inputs that reach
code no other input reaches, the others are those that once found something, named for it.
"""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
from support import count

CORPUS = Path(__file__).resolve().parent.parent / "fuzz" / "corpus"
# How many random inputs each harness gets; a program takes a hundred times as long as a table.
RANDOM = {"table": 2500, "concise": 1500, "store": 300, "program": 120, "lvm": 1200}


def corpus(name: str) -> list[Path]:
    return sorted((CORPUS / name).iterdir())


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Change an input in one to four places."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
            case 2:
                del changed[at : at + rng.randint(1, 8)]
            case 3:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randint(1, 16)]
            case _:
                changed[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(changed)


@pytest.mark.parametrize("name", RANDOM)
def test_every_input_in_the_corpus_passes(name):
    harness = importlib.import_module(f"fuzz_{name}")
    failed = []
    count("inputs of the fuzzers run", len(corpus(name)))
    for path in corpus(name):
        try:
            harness.run(path.read_bytes())
        except Exception as error:
            failed.append(f"{path.name}: {error!r}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", RANDOM)
def test_random_inputs_pass(name, seed):
    harness = importlib.import_module(f"fuzz_{name}")
    known = [path.read_bytes() for path in corpus(name)]
    rng = random.Random(seed)
    count("inputs of the fuzzers run", RANDOM[name])
    for number in range(RANDOM[name]):
        if number % 2:
            data = rng.randbytes(rng.randrange(harness.MAX_LEN))
        else:
            data = mutate(rng, rng.choice(known), rng.choice(known))[: harness.MAX_LEN]
        try:
            harness.run(data)
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {number}: {data!r}") from error
