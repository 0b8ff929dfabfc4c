"""What a LUN is: the questions that a target is asked about its disks, and a `Disk` as the answer."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from volfs.backends import scsi
from volfs.backends.iscsi_session import Request, SenseError, Session
from volfs.errors import BackendError, VolumeNotFound

# Vital product data pages.
SERIAL_NUMBER, IDENTIFICATION, BLOCK_LIMITS, BLOCK_PROVISIONING = 0x80, 0x83, 0xB0, 0xB2
CACHING = 0x08  # mode page


@dataclass(frozen=True, slots=True)
class Disk:
    """A LUN that is a disk, as it describes itself."""

    lun: int  # the number that addresses it
    blocks: int
    block_size: int
    max_blocks: int  # in one command that moves data
    mode: scsi.Mode
    vendor: str
    product: str
    serial: str
    identification: bytes  # the page as it is: what makes it this disk and no other
    transfers: scsi.Transfers
    provisioning: scsi.Provisioning

    @property
    def size(self) -> int:
        return self.blocks * self.block_size

    @property
    def identity(self) -> tuple[object, ...]:
        """What stays as long as it is the same disk: not its size."""
        return self.identification, self.serial, self.vendor, self.product, self.block_size


async def find_disk(session: Session, number: int) -> Disk:
    """The disk that a LUN number means. VolumeNotFound when there is none."""
    lun = number
    if 0xFF < number < 0x4000:
        # Arrays address these flat, Linux targets as "bus" and "target" of the peripheral method: only they know.
        lun = (await list_luns(session)).get(number, number)
    disk = await probe(session, lun)
    if disk is None:
        raise VolumeNotFound(f"{session.name}: LUN {number} is not a disk")
    return disk


async def list_luns(session: Session) -> dict[int, int]:
    """LUN number -> address. LUN 0 answers for the target, whether it is a device or not (SPC-4 6.33)."""
    length = 8 + 8 * 255
    data = await _ask(session, 0, scsi.report_luns(length), length, "REPORT LUNS")
    needed = 8 + int.from_bytes(data[:4], "big")
    if needed > length:
        data = await _ask(session, 0, scsi.report_luns(needed), needed, "REPORT LUNS")
    return scsi.parse_luns(data)


async def probe(session: Session, lun: int, *, setup: bool = False) -> Disk | None:
    """Ask a LUN for all we want to know; None when it is no disk. VolumeNotFound when there is no such LUN."""
    ask = partial(_ask, session, lun, setup=setup)
    inquiry = scsi.parse_inquiry(await ask(scsi.inquiry(96), 96, "INQUIRY"))
    if not inquiry.connected:
        raise VolumeNotFound(f"{session.name}: no LUN {lun}")
    if inquiry.device_type != scsi.DISK:
        return None
    described = await capacity(session, lun, setup=setup)
    ask_if_known = partial(_ask_if_known, session, lun, setup=setup)
    pages = scsi.parse_vpd(await ask_if_known(scsi.inquiry_vpd(0, 255), 255), 0)
    vpd = {
        page: scsi.parse_vpd(await ask_if_known(scsi.inquiry_vpd(page, 255), 255), page)
        for page in (SERIAL_NUMBER, IDENTIFICATION, BLOCK_LIMITS, BLOCK_PROVISIONING)
        if page in pages
    }
    mode = scsi.parse_mode6(await ask_if_known(scsi.mode_sense6(CACHING, 255), 255))
    limits, most = vpd.get(BLOCK_LIMITS, b""), described.transfers.max_blocks
    return Disk(
        lun=lun,
        blocks=described.blocks,
        block_size=described.block_size,
        max_blocks=min(scsi.parse_max_transfer(limits) or most, most),
        mode=mode,
        vendor=inquiry.vendor,
        product=inquiry.product,
        serial=scsi.parse_serial(vpd.get(SERIAL_NUMBER, b"")),
        identification=vpd.get(IDENTIFICATION, b""),
        transfers=described.transfers,
        provisioning=scsi.parse_provisioning(described.answer, limits, vpd.get(BLOCK_PROVISIONING, b"")),
    )


class Capacity(NamedTuple):
    blocks: int
    block_size: int
    transfers: scsi.Transfers
    answer: bytes  # to READ CAPACITY(16), empty when the device does not know it


async def capacity(session: Session, lun: int, *, setup: bool = False) -> Capacity:
    ask = partial(_ask, session, lun, setup=setup)
    try:
        answer = await ask(scsi.read_capacity16(32), 32, "READ CAPACITY(16)")
        blocks, block_size = scsi.parse_capacity16(answer)
        transfers = scsi.Transfers()
    except SenseError as exc:
        if exc.sense_key != scsi.ILLEGAL_REQUEST:
            raise
        answer = b""
        blocks, block_size = scsi.parse_capacity10(await ask(scsi.read_capacity10(), 8, "READ CAPACITY(10)"))
        transfers = scsi.Transfers(long=False)
    if block_size < 512 or block_size & (block_size - 1):
        raise BackendError(f"{session.name}: LUN {lun}: blocks of {block_size} bytes", errno.EPROTO)
    return Capacity(blocks, block_size, transfers, answer)


async def _ask(
    session: Session, lun: int, cdb: bytes, length: int, what: str, *, setup: bool = False
) -> bytes:
    """The answer to a command that asks for at most `length` bytes."""
    request = Request(what, setup=setup)
    answer = bytes(bytearray(length))  # one of its own: it is written into
    request.commands.append(session.library.Command(lun, cdb, request, into=answer, length=length))
    try:
        missing = await session.execute(request)
    except SenseError as exc:
        if (exc.sense_key, exc.ascq) == (scsi.ILLEGAL_REQUEST, scsi.LUN_NOT_SUPPORTED):
            raise VolumeNotFound(f"{session.name}: no LUN {lun}") from exc
        raise
    return answer[: length - missing]


async def _ask_if_known(session: Session, lun: int, cdb: bytes, length: int, *, setup: bool) -> bytes:
    """As `_ask`, for what a device need not have, or not tell while it is reserved: nothing then."""
    try:
        return await _ask(session, lun, cdb, length, "INQUIRY or MODE SENSE", setup=setup)
    except BackendError as exc:
        unknown = isinstance(exc, SenseError) and exc.sense_key == scsi.ILLEGAL_REQUEST
        if not unknown and exc.errno != errno.EBUSY:
            raise
        return b""
