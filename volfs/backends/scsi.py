"""SCSI as far as a disk needs it: commands as bytes, replies as values, sense data as errno. Knows no transport.

Facts are from SPC-4 (commands common to all devices, sense data), SBC-3 (disks) and SAM-5 (LUN formats, status).
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

RECOVERED_ERROR, NOT_READY, ILLEGAL_REQUEST, UNIT_ATTENTION, ABORTED_COMMAND = 0x1, 0x2, 0x5, 0x6, 0xB

CAPACITY_CHANGED = frozenset({0x2A09, 0x2800})  # the second: the medium may have changed
NEXUS_LOSS = 0x2907
INVALID_OPCODE = 0x2000
LUN_NOT_SUPPORTED = 0x2500

DISK = 0x00  # peripheral device types
NOT_A_DEVICE = 0x1F

# Sense key, and additional sense code and qualifier (None for any), to errno. The first line that fits counts.
SENSE_ERRNOS: tuple[tuple[int, int | None, int], ...] = (
    (0x2, 0x3A00, errno.ENOMEDIUM),
    (0x2, None, errno.ENODEV),  # NOT READY
    (0x3, None, errno.EIO),  # MEDIUM ERROR
    (0x4, None, errno.EIO),  # HARDWARE ERROR
    (0x5, LUN_NOT_SUPPORTED, errno.ENXIO),  # unmapped; VolumeNotFound when that is seen at the start
    (0x5, INVALID_OPCODE, errno.EOPNOTSUPP),
    (0x5, 0x2100, errno.ENXIO),  # address out of range: shrunk behind our back
    (0x7, 0x2707, errno.ENOSPC),  # space allocation failed: a thin pool is full
    (0x7, None, errno.EROFS),  # DATA PROTECT
    (0xD, None, errno.ENOSPC),  # VOLUME OVERFLOW
)

# NOT READY that passes by itself: becoming ready, asymmetric access state in transition (SPC-4 table D.2).
PASSING_ASCQS = frozenset({0x0401, 0x040A})


def sense_errno(key: int, ascq: int) -> int:
    """The errno that comes closest to what the device says; EIO when nothing does."""
    for known_key, known_ascq, number in SENSE_ERRNOS:
        if known_key == key and known_ascq in (None, ascq):
            return number
    return errno.EIO


def device_was_reset(ascq: int) -> bool:
    """Whether a UNIT ATTENTION says that the device may have forgotten what was not on the medium yet.

    29h is power on and resets of all kinds. 29/07, the loss of a nexus, is about the connection alone.
    """
    return ascq >> 8 == 0x29 and ascq != NEXUS_LOSS


# --- commands -------------------------------------------------------------------------------------------------------


def inquiry(length: int) -> bytes:
    return struct.pack(">BBBHB", 0x12, 0, 0, length, 0)


def inquiry_vpd(page: int, length: int) -> bytes:
    return struct.pack(">BBBHB", 0x12, 1, page, length, 0)


def report_luns(length: int) -> bytes:
    return struct.pack(">BBBBHIBB", 0xA0, 0, 0, 0, 0, length, 0, 0)


def mode_sense6(page: int, length: int) -> bytes:
    """With "disable block descriptors", so that the page follows the header at once."""
    return struct.pack(">BBBBBB", 0x1A, 0x08, page, 0, length, 0)


def read_capacity16(length: int) -> bytes:
    return struct.pack(">BBQIBB", 0x9E, 0x10, 0, length, 0, 0)


def read_capacity10() -> bytes:
    return struct.pack(">BBIHBB", 0x25, 0, 0, 0, 0, 0)


class Transfers:
    """READ, WRITE and SYNCHRONIZE CACHE with 16 byte commands, or with 10 bytes where the device is that old."""

    def __init__(self, *, long: bool = True) -> None:
        self._long = long
        self.max_blocks = 0xFFFFFFFF if long else 0xFFFF

    def read(self, block: int, count: int) -> bytes:
        return self._command(0x88 if self._long else 0x28, block, count)

    def write(self, block: int, count: int) -> bytes:
        return self._command(0x8A if self._long else 0x2A, block, count)

    def synchronize_cache(self) -> bytes:
        """The whole device: from block 0, and a count of 0 means to the end (SBC-3 5.26)."""
        return self._command(0x91 if self._long else 0x35, 0, 0)

    def _command(self, opcode: int, block: int, count: int) -> bytes:
        if self._long:
            return struct.pack(">BBQIBB", opcode, 0, block, count, 0, 0)
        return struct.pack(">BBIBHB", opcode, 0, block, 0, count, 0)


# --- replies; short ones (a device may send less than was asked for) read as zeros ----------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """Standard INQUIRY data (SPC-4 6.6.2)."""

    connected: bool  # peripheral qualifier 0: there is a device at this LUN
    device_type: int
    vendor: str
    product: str


def parse_inquiry(data: bytes) -> Identity:
    data = data.ljust(36, b"\0")
    device_type = data[0] & 0x1F
    return Identity(
        connected=data[0] >> 5 == 0 and device_type != NOT_A_DEVICE,
        device_type=device_type,
        vendor=_text(data[8:16]),
        product=_text(data[16:32]),
    )


def parse_vpd(data: bytes, page: int) -> bytes:
    """The payload of a vital product data page, empty when it is another page or none."""
    if len(data) < 4 or data[1] != page:
        return b""
    return data[4 : 4 + int.from_bytes(data[2:4], "big")]


def parse_serial(page: bytes) -> str:
    return _text(page)


def parse_max_transfer(page: bytes) -> int:
    """MAXIMUM TRANSFER LENGTH in blocks, from the Block Limits page; 0 means that there is no limit."""
    return int.from_bytes(page[4:8], "big")


def parse_capacity16(data: bytes) -> tuple[int, int]:
    """Number of blocks and bytes in a block."""
    last, block_size = struct.unpack_from(">QI", data.ljust(12, b"\0"))
    return last + 1, block_size


def parse_capacity10(data: bytes) -> tuple[int, int]:
    last, block_size = struct.unpack_from(">II", data.ljust(8, b"\0"))
    return last + 1, block_size


@dataclass(frozen=True, slots=True)
class Mode:
    """What the mode parameters say of writing."""

    write_protected: bool
    volatile_cache: bool


def parse_mode6(data: bytes) -> Mode:
    """Header and Caching page (SBC-3 6.4.5). A device that does not tell is taken to have a volatile cache."""
    protected = len(data) > 2 and bool(data[2] & 0x80)
    page = data[4 + data[3] :] if len(data) > 3 else b""
    told = len(page) > 2 and page[0] & 0x3F == 0x08
    return Mode(protected, not told or bool(page[2] & 0x04))


def parse_luns(data: bytes) -> dict[int, int]:
    """LUN number -> the two bytes that address it, of those that a number names (SAM-5 4.7).

    Peripheral addressing gives 0 to 255, and a non-zero bus the number that Linux targets mean by it; flat
    addressing up to 16383. Other methods are of devices behind devices and are left out.
    """
    luns = {}
    length = int.from_bytes(data[:4], "big")
    for start in range(8, min(8 + length, len(data) - 7), 8):
        address = int.from_bytes(data[start : start + 2], "big")
        if any(data[start + 2 : start + 8]):
            continue
        if address >> 14 in (0, 1):
            luns[address & 0x3FFF] = address
    return luns


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace").replace("\0", " ").strip()
