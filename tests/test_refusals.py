"""Every refusal of the kernel: its errno, its text, and that it changed nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from support import SECTOR, Rig, image, refused, stamp, store_bytes

import cow

EINVAL, EBUSY, ENOENT, ENXIO = errno.EINVAL, errno.EBUSY, errno.ENOENT, errno.ENXIO


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


class Scene:
    """Some images and devices, and what they look like, to see whether anything changed."""

    def __init__(self, dm, folder: Path) -> None:
        self.dm = dm
        self.paths = {
            "b": image(folder / "b.img", stamp(0, 2048, 1)),
            "c": image(folder / "c.img", 2048),
            "big": image(folder / "big.img", stamp(1, 4096, 2)),
            "tiny": image(folder / "tiny.img", 8),
            "none": str(folder / "nosuch.img"),
        }
        dm.image(self.paths["big"], logical_block_size=4096)
        dm.create("live", f"0 64 linear {self.paths['b']} 0")
        dm.load("live", "0 32 zero")
        dm.create("bystander", f"0 2048 snapshot-origin {self.paths['b']}")

    def fill(self, table: str) -> str:
        return table.format(**self.paths)

    def picture(self) -> list:
        dm = self.dm
        lines = [dm.table(), dm.table(inactive=True), dm.status(), dm.names()]
        infos = [dm.info(name) for name in dm.names()]
        files = [Path(path).read_bytes() for key, path in self.paths.items() if key != "none"]
        return [*lines, infos, files]


@pytest.fixture
def scene(dm, tmp_path):
    return Scene(dm, tmp_path)


def check(scene: Scene, call, code: int, text: str) -> None:
    """Check that `call` is refused with this errno and text, and that nothing changed."""
    before = scene.picture()
    with pytest.raises(cow.CowError) as caught:
        call()
    assert caught.value.errno == code
    assert text in str(caught.value)
    assert scene.picture() == before


def check_table(scene: Scene, table: str, code: int, text: str) -> None:
    """Check that a table is refused for a device that is new and for one that has tables."""
    table = scene.fill(table)
    check(scene, lambda: scene.dm.create("new", table), code, text)
    check(scene, lambda: scene.dm.load("live", table), code, text)


# --- tables -------------------------------------------------------------------------------------

TABLES = [
    ("0 0 zero", EINVAL, "zero-length target"),
    ("0 8 zero\n8 0 zero", EINVAL, "zero-length target"),
    ("0 0 nosuch", EINVAL, "zero-length target"),
    ("0 18014398509481984 zero", EINVAL, "too large device"),
    ("0 18446744073709551615 zero", EINVAL, "too large device"),
    ("0 -1 zero", EINVAL, "too large device"),
    ("0 8 zero\n8 18446744073709551610 zero", EINVAL, "too large device"),
    ("0 8 nosuch", EINVAL, "nosuch: unknown target type"),
    ("0 8 Linear {b} 0", EINVAL, "Linear: unknown target type"),
    ("10 8 nosuch", EINVAL, "nosuch: unknown target type"),
    ("10 8 zero", EINVAL, "zero: Gap in table"),
    ("0 8 zero\n9 8 linear {b} 0", EINVAL, "linear: Gap in table"),
    ("0 8 zero\n7 8 zero", EINVAL, "zero: Gap in table"),
    ("8 8 zero\n0 8 zero", EINVAL, "zero: Gap in table"),
    ("0 8 zero\n9 8 linear {b}", EINVAL, "linear: Gap in table"),
    ("0 8 targetnamefourteen1", EINVAL, "Target type name targetnamefourteen1 is too long."),
    ("0 8 sixteenletters16", EINVAL, "Target type name sixteenletters16 is too long."),
    ("0 8 fifteenletters1", EINVAL, "fifteenletters1: unknown target type"),
]

UNALIGNED_LINE = "not aligned to h/w logical block size 4096"

LIMITS = [
    ("0 2049 linear {b} 0", EINVAL, "too small for target: start=0, len=2049, dev_size=2048"),
    ("0 8 linear {b} 2041", EINVAL, "too small for target: start=2041, len=8, dev_size=2048"),
    ("0 8 linear {b} 2048", EINVAL, "too small for target"),
    ("0 8 linear {b} 9999999", EINVAL, "too small for target"),
    ("0 2049 snapshot-origin {b}", EINVAL, "too small for target: start=0, len=2049"),
    ("0 2049 snapshot {b} {c} P 8", EINVAL, "too small for target: start=0, len=2049"),
    ("0 128 striped 2 8 {b} 0 {b} 2000", EINVAL, "too small for target: start=2000, len=64"),
    ("0 128 striped 2 8 {b} 0 {b} 99999999999999999", EINVAL, "too small for target"),
    ("0 8 linear {b} 99999999999999999", EINVAL, "too small for target"),
    ("0 9 linear {big} 0", EINVAL, "len=9 not aligned to h/w logical block size 4096 of"),
    ("0 8 linear {big} 1", EINVAL, "start=1 not aligned to h/w logical block size 4096 of"),
    ("0 9 linear {b} 0\n9 8 linear {big} 0", EINVAL, UNALIGNED_LINE),
    ("0 9 zero\n9 8 linear {big} 0", EINVAL, UNALIGNED_LINE),
]


@pytest.mark.parametrize(("table", "code", "text"), TABLES, ids=[row[0] for row in TABLES])
def test_a_table_is_refused(scene, table, code, text):
    check_table(scene, table, code, text)


@pytest.mark.parametrize(("table", "code", "text"), LIMITS, ids=[row[0] for row in LIMITS])
def test_a_first_table_past_a_limit_is_refused(scene, table, code, text):
    check(scene, lambda: scene.dm.create("new", scene.fill(table)), code, text)


def test_a_table_past_a_limit_leaves_the_live_one(scene):
    before = scene.dm.table("live"), scene.dm.device("live").pread(4096, 0)
    scene.dm.load("live", scene.fill("0 2049 linear {b} 0"))
    with pytest.raises(cow.CowError, match="too small for target") as caught:
        scene.dm.resume("live")
    assert caught.value.errno == EINVAL
    if scene.dm.info("live").suspended:
        scene.dm.resume("live")
    assert (scene.dm.table("live"), scene.dm.device("live").pread(4096, 0)) == before


@pytest.mark.parametrize("table", ["", "\n\n", "  # only words"])
def test_a_table_of_no_lines_is_not_loaded(scene, table):
    check(scene, lambda: scene.dm.load("live", table), EINVAL, "no targets specified")


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("0 8", 1),
        ("zero", 1),
        ("0 8 zero\n8 8", 2),
        ("# a comment\n\n0 8", 3),
        ("0x10 8 zero", 1),
        ("0 eight zero", 1),
        ("0 8 zero\nnext 8 zero", 2),
    ],
)
def test_a_line_out_of_form_is_refused_with_its_number(scene, table, line):
    check_table(scene, table, EINVAL, f"table line {line}: Invalid format")


def test_a_line_out_of_form_is_a_value_error(dm):
    with pytest.raises(cow.TableFormatError) as caught:
        dm.create("new", "0 8 zero\n8 8")
    assert isinstance(caught.value, ValueError)
    assert caught.value.line == 2


def test_a_refused_table_names_its_device_and_line(dm):
    with pytest.raises(cow.TableError) as caught:
        dm.create("new", "0 8 zero\n# between\n8 8 nosuch")
    error = caught.value
    assert (error.errno, error.device, error.line) == (EINVAL, "new", 3)
    assert "new: table line 3: nosuch: unknown target type" in str(error)


def test_more_targets_than_the_kernel_takes_are_refused(scene):
    table = "\n".join(f"{start} 1 zero" for start in range(1048577))
    check(scene, lambda: scene.dm.load("live", table), errno.EOVERFLOW, "")


# --- targets ------------------------------------------------------------------------------------

LINEAR = [
    ("linear", EINVAL, "linear: Invalid argument count"),
    ("linear {b}", EINVAL, "linear: Invalid argument count"),
    ("linear {b} 0 junk", EINVAL, "linear: Invalid argument count"),
    ("linear {none} zero 1", EINVAL, "linear: Invalid argument count"),
    ("linear {b} -5", EINVAL, "linear: Invalid device sector"),
    ("linear {b} 0x8", EINVAL, "linear: Invalid device sector"),
    ("linear {none} x", EINVAL, "linear: Invalid device sector"),
    ("linear {none} 0", ENOENT, "linear: Device lookup failed"),
    ("linear 99:99 0", ENXIO, "linear: Device lookup failed"),
]

STRIPED = [
    ("striped", EINVAL, "striped: Not enough arguments"),
    ("striped 2", EINVAL, "striped: Not enough arguments"),
    ("striped 0 8", EINVAL, "striped: Invalid stripe count"),
    ("striped x 0", EINVAL, "striped: Invalid stripe count"),
    ("striped 2 0 {b} 0 {b} 0", EINVAL, "striped: Invalid chunk_size"),
    ("striped 3 x", EINVAL, "striped: Invalid chunk_size"),
    ("striped 3 7", EINVAL, "striped: Target length not divisible by number of stripes"),
    ("striped 2 7 {b} 0", EINVAL, "striped: Target length not divisible by chunk size"),
    ("striped 2 8 {b} 0", EINVAL, "striped: Not enough destinations specified"),
    ("striped 2 8 {b} 0 {b}", EINVAL, "striped: Not enough destinations specified"),
    ("striped 2 8 {b} 0 {b} 0 {b} 0", EINVAL, "striped: Not enough destinations specified"),
    ("striped 2 8 {b} 0 {b} x", EINVAL, "striped: Couldn't parse stripe destination"),
    ("striped 2 8 {b} 0 {none} 0", ENOENT, "striped: Couldn't parse stripe destination"),
]

OTHERS = [
    ("zero 1", EINVAL, "zero: No arguments required"),
    ("snapshot-origin", EINVAL, "snapshot-origin: origin: incorrect number of arguments"),
    ("snapshot-origin {b} {c}", EINVAL, "snapshot-origin: origin: incorrect number of arguments"),
    ("snapshot-origin {none}", ENOENT, "snapshot-origin: Cannot get target device"),
]

STORE = "snapshot: Couldn't create exception store"

# In the order in which they are checked: each is also wrong in a way that is checked later.
SNAPSHOT = [
    ("snapshot", EINVAL, "snapshot: requires 4 or more arguments"),
    ("snapshot {none} {none} X", EINVAL, "snapshot: requires 4 or more arguments"),
    ("snapshot {none} {c} P 8 3", EINVAL, "snapshot: Invalid number of feature arguments"),
    ("snapshot {none} {c} P 8 x", EINVAL, "snapshot: Invalid number of feature arguments"),
    ("snapshot {b} {c} P 8 1", EINVAL, "snapshot: Invalid number of feature arguments"),
    ("snapshot {b} {c} P 8 3 a b c", EINVAL, "snapshot: Invalid number of feature arguments"),
    ("snapshot {none} {c} P 8 1 nosuch", EINVAL, "snapshot: Unrecognised feature requested"),
    (
        "snapshot {none} {c} P 8 1 discard_passdown_origin",
        EINVAL,
        "snapshot: discard_passdown_origin feature depends on discard_zeroes_cow",
    ),
    ("snapshot {none} {none} X 7", ENOENT, "snapshot: Cannot get origin device"),
    ("snapshot {b} {none} X 7", ENOENT, "snapshot: Cannot get COW device"),
    ("snapshot {c} {c} X 7", EINVAL, "COW device cannot be the same as origin device"),
    ("snapshot {b} {c} X 8", EINVAL, STORE),
    ("snapshot {b} {c} persistent 8", EINVAL, STORE),
    ("snapshot {b} {c} PX 8", EINVAL, STORE),
    ("snapshot {b} {c} P 7", EINVAL, STORE),
    ("snapshot {b} {c} P 12", EINVAL, STORE),
    ("snapshot {b} {c} P -8", EINVAL, STORE),
    ("snapshot {b} {c} P 0x8", EINVAL, STORE),
    ("snapshot {b} {c} P 8k", EINVAL, STORE),
    ("snapshot {b} {c} P x", EINVAL, STORE),
    ("snapshot {b} {c} P 4194304", EINVAL, STORE),
    ("snapshot {b} {c} N 4294967296", EINVAL, STORE),
    ("snapshot {b} {big} P 4", EINVAL, STORE),
    ("snapshot {big} {c} P 4", EINVAL, STORE),
    ("snapshot {b} {big} P 8", ENXIO, "snapshot: Failed to read snapshot metadata"),
    ("snapshot {b} {c} N 0", EINVAL, "snapshot: Chunk size not set"),
    ("snapshot-merge {b} {c} P", EINVAL, "snapshot-merge: requires 4 or more arguments"),
    ("snapshot-merge {b} {none} P 8", ENOENT, "snapshot-merge: Cannot get COW device"),
    (
        "snapshot-merge {b} {c} N 8",
        EINVAL,
        "Snapshot exception store does not support snapshot-merge.",
    ),
]

TARGETS = [*LINEAR, *STRIPED, *OTHERS, *SNAPSHOT]


@pytest.mark.parametrize(("words", "code", "text"), TARGETS, ids=[row[0] for row in TARGETS])
def test_a_target_is_refused(scene, words, code, text):
    check_table(scene, f"0 64 {words}", code, text)


@pytest.mark.parametrize(("words", "code", "text"), TARGETS[::5], ids=[r[0] for r in TARGETS[::5]])
def test_a_target_refused_on_a_later_line_undoes_the_lines_before(scene, words, code, text):
    table = f"0 64 linear {{b}} 0\n64 64 {words}"
    check_table(scene, table, code, text)


def test_a_device_is_not_its_own_target(scene):
    check(scene, lambda: scene.dm.load("live", "0 8 linear live 0"), EINVAL, "")


def test_two_devices_are_not_each_others_target(dm):
    dm.create("low", "0 8 zero")
    dm.create("high", "0 8 linear low 0")
    with pytest.raises(cow.CowError, match="low"):
        dm.load("low", "0 8 linear high 0")
    assert dm.device("high").pread(SECTOR, 0) == bytes(SECTOR)


def test_a_refused_snapshot_table_does_not_touch_a_fresh_store(scene):
    """The line after the snapshot is the bad one."""
    table = "0 64 snapshot {b} {c} P 8\n64 8 nosuch"
    check_table(scene, table, EINVAL, "nosuch: unknown target type")


# --- stores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("58585858 01000000 01000000 08000000", ENXIO),
        ("536e4170 01000000 02000000 08000000", EINVAL),
        ("536e4170 00000000 02000000 08000000", EINVAL),
        ("536e4170 01000000 01000000 0c000000", EINVAL),
        ("536e4170 01000000 01000000 00000000", EINVAL),
        ("536e4170 01000000 01000000 00000001", EINVAL),
    ],
    ids=["magic", "version", "version_invalid", "chunk_12", "chunk_0", "chunk_too_high"],
)
def test_a_store_is_refused_and_left_alone(scene, header, code):
    Path(scene.paths["c"]).write_bytes(bytes.fromhex(header).ljust(2048 * SECTOR, b"\x11"))
    table = "0 2048 snapshot {b} {c} P 8"
    check_table(scene, table, code, "snapshot: Failed to read snapshot metadata")


def test_a_store_shorter_than_a_read_of_its_header_is_refused(scene):
    table = "0 2048 snapshot {b} {tiny} P 16"
    with pytest.raises(OSError, match="Failed to read snapshot metadata") as caught:
        scene.dm.create("new", scene.fill(table))
    assert caught.value.errno == errno.EIO


# --- handover and merge -------------------------------------------------------------------------


@pytest.fixture
def rig(dm, tmp_path):
    rig = Rig(dm, tmp_path)
    rig.snap()
    rig.write("base", 0, 24)
    return rig


def rig_picture(rig: Rig) -> list:
    return [
        rig.dm.table(),
        rig.dm.table(inactive=True),
        rig.dm.status(),
        [Path(path).read_bytes() for path in [rig.origin, *rig.cows.values()]],
    ]


PAIRING = "Snapshot cow pairing for exception table handover failed"


def test_a_store_with_two_tables_takes_no_third(rig):
    rig.dm.load("snap", rig.line("snap"))
    before = rig_picture(rig)
    with pytest.raises(OSError, match=PAIRING) as caught:
        rig.dm.create("third", rig.line("snap"))
    assert caught.value.errno == EINVAL
    assert rig_picture(rig) == before


def test_a_second_inactive_table_for_one_store_is_refused(rig):
    rig.dm.create("next", "0 8 zero")
    rig.dm.load("next", rig.line("snap"))
    before = rig_picture(rig)
    with pytest.raises(OSError, match=PAIRING) as caught:
        rig.dm.load("snap", rig.line("snap"))
    assert caught.value.errno == EINVAL
    assert rig_picture(rig) == before


def test_one_store_is_not_used_under_two_origins(rig):
    other = image(rig.folder / "other.img", 2048)
    before = rig_picture(rig)
    with pytest.raises(cow.CowError) as caught:
        rig.dm.create("wrong", f"0 2048 snapshot {other} {rig.cows['snap']} P 8")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno in (EBUSY, EINVAL)
    assert rig_picture(rig) == before


def merge_live(rig: Rig) -> None:
    """Make base the merge of snap, by handover."""
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    rig.dm.suspend("snap")
    rig.dm.resume("base")


def test_a_merge_is_not_loaded_over_itself(rig):
    merge_live(rig)
    rig.dm.remove("snap")
    with pytest.raises(OSError, match=r"A snapshot is already merging\.") as caught:
        rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    assert caught.value.errno == EINVAL
    assert not rig.dm.info("base").inactive


def test_a_second_merge_by_handover_is_refused(rig):
    rig.snap("other")
    merge_live(rig)
    rig.dm.create("second", "0 8 zero")
    with pytest.raises(OSError, match=r"A snapshot is already merging\.") as caught:
        rig.dm.load("second", rig.line("other", kind="snapshot-merge"))
    assert caught.value.errno == EINVAL
    assert not rig.dm.info("second").inactive


def test_a_transient_store_is_not_merged_by_handover(rig):
    rig.snap("volatile", "N 8")
    with pytest.raises(OSError, match="does not support snapshot-merge") as caught:
        rig.dm.load("base", rig.line("volatile", "N 8", kind="snapshot-merge"))
    assert caught.value.errno == EINVAL
    assert not rig.dm.info("base").inactive


# --- names, uuids, minors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "a/b", "/", ".", "..", "control", "n" * 128, "é" * 64], ids=repr
)
def test_a_name_is_refused(scene, name):
    check(scene, lambda: scene.dm.create(name, "0 8 zero"), EINVAL, "")
    check(scene, lambda: scene.dm.rename("live", name), EINVAL, "")


@pytest.mark.parametrize("name", ["n" * 127, "controls", "...", "a b", "ü"])
def test_a_name_is_accepted(dm, name):
    dm.create(name, "0 8 zero")
    assert dm.names() == [name]


def test_a_uuid_that_is_too_long_is_refused(scene):
    check(scene, lambda: scene.dm.create("new", "0 8 zero", uuid="u" * 129), EINVAL, "")
    check(scene, lambda: scene.dm.set_uuid("live", "u" * 129), EINVAL, "")


def test_a_name_in_use_is_refused(scene):
    check(scene, lambda: scene.dm.create("live", "0 8 zero"), EBUSY, "live")


def test_a_uuid_in_use_is_refused(scene):
    scene.dm.create("first", "0 8 zero", uuid="U-1")
    check(scene, lambda: scene.dm.create("new", "0 8 zero", uuid="U-1"), EBUSY, "U-1")
    check(scene, lambda: scene.dm.set_uuid("live", "U-1"), EBUSY, "U-1")


def test_a_minor_in_use_is_refused(scene):
    minor = scene.dm.info("live").minor
    before = scene.picture()
    assert refused(scene.dm.create, "new", "0 8 zero", minor=minor) == EBUSY
    assert scene.picture() == before


def test_a_rename_to_a_name_in_use_is_refused(scene):
    check(scene, lambda: scene.dm.rename("live", "bystander"), EBUSY, "bystander")
    check(scene, lambda: scene.dm.rename("live", "live"), EBUSY, "live")


def test_a_second_uuid_is_refused(scene):
    scene.dm.set_uuid("live", "U-1")
    check(scene, lambda: scene.dm.set_uuid("live", "U-2"), EINVAL, "")


MISSING = {
    "load": ("0 8 zero",),
    "clear": (),
    "suspend": (),
    "resume": (),
    "remove": (),
    "rename": ("other",),
    "set_uuid": ("U",),
    "message": (0, "hello"),
    "info": (),
    "deps": (),
    "events": (),
    "wait": (),
    "device": (),
    "table": (),
    "status": (),
}


@pytest.mark.parametrize("verb", MISSING)
def test_a_missing_device_is_refused(scene, verb):
    call = getattr(scene.dm, verb)
    check(scene, lambda: call("nosuch", *MISSING[verb]), ENXIO, "nosuch")


# --- life cycle ---------------------------------------------------------------------------------


def test_a_device_under_another_is_not_removed(dm):
    dm.create("low", "0 8 zero")
    dm.create("high", "0 8 linear low 0")
    with pytest.raises(cow.CowError, match="low") as caught:
        dm.remove("low")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == EBUSY
    assert dm.names() == ["high", "low"]


def test_a_device_under_an_inactive_table_is_not_removed(dm):
    dm.create("low", "0 8 zero")
    dm.create("high", "0 8 zero")
    dm.load("high", "0 8 linear low 0")
    with pytest.raises(OSError, match="low") as caught:
        dm.remove("low")
    assert caught.value.errno == EBUSY


def test_a_suspended_device_with_no_table_does_not_resume(dm):
    dm.create("empty")
    dm.suspend("empty")
    with pytest.raises(OSError, match="empty") as caught:
        dm.resume("empty")
    assert caught.value.errno == EINVAL
    assert dm.info("empty").suspended


@pytest.mark.parametrize(
    "table", ["0 8 zero", "0 2048 snapshot {b} {c} P 8", "0 2048 snapshot-origin {b}"]
)
def test_a_message_is_refused_by_targets_that_take_none(scene, table):
    scene.dm.create("new", scene.fill(table))
    text = "Target type does not support messages"
    check(scene, lambda: scene.dm.message("new", 0, "hello"), EINVAL, text)


def test_a_message_outside_the_device_is_refused(scene):
    text = "Target message sector outside device."
    check(scene, lambda: scene.dm.message("live", 64, "hello"), EINVAL, text)


# --- concise text -------------------------------------------------------------------------------


def test_a_concise_entry_with_bad_flags_is_refused(scene):
    text = "Invalid flags parameter 'zz' must be 'ro' or 'rw' or empty."
    check(scene, lambda: scene.dm.create_concise("new,,,zz,0 8 zero"), EINVAL, text)


def test_a_concise_entry_with_too_few_fields_is_refused(scene):
    text = "Incomplete entry: five comma-separated fields are required for each device"
    check(scene, lambda: scene.dm.create_concise("new,,,rw"), EINVAL, text)


def test_a_damaged_store_text_names_the_store(scene):
    Path(scene.paths["c"]).write_bytes(store_bytes([(1, 1)]))
    with pytest.raises(cow.TableError, match=r"c\.img"):
        scene.dm.create("new", scene.fill("0 2048 snapshot {b} {c} P 8"))
