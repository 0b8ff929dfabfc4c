"""What a file or device of this machine is, whatever name leads to it; no backend and no event loop needed."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def local_identity(status: os.stat_result) -> str:
    """Equal for two names of one file (links, bind mounts) or device (another node of it), and for nothing else.

    A logical volume's stays when it is deactivated and gets another device the next time.
    """
    if stat.S_ISBLK(status.st_mode):
        logical_volume = logical_volume_uuid(status)
        if logical_volume:
            return logical_volume_identity(logical_volume)
        return f"device {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"file {os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"


def logical_volume_uuid(status: os.stat_result) -> str | None:
    """LVM's UUID, without dashes, of the logical volume that a block device is; None when it is none.

    As device-mapper has it: "LVM-", that of the volume group, that of the volume, and a suffix for what is hidden.
    """
    try:
        uuid = sys_directory(status).joinpath("dm/uuid").read_text().strip()
    except OSError:  # no device of device-mapper's
        return None
    return uuid[36:] if uuid.startswith("LVM-") and len(uuid) == 68 else None


def logical_volume_identity(uuid: str) -> str:
    """By LVM's UUID, with or without dashes."""
    return f"logical volume {uuid.replace('-', '')}"


def sys_directory(status: os.stat_result) -> Path:
    """What the kernel tells of a block device."""
    return Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
