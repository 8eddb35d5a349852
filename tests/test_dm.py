"""`cow dm`: what dmsetup prints, byte for byte, and what we add.

data/dmsetup.jsonl is a session with the real dmsetup (Debian's 1.02.185) on the real kernel (Linux
6.1): every command line with what it printed and its exit status. {o}, {c} and {s} stand for three
loop devices of 64, 16 and 1 MiB; usage texts are cut to the word USAGE, the help on selections to
the word SYNTAX, lists of fields to those that are not about statistics. "open" and "close" say what
another program does with a device. kernel/record_dmsetup.py records it.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support import count

from cow.cli import main as command
from cow.cli.dm import VERBS, run, usage
from cow.cli.dm.names import mangle, split_name, unmangle
from cow.daemon import server as server_module
from cow.daemon.client import DEVICE_ARGS, Client, absolute_paths
from cow.daemon.server import Server
from cow.errors import DeviceBusy
from cow.mapper import Mapper

SESSION = Path(__file__).parent / "data" / "dmsetup.jsonl"
MIB = 1 << 20


class Dm:
    """Runs command lines in this process, against a server in this process."""

    def __init__(self, monkeypatch, capsys) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *args: str, stdin: str = "") -> tuple[int, str, str]:
        fake = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        self._monkeypatch.setattr(sys, "stdin", fake)
        status = run(args)
        printed = self._capsys.readouterr()
        return status, printed.out, printed.err

    def out(self, *args: str, stdin: str = "") -> str:
        """Run a command line that has to succeed and say nothing on stderr."""
        status, out, err = self(*args, stdin=stdin)
        assert (status, err) == (0, ""), (args, status, err)
        return out


@pytest.fixture
def mapper():
    with Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def dm(mapper, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COW_SOCKET", str(tmp_path / "run" / "control.sock"))
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.chdir(tmp_path)
    server = Server(mapper)
    server.start()
    yield Dm(monkeypatch, capsys)
    server.stop()


@pytest.fixture
def images(mapper, tmp_path):
    """Paths of three images, 7:0 to 7:2, as the session has them."""
    paths = {}
    for name, size in (("o", 64 * MIB), ("c", 16 * MIB), ("s", MIB)):
        paths[name] = str(tmp_path / f"{name}.img")
        with open(paths[name], "wb") as file:
            file.truncate(size)
        mapper.image(paths[name])
    return paths


def as_dmsetup(err: str) -> str:
    """Return stderr without what we add, under dmsetup's name, and with usage texts cut."""
    lines = [line for line in err.splitlines(True) if not line.startswith("cow: ")]
    text = "".join(lines).replace("cow dm: ", "dmsetup: ")
    text = re.sub(r"Selection syntax\n(.+\n)* \n", "SYNTAX\n", text)
    return text[: text.index("Usage:\n")] + "USAGE\n" if "Usage:\n" in text else text


# --- beside the real one --------------------------------------------------------------------------


