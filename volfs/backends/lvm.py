"""LVM by its own commands: which logical volumes there are, and which are active.

`lvs` tells of volumes without opening or activating one. Everything is asked of the commands, nothing is guessed from
/dev: the node of an inactive volume is not there. Names and paths follow lvm(8); device-mapper doubles the dashes of
each name and joins them by one.

Concurrency: any task may call. Commands run in threads; one that only looks is left alone when its caller goes, one
that changes something is waited for (`timeout` seconds at most), so that the caller knows what to undo.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from volfs.backends.base import deadline
from volfs.errors import BackendError, VolumeNotFound

FIELDS = (
    "vg_name,lv_name,lv_uuid,lv_size,lv_attr,lv_path,origin,origin_size,pool_lv,data_percent,lv_layout,lv_time"
    ",vg_extent_size"
)
# Left to itself LVM looks where each link below /dev leads. os-brick puts links to paths of ours there
# (os_brick.utils.CUSTOM_LINK_PREFIX): LVM would wait for us, as we for LVM. udev knows all disks, and no link that
# it did not make.
CONFIG = 'devices { obtain_device_list_from_udev = 1 } report { time_format = "%s" }'
DIRECTORIES = ("/usr/sbin", "/sbin")  # where the commands are, which are not in everybody's PATH
# What lvm's messages mean, the first that fits; its exit code is 5 for all of them.
ERRORS = (
    (r"not found|failed to find|cannot find|invalid characters", errno.ENOENT),
    (r"in use|is used by|open count|device or resource busy", errno.EBUSY),
    (r"insufficient free space|not enough free|out of space", errno.ENOSPC),
    (r"permission denied", errno.EACCES),
    (r"read-only", errno.EROFS),
)


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """One as `lvs` tells of it. Sizes in bytes."""

    group: str
    name: str
    uuid: str
    size: int
    attributes: str  # lv_attr, see lvs(8)
    path: str  # /dev/GROUP/NAME, there or not
    origin: str
    pool: str
    data_percent: float | None
    layout: frozenset[str]
    created: int  # seconds since the epoch; 0 when unknown
    extent_size: int

    @property
    def full_name(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def is_volume(self) -> bool:
        """Whether it holds somebody's data: neither a pool nor a part of another one."""
        return "pool" not in self.layout and self.path != ""

    @property
    def active(self) -> bool:
        return self.attributes[4:5] not in ("-", "")

    @property
    def writable(self) -> bool:
        return self.attributes[1:2] == "w"

    @property
    def unit(self) -> str:
        """The full name of what is activated with it: a snapshot of the old kind is so with its origin alone."""
        return f"{self.group}/{self.origin}" if self.is_copy_on_write else self.full_name

    @property
    def is_copy_on_write(self) -> bool:
        """A snapshot of the old kind, with a space of its own for what was changed since."""
        return self.attributes[:1] in ("s", "S")

    @property
    def allocated(self) -> int | None:
        """Of a thin volume, as far as that is known, which it is of active ones."""
        if not self.pool or self.data_percent is None:
            return None
        return min(self.size, round(self.size * self.data_percent / 100))


async def logical_volumes(name: str, timeout: float) -> list[LogicalVolume]:
    """All that lvs shows of a volume group (`vg0`), or a volume (`vg0/disk`). VolumeNotFound, BackendError."""
    output = ("--reportformat", "json", "--units", "b", "--nosuffix")
    told = await run(["lvs", *output, "-o", FIELDS, "--", name], timeout, changes=False)
    try:
        report = msgspec.json.decode(told)["report"]
        return [_parse(row) for part in report for row in part["lv"]]
    except (msgspec.DecodeError, LookupError, TypeError, ValueError) as exc:
        raise BackendError(f"lvs: not the report that was asked for: {exc}", errno.EPROTO) from exc


async def logical_volume(name: str, timeout: float) -> LogicalVolume:
    """The one of a full name. VolumeNotFound when there is none, or when it is no volume."""
    for found in await logical_volumes(name, timeout):
        if found.is_volume:
            return found
    raise VolumeNotFound(f"{name}: no such logical volume")


