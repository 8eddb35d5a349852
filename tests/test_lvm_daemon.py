"""`cow lvm`: verbs that run in a server, with its prompts and its merges, and those that do not."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import fill, poll

from cow.daemon import lvm, protocol
from cow.daemon.client import Client
from cow.daemon.protocol import ProtocolError
from cow.daemon.server import Server
from cow.errors import CowOSError
from cow.mapper import Mapper

MIB = 1 << 20
SECONDS = 30


class Said:
    """What a command of a client printed; `answers` are given to its questions, then none."""

    def __init__(self, *answers: str) -> None:
        self.out = ""
        self.err = ""
        self.background = ""
        self.questions: list[str] = []
        self.status = -1
        self._answers = list(answers)

    def ask(self, question: str) -> str | None:
        self.questions.append(question)
        return self._answers.pop(0) if self._answers else None

    def add_out(self, text: str) -> None:
        self.out += text

    def add_err(self, text: str) -> None:
        self.err += text

    def add_background(self, text: str) -> None:
        self.background += text


class Served:
    """A server in this process, and its clients."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.mapper = stack.enter_context(Mapper(durability="process"))
        self.server = Server(self.mapper, str(folder / "run" / "control.sock"))
        self.server.start()
        stack.callback(self.server.stop)

    def client(self) -> Client:
        return Client(self.server.path)

    def lvm(self, line: str, *answers: str, said: Said | None = None) -> Said:
        """Run a command line; its words have no blanks in them."""
        said = said or Said(*answers)
        with self.client() as client:
            said.status = client.lvm(
                line.split(),
                str(self.folder),
                out=said.add_out,
                err=said.add_err,
                ask=said.ask,
                background=said.add_background,
            )
        return said

    def disk(self, name: str, size: int = 64 * MIB) -> None:
        with open(self.folder / name, "wb") as file:
            file.truncate(size)


@pytest.fixture
def served(tmp_path):
    with contextlib.ExitStack() as stack:
        found = Served(tmp_path, stack)
        found.disk("a.img")
        assert found.lvm("vgcreate vg a.img").status == 0
        yield found


def snapshot(served: Served) -> None:
    """Make vg/org, with a snapshot vg/s that has something in its store."""
    served.lvm("lvcreate -L 8m -n org vg")
    served.lvm("lvcreate -s -L 12m -n s vg/org")
    served.mapper.device("vg-org").pwrite(fill(4 * MIB, 1), 0)


# --- verbs in the server --------------------------------------------------------------------------


def test_a_verb_prints_through_the_socket_and_its_lvs_are_the_servers_devices(served):
    said = served.lvm("lvcreate -L 8m -n org vg")
    assert (said.status, said.out, said.err) == (0, '  Logical volume "org" created.\n', "")
    assert served.mapper.names() == ["vg-org"]


def test_devices_that_were_named_are_known_to_later_commands(served):
    assert served.lvm("vgs -o vg_name,pv_name --noheadings").out == (
        f"  vg {served.folder}/a.img\n"
    )


def test_paths_start_where_the_client_is_and_are_shown_as_it_named_them(served):
    assert served.lvm("pvs --devices a.img -o pv_name --noheadings").out == "  a.img     \n"


def test_errors_and_exit_codes_come_through(served):
    said = served.lvm("lvs nosuch")
    assert (said.status, said.out) == (5, "")
    assert said.err == '  Volume group "nosuch" not found\n  Cannot process volume group nosuch\n'
    assert served.lvm("lvs --nosuch").status == 3
    assert served.lvm("nosuch").status == 2


@pytest.mark.parametrize(("answer", "left"), [("y", []), ("yes", []), ("n", ["vg-org"])])
def test_a_question_is_asked_by_the_client(served, answer, left):
    served.lvm("lvcreate -L 8m -n org vg")
    said = served.lvm("lvremove vg/org", answer)
    question = "Do you really want to remove active logical volume vg/org? [y/n]: "
    assert said.questions == [question]
    assert said.status == (5 if left else 0)
    assert served.mapper.names() == left


