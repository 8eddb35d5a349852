"""Devices and their tables: create, load, suspend, resume, remove, rename, events, stacking."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import SECTOR, Rig, image, refused, stamp

import cow


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def rig(dm, tmp_path):
    return Rig(dm, tmp_path)


class Waiter:
    """A call in a thread of its own, which may have to wait."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.answer: Any = None
        self.started = threading.Event()
        self.done = threading.Event()

        def run() -> None:
            self.started.set()
            try:
                self.answer = call()
            except OSError as error:
                self.answer = error.errno
            self.done.set()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self.started.wait(30)

    def result(self) -> Any:
        """Return what the call returned, or the errno it failed with."""
        assert self.done.wait(30), "the call does not end"
        self.thread.join()
        return self.answer


# --- create, load, clear, resume ----------------------------------------------------------------


def test_create_makes_a_running_device(dm):
    dev = dm.create("dev", "0 8 zero")
    assert dev.name == "dev"
    info = dm.info("dev")
    assert (info.live, info.inactive, info.suspended, info.nr_targets) == (True, False, False, 1)


def test_create_without_a_table_makes_an_empty_device(dm):
    dm.create("dev")
    info = dm.info("dev")
    assert (info.live, info.inactive, info.suspended, info.nr_targets) == (
        False,
        False,
        False,
        0,
    )
    assert dm.table("dev") == ""
    assert dm.status("dev") == ""
    assert dm.device("dev").size == 0


def test_an_empty_device_resumes_to_no_effect(dm):
    dm.create("dev")
    dm.resume("dev")
    assert not dm.info("dev").live


def test_load_fills_the_inactive_slot_only(dm):
    dev = dm.create("dev", "0 8 zero")
    dm.load("dev", "0 16 zero")
    assert dm.info("dev").inactive
    assert dev.sectors == 8


def test_resume_makes_the_inactive_table_live(dm):
    dev = dm.create("dev", "0 8 zero")
    dm.load("dev", "0 16 error")
    dm.resume("dev")
    assert dev.sectors == 16
    assert dm.table("dev") == "0 16 error "
    assert not dm.info("dev").inactive


def test_a_second_load_replaces_the_first(dm):
    dm.create("dev", "0 8 zero")
    dm.load("dev", "0 16 zero")
    dm.load("dev", "0 24 zero")
    assert dm.table("dev", inactive=True) == "0 24 zero "


def test_a_second_load_lets_go_of_the_devices_of_the_first(dm):
    dm.create("low", "0 8 zero")
    dm.create("dev", "0 8 zero")
    dm.load("dev", "0 8 linear low 0")
    dm.load("dev", "0 8 zero")
    dm.remove("low")
    assert dm.names() == ["dev"]


def test_reload_is_load(dm):
    dm.create("dev", "0 8 zero")
    dm.reload("dev", "0 16 zero")
    assert dm.table("dev", inactive=True) == "0 16 zero "


def test_clear_empties_the_inactive_slot(dm):
    dm.create("dev", "0 8 zero")
    dm.load("dev", "0 16 zero")
    dm.clear("dev")
    assert not dm.info("dev").inactive
    dm.resume("dev")
    assert dm.table("dev") == "0 8 zero "


def test_clear_lets_go_of_the_devices_below(dm):
    dm.create("low", "0 8 zero")
    dm.create("dev")
    dm.load("dev", "0 8 linear low 0")
    assert dm.info("low").open_count == 1
    dm.clear("dev")
    assert dm.info("low").open_count == 0


def test_a_create_that_fails_leaves_no_device(dm):
    with pytest.raises(cow.TableError):
        dm.create("dev", "0 8 nosuch")
    assert dm.names() == []


def test_comments_and_blank_lines_are_no_targets(dm):
    dm.create("dev", "# one\n\n  0 8 zero   # zeros\n\t8 8 error\n")
    assert dm.table("dev") == "0 8 zero \n8 8 error "


