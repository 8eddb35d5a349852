"""`cow store`: look at a persistent COW store. Nothing is locked, and nothing is written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cow
from cow.cli import FAILED, OK, Verb, describe, group, printable, report_error
from cow.store import Finding, Store
from cow.units import SECTOR_SIZE, bytes_of

ROWS_AT_ONCE = 1 << 16
"""How many exceptions are printed in one go."""


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a COW store")
    _add_json(parser)


def _add_dump(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a COW store")
    parser.add_argument(
        "--bytes",
        action="store_true",
        help="print also where the chunks begin, in bytes: the old one in the origin, the new one "
        "in the store",
    )
    _add_json(parser)


# ---- info


def percent_full(allocated: int, total: int, metadata: int) -> float:
    """Return the percentage that LVM shows: 0 and 100 only where nothing or everything is used."""
    if allocated == metadata:
        return 0.0
    if allocated == total:
        return 100.0
    return min(max(round(100 * allocated / total, 2), 0.01), 99.99)


def _describe_store(path: str) -> dict[str, Any]:
    with cow.store.open(path) as store:
        allocated, total, metadata = store.usage
        return {
            "path": path,
            "valid": store.valid,
            "version": store.version,
            "chunk_size": store.chunk_size,
            "chunk_bytes": bytes_of(store.chunk_size),
            "exceptions": store.nr_exceptions,
            "sectors_allocated": allocated,
            "total_sectors": total,
            "metadata_sectors": metadata,
            "percent_full": percent_full(allocated, total, metadata) if store.valid else 100.0,
            "status": f"{allocated}/{total} {metadata}" if store.valid else "Invalid",
        }


def _print_info(info: dict[str, Any]) -> None:
    chunk_size, chunk_bytes = info["chunk_size"], info["chunk_bytes"]
    print(
        printable(info["path"]),
        f"  valid       {'yes' if info['valid'] else 'no'}",
        f"  version     {info['version']}",
        f"  chunk size  {chunk_size} sector{'s' * (chunk_size > 1)}, {chunk_bytes} bytes",
        f"  exceptions  {info['exceptions']}",
        f"  allocated   {info['sectors_allocated']} sectors",
        f"  total       {info['total_sectors']} sectors",
        f"  metadata    {info['metadata_sectors']} sectors",
        f"  full        {info['percent_full']:.2f} %",
        f"  status      {info['status']}",
        sep="\n",
    )


def _info(options: argparse.Namespace) -> int:
    return _for_each(options, _describe_store, _print_info)


# ---- check


def _check_store(path: str) -> dict[str, Any]:
    try:
        valid = cow.store.open(path).valid
    except cow.StoreError:
        valid = None
    findings = [_finding(path, finding) for finding in cow.store.check(path)]
    return {"path": path, "sound": not findings, "valid": valid, "findings": findings}


def _finding(path: str, finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "area": None if finding.area < 0 else finding.area,
        "record": None if finding.record < 0 else finding.record,
        "text": finding.text.removeprefix(f"{path}: "),
    }


def _print_check(result: dict[str, Any]) -> None:
    path = printable(result["path"])
    for finding in result["findings"]:
        where = [f"{key} {finding[key]}" for key in ("area", "record") if finding[key] is not None]
        print(f"{path}: {', '.join(where)}{': ' if where else ''}{printable(finding['text'])}")
    if result["sound"]:
        print(f"{path}: sound" if result["valid"] else f"{path}: sound, but marked invalid")


def _check(options: argparse.Namespace) -> int:
    return _for_each(options, _check_store, _print_check)


def _for_each(
    options: argparse.Namespace,
    look: Callable[[str], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Look at every file and show it; one that fails gets a line of error, and the next follows."""
    status = OK
    results = []
    for path in options.files:
        try:
            result = look(path)
        except (cow.CowError, OSError, MemoryError) as error:
            report_error(error, path)
            result = {"path": path, "error": describe(error).removeprefix(f"{path}: ")}
        else:
            if not options.json:
                show(result)
        if "error" in result or result.get("findings"):
            status = FAILED
        results.append(result)
    if options.json:
        print(json.dumps(results, indent=2))
    return status


# ---- dump


def _dump(options: argparse.Namespace) -> int:
    with cow.store.open(options.file) as store:
        if options.json:
            _dump_json(store, with_bytes=options.bytes)
        else:
            _dump_text(store, with_bytes=options.bytes)
    return OK