def test_a_session_is_that_of_dmsetup(dm, images, mapper, tmp_path):
    (tmp_path / "bad.tab").write_text("0 8 zero\n0 9\n")
    (tmp_path / "good.tab").write_text("0 8 zero\n")
    (tmp_path / "a blank.tab").write_text("0 8 zero")
    held = {}
    wrong = []

    def placed(text: str) -> str:
        return re.sub(r"\{([ocs])\}", lambda hit: images[hit[1]], text)

    for number, line in enumerate(SESSION.read_text(encoding="utf-8").splitlines(), 1):
        entry = json.loads(line)
        if "open" in entry:
            held[entry["open"]] = mapper.device(entry["open"]).open()
            continue
        if "close" in entry:
            held.pop(entry["close"]).close()
            continue
        args = [placed(word) for word in entry["args"]]
        status, out, err = dm(*args, stdin=placed(entry.get("stdin", "")))
        count("command lines compared with those of dmsetup")
        got = {"stdout": out, "stderr": as_dmsetup(err), "status": status}
        expected = {key: entry[key] for key in got}
        if got != expected:
            wrong.append(f"line {number}: {args}\n  expected {expected}\n  got      {got}")
    assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize(
    "args",
    [
        ["vg--0-lv--1"],
        ["a-b-c-d"],
        ["-"],
        ["a-"],
        ["--"],
        ["-a", "LVM"],
        ["plain", "CRYPT"],
        ["vg-lv", "-o", "all", "--noheadings"],
        ["vg-lv", "--nameprefixes", "--unquoted"],
    ],
)
def test_splitname_is_that_of_the_dmsetup_installed_here(args, capfd):
    program = next((p for p in ("/usr/sbin/dmsetup", "/sbin/dmsetup") if os.path.exists(p)), None)
    words = ["splitname", *args] if not args[0].startswith("-") else ["splitname", "--", *args]
    status = run(words)
    ours = capfd.readouterr()
    assert status == 0
    if program:
        done = subprocess.run([program, *words], capture_output=True, check=False, timeout=60)
        assert (ours.out, ours.err) == (done.stdout.decode(), done.stderr.decode())


# --- the lines of the fact sheet ------------------------------------------------------------------


def test_a_blank_follows_the_type_where_there_are_no_params(dm):
    dm.out("create", "z", "--table", "0 100 zero")
    assert dm.out("table", "z") == "0 100 zero \n"
    assert dm.out("status") == "z: 0 100 zero \n"


def test_targets_are_printed_as_dmsetup_does(dm):
    lines = dm.out("targets").splitlines()
    assert "linear           v1.4.0" in lines
    assert {line.split()[0] for line in lines} >= {"snapshot", "snapshot-origin", "zero"}


def test_version_has_the_two_lines_of_dmsetup(dm):
    lines = dm.out("version").splitlines()
    assert re.fullmatch(r"Library version:   \S+ \(\S+\)", lines[0])
    assert re.fullmatch(r"Driver version:    \d+\.\d+\.\d+", lines[1])
    assert dm.out("--version") == "\n".join(lines) + "\n"


# --- what we add ----------------------------------------------------------------------------------


def test_the_reason_follows_the_line_of_the_ioctl(dm):
    status, out, err = dm("create", "x8", "--table", "0 8 snapshot a b P 7")
    first, reason, last = err.splitlines()
    assert (status, out) == (1, "")
    assert first.startswith("device-mapper: reload ioctl on x8 (254:0) failed: ")
    assert reason.startswith("cow: x8: table line 1: snapshot: ")
    assert last == "Command failed."


def test_a_device_that_is_missing_needs_no_reason(dm):
    assert dm("table", "x")[2].count("\n") == 2


def test_a_busy_device_names_its_users(dm):
    dm.out("create", "low", "--table", "0 8 zero")
    dm.out("create", "high", "--table", "0 8 linear low 0")
    assert "cow: low: in use, open count 1: high\n" in dm("remove", "low")[2]


def test_relative_paths_are_those_of_the_client(dm, images, tmp_path, monkeypatch):
    sub = tmp_path / "a directory"
    sub.mkdir()
    with open(sub / "t.img", "wb") as file:
        file.truncate(MIB)
    monkeypatch.chdir(sub)
    dm.out("create", "a", "--table", "0 8 linear t.img 0\n8 8 linear ../c.img 0 # t.img")
    expected = rf"0 8 linear {sub}/t.img 0".replace("a directory", r"a\ directory")
    assert dm.out("table", "--names", "a").splitlines()[0] == expected
    assert dm.out("table", "a") == "0 8 linear 7:3 0\n8 8 linear 7:1 0\n"
    dm.out("create", "--concise", "b,,,,0 8 linear t.img 0")
    assert dm.out("table", "b") == "0 8 linear 7:3 0\n"


