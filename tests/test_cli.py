"""The command `cow`: what every verb answers alike, then what each one prints."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import SECTOR, Rig, header_bytes, image, store_bytes

import cow
from cow.cli import main as command
from cow.cli.main import main
from cow.cli.store import percent_full

# Every verb, with arguments it is content with; {} is a sound store.
VERBS = {
    "store info": ["{}"],
    "store dump": ["{}"],
    "store check": ["{}"],
    "store repair": ["{}", "{}.new"],
}
EVERY_VERB = pytest.mark.parametrize("verb", VERBS)
RECORDS = [(5, 2), (6, 3), (3, 4), (12, 5), (14, 6)]


@pytest.fixture
def put(tmp_path):
    """A function that writes a file and returns its path."""

    def write(data: bytes | bytearray, name: str = "snap.cow") -> str:
        return image(tmp_path / name, bytes(data))

    return write


@pytest.fixture
def sound(put):
    """The path of a store with five exceptions in 256 chunks of 8 sectors."""
    return put(store_bytes(RECORDS))


@pytest.fixture
def run(capsys):
    """A function that runs the command here and returns status, output and errors."""

    def call(*args: str) -> tuple[int, str, str]:
        status = main(args)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def words(verb: str, store: str) -> list[str]:
    """Return a command line of `verb` that is good."""
    return [*verb.split(), *(word.format(store) for word in VERBS[verb])]


def process(*args: str, **options) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own."""
    program = [sys.executable, "-P", "-m", "cow", *args]
    options.setdefault("stdout", subprocess.PIPE)
    # argparse says nothing of a write that fails, so a buffer has to hold what it prints.
    options.setdefault("env", {**os.environ, "PYTHONUNBUFFERED": ""})
    return subprocess.run(program, stderr=subprocess.PIPE, check=False, timeout=60, **options)


