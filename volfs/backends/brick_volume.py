"""A volume that os-brick has connected, as an open volume: opened, counted, and disconnected at the last close."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from volfs.backends import brick_connection
from volfs.backends.base import BackendVolume, Extent, Properties
from volfs.backends.block_device import open_device
from volfs.backends.brick_connection import Connection
from volfs.backends.brick_target import Target
from volfs.backends.local import device_properties, local_errors
from volfs.backends.raw_file import FileVolume, open_file
from volfs.errors import BackendError, VolfsError

log = logging.getLogger(__name__)


@dataclass
class _Shared:
    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0  # who have the connection, and who wait for it
    connection: Connection | None = None


class Connections:
    """The connections of one backend: one for each volume, however many have it open. Any task may call."""

    def __init__(self, threads: trio.CapacityLimiter) -> None:
        self._threads = threads
        self._shared: dict[Hashable, _Shared] = {}

    async def acquire(self, target: Target) -> Connection:
        """The volume's connection, made now if there is none. The caller owes one `release`."""
        shared = self._shared.setdefault(target.key, _Shared())
        shared.users += 1
        try:
            async with shared.lock:
                if shared.connection is None:
                    shared.connection = await brick_connection.connect(target, self._threads)
                return shared.connection
        except BaseException:
            self._leave(target, shared)
            raise

    async def release(self, connection: Connection) -> None:
        """Give it back; the last one disconnects. Errors and waits as brick_connection.disconnect."""
        shared = self._shared[connection.target.key]
        with trio.CancelScope(shield=True):
            async with shared.lock:
                try:
                    if shared.users == 1:
                        shared.connection = None
                        await brick_connection.disconnect(connection, self._threads)
                finally:
                    self._leave(connection.target, shared)

    async def extend(self, connection: Connection) -> None:
        await brick_connection.extend(connection, self._threads)

    def _leave(self, target: Target, shared: _Shared) -> None:
        shared.users -= 1
        if not shared.users:
            del self._shared[target.key]

    @asynccontextmanager
    async def connected(self, target: Target) -> AsyncIterator[Connection]:
        """For a look: connected inside the block."""
        connection = await self.acquire(target)
        try:
            yield connection
        finally:
            await self.release(connection)


class ConnectedVolume(BackendVolume):
    """The volume of a connection: what it is made of moves the bytes. Owns both."""

    def __init__(
        self,
        volume: BackendVolume,
        connection: Connection,
        connections: Connections,
        resized: Callable[[int], object],
    ) -> None:
        self._volume = volume
        self._resized = resized
        self._connection = connection
        self._connections = connections
        self._closed = False

    @property
    def properties(self) -> Properties:  # type: ignore[override]
        return self._volume.properties

    async def pread(self, offset: int, length: int) -> bytes:
        return await self._volume.pread(offset, length)

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        await self._volume.pwrite(offset, data)

    def start_read(self, offset: int, length: int, sink: object) -> bool:
        return self._volume.start_read(offset, length, sink)

    def start_write(self, offset: int, data: memoryview) -> bool:
        return self._volume.start_write(offset, data)

    def expire(self) -> None:
        self._volume.expire()

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        return await self._volume.extents(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self._volume.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self._volume.write_zeroes(offset, length)

    async def flush(self) -> None:
        await self._volume.flush()

    async def refresh(self) -> Properties:
        """The kernel asks a disk for its size only when told to."""
        if not isinstance(self._volume, FileVolume):
            try:
                await self._connections.extend(self._connection)
            except VolfsError as exc:
                # As with one of several paths down. The volume works all the same, with the size that is known.
                log.warning("%s", exc)
        properties = await self._volume.refresh()
        self._resized(properties.size)
        return properties

    async def resize(self, size: int) -> None:
        await self._volume.resize(size)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._volume.aclose()
        except VolfsError:
            # This is the error that matters: it tells of data.
            try:
                await self._connections.release(self._connection)
            except VolfsError as exc:
                log.error("%s", exc)
            raise
        except BaseException:
            await self._connections.release(self._connection)
            raise
        await self._connections.release(self._connection)


async def open_connected(
    connections: Connections,
    target: Target,
    *,
    writable: bool,
    request_timeout: float,
    threads: trio.CapacityLimiter,
    resized: Callable[[int], object] = lambda size: None,
) -> ConnectedVolume:
    """Connect the volume and open it. Nothing is left when that fails. `resized` is told the size at each refresh."""
    connection = await connections.acquire(target)
    try:
        # Asked beforehand: the kernel would say EACCES.
        if writable and not (await look(connection.path, target.name, threads)).writable:
            raise BackendError(f"{target.name}: read-only", errno.EROFS)
        volume = await _open_path(
            connection.path, target.name, writable=writable, timeout=request_timeout, threads=threads
        )
    except BaseException:
        await connections.release(connection)
        raise
    return ConnectedVolume(volume, connection, connections, resized)


async def look(path: str, name: str, threads: trio.CapacityLimiter) -> Properties:
    """The size of a connected volume, and whether it may be written, without opening it. VolumeNotFound."""
    with local_errors("stat", f"{name}: {path}"):
        return await trio.to_thread.run_sync(_look, path, limiter=threads)


def _look(path: str) -> Properties:
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode):
        return Properties(status.st_size, block_size=1, writable=True)
    if not stat.S_ISBLK(status.st_mode):
        raise OSError(errno.ENOTBLK, "neither a block device nor a regular file")
    return device_properties(status)


async def _open_path(
    path: str, name: str, *, writable: bool, timeout: float, threads: trio.CapacityLimiter
) -> BackendVolume:
    real, is_file = await trio.to_thread.run_sync(_resolve, path, limiter=threads)
    if is_file:
        return await open_file(real, name, writable=writable, can_resize=False, threads=threads)
    return await open_device(real, name=name, writable=writable, timeout=timeout)


def _resolve(path: str) -> tuple[str, bool]:
    """The path without links, which os-brick often gives, and whether it is a regular file's."""
    real = os.path.realpath(path)
    return real, os.path.isfile(real)
