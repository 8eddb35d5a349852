"""A device suspended in the middle: requests wait where they stand, and nothing is lost or torn.

The COW device lies in three pieces, one for the header, one for the first area, one for the data;
each can be suspended or fail by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import SECTOR, Rig, image, poll, stamp, store_header
from test_nbd import READ, WRITE, Client

import cow
from cow.export.nbd import NbdServer

SECTORS = 256
PIECES = {"header": (0, 8), "area": (8, 8), "data": (16, 2032)}


@pytest.fixture(params=["process", "power"])
def dm(request):
    with cow.Mapper(durability=request.param) as mapper:
        yield mapper


@pytest.fixture
def rig(dm, tmp_path):
    """An origin with a snapshot `snap` on a COW device in pieces, and `other` on an image."""
    rig = Rig(dm, tmp_path, SECTORS)
    store = image(tmp_path / "pieces.cow", 2048)
    lines = []
    for name, (start, length) in PIECES.items():
        dm.create(name, f"0 {length} linear {store} {start}")
        lines.append(f"{start} {length} linear {name} 0")
    dm.create("pieces", "\n".join(lines))
    rig.cows["snap"] = "pieces"
    dm.create("snap", rig.line("snap", "P 8"))
    rig.snap("other", "P 4")
    return rig


class Waiting:
    """A call in a thread that has to wait."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.errors: list[BaseException] = []
        self.call = call
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.thread.join(0.25)
        assert self.thread.is_alive(), f"it did not wait: {self.errors}"

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.errors.append(error)

    def end(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self.errors:
            raise self.errors[0]


def write_many(rig: Rig, name: str) -> None:
    data = np.frombuffer(stamp(0, 32, 1), np.uint8).reshape(4, -1)
    rig.dm.device(name).write_many(np.arange(4) * 8 * SECTOR, data)


def write_one(rig: Rig, name: str) -> None:
    rig.write(name, 0, 32)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("write", [write_one, write_many])
def test_an_origin_write_waits_for_the_cow_device(rig, dm, piece, write):
    dm.suspend(piece)
    if piece == "header":
        write(rig, "base")  # needs no header
        dm.resume(piece)
    else:
        waiting = Waiting(lambda: write(rig, "base"))
        assert Path(rig.origin).read_bytes() == rig.before
        dm.resume(piece)
        waiting.end()
    assert rig.read("snap") == rig.read("other") == rig.before
    assert rig.read("base", 0, 32) == stamp(0, 32, 1)


@pytest.mark.parametrize("piece", ["area", "data"])
@pytest.mark.parametrize("write", [write_one, write_many])
def test_a_snapshot_write_waits_for_the_cow_device(rig, dm, piece, write):
    dm.suspend(piece)
    waiting = Waiting(lambda: write(rig, "snap"))
    dm.resume(piece)
    waiting.end()
    assert rig.read("snap", 0, 32) == stamp(0, 32, 1)
    assert rig.read("snap", 32) == rig.before[32 * SECTOR :]
    assert rig.read("base") == rig.before


@pytest.mark.parametrize("failing", ["area", "data"])
def test_a_snapshot_is_dropped_when_its_header_can_be_written(rig, dm, failing):
    """It is lost because of one piece; the write waits until the header says so."""
    dm.load(failing, f"0 {PIECES[failing][1]} error")
    dm.resume(failing)
    dm.suspend("header")
    waiting = Waiting(lambda: rig.write("base", 0, 32))
    assert rig.usage("snap") != "Invalid"
    dm.resume("header")
    waiting.end()
    assert rig.usage("snap") == "Invalid"
    assert store_header(Path(rig.folder / "pieces.cow").read_bytes())[1] == 0
    assert rig.read("base", 0, 32) == stamp(0, 32, 1)
    assert rig.read("other") == rig.before


def test_a_merge_waits_for_the_cow_device_of_a_sibling(rig, dm):
    rig.write("other", 16, 24)
    moment = rig.read("other")
    dm.suspend("base")
    dm.remove("other")
    dm.load("base", rig.line("other", "P 4", kind="snapshot-merge"))
    dm.suspend("data")
    dm.resume("base")
    with pytest.raises(TimeoutError):
        dm.wait_merge("base", timeout=0.3)
    assert rig.read("base") == moment
    dm.resume("data")
    assert dm.wait_merge("base", timeout=60).endswith(" 8/2048 8")
    assert rig.read("base-real") == moment
    assert rig.read("snap") == rig.before


def test_a_merge_waits_for_its_own_cow_device(rig, dm):
    rig.write("snap", 16, 24)
    moment = rig.read("snap")
    dm.suspend("base")
    dm.remove("snap")
    dm.load("base", rig.line("snap", "P 8", kind="snapshot-merge"))
    dm.suspend("data")
    dm.resume("base")
    with pytest.raises(TimeoutError):
        dm.wait_merge("base", timeout=0.3)
    dm.resume("data")
    assert dm.wait_merge("base", timeout=60).endswith(" 16/2048 16")
    assert rig.read("base-real") == moment
    assert rig.read("other") == rig.before


@pytest.mark.parametrize("name", ["base", "snap"])
def test_what_came_before_a_suspended_piece_is_sent_while_a_client_waits(rig, dm, name):
    """Replies collected so far go out, and the read goes on behind them."""
    dm.create("low", f"0 64 linear {name} 0")
    dm.create("top", f"0 64 linear {name} 0\n64 64 linear low 0")
    with NbdServer(dm, f"unix:{rig.folder}/nbd.sock"):
        client = Client(rig.folder / "nbd.sock")
        client.go("top")
        dm.suspend("low")
        client.send(READ, 0, SECTOR)
        client.send(READ, 64 * SECTOR, SECTOR)
        client.send(WRITE, 64 * SECTOR, SECTOR, b"x" * SECTOR)
        client.send(READ, 64 * SECTOR, SECTOR)
        assert client.answer(SECTOR) == (0, rig.before[:SECTOR])
        dm.resume("low")
        assert client.answer(SECTOR) == (0, rig.before[:SECTOR])
        assert client.answer() == (0, b"")
        assert client.answer(SECTOR) == (0, b"x" * SECTOR)
        client.close()


def test_a_server_stops_though_a_client_waits(rig, dm):
    with NbdServer(dm, f"unix:{rig.folder}/nbd.sock"):
        client = Client(rig.folder / "nbd.sock")
        client.go("base")
        dm.suspend("base")
        client.send(READ, 0, SECTOR)
        poll(lambda: dm.info("base").open_count == 1)
    client.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("cow-nbd")]
    dm.resume("base")