def leaves(parser: argparse.ArgumentParser) -> list[str]:
    """Return the verbs below a parser, as typed."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        return [parser.prog.removeprefix("cow ")]
    return [leaf for child in groups[0].choices.values() for leaf in leaves(child)]


def assert_one_line(err: str, text: str = "") -> None:
    """Check that `err` is one line about an error, with `text` in it."""
    assert re.fullmatch(r"cow: [^\n]+\n", err), err
    assert text in err


# --- every verb -----------------------------------------------------------------------------------


def test_every_verb_is_in_the_battery():
    # `dm` and `lvm` have ways of their own, and `serve` runs until it is stopped.
    assert sorted(leaves(command.make_parser())) == sorted([*VERBS, "dm", "lvm", "serve"])


@EVERY_VERB
def test_good_arguments_give_status_0_and_no_errors(verb, sound, run):
    status, out, err = run(*words(verb, sound))
    assert (status, err) == (0, "")
    assert out.endswith("\n")


@EVERY_VERB
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_the_verb_and_its_arguments(verb, option, run):
    status, out, err = run(*verb.split(), option)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: cow {verb} ")
    assert "FILE" in out
    assert "--json" in out
    assert "sectors" in out or "chunk" in out


@EVERY_VERB
def test_help_fits_a_terminal(verb, run):
    for args in ([*verb.split(), "--help"], [verb.split()[0], "--help"], ["--help"]):
        assert max(map(len, run(*args)[1].splitlines())) <= 100


@EVERY_VERB
@pytest.mark.parametrize("option", ["--no-such-option", "-Z"])
def test_an_unknown_option_is_a_usage_error(verb, option, sound, run):
    status, out, err = run(*words(verb, sound), option)
    assert (status, out) == (2, "")
    assert_one_line(err, option)


@EVERY_VERB
def test_an_option_cannot_be_abbreviated(verb, sound, run):
    status, out, err = run(*words(verb, sound), "--jso")
    assert (status, out) == (2, "")
    assert_one_line(err, "--jso")


@EVERY_VERB
def test_a_missing_argument_is_a_usage_error(verb, run):
    status, out, err = run(*verb.split())
    assert (status, out) == (2, "")
    assert_one_line(err, f"{verb}: the following arguments are required: FILE")
    assert f"see cow {verb} --help" in err


@EVERY_VERB
def test_a_missing_file_is_an_error(verb, tmp_path, run):
    path = str(tmp_path / "nothing")
    status, out, err = run(*words(verb, path))
    assert (status, out) == (1, "")
    assert err == f"cow: {path}: no such file\n"


@EVERY_VERB
def test_a_directory_is_an_error(verb, tmp_path, run):
    status, out, err = run(*words(verb, str(tmp_path)))
    assert (status, out) == (1, "")
    assert err == f"cow: {tmp_path}: neither a file nor a block device\n"


@EVERY_VERB
def test_a_file_that_cannot_be_opened_is_an_error(verb, tmp_path, run):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:  # open(2) refuses it to everybody, root too
        listener.bind(path)
        status, out, err = run(*words(verb, path))
    assert (status, out) == (1, "")
    assert_one_line(err, f"{path}: cannot open: ")


@EVERY_VERB
def test_a_file_without_permission_is_an_error(verb, sound, run, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    status, out, err = run(*words(verb, sound))
    assert (status, out) == (1, "")
    assert err == f"cow: {sound}: cannot open: Permission denied\n"


@EVERY_VERB
def test_an_error_about_a_strange_name_is_one_line_still(verb, tmp_path, run):
    status, _, err = run(*words(verb, str(tmp_path / "a\nb\udcff")))
    assert status == 1
    assert_one_line(err, "a b\\xff")


@EVERY_VERB
@pytest.mark.parametrize("end", [[], ["--json"], ["--help"]])
def test_a_closed_pipe_ends_quietly(verb, end, sound):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process(*words(verb, sound), *end, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@EVERY_VERB
def test_a_closed_pipe_ends_quietly_where_nothing_is_buffered(verb, sound):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process(
            *words(verb, sound), stdout=writer, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@EVERY_VERB
def test_a_full_disk_below_the_output_is_an_error(verb, sound):
    with open("/dev/full", "wb") as full:
        done = process(*words(verb, sound), stdout=full)
    assert done.returncode == 1
    assert_one_line(done.stderr.decode(), "No space left on device")


@EVERY_VERB
def test_json_is_one_document(verb, sound, run):
    status, out, err = run(*words(verb, sound), "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found if isinstance(found, dict) else found[0])["path"] == sound


@EVERY_VERB
def test_the_store_is_left_as_it_is(verb, sound, run):
    path = Path(sound)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert run(*words(verb, sound))[0] == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@EVERY_VERB
def test_a_store_in_use_can_be_looked_at(verb, tmp_path, run):
    with cow.Mapper(durability="process") as dm:
        rig = Rig(dm, tmp_path)
        rig.snap()
        rig.write("base", 0)
        assert run(*words(verb, rig.cows["snap"]))[0] == 0


# --- the command itself ---------------------------------------------------------------------------


def test_version(run):
    assert run("--version") == (0, f"cow {cow.__version__}\n", "")


def test_help_lists_the_verbs(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for verb in command.verbs():
        assert re.search(rf"^ +{verb.name} +{verb.help}$", out, re.MULTILINE)
    assert "A sector is 512 bytes" in out
    assert "Exit status" in out


def test_help_of_a_group_lists_its_verbs(run):
    out = run("store", "--help")[1]
    assert all(re.search(rf"^ +{name} ", out, re.MULTILINE) for name in ("info", "dump", "check"))


@pytest.mark.parametrize("args", [[], ["store"]])
def test_no_verb_is_a_usage_error(args, run):
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert_one_line(err, "VERB")


@pytest.mark.parametrize("args", [["no-such-verb"], ["store", "no-such-verb"], ["sto"]])
def test_an_unknown_verb_is_a_usage_error(args, run):
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert_one_line(err, f"invalid choice: '{args[-1]}'")


def test_the_module_is_the_command():
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"cow {cow.__version__}\n".encode())


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_closed_pipe_ends_even_the_version_quietly(option):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process(option, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_no_output_at_all_is_no_error(sound):
    program = f'exec "{sys.executable}" -P -m cow store dump --json "{sound}" >&-'
    done = subprocess.run(["sh", "-c", program], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_starting_imports_no_numpy():
    program = "import sys; from cow.cli.main import main; main(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, check=True)
    modules = done.stdout.decode().split()
    assert "cow.store" in modules
    assert "numpy" not in modules


def test_an_interrupt_ends_with_130_and_no_traceback(sound):
    program = f"""
