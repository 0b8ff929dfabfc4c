"""Writes to an RBD image that are answered before the cluster has confirmed them, as librbd's own cache does.

A dd or cp has one write under way at a time and would wait for each. Here a write is taken when there is room for
it, and the cluster's answer is awaited by `settle`, which a flush does first. librbd's cache in the same place
answers by another thread, for which the writer waits; so it is off (rbd_cluster.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from volfs.backends.base import deadline

if TYPE_CHECKING:
    from volfs.native.rbd_image import Image

# Bytes that may be unconfirmed: of eight objects, which are on different disks as a rule.
WINDOW = 32 * 1024 * 1024
REQUESTS = 128  # writes that may be
EVERYTHING = 1 << 63  # bytes: no image is longer


class UnconfirmedWrites:
    """Those of one open image, whose `requests`, reads too, `bind` makes.

    On the trio loop, but for librbd's threads that wake it.
    """

    def __init__(self, bind: Callable[[Callable[[], None]], Image], timeout: float, name: str) -> None:
        """`name` begins the messages."""
        self._timeout = timeout
        self._name = name
        self._token = trio.lowlevel.current_trio_token()
        self._waiting = 0  # tasks that look after each answer
        self._crowded = 0  # tasks that wait for room, and look when half of it is free
        self._changed = trio.Event()
        self.requests = bind(self._answered)

    async def room(self, offset: int, length: int) -> None:
        """Return when a write may start: nothing unconfirmed overlaps it, which librbd might pass.

        Of what was begun before this call. What came later, perhaps to go first, is at the same time for the caller.
        """
        begun = self.requests.begun
        while not self._has_room(length, 1) or self.requests.overlaps(offset, length, begun):
            if not self._has_room(length, 1):
                # Not for the next one: to wake up for each costs as much as the write.
                self._crowded += 1
                try:
                    await self._until(lambda: self._has_room(length, 2), f"{self._name}: write")
                finally:
                    self._crowded -= 1
            await self._apart(offset, length, begun)

    def room_now(self, offset: int, length: int) -> bool:
        """Whether a write may start that does not wait; not before those that do."""
        return not self._crowded and self._has_room(length, 1) and not self.overlaps(offset, length)

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether an unconfirmed write does."""
        return self.requests.overlaps(offset, length, self.requests.begun)

    async def apart(self, offset: int, length: int) -> None:
        """Return when a read there sees what was written: librbd does not order it behind a write under way."""
        await self._apart(offset, length, self.requests.begun)

    async def settle(self) -> None:
        """Return when all that were begun by now have been confirmed, or have failed.

        Not those that others begin meanwhile: while a busy writer has always one under way, the wait would not end.
        """
        await self._apart(0, EVERYTHING, self.requests.begun)

    async def _apart(self, offset: int, length: int, begun: int) -> None:
        """Return when no write there is under way, of the first `begun`."""
        await self._wait(lambda: not self.requests.overlaps(offset, length, begun), f"{self._name}: write")

    async def settle_reads(self) -> None:
        """Return when all reads that were started without waiting are answered."""
        await self._wait(lambda: not self.requests.reads, f"{self._name}: read")

    def _has_room(self, length: int, share: int) -> bool:
        """Whether there is, in the window divided by `share`. What is larger than that goes alone."""
        writes = self.requests.writes
        return not writes or (writes < REQUESTS // share and self.requests.size + length <= WINDOW // share)

    def _answered(self) -> None:  # on a thread of librbd
        try:
            self._token.run_sync_soon(self._wake, idempotent=True)
        except trio.RunFinishedError:
            pass  # the daemon is gone; so is who waited

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait(self, condition: Callable[[], bool], doing: str) -> None:
        if condition():
            return
        self._waiting += 1
        try:
            await self._until(condition, doing)
        finally:
            self._waiting -= 1

    async def _until(self, condition: Callable[[], bool], doing: str) -> None:
        with deadline(self._timeout, doing):
            while True:
                changed = self._changed
                if self._waiting:
                    self.requests.wake_at(REQUESTS, 1 << 62)
                else:
                    self.requests.wake_at(REQUESTS // 2 - 1, WINDOW // 2)
                # Looked at after asking to be woken; what is answered does these in the other order.
                if condition():
                    return
                await changed.wait()
