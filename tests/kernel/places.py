"""What programs put below an origin and below a store: pieces, stripes, mirrors, bad places.

Each is a table, and the table that mends it: the same one where nothing of it is bad.
"""

from __future__ import annotations

import random

Tables = tuple[str, str]

DOWN = "0 1 1 drop_writes"  # a flakey target's: down from the start, for ever


def cut(table: str) -> str:
    """Return a table that maps the same, its last linear line in two."""
    *lines, last = table.splitlines()
    start, length, _, image, first = last.split()
    half = int(length) // 2
    return "\n".join(
        (
            *lines,
            f"{start} {half} linear {image} {first}",
            f"{int(start) + half} {int(length) - half} linear {image} {int(first) + half}",
        )
    )


def bad_range(table: str) -> tuple[int, int] | None:
    """Return the sectors [first, end) of a table's line that answers nothing but errors."""
    for line in table.splitlines():
        start, length, kind = line.split()[:3]
        if kind == "error":
            return int(start), int(start) + int(length)
    return None


def refused(sectors: int) -> list[list[str]]:
    """Return steps that the kernel refuses, and that must change nothing."""
    return [
        ["remove", "base-real"],
        ["remove", "nosuch"],
        ["create", "gap", "0 8 zero\n9 8 zero"],
        ["create", "bad", "0 8 snapshot %base-real @c0 P 7"],
        ["create", "bad", "0 8 snapshot %base-real @c0 X 8"],
        ["create", "bad", "0 8 snapshot %base-real %base-real P 8"],
        ["create", "bad", f"0 {sectors + 1} snapshot-origin %base-real"],
        ["create", "bad", f"0 8 linear @b {sectors}"],
        ["create", "bad", "0 9 striped 2 4 @b 0 @d 0"],
        ["reload", "base", "0 8 nosuch"],
        ["resume", "nosuch"],
    ]


def with_bad_place(image: str, sectors: int, first: int, length: int) -> Tables:
    """Return a table of an image with a bad place."""
    end = first + length
    around = f"0 {first} linear {image} 0\n{{}}\n{end} {sectors - end} linear {image} {end}"
    return (
        around.format(f"{first} {length} error"),
        around.format(f"{first} {length} linear {image} {first}"),
    )


def below_an_origin(rng: random.Random, sectors: int, largest: int) -> Tables:
    """Return tables for an origin, on the images @b of as many sectors and @d of 64 more.

    None has a bad place where chunks are large: a disk of the guest takes 255 sectors at once, so
    that the kernel there never sees the whole of a large chunk written, and reads what is bad.
    """
    half = sectors // 2 // 128 * 128 or 32
    rest = sectors - half
    stripe = 64 if half >= 1024 else 4
    bad = rng.choice((1, 8, largest))
    flaw: tuple[str, ...] = (f"0 {sectors} linear @b 0",)
    if largest < 256:
        flaw = with_bad_place("@b", sectors, rng.randint(1, sectors - bad - 2), bad)
    tables = (
        (f"0 {sectors} linear @b 0",),
        (f"0 {half} linear @b {rest}\n{half} {rest} linear @b 0",),
        (f"0 {half} striped 2 {stripe} @b 8 @d 3\n{half} {rest} linear @d {half}",),
        (f"0 {half} linear @d 11\n{half} 8 zero\n{half + 8} {rest - 8} linear @b {half}",),
        (f"0 {half} mirror core 2 16 nosync 2 @b 0 @d 0\n{half} {rest} linear @b {half}",),
        flaw,
        flaw,
        (
            f"0 {half} linear @b 0\n{half} 8 flakey @b {half} {DOWN}\n"
            f"{half + 8} {rest - 8} linear @b {half + 8}",
        ),
    )
    chosen = rng.choice(tables)
    return chosen[0], chosen[-1]


def store_sectors(rng: random.Random, largest: int) -> int:
    """Return a size for a COW image: often one that is soon full, or full with an area."""
    if largest <= 2 and rng.random() < 0.6:
        chunks = 33 * largest + rng.choice((-1, 0, 1, 2, 3, 4))
        return chunks * rng.choice((1, 2)) + rng.randrange(2)
    if rng.random() < 0.3:
        chunks = rng.randint(2, 8)
    else:
        chunks = rng.randint(3, 12) if largest >= 512 else rng.randint(4, 50)
    return max(2, largest * chunks + rng.choice((0, 0, rng.randrange(largest))))


def below_a_store(rng: random.Random, image: str, sectors: int, largest: int) -> str:
    """Return a table to put a store on, or an empty one: then the store is on its image itself.

    There is room for a header and an area, in good places. The kernel writes the header first:
    where the area fails it leaves a store without one.
    """
    first = 2 * max(32, largest)
    if sectors < first + 10 or rng.random() < 0.6:
        return ""
    half = sectors // 2
    leg = half // 4 * 4
    away = rng.randint(1, 9)
    if rng.random() < 0.3:
        bad = rng.randint(first, sectors - 10)
        return with_bad_place(image, sectors, bad, rng.choice((1, 8)))[0]
    return rng.choice(
        (
            f"0 {sectors - away} linear {image} {away}",
            f"0 {half} linear {image} {sectors - half}\n{half} {sectors - half} linear {image} 0",
            f"0 {2 * leg} striped 2 4 {image} 0 {image} {leg}",
        )
    )
