"""Sessions with the real lvm2, replayed command line by command line.

data/lvm.jsonl holds what LVM 2.03.16 printed on the real kernel (kernel/record_lvm.py); here the
same command lines are run on image files and a mapper in this process. stdout, stderr and exit code
have to be the same, byte for byte; uuids and times excepted.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from support.lvm import MDA, SECTOR, Disk
from support.lvm_machine import Machine
from support.lvm_replay import Replay, names, records

from cow import lvm

DIFFERENT = {
    "lvs --config 'bad {'": "the parser has its own words for what it expected",
    "lvs --config report/compact_output=1": "LVM prints one more blank behind the headings",
    "pvremove disk1.img": "there is no --force to advise: a PV of a VG stays one",
    "nosuchverb": "our help is another command",
    "lvcreate -L 4m -n j --type thin vg0": "there are no thin LVs; what is wrong is the type",
    "lvcreate -an -c 8k -L 4m -n x vg0": "LVM names the value of the option as well",
    "lvcreate -an -l 50%ORIGIN -n x vg0": "LVM has an internal error",
    "lvcreate -an --type snapshot -V 10m -l 50%ORIGIN -n x vg0": "LVM has an internal error",
    "lvreduce -L +4m vg0/a": "LVM says it where it parses, and that it did not",
    "lvreduce -l +1 vg0/a": "LVM says it where it parses, and that it did not",
    "vgcfgrestore --list -f nosuch": "the reason is that of the system",
    "vgcfgbackup -f disk1.img/x vg0": "the reason is that of the system",
    "vgcfgbackup -f x vg0 vg1": "LVM has written the first file by then",
    "lvconvert --merge vg0/t": "LVM names the snapshot that was asked for as the merging one",
    "lvconvert --merge vg0/other": "LVM names the snapshot that was asked for as the merging one",
}
"""Command lines that are answered in other words on purpose; the exit code is the same."""


@pytest.fixture(autouse=True)
def _utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")


@pytest.mark.parametrize("name", names())
def test_a_session_with_lvm_prints_what_the_real_one_printed(name, tmp_path):
    disks, lines = records(name)
    replay = Replay(tmp_path, disks)
    wrong = []
    try:
        for line, answer in replay.differences(lines):
            command = shlex.join(line["args"])
            if command in DIFFERENT and answer[2] == line["status"]:
                continue
            wrong.append(
                f"$ {command}\n-- LVM: {line['status']}\n{line['stdout']}{line['stderr']}"
                f"-- here: {answer[2]}\n{answer[0]}{answer[1]}"
            )
    finally:
        replay.close()
    assert not wrong, f"{len(wrong)} of {len(lines)} lines differ:\n" + "\n".join(wrong[:5])


def test_the_session_in_the_documentation_is_what_is_printed(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "lvm.md").read_text(encoding="utf-8")
    session = text.split("## A session")[1].split("```\n")[1]
    machine = Machine(tmp_path)
    machine.environ = {"COW_LVM_DEVICES": "disk1.img,disk2.img", "LVM_SYSTEM_DIR": str(tmp_path)}
    steps = [step.partition("\n") for step in session.split("$ ")[1:]]
    for line, _, expected in steps:
        words = shlex.split(line)
        if words[:2] == ["cow", "lvm"]:
            assert machine.run_words(words[2:]) == 0
            assert machine.said == expected, line
        elif words == ["cow", "dm", "table"]:
            tables = {
                name: machine.mapper.table(name, numbers=True) for name in machine.mapper.names()
            }
            shown = "".join(f"{name}: {tables[name]}\n" for name in sorted(tables))
            assert shown == expected
        elif words[0] == "truncate":
            for name in words[3:]:
                machine.disk(name, 64 << 20)
            machine.devices.clear()
    machine.mapper.close()


@pytest.fixture
def machine(tmp_path):
    found = Machine(tmp_path)
    found(f"vgcreate -s 64k vg {found.disk('a.img', 16 << 20)}")
    found("lvcreate -l 16 -n lv vg")
    yield found
    found.mapper.close()


@pytest.mark.parametrize("line", ["lvreduce -y -r -l 8", "lvextend -r -l 20", "lvresize -r -l 20"])
def test_a_filesystem_that_is_to_be_resized_is_refused_and_the_lv_left_alone(machine, line):
    machine.write("lv", 1 << 20)
    before = machine.read("lv")
    assert "--resizefs is not supported" in machine.refused(f"{line} vg/lv")
    assert machine.read("lv") == before


@pytest.mark.parametrize(
    "line",
    [
        "lvresize",
        "lvresize -L 8m",
        "lvconvert --merge",
        "lvconvert --splitsnapshot",
        "lvconvert -s",
        "lvconvert -s vg/lv",
        "vgcfgrestore",
        "vgcfgrestore --list",
    ],
)
def test_a_line_without_its_arguments_is_no_form_of_the_verb(machine, line):
    assert "No command with matching syntax recognised." in machine.refused(line, 3)


def test_a_snapshot_without_an_origin_or_a_vg_is_refused(machine):
    assert "The origin name should include" in machine.refused("lvcreate -s -L 4m -n x", 3)


@pytest.mark.parametrize("name", ["nosuch.img", "no\nsuch.img", "a:/no:such.img"])
def test_a_pv_that_is_not_in_the_vg_gives_no_room(machine, name):
    before = machine.mapper.names()
    said = machine.refused(f"lvcreate -l 2 -n x vg {shlex.quote(name)}").replace("\n  ", "\n")
    assert f'Physical Volume "{name.removesuffix(":such.img")}" not found in' in said
    assert machine.mapper.names() == before


def test_thin_lvs_are_refused_and_told_from_sparse_ones(machine):
    assert "Thin LVs are not supported" in machine.refused("lvcreate -V 100m -n x vg", 3)


def test_the_help_of_a_report_names_fields_that_it_takes(machine):
    assert machine.run("vgs -o help") == 0
    fields = [line.split()[0] for line in machine.said.splitlines() if " - " in line]
    assert "vg_name" in fields
    assert machine(f"vgs --noheadings -o {','.join(fields[:5])}")


def test_a_suspended_device_is_displayed_as_such(machine):
    machine.mapper.suspend("vg-lv")
    assert "LV Status              suspended" in machine("lvdisplay vg/lv")
    machine.mapper.resume("vg-lv")
    assert "LV Status              available" in machine("lvdisplay vg/lv")


def test_help_of_a_verb_names_its_options(machine):
    assert "--extents" in machine("lvextend --help")


def test_a_vg_that_is_not_activated_by_itself_is_passed_over_silently(machine):
    machine("vgchange -an vg")
    machine("vgchange --setautoactivation n vg")
    assert machine("vgchange -aay vg") == ""
    assert machine.mapper.names() == []
    machine("vgchange -ay vg")
    assert machine.mapper.names() == ["vg-lv"]


def test_the_lock_type_none_is_that_of_a_local_vg(machine):
    """LVM 2.03.16 writes it for `vgchange --lock-type none`, and tells then what it told before."""
    columns = "vgs --noheadings --separator , -o vg_attr,vg_lock_type,vg_shared vg"
    before = machine(columns)
    with lvm.VolumeGroup.open(machine.devices, mapper=machine.mapper) as vg, vg.change("") as new:
        new.lock_type = "none"
    assert machine(columns) == before == "  wz--n-,,\n"
    machine("lvcreate -l 1 -n other vg")
    with lvm.VolumeGroup.open(machine.devices, mapper=machine.mapper) as vg:
        assert vg.metadata.lock_type == "none"


REAL_DUPLICATE = """\
  PV         VG  Fmt  Attr PSize  PFree\x20
  disk1.img  vg0 lvm2 a--  60.00m 56.00m
  disk2.img  vg0 lvm2 d--      0      0\x20
