"""Random traces for the real kernel: steps whose answers do not depend on its timing.

A model runs along, so that the author of a trace knows what there is. A step that has no meaning
in the model, or would leave a process of the guest waiting for ever, is not written down.
Images are @b and @d for the origin, @c0 … for COW devices; tables name devices as %NAME.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from support import SECTOR, fill
from support.model import Device, Merge, Model, Nonsense, Origin, Snapshot

Step = list[Any]


@dataclass
class Program:
    """A trace without answers; `known` is how far each image is determined at the end."""

    seed: int
    images: dict[str, tuple[int, int]]
    steps: list[Step] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    def contents(self) -> dict[str, bytes]:
        """Return what each image holds before the trace."""
        return {
            name: fill(size, seed) if seed else bytes(size)
            for name, (size, seed) in self.images.items()
        }

    def parts(self) -> list[list[Step]]:
        """Return the steps between the marks where everything is removed."""
        parts: list[list[Step]] = [[]]
        for step in self.steps:
            if step == ["mark"]:
                parts.append([])
            else:
                parts[-1].append(step)
        return parts


class Guide:
    """Runs steps on a model; the words of traces on top of those of a mapper."""

    def __init__(self, program: Program) -> None:
        self.model = Model({f"@{name}": data for name, data in program.contents().items()})
        self.could_discard: dict[str, bool] = {}

    def do(self, step: Step) -> Any:
        """Run one step; raise OSError as the kernel refuses, Nonsense where it has no meaning."""
        verb, *args = step
        if verb in ("create", "reload"):
            table = args[1].replace("%", "")
            if verb == "create" and " snapshot " in table:
                self.check_quiet(table.split()[3])
            if verb == "reload":
                return self.model.load(args[0], table)
            self.model.create(args[0], table)
            self.note_limits(args[0])
            return None
        if verb == "resume":
            return self.resume(args[0])
        if verb == "rename":
            self.model.rename(*args)
            self.could_discard[args[1]] = self.could_discard.get(args[0], False)
            return None
        if verb in ("suspend", "remove", "clear"):
            return getattr(self.model, verb)(*args)
        if verb == "w":
            name, offset, length, seed = args
            if name.startswith("@"):
                return self.wipe(name, offset, fill(length, seed))
            return self.model.device(name).pwrite(fill(length, seed), offset)
        if verb == "wipe":
            return self.wipe(args[0], 0, bytes(SECTOR))
        if verb == "d":
            self.check_discard(args[0])
            return self.model.device(args[0]).discard_range(*args[1:])
        if verb == "r":
            return self.model.device(args[0]).pread(args[2], args[1])
        if verb == "mark":
            return self.model.close()
        return None

    def resume(self, name: str) -> None:
        device = self.model.devices.get(name)
        swapped = device is not None and device.inactive is not None
        try:
            self.model.resume(name)
        finally:
            if swapped:
                self.note_limits(name)

    def note_limits(self, name: str) -> None:
        """Remember whether a new table takes discards."""
        self.could_discard[name] = self.can_discard(self.model.devices[name])

    @staticmethod
    def can_discard(device: Device) -> bool:
        """Tell whether Linux 6.1 can discard: nothing that lies on zeros, or on a bad place."""
        kinds = {target.kind for each in device.below() for target in each.live or []}
        return device.can_discard() and not kinds & {"zero", "error"}

    def wipe(self, name: str, offset: int, data: bytes) -> None:
        """Write to an image itself; one that is written up to its end is known again."""
        if not name.startswith("@"):
            self.model.device(name).pwrite(data, offset)
            return
        image = self.model.images[name]
        whole, known = bytearray(image.data), image.known
        whole[offset : offset + len(data)] = data
        self.model.wipe(name, bytes(whole))
        image.known = known
        if known is not None and offset + len(data) == image.size:
            image.known = None

    def check_quiet(self, origin: str) -> None:
        """Refuse a new snapshot of an origin that runs.

        The kernel would go on to split requests by the chunks of the snapshots it had at resume.
        """
        for device in self.model.devices.values():
            for target in device.live or []:
                over = isinstance(target, Origin | Merge) and target.blocks()[0].label == origin
                if over and not device.suspended:
                    raise Nonsense("a new snapshot of a running origin")

    def check_discard(self, name: str) -> None:
        """Refuse a discard of a device where the kernel is not to be followed.

        Only later ones can discard a zero target, or one with errors; and a target can discard
        where all that lies below it can. Whether it can is found out when its table goes live: a
        table below that is swapped later is not noticed.
        """
        device = self.model.device(name)
        if device.can_discard() != self.can_discard(device):
            raise Nonsense("a discard of what newer kernels discard")
        if device.can_discard() != self.could_discard[name]:
            raise Nonsense("a discard of what could, or could not, discard when it went live")

    def states(self) -> list[str]:
        """Return which snapshots are invalid or full, to see that a step ends one."""
        return [
            f"{target.device.label} {line.isalpha()}"
            for target in self.snapshots()
            for line in [target.status()]
        ]

    def snapshots(self) -> list[Snapshot]:
        """Return the live snapshot targets, those of merges included."""
        return [
            target
            for device in self.model.devices.values()
            for target in device.live or []
            if isinstance(target, Snapshot)
        ]

    def merges(self, name: str) -> bool:
        """Tell whether a device merges something; whoever resumes it waits for the end."""
        device = self.model.devices.get(name)
        return device is not None and any(isinstance(t, Merge) for t in device.live or [])


def sensible(program: Program, steps: list[Step]) -> list[Step] | None:
    """Return what is left of a program with a wait for each merge; None if it has no meaning."""
    guide = Guide(program)
    kept: list[Step] = []
    for step in steps:
        if step[0] == "waitmerge":
            continue
        kept.append(step)
        try:
            guide.do(step)
        except Nonsense:
            return None
        except OSError:
            continue
        if step[0] in ("create", "resume") and guide.merges(step[1]):
            kept.append(["waitmerge", step[1]])
    return kept
