"""Backups of metadata: what each command keeps, where, and what vgcfgrestore makes of it."""

from __future__ import annotations

import os
import time

import pytest
from support.lvm_machine import Machine

from cow.lvm.backups import Backups

MIB = 1 << 20


@pytest.fixture
def lvm(tmp_path):
    found = Machine(tmp_path)
    found.environ = {"XDG_STATE_HOME": str(tmp_path / "state")}
    found(f"vgcreate vg {found.disk('a.img', 64 * MIB)}")
    yield found
    found.mapper.close()


def kept(lvm, folder: str = "state/cow/lvm") -> list[str]:
    """Return the files that are kept, those in the archive without what is random."""
    root = lvm.folder / folder
    found = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return sorted(name.split("-")[0] for name in found)


def test_each_command_keeps_what_was_before_and_after_it_in_the_state_folder(lvm):
    lvm("lvcreate -L 8m -n org vg")
    lvm("lvcreate -s -L 8m -n snap vg/org")
    assert kept(lvm) == ["archive/vg_00000", "archive/vg_00001", "backup/vg"]
    text = (lvm.folder / "state/cow/lvm/backup/vg").read_text()
    assert "Created *after* executing 'lvcreate -s -L 8m -n snap vg/org'" in text
    assert "snapshot0 {" in text


@pytest.mark.parametrize(
    ("environ", "folder"),
    [({"HOME": "{}/home"}, "home/.local/state/cow/lvm"), ({"LVM_SYSTEM_DIR": "{}/etc"}, "etc")],
)
def test_they_lie_where_the_environment_says(lvm, environ, folder):
    lvm.environ = {name: path.format(lvm.folder) for name, path in environ.items()}
    lvm("lvcreate -L 8m -n org vg")
    assert kept(lvm, folder) == ["archive/vg_00000", "backup/vg"]


@pytest.mark.parametrize("option", ["-t", "-A n", "--config backup{backup=0\narchive=0}"])
def test_nothing_is_kept_where_it_is_not_wanted(lvm, option):
    before = kept(lvm)
    words = ["lvcreate", *option.split(" "), "-L", "8m", "-n", "org", "vg"]
    assert lvm.run_words(words) == 0
    assert kept(lvm) == before


def test_looking_keeps_nothing(lvm):
    before = kept(lvm)
    lvm("lvs")
    lvm("vgck vg")
    assert kept(lvm) == before == ["backup/vg"]


def test_where_nothing_can_be_kept_the_command_works_all_the_same(lvm):
    (lvm.folder / "file").touch()
    lvm.environ = {"XDG_STATE_HOME": str(lvm.folder / "file")}
    assert "WARNING: " in lvm("lvcreate -L 8m -n org vg")
    assert lvm.names() == ["org"]


def test_the_newest_backup_is_restored_and_older_ones_by_their_names(lvm):
    lvm("lvcreate -an -L 8m -n one vg")
    lvm("lvcreate -an -L 8m -n two vg")
    (before_two,) = (lvm.folder / "state/cow/lvm/archive").glob("vg_00001-*")
    listed = lvm("vgcfgrestore -l vg").split("\n")
    files = [line.split("\t")[-1] for line in listed if line.startswith("  File:")]
    assert files[1:] == [str(before_two), str(lvm.folder / "state/cow/lvm/backup/vg")]
    assert "  Description:\tCreated *before* executing 'lvcreate -an -L 8m -n two vg'" in listed
    lvm(f"vgcfgrestore -f {before_two} vg")
    assert lvm.names() == ["one"]
    lvm("vgcfgrestore vg")
    assert lvm.names() == ["one", "two"]


def test_a_list_of_nothing_says_where_it_was_looked_for(lvm):
    assert lvm("vgcfgrestore --list nosuch") == (
        f"  No archives found in {lvm.folder}/state/cow/lvm/archive.\n"
    )


def test_a_list_of_one_file(lvm):
    path = lvm.folder / "here.txt"
    lvm(f"vgcfgbackup -f {path} vg")
    listed = lvm(f"vgcfgrestore -l -f {path}")
    assert listed.startswith(f"   \n  File:\t\t{path}\n  VG name:    \tvg\n  Description:\t")


def test_vgcfgbackup_without_a_file_writes_the_backup(lvm):
    path = lvm.folder / "state/cow/lvm/backup/vg"
    path.unlink()
    lvm("vgcfgbackup")
    assert path.is_file()


def test_a_backup_goes_with_the_name_and_with_the_vg(lvm):
    lvm("vgrename vg new")
    assert "backup/new" in kept(lvm)
    assert "backup/vg" not in kept(lvm)
    lvm("vgremove new")
    assert [name for name in kept(lvm) if name.startswith("backup")] == []
    assert "archive/new_00000" in kept(lvm)


def test_old_files_go_from_the_archive_but_for_some(lvm):
    lvm("lvcreate -an -L 4m -n org vg")
    with lvm.open("vg") as vg:
        archive = lvm.folder / "archive"
        backups = Backups(archive_dir=archive, retain_min=3, retain_days=2)
        for number in range(6):
            backups.archive(vg.metadata, "command")
            (path,) = archive.glob(f"vg_{number:05}-*")
            old = time.time() - (3 - number / 4) * 24 * 3600
            os.utime(path, (old, old))
    assert sorted(path.name[:8] for path in archive.iterdir()) == [
        "vg_00003",
        "vg_00004",
        "vg_00005",
    ]
