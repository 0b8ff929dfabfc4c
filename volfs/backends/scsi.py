"""SCSI as far as a disk needs it: commands as bytes, replies as values, sense data as errno. Knows no transport.

Facts are from SPC-4 (commands common to all devices, sense data), SBC-3 (disks) and SAM-5 (LUN formats, status).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass

RECOVERED_ERROR, NOT_READY, ILLEGAL_REQUEST, UNIT_ATTENTION, ABORTED_COMMAND = 0x1, 0x2, 0x5, 0x6, 0xB

CAPACITY_CHANGED = frozenset({0x2A09, 0x2800})  # the second: the medium may have changed
NEXUS_LOSS = 0x2907
INVALID_OPCODE = 0x2000
INVALID_FIELDS = frozenset({0x2400, 0x2600})  # in the command, in its parameter list
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


def get_lba_status(block: int, length: int) -> bytes:
    """GET LBA STATUS, a service action of 9Eh as READ CAPACITY(16) is (SBC-3)."""
    return struct.pack(">BBQIBB", 0x9E, 0x12, block, length, 0, 0)


def unmap() -> bytes:
    """UNMAP (SBC-3), for what `unmap_list` lists."""
    return struct.pack(">BBIBHB", 0x42, 0, 0, 0, 24, 0)


def unmap_list(block: int, count: int) -> bytes:
    """A parameter list of one descriptor."""
    return struct.pack(">HHIQII", 22, 16, 0, block, count, 0)


class Transfers:
    """Commands for ranges of blocks, of 16 bytes, or of 10 where the device is that old."""

    def __init__(self, *, long: bool = True) -> None:
        self._long = long
        self.max_blocks = 0xFFFFFFFF if long else 0xFFFF

    def read(self, block: int, count: int) -> bytes:
        return self._command(0x88 if self._long else 0x28, block, count)

    def write(self, block: int, count: int) -> bytes:
        return self._command(0x8A if self._long else 0x2A, block, count)

    def write_same(self, block: int, count: int, *, unmap: bool) -> bytes:
        """Write the one block that is sent to each of them; `unmap` allows to unmap them where that reads the same.

        Never of 0 blocks, which means "to the end", and never with NDOB ("no data-out buffer", zeros): it spares one
        block, and tgtd 1.0.85 takes the bit for nothing and answers MEDIUM ERROR.
        """
        return self._command(0x93 if self._long else 0x41, block, count, 0x08 if unmap else 0)

    def synchronize_cache(self) -> bytes:
        """The whole device: from block 0, and a count of 0 means to the end (SBC-3 5.26)."""
        return self._command(0x91 if self._long else 0x35, 0, 0)

    def _command(self, opcode: int, block: int, count: int, flags: int = 0) -> bytes:
        if self._long:
            return struct.pack(">BBQIBB", opcode, flags, block, count, 0, 0)
        return struct.pack(">BBIBHB", opcode, flags, block, 0, count, 0)


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


@dataclass(frozen=True, slots=True)
class Provisioning:
    """What a device tells of logical block provisioning (SBC-3 4.7, the same in SBC-4). Nothing, unless asked."""

    reads_zeros: bool = False  # unmapped blocks do; nothing else here counts without it
    unmap: bool = False  # LBPU: takes UNMAP
    write_same: bool = False  # LBPWS: WRITE SAME(16) may unmap
    write_same10: bool = False  # LBPWS10: WRITE SAME(10) may
    max_unmap: int = 0  # MAXIMUM UNMAP LBA COUNT, in blocks; 0 means that there is no UNMAP
    max_write_same: int = 0  # MAXIMUM WRITE SAME LENGTH, in blocks; 0: not told
    granularity: int = 1  # what is unmapped begins and ends at multiples of so many blocks,
    alignment: int = 0  # counted from here


def parse_provisioning(capacity: bytes, limits: bytes, page: bytes) -> Provisioning:
    """From READ CAPACITY(16), the Block Limits page (B0h) and the Logical Block Provisioning page (B2h)."""
    flags = page[1] if len(page) > 1 else 0
    limits = limits.ljust(40, b"\0")
    max_unmap, max_descriptors, granularity, alignment, max_write_same = struct.unpack_from(
        ">IIIIQ", limits, 16
    )
    return Provisioning(
        reads_zeros=parse_reads_zeros(capacity),
        unmap=bool(flags & 0x80) and max_unmap > 0 and max_descriptors > 0,
        write_same=bool(flags & 0x40),
        write_same10=bool(flags & 0x20),
        max_unmap=max_unmap,
        max_write_same=max_write_same,
        granularity=granularity or 1,
        alignment=alignment & 0x7FFFFFFF if alignment >> 31 else 0,  # UGAVALID
    )


def parse_reads_zeros(capacity: bytes) -> bool:
    """LBPME and LBPRZ of READ CAPACITY(16): provisioning is managed, and what is unmapped reads as zeros.

    In SBC-4 the page's LBPRZ has three bits, and may promise another pattern. The one here means zeros in both.
    """
    return len(capacity) > 14 and capacity[14] & 0xC0 == 0xC0


def parse_lba_status(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """First block, number of blocks, and whether they are deallocated, of each descriptor of GET LBA STATUS.

    "Anchored" blocks read as those that are deallocated do, but take up space.
    """
    told = 4 + int.from_bytes(data[:4], "big")
    for start in range(8, min(told, len(data)) - 15, 16):
        block, count, status = struct.unpack_from(">QIB", data, start)
        yield block, count, status & 0x0F == 1


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
