"""A daemon and a volume that do what a test wants, for what the real ones never do."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from volfs.backends.base import BackendVolume, Extent, Properties
from volfs.errors import BackendError

SECONDS = 10.0  # more than any one answer may take


@contextlib.contextmanager
def fake_daemon(
    directory: Path, *lines: bytes, wait: bool = False, heard: list[bytes] | None = None
) -> Iterator[str]:
    """A socket whose one client gets these lines, one for each it sends, and then the end or, with `wait`, nothing.

    What the client sent is added to `heard`.
    """
    path = str(directory / "control")
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as file, contextlib.suppress(ConnectionError):
            for line in lines:
                request = file.readline()
                if heard is not None:
                    heard.append(request)
                connection.sendall(line)
            if wait:
                done.wait(SECONDS)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            done.set()
            thread.join(SECONDS)


class MemoryVolume(BackendVolume):
    """Bytes in memory. Zeros in whole units of `unit` bytes are a hole until they are written.

    A request takes `seconds`, of virtual time as a rule, and looks or writes at the end of them; `latencies` has others
    for the next ones. One that touches a byte of `bad`, by (operation, offset), fails with that errno.
    """

    def __init__(self, content: bytes, unit: int = 1000, seconds: float = 0.0) -> None:
        self.content = bytearray(content)
        self.properties = Properties(len(content), 1, writable=True)
        self.seconds = seconds
        self.latencies: deque[float] = deque()
        self.bad: dict[tuple[str, int], int] = {}
        self.requests: list[tuple[str, int, int]] = []  # in the order in which they came
        self.under_way = 0
        self.most_under_way = 0
        self.at_once = False  # whether it takes what is started without waiting
        self._unit = unit
        self._written = [any(content[at : at + unit]) for at in range(0, len(content), unit)]

    async def pread(self, offset: int, length: int) -> bytes:
        await self._request("pread", offset, length)
        return bytes(self.content[offset : offset + length])

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        await self._request("pwrite", offset, len(data))
        self._write(offset, data)

    def start_read(self, offset: int, length: int, sink: object) -> bool:
        """`sink` is a list of bytes here."""
        if self.at_once:
            self.requests.append(("start_read", offset, length))
            assert isinstance(sink, list)
            sink.append(bytes(self.content[offset : offset + length]))
        return self.at_once

    def start_write(self, offset: int, data: memoryview) -> bool:
        if self.at_once:
            self.requests.append(("start_write", offset, len(data)))
            self._write(offset, data)
        return self.at_once

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        """As things were when it was asked; one run."""
        assert length > 0, f"extents of {length} bytes at {offset}"
        end, number = offset + length, offset // self._unit
        data = self._written[number]
        while number < len(self._written) and self._written[number] == data and number * self._unit < end:
            number += 1
        answer = [Extent(offset, min(end, number * self._unit) - offset, data)]
        await self._request("extents", offset, answer[0].length)
        return answer

    async def discard(self, offset: int, length: int) -> None:
        await self._request("discard", offset, length)
        self.content[offset : offset + length] = bytes(length)
        for number in range(-(-offset // self._unit), (offset + length) // self._unit):
            self._written[number] = False

    async def flush(self) -> None:
        await self._request("flush", 0, 0)

    async def refresh(self) -> Properties:
        return self.properties

    async def resize(self, size: int) -> None:
        """Cuts off at once, as another client does, but for what is known here."""
        self.properties = replace(self.properties, size=size)

    async def aclose(self) -> None: ...

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        self.content[offset : offset + len(data)] = data
        for number in range(offset // self._unit, (offset + len(data) - 1) // self._unit + 1):
            self._written[number] = True

    async def _request(self, operation: str, offset: int, length: int) -> None:
        self.requests.append((operation, offset, length))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await trio.sleep(self.latencies.popleft() if self.latencies else self.seconds)
        finally:
            self.under_way -= 1
        for (bad, at), number in self.bad.items():
            if bad == operation and offset <= at < offset + max(length, 1):
                raise BackendError(f"injected: {operation} of {length} bytes at {offset}", number)
        if offset + length > self.properties.size:
            raise BackendError(f"{operation} at {offset}: past the end", errno.EIO)
