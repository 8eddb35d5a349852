"""What a run runs on, without anything that tells whose machine it is."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def describe() -> dict[str, str]:
    """Return the processor, memory and software, as the report names them."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    virtual = ", virtual" if "hypervisor" in fields.get("flags", "").split() else ""
    return {
        "processor": fields.get("model name", platform.machine()) + virtual,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / GIB:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "software": ", ".join(software()),
    }


def software() -> list[str]:
    """Return what takes part, each with its version: what is installed of it."""
    found = [f"Python {platform.python_version()}", f"numpy {np.__version__}"]
    for program in ("fio", "nbdkit", "qemu-nbd", "linux.uml"):
        if path := shutil.which(program):
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            line = (done.stdout or done.stderr).partition("\n")[0]
            version = next((word for word in re.split(r"[\s-]+", line) if word[:1].isdigit()), "")
            found.append(f"{program} {version}".strip())
    return found


def code_digest() -> str:
    """Return a digest of what is measured and of what measures it.

    Results with different digests are not put together.
    """
    digest = hashlib.sha256()
    patterns = ("cow/**/*.py", "cow/**/*.px[di]", "cow/**/*.pyx", "cow/**/*.h")
    patterns += ("benchmarks/conftest.py", "benchmarks/**/bench_*.py", "benchmarks/suite/*.py")
    shown = {"goals.py", "charts.py"}  # these only show
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        if path.name not in shown:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
