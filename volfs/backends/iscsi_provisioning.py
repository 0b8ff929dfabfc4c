"""Blocks of a LUN that hold nothing: which they are, and how to make them so without sending each zero.

Logical block provisioning is SBC-3 4.7 (and 4.7 of SBC-4); what a device offers of it is in `scsi.Provisioning`, and
what it refuses all the same is found out by trying, and remembered for as long as the volume is open.

Holes are the blocks that GET LBA STATUS calls deallocated, where the device promises that they read as zeros. Whatever
else it says, or does not say, is data.

Zeros are written by WRITE SAME with one block of them: the device writes what it does not unmap, so they are a promise.
Where unmapped blocks read as zeros it is allowed to unmap, for zeroing too: that is quicker by orders of magnitude.
UNMAP, on the other hand, is a hint that a device may ignore for any block (SBC-3 4.7.3.4). So it follows upon zeros, of
which it can only make zeros, where it alone gives space back. To send it first, and then to write only what GET LBA
STATUS still calls mapped, would be less work for the device. But the most common target that may offer UNMAP alone,
that of the Linux kernel, does not know GET LBA STATUS; and a write that is repeated on a new connection in between
(iscsi_volume.py) would have to be watched for.
"""

from __future__ import annotations

import enum
import logging
from typing import TYPE_CHECKING, NamedTuple

import trio

from volfs.backends import scsi
from volfs.backends.iscsi_disk import Disk
from volfs.backends.iscsi_session import Request, SenseError, Session

if TYPE_CHECKING:
    from volfs.native.libiscsi import Command

log = logging.getLogger(__name__)

STATUS_BYTES = 8 + 255 * 16  # of one answer to GET LBA STATUS
FIRST_STEP_BYTES = 4 * 1024 * 1024
# tgtd 1.0.85 counts the bytes of a WRITE SAME in 32 bits: of 5 GiB it zeroes one, and says that all went well.
LARGEST_STEP_BYTES = 1024 * 1024 * 1024
SMALLEST_STEP_BYTES = 256 * 1024  # less is not quicker where it is slow, and plain writes are as good
ALIGNED_BYTES = 1024 * 1024
STEP_SECONDS = 0.5  # that a command should take at most: others wait for it meanwhile in some targets


class Run(NamedTuple):
    """Blocks [first, end)."""

    first: int
    end: int
    data: bool


class Way(enum.Enum):
    """Commands that change what blocks hold without data for each, as log messages call them."""

    UNMAPPING = "WRITE SAME with UNMAP"
    WRITE_SAME = "WRITE SAME"
    UNMAP = "UNMAP"


class Step(NamedTuple):
    """What one command does: blocks [first, end)."""

    way: Way
    first: int
    end: int

    @property
    def blocks(self) -> int:
        return self.end - self.first


