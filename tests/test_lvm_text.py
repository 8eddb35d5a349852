"""The text of the metadata: what is read, what is refused, and that real texts come back whole."""

from __future__ import annotations

import time

import pytest
from support import lvm as support

from cow.lvm.metadata_text import vg_from_text, vg_section
from cow.lvm.text import backup_text, disk_text, parse

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


@pytest.mark.parametrize("sample", support.SAMPLES)
def test_every_real_backup_comes_back_to_the_byte(sample, utc):
    text = support.backup_of(sample)
    vg = vg_from_text(parse(text))
    again = backup_text(vg.name, vg_section(vg), vg.header, *support.comments_of(text))
    assert again == text