def test_no_answer_is_no(served):
    served.lvm("lvcreate -L 8m -n org vg")
    said = served.lvm("lvremove vg/org")
    assert said.err == "[n]\n  Logical volume vg/org not removed.\n"
    assert served.mapper.names() == ["vg-org"]


def test_what_was_said_before_a_question_is_not_said_again(served):
    served.lvm("lvcreate -L 8m -n org vg")
    served.lvm("lvcreate -L 8m -n store vg")
    said = served.lvm("lvconvert -s vg/org vg/store", "y")
    assert said.status == 0
    assert said.err.count("WARNING: Converting logical volume") == 1


def test_an_open_question_holds_up_nobody(served):
    served.lvm("lvcreate -L 8m -n org vg")
    asked, go_on = threading.Event(), threading.Event()

    class Slow(Said):
        def ask(self, question: str) -> str | None:
            asked.set()
            assert go_on.wait(SECONDS)
            return "y"

    slow = Slow()
    thread = threading.Thread(target=served.lvm, args=("lvremove vg/org",), kwargs={"said": slow})
    thread.start()
    try:
        assert asked.wait(SECONDS)
        assert served.lvm("lvcreate -L 8m -n other vg").status == 0
        assert served.lvm("lvrename vg org renamed").status == 0
        with served.client() as client:
            assert client.call("names") == ["vg-other", "vg-renamed"]
    finally:
        go_on.set()
        thread.join(SECONDS)
    # The answer was about an LV that has another name by now.
    assert slow.status == 5
    assert served.mapper.names() == ["vg-other", "vg-renamed"]


def test_who_hangs_up_instead_of_answering_has_said_no(served):
    served.lvm("lvcreate -L 8m -n org vg")
    with served.client() as client:
        args = {"argv": ["lvremove", "vg/org"], "directory": "/"}
        client.send(protocol.encode({"cow": 1, "verb": "lvm", "args": args}))
        assert "prompt" in client.receive()
    assert served.lvm("lvs -o name --noheadings").out == "  org \n"


def test_an_answer_that_is_none_is_no(served):
    served.lvm("lvcreate -L 8m -n org vg")
    with served.client() as client:
        args = {"argv": ["lvremove", "vg/org"], "directory": "/"}
        client.send(protocol.encode({"cow": 1, "verb": "lvm", "args": args}))
        assert "prompt" in client.receive()
        client.send(protocol.encode({"answer": 7}))
    assert served.mapper.names() == ["vg-org"]


def test_a_client_that_does_not_read_holds_up_nobody(served):
    for number in range(12):
        served.lvm(f"lvcreate -an -Zn -L 4m -n lv{number} vg")
    with served.client() as client:
        args = {"argv": ["lvs", "-o", "all,seg_all"], "directory": "/"}
        for _ in range(20):
            client.send(protocol.encode({"cow": 1, "verb": "lvm", "args": args}))
        assert served.lvm("lvs -o name --noheadings").status == 0


@pytest.mark.parametrize(
    "args",
    [
        {"argv": "lvs", "directory": "/"},
        {"argv": ["lvs", 7], "directory": "/"},
        {"argv": ["lvs\0"], "directory": "/"},
        {"argv": ["lvs"]},
        {"argv": ["lvs"], "directory": 1},
        {"argv": ["lvs"], "directory": "/", "devices": ["a"]},
        {"argv": ["lvs"], "directory": "/", "environ": {}},
    ],
)
def test_a_request_that_is_none_is_refused(served, args):
    with served.client() as client, pytest.raises(ProtocolError):
        client.call("lvm", **args)


def test_what_goes_wrong_in_a_command_is_raised_at_the_client(served, monkeypatch):
    def broken(*args: object, **options: object) -> int:
        raise CowOSError("no such luck", errno.EIO)

    monkeypatch.setattr(lvm.Session, "run", broken)
    with pytest.raises(CowOSError, match="no such luck") as caught:
        served.lvm("vgs")
    assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    assert served.lvm("vgs").status == 0