def test_a_backslash_quotes_a_blank_in_a_path(dm, tmp_path):
    image(tmp_path / "a b.img", stamp(0, 8, 0))
    dev = dm.create("dev", f"0 8 linear {tmp_path}/a\\ b.img 0")
    assert dev.pread(SECTOR, 0) == stamp(0, 1, 0)


def test_a_device_is_named_by_its_name_its_node_or_its_number(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 0))
    dm.create("low", f"0 8 linear {path} 0")
    for number, word in enumerate(["low", "/dev/mapper/low", f"254:{dm.info('low').minor}"]):
        dev = dm.create(f"dev{number}", f"0 8 linear {word} 0")
        assert dev.pread(SECTOR, 0) == stamp(0, 1, 0)
        assert dm.deps(f"dev{number}") == ["low"]


def test_concise_text_creates_every_device_of_it(dm):
    text = "c1,,3,rw,0 8 zero,8 8 error;c2,U2,9,ro,0 4 zero"
    dm.create_concise(text)
    assert dm.names() == ["c1", "c2"]
    assert dm.table("c1") == "0 8 zero \n8 8 error "
    info = dm.info("c2")
    assert (info.uuid, info.minor, info.readonly) == ("U2", 9, True)


def test_concise_text_is_read_back_as_it_was_printed(dm):
    dm.create("a,b;c", "0 8 zero\n8 8 error", minor=5)
    text = dm.table(concise=True)
    dm.remove("a,b;c")
    dm.create_concise(text)
    assert dm.table(concise=True) == text
    assert dm.names() == ["a,b;c"]


# --- suspend and resume -------------------------------------------------------------------------


def test_suspend_is_shown(dm):
    dev = dm.create("dev", "0 8 zero")
    dm.suspend("dev")
    assert dev.suspended
    assert dm.info("dev").suspended
    dm.resume("dev")
    assert not dev.suspended


def test_suspending_twice_and_resuming_twice_succeed(dm):
    dm.create("dev", "0 8 zero")
    dm.suspend("dev")
    dm.suspend("dev")
    dm.resume("dev")
    dm.resume("dev")
    assert not dm.info("dev").suspended


@pytest.mark.parametrize("options", [{}, {"noflush": True}, {"nolockfs": True}])
def test_a_read_waits_for_the_resume(dm, tmp_path, options):
    one = image(tmp_path / "one.img", stamp(0, 8, 1))
    two = image(tmp_path / "two.img", stamp(0, 8, 2))
    dev = dm.create("dev", f"0 8 linear {one} 0")
    dm.suspend("dev", **options)
    waiter = Waiter(lambda: dev.pread(SECTOR, 0))
    dm.load("dev", f"0 8 linear {two} 0")
    assert not waiter.done.is_set()
    dm.resume("dev")
    assert waiter.result() == stamp(0, 1, 2)


def test_a_write_waits_for_the_resume(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 0))
    dev = dm.create("dev", f"0 8 linear {path} 0")
    dm.suspend("dev")
    waiter = Waiter(lambda: dev.pwrite(stamp(0, 1, 1), 0))
    assert not waiter.done.is_set()
    assert Path(path).read_bytes() == stamp(0, 8, 0)
    dm.resume("dev")
    assert waiter.result() == SECTOR
    assert dev.pread(SECTOR, 0) == stamp(0, 1, 1)


def test_io_waits_for_a_device_below(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 0))
    dm.create("low", f"0 8 linear {path} 0")
    dev = dm.create("dev", "0 8 linear low 0")
    dm.suspend("low")
    waiter = Waiter(lambda: dev.pread(SECTOR, 0))
    dm.load("low", "0 8 zero")
    assert not waiter.done.is_set()
    dm.resume("low")
    assert waiter.result() == bytes(SECTOR)


def test_io_that_waits_fails_when_the_device_is_removed(dm):
    dev = dm.create("dev", "0 8 zero")
    dm.suspend("dev")
    waiter = Waiter(lambda: dev.pread(SECTOR, 0))
    dm.remove("dev", force=True)
    assert waiter.result() in (errno.ENXIO, errno.EIO)