def test_a_device_goes_before_a_file_of_its_name(dm, tmp_path):
    (tmp_path / "low").write_bytes(bytes(MIB))
    dm.out("create", "low", "--table", "0 8 zero")
    dm.out("create", "high", "--table", "0 8 linear low 0")
    assert dm.out("deps", "-o", "devname", "high") == "1 dependencies\t: (low)\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 8 linear x 0", "0 8 linear /d/x 0"),
        ("0 8 linear ./x 0", "0 8 linear /d/x 0"),
        (r"0 8 linear a\ b 0", r"0 8 linear /d/a\ b 0"),
        ("0 8 linear /x 0", "0 8 linear /x 0"),
        ("0 8 linear 7:1 0", "0 8 linear 7:1 0"),
        ("0 8 linear dev 0", "0 8 linear dev 0"),
        ("  0\t8  snapshot x  dev P 8", "  0\t8  snapshot /d/x  dev P 8"),
        ("0 8 snapshot dev P P 8", "0 8 snapshot dev /d/P P 8"),
        ("0 8 striped 2 8 x 0 y 0", "0 8 striped 2 8 /d/x 0 /d/y 0"),
        ("0 8 delay x 0 10 y 0 20", "0 8 delay /d/x 0 10 /d/y 0 20"),
        ("0 8 mirror core 1 2 2 x 0 y 0 1 z", "0 8 mirror core 1 2 2 /d/x 0 /d/y 0 1 z"),
        ("0 8 mirror disk 2 l 2 1 x 0 y 0", "0 8 mirror disk 2 /d/l 2 1 /d/x 0 y 0"),
        ("0 8 mirror disk 9", "0 8 mirror disk 9"),
        ("0 8 mirror", "0 8 mirror"),
        ("0 8 zero # x", "0 8 zero # x"),
        ("0 8 linear x 0 # x", "0 8 linear /d/x 0 # x"),
        ("# 0 8 linear x 0", "# 0 8 linear x 0"),
        ("0 8 other x ./y", "0 8 other x /d/y"),
        ("0 8", "0 8"),
        ("", ""),
    ],
)
def test_paths_of_a_table_are_made_absolute(line, expected):
    assert absolute_paths(line, "/d", {"dev"}.__contains__) == expected
    assert absolute_paths(f"\n{line}\n", "/d", {"dev"}.__contains__) == f"\n{expected}\n"


def test_every_target_that_opens_devices_is_known_to_the_client(dm):
    served = {line.split()[0] for line in dm.out("targets").splitlines()}
    assert served - {"zero", "error", "mirror"} <= set(DEVICE_ARGS)


def test_json(dm, images):
    dm.out("create", "low", "-u", "U1", "--table", f"0 8 linear {images['o']} 0\n8 8 zero")
    dm.out("create", "high", "-r", "--table", "0 8 linear low 0")

    def read(*args: str):
        return json.loads(dm.out(*args, "--json"))

    assert read("table", "low") == [
        {
            "name": "low",
            "targets": [
                {"start": 0, "length": 8, "type": "linear", "params": f"{images['o']} 0"},
                {"start": 8, "length": 8, "type": "zero", "params": ""},
            ],
        }
    ]
    assert [each["name"] for each in read("status")] == ["high", "low"]
    assert read("ls")[1] == {"name": "low", "uuid": "U1", "major": 254, "minor": 0}
    assert read("deps", "high")[0]["deps"][0]["name"] == "low"
    info = read("info", "high")[0]
    assert (info["readonly"], info["sectors"], info["nr_targets"]) == (True, 8, 1)
    assert {"name": "linear", "version": [1, 4, 0]} in read("targets")
    assert read("version")[0]["pid"] == os.getpid()


@pytest.mark.parametrize("verb", ["table", "status", "info", "ls", "deps"])
def test_json_of_nothing_is_an_empty_list(dm, verb):
    assert dm.out(verb, "--json") == "[]\n"


