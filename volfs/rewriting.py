"""Writing through a handle that was opened with O_TRUNC, by a program that then skips what it takes to be empty.

To cp, `dd conv=sparse` and `tar -S` an emptied file reads as zeros wherever they do not write: they seek over holes. A
volume keeps its content when it is opened, as a block device does (dd opens its target so only to probe it), and
without this, old data would show through the holes of the copy.
"""

from __future__ import annotations

import trio

from volfs.volume import Volume


class Rewriting:
    """What one handle writes, from front to back, with zeros in what it skips. Several writes may be under way."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._end = 0  # so far, everything was written by this handle, is being written, or is zero
        self._zeroing = trio.Lock()

    async def pwrite(self, offset: int, data: bytes) -> int:
        """As Volume.pwrite, after making zeros of what was skipped before `offset`."""
        await self.reach(offset, len(data))
        return await self._volume.pwrite(offset, data)

    async def reach(self, offset: int, length: int) -> None:
        """Make zeros of what was skipped before the range, which the caller writes or zeroes next."""
        if offset < self._volume.properties.size:
            async with self._zeroing:
                await self._zero(offset)
                self._end = max(self._end, offset + length)

    def start_write(self, offset: int, data: memoryview) -> bool:
        """As Volume.start_write, where nothing is skipped or being made zero."""
        if offset > self._end or self._zeroing.locked() or not self._volume.start_write(offset, data):
            return False
        self._end = max(self._end, offset + len(data))
        return True

    async def finish(self) -> None:
        """What was not written up to the volume's end is zeros: the file was extended to its full size."""
        async with self._zeroing:
            await self._zero(self._volume.properties.size)

    async def _zero(self, end: int) -> None:
        if end > self._end:
            await self._volume.clear(self._end, end - self._end)
            self._end = end
