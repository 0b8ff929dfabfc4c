"""One open RBD image: bytes through librbd's asynchronous calls, no thread of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from volfs.backends import rbd_header
from volfs.backends.base import BackendVolume, Extent, Properties
from volfs.backends.rbd_cluster import Cluster, rados_error
from volfs.backends.rbd_extents import image_extents
from volfs.backends.rbd_writes import UnconfirmedWrites
from volfs.backends.rbd_zeroes import in_parallel, stripe_period, zero_steps
from volfs.errors import BackendError, VolumeNotFound

SECTOR = 512  # librbd takes any offset and length; this is the block size its clients show


async def open_image(
    cluster: Cluster, *, pool: str, namespace: str, image: str, snapshot: str, writable: bool
) -> RbdImage:
    """Open an image. Read-only opens leave no watcher on it, so other clients may remove or resize it."""
    opened = RbdImage(cluster, pool, namespace, image, snapshot, writable)
    await opened.open()
    return opened


class RbdImage(BackendVolume):
    """Owns the image and its ioctx. librbd orders nothing between requests under way; the kernel does above us."""

    def __init__(
        self, cluster: Cluster, pool: str, namespace: str, image: str, snapshot: str, writable: bool
    ) -> None:
        self._cluster = cluster
        self._pool, self._namespace, self._name, self._snapshot = pool, namespace, image, snapshot
        self._writable = writable
        self._url = (
            f"rbd:{pool}/{namespace + '/' if namespace else ''}{image}{'@' + snapshot if snapshot else ''}"
        )
        self._ioctx: Any = None
        self._image: Any = None
        self._held = False  # the connection, by us
        self._dirty = False
        self._period: int | None = None
        self._refreshing = trio.Lock()
        self._writes: UnconfirmedWrites

    async def open(self) -> None:
        self._cluster.hold()
        self._held = True
        try:
            self._ioctx = await self._cluster.open_pool(self._pool, self._namespace)
            self._use(await self._open_image())
            self.properties = self._read_properties(await self._size())
        except BaseException:
            await self.aclose()
            raise

    async def pread(self, offset: int, length: int) -> bytes:
        await self._writes.apart(offset, length)
        image = self._image
        data: bytes = await self._aio("read", lambda done: image.aio_read(offset, length, done))
        if len(data) != length:
            raise BackendError(f"{self._url}: short read at {offset}: the image was shrunk", errno.EIO)
        return data

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        """Returns before the cluster has answered; if that is an error, the next write and the next flush raise it.

        The write only once: a program that tries again when the cluster is well, without a flush, would never get on.
        """
        self.check_writable(self._url)
        self._dirty = True
        requests = self._writes.requests
        self._raise_failure(requests.take_untold())
        await self._writes.room(offset, len(data))
        try:
            requests.write(offset, data)
        except OSError as exc:
            self._raise_failure(exc.errno or errno.EIO)

    def start_read(self, offset: int, length: int, sink: object) -> bool:
        if self._writes.overlaps(offset, length):
            return False
        self._writes.requests.read(offset, length, sink)
        return True

    def start_write(self, offset: int, data: memoryview) -> bool:
        requests = self._writes.requests
        if not self._writable or requests.untold or not self._writes.room_now(offset, len(data)):
            return False
        self._dirty = True
        requests.write(offset, data)
        return True

    def expire(self) -> None:
        self._writes.requests.expire(self._cluster.timeout)

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        await self._writes.settle()  # librbd asks the storage, which may not have them yet
        async with self._refreshing:  # which may close the image, beneath a thread
            image, ioctx = self._image, self._ioctx
            with self._requests():
                return await self._cluster.run(
                    lambda: image_extents(image, ioctx, self._snapshot, offset, length),
                    doing=f"{self._url}: extents",
                )

    async def discard(self, offset: int, length: int) -> None:
        """As `write_zeroes`: librbd's own discard leaves alone what is not aligned to rbd_discard_granularity_bytes."""
        await self.write_zeroes(offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Removes whole objects instead of writing them, so that even terabytes do not take for ever."""
        self.check_writable(self._url)
        self._dirty = True
        image = self._image
        await self._writes.settle()
        if self._period is None:  # which an image keeps for life
            self._period = await self._cluster.run(
                lambda: stripe_period(image), doing=f"{self._url}: write zeroes"
            )
        await in_parallel(
            zero_steps(offset, length, self._period),
            lambda at, size: self._aio("write zeroes", lambda done: image.aio_write_zeroes(at, size, done)),
        )

    async def flush(self) -> None:
        await self._flush(self._image, self._writes)

    async def refresh(self) -> Properties:
        async with self._refreshing:  # one may reopen the image, which the others then ask
            size = await self._size()
            if size != self.properties.size:
                if not self._writable and not self._snapshot:
                    await self._reopen()
                self.properties = self._read_properties(size)
            return self.properties

    async def resize(self, size: int) -> None:
        image = self._image
        await self._writes.settle()
        await self._cluster.run(lambda: image.resize(size), doing=f"{self._url}: resize")
        self.properties = self._read_properties(size)

    async def describe(self) -> dict[str, str]:
        """What only an open image tells: object size, parent, and who else has it open or locked."""
        image = self._image

        def ask() -> dict[str, str]:
            import rbd

            # Not lock_get_owners: that one is refused to images opened read-only.
            locks: Any = image.list_lockers()
            lockers = locks["lockers"] if locks else []
            facts = {
                "object_size": str(image.stat()["obj_size"]),
                "watchers": ", ".join(watcher["addr"] for watcher in image.watchers_list()),
                "lock_owners": ", ".join(locker[2] for locker in lockers),
            }
            try:
                parent = image.get_parent_image_spec()
                facts["parent"] = f"rbd:{parent['pool_name']}/{parent['image_name']}@{parent['snap_name']}"
            except rbd.ImageNotFound:
                pass
            return facts

        return await self._cluster.run(ask, doing=f"{self._url}: describe")

    async def aclose(self) -> None:
        image, self._image = self._image, None
        ioctx, self._ioctx = self._ioctx, None
        with trio.CancelScope(shield=True):
            try:
                if image is not None:
                    await self._close_image(image, self._writes)
            finally:
                if ioctx is not None:
                    ioctx.close()
                if self._held:
                    self._held = False
                    self._cluster.release()

    async def _open_image(self) -> Any:
        import rbd

        name, snapshot, read_only = self._name, self._snapshot or None, not self._writable
        ioctx = self._ioctx
        try:
            return await self._cluster.aio(
                lambda done: rbd.RBD().aio_open_image(
                    done, ioctx, name, snapshot=snapshot, read_only=read_only
                ),
                doing=f"{self._url}: open",
            )
        except VolumeNotFound:
            raise VolumeNotFound(
                f"{self._url}: no such {'image or snapshot' if snapshot else 'image'}"
            ) from None

    def _use(self, image: Any) -> None:
        """From now on requests go to this open image."""
        from volfs.native import rbd_image

        writes = UnconfirmedWrites(lambda wake: rbd_image.bind(image, wake), self._cluster.timeout, self._url)
        self._image, self._writes = image, writes

    async def _close_image(self, image: Any, writes: UnconfirmedWrites) -> None:
        try:
            if self._dirty:
                await self._flush(image, writes)
        finally:
            try:
                await writes.settle_reads()
            finally:
                writes.requests.expire(0)
                await self._aio("close", lambda done: image.aio_close(done))

    async def _flush(self, image: Any, writes: UnconfirmedWrites) -> None:
        await writes.settle()
        failure = writes.requests.take_failure()
        await self._aio("flush", lambda done: image.aio_flush(done))
        self._raise_failure(failure)

    def _raise_failure(self, number: int) -> None:
        """Raise the error of a write that had been answered already."""
        if number:
            with self._requests():
                raise rados_error(number, f"{self._url}: write", os.strerror(number), self._cluster.timeout)

    async def _reopen(self) -> None:
        """Take up a new size. librbd tells only images opened for writing, through their watcher."""
        image, writes = self._image, self._writes
        self._use(await self._open_image())
        await self._close_image(image, writes)

    async def _size(self) -> int:
        """The size as the cluster has it now, whatever the open image remembers."""
        image, ioctx = self._image, self._ioctx
        if self._writable:
            return int(await self._cluster.run(image.size, doing=f"{self._url}: size"))
        (header,) = await self._cluster.run(
            lambda: list(rbd_header.read_headers(ioctx, [image.id()])), doing=f"{self._url}: size"
        )
        sizes = {} if header is None else {"": header.size} | {it.name: it.size for it in header.snapshots}
        if self._snapshot not in sizes:
            raise VolumeNotFound(f"{self._url}: the {'snapshot' if self._snapshot else 'image'} was removed")
        return sizes[self._snapshot]

    def _read_properties(self, size: int) -> Properties:
        return Properties(size, SECTOR, self._writable, can_resize=self._writable)

    @contextmanager
    def _requests(self) -> Iterator[None]:
        """What errors of requests mean on an image that is open."""
        try:
            yield
        except VolumeNotFound as exc:  # a part of it, such as its data pool
            raise BackendError(str(exc), errno.EIO) from exc
        except BackendError as exc:
            if exc.errno != errno.EINVAL:
                raise
            # librbd calls a request past the end invalid. Ours are within the size that we know, so that is not now.
            raise BackendError(f"{exc}: the image was shrunk", errno.EIO) from exc

    async def _aio(self, doing: str, start: Any) -> Any:
        with self._requests():
            return await self._cluster.aio(start, doing=f"{self._url}: {doing}")