def test_concise_with_names_makes_the_same_devices_again(dm, images, mapper):
    dm.out("create", "z-low", "--table", f"0 8 linear {images['o']} 0\n8 8 error")
    dm.out("create", "a-high", "-u", "u,1", "-r", "--table", "0 8 linear z-low 0")
    dm.out("create", "none", "-n")
    text = dm.out("table", "--concise", "--names")
    assert text.index("z-low") < text.index("a-high")
    assert text.count("\n") == 1
    before = dm.out("info", "-c"), dm.out("table")
    dm.out("remove_all")
    made = [each for each in text.strip("\n").split(";") if not each.startswith("none")]
    dm.out("create", "--concise", ";".join(made))
    dm.out("create", "none", "-n", "-j", "254", "-m", "2")
    assert (dm.out("info", "-c"), dm.out("table")) == before


def test_names_are_printed_as_they_are_whatever_the_locale(dm):
    dm.out("create", "ümlaut", "-n")
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = [sys.executable, "-P", "-m", "cow", "dm", "ls"]
    done = subprocess.run(
        program, env=os.environ | ascii_only, capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ümlaut\t(254:0)\n".encode(), b"")


def test_stdin_that_is_closed_is_empty(dm, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["create", "a"]) == 0
    assert dm.out("table", "a") == "\n"


def test_the_socket_can_be_named(dm, monkeypatch):
    path = os.environ["COW_SOCKET"]
    monkeypatch.setenv("COW_SOCKET", "/nowhere")
    assert dm.out("--socket", path, "ls") == "No devices found\n"


@pytest.mark.parametrize("args", [["ls"], ["create", "a", "-n"], ["version"], ["remove_all"]])
def test_without_a_server_one_line_says_how_to_start_one(args, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COW_SOCKET", str(tmp_path / "none.sock"))
    assert run(args) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"cow: .*none\.sock: .*cow serve\n", printed.err)


def test_a_name_that_looks_like_a_number_is_a_name(dm):
    dm.out("create", "first", "-n")
    dm.out("create", "254:0", "--table", "0 8 zero")
    assert dm.out("table", "254:0") == "0 8 zero \n"
    dm.out("rename", "254:0", "7:7")
    dm.out("suspend", "7:7")
    dm.out("remove", "7:7")
    assert dm.out("ls") == "first\t(254:0)\n"


def test_wait_returns_at_once_where_the_counter_differs(dm):
    dm.out("create", "a", "--table", "0 8 zero")
    dm.out("rename", "a", "b")
    assert dm.out("wait", "b") == ""
    assert dm.out("wait", "b", "7") == ""


def test_remove_retries_until_the_device_is_free(dm, mapper, monkeypatch):
    dm.out("create", "a", "--table", "0 8 zero")
    file = mapper.device("a").open()
    tries = []

    def pause(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) == 3:
            file.close()

    monkeypatch.setattr("cow.cli.dm.change.time.sleep", pause)
    dm.out("remove", "--retry", "a")
    assert tries == [0.2] * 3


def test_remove_gives_up_after_25_tries(dm, mapper, monkeypatch):
    dm.out("create", "a", "--table", "0 8 zero")
    tries = []
    monkeypatch.setattr("cow.cli.dm.change.time.sleep", tries.append)
    with mapper.device("a").open():
        status, _, err = dm("remove", "--retry", "a")
    assert (status, len(tries)) == (1, 24)
    assert err.count("Device or resource busy") == 1


def test_remove_all_with_force_says_what_is_left(dm, mapper):
    dm.out("create", "a", "--table", "0 8 zero")
    with mapper.device("a").open():
        assert dm("remove_all") == (0, "", "")
        assert dm("remove_all", "-f") == (0, "", "Unable to remove 1 device(s).\n")
    assert dm.out("table", "a") == "0 8 error \n"


def test_a_message_is_answered(dm, images):
    table = f"0 8 log-writes {images['s']} {images['c']}"
    dm.out("create", "logged", "--table", table)
    assert dm.out("message", "logged", "0", "mark", "here") == ""
    status, _, err = dm("message", "logged", "99", "mark", "here")
    assert status == 1
    assert "cow: logged: Target message sector outside device.\n" in err


@pytest.mark.parametrize(
    ("env", "branch"),
    [
        ({"LC_ALL": "C"}, "`-"),
        ({"LC_ALL": "", "LC_CTYPE": "C.UTF-8", "LANG": ""}, "`-"),
        ({"LC_ALL": "", "LC_CTYPE": "", "LANG": "de_DE.UTF-8"}, "└─"),
        ({"LC_ALL": "en_US.utf8"}, "└─"),
    ],
)
def test_a_tree_is_drawn_with_what_the_locale_has(dm, monkeypatch, env, branch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    dm.out("create", "low", "--table", "0 8 zero")
    dm.out("create", "high", "--table", "0 8 linear low 0")
    assert dm.out("ls", "--tree") == f"high (254:1)\n {branch}low (254:0)\n"


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mangled"),
    [("plain-1_2", "plain-1_2"), ("a b", r"a\x20b"), ("ü", r"\xc3\xbc"), ("a\\b", r"a\x5cb")],
)
def test_mangling(name, mangled):
    assert mangle(name) == mangled
    assert unmangle(mangled) == name
    assert unmangle(name) == name


def test_what_is_only_partly_mangled_is_left_alone():
    assert unmangle(r"a\x20b c") == r"a\x20b c"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vg--0-lv--1", ("vg-0", "lv-1", "")),
        ("vg-lv-real", ("vg", "lv", "real")),
        ("plain", ("plain", "", "")),
        ("", ("", "", "")),
    ],
)
def test_parts_of_a_name(name, parts):
    assert split_name("LVM", name) == ("LVM", *parts)
    assert split_name("OTHER", name) == ("OTHER", "", "", "")