def test_a_suspended_snapshot_still_keeps_what_the_origin_loses(rig):
    rig.snap()
    rig.dm.suspend("snap")
    rig.write("base", 0, 64)
    rig.dm.resume("snap")
    assert rig.read("snap") == rig.before


def test_an_origin_write_waits_while_the_snapshot_is_made(rig):
    rig.dm.suspend("base")
    waiter = Waiter(lambda: rig.write("base", 0))
    rig.cows["snap"] = image(rig.folder / "snap.cow", 2048)
    rig.dm.create("snap", rig.line("snap"))
    rig.dm.resume("base")
    waiter.result()
    assert rig.read("snap") == rig.before
    assert rig.records() == [(0, 2)]


# --- remove -------------------------------------------------------------------------------------


def test_remove_frees_the_name_and_the_minor(dm):
    dm.create("one", "0 8 zero")
    dm.create("two", "0 8 zero")
    dm.remove("one")
    assert dm.names() == ["two"]
    assert dm.create("three", "0 8 zero").minor == 0
    assert dm.create("one", "0 8 zero").minor == 2


def test_a_snapshot_on_a_suspended_cow_device_is_refused_and_does_not_wait(dm, tmp_path):
    origin, store = image(tmp_path / "b.img", 64), image(tmp_path / "c.img", 64)
    dm.create("cow", f"0 64 linear {store} 0")
    dm.suspend("cow")
    assert refused(dm.create, "snap", f"0 64 snapshot {origin} cow P 8") == errno.EINVAL
    dm.resume("cow")
    dm.create("snap", f"0 64 snapshot {origin} cow P 8")
    assert dm.status("snap") == "0 64 snapshot 16/64 16"


def test_a_table_that_would_copy_into_its_own_snapshots_is_refused(dm, tmp_path):
    origin, store = image(tmp_path / "b.img", 64), image(tmp_path / "c.img", 64)
    dm.create("cow", f"0 64 linear {store} 0")
    dm.create("snap", f"0 64 snapshot {origin} cow P 8")
    dm.create("base", f"0 64 snapshot-origin {origin}")
    dm.load("cow", "0 64 linear base 0")
    assert refused(dm.resume, "cow") == errno.ELOOP
    assert dm.table("cow") == f"0 64 linear {store} 0"


def test_an_image_opened_read_only_stays_so(dm, tmp_path):
    path = image(tmp_path / "b.img", 64)
    dm.image(path, readonly=True)
    assert refused(dm.create, "dev", f"0 64 linear {path} 0") == errno.EACCES
    dm.create("dev", f"0 64 linear {path} 0", readonly=True)
    assert refused(dm.device("dev").pwrite, b"x", 0) == errno.EPERM


def test_an_image_takes_over_the_size_of_a_file_that_was_made_larger(dm, tmp_path):
    path = image(tmp_path / "a.img", stamp(0, 16, 1))
    dev = dm.create("dev", f"0 16 linear {path} 0")
    view = dev.view(0, SECTOR)
    os.truncate(path, 32 * SECTOR + 100)
    assert refused(dm.create, "other", f"0 32 linear {path} 0") == errno.EINVAL
    found = dm.use(path)
    with found.gate:
        found.update_size()
    dm.load("dev", f"0 32 linear {path} 0")
    dm.suspend("dev")
    dm.resume("dev")
    dev.pwrite(stamp(31, 1, 2), 31 * SECTOR)
    dev.pwrite(stamp(0, 1, 2), 0)
    assert bytes(view) == dev.pread(SECTOR, 0) == stamp(0, 1, 2)
    assert dev.pread(15 * SECTOR, SECTOR) == stamp(1, 15, 1)
    assert dev.pread(16 * SECTOR, 16 * SECTOR) == bytes(15 * SECTOR) + stamp(31, 1, 2)


@pytest.mark.parametrize("size", [8 * SECTOR, 16 * SECTOR + 511])
def test_an_image_keeps_its_size_where_its_file_has_no_sector_more(dm, tmp_path, size):
    path = image(tmp_path / "a.img", 16)
    found = dm.image(path)
    os.truncate(path, size)
    with found.gate:
        found.update_size()
    assert found.sectors == 16