class Pace:
    """How many blocks a command should have, so that it takes about `seconds`: learnt from those before it."""

    def __init__(self, block_size: int, limit: int, seconds: float) -> None:
        """`limit`: the most blocks that the device says it takes; 0 if it does not."""
        self._largest = max(1, LARGEST_STEP_BYTES // block_size)
        if limit:
            self._largest = min(self._largest, limit)
        self._smallest = min(self._largest, max(1, SMALLEST_STEP_BYTES // block_size))
        self.blocks = self._first = min(self._largest, max(1, FIRST_STEP_BYTES // block_size))
        self._seconds = seconds
        self._taken = 0  # the most blocks that the device took in one command

    def took(self, blocks: int, seconds: float) -> None:
        self._taken = max(self._taken, blocks)
        if seconds > self._seconds:
            self.blocks = max(self._smallest, min(self.blocks, blocks // 2))
        elif seconds < self._seconds / 4 and blocks > self.blocks // 2:
            self.blocks = min(2 * self.blocks, self._largest)

    def failed(self) -> None:
        """It may have been too much at once."""
        self.blocks = self._first

    def refused(self, blocks: int) -> bool:
        """Whether the device may have refused the command for its length, and takes shorter ones."""
        known = max(self._taken, self._smallest)
        if blocks <= known:
            return False
        self._largest = known
        self.blocks, self._first = min(self.blocks, known), min(self._first, known)
        return True


class Provisioner:
    """Of one volume. Any number of tasks may use it; that their ranges do not disturb each other is their matter."""

    def __init__(self, session: Session, disk: Disk, timeout: float) -> None:
        self._session = session
        self._disk = disk
        self._zeros = bytes(disk.block_size)
        self._tells_status = True
        self._refused: set[Way] = set()
        seconds = min(STEP_SECONDS, timeout / 8)
        limits = disk.provisioning
        longest = min(limits.max_write_same or self._same.max_blocks, self._same.max_blocks)
        self._paces = {
            Way.UNMAPPING: Pace(disk.block_size, longest, seconds),
            Way.WRITE_SAME: Pace(disk.block_size, longest, seconds),
            Way.UNMAP: Pace(disk.block_size, limits.max_unmap, seconds),
        }
        self.promises = limits  # may be renewed; the limits above stay

    @property
    def _same(self) -> scsi.Transfers:
        """The form of WRITE SAME: that which may unmap."""
        offered = self._disk.provisioning
        if offered.write_same10 and not offered.write_same and self._disk.blocks <= 1 << 32:
            return scsi.Transfers(long=False)
        return self._disk.transfers

    async def runs(self, first: int, end: int) -> list[Run]:
        """Runs of data and holes from block `first` on, without gaps: as far as the device tells at once, or to `end`.

        SenseError, as for any command, but not for a device that cannot tell.
        """
        if self._tells_status and self.promises.reads_zeros:
            try:
                answer = await self._lba_status(first)
            except SenseError as exc:
                if not _is_refusal(exc):
                    raise
                log.info("%s: no GET LBA STATUS: holes are not known", self._session.name)
                self._tells_status = False
            else:
                runs: list[Run] = []
                at = first
                for block, count, deallocated in scsi.parse_lba_status(answer):
                    # SBC-3 wants the first to begin where asked and the others to follow on. What does not, is
                    # nothing to build on; what begins earlier still tells.
                    if not block <= at < block + count or at >= end:
                        break
                    runs.append(Run(at, min(block + count, end), not deallocated))
                    at = runs[-1].end
                if runs:
                    return runs
        return [Run(first, end, data=True)]

    def unmap_step(self, first: int, end: int) -> Step | None:
        """What may be unmapped at once, after it has been zeroed, of the blocks from `first` on.

        None where there are none, and where it may not, or need not since zeroing does it.
        """
        if first >= end or self._may(Way.UNMAPPING) or not self._may(Way.UNMAP):
            return None
        return self._step(Way.UNMAP, first, end)

    def zero_step(self, first: int, end: int) -> Step | None:
        """What may be zeroed at once of the blocks from `first` on; None when only writing does it."""
        for way in (Way.UNMAPPING, Way.WRITE_SAME):
            if self._may(way):
                return self._step(way, first, end)
        return None

    async def carry_out(self, step: Step, request: Request) -> bool:
        """Send the step's command by the (empty) request. False when the device refuses it: another may do."""
        library, disk, pace = self._session.library, self._disk, self._paces[step.way]
        if step.way is Way.UNMAP:
            cdb, data = scsi.unmap(), scsi.unmap_list(step.first, step.blocks)
        else:
            unmap = step.way is Way.UNMAPPING
            cdb, data = self._same.write_same(step.first, step.blocks, unmap=unmap), self._zeros
        command: Command = library.Command(disk.lun, cdb, request, data=data, length=len(data))
        request.commands.append(command)
        begun = trio.current_time()
        try:
            await self._session.execute(request)
        except SenseError as exc:
            if not _is_refusal(exc):
                pace.failed()
                raise
            too_long = exc.ascq in scsi.INVALID_FIELDS and pace.refused(step.blocks)
            if not too_long and step.way not in self._refused:
                log.info("%s: no %s: %s", self._session.name, step.way.value, exc)
                self._refused.add(step.way)
            return False
        except BaseException:
            pace.failed()
            raise
        pace.took(step.blocks, trio.current_time() - begun)
        return True

    def _may(self, way: Way) -> bool:
        if way in self._refused:
            return False
        promises = self.promises
        match way:
            case Way.UNMAPPING:
                return promises.reads_zeros and (promises.write_same or promises.write_same10)
            case Way.UNMAP:
                return promises.reads_zeros and promises.unmap
            case Way.WRITE_SAME:
                return True  # no page tells; it has to be tried

    def _step(self, way: Way, first: int, end: int) -> Step:
        """As much as the pace allows, up to a boundary of the device's units: half of one would stay mapped.

        Devices understate them (tgtd says a block, and means one of the file system below), so not only of one unit.
        """
        stop = first + self._paces[way].blocks
        if stop >= end:
            return Step(way, first, end)
        start, unit = self.promises.alignment, self.promises.granularity
        unit *= -(-ALIGNED_BYTES // (unit * self._disk.block_size))
        aligned = (stop - start) // unit * unit + start
        return Step(way, first, aligned if aligned > first else stop)

    async def _lba_status(self, first: int) -> bytes:
        request = Request(f"GET LBA STATUS at block {first}")
        answer = bytes(bytearray(STATUS_BYTES))  # one of its own: it is written into
        cdb = scsi.get_lba_status(first, STATUS_BYTES)
        request.commands.append(
            self._session.library.Command(self._disk.lun, cdb, request, into=answer, length=STATUS_BYTES)
        )
        return answer[: STATUS_BYTES - await self._session.execute(request)]


def _is_refusal(error: SenseError) -> bool:
    """Whether the device does not know the command, or not in this form."""
    if error.sense_key != scsi.ILLEGAL_REQUEST:
        return False
    return error.ascq == scsi.INVALID_OPCODE or error.ascq in scsi.INVALID_FIELDS
