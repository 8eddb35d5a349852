"""The order in which LVM commits metadata and works on dm devices: tests/data/lvm/order.txt.

Scenarios, each behind a line `== NAME`, on a VG `vg` of three disks of 128 MiB. Then

    $ COMMAND           a command line of lvm that succeeds; what it did stands below it
    ! open DEVICE       somebody has a dm device open, until `! close DEVICE`
    ! write DEVICE      200 chunks of 4 KiB, every second one, are written

And what it did:

      precommit, commit         a generation
      create NAME               load NAME [readonly] | TABLE LINE; TABLE LINE
      suspend, resume, remove NAME         rename NAME NEW

In tables the disks are pv0, pv1 and pv2. tests/kernel/record_lvm_order.py asks the real lvm2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ORDER = Path(__file__).resolve().parents[1] / "data" / "lvm" / "order.txt"
DISKS = 3
DISK_SIZE = 128 << 20
WRITTEN = 200


@dataclass
class Step:
    """One line of a scenario, and what LVM did for it."""

    text: str
    done: list[str] = field(default_factory=list)


@dataclass
class Scenario:
    """A list of steps on a fresh VG. One called `slow…` has its first disk below dm-delay."""

    name: str
    steps: list[Step] = field(default_factory=list)

    @property
    def slow(self) -> bool:
        """Whether merges take long."""
        return self.name.startswith("slow")


def read_scenarios() -> Iterator[Scenario]:
    """Yield the scenarios of the file."""
    scenario: Scenario | None = None
    for line in ORDER.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            if scenario is not None:
                yield scenario
            scenario = Scenario(line[3:])
        elif line.startswith(("$ ", "! ")):
            assert scenario is not None, line
            scenario.steps.append(Step(line))
        elif line.strip() and not line.startswith("#"):
            assert scenario is not None, line
            scenario.steps[-1].done.append(line.strip())
    if scenario is not None:
        yield scenario


def write_scenarios(scenarios: list[Scenario]) -> None:
    """Write the file anew, its comments kept."""
    lines = [line for line in ORDER.read_text().splitlines() if line.startswith("#")]
    for scenario in scenarios:
        lines += ["", f"== {scenario.name}"]
        for step in scenario.steps:
            lines += [step.text, *(f"  {line}" for line in step.done)]
    ORDER.write_text("\n".join(lines) + "\n", encoding="utf-8")
