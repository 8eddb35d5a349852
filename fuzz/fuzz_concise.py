"""Bytes → --concise text → parsed, written, made into devices, printed and made again."""

from __future__ import annotations

import contextlib

import scratch
from support import fill
from words import text_of

import cow
from cow.table import format_concise, parse_concise

MAX_LEN = 128
SIZE = 64 * 512


def run(data: bytes) -> None:
    text = text_of(data)
    try:
        devices = parse_concise(text)
    except cow.TableFormatError:
        devices = []
    else:
        assert parse_concise(format_concise(devices)) == devices
    with contextlib.chdir(scratch.folder()), cow.Mapper(durability="process") as dm:
        scratch.put("a.img", fill(SIZE, 1))
        scratch.put("c.img", bytes(SIZE))
        scratch.put("d.img", fill(SIZE, 2))
        try:
            dm.create_concise(text)
        except cow.CowError:
            assert len(dm.names()) <= len(devices)
            return
        names = dm.names()
        assert names == sorted((device.name for device in devices), key=str.encode)
        for device in devices:
            wanted = (device.uuid, bool(device.readonly))
            info = dm.info(device.name)
            assert (info.uuid, info.readonly) == wanted
            assert device.minor in (None, info.minor)
        printed = dm.table(concise=True)
        alone = all(below.endswith(".img") for name in names for below in dm.deps(name))
        if alone and names:
            dm.remove_all()
            dm.create_concise(printed)
            assert dm.table(concise=True) == printed
