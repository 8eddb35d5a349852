"""Describe the one extension module; everything else is in pyproject.toml.

COW_BUILD picks a profile: release (the default), debug, coverage, asan, tsan or fuzz.
"""

import os
from glob import glob

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wno-unused-parameter"]
# Not an error: the C of a try inside an except clause shadows a variable of Cython's own.
WARNINGS += ["-Wshadow", "-Wno-error=shadow"]
TRACEABLE = ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

# Profile -> (compile flags, link flags). Python adds -DNDEBUG by itself; -UNDEBUG arms c_assert.
PROFILES = {
    "release": (["-O3"], []),
    "debug": (["-O0", "-g3", "-UNDEBUG", "-Werror", *WARNINGS], []),
    "coverage": (["-O0", "-DCYTHON_TRACE_NOGIL=1", "-DCYTHON_USE_SYS_MONITORING=0"], []),
    "asan": ([*TRACEABLE, *ADDRESS], ADDRESS),
    "tsan": ([*TRACEABLE, "-fsanitize=thread"], ["-fsanitize=thread"]),
    # For fuzz/main.py, with the functions of fuzz/coverage.c.
    "fuzz": ([*TRACEABLE, *ADDRESS, "-fsanitize-coverage=trace-pc,trace-cmp"], ADDRESS),
}

profile = os.environ.get("COW_BUILD") or "release"
if profile not in PROFILES:
    raise SystemExit(f"COW_BUILD={profile}: not one of {', '.join(PROFILES)}")
compile_flags, link_flags = PROFILES[profile]
checked = profile in ("debug", "asan", "tsan", "fuzz")
traced = profile == "coverage"

core = Extension(
    "cow._core",
    ["cow/_core.pyx"],
    depends=sorted(glob("cow/core/*.pxi") + glob("cow/core/*.h")),
    include_dirs=["cow/core"],
    extra_compile_args=["-pthread", *compile_flags],
    extra_link_args=["-pthread", *link_flags],
)

Options.warning_errors = profile == "debug"

setup(
    ext_modules=cythonize(
        [core],
        # Cython.Coverage finds _core.pyx only through a _core.c lying beside it.
        build_dir=None if traced else f"build/{profile}",
        compiler_directives={
            "language_level": 3,
            "freethreading_compatible": True,
            "boundscheck": checked,
            "initializedcheck": checked,
            "wraparound": False,
            "cdivision": True,
            "auto_pickle": False,
            "autotestdict": False,
            "linetrace": traced,
            "warn.unused": True,
        },
        emit_linenums=checked,
        annotate=profile == "debug",
    ),
)