def test_an_image_that_grows_as_it_is_written_has_its_size_already(dm, tmp_path):
    path = image(tmp_path / "a.img", 16)
    found = dm.image(path, size=64 * SECTOR)
    os.truncate(path, 32 * SECTOR)
    with found.gate:
        found.update_size()
    assert found.sectors == 64


def test_a_growing_image_gets_its_file_as_it_is_written(dm, tmp_path):
    origin, store = image(tmp_path / "b.img", 4096), image(tmp_path / "c.img", 16)
    dm.image(store, size=4096 * SECTOR)
    dm.create("base", f"0 4096 snapshot-origin {origin}")
    dm.create("snap", f"0 4096 snapshot {origin} {store} P 8")
    assert dm.status("snap") == "0 4096 snapshot 16/4096 16"
    dm.device("base").pwrite(b"x" * 1024 * SECTOR, 0)
    assert dm.device("snap").pread(4096 * SECTOR, 0) == bytes(4096 * SECTOR)
    size = (tmp_path / "c.img").stat().st_size
    assert 1040 * SECTOR <= size <= 4096 * SECTOR
    assert len(cow.store.open(store).exceptions) == 128


def test_remove_takes_a_suspended_device(dm):
    dm.create("dev", "0 8 zero")
    dm.suspend("dev")
    dm.remove("dev")
    assert dm.names() == []


def test_remove_lets_go_of_the_devices_below(dm):
    dm.create("low", "0 8 zero")
    dm.create("dev", "0 8 linear low 0")
    dm.remove("dev")
    assert dm.info("low").open_count == 0


def test_a_forced_remove_of_an_open_device_leaves_errors(dm, tmp_path):
    path = image(tmp_path / "b.img", 2048)
    dev = dm.create("dev", f"0 2048 linear {path} 0")
    with dev.open() as file:
        assert refused(dm.remove, "dev", force=True) == errno.EBUSY
        assert dm.table("dev") == "0 2048 error "
        with pytest.raises(OSError, match="dev") as caught:
            file.read(SECTOR)
        assert caught.value.errno == errno.EIO
    dm.remove("dev")


def test_a_forced_remove_takes_a_device_nobody_uses(dm):
    dm.create("dev", "0 8 zero")
    dm.remove("dev", force=True)
    assert dm.names() == []


def test_a_deferred_remove_waits_for_the_last_close(dm):
    dev = dm.create("dev", "0 8 zero")
    file = dev.open()
    dm.remove("dev", deferred=True)
    assert dm.info("dev").deferred_remove
    assert file.read(SECTOR) == bytes(SECTOR)
    file.close()
    assert dm.names() == []


def test_a_deferred_remove_waits_for_the_device_above(dm):
    dm.create("low", "0 8 zero")
    dm.create("high", "0 8 linear low 0")
    dm.remove("low", deferred=True)
    assert dm.names() == ["high", "low"]
    dm.remove("high")
    assert dm.names() == []


def test_a_deferred_remove_of_an_idle_device_is_a_remove(dm):
    dm.create("dev", "0 8 zero")
    dm.remove("dev", deferred=True)
    assert dm.names() == []


def test_a_deferred_remove_is_cancelled_by_message(dm):
    file = dm.create("dev", "0 8 zero").open()
    dm.remove("dev", deferred=True)
    assert dm.message("dev", 0, "@cancel_deferred_remove") == ""
    assert not dm.info("dev").deferred_remove
    file.close()
    assert dm.names() == ["dev"]


def test_remove_all_takes_the_stacks_apart(rig):
    rig.snap()
    rig.dm.remove_all()
    assert rig.dm.names() == []


# --- rename, uuid, message, targets -------------------------------------------------------------


def test_rename_changes_the_name_everywhere(dm):
    dev = dm.create("old", "0 8 zero")
    dm.create("high", "0 8 linear old 0")
    dm.rename("old", "new")
    assert dm.names() == ["high", "new"]
    assert dev.name == "new"
    assert dm.table("high") == "0 8 linear new 0"
    assert dm.deps("high") == ["new"]