# --- the command ----------------------------------------------------------------------------------


def test_usage_lists_every_verb(dm):
    for args in ((), ("help",), ("-h",), ("bogus",)):
        assert all(f"\t{verb} " in dm(*args)[2] for verb in VERBS)
    assert usage().startswith("Usage:\n\ncow dm\n")


def test_the_command_of_the_package_leads_here(dm, capsys):
    dm.out("create", "a", "--table", "0 8 zero")
    assert command.main(["dm", "-v", "table", "a"]) == 0
    assert capsys.readouterr().out.endswith("\n0 8 zero \n")


HEAVY = {"numpy", "cow._core", "cow.mapper", "asyncio", "inspect", "logging", "ssl", "subprocess"}
"""What costs more time to import than a verb takes."""


def test_no_verb_imports_numpy_the_engine_or_anything_heavy(dm):
    verbs = [
        *(["create", "a", "--table", "0 8 zero"], ["create", "--concise", "b,,,,0 8 zero"]),
        *(["load", "a", "--table", "0 8 error"], ["clear", "a"], ["wipe_table", "b"]),
        *(["suspend", "a"], ["resume", "a"], ["rename", "a", "c"], ["message", "c", "0", "x"]),
        *(["table"], ["table", "--concise", "--names"], ["status", "--target", "zero"]),
        *(["info"], ["info", "-c", "-o", "all", "-S", "name=c", "--sort", "-name"]),
        *(["ls"], ["ls", "--tree", "-o", "uuid,utf"], ["deps", "--json"], ["wait", "c"]),
        *(["targets"], ["version"], ["splitname", "vg-lv"], ["mangle"], ["help", "-c"]),
        *(["remove", "--retry", "c"], ["remove_all", "-f"], ["target-version", "zero"]),
    ]
    program = (
        "import json, sys\nfrom cow.cli.main import main\n"
        "for verb in json.loads(sys.argv[1]):\n main(['dm', *verb])\nprint(*sys.modules)"
    )
    words = [sys.executable, "-P", "-c", program, json.dumps(verbs)]
    # Without what `make coverage` imports.
    env = {**os.environ, "COVERAGE_PROCESS_START": ""}
    done = subprocess.run(words, capture_output=True, check=True, timeout=60, env=env)
    modules = set(done.stdout.decode().split("\n")[-2].split())
    assert {"cow.daemon.client", "cow.cli.dm.report", "cow.cli.dm.tree"} <= modules
    assert not modules & HEAVY


