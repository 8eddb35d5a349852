"""Sizes of COW stores and how full they are; figures of the real lvm2 and of its own tests."""

from __future__ import annotations

from fractions import Fraction

import pytest

from cow.lvm.cow_size import (
    cap_extended,
    cap_new,
    check_chunk_size,
    check_minimum,
    extend_percent,
    low_water_mark,
    percent_of_origin,
    shown_percent,
    usage_percent,
    useful_extents,
    useful_sectors,
)
from cow.lvm.errors import LVMError, RequestError

KIB, MIB = 2, 2048
"""Sectors."""


@pytest.mark.parametrize(
    ("origin", "chunk", "expected"),
    [
        (1 * MIB, 8, 1036 * KIB),
        (1 * MIB, 16, 1040 * KIB),
        (128 * KIB, 8, 136 * KIB),
        (16 * MIB, 8, 16 * MIB + 72 * KIB),
    ],
)
def test_a_store_of_use_holds_every_chunk(origin, chunk, expected):
    assert useful_sectors(origin, chunk) == expected


def test_a_store_of_use_has_whole_extents():
    assert useful_extents(4, 8, 8192) == 5


def test_a_larger_store_is_cut_down_and_that_is_said():
    said: list[str] = []
    assert cap_new(25, 4, 8, 8192, said.append) == 5
    assert cap_new(5, 4, 8, 8192, said.append) == 5
    assert said == ["Reducing COW size 100.00 MiB down to maximum usable size 20.00 MiB."]


def test_a_store_does_not_grow_beyond_what_is_of_use():
    said: list[str] = []
    assert cap_extended(104, 4, 8, 8192, said.append) == 5
    assert said == ["Reached maximum COW size 20.00 MiB (5 extents)."]


@pytest.mark.parametrize(
    ("percent", "origin", "chunk", "extent", "expected"),
    [(50, 32, 8, 8, 18), (50, 4, 8, 8192, 3), (100, 256, 8, 8, 259), (25, 256, 8, 8, 67)],
)
def test_a_percentage_of_the_origin_has_room_for_metadata(percent, origin, chunk, extent, expected):
    assert percent_of_origin(percent, origin, chunk, extent) == expected


@pytest.mark.parametrize("chunk", [0, 4, 7, 12, 2048])
def test_chunks_lvm_does_not_take_are_refused(chunk):
    with pytest.raises(RequestError, match="power of 2 in the range 4K to 512K"):
        check_chunk_size(chunk)


@pytest.mark.parametrize("chunk", [8, 16, 1024])
def test_chunks_lvm_takes_are_taken(chunk):
    check_chunk_size(chunk)


def test_a_store_below_three_chunks_is_refused():
    text = r"Snapshot volume cannot be smaller than 3 chunks \(3 extents, 12.00 KiB\)\."
    with pytest.raises(LVMError, match=text):
        check_minimum(2, 8, 8)
    check_minimum(3, 8, 8)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ((816, 16384, 16), "4.98"),
        ((24, 24, 16), "100.00"),
        ((16, 16384, 16), "0.00"),
        ((24, 200, 16), "12.00"),
        ((6184, 16384, 40), "37.74"),
        ((368, 2560, 16), "14.37"),
        ((1, 1 << 20, 0), "0.01"),
        ((8, 0, 0), "100.00"),
        (((1 << 20) - 1, 1 << 20, 16), "99.99"),
    ],
)
def test_usage_counts_metadata_unless_there_is_nothing_else(usage, expected):
    assert f"{shown_percent(usage_percent(*usage)):.2f}" == expected


@pytest.mark.parametrize(
    ("usage", "threshold", "percent", "expected"),
    [
        ("80.33", 70, 20, 20),
        ("80.33", 50, 20, 61),
        ("100", 70, 20, 43),
        ("70", 70, 20, 0),
        ("70.01", 70, 20, 20),
        ("99", 100, 20, 0),
        ("49", 20, 20, 0),
        ("60", 20, 20, 20),
    ],
)
def test_a_store_grows_by_what_brings_it_below_the_threshold(usage, threshold, percent, expected):
    assert extend_percent(Fraction(usage), threshold, percent) == expected


@pytest.mark.parametrize("threshold", [50, 51, 70, 99])
@pytest.mark.parametrize("total", [1, 7, 100, 8192, 16385])
def test_the_low_water_mark_is_passed_exactly_when_the_threshold_is(total, threshold):
    mark = low_water_mark(total, threshold)
    for allocated in range(total + 1):
        over = Fraction(100 * allocated, total) > threshold
        assert (total - allocated < mark) == over


def test_a_threshold_of_100_has_no_mark():
    assert low_water_mark(8192, 100) == 0
