"""What a file or device of this machine is, whatever name leads to it; no backend and no event loop needed."""

from __future__ import annotations

import os
import stat


def local_identity(status: os.stat_result) -> str:
    """Equal for two names of one file (links, bind mounts) or device (another node of it), and for nothing else."""
    if stat.S_ISBLK(status.st_mode):
        return f"device {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"file {os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"