def test_rename_is_an_event(dm):
    dm.create("old", "0 8 zero")
    dm.rename("old", "new")
    assert dm.events("new") == 1


def test_a_uuid_is_set_once(dm):
    dev = dm.create("dev", "0 8 zero")
    dm.set_uuid("dev", "U-1")
    assert dev.uuid == "U-1"
    assert dm.info("dev").uuid == "U-1"
    assert dm.events("dev") == 1


def test_the_uuid_of_a_removed_device_is_free(dm):
    dm.create("one", "0 8 zero", uuid="U")
    dm.remove("one")
    assert dm.create("two", "0 8 zero", uuid="U").uuid == "U"


def test_names_are_in_the_order_of_their_bytes(dm):
    for name in ["b", "a10", "a9", "B", "é", "a-real", "a"]:
        dm.create(name, "0 8 zero")
    assert dm.names() == ["B", "a", "a-real", "a10", "a9", "b", "é"]


def test_every_target_has_a_version(dm):
    versions = dict(dm.targets())
    assert versions["snapshot"] == (1, 16, 0)
    assert versions["snapshot-origin"] == (1, 9, 0)
    assert versions["snapshot-merge"] == (1, 5, 0)
    assert {"linear", "striped", "zero", "error", "delay", "flakey"} <= set(versions)


# --- info, deps, events, wait -------------------------------------------------------------------


def test_info_tells_all_of_a_device(dm):
    dm.create("dev", "0 8 zero\n8 8 error", uuid="U-1", minor=4, readonly=True)
    info = dm.info("dev")
    assert (info.name, info.uuid, info.major, info.minor) == ("dev", "U-1", 254, 4)
    assert (info.open_count, info.event_nr, info.nr_targets) == (0, 0, 2)
    assert (info.readonly, info.deferred_remove) == (True, False)


def test_the_targets_of_an_inactive_table_do_not_count(dm):
    dm.create("dev")
    dm.load("dev", "0 8 zero")
    info = dm.info("dev")
    assert (info.live, info.inactive, info.nr_targets) == (False, True, 0)


def test_info_is_a_picture_of_its_moment(dm):
    dm.create("dev", "0 8 zero")
    info = dm.info("dev")
    dm.suspend("dev")
    assert not info.suspended


def test_a_table_counts_as_one_open_however_often_it_names_a_device(dm):
    dm.create("low", "0 8 zero")
    dm.create("high", "0 4 linear low 0\n4 4 linear low 4")
    assert dm.info("low").open_count == 1


def test_a_live_and_an_inactive_table_count_as_two_opens(dm):
    dm.create("low", "0 8 zero")
    dm.create("high", "0 8 linear low 0")
    dm.load("high", "0 8 linear low 0")
    assert dm.info("low").open_count == 2


def test_the_cow_device_comes_before_the_origin_in_the_deps(rig):
    rig.dm.create("store", f"0 2048 linear {image(rig.folder / 's.img', 2048)} 0")
    rig.dm.create("snap", "0 2048 snapshot base-real store P 8")
    assert rig.dm.deps("snap") == ["store", "base-real"]


def test_an_image_is_a_dependency(dm, tmp_path):
    path = image(tmp_path / "b.img", 8)
    dm.create("dev", f"0 8 linear {path} 0")
    assert dm.deps("dev") == [path]


def test_a_zero_device_depends_on_nothing(dm):
    dm.create("dev", "0 8 zero")
    assert dm.deps("dev") == []


def test_events_start_at_zero(dm):
    dm.create("dev", "0 8 zero")
    assert dm.events("dev") == 0


def test_wait_returns_at_once_when_the_event_is_over(dm):
    dm.create("dev", "0 8 zero")
    dm.set_uuid("dev", "U")
    assert dm.wait("dev") == 1


