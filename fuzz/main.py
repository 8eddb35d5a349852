"""Run one harness under the libFuzzer inside Atheris: main.py NAME [OPTION or CORPUS]…

Each module fuzz_NAME here has a function `run(data)`; `make fuzz` runs them all. A saved input is
run again by naming it: main.py NAME FILE.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from pathlib import Path

import atheris
from atheris import core_with_libfuzzer

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz_*.py"))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(NAMES)}.")
    name = sys.argv.pop(1)
    begin = ctypes.CDLL(None).fuzz_coverage_begin  # coverage.c
    if begin(os.fsencode(core_with_libfuzzer.__file__)):
        sys.exit(f"{core_with_libfuzzer.__file__} is no libFuzzer")
    sys.path.append(str(FOLDER.parent / "tests"))
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["cow"]):
        harness = importlib.import_module(f"fuzz_{name}")
        importlib.import_module("cow").Mapper.targets()
    options = [f"-max_len={harness.MAX_LEN}", "-timeout=60", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:]], harness.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