"""
REAL_LOST = """\
  PV         VG        Fmt  Attr PSize  PFree Used
  disk1.img  [unknown] lvm2 u--  64.00m    0    0\x20
  WARNING: wrong checksum 0 in mda header on disk1.img at 4096
  WARNING: wrong magic number in mda header on disk1.img at 4096
  WARNING: wrong version 0 in mda header on disk1.img at 4096
  WARNING: wrong start sector 0 in mda header on disk1.img at 4096
  WARNING: bad metadata header on disk1.img at 4096.
  WARNING: scanning disk1.img mda1 failed to read metadata summary.
  WARNING: repair VG metadata on disk1.img with vgck --updatemetadata.
  WARNING: scan failed to get metadata summary from disk1.img PVID {}
  WARNING: PV disk1.img is marked in use but no VG was found using it.
  WARNING: PV disk1.img might need repairing.
"""
"""What LVM 2.03.16 prints."""


@pytest.fixture
def replay(tmp_path):
    found = Replay(tmp_path, {"disk1.img": 64})
    for line in ("vgcreate vg0 disk1.img", "lvcreate -y -l 1 -n a -an -Zn vg0"):
        assert found.run(line.split())[2] == 0
    yield found
    found.close()


def test_all_pvs_are_reported_with_the_duplicates(replay, tmp_path):
    shutil.copy(tmp_path / "disk1.img", tmp_path / "disk2.img")
    replay.devices = "disk1.img,disk2.img"
    assert replay.run(["pvs", "-a"])[0] == REAL_DUPLICATE
    assert replay.run(["pvs"])[0] == "".join(REAL_DUPLICATE.splitlines(keepends=True)[:2])


def test_a_pv_whose_vg_is_lost_is_reported_without_room(replay, tmp_path):
    disk = Disk(tmp_path / "disk1.img")
    disk.write(MDA, bytes(SECTOR))
    out, err, _ = replay.run(["pvs", "-o", "+pv_used"])
    assert out + err == REAL_LOST.format(disk.read(SECTOR + 32, 32).decode())