def _rows(store: Store) -> Iterator[list[tuple[int, int]]]:
    """Yield the exceptions in order of commit, many at once."""
    exceptions = store.exceptions
    for first in range(0, len(exceptions), ROWS_AT_ONCE):
        yield [(old, new) for old, new in exceptions[first : first + ROWS_AT_ONCE].tolist()]


def _dump_text(store: Store, *, with_bytes: bool) -> None:
    size = bytes_of(store.chunk_size)
    print("# old\tnew\told bytes\tnew bytes" if with_bytes else "# old\tnew")
    for rows in _rows(store):
        if with_bytes:
            lines = [f"{old}\t{new}\t{old * size}\t{new * size}\n" for old, new in rows]
        else:
            lines = [f"{old}\t{new}\n" for old, new in rows]
        print("".join(lines), end="")


def _dump_json(store: Store, *, with_bytes: bool) -> None:
    size = bytes_of(store.chunk_size)
    head = {"path": store.path, "valid": store.valid, "chunk_size": store.chunk_size}
    print(json.dumps(head)[:-1], end=', "exceptions": [')
    mark = "\n"
    for rows in _rows(store):
        lines = []
        for old, new in rows:
            row = {"old": old, "new": new}
            if with_bytes:
                row |= {"old_bytes": old * size, "new_bytes": new * size}
            lines.append(json.dumps(row))
        print(mark, ",\n".join(lines), sep="", end="")
        mark = ",\n"
    print("\n]}")


# ---- repair


def _add_repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the damaged COW store; it is only read")
    parser.add_argument("output", metavar="OUTPUT", help="the new store; it must not exist")
    parser.add_argument(
        "--chunk-size", type=int, metavar="SECTORS", help="needed where the header is damaged"
    )
    parser.add_argument(
        "--origin-size", type=int, metavar="SECTORS", help="drop exceptions past this size too"
    )
    parser.add_argument(
        "--force", action="store_true", help="take a store that is marked invalid as well"
    )
    _add_json(parser)


def _repair(options: argparse.Namespace) -> int:
    done = cow.store.repair(
        options.file,
        options.output,
        chunk_size=options.chunk_size,
        origin_size=None if options.origin_size is None else options.origin_size * SECTOR_SIZE,
        force=options.force,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    findings = [_finding(options.file, finding) for finding in done.findings]
    lost = sum(finding["kind"].startswith(("old-", "new-")) for finding in findings)
    result = {"path": options.file, "output": options.output, "kept": done.kept, "lost": lost}
    if options.json:
        print(json.dumps(result | {"findings": findings}, indent=2))
    else:
        _print_check({"path": options.file, "sound": False, "findings": findings})
        print(f"{printable(options.output)}: {done.kept} exceptions kept, {lost} lost")
    return FAILED if lost else OK


def _show_progress(done: int, total: int) -> None:
    if done == total or done % max(1, total // 100) == 0:
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} exceptions", end=end, file=sys.stderr, flush=True)


INFO_EPILOG = """\
Allocated, total and metadata are those of the status line of a snapshot with this store, in
sectors of 512 bytes; full is the percentage that lvs shows for it, 100.00 if it is invalid.
JSON: a list with one object a file; chunk_size is in sectors, chunk_bytes in bytes.
"""

DUMP_EPILOG = """\
One line an exception, in order of commit: the old chunk (of the origin) and the new chunk (of the
store), separated by a tab, below a line that begins with #.
JSON: one object; chunk_size is in sectors.
"""

CHECK_EPILOG = """\
One line for each thing that is wrong; "sound" where nothing is. How long the origin is does not
stand in a store, so old chunks past its end are not found.
JSON: a list with one object a file.
"""

REPAIR_EPILOG = """\
Copies every exception that can be right, with its data, into a new store. Each one that is lost
gets a line; the status is 1 if any was. Of two exceptions for the same chunk the first is kept.
JSON: one object.
"""

VERB = group(
    "store",
    "look at COW stores",
    (
        Verb(
            "info", "say what the header holds and how full it is", _add_files, _info, INFO_EPILOG
        ),
        Verb("dump", "print every exception", _add_dump, _dump, DUMP_EPILOG),
        Verb("check", "look for damage", _add_files, _check, CHECK_EPILOG),
        Verb("repair", "keep what can be kept in a new store", _add_repair, _repair, REPAIR_EPILOG),
    ),
    "A COW store is the file of a persistent snapshot (P or PO). No verb changes it.",
)
