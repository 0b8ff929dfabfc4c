"""Open volumes: bounds, what is dirty, and one backend open per volume however many handles there are.

Knows drivers only by their contract, and nothing of FUSE, names or clients. Runs on the trio loop, without threads.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import trio

from volfs.backends.base import Backend, BackendVolume, Extent, Properties, Source
from volfs.backends.registry import Backends
from volfs.errors import VolfsError
from volfs.known_extents import KnownExtents, Writing

log = logging.getLogger(__name__)

Key = tuple[Backend, Source]

FRESH_SECONDS = 1.0  # how old what is known of holes may be where nobody has asked for them


class _Opened:
    """A backend open and the number of requests under way on it. `with opened as volume:` is one request."""

    def __init__(self, volume: BackendVolume) -> None:
        self.volume = volume
        self._requests = 0
        self._idle: trio.Event | None = None
        self._closed = False

    def __enter__(self) -> BackendVolume:
        if self._closed:  # for who reads ahead, and has not heard of it
            raise VolfsError("the volume is closed", errno.EBADF)
        self._requests += 1
        return self.volume

    def __exit__(self, *exc_info: object) -> None:
        self._requests -= 1
        if not self._requests and self._idle is not None:
            self._idle.set()

    async def aclose(self) -> None:
        """Close when the last request is answered; each of them ends by its own deadline."""
        with trio.CancelScope(shield=True):
            while self._requests:
                self._idle = trio.Event()
                await self._idle.wait()
            self._closed = True
            await self.volume.aclose()


class Volume:
    """A volume that handles share. Made and released by a `VolumeTable`.

    Any number of tasks may read and write at once. A write that was lost after it had returned, found out by a
    flush, concerns every handle: each compares `failures` with the count that it has reported.
    """

    def __init__(self, source: Source, volume: BackendVolume, blank: KnownExtents | None = None) -> None:
        """`blank` are holes that a client has promised, see VolumeTable.promise_blank. Writes end them there, too."""
        self.source = source
        self.handles = 0
        self.failures = 0
        self.last_failure: VolfsError | None = None
        # A lost write of which close(2) alone told: many programs do not look at that.
        self.unheard: VolfsError | None = None
        self._opened = _Opened(volume)
        self._opens = 0
        self._known = KnownExtents()
        self._known_since = 0.0  # trio's clock, of the oldest of it
        self._blank = KnownExtents() if blank is None else blank
        self._writing = Writing()
        self._written = 0  # writes finished
        self._flushed = 0  # of these, how many a flush has covered
        self._resized = 0

    @property
    def properties(self) -> Properties:
        return self._opened.volume.properties

    @property
    def writes(self) -> int:
        """How many have been made, failed ones and changes of the size too. What was read when there were fewer may be
        old.
        """
        return self._written + self._resized

    @property
    def dirty(self) -> bool:
        """Whether something was written that no flush has covered."""
        return self._flushed < self._written

    async def pread(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; less only where the volume ends."""
        length = min(length, self.properties.size - offset)
        if length <= 0:
            return b""
        with self._opened as volume:
            return await volume.pread(offset, length)

    async def pwrite(self, offset: int, data: bytes) -> int:
        """Write up to the end and return how much that was; ENOSPC at or past it, as a block device does."""
        if not data:
            return 0
        room = self.properties.size - offset
        if room <= 0:
            raise VolfsError(f"{self.source.url}: write at {offset}: past the end", errno.ENOSPC)
        part = data if len(data) <= room else memoryview(data)[:room]
        with self._change(offset, len(part)) as volume:
            await volume.pwrite(offset, part)
        return len(part)

    def start_read(self, offset: int, length: int, sink: object) -> bool:
        """Begin a `pread` into a sink, without a task, where the driver can; see BackendVolume."""
        length = min(length, self.properties.size - offset)
        return length > 0 and self._opened.volume.start_read(offset, length, sink)

    def start_write(self, offset: int, data: memoryview) -> bool:
        """Do a `pwrite` of all of `data` at once, without a task, where the driver can; see BackendVolume."""
        if not data or offset + len(data) > self.properties.size:
            return False
        started = self._opened.volume.start_write(offset, data)
        if started:
            self._writing.note(offset, len(data))
            self._note_written(offset, len(data))
            self._written += 1
        return started

    def expire(self) -> None:
        self._opened.volume.expire()

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range, which lies within the volume, read as zeros."""
        with self._change(offset, length) as volume:
            await volume.write_zeroes(offset, length)
        self._known.forget(offset, length)  # what was known to be data may be a hole now

    async def discard(self, offset: int, length: int) -> None:
        """Make the range, which lies within the volume, read as zeros, and give back its space.

        What another client wrote to a hole is left alone if it did so less than `FRESH_SECONDS` before: programs that
        punch a thousand ranges in a row would pay for a question about each.
        """
        self._forget_old()
        await self.clear(offset, length)

    async def clear(self, offset: int, length: int) -> None:
        """As `discard`, where no other client has written since the last open: known holes are left alone."""
        end = offset + length
        while offset < end:
            if end > self.properties.size:
                raise VolfsError(f"{self.source.url}: shrunk meanwhile", errno.ENOSPC)
            extent = await self.extent(offset, end - offset)
            if extent.data:
                with self._change(offset, extent.length) as volume:
                    await volume.discard(offset, extent.length)
                self._known.forget(offset, extent.length)
            offset = extent.end

    async def extent(self, offset: int, length: int) -> Extent:
        """The run of data or hole that begins at `offset`, as far as it is known, and no longer than `length`.

        What is past the end, of a volume that was shrunk meanwhile, is data: who reads it meets the end.
        """
        if offset >= self.properties.size:
            return Extent(offset, length, data=True)
        known = self._blank.at(offset) or self._known.at(offset)
        while known is None:
            asked, opens = trio.current_time(), self._opens
            with self._writing.question() as spoilt:
                with self._opened as volume:
                    extents = await volume.extents(offset, self.properties.size - offset)
                if opens != self._opens:
                    continue  # who opened it since wants an answer from after that
                # Of two questions under way the older one may be answered last.
                self._known_since = min(self._known_since, asked) if self._known else asked
                self._known.learn(extents, spoilt)
            known = self._known.at(offset) or Extent(offset, extents[0].length, data=True)
        return Extent(offset, min(length, known.length), known.data)

    def recent_extent(self, offset: int) -> tuple[Extent, float] | None:
        """What is known from `offset` on without asking, and since when (trio's clock): `FRESH_SECONDS` ago at most.

        None when nothing is, or only what is older; `look` changes that.
        """
        now = trio.current_time()
        if (extent := self._blank.at(offset)) is not None:
            return extent, now
        if now - self._known_since > FRESH_SECONDS or (extent := self._known.at(offset)) is None:
            return None
        return extent, self._known_since

    async def look(self, offset: int) -> None:
        """Have something be known there that is recent."""
        self._forget_old()
        await self.extent(offset, 1)

    def _forget_old(self) -> None:
        if trio.current_time() - self._known_since > FRESH_SECONDS:
            self._known.clear()

    def opened_again(self) -> None:
        """One more handle, which is to see what other clients have done before."""
        self._opens += 1
        self._known.clear()

    @contextmanager
    def _change(self, offset: int, length: int) -> Iterator[BackendVolume]:
        """The backend open, to change the range. A hole there, if one was known, is not known any more."""
        self._note_written(offset, length)
        number = self._writing.begin(offset, length)
        try:
            with self._opened as volume:
                yield volume
        finally:
            self._writing.end(number)
            # Also after an error: some of it may have been written, and wants the flush.
            self._written += 1

    def _note_written(self, offset: int, length: int) -> None:
        self._known.written(offset, length)
        self._blank.forget(offset, length)

    async def flush(self) -> None:
        """Return when every write that returned before is on stable storage."""
        written = self._written
        if self._flushed >= written:
            return
        try:
            with self._opened as volume:
                await volume.flush()
        except VolfsError as exc:
            self.failures += 1
            self.last_failure = exc
            raise
        self._flushed = max(self._flushed, written)

    async def refresh(self) -> Properties:
        with self._opened as volume:
            return await volume.refresh()

    async def resize(self, size: int) -> None:
        with self._opened as volume:
            try:
                await volume.resize(size)
            finally:
                self._resized += 1

    async def reopen(self, volume: BackendVolume) -> None:
        """Go on with another backend open, which may write, and close the old one."""
        old, self._opened = self._opened, _Opened(volume)
        await old.aclose()

    async def aclose(self) -> None:
        """Flush and let go. Contract as BackendVolume.aclose."""
        await self._opened.aclose()


class VolumeTable:
    """The open volumes: a backend open at the first handle, closed at the last; turned writable when one asks."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self._volumes: dict[Key, Volume] = {}
        self._locks: dict[Key, _CountedLock] = {}
        self._blank: dict[Key, KnownExtents] = {}
        self._failures: dict[Key, VolfsError] = {}  # of closes whose error nobody has seen
        self._changed = trio.Event()  # replaced by a new one at each open and release
        self.opens = 0  # there have been

    def __iter__(self) -> Iterator[Volume]:
        return iter(list(self._volumes.values()))

    def get(self, backend: Backend, source: Source) -> Volume | None:
        return self._volumes.get((backend, source))

    def in_use(self, backend: Backend, source: Source) -> bool:
        """Whether the volume is open, or being opened or closed."""
        return (backend, source) in self._volumes or (backend, source) in self._locks

    def promise_blank(self, backend: Backend, source: Source, size: int) -> None:
        """A client has made the volume, knows that it reads as zeros, and that nobody writes to it but by this table.

        So what nobody writes is a hole, whatever the backend can tell, until `forget_blank`. Without effect where the
        volume is in use, for who uses it may have written.
        """
        if not self.in_use(backend, source):
            blank = self._blank[backend, source] = KnownExtents()
            blank.learn([Extent(0, size, data=False)])

    def forget_blank(self, backend: Backend, source: Source) -> None:
        self._blank.pop((backend, source), None)

    def take_failure(self, backend: Backend, source: Source) -> VolfsError | None:
        """What went wrong when the volume was last closed, told once."""
        return self._failures.pop((backend, source), None)

    async def open(self, backend: Backend, source: Source, *, writable: bool) -> Volume:
        """A handle on the volume; the caller owes one `release`. Its size is that of now."""
        async with self._locked((backend, source)):
            volume = self.get(backend, source)
            if volume is None:
                self._backends.hold(backend)
                try:
                    opened = await backend.open(source, writable=writable)
                    volume = Volume(source, opened, self._blank.get((backend, source)))
                except BaseException:
                    await self._backends.release(backend)
                    raise
                self._volumes[backend, source] = volume
            elif writable and not volume.properties.writable:
                await volume.reopen(await backend.open(source, writable=True))
            else:
                await volume.refresh()
            volume.opened_again()
            volume.handles += 1
            self.opens += 1
            return volume

    async def release(self, backend: Backend, source: Source) -> None:
        """Give a handle back. The last one closes the volume; its error is raised, and kept for `take_failure`.

        So is the loss of a write that a program was told of by close(2) alone.
        """
        with trio.CancelScope(shield=True):
            async with self._locked((backend, source)):
                volume = self._volumes[backend, source]
                volume.handles -= 1
                if volume.handles:
                    return
                try:
                    self._failures.pop((backend, source), None)
                    await volume.aclose()
                except VolfsError as exc:
                    self._failures[backend, source] = exc
                    raise
                else:
                    if volume.unheard is not None:
                        self._failures[backend, source] = volume.unheard
                finally:
                    del self._volumes[backend, source]
                    await self._backends.release(backend)

    async def wait_changed(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; looked at again after each open and release. Set a deadline."""
        while not condition():
            await self._changed.wait()

    async def aclose(self) -> list[VolfsError]:
        """Close all that is open, side by side; returns these errors and those not taken before.

        No request may come any more.
        """
        errors = list(self._failures.values())

        async def close(volume: Volume) -> None:
            try:
                await volume.aclose()
            except VolfsError as exc:
                errors.append(exc)
            except Exception as exc:  # a bug in one driver must not keep the others' volumes from their flush
                log.exception("%s: close: unexpected error; a bug in volfs", volume.source.url)
                errors.append(VolfsError(f"{volume.source.url}: close: unexpected {type(exc).__name__}"))

        async with trio.open_nursery() as nursery:
            for volume in self._volumes.values():
                nursery.start_soon(close, volume)
        self._volumes.clear()
        return errors

    @asynccontextmanager
    async def _locked(self, key: Key) -> AsyncIterator[None]:
        """Opens and closes of one volume come one after the other; those of others do not wait for it."""
        counted = self._locks.setdefault(key, _CountedLock())
        counted.users += 1
        try:
            async with counted.lock:
                yield
        finally:
            counted.users -= 1
            if not counted.users:
                del self._locks[key]
            self._changed.set()
            self._changed = trio.Event()


@dataclass(slots=True)
class _CountedLock:
    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0  # tasks that hold it or wait for it