import os, signal, sys
import cow
from cow.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
cow.store.open = lambda path: os.kill(os.getpid(), signal.SIGINT)
sys.exit(main(["store", "info", {sound!r}]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_an_error_without_a_file_is_one_line(sound, run, monkeypatch):
    def fail(path):
        raise MemoryError

    monkeypatch.setattr(cow.store, "open", fail)
    assert run("store", "info", sound) == (1, "", f"cow: {sound}: not enough memory\n")
    assert run("store", "dump", sound) == (1, "", "cow: not enough memory\n")


# --- store info -----------------------------------------------------------------------------------


def test_info_in_full(sound, run):
    assert run("store", "info", sound)[1] == (
        f"{sound}\n"
        "  valid       yes\n"
        "  version     1\n"
        "  chunk size  8 sectors, 4096 bytes\n"
        "  exceptions  5\n"
        "  allocated   56 sectors\n"
        "  total       2048 sectors\n"
        "  metadata    16 sectors\n"
        "  full        2.73 %\n"
        "  status      56/2048 16\n"
    )


def test_info_as_json(sound, run):
    assert json.loads(run("store", "info", "--json", sound)[1]) == [
        {
            "path": sound,
            "valid": True,
            "version": 1,
            "chunk_size": 8,
            "chunk_bytes": 4096,
            "exceptions": 5,
            "sectors_allocated": 56,
            "total_sectors": 2048,
            "metadata_sectors": 16,
            "percent_full": 2.73,
            "status": "56/2048 16",
        }
    ]


@pytest.mark.parametrize("chunk_size", [1, 8, 32])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 200])
def test_info_says_what_the_status_line_says(chunk_size, count, tmp_path, run):
    with cow.Mapper(durability="process") as dm:
        rig = Rig(dm, tmp_path, sectors=256 * chunk_size)
        rig.snap("snap", f"P {chunk_size}", cow_sectors=300 * chunk_size + 3)
        for chunk in range(count):
            rig.write("base", chunk * chunk_size, 1)
        usage = rig.usage()
        (info,) = json.loads(run("store", "info", "--json", rig.cows["snap"])[1])
    assert info["status"] == usage
    assert info["exceptions"] == count


def test_info_of_an_invalid_store(tmp_path, run):
    with cow.Mapper(durability="process") as dm:
        rig = Rig(dm, tmp_path)
        rig.snap(cow_sectors=32)
        for chunk in range(3):
            rig.write("base", 8 * chunk)
        assert rig.usage() == "Invalid"
    status, out, err = run("store", "info", rig.cows["snap"])
    assert (status, err) == (0, "")
    assert "  valid       no\n" in out
    assert "  full        100.00 %\n" in out
    assert "  status      Invalid\n" in out


def test_info_of_one_sector_chunks_is_singular(put, run):
    out = run("store", "info", put(store_bytes([], 1)))[1]
    assert "  chunk size  1 sector, 512 bytes\n" in out


@pytest.mark.parametrize(
    ("allocated", "total", "metadata", "percent"),
    [
        (16, 16384, 16, 0.0),
        (816, 16384, 16, 4.98),  # what lvs printed
        (24, 200, 16, 12.0),
        (24, 24, 16, 100.0),
        (24, 10**9, 16, 0.01),
        (10**9 - 1, 10**9, 16, 99.99),
    ],
)
def test_percent_full_is_what_lvm_shows(allocated, total, metadata, percent):
    assert percent_full(allocated, total, metadata) == percent