async def activate(name: str, timeout: float) -> None:
    # -K: thin snapshots are made to be left out of activation unless somebody asks for one of them, as we do.
    await run(["lvchange", "--yes", "--activate", "y", "--ignoreactivationskip", "--", name], timeout)


async def deactivate(name: str, timeout: float) -> None:
    """BackendError with EBUSY while somebody has it open."""
    await run(["lvchange", "--yes", "--activate", "n", "--", name], timeout)


async def resize(name: str, size: int, timeout: float) -> None:
    await run(["lvresize", "--yes", "--force", "--size", f"{size}b", "--", name], timeout)


def full_name_of(path: str) -> str | None:
    """The full name of the logical volume that a path would be of, if it is one of LVM's paths; None if not."""
    directory, name = os.path.split(path)
    if directory == "/dev/mapper":
        return mapped_name(name)
    top, group = os.path.split(directory)
    return f"{group}/{name}" if top == "/dev" and is_group_name(group) else None


def is_group_name(name: str) -> bool:
    """Whether a volume group may be called so, see lvm(8)."""
    return bool(re.fullmatch(r"[a-zA-Z0-9+_.][a-zA-Z0-9+_.-]*", name)) and name not in (".", "..")


def mapped_name(name: str) -> str | None:
    """The full name in a name of device-mapper's: `vg--a-disk` is that of vg-a/disk."""
    parts = re.fullmatch(r"((?:[^-]|--)+)-((?:[^-]|--)+)", name)
    return f"{parts[1]}/{parts[2]}".replace("--", "-") if parts else None


def is_installed() -> bool:
    return _path_of("lvs") is not None


async def run(command: list[str], timeout: float, *, changes: bool = True) -> bytes:
    """What a command of lvm's prints. VolumeNotFound and BackendError with its own words; BackendTimeout."""
    doing = " ".join(command[:1] + command[-1:])
    with trio.CancelScope(shield=changes), deadline(timeout, doing):
        done = await trio.to_thread.run_sync(_run, command, abandon_on_cancel=True, limiter=_LIMITER)
    if done.returncode:
        raise _error(command[0], done.stderr.decode(errors="replace"))
    return done.stdout


# Of all backends together: lvm itself lets but one after the other change something.
_LIMITER = trio.CapacityLimiter(8)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    path = _path_of(command[0])
    if path is None:
        raise BackendError(f"{command[0]} is not installed (apt install lvm2)", errno.EOPNOTSUPP)
    environment = {**os.environ, "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
    try:
        # A session of its own: Ctrl-C is for us, and ends no lvchange half-way.
        return subprocess.run(
            [path, "--config", CONFIG, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            env=environment,
            start_new_session=True,
        )
    except OSError as exc:
        raise BackendError(f"{path}: {exc.strerror}", exc.errno) from exc


def _path_of(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", ""), *DIRECTORIES)))


def _error(program: str, said: str) -> BackendError | VolumeNotFound:
    """The first line that is no warning: those after it repeat it in other words."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith("WARNING")] or lines or ["failed"]
    told = "\n".join(errors)
    number = next((number for words, number in ERRORS if re.search(words, told, re.IGNORECASE)), errno.EIO)
    if number == errno.ENOENT:
        return VolumeNotFound(f"{program}: {errors[0]}")
    return BackendError(f"{program}: {errors[0]}", number)


def _parse(row: dict[str, Any]) -> LogicalVolume:
    # Of a snapshot of the old kind lv_size is that of its space for changes.
    snapshot = row["lv_attr"][:1] in ("s", "S")
    return LogicalVolume(
        group=row["vg_name"],
        name=row["lv_name"],
        uuid=row["lv_uuid"],
        size=int(row["origin_size"] if snapshot else row["lv_size"]),
        attributes=row["lv_attr"],
        path=row["lv_path"],
        origin=row["origin"],
        pool=row["pool_lv"],
        data_percent=float(row["data_percent"]) if row["data_percent"] else None,
        layout=frozenset(row["lv_layout"].split(",")),
        created=int(row["lv_time"]) if row["lv_time"].isdecimal() else 0,
        extent_size=int(row["vg_extent_size"]),
    )
