"""An iSCSI target in the test's own process: one LUN in memory that offers, refuses and forgets what it is told to.

For what no real target here does. It speaks as much of RFC 7143 as libiscsi needs: a login without a secret, immediate
data only, no digests, no R2T, no task management. What it gets that it does not expect ends the connection, which the
test sees as an error.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import trio

IQN = "iqn.2026-01.org.volfs:scripted"
JUNK = 0xAA  # what unmapped blocks read as where zeros are not promised
UNIT_ATTENTION = (0x6, 0x2900)
INVALID_OPCODE = (0x5, 0x2000)
INVALID_FIELD = (0x5, 0x2400)
OUT_OF_RANGE = (0x5, 0x2100)

NAMES = {
    **{
        0x00: "TEST UNIT READY",
        0x12: "INQUIRY",
        0x1A: "MODE SENSE",
        0x25: "READ CAPACITY(10)",
        0x28: "READ(10)",
    },
    **{0x2A: "WRITE(10)", 0x35: "SYNCHRONIZE CACHE", 0x41: "WRITE SAME(10)", 0x42: "UNMAP", 0x88: "READ"},
    **{
        0x8A: "WRITE",
        0x91: "SYNCHRONIZE CACHE",
        0x93: "WRITE SAME",
        0x9E10: "READ CAPACITY",
        0x9E12: "GET LBA STATUS",
    },
}

Sense = tuple[int, int]  # key; additional code and qualifier


class Refused(Exception):
    def __init__(self, sense: Sense) -> None:
        super().__init__(sense)
        self.sense = sense


@dataclass(frozen=True)
class Call:
    """A command as it came. UNMAP has the range of its one descriptor."""

    name: str
    block: int = 0
    blocks: int = 0
    unmap: bool = False  # the bit of WRITE SAME

    @property
    def end(self) -> int:
        return self.block + self.blocks


@dataclass
class ScriptedDisk:
    """What the LUN is and does; all of it may be changed at any time. Sizes in blocks."""

    blocks: int = 4096
    block_size: int = 512
    lbpme: bool = True
    lbprz: bool = True
    lbpu: bool = True
    lbpws: bool = True
    lbpws10: bool = True
    max_unmap: int = 0xFFFFFFFF
    max_write_same: int = 0
    granularity: int = 1  # only whole units of so many blocks are unmapped
    alignment: int = 0
    volatile_cache: bool = True
    refuses: dict[str, Sense] = field(default_factory=dict)  # by the name of the command
    ignores_unmap: bool = False  # succeeds, and does nothing
    unreported_max: int = 0  # WRITE SAME of more blocks is refused, but no page says so
    status: Callable[[int], bytes] | None = (
        None  # in place of the descriptors of GET LBA STATUS from a block on
    )
    # Called before a command is carried out. When it returns False, the connection breaks in place of an answer.
    before: Callable[[Call], bool] | None = None
    after: Callable[[Call], bool] | None = None  # as `before`, when it has been carried out

    calls: list[Call] = field(default_factory=list)  # all but those that ask what it is

    def __post_init__(self) -> None:
        self.content = bytearray(self.blocks * self.block_size)
        self.mapped = bytearray(self.blocks)
        self._stable = (bytes(self.content), bytes(self.mapped))

    def fill(self, data: bytes) -> None:
        """Mapped and stable data, from the first block on."""
        self.content[: len(data)] = data
        self.mapped[: len(data) // self.block_size] = b"\1" * (len(data) // self.block_size)
        self.settle()

    def settle(self) -> None:
        self._stable = (bytes(self.content), bytes(self.mapped))

    def forget(self) -> None:
        """What a cache does when the power fails."""
        content, mapped = self._stable
        self.content[:], self.mapped[:] = content, mapped

    def called(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]

    def carry_out(self, call: Call, cdb: bytes, data: bytes) -> bytes:
        """Returns what the command reads. Refused."""
        if call.name in self.refuses:
            raise Refused(self.refuses[call.name])
        if call.end > self.blocks:
            raise Refused(OUT_OF_RANGE)
        match call.name:
            case "TEST UNIT READY":
                return b""
            case "INQUIRY":
                return self._inquiry(cdb)
            case "MODE SENSE":
                return bytes([3 + 20, 0, 0, 0, 0x08, 18, 0x04 * self.volatile_cache]) + bytes(17)
            case "READ CAPACITY":
                bits = 0x80 * self.lbpme | 0x40 * self.lbprz
                return struct.pack(">QIBBBB", self.blocks - 1, self.block_size, 0, 0, bits, 0) + bytes(16)
            case "READ CAPACITY(10)":
                return struct.pack(">II", self.blocks - 1, self.block_size)
            case "READ" | "READ(10)":
                return bytes(self.content[self._bytes(call)])
            case "WRITE" | "WRITE(10)":
                assert len(data) == call.blocks * self.block_size
                self.content[self._bytes(call)] = data
                self.mapped[call.block : call.end] = b"\1" * call.blocks
            case "WRITE SAME" | "WRITE SAME(10)":
                self._write_same(call, data)
            case "UNMAP":
                assert self.lbpu
                if call.blocks > self.max_unmap:
                    raise Refused((0x5, 0x2600))
                if not self.ignores_unmap:
                    self._unmap(call)
            case "GET LBA STATUS":
                return self._lba_status(call.block)[: int.from_bytes(cdb[10:14], "big")]
            case "SYNCHRONIZE CACHE":
                self.settle()
        return b""

    def parse(self, cdb: bytes, data: bytes) -> Call:
        opcode = cdb[0] << 8 | cdb[1] & 0x1F if cdb[0] == 0x9E else cdb[0]
        if opcode not in NAMES:
            raise Refused(INVALID_OPCODE)
        name = NAMES[opcode]
        call = Call(name)
        if opcode == 0x42:
            assert len(data) == 24
            assert data[:4] == bytes([0, 22, 0, 16])
            call = Call(name, *struct.unpack_from(">QI", data, 8))
        elif opcode == 0x9E12:
            call = Call(name, int.from_bytes(cdb[2:10], "big"))
        elif opcode in (0x88, 0x8A, 0x93):
            call = Call(name, *struct.unpack_from(">QI", cdb, 2), unmap=bool(cdb[1] & 0x08))
        elif opcode in (0x28, 0x2A, 0x41):
            call = Call(name, *struct.unpack(">xxIxHx", cdb[:10]), unmap=bool(cdb[1] & 0x08))
        if opcode not in (0x00, 0x12, 0x1A):
            self.calls.append(call)
        return call

    def _inquiry(self, cdb: bytes) -> bytes:
        if not cdb[1] & 1:
            return bytes([0, 0, 6, 2, 31, 0, 0, 2]) + b"VOLFS   " + b"SCRIPTED        " + b"1   "
        pages = {
            0x00: bytes([0x00, 0x80, 0xB0, 0xB2]),
            0x80: b"scripted",
            0xB0: bytes(16)
            + struct.pack(
                *(
                    ">IIIIQ",
                    self.max_unmap,
                    1,
                    self.granularity,
                    self.alignment | 1 << 31,
                    self.max_write_same,
                )
            )
            + bytes(20),
            0xB2: bytes(
                [0, 0x80 * self.lbpu | 0x40 * self.lbpws | 0x20 * self.lbpws10 | 0x04 * self.lbprz, 2, 0]
            ),
        }
        if cdb[2] not in pages:
            raise Refused(INVALID_FIELD)
        return struct.pack(">BBH", 0, cdb[2], len(pages[cdb[2]])) + pages[cdb[2]]

    def _bytes(self, call: Call) -> slice:
        return slice(call.block * self.block_size, call.end * self.block_size)

    def _write_same(self, call: Call, data: bytes) -> None:
        assert len(data) == self.block_size
        assert call.blocks, "0 blocks mean: to the end"
        may_unmap = self.lbpws10 if call.name == "WRITE SAME(10)" else self.lbpws
        most = min(limit for limit in (self.max_write_same, self.unreported_max, self.blocks) if limit)
        if (call.unmap and not (self.lbpme and may_unmap)) or call.blocks > most:
            raise Refused(INVALID_FIELD)
        self.content[self._bytes(call)] = data * call.blocks
        self.mapped[call.block : call.end] = b"\1" * call.blocks
        if call.unmap:
            self._unmap(call)

    def _unmap(self, call: Call) -> None:
        """Whole units; what there is besides stays mapped, with its content."""
        unit, start = self.granularity, self.alignment
        first, end = (
            -(-(call.block - start) // unit) * unit + start,
            (call.end - start) // unit * unit + start,
        )
        if first < end:
            self.mapped[first:end] = bytes(end - first)
            reads = 0 if self.lbprz else JUNK
            self.content[first * self.block_size : end * self.block_size] = bytes([reads]) * (
                (end - first) * self.block_size
            )

    def _lba_status(self, block: int) -> bytes:
        if self.status is not None:
            descriptors = self.status(block)
        else:
            descriptors = b""
            while block < self.blocks:
                state = self.mapped[block]
                end = self.mapped.find(1 - state, block)
                end = self.blocks if end < 0 else end
                descriptors += descriptor(block, end - block, 0 if state else 1)
                block = end
        return struct.pack(">II", len(descriptors) + 4, 0) + descriptors


def descriptor(block: int, blocks: int, status: int) -> bytes:
    """Of GET LBA STATUS; status 0 is mapped or unknown, 1 deallocated, 2 anchored."""
    return struct.pack(">QIB3x", block, blocks, status)


class ScriptedTarget:
    """Serves one disk as LUN 1."""

    def __init__(self, disk: ScriptedDisk) -> None:
        self.disk = disk
        self.port = 0
        self.logins = 0

    @property
    def url(self) -> str:
        return f"//127.0.0.1:{self.port}/{IQN}/1"

    async def serve(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                await _Connection(self, stream).run()


class _Connection:
    def __init__(self, target: ScriptedTarget, stream: trio.SocketStream) -> None:
        self.disk = target.disk
        self.target = target
        self.stream = stream
        self.received = bytearray()
        self.stat_sn = 1
        self.greeted = False

    async def run(self) -> None:
        while header := await self._receive(48):
            length = int.from_bytes(header[5:8], "big")
            data = (await self._receive(-(-length // 4) * 4))[:length]
            match header[0] & 0x3F:
                case 0x00:  # NOP-Out
                    if header[16:20] != b"\xff\xff\xff\xff":
                        await self._send(0x20, header, 0x80, target_tag=b"\xff\xff\xff\xff")
                case 0x01:
                    if not await self._command(header, data):
                        return
                case 0x03:
                    await self._log_in(header, data)
                case 0x06:
                    await self._send(0x26, header, 0x80)
                    return
                case unexpected:
                    raise AssertionError(f"opcode {unexpected:#x}")

    async def _receive(self, length: int) -> bytes:
        """b"" at the end."""
        while len(self.received) < length:
            part = await self.stream.receive_some()
            if not part:
                return b""
            self.received += part
        taken = bytes(self.received[:length])
        del self.received[:length]
        return taken

    async def _log_in(self, header: bytes, data: bytes) -> None:
        """Agree to each stage at once (RFC 7143 11.12 and 11.13)."""
        answers = {
            b"AuthMethod": b"None",
            b"HeaderDigest": b"None",
            b"DataDigest": b"None",
            b"InitialR2T": b"No",
            b"ImmediateData": b"Yes",
            b"FirstBurstLength": b"1048576",
            b"MaxBurstLength": b"1048576",
            b"MaxRecvDataSegmentLength": b"1048576",
        }
        asked = [pair.partition(b"=")[0] for pair in data.split(b"\0") if pair]
        text = b"".join(key + b"=" + answers[key] + b"\0" for key in asked if key in answers)
        if header[1] & 0x03 == 3:
            self.target.logins += 1
        body = text + (b"TargetPortalGroupTag=1\0" if b"TargetName" in asked else b"")
        # The request's ISID, and a TSIH of our own.
        await self._send(0x23, header, header[1], data=body, lun=header[8:14] + b"\0\1")

    async def _command(self, header: bytes, data: bytes) -> bool:
        """False when the connection is to break."""
        expected, cdb, sense = int.from_bytes(header[20:24], "big"), header[32:48], None
        answer = b""
        try:
            if not self.greeted:  # as every target greets a new session
                self.greeted = True
                raise Refused(UNIT_ATTENTION)
            if header[1] & 0x20:
                assert len(data) == expected, f"{len(data)} bytes of {expected} came with the command"
            call = self.disk.parse(cdb, data)
            if self.disk.before is not None and not self.disk.before(call):
                return False
            answer = self.disk.carry_out(call, cdb, data)[:expected]
            if self.disk.after is not None and not self.disk.after(call):
                return False
        except Refused as refused:
            sense = refused.sense
        if sense is not None:
            fixed = bytes(
                [0x70, 0, sense[0], 0, 0, 0, 0, 10, 0, 0, 0, 0, sense[1] >> 8, sense[1] & 0xFF]
            ) + bytes(4)
            await self._send(0x21, header, 0x80, status=0x02, data=len(fixed).to_bytes(2, "big") + fixed)
        elif header[1] & 0x40 and answer:
            missing = expected - len(answer)
            await self._send(0x25, header, 0x81 | 0x02 * bool(missing), data=answer, residual=missing)
        else:
            missing = expected if header[1] & 0x40 else 0
            await self._send(0x21, header, 0x80 | 0x02 * bool(missing), residual=missing)
        return True

    async def _send(
        self,
        opcode: int,
        request: bytes,
        flags: int,
        *,
        status: int = 0,
        data: bytes = b"",
        lun: bytes = bytes(8),
        target_tag: bytes = bytes(4),
        residual: int = 0,
    ) -> None:
        """A response in the form that they share: status numbers and a data segment (RFC 7143 11.1)."""
        expected = int.from_bytes(request[24:28], "big") + (
            not request[0] & 0x40
        )  # "immediate" takes no number
        header = struct.pack(">BBBB", opcode, flags, 0, status) + len(data).to_bytes(4, "big") + lun
        header += request[16:20] + target_tag
        header += struct.pack(">III", self.stat_sn, expected, expected + 64)
        header += struct.pack(">III", 0, 0, residual)
        if opcode == 0x23:
            header = header[:36] + bytes(12)  # success
        self.stat_sn += 1
        await self.stream.send_all(header + data + bytes(-len(data) % 4))


@contextlib.asynccontextmanager
async def serving(disk: ScriptedDisk) -> AsyncIterator[ScriptedTarget]:
    target = ScriptedTarget(disk)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, target.serve, 0)
        target.port = listeners[0].socket.getsockname()[1]
        yield target
        nursery.cancel_scope.cancel()
