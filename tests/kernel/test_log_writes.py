"""The log that Linux writes of some requests is, byte for byte, the one that cow writes of them."""

from __future__ import annotations

import random
from pathlib import Path

from support import SECTOR, fill, stamp
from support.crash import DISCARD, FLUSH, LOG_END, MARK, read_log

import cow

SECTORS = 2048
TABLE = f"0 {SECTORS} log-writes "


def make_images(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    images = {"disk": folder / "disk.img", "log": folder / "disk.log"}
    images["disk"].write_bytes(stamp(0, SECTORS, 1))
    images["log"].write_bytes(bytes(4 * SECTORS * SECTOR))
    return images


def random_steps(rng: random.Random) -> list[list]:
    """Return steps of a trace. A flush follows what Linux would log only at the next one."""
    steps = []
    for number in range(60):
        count = rng.choice((1, 2, 8, 9, 64))  # Linux cuts longer discards
        first = rng.randrange(SECTORS - count)
        kind = rng.choice(("w", "w", "w", "d", "f", "message"))
        if kind == "w":
            steps.append(["w", "dev", first * SECTOR, count * SECTOR, rng.randrange(1 << 30)])
        elif kind == "d":
            steps += [["d", "dev", first * SECTOR, count * SECTOR], ["f", "dev"]]
        elif kind == "f":
            steps.append(["f", "dev"])
        else:
            steps.append(["message", "dev", f"mark {number:0{rng.choice((1, 20, 500))}}"])
    return steps


def test_the_log_is_that_of_linux(judge, seed):
    rng = random.Random(seed)
    theirs, ours = (make_images(judge.new_folder()) for _ in range(2))
    steps = random_steps(rng)
    create, remove = ["create", "dev", TABLE + "@disk @log"], ["remove", "dev"]
    judge.running().run(theirs, [create, *steps, remove])
    with cow.Mapper() as dm:
        dev = dm.create("dev", TABLE + f"{ours['disk']} {ours['log']}")
        for verb, _, *args in steps:
            if verb == "w":
                dev.pwrite(fill(args[1], args[2]), args[0])
                dev.flush()  # as the guest does
            elif verb == "d":
                dev.discard(*args)
            elif verb == "f":
                dev.flush()
            else:
                dm.message("dev", 0, args[0])
    kinds = {entry.flags for entry in read_log(theirs["log"])}
    assert kinds == {0, FLUSH, DISCARD, MARK}
    assert read_log(theirs["log"])[-1].text == LOG_END
    assert read_log(theirs["log"]) == read_log(ours["log"])
    assert theirs["log"].read_bytes() == ours["log"].read_bytes()
    assert theirs["disk"].read_bytes() == ours["disk"].read_bytes()
