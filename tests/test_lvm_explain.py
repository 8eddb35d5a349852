"""`cow lvm explain`: what it says is what the metadata holds and what device-mapper runs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from support.lvm_replay import Replay


@pytest.fixture
def lvm(tmp_path):
    """A function that runs a command line of lvm on two disks and returns what it printed."""
    replay = Replay(tmp_path, {"disk1.img": 64, "disk2.img": 64})

    def run(line: str, *, status: int = 0) -> str:
        out, err, code = replay.run(line.split(), "y\n" * 3)
        assert code == status, err
        return out if status == 0 else err

    run.mapper = replay.mapper
    run("vgcreate vg disk1.img disk2.img")
    yield run
    replay.close()


def explained(lvm: Callable[[str], str], name: str) -> str:
    """Return the explanation of an LV, its lines joined."""
    return re.sub(r"\n\s*", " ", lvm(f"explain {name}"))


def check_tables(lvm: Callable[[str], str], text: str, *layers: str) -> None:
    """Check that every device named has its table in a text, as device-mapper has it."""
    for layer in layers:
        assert f"{layer} (254:{lvm.mapper.info(layer).minor})" in text
        for line in lvm.mapper.table(layer).split("\n"):
            assert line.split(" ")[2] in text
            assert " ".join(line.split(" ")[:3]) in text


def test_a_plain_lv_is_said_to_be_one(lvm):
    lvm("lvcreate -y -l 3 -n plain vg")
    text = explained(lvm, "vg/plain")
    assert "vg/plain is a linear LV." in text
    assert "12.00 MiB" in text
    assert "0-2" in text
    check_tables(lvm, text, "vg-plain")


def test_a_striped_lv_has_its_legs(lvm):
    lvm("lvcreate -y -i 2 -l 4 -n striped vg")
    text = explained(lvm, "vg/striped")
    assert "vg/striped is a striped LV." in text
    assert "chunks go to the legs in turn" in text
    assert "0-1 + " in text


def test_a_snapshot_names_its_record_its_store_and_its_devices(lvm):
    lvm("lvcreate -y -l 3 -n org vg")
    lvm("lvcreate -y -s -l 2 -n snap vg/org")
    text = explained(lvm, "vg/snap")
    assert "vg/snap is a snapshot of vg/org" in text
    assert 'origin = "org", cow_store = "snap", chunk_size = 8' in text
    assert "snapshot0 is no volume" in text
    assert "0.00% used" in text
    check_tables(lvm, text, "vg-snap", "vg-snap-cow", "vg-org-real")


def test_an_origin_names_all_its_snapshots(lvm):
    lvm("lvcreate -y -l 3 -n org vg")
    lvm("lvcreate -y -s -l 2 -n one vg/org")
    assert "vg/org is an origin with 1 snapshot." in explained(lvm, "vg/org")
    lvm("lvcreate -y -s -l 2 -n two vg/org")
    text = explained(lvm, "vg/org")
    assert "vg/org is an origin with 2 snapshots." in text
    assert "(see above)" in text
    check_tables(lvm, text, "vg-org", "vg-org-real", "vg-one", "vg-two")
    assert "(org has more snapshots: two)" in explained(lvm, "vg/one")


def test_the_record_may_be_asked_for(lvm):
    lvm("lvcreate -y -l 3 -n org vg")
    lvm("lvcreate -y -s -l 2 -n snap vg/org")
    text = explained(lvm, "vg/snapshot0")
    assert "vg/snapshot0 is the record of a snapshot." in text


def test_a_sparse_lv_stands_on_an_origin_of_zeros(lvm):
    lvm("lvcreate -y --type snapshot -V 12m -l 2 -n thin vg")
    text = explained(lvm, "vg/thin")
    assert "vg/thin is a sparse LV: a snapshot of an origin of zeros" in text
    check_tables(lvm, text, "vg-thin")
    assert "is the origin of zeros that a sparse LV stands on" in explained(lvm, "vg/thin_vorigin")


def test_a_merge_that_waits_is_told(lvm):
    lvm("lvcreate -y -l 3 -n org vg")
    lvm("lvcreate -y -s -l 2 -n snap vg/org")
    lvm("vgchange -an vg")
    lvm("lvconvert --merge vg/snap")
    text = explained(lvm, "vg/snap")
    assert "vg/snap is a snapshot of vg/org, and is merged back into it." in text
    assert 'merging_store = "snap"' in text
    assert "When it is active, device-mapper runs:" in text
    assert "the chunks of the store are moved back into the origin" in text


def test_two_names_are_explained_one_after_the_other(lvm):
    for name in ("a", "b"):
        lvm(f"lvcreate -y -l 1 -n {name} vg")
    text = explained(lvm, "vg/a vg/b")
    assert text.index("vg/a is a linear LV.") < text.index("vg/b is a linear LV.")


@pytest.mark.parametrize(
    ("name", "text"),
    [("vg", "please name an LV"), ("vg/none", "Failed to find logical volume")],
)
def test_what_there_is_not_is_not_explained(lvm, name, text):
    assert text in lvm(f"explain {name}", status=5)
