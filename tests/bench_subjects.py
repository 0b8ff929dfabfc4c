"""What scripts/bench measures: volfs and its peers, each showing a volume of its own as a file.

A subject is a context manager that yields the file's path and takes everything down again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mounts import is_mounted, mounted, wait_until
from services import Image, Lun, Services
from volumes import ceph_environment

START_SECONDS = 30.0
STOP_SECONDS = 30.0

Volume = Image | Lun
Subject = Callable[[Services, Volume, Path], contextlib.AbstractContextManager[Path]]


@contextlib.contextmanager
def volfs(services: Services, volume: Volume, directory: Path) -> Iterator[Path]:
    """`volfs mount` of the pool or portal, as it comes."""
    prefix = f"rbd:{volume.pool}" if isinstance(volume, Image) else f"iscsi://{volume.portal}"
    with mounted(directory, [prefix], env=ceph_environment(services)) as mount:
        yield mount.path.joinpath(*place(volume))


def place(volume: Volume) -> tuple[str, ...]:
    """Where a mount of volfs shows it."""
    if isinstance(volume, Image):
        return "rbd", volume.pool, volume.name
    return "iscsi", volume.iqn, str(volume.number)


@contextlib.contextmanager
def rbd_fuse(services: Services, volume: Volume, directory: Path) -> Iterator[Path]:
    """Ceph's own; it shows RBD images only."""
    assert isinstance(volume, Image)
    path = directory / "mnt"
    path.mkdir()
    command = ["rbd-fuse", "-f", "-c", services.ceph_conf, "-p", volume.pool, "-r", volume.name, path]
    with _running(command, services.environment, directory / "log", path / volume.name, mountpoint=path):
        yield path / volume.name


@contextlib.contextmanager
def nbdfuse(services: Services, volume: Volume, directory: Path) -> Iterator[Path]:
    """nbdfuse over a Unix socket to qemu-nbd."""
    path, socket = directory / "mnt", directory / "nbd"
    path.mkdir()
    serve = ["qemu-nbd", "-k", socket, "-f", "raw", "--persistent", "-e", "16", qemu_url(services, volume)]
    show = ["nbdfuse", path / "volume", "--unix", socket]
    with (
        _running(serve, services.environment, directory / "qemu-nbd.log", socket),
        _running(show, services.environment, directory / "log", path / "volume", mountpoint=path),
    ):
        yield path / "volume"


@contextlib.contextmanager
def qemu_storage_daemon(services: Services, volume: Volume, directory: Path) -> Iterator[Path]:
    """Its FUSE export, which is mounted on a file."""
    path = directory / "volume"
    path.touch()
    if isinstance(volume, Image):
        node = f"rbd,pool={volume.pool},image={volume.name},conf={services.ceph_conf}"
    else:
        node = f"iscsi,transport=tcp,portal={volume.portal},target={volume.iqn},lun={volume.number}"
    command: list[str | Path] = ["qemu-storage-daemon", "--blockdev", f"driver={node},node-name=volume"]
    command += ["--export", f"type=fuse,id=export,node-name=volume,mountpoint={path},writable=on"]
    with _running(command, services.environment, directory / "log", None, mountpoint=path):
        yield path


def qemu_url(services: Services, volume: Volume) -> str:
    """As the block drivers of QEMU take it."""
    if isinstance(volume, Image):
        return f"rbd:{volume.pool}/{volume.name}:conf={services.ceph_conf}"
    return volume.url


PEERS: Mapping[str, Mapping[str, Subject]] = {
    "rbd": {
        "rbd-fuse": rbd_fuse,
        "nbdfuse+qemu-nbd": nbdfuse,
        "qemu-storage-daemon": qemu_storage_daemon,
    },
    "iscsi": {"nbdfuse+qemu-nbd": nbdfuse, "qemu-storage-daemon": qemu_storage_daemon},
}
PROGRAMS = ("fio", "dd", "rbd-fuse", "nbdfuse", "qemu-nbd", "qemu-storage-daemon")


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if not shutil.which(program)]


@contextlib.contextmanager
def _running(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    log_path: Path,
    appears: Path | None,
    *,
    mountpoint: Path | None = None,
) -> Iterator[None]:
    """A daemon in the foreground, from when its file is there, and is mounted, until it is told to end."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ready() -> bool:
        ended = process.poll()
        assert ended is None, f"{command[0]} ended with {ended}: {log_path.read_text().strip()}"
        return (mountpoint is None or is_mounted(mountpoint)) and (appears is None or appears.exists())

    try:
        wait_until(ready, f"{command[0]} serves", START_SECONDS)
        yield
    finally:
        if mountpoint is not None and is_mounted(mountpoint):
            subprocess.run(["fusermount3", "-u", mountpoint], check=False, env={**os.environ, "LC_ALL": "C"})
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