def test_an_answer_larger_than_any_buffer_arrives(dm, mapper):
    lines = "\n".join(f"{n} 1 zero" for n in range(50000))
    dm.out("create", "many", stdin=lines)
    assert dm.out("table", "many").splitlines() == [f"{n} 1 zero " for n in range(50000)]
    with Client() as client:
        assert client.call("devices", name="many")[0]["nr_targets"] == 50000


def test_help_with_columns_lists_the_fields(dm):
    status, out, err = dm("help", "-c")
    assert (status, out) == (0, "")
    assert err.startswith(usage().split("\n", 1)[0])
    for name in ("name", "blkdevname", "segments", "tables_loaded"):
        assert re.search(rf"^ +{name} +- ", err, re.MULTILINE), name


def test_fields_are_listed_where_help_is_asked_for(dm):
    status, out, err = dm("info", "-c", "-o", "help")
    assert (status, out) == (0, "")
    assert re.search(r"^ +read_ahead +- ", err, re.MULTILINE)


def test_an_option_cut_short_must_be_the_only_one(dm):
    status, _, err = dm("remove", "--no", "a")
    assert status != 0
    assert "option '--no' is ambiguous" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-O", "nosuch"], "dm_report: Unrecognised field: nosuch"),
        (["-S", "nosuch=1"], "Unrecognised selection field: nosuch"),
        (["-S", "=1"], "Expecting field name"),
        (["-S", "name"], "Unrecognised comparison operator: "),
        (["-S", "name=~*"], "Failed to parse regex: "),
        (["-S", "name>1"], "Operator can be used only with number"),
        (["-S", "open=x"], "Failed to parse numeric value for selection field open."),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(dm, words, text):
    dm.out("create", "a", "--table", "0 8 zero")
    status, out, err = dm("info", "-c", *words)
    assert (status, out) == (1, "")
    assert text in err


@pytest.fixture
def refuse(monkeypatch):
    """A function that makes the server refuse a verb, whatever the device."""

    def not_now(mapper: Mapper, *, name: str, **args):
        raise DeviceBusy(f"{name}: not now")

    return lambda verb: monkeypatch.setitem(server_module._VERBS, verb, not_now)


def test_every_device_that_cannot_be_shown_is_told(dm, refuse):
    for name in ("a", "b"):
        dm.out("create", name, "--table", "0 8 zero")
    refuse("table")
    status, out, err = dm("table")
    assert (status, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("cow: ")] == [
        "cow: a: not now",
        "cow: b: not now",
    ]


def test_a_wipe_that_cannot_go_live_is_taken_back(dm, mapper, refuse):
    dm.out("create", "a", "--table", "0 8 zero")
    with mapper.device("a").open():
        refuse("resume")
        status, _, err = dm("wipe_table", "a")
        assert status == 1
        assert "cow: a: not now\n" in err
        assert not mapper.info("a").inactive
        status, _, err = dm("remove_all", "-f")
        assert "cow: a: not now\n" in err
        assert err.endswith("Unable to remove 1 device(s).\n")
    assert mapper.table("a") == "0 8 zero "


def test_the_answer_of_a_message_is_printed(dm, images, monkeypatch):
    monkeypatch.setattr("cow.targets.zero.ZeroTarget.message", lambda self, args: "so many\n")
    dm.out("create", "a", "--table", "0 8 zero")
    assert dm.out("message", "a", "0", "count") == "so many\n"


@pytest.mark.parametrize(("width", "cut"), [(200, False), (20, True)])
def test_a_tree_is_cut_to_the_terminal(dm, width, cut):
    name = "n" * 60
    dm.out("create", name, "--table", "0 8 zero")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, width))
    words = [sys.executable, "-P", "-m", "cow", "dm", "ls", "--tree"]
    done = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(theirs)
    printed = os.read(ours, 1000).decode()
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (name in printed) == (not cut)
