"""The text of the metadata: what is read, what is refused, and that real texts come back whole."""

from __future__ import annotations

import random
import re
import time

import pytest
from support import lvm as support

from cow.lvm.check import problems
from cow.lvm.errors import MetadataError
from cow.lvm.metadata_text import vg_from_section, vg_from_text, vg_section
from cow.lvm.names import (
    dashed_id,
    dm_name,
    dm_uuid,
    free_name,
    is_name,
    is_tag,
    new_id,
    plain_id,
    split_dm_name,
)
from cow.lvm.size import display_size
from cow.lvm.text import Section, backup_text, disk_text, parse, section_text

DISKS = [disk for _, disks in support.SAMPLES.values() for disk in disks]


@pytest.fixture
def utc(monkeypatch):
    """Times in comments are local; those of the samples are UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# Real texts.


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("copied", [False, True])
def test_every_generation_on_a_real_disk_comes_back_to_the_byte(disk, copied, utc):
    texts = list(support.ring_texts(disk))
    assert texts
    for text in texts:
        vg = vg_from_text(parse(text))
        if copied:
            vg = vg.copy()
        again = disk_text(vg.name, vg_section(vg), vg.header, *support.comments_of(text.decode()))
        assert again.decode() == text.decode()


def test_a_text_with_every_kind_of_segment_comes_back_to_the_byte(utc):
    text = support.every_kind()
    vg = vg_from_text(parse(text))
    again = disk_text(vg.name, vg_section(vg.copy()), vg.header, *support.comments_of(text))
    assert again == text.encode() + b"\0"
    assert problems(vg) == []
    kinds = {lv.name: lv.segments[0] for lv in vg.lvs}
    assert [name for name, segment in kinds.items() if not segment.runnable] == [
        *("r1", "r0", "cached", "pool", "thin", "cp_cpool"),
    ]
    assert all(segment.known for segment in kinds.values())
    assert kinds["cp_cpool"].type_flags == ["METADATA_FORMAT"]
    assert kinds["mir"].mirror_log is vg.lv("mir_mlog")
    assert [area.of.name for area in kinds["mir"].areas] == ["mir_mimage_0", "mir_mimage_1"]
    assert kinds["lin2"].areas[0].of is vg.lv("a")


@pytest.mark.parametrize("sample", support.SAMPLES)
def test_every_real_backup_comes_back_to_the_byte(sample, utc):
    text = support.backup_of(sample)
    vg = vg_from_text(parse(text))
    again = backup_text(vg.name, vg_section(vg), vg.header, *support.comments_of(text))
    assert again == text


# The grammar.


def plain(section: Section) -> dict:
    """Return a section as plain dictionaries."""
    return {k: plain(v) if isinstance(v, Section) else v for k, v in section.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a=1", {"a": 1}),
        ("a = -1 b = +2 c=0", {"a": -1, "b": 2, "c": 0}),
        ("a = 010 b = -017", {"a": 8, "b": -15}),
        ("a = 9223372036854775807", {"a": 2**63 - 1}),
        ("a = -9223372036854775808", {"a": -(2**63)}),
        ("a = 1.5 b = .5 c = -2. d = +0.25", {"a": 1.5, "b": 0.5, "c": -2.0, "d": 0.25}),
        (r'a = "x\"y\\z\n"', {"a": 'x"y\\z\\n'}),
        (r"a = 'x\"y' b = ''", {"a": 'x\\"y', "b": ""}),
        ("a = word-with_marks.1", {"a": "word-with_marks.1"}),
        ('a = "two\nlines"', {"a": "two\nlines"}),
        ('a = "# no comment" # one', {"a": "# no comment"}),
        ("a = []", {"a": []}),
        ("a = [ 1 , 'x' \"y\" z 2.5, ]", {"a": [1, "x", "y", "z", 2.5]}),
        ("a{b{c=1}}d=2", {"a": {"b": {"c": 1}}, "d": 2}),
        ("a {} b { }", {"a": {}, "b": {}}),
        ('"a b" { "c{" = 1 }', {"a b": {"c{": 1}}),
        ("a/b/c = 1 a/b/d = 2", {"a": {"b": {"c": 1, "d": 2}}}),
        ("a/b { c = 1 } a { d = 2 }", {"a": {"b": {"c": 1}, "d": 2}}),
        ("\r\n\t\v\fa\r=\n1\r\n", {"a": 1}),
        ("# only\n#comments", {}),
        ("a = 1\0 } garbage", {"a": 1}),
        ("å = 'ö'", {"å": "ö"}),
    ],
)
def test_what_is_read(text, expected):
    section = parse(text)
    assert plain(section) == expected
    assert plain(parse(text.encode())) == expected
    assert plain(parse(section_text(section))) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a", "expected = or {"),
        ("a =", "expected a value"),
        ("a = }", "expected a value"),
        ("= 1", "expected a key"),
        ("}", "} without a section"),
        ("a { b = 1", "section a does not end"),
        ("a { b { c = 1 }", "section a does not end"),
        ("a = [1", "expected a value"),
        ("a = [[1]]", "expected a value"),
        ('a = "x', "expected a value"),
        ("a = 'x", "expected a value"),
        ("a = 08", "08 is not an octal number"),
        ("a = 9223372036854775808", "out of range"),
        ("a = -9223372036854775809", "out of range"),
        ("a = " + "9" * 5000, "out of range"),
        ("a = " + "9" * 5000 + ".0", "out of range"),
        ("a = 1.2.3", "expected"),
        ("a = +", "expected a value"),
        ("a = 1 2", "expected = or {"),
        ("a {" * 64, "deeper than 64"),
        ("/".join("a" * 65) + " = 1", "deeper than 64"),
        ("a = {", "expected a value"),
        ("a = b = c", "expected a key"),
    ],
)
def test_what_is_not_read(text, error):
    with pytest.raises(MetadataError) as caught:
        parse(text)
    assert error in caught.value.strerror


def test_an_error_names_byte_and_line():
    with pytest.raises(MetadataError, match=r"Parse error at byte 9 \(line 3\): "):
        parse("a = 1\n\nb }\n")


def test_the_first_of_equal_keys_is_kept_and_the_others_told():
    warnings: list[str] = []
    section = parse("a = 1 a = 2 s { b = 3 } s { b = 4 c = 5 } a { } s = 6", warnings.append)
    assert plain(section) == {"a": 1, "s": {"b": 3, "c": 5}}
    assert warnings == [
        "WARNING: Ignoring duplicate config value: a",
        "WARNING: Ignoring duplicate config value: s/b",
        "WARNING: Ignoring duplicate config value: a",
        "WARNING: Ignoring duplicate config value: s",
    ]


def test_bytes_that_are_no_text_come_back():
    data = bytes(range(1, 256)).replace(b'"', b"").replace(b"\\", b"")
    section = parse(b'a = "' + data + b'"')
    assert section_text(section).encode("utf-8", "surrogateescape") == b'a = "' + data + b'"\n'


def test_random_sections_come_back(seed):
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices("ab1/ #={}[]\"'\\,.-+\n\tå", k=rng.randrange(1, 9)))

    def scalar():
        number = rng.choice([0, 1, -1, 2**63 - 1, -(2**63), rng.getrandbits(40)])
        return rng.choice([number, float(number), rng.random(), word(), ""])

    def section(depth: int) -> Section:
        made = Section()
        for _ in range(rng.randrange(6)):
            kind = rng.randrange(3 if depth else 2)
            value = [scalar, lambda: [scalar() for _ in range(rng.randrange(4))]][kind % 2]
            made[word().replace("/", "x")] = section(depth - 1) if kind == 2 else value()
        return made

    for number in range(300):
        made = section(4)
        assert parse(section_text(made)) == made, f"seed {seed}, section {number}"


def time_to_parse(count: int) -> float:
    """Return the seconds to read a text of `count` LVs, of this thread: others may be at work."""
    lv = support.backup_of("c_noncontig").partition("\t\tone {")[2].partition("\t\tthree")[0]
    lvs = "".join(f"\t\tlv{number} {{{lv}" for number in range(count))
    text = support.backup_of("c_noncontig").replace("\t\tone {", lvs + "\t\tone {")
    started = time.thread_time()
    assert len(parse(text)["vgc"]["logical_volumes"]) == count + 2
    return time.thread_time() - started


def test_a_long_text_is_read_in_the_time_its_length_takes():
    assert min(time_to_parse(3000) for _ in range(3)) < 50 * time_to_parse(300)


# Writing for people.


def test_a_backup_says_sizes_as_lvm_does():
    text = support.backup_of("c_noncontig").replace("8192\t\t# 4 Mega", "2048\t\t# 1024 Kilo")
    section = parse(text)["vgc"]
    for sectors, shown in (
        (2, "1 Kilobytes"),
        (3, "1.5 Kilobytes"),
        (2048, "1024 Kilobytes"),
        (2050, "1.00098 Megabytes"),
        (976771120, "465.761 Gigabytes"),
        (2**41, "1024 Terabytes"),
        (2**60, "512 Exabytes"),
    ):
        section["physical_volumes"]["pv0"]["dev_size"] = sectors
        assert f"dev_size = {sectors}\t# {shown}\n" in backup_text("vgc", section, Section(), "x")


# Names.


@pytest.mark.parametrize("name", ["a", "A-z.0_9+", "x" * 127, "...", "_", "+", ".a"])
def test_a_name_may_be(name):
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "-a", ".", "..", "a b", "a/b", "å", "x" * 128, "a\n", "a@b"])
def test_a_name_may_not_be(name):
    assert not is_name(name)


@pytest.mark.parametrize("tag", ["a", "k=v", "a:b", "A_0+.-/=!:&#", "-x", "x" * 1024])
def test_a_tag_may_be(tag):
    assert is_tag(tag)


@pytest.mark.parametrize("tag", ["", "a b", "@a", "a@b", "å", "x" * 1025, "a\n", '"'])
def test_a_tag_may_not_be(tag):
    assert not is_tag(tag)


def test_a_uuid_is_written_in_groups_and_read_either_way():
    plain_uuid = "XuUCCluJOOf9hMRQkpAh7nh8NTwOwYUR"
    dashed = "XuUCCl-uJOO-f9hM-RQkp-Ah7n-h8NT-wOwYUR"
    assert dashed_id(plain_uuid) == dashed
    assert plain_id(dashed) == plain_id(plain_uuid) == plain_uuid
    assert plain_id("!" * 16 + "#" * 16)
    for wrong in ("", "a" * 31, "a" * 33, "a" * 31 + "-", "a" * 31 + "?", "å" * 32):
        with pytest.raises(MetadataError):
            plain_id(wrong)


def test_new_uuids_are_letters_and_digits():
    uuids = {new_id() for _ in range(200)}
    assert len(uuids) == 200
    assert all(re.fullmatch("[0-9a-zA-Z]{32}", uuid) for uuid in uuids)
    assert len(set("".join(uuids))) == 62


@pytest.mark.parametrize(
    ("vg", "lv", "layer", "name"),
    [
        ("vg", "lv", "", "vg-lv"),
        ("vg-x", "root-fs", "", "vg--x-root--fs"),
        ("vg-x", "root-fs", "real", "vg--x-root--fs-real"),
        ("my-vg-01", "a--b.c_d+e", "cow", "my--vg--01-a----b.c_d+e-cow"),
        ("a-", "b", "", "a---b"),
    ],
)
def test_dm_names_double_every_hyphen(vg, lv, layer, name):
    assert dm_name(vg, lv, layer) == name
    assert split_dm_name(name) == (vg, lv, layer)


def test_a_dm_uuid_is_that_of_vg_and_lv():
    assert dm_uuid("v" * 32, "l" * 32) == "LVM-" + "v" * 32 + "l" * 32
    assert dm_uuid("v" * 32, "l" * 32, "real").endswith("l-real")


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ([], "lvol0"),
        (["lvol0", "lvol1"], "lvol2"),
        (["lvol7"], "lvol8"),
        (["lvol", "xlvol3", "lvol2x"], "lvol0"),
    ],
)
def test_automatic_names_count_from_the_highest(names, name):
    assert free_name("lvol", names) == name


# The metadata as objects.


def test_a_section_is_left_as_it_was_when_it_is_read():
    section = parse(support.backup_of("e_snapshots"))["vge"]
    before = section.copy()
    vg_from_section("vge", section)
    assert section == before


def test_a_copy_has_nothing_of_the_original_but_its_devices():
    vg = vg_from_text(parse(support.backup_of("f_thin")))
    device = object()
    vg.pvs[0].device = device
    copy = vg.copy()
    before = vg_section(vg)
    assert vg_section(copy) == before
    assert copy.pvs[0].device is device
    for lv in copy.lvs:
        lv.name += "x"
        lv.tags.append("t")
        lv.extra["x"] = 1
        for segment in lv.segments:
            segment.extra["x"] = 1
            segment.extent_count += 1
            for area in segment.areas:
                assert area.of in (*copy.pvs, *copy.lvs)
                area.start += 1
            for other in (segment.origin, segment.cow):
                assert other is None or other in copy.lvs
    copy.pvs[0].tags.append("t")
    copy.tags.append("t")
    copy.header["x"] = 1
    del copy.lvs[0]
    assert vg_section(vg) == before
    assert vg.tags == []
    assert "x" not in vg.header


def test_status_words_are_in_lvms_order():
    lv = vg_from_text(parse(support.backup_of("d_hyphens_tags"))).lv("root-fs")
    lv.set_status("WRITE", True)
    assert lv.status == ["READ", "WRITE", "FIXED_MINOR", "VISIBLE"]
    lv.status.append("FUTURE")
    lv.set_status("VISIBLE", False)
    lv.set_status("VISIBLE", False)
    assert lv.status == ["READ", "WRITE", "FIXED_MINOR", "FUTURE"]


@pytest.mark.parametrize(
    ("sectors", "shown"),
    [(0, "0   "), (1, "512 B"), (8, "4.00 KiB"), (8192, "4.00 MiB"), (130944, "<63.94 MiB")],
)
def test_sizes_in_messages(sectors, shown):
    assert display_size(sectors) == shown
