"""The engine answers every kernel trace as the kernel did, and leaves the same bytes."""

from __future__ import annotations

import pytest
from support import count, trace

import cow


@pytest.mark.parametrize("name", trace.names())
def test_the_kernel_trace_replays_to_the_byte(name, tmp_path):
    golden = trace.load(name)
    paths = {image: str(tmp_path / f"{image}.img") for image in golden.images}
    for image, data in trace.contents(golden).items():
        (tmp_path / f"{image}.img").write_bytes(data)
    with cow.Mapper(durability="process") as dm:
        trace.Replayer(golden, dm, paths, str(tmp_path / "nosuch.img")).run()
    trace.compare_final(
        golden, {image: (tmp_path / f"{image}.img").read_bytes() for image in golden.images}
    )
    count("recorded traces of the kernel replayed")


def test_the_power_durability_leaves_the_same_bytes(tmp_path):
    golden = trace.load("reopen")
    paths = {image: str(tmp_path / f"{image}.img") for image in golden.images}
    for image, data in trace.contents(golden).items():
        (tmp_path / f"{image}.img").write_bytes(data)
    with cow.Mapper(durability="power") as dm:
        trace.Replayer(golden, dm, paths, str(tmp_path / "nosuch.img")).run()
    trace.compare_final(
        golden, {image: (tmp_path / f"{image}.img").read_bytes() for image in golden.images}
    )
