"""Boot the kernel of User Mode Linux, give it images as disks, and have it run traces."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import fill

HERE = Path(__file__).parent
KERNEL = "linux.uml"
MEMORY = 512 << 20
NEEDED = (KERNEL, "e2fsck", "mke2fs", "mkfs.xfs", "xfs_repair")
PATIENCE = 300.0  # seconds: a busy machine is slow, a hang is rare
LAST_WORDS = 5.0  # seconds for what a guest that hangs can still say of itself
DEATH = 30.0  # seconds for a killed process to be gone
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
PYTHON = os.path.realpath("/proc/self/exe")
"""Itself: `sys.executable` may be a script that loads a sanitizer."""

Step = list[Any]


class KernelError(AssertionError):
    """The guest did not do what every guest does; the text holds the end of its console."""


def missing() -> str:
    """Return why no kernel can run here; empty if one can."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    lacking = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if lacking:
        return f"not installed: {' '.join(lacking)} (tools/setup test installs them)"
    if os.uname().machine != "x86_64":
        return f"no User Mode Linux for {os.uname().machine}"
    if scratch_place() is None:
        return "no folder that is writable, may hold code and has 1 GiB free"
    return ""


def scratch_place() -> str | None:
    """Return a folder for images and the guest's memory: it must allow executable mappings."""
    for place in ("/dev/shm", tempfile.gettempdir(), "/var/tmp"):
        if os.access(place, os.W_OK):
            stat = os.statvfs(place)
            if not stat.f_flag & os.ST_NOEXEC and stat.f_bavail * stat.f_frsize > 2 * MEMORY:
                return place
    return None


@contextlib.contextmanager
def scratch():
    """A folder for everything that a test and its guest write; it is gone afterwards."""
    place = scratch_place()
    assert place is not None
    folder = Path(tempfile.mkdtemp(prefix="cow-kernel-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def preload(folder: Path) -> dict[str, str]:
    """Return the environment with which the kernel starts on this processor; see wide_xstate.c."""
    if "amx_tile" not in Path("/proc/cpuinfo").read_text():
        return {}
    library = folder / "wide_xstate.so"
    if not library.exists():
        source = str(HERE / "wide_xstate.c")
        command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), source, "-ldl"]
        subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library)}


