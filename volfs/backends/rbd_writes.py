"""Writes to an RBD image that are answered before the cluster has confirmed them, as librbd's own cache does.

A dd or cp has one write under way at a time and would wait for each. Here a write is taken when there is room for
it, and the cluster's answer is awaited by `settle`, which a flush does first. librbd's cache in the same place
answers by another thread, for which the writer waits; so it is off (rbd_cluster.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import trio

from volfs.backends.base import deadline

# Bytes that may be unconfirmed: of eight objects, which are on different disks as a rule.
WINDOW = 32 * 1024 * 1024
REQUESTS = 128  # writes that may be


class _Write(NamedTuple):
    offset: int
    data: bytes


class UnconfirmedWrites:
    """Those of one open image, in the order of `start`. On the trio loop, but for librbd's callbacks."""

    def __init__(self, timeout: float, doing: str) -> None:
        self._timeout = timeout
        self._doing = doing
        # By number; taken out by librbd's threads. The data stays until then: told not to copy it, librbd would read it
        # all that time, and holds no reference.
        self._writes: dict[int, _Write] = {}
        self._number = 0
        self._waiting = 0  # tasks that look at each confirmation
        self._crowded = 0  # tasks that wait for room, and look when half of it is free
        self._changed = trio.Event()
        self.failure = 0  # the errno of the first that failed and was not told by `take_failure`

    async def room(self, offset: int, length: int) -> None:
        """Return when a write may start: nothing unconfirmed overlaps it, which librbd might pass."""
        while not self._has_room(length, 1) or self._overlaps(offset, length):
            if not self._has_room(length, 1):
                # Not for the next one: to wake up for each costs as much as the write.
                self._crowded += 1
                try:
                    await self._until(lambda: self._has_room(length, 2))
                finally:
                    self._crowded -= 1
            await self.apart(offset, length)

    async def apart(self, offset: int, length: int) -> None:
        """Return when a read there sees what was written: librbd does not order it behind a write under way."""
        await self._wait(lambda: not self._overlaps(offset, length))

    async def settle(self) -> None:
        """Return when all have been confirmed, or have failed."""
        await self._wait(lambda: not self._writes)

    def take_failure(self) -> int:
        number, self.failure = self.failure, 0
        return number

    def start(
        self, offset: int, data: bytes, aio_write: Callable[[bytes, int, Callable[..., None]], Any]
    ) -> None:
        """Begin the write. `aio_write(data, offset, callback)` is librbd's; what it raises is the caller's."""
        self._number += 1
        number, token = self._number, trio.lowlevel.current_trio_token()

        def confirmed(completion: Any) -> None:  # on a thread of librbd
            status = completion.get_return_value()
            if status < 0 and not self.failure:
                self.failure = -status
            del self._writes[number]
            # Looked at after it has gone; a waiter does these in the other order.
            if self._waiting or (self._crowded and self._has_room(0, 2)):
                try:
                    token.run_sync_soon(self._wake, idempotent=True)
                except trio.RunFinishedError:
                    pass  # the daemon is gone; so is who waited

        self._writes[number] = _Write(offset, data)
        try:
            aio_write(data, offset, confirmed)
        except BaseException:
            del self._writes[number]
            raise

    def _has_room(self, length: int, share: int) -> bool:
        """Whether there is, in the window divided by `share`. What is larger than that goes alone."""
        writes = list(self._writes.values())
        unconfirmed = sum(len(write.data) for write in writes)
        return not writes or (len(writes) < REQUESTS // share and unconfirmed + length <= WINDOW // share)

    def _overlaps(self, offset: int, length: int) -> bool:
        return any(
            write.offset < offset + length and offset < write.offset + len(write.data)
            for write in list(self._writes.values())
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        if condition():
            return
        self._waiting += 1
        try:
            await self._until(condition)
        finally:
            self._waiting -= 1

    async def _until(self, condition: Callable[[], bool]) -> None:
        with deadline(self._timeout, self._doing):
            while not condition():
                await self._changed.wait()