def test_wait_returns_with_the_next_event(rig):
    rig.snap("snap", "P 8", cow_sectors=16)
    waiter = Waiter(lambda: rig.dm.wait("snap", 0))
    assert not waiter.done.is_set()
    rig.write("base", 0)
    assert waiter.result() == 1


def test_wait_gives_up_after_its_timeout(dm):
    dm.create("dev", "0 8 zero")
    with pytest.raises(TimeoutError):
        dm.wait("dev", 0, timeout=0.001)


def test_wait_ends_when_the_device_is_removed(dm):
    dm.create("dev", "0 8 zero")
    waiter = Waiter(lambda: dm.wait("dev", 0))
    dm.remove("dev")
    assert waiter.result() == errno.ENXIO


# --- stacking -----------------------------------------------------------------------------------


def test_devices_stack_to_any_depth(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 64, 0))
    dm.create("d0", f"0 64 linear {path} 0")
    for level in range(1, 33):
        dm.create(f"d{level}", f"0 {64 - level} linear d{level - 1} 1")
    assert dm.device("d32").pread(SECTOR, 0) == stamp(32, 1, 0)
    dm.device("d32").pwrite(stamp(32, 1, 5), 0)
    assert dm.device("d0").pread(SECTOR, 32 * SECTOR) == stamp(32, 1, 5)


def test_a_reload_below_is_seen_above(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 0))
    dm.create("low", "0 8 zero")
    dev = dm.create("high", "0 8 linear low 0")
    dm.load("low", f"0 8 linear {path} 0")
    dm.resume("low")
    assert dev.pread(SECTOR, 0) == stamp(0, 1, 0)


def test_a_store_may_lie_on_a_device(rig):
    paths = [image(rig.folder / f"s{n}.img", 1024) for n in range(2)]
    rig.dm.create("store", f"0 2048 striped 2 8 {paths[0]} 0 {paths[1]} 0")
    rig.dm.create("snap", "0 2048 snapshot base-real store P 8")
    rig.write("base", 0, 800)
    assert rig.read("snap") == rig.before
    assert rig.usage() == "816/2048 16"


def test_snapshots_of_snapshots_keep_every_moment(rig):
    moments = {"snap0": rig.before}
    rig.snap("snap0", cow_sectors=4096)
    for level in range(1, 5):
        below = f"snap{level - 1}"
        rig.dm.create(f"{below}-origin", f"0 2048 snapshot-origin {below}")
        store = image(rig.folder / f"{level}.cow", 4096)
        moments[f"snap{level}"] = rig.read(below)
        rig.dm.create(f"snap{level}", f"0 2048 snapshot {below} {store} P 8")
        moments[below] = moments[below][:0] + rig.read(below)
        data = rig.write(f"{below}-origin", 100 * level, 50, tag=level)
        changed = bytearray(moments[below])
        changed[100 * level * SECTOR : (100 * level + 50) * SECTOR] = data
        moments[below] = bytes(changed)
    rig.write("base", 0, 2048, tag=9)
    assert {name: rig.read(name) for name in moments} == moments


def test_a_snapshot_under_a_snapshot_is_not_removed(rig):
    rig.snap("s1")
    rig.dm.create("s2", f"0 2048 snapshot s1 {image(rig.folder / 's2.cow', 2048)} P 8")
    assert refused(rig.dm.remove, "s1") == errno.EBUSY


def test_an_image_may_be_under_any_number_of_devices(dm, tmp_path):
    path = image(tmp_path / "b.img", stamp(0, 8, 0))
    one = dm.create("one", f"0 8 linear {path} 0")
    two = dm.create("two", f"0 8 linear {path} 0")
    one.pwrite(stamp(3, 1, 1), 3 * SECTOR)
    assert two.pread(SECTOR, 3 * SECTOR) == stamp(3, 1, 1)


# --- the mapper itself --------------------------------------------------------------------------


def test_close_twice_is_close(tmp_path):
    dm = cow.Mapper(durability="process")
    Rig(dm, tmp_path).snap()
    dm.close()
    dm.close()