def test_the_settings_of_the_client_hold_for_its_command(served):
    (served.folder / "etc").mkdir()
    (served.folder / "etc" / "lvm.conf").write_text('global { units = "k" }\n')
    words = ["vgs", "--noheadings", "-o", "vg_extent_size", "vg"]
    shown = []
    for system_dir in ("etc", None):
        with served.client() as client:
            status = client.lvm(
                words,
                str(served.folder),
                out=shown.append,
                err=shown.append,
                ask=lambda question: None,
                system_dir=system_dir,
            )
        assert status == 0
    assert [each.strip() for each in shown] == ["4096.00k", "4.00m"]


# --- merges ---------------------------------------------------------------------------------------


@pytest.fixture
def slow(served):
    """The VG slowvg on a device that takes its time for writes, with a merge of seconds in it."""
    served.disk("b.img")
    table = "0 131072 delay {0} 0 0 {0} 0 {1}"
    image = served.folder / "b.img"
    served.mapper.create("slow", table.format(image, 0))
    assert served.lvm("vgcreate slowvg slow").status == 0
    assert served.lvm("lvcreate -L 24m -n org slowvg").status == 0
    assert served.lvm("lvcreate -s -L 28m -n s slowvg/org").status == 0
    served.mapper.device("slowvg-s").pwrite(fill(24 * MIB, 7), 0)
    served.mapper.load("slow", table.format(image, 25))  # ms for each write, of up to 4 MiB
    served.mapper.suspend("slow")
    served.mapper.resume("slow")
    return served


def no_snapshot(served: Served, vg: str) -> bool:
    return served.lvm(f"lvs -a -o name --noheadings {vg}").out.split() == ["org"]


def test_a_client_that_goes_away_leaves_the_merge_running(slow):
    with slow.client() as client:
        args = {"argv": ["lvconvert", "--merge", "slowvg/s"], "directory": "/"}
        client.send(protocol.encode({"cow": 1, "verb": "lvm", "args": args}))
        assert "in the background" in client.receive()["background"]
        assert "started" in client.receive()["out"]
    assert "snapshot-merge" in slow.mapper.table("slowvg-org")
    poll(lambda: no_snapshot(slow, "slowvg"))
    assert slow.mapper.device("slowvg-org").pread(24 * MIB, 0) == fill(24 * MIB, 7)


def test_others_work_while_a_merge_is_waited_for(slow):
    said = Said()
    thread = threading.Thread(
        target=slow.lvm, args=("lvconvert --merge -i 1 slowvg/s",), kwargs={"said": said}
    )
    thread.start()
    poll(lambda: "started" in said.out)
    assert slow.lvm("lvs slowvg").out.splitlines()[1].split()[2] == "Owi-a-s---"
    assert slow.lvm("lvcreate -L 4m -n other vg").status == 0
    thread.join(SECONDS)
    assert said.status == 0
    assert said.out.splitlines()[0] == "  Merging of volume slowvg/s started."
    assert said.out.splitlines()[-3:] == [
        "  slowvg/org: Merged: 100.00%",
        "  Merge of snapshot into logical volume slowvg/org has finished.",
        '  Logical volume "s" successfully removed.',
    ]


def test_in_the_background_nobody_waits(slow):
    said = slow.lvm("lvconvert --merge -b slowvg/s")
    assert (said.status, said.out) == (0, "  Merging of volume slowvg/s started.\n")
    poll(lambda: no_snapshot(slow, "slowvg"))


# --- the command ----------------------------------------------------------------------------------


def cow(folder: Path, *args: str, **options) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    environ = {**os.environ, "COW_SOCKET": str(folder / "run" / "control.sock")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "cow", "lvm", *args],
        cwd=folder,
        env=environ | options.pop("env", {}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        stdin=options.pop("stdin", subprocess.DEVNULL),
        **options,
    )


