"""Memory that has been in use: what a race writes to must cost all who take part the same.

A virtual machine may give free memory back to its host and get it again, page by page, when it is
touched: a page can cost ten times as much then, and whoever comes first pays for it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from suite.scale import MIB


def use_memory(folder: Path, size: int) -> None:
    """Have `size` bytes in use for a moment, by a file in a folder in memory.

    What was freed last is handed out first. Half of what there is room for is used at most.
    """
    zeros = bytes(MIB)
    with tempfile.TemporaryFile(dir=folder) as file:
        # Written, as reserving does not touch the pages.
        for _ in range(min(size, shutil.disk_usage(folder).free // 2) // MIB):
            file.write(zeros)
