"""A tgtd of a test's own, which may be stopped, killed and restarted; and a TCP proxy that misbehaves on request.

The standing services (services.py) are shared between tests, so nobody may do such things to them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio
from services import SLOWER, skip_or_fail

START_SECONDS = 10 * SLOWER
IQN = "iqn.2026-01.org.volfs:test"


class Stoppable:
    """A process of a test's that may be killed, or stand still."""

    process: subprocess.Popen[bytes] | None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self, paused: bool = True) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)


@dataclass
class Tgtd(Stoppable):
    """One daemon with any number of targets; they are named again after each restart, as tgtd forgets them."""

    directory: Path
    port: int
    commands: list[tuple[str, ...]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    targets: int = 0

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TGT_IPC_SOCKET": str(self.directory / "s")}

    def start(self) -> None:
        self.process = subprocess.Popen(
            # It must not outlive tests that are killed.
            [*["setpriv", "--pdeathsig", "KILL", "tgtd", "-f", "--iscsi"], f"portal={self.portal}"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while self._tgtadm("--mode", "sys", "--op", "show").returncode:
            assert self.process.poll() is None, "tgtd ended by itself"
            assert time.monotonic() < deadline, "tgtd does not answer"
            time.sleep(0.01)
        for command in self.commands:
            self.run(*command)

    def run(self, *arguments: str) -> str:
        """tgtadm, which has to succeed."""
        done = self._tgtadm(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def keep(self, *arguments: str) -> None:
        """As `run`, now and after each restart."""
        self.run(*arguments)
        self.commands.append(arguments)

    def target(self, iqn: str = IQN) -> Target:
        self.targets += 1
        target = Target(self, str(self.targets), iqn)
        self.keep("--mode", "target", "--op", "new", "--tid", target.tid, "--targetname", iqn)
        self.keep("--mode", "target", "--op", "bind", "--tid", target.tid, "--initiator-address", "ALL")
        return target

    def _tgtadm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["tgtadm", "--lld", "iscsi", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )


@dataclass
class Target:
    tgtd: Tgtd
    tid: str
    iqn: str
    luns: int = 0

    def url(self, lun: int = 1, portal: str = "") -> str:
        return f"//{portal or self.tgtd.portal}/{self.iqn}/{lun}"

    def lun(self, size: int, *, sector_size: int = 512, **parameters: str) -> Path:
        """A new LUN (the first is number 1), zero-filled; returns its backing file."""
        self.luns += 1
        backing = self.tgtd.directory / f"{self.tid}-{self.luns}"
        with backing.open("wb") as file:
            file.truncate(size)
        unit = ("--mode", "logicalunit", "--tid", self.tid, "--lun", str(self.luns))
        self.tgtd.keep(*unit, "--op", "new", "--backing-store", str(backing), "--blocksize", str(sector_size))
        if parameters:
            self.update(self.luns, keep=True, **parameters)
        return backing

    def update(self, lun: int, *, keep: bool = False, **parameters: str) -> None:
        call = self.tgtd.keep if keep else self.tgtd.run
        text = ",".join(f"{key}={value}" for key, value in parameters.items())
        unit = ("--mode", "logicalunit", "--tid", self.tid, "--lun", str(lun))
        call(*unit, "--op", "update", "--params", text)

    def account(self, user: str, secret: str, *, outgoing: bool = False) -> None:
        account = ("--mode", "account", "--user", user)
        self.tgtd.keep(*account, "--op", "new", "--password", secret)
        direction = ("--outgoing",) if outgoing else ()
        self.tgtd.keep(*account, "--op", "bind", "--tid", self.tid, *direction)

    def sessions(self) -> int:
        """How many initiators are logged in."""
        shown = self.tgtd.run("--mode", "target", "--op", "show")
        mine = re.search(rf"^Target {self.tid}: .*?(?=^Target |\Z)", shown, re.MULTILINE | re.DOTALL)
        assert mine is not None
        return mine[0].count("I_T nexus: ")


@contextlib.contextmanager
def running_tgtd(directory: str | None = None) -> Iterator[Tgtd]:
    """Its volumes are below `directory`; a disk that others use, too, may take seconds for a flush."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if not shutil.which("tgtd"):
        skip_or_fail("iscsi", "tgtd is not installed (scripts/setup)")
    with tempfile.TemporaryDirectory(
        prefix="tgt", dir=directory
    ) as made:  # short: a socket's path has room for 107 bytes
        tgtd = Tgtd(Path(made), free_port())
        try:
            tgtd.start()
            yield tgtd
        finally:
            if tgtd.process is not None:
                tgtd.kill()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Proxy:
    """Passes TCP connections on to a port, until told otherwise."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = 0
        self.connections = 0  # ever made
        self.answers = bytearray()  # the first kilobytes that the other side sent
        self.drop_after: int | None = None  # bytes from the initiator until the connection breaks
        self._open: list[tuple[trio.SocketStream, trio.SocketStream]] = []
        self._passing = trio.Event()
        self._passing.set()

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self.port}"

    def silence(self) -> None:
        """Keep connections, and take new ones, but pass nothing on."""
        self._passing = trio.Event()

    def speak(self) -> None:
        self._passing.set()

    def drop(self) -> None:
        """Break the connections, as a cut cable's end does when it notices: by a reset."""
        for streams in self._open:
            for stream in streams:
                reset = struct.pack("ii", 1, 0)  # SO_LINGER of 0 seconds
                with contextlib.suppress(OSError):  # closed already
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                stream.socket.close()
        self._open.clear()

    async def serve(self, client: trio.SocketStream) -> None:
        self.connections += 1
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.to)
        except OSError:
            await client.aclose()
            return
        self._open.append((client, server))
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, client, server, True, nursery.cancel_scope)
            nursery.start_soon(self._pass, server, client, False, nursery.cancel_scope)

    async def _pass(
        self, come: trio.SocketStream, go: trio.SocketStream, out: bool, scope: trio.CancelScope
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in come:
                await self._passing.wait()
                if not out and len(self.answers) < 8192:
                    self.answers += data
                if out and self.drop_after is not None:
                    self.drop_after -= len(data)
                    if self.drop_after < 0:
                        self.drop_after = None
                        self.drop()
                        break
                await go.send_all(data)
        scope.cancel()


@contextlib.asynccontextmanager
async def proxy(to: int) -> AsyncIterator[Proxy]:
    made = Proxy(to)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, made.serve, 0)
        made.port = listeners[0].socket.getsockname()[1]
        yield made
        nursery.cancel_scope.cancel()