def test_the_command_speaks_to_the_server_that_is_there(served):
    snapshot(served)
    done = cow(served.folder, "lvs", "-o", "name,attr", "--noheadings", "vg")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "  org  owi-a-s---\n  s    swi-a-s---\n"


def test_without_a_server_nothing_is_active_and_images_can_be_changed(tmp_path):
    with open(tmp_path / "a.img", "wb") as file:
        file.truncate(64 * MIB)
    env = {"COW_LVM_DEVICES": "a.img"}
    for line in ("vgcreate vg a.img", "lvcreate -L 8m -n org vg", "lvcreate -s -L 4m -n s vg/org"):
        done = cow(tmp_path, *line.split(), env=env)
        assert (done.returncode, done.stderr) == (0, ""), line
    done = cow(tmp_path, "lvs", "-o", "name,attr", "--noheadings", env=env)
    assert done.stdout == "  org  owi-XXs---\n  s    swi-XXs---\n"
    done = cow(tmp_path, "lvchange", "-ay", "vg/org", env=env)
    assert done.returncode == 5
    assert "cow serve" in done.stderr
    done = cow(tmp_path, "lvconvert", "--merge", "vg/s", env=env)
    assert done.stdout.splitlines()[-1] == '  Logical volume "s" successfully removed.'


def test_an_image_that_a_server_holds_is_refused_and_named(served):
    snapshot(served)
    done = cow(served.folder, "--devices", "a.img", "lvs", "--driverloaded", "n")
    assert done.returncode == 5
    assert f"a.img: in use by process {os.getpid()}" in done.stderr


def test_a_socket_that_is_named_has_to_be_served(tmp_path):
    done = cow(tmp_path, "--socket", "nowhere", "lvs")
    assert done.returncode == 1
    assert "nobody serves there" in done.stderr


def test_only_options_of_cow_stand_before_the_verb(served):
    for line in ("--nosuch lvs", "--devices", "--socket"):
        done = cow(served.folder, *line.split())
        assert (done.returncode, done.stdout) == (3, "")
        option = line.split()[0]
        assert done.stderr == (
            f"cow: lvm: {option}: not understood before the verb (see cow lvm --help)\n"
        )


def test_devices_stand_before_or_behind_the_verb(served):
    for line in ("--devices a.img pvs", "pvs --devices a.img", "--devices=a.img pvs"):
        done = cow(served.folder, *line.split(), "--noheadings", "-o", "pv_name")
        assert (done.returncode, done.stdout) == (0, "  a.img     \n")


def test_no_device_is_said_to_be_missing(tmp_path):
    done = cow(tmp_path, "lvs")
    assert done.returncode == 3
    assert "COW_LVM_DEVICES" in done.stderr


def test_help_needs_no_server_and_no_device(tmp_path):
    for line in ("help", "--help", "lvcreate --help", "help lvs", "version"):
        done = cow(tmp_path, *line.split())
        assert (done.returncode, done.stderr) == (0, ""), line
        assert done.stdout.strip()
        assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_question_is_read_from_stdin(served, tmp_path):
    served.lvm("lvcreate -L 8m -n org vg")
    (tmp_path / "answer").write_text("maybe\ny\n")
    with open(tmp_path / "answer") as answer:
        done = cow(served.folder, "lvremove", "vg/org", stdin=answer)
    assert done.returncode == 0
    assert done.stdout == '  Logical volume "org" successfully removed.\n'
    assert done.stderr.count("[y/n]: ") == 2
    assert "WARNING: Invalid input 'maybe'." in done.stderr


def test_ctrl_c_during_a_merge_says_that_it_goes_on(slow):
    environ = {**os.environ, "COW_SOCKET": slow.server.path}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cow", "lvm", "lvconvert", "--merge", "slowvg/s"],
        env={**environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert "started" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "The merge of slowvg/s into slowvg/org goes on in the background." in err
    poll(lambda: no_snapshot(slow, "slowvg"))