class Kernel:
    """A running kernel. `folder` is the scratch folder that it shares with the host.

    It has `memory` bytes of memory, whole MiB.
    """

    def __init__(self, folder: Path, memory: int = MEMORY) -> None:
        self.folder = folder
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.console: list[str] = []
        self.jobs = 0
        self.plugged: dict[int, Path] = {}
        self.home = Path(tempfile.mkdtemp(prefix="uml-", dir=folder))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.home / "host"))
        self.failed = False
        self.asked: int | None = None
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LD_")}
        self.process = subprocess.Popen(
            [
                KERNEL,
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                f"mem={memory >> 20}M",
                "quiet",
                "umid=k",
                f"uml_dir={self.home}/",
                "con=null",
                "con0=fd:0,fd:1",
                "ssl=null",
                f"init={PYTHON}",
                "--",
                "-I",
                "-S",
                str(HERE / "guest.py"),
                str(folder),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | {"TMPDIR": str(self.home)} | preload(folder),
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.listen, daemon=True)
        self.reader.start()
        try:
            self.release = self.hear("@ready").split()[1]
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the console

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").strip()
            if text.startswith("@"):
                self.lines.put(text)
            else:
                self.console.append(text)
        self.lines.put(None)

    def hear(self, word: str, seconds: float = PATIENCE) -> str:
        """Return the next line of the agent that begins with `word`; KernelError if none comes."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                raise self.error(f"no {word} within {seconds} s; {self.doing()}") from None
            if line is None:
                raise self.error(f"ended before {word}")
            if line.startswith(word):
                return line

    def heard(self) -> list[str]:
        """Return the lines of the agent that nobody waited for, after the plug was pulled."""
        assert not self.reader.is_alive(), "the plug is not pulled"
        return [line for line in iter(self.lines.get, None) if line is not None]

    def doing(self) -> str:
        """Tell what a guest that hangs does; if it still hears, the console gets what waits in it.

        That is what blocks without end; to print all tasks would end this kernel.
        """
        self.asked = len(self.console)
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        end = time.monotonic() + LAST_WORDS
        with contextlib.suppress(KernelError):
            for key in "7w4":  # print everything, what waits, and little again
                self.monitor(f"sysrq {key}", LAST_WORDS)
            while "set to 4" not in "".join(self.console[self.asked :]) and time.monotonic() < end:
                time.sleep(0.01)
        return f"its process is in state {stat.rpartition(') ')[2][0]}"

    def error(self, text: str) -> KernelError:
        self.failed = True
        lines = (
            self.console[-40:] if self.asked is None else self.console[max(0, self.asked - 40) :]
        )
        console = [line for line in lines if "] ? " not in line]  # of a stack, what is sure
        return KernelError("\n    ".join([f"the guest: {text}; its console:", *console]))

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{text}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.error(f"ended before {text}") from None

    # disks

    def monitor(self, command: str, seconds: float = PATIENCE) -> None:
        """Send a command to UML's management console, and see that it was done."""
        text = command.encode()
        packet = struct.pack("<III", 0xCAFEBABE, 2, len(text)) + text.ljust(512, b"\0")
        self.socket.settimeout(seconds)
        try:
            self.socket.sendto(packet, str(self.home / "k" / "mconsole"))
            answer = self.socket.recv(4096)
        except OSError as error:
            raise self.error(f"{command}: {error}") from error
        failed, _, length = struct.unpack_from("<III", answer)
        if failed:
            raise self.error(f"{command}: {answer[12 : 12 + length].decode()}")

    def plug(self, images: Sequence[Path]) -> None:
        """Make the disks of the guest, from the second on, be these images and no others."""
        wanted = dict(enumerate(images, 1))
        for slot in list(self.plugged):
            self.monitor(f"remove ubd{chr(ord('a') + slot)}")
            del self.plugged[slot]
        for slot, image in wanted.items():
            self.monitor(f"config ubd{chr(ord('a') + slot)}={image}")
            self.plugged[slot] = image

    # jobs

    def start(
        self, images: dict[str, Path] | None, steps: Sequence[Step], clean: bool = True
    ) -> str:
        """Start a job: steps on these images (None: those of the job before), and return its name.

        Steps are those of the recorded traces. Afterwards all devices are removed, if `clean`.
        """
        if self.failed:
            raise self.error("does no more jobs, it failed before")
        self.jobs += 1
        name = f"job{self.jobs}"
        job: dict[str, Any] = {"clean": clean}
        if images is not None:
            self.plug(list(images.values()))
            job["slots"] = {image: slot for slot, image in enumerate(images, 1)}
        data = bytearray()

        def placed(step: Step) -> Step:
            if step[0] == "w":
                return [*step[:4], put(step[3], step[4])]
            if step[0] == "work":
                return ["work", [[*write[:3], put(write[2], write[3])] for write in step[1]]]
            return step

        def put(length: int, seed: int | bytes) -> int:
            data.extend(fill(length, seed) if isinstance(seed, int) else seed)
            return len(data) - length

        job["steps"] = [placed(list(step)) for step in steps]
        (self.folder / f"{name}.json").write_text(json.dumps(job))
        (self.folder / f"{name}.data").write_bytes(data)
        self.say(name)
        return name

    def finish(self, name: str, seconds: float = PATIENCE) -> list[Any]:
        """Wait until a job is done, and return its answers."""
        self.hear(f"@done {name}", seconds)
        answer = self.folder / f"{name}.answer"
        answers = json.loads(answer.read_text())
        for suffix in ("json", "data", "answer"):
            (self.folder / f"{name}.{suffix}").unlink()
        if answers[:1] == ["broken"]:
            raise self.error(answers[1])
        return answers

    def run(
        self,
        images: dict[str, Path] | None,
        steps: Sequence[Step],
        *,
        clean: bool = True,
        seconds: float = PATIENCE,
    ) -> list[Any]:
        """Run steps on images and return the answers."""
        return self.finish(self.start(images, steps, clean), seconds)

    # the end

    def kill(self) -> None:
        """Pull the plug."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEATH)
        self.reader.join(DEATH)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.socket.close()
        shutil.rmtree(self.home)

    def close(self) -> None:
        """Shut the guest down, or kill it where that takes too long."""
        if self.process.poll() is None and not self.failed:
            with contextlib.suppress(KernelError):
                self.say("quit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        if self.socket.fileno() >= 0:
            self.kill()
