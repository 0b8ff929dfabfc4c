"""A daemon that says what a test wants, for what the real one never does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

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