def test_info_goes_on_after_a_file_that_fails(sound, tmp_path, run):
    missing = str(tmp_path / "missing")
    status, out, err = run("store", "info", missing, sound)
    assert status == 1
    assert out.startswith(f"{sound}\n")
    assert err == f"cow: {missing}: no such file\n"


def test_json_of_info_holds_the_file_that_fails(sound, tmp_path, run):
    missing = str(tmp_path / "missing")
    status, out, err = run("store", "info", "--json", missing, sound)
    assert status == 1
    assert_one_line(err, missing)
    failed, good = json.loads(out)
    assert failed == {"path": missing, "error": "no such file"}
    assert good["path"] == sound


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "too short for a header"),
        (header_bytes()[:15], "too short for a header"),
        (bytes(4096), "no COW store (magic 0)"),
        (header_bytes(magic=0x12345678), "Invalid or corrupt snapshot (magic 0x12345678)"),
        (header_bytes(12), "invalid on-disk chunk size 12: Chunk size is not a power of 2."),
        (header_bytes(0), "invalid on-disk chunk size 0: Chunk size is not a power of 2."),
        (header_bytes(1 << 22), "invalid on-disk chunk size 4194304: Chunk size is too high."),
        (header_bytes(version=2), "unable to handle snapshot disk version 2"),
    ],
)
@pytest.mark.parametrize("verb", ["info", "dump"])
def test_a_header_that_is_none_is_an_error(verb, data, text, put, run):
    path = put(data)
    assert run("store", verb, path) == (1, "", f"cow: {path}: {text}\n")


# --- store dump -----------------------------------------------------------------------------------


def test_dump_in_full(sound, run):
    out = run("store", "dump", sound)[1]
    assert out == "# old\tnew\n5\t2\n6\t3\n3\t4\n12\t5\n14\t6\n"


def test_dump_with_bytes(sound, run):
    out = run("store", "dump", "--bytes", sound)[1]
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[0] == ["# old", "new", "old bytes", "new bytes"]
    assert lines[1:] == [
        [str(n) for n in (old, new, old * 4096, new * 4096)] for old, new in RECORDS
    ]


def test_dump_of_an_empty_store(put, run):
    path = put(store_bytes([]))
    assert run("store", "dump", path)[1] == "# old\tnew\n"
    assert json.loads(run("store", "dump", "--json", path)[1])["exceptions"] == []


def test_dump_as_json(sound, run):
    assert json.loads(run("store", "dump", "--json", sound)[1]) == {
        "path": sound,
        "valid": True,
        "chunk_size": 8,
        "exceptions": [{"old": old, "new": new} for old, new in RECORDS],
    }


def test_dump_as_json_with_bytes(sound, run):
    found = json.loads(run("store", "dump", "--json", "--bytes", sound)[1])["exceptions"]
    assert found[3] == {"old": 12, "new": 5, "old_bytes": 49152, "new_bytes": 20480}


@pytest.mark.parametrize("json_", [False, True])
def test_dump_in_several_goes_is_the_same(json_, tmp_path, put, run, monkeypatch):
    monkeypatch.setattr("cow.cli.store.ROWS_AT_ONCE", 3)
    records = [(n, n + 2) for n in range(8)]
    path = put(store_bytes(records))
    if json_:
        found = json.loads(run("store", "dump", "--json", path)[1])["exceptions"]
        assert [(each["old"], each["new"]) for each in found] == records
    else:
        lines = run("store", "dump", path)[1].splitlines()[1:]
        assert [tuple(map(int, line.split("\t"))) for line in lines] == records


def test_dump_takes_the_largest_numbers(put, run):
    most = (1 << 64) - 1
    path = put(store_bytes([(most, most)]))
    out = run("store", "dump", "--bytes", path)[1].splitlines()[1]
    assert out == f"{most}\t{most}\t{most * 4096}\t{most * 4096}"


