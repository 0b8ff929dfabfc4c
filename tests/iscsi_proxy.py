"""A TCP proxy between an initiator and a target that knows where iSCSI's PDUs begin, and does harm there.

It runs in threads, since the initiator is a daemon, another process, and the tests that watch it do not run on a loop.
It expects what volfs negotiates by default: no digests. The numbers are those of RFC 7143 (11.2, 11.3, 11.4, 11.7)
and of SPC and SBC for commands and sense data.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from mounts import wait_until

HEADER = 48
COMMAND, DATA_OUT = 0x01, 0x05  # from the initiator
RESPONSE, DATA_IN = 0x21, 0x25  # from the target
STATUS_HERE = 0x01  # in the flags of a Data-In PDU: it is the command's last, and tells its status
FINAL = 0x80

READS, WRITES, FLUSHES = frozenset({0x28, 0x88}), frozenset({0x2A, 0x8A}), frozenset({0x35, 0x91})

CHECK_CONDITION, BUSY, RESERVATION_CONFLICT, TASK_SET_FULL = 0x02, 0x08, 0x18, 0x28  # SCSI status
MEDIUM_ERROR, NO_SPACE = (0x3, 0x1100), (0x7, 0x2707)  # sense key; additional code and qualifier

FOR_EVER = 1 << 30


@dataclass
class Answer:
    """What the initiator is told of commands, in place of how they went: the target has carried them out."""

    commands: frozenset[int]  # operation codes
    status: int
    sense: tuple[int, int] | None = None
    block: int | None = None  # only where the command's range has it
    times: int = FOR_EVER
    given: int = 0

    def is_for(self, cdb: bytes) -> bool:
        return self.given < self.times and cdb[0] in self.commands and self._hits(cdb)

    def _hits(self, cdb: bytes) -> bool:
        if self.block is None:
            return True
        layout, at = (">QI", 2) if cdb[0] >= 0x80 else (">IxH", 2)
        first, blocks = struct.unpack_from(layout, cdb, at)
        return bool(first <= self.block < first + blocks)

    def pdu(self, header: bytes) -> bytes:
        """A SCSI Response with the numbers of the PDU that it stands for."""
        data = b""
        if self.sense is not None:
            key, code = self.sense
            data = bytes([0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code >> 8, code & 0xFF]) + bytes(4)
            data = len(data).to_bytes(2, "big") + data
        first = struct.pack(">BBBB", RESPONSE, FINAL, 0, self.status) + len(data).to_bytes(4, "big")
        numbers = header[24:36]  # StatSN, ExpCmdSN, MaxCmdSN
        return (
            first + bytes(8) + header[16:20] + bytes(4) + numbers + bytes(12) + data + bytes(-len(data) % 4)
        )


@dataclass(eq=False)
class _Connection:
    initiator: socket.socket
    target: socket.socket
    told: dict[bytes, Answer] = field(default_factory=dict)  # by initiator task tag
    hushed: bool = False  # passes nothing on any more, and stays

    def close(self) -> None:
        for end in (self.initiator, self.target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class IscsiProxy:
    """Passes connections on, until told otherwise. All of it may be called from any thread."""

    def __init__(self, to: int) -> None:
        self.connections = 0  # ever made
        self.cuts = 0  # PDUs of which only a half has been passed on
        self._to = to
        self._answers: list[Answer] = []
        self._cut_after = 0  # so many PDUs to be passed on whole, counted down
        self._cut: int | None = None  # kind of PDU to be cut in half, once
        self._open: set[_Connection] = set()
        self._lock = threading.Lock()
        self._speaking = threading.Event()
        self._speaking.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(
        self, commands: frozenset[int], status: int, sense: tuple[int, int] | None = None, **more: int
    ) -> Answer:
        """From now on, until `heal`."""
        made = Answer(commands, status, sense, **more)
        with self._lock:
            self._answers.append(made)
        return made

    def cut(self, kind: int, after: int = 0) -> None:
        """Of the next PDU of that kind pass on the first half, and then nothing more on its connection.

        New connections work. `after`: leave so many of that kind whole before.
        """
        with self._lock:
            self._cut, self._cut_after = kind, after

    def silence(self) -> None:
        """Keep connections, and take new ones, but pass nothing on."""
        self._speaking.clear()

    def heal(self) -> None:
        with self._lock:
            self._answers.clear()
            self._cut = None
        self._speaking.set()

    def drop(self) -> None:
        """Break the connections."""
        with self._lock:
            for connection in self._open:
                connection.close()

    def close(self) -> None:
        self._speaking.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                initiator, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                target = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                initiator.close()
                continue
            for end in (initiator, target):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(initiator, target)
            with self._lock:
                self._open.add(connection)
            for out in (True, False):
                thread = threading.Thread(target=self._pass, args=(connection, out))
                self._threads.append(thread)
                thread.start()

    def _pass(self, connection: _Connection, out: bool) -> None:
        come, go = (
            (connection.initiator, connection.target) if out else (connection.target, connection.initiator)
        )
        try:
            with come.makefile("rb") as stream:
                while pdu := _read_pdu(stream):
                    self._speaking.wait()
                    pdu = self._look(connection, pdu, out)
                    half = self._is_cut(pdu)
                    if not connection.hushed:
                        go.sendall(pdu[: len(pdu) // 2] if half else pdu)
                    if half:
                        connection.hushed = True
                        self.cuts += 1
        except OSError:
            pass
        finally:
            with self._lock:
                last = connection not in self._open
                self._open.discard(connection)
            connection.close()
            if last:  # the other direction's thread has ended, or soon will
                go.close()
                come.close()

    def _look(self, connection: _Connection, pdu: bytes, out: bool) -> bytes:
        """The PDU to pass on in its place; b"" for none."""
        kind, tag = pdu[0] & 0x3F, pdu[16:20]
        with self._lock:
            if out:
                if kind == COMMAND:
                    connection.told.pop(tag, None)
                    for answer in self._answers:
                        if answer.is_for(pdu[32:48]):
                            answer.given += 1
                            connection.told[tag] = answer
                            break
                return pdu
            told = connection.told.get(tag)
            if told is None or kind not in (RESPONSE, DATA_IN):
                return pdu
            if kind == DATA_IN and not pdu[1] & STATUS_HERE:
                return b""
            return told.pdu(pdu)

    def _is_cut(self, pdu: bytes) -> bool:
        with self._lock:
            if not pdu or pdu[0] & 0x3F != self._cut or len(pdu) == HEADER:
                return False
            self._cut_after -= 1
            if self._cut_after >= 0:
                return False
            self._cut = None
            return True


def _read_pdu(stream: socket.SocketIO | object) -> bytes:
    """A whole one, with its padding; b"" at the end of the stream."""
    read = stream.read  # type: ignore[attr-defined, union-attr]
    header: bytes = read(HEADER)
    if len(header) < HEADER:
        return b""
    length = header[4] * 4 + -(-int.from_bytes(header[5:8], "big") // 4) * 4
    data: bytes = read(length)
    return header + data if len(data) == length else b""


@contextlib.contextmanager
def iscsi_proxy(portal: str) -> Iterator[IscsiProxy]:
    """Between `portal`, of this machine, and who asks the proxy's in its place."""
    made = IscsiProxy(int(portal.rpartition(":")[2]))
    try:
        yield made
    finally:
        made.close()
        wait_until(lambda: not any(it.is_alive() for it in made._threads), "the proxy's threads have ended")