def test_a_closed_mapper_does_nothing_more(dm):
    dev = dm.create("dev", "0 8 zero")
    dm.close()
    with pytest.raises((OSError, ValueError)):
        dm.create("other", "0 8 zero")
    with pytest.raises((OSError, ValueError)):
        dev.pread(SECTOR, 0)


def test_leaving_the_context_closes_the_mapper():
    with cow.Mapper() as dm:
        dev = dm.create("dev", "0 8 zero")
    with pytest.raises((OSError, ValueError)):
        dev.pread(SECTOR, 0)


def test_close_leaves_the_stores_ready_for_the_next_mapper(tmp_path):
    with cow.Mapper(durability="process") as dm:
        rig = Rig(dm, tmp_path)
        rig.snap()
        rig.write("base", 0, 64)
        before, line = rig.read("snap"), rig.line("snap")
    with cow.Mapper(durability="process") as dm:
        dm.create("base-real", f"0 2048 linear {rig.origin} 0")
        dm.create("snap", line)
        assert dm.device("snap").pread(len(before), 0) == before


def test_close_ends_a_waiting_read():
    dm = cow.Mapper(durability="process")
    dev = dm.create("dev", "0 8 zero")
    dm.suspend("dev")
    waiter = Waiter(lambda: dev.pread(SECTOR, 0))
    dm.close()
    assert waiter.result() in (errno.ENXIO, errno.EIO)


def test_an_unknown_durability_is_refused():
    with pytest.raises(cow.CowError, match="forever"):
        cow.Mapper(durability="forever")