def test_dump_shows_what_the_engine_copied_out(tmp_path, run):
    with cow.Mapper(durability="process") as dm:
        rig = Rig(dm, tmp_path)
        rig.snap()
        for sector in (40, 48, 24):
            rig.write("base", sector)
        rig.write("snap", 96)
    path = rig.cows["snap"]
    rows = [line.split("\t") for line in run("store", "dump", "--bytes", path)[1].splitlines()[1:]]
    assert [(int(row[0]), int(row[1])) for row in rows] == [(5, 2), (6, 3), (3, 4), (12, 5)]
    for _, _, old, new in rows[:3]:
        chunk = Path(path).read_bytes()[int(new) : int(new) + 4096]
        assert chunk == rig.before[int(old) : int(old) + 4096]


def test_dump_of_two_files_is_a_usage_error(sound, run):
    status, out, err = run("store", "dump", sound, sound)
    assert (status, out) == (2, "")
    assert_one_line(err, sound)


# --- store check ----------------------------------------------------------------------------------


def test_check_of_a_sound_store(sound, run):
    assert run("store", "check", sound) == (0, f"{sound}: sound\n", "")


def test_check_tells_of_an_invalid_store(put, run):
    path = put(store_bytes(RECORDS, valid=0))
    assert run("store", "check", path) == (0, f"{path}: sound, but marked invalid\n", "")


def test_check_as_json(sound, run):
    assert json.loads(run("store", "check", "--json", sound)[1]) == [
        {"path": sound, "sound": True, "valid": True, "findings": []}
    ]


@pytest.mark.parametrize(
    ("records", "kind", "text"),
    [
        ([(1, 2), (1, 3)], "old-twice", "area 0, record 1: old chunk 1 has an exception already"),
        ([(1, 2), (3, 2)], "new-twice", "area 0, record 1: new chunk 2 is used by another"),
        ([(1, 1)], "new-metadata", "area 0, record 0: new chunk 1 is a metadata area"),
        ([(1, 256)], "new-range", "area 0, record 0: new chunk 256 is past the end of the store"),
    ],
)
def test_check_finds_damage(records, kind, text, put, run):
    path = put(store_bytes(records))
    status, out, err = run("store", "check", path)
    assert (status, err) == (1, "")
    assert out.startswith(f"{path}: {text}")
    assert out.count("\n") == 1
    (result,) = json.loads(run("store", "check", "--json", path)[1])
    assert result["sound"] is False
    assert [(each["kind"], each["area"]) for each in result["findings"]] == [(kind, 0)]
    assert result["findings"][0]["text"] in out


def test_check_finds_a_header_that_is_none(put, run):
    path = put(header_bytes(magic=1))
    status, out, err = run("store", "check", path)
    assert (status, err) == (1, "")
    assert out == f"{path}: Invalid or corrupt snapshot (magic 0x1)\n"
    (result,) = json.loads(run("store", "check", "--json", path)[1])
    assert result["valid"] is None
    assert result["findings"][0]["area"] is None


def test_check_finds_a_list_that_does_not_end(put, run):
    full = [(n, n + 2) for n in range(32)]
    path = put(store_bytes(full, 1, size=34 * SECTOR))
    status, out, _ = run("store", "check", path)
    assert status == 1
    assert "the list of exceptions does not end" in out


def test_check_of_several_files_says_which(sound, put, tmp_path, run):
    bad = put(store_bytes([(1, 1)]), "bad.cow")
    missing = str(tmp_path / "missing")
    status, out, err = run("store", "check", bad, missing, sound)
    assert status == 1
    assert [line.split(": ")[0] for line in out.splitlines()] == [bad, sound]
    assert_one_line(err, f"{missing}: no such file")


# --- store repair ---------------------------------------------------------------------------------


@pytest.fixture
def damaged(put):
    """The path of a store whose second and fourth exceptions cannot be right."""
    return put(store_bytes([(5, 2), (6, 1000), (3, 4), (5, 5), (14, 6)]))


def test_repair_keeps_what_is_sound_and_says_what_is_lost(damaged, tmp_path, run):
    output = str(tmp_path / "new.cow")
    before = Path(damaged).read_bytes()
    status, out, err = run("store", "repair", damaged, output)
    assert (status, err) == (1, "")
    assert f"{damaged}: area 0, record 1: new chunk 1000 is past the end" in out
    assert f"{damaged}: area 0, record 3: old chunk 5 has an exception already" in out
    assert out.endswith(f"{output}: 3 exceptions kept, 2 lost\n")
    assert Path(damaged).read_bytes() == before
    assert cow.store.open(output).exceptions.tolist() == [[5, 2], [3, 3], [14, 4]]
    assert cow.store.check(output) == []


def test_repair_moves_the_data_with_its_exception(put, tmp_path, run):
    data = bytearray(store_bytes([(7, 1), (8, 3)]))
    data[3 * 4096 : 4 * 4096] = b"kept" * 1024
    output = tmp_path / "new.cow"
    assert run("store", "repair", put(data), str(output))[0] == 1
    assert output.read_bytes()[2 * 4096 : 3 * 4096] == b"kept" * 1024


def test_repair_of_a_damaged_header_takes_the_chunk_size_from_the_command_line(put, tmp_path, run):
    data = bytearray(store_bytes(RECORDS))
    data[:16] = b"\xff" * 16
    store, output = put(data), str(tmp_path / "new.cow")
    assert run("store", "repair", store, output)[0] == 1
    assert not os.path.exists(output)
    status, out, err = run("store", "repair", store, output, "--chunk-size", "8")
    assert (status, err) == (0, "")
    assert out.endswith(f"{output}: 5 exceptions kept, 0 lost\n")
    assert cow.store.open(output).exceptions.tolist() == [list(pair) for pair in RECORDS]


def test_repair_refuses_a_store_marked_invalid_unless_forced(put, tmp_path, run):
    data = bytearray(store_bytes(RECORDS))
    data[4:8] = bytes(4)
    store, output = put(data), str(tmp_path / "new.cow")
    status, out, err = run("store", "repair", store, output)
    assert (status, out) == (1, "")
    assert_one_line(err, "marked invalid")
    assert run("store", "repair", store, output, "--force")[0] == 0
    assert cow.store.open(output).valid


def test_repair_does_not_write_over_a_file(sound, put, run):
    there = put(b"precious", "there")
    status, out, err = run("store", "repair", sound, there)
    assert (status, out) == (1, "")
    assert_one_line(err, f"{there}: exists already")
    assert Path(there).read_bytes() == b"precious"


def test_repair_drops_exceptions_past_the_end_of_the_origin(sound, tmp_path, run):
    output = str(tmp_path / "new.cow")
    status, out, _ = run("store", "repair", sound, output, "--origin-size", "100", "--json")
    result = json.loads(out)
    assert (status, result["kept"], result["lost"]) == (1, 4, 1)
    assert result["findings"][0]["kind"] == "old-range"


def test_repair_shows_its_progress_on_a_terminal(sound, tmp_path):
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cow", "store", "repair", sound, str(tmp_path / "new.cow")],
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
        check=False,
    )
    os.close(theirs)
    shown = os.read(ours, 10000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert shown.split("\r")[1] == f"1 of {len(RECORDS)} exceptions"
    assert shown.rstrip().endswith(f"{len(RECORDS)} of {len(RECORDS)} exceptions")


def test_an_error_of_no_errno_is_one_line(sound, run, monkeypatch):
    def refuse(*args, **options):
        raise cow.CowError("no reason\nat all")

    monkeypatch.setattr(cow.store, "check", refuse)
    status, _, err = run("store", "check", sound)
    assert status == 1
    assert_one_line(err, "no reason at all")