def open_files() -> int:
    """Return how many file descriptors this process has."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_closing_a_mapper_gives_its_files_back(tmp_path):
    before = open_files()
    dm = cow.Mapper(durability="process")
    Rig(dm, tmp_path).snap()
    dm.close()
    assert open_files() == before


def test_removing_devices_gives_their_files_back(dm, tmp_path):
    before = open_files()
    rig = Rig(dm, tmp_path)
    rig.snap()
    dm.remove_all()
    assert open_files() == before


def test_refused_tables_give_their_files_back(dm, tmp_path):
    paths = [image(tmp_path / f"{n}.img", stamp(1, 64, n)) for n in range(2)]
    before = open_files()
    for words in [
        f"linear {paths[0]} 60",
        f"snapshot {paths[0]} {paths[1]} P 8",
        f"snapshot {paths[0]} {paths[1]} P 7",
        f"striped 2 8 {paths[0]} 0 {paths[1]} x",
    ]:
        with pytest.raises(cow.TableError):
            dm.create("dev", f"0 64 linear {paths[0]} 0\n64 32 {words}")
    assert open_files() == before


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=repr)
def test_objects_may_be_dropped_in_any_order(tmp_path, order):
    before = open_files()
    dm = cow.Mapper(durability="process")
    rig = Rig(dm, tmp_path, sectors=64)
    device = rig.snap()
    things: list[Any] = [dm, device, device.open(), dm.device("base-real").view()]
    del dm, rig, device
    for index in order:
        thing, things[index] = things[index], None
        if index == 2 or index == 0:
            thing.close()
        del thing
        gc.collect()
    assert open_files() == before


def test_a_mapper_dropped_without_close_gives_its_files_back(tmp_path):
    before = open_files()
    dm = cow.Mapper(durability="process")
    dm.create("dev", f"0 8 linear {image(tmp_path / 'b.img', 8)} 0")
    del dm
    assert open_files() == before


def test_an_image_in_use_by_another_mapper_is_refused(dm, tmp_path):
    path = image(tmp_path / "b.img", 8)
    dm.create("dev", f"0 8 linear {path} 0")
    with cow.Mapper(durability="process") as other:
        with pytest.raises(OSError, match=r"b\.img") as caught:
            other.create("dev", f"0 8 linear {path} 0")
        assert caught.value.errno == errno.EBUSY
        assert other.names() == []


def test_an_image_is_free_once_its_device_is_removed(dm, tmp_path):
    path = image(tmp_path / "b.img", 8)
    dm.create("dev", f"0 8 linear {path} 0")
    dm.remove("dev")
    with cow.Mapper(durability="process") as other:
        assert other.create("dev", f"0 8 linear {path} 0").sectors == 8


# --- events of a filling store, of all devices --------------------------------------------------


def test_a_store_below_its_low_water_mark_raises_one_event(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap(cow_sectors=128)
    dm.set_low_water_mark("snap", 65)
    live = dm.device("snap").live
    assert live is not None
    store = live.targets[0].map.store
    for chunk in range(5):
        rig.write("base", 8 * chunk)
    assert (rig.usage(), dm.events("snap"), store.low_water_mark) == ("56/128 16", 0, 65)
    rig.write("base", 40)
    assert (rig.usage(), dm.events("snap"), store.low_water_mark) == ("64/128 16", 1, 0)
    rig.write("base", 48)
    assert dm.events("snap") == 1


def test_a_store_that_is_below_its_low_water_mark_already_raises_the_event_at_once(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap(cow_sectors=128)
    dm.set_low_water_mark("snap", 113)
    assert dm.events("snap") == 1


def test_waiting_for_any_event_ends_with_the_event_of_any_device(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap(cow_sectors=24)
    before = dm.event_nr
    with pytest.raises(TimeoutError):
        dm.wait_any(before, timeout=0)
    rig.write("base", 0)
    rig.write("base", 8)
    assert dm.wait_any(before, timeout=60) == before + 1
    assert dm.status("snap").endswith("Invalid")


# --- read-only ----------------------------------------------------------------------------------


def read_only(dm: cow.Mapper, path: str) -> str:
    dm.image(path, readonly=True)
    return path


def test_a_fresh_store_on_a_read_only_device_stays_fresh(dm, tmp_path):
    origin = read_only(dm, image(tmp_path / "origin.img", stamp(0, 2048, 1)))
    store = read_only(dm, image(tmp_path / "store.img", 2048))
    dm.create("cow", f"0 2048 linear {store} 0", readonly=True)
    snap = dm.create("snap", f"0 2048 snapshot {origin} cow P 8", readonly=True)
    assert snap.pread(2048 * SECTOR, 0) == stamp(0, 2048, 1)
    dm.remove_all()
    assert Path(store).read_bytes() == bytes(2048 * SECTOR)


def test_a_read_only_merge_shows_what_it_will_give_and_changes_nothing(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap()
    rig.write("snap", 96, 24, 5)
    expected = rig.read("snap")
    dm.remove_all()
    images = [rig.origin, rig.cows["snap"]]
    before = [Path(path).read_bytes() for path in images]
    with cow.Mapper() as other:
        other.image(images[0], readonly=True)
        other.create("cow", f"0 2048 linear {read_only(other, images[1])} 0", readonly=True)
        other.create("real", f"0 2048 linear {images[0]} 0", readonly=True)
        merged = other.create("base", "0 2048 snapshot-merge real cow P 8", readonly=True)
        assert merged.pread(2048 * SECTOR, 0) == expected
        assert other.wait_merge("base").endswith(" 40/2048 16")
    assert [Path(path).read_bytes() for path in images] == before


def test_a_table_may_name_a_device_that_is_not_live_yet(dm, tmp_path):
    path = image(tmp_path / "a.img", stamp(0, 2048, 1))
    dm.create("low")
    dm.load("low", f"0 2048 linear {path} 0")
    dm.create("high")
    dm.load("high", "0 2048 snapshot-origin low")
    dm.resume("low")
    dm.resume("high")
    assert dm.device("high").pread(2048 * SECTOR, 0) == stamp(0, 2048, 1)


def test_a_table_that_does_not_fit_its_device_is_refused_when_it_goes_live(dm, tmp_path):
    path = image(tmp_path / "a.img", 1024)
    dm.create("low")
    dm.create("high")
    dm.load("high", "0 2048 linear low 0")
    dm.load("low", f"0 1024 linear {path} 0")
    dm.resume("low")
    with pytest.raises(cow.TableError, match="low too small for target"):
        dm.resume("high")
