"""The daemon: start and stop order, signals, readiness, and what clients' requests do.

Start: control socket, cleaning up what a killed daemon left, backends (not connected), mount, main loop, ready. Stop
is the start read backwards, with every volume flushed and closed before the mount goes; whatever fails then is counted
and decides the exit code.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import trio

from volfs import control, recovery
from volfs.attached import Attachment, Attachments
from volfs.backends.registry import Backends
from volfs.config import Config
from volfs.control_server import Client, ControlServer, control_socket
from volfs.errors import ControlError, VolfsError, VolumeNotFound
from volfs.fuse import session
from volfs.fuse.filesystem import Access, Filesystem, write_back
from volfs.fuse.handles import OpenFile, OpenFiles
from volfs.fuse.tree import ATTACHED, Tree
from volfs.source import parse_connection_info, parse_source
from volfs.version import VERSION
from volfs.volume import VolumeTable

log = logging.getLogger(__name__)

LAST_REPLIES_SECONDS = 10.0
WRITE_BACK_SECONDS = 30.0
# For how long Python may keep librbd's threads from telling that something is done, which they also send with.
SWITCH_SECONDS = 0.0001


async def run(
    config: Config, mountpoint: str, socket_path: str, *, exit_idle: float | None, ready: Callable[[], None]
) -> list[VolfsError]:
    """Serve `mountpoint` until unmounted or told to stop; returns what could not be flushed or closed.

    `ready` is called when I/O works. With `exit_idle`, ends after that many seconds without a client, an attached
    or an open volume. MountError, ControlError, ConfigError before that.
    """
    session.prepare_mountpoint(mountpoint)
    sys.setswitchinterval(SWITCH_SECONDS)
    # From before the mount on: a signal by its default action would leave the mount behind, dead.
    with (
        control_socket(socket_path) as listener,
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals,
    ):
        # A signal that comes meanwhile waits, and is obeyed as soon as there is a main loop that can be ended.
        await recovery.clean_up()
        daemon = Daemon(config, mountpoint, socket_path)
        filesystem = daemon.filesystem()
        try:
            with session.mounted(filesystem, mountpoint, allow_other=config.mount.allow_other) as requests:
                server = ControlServer(daemon.handle, daemon.goodbye)
                async with trio.open_nursery() as nursery:
                    daemon.background = nursery
                    nursery.start_soon(server.serve, listener)
                    nursery.start_soon(daemon.stop_on_signal, signals)
                    nursery.start_soon(_announce, config, mountpoint, ready)
                    if exit_idle is not None:
                        nursery.start_soon(daemon.stop_when_idle, exit_idle)
                    try:
                        await session.serve(requests)
                    finally:
                        await daemon.close_volumes()
                    # Only now may `volfs umount` have its answer.
                    with trio.move_on_after(LAST_REPLIES_SECONDS):
                        server.stop()
                        await server.stopped.wait()
                    nursery.cancel_scope.cancel()
        finally:
            await daemon.backends.aclose()
        return daemon.errors


async def _read_ahead(task: Callable[[], Awaitable[None]]) -> None:
    """Run what nobody waits for, and whose failure is nobody's: the daemon goes on."""
    try:
        await task()
    except Exception:
        log.exception("read-ahead: unexpected error; a bug in volfs")


class Daemon:
    """What the daemon serves, and the answers to its clients' requests."""

    background: trio.Nursery

    def __init__(self, config: Config, mountpoint: str, socket_path: str) -> None:
        self._config = config
        self._mountpoint = mountpoint
        self._socket_path = socket_path
        self._configured = config.make_backends()
        self.backends = Backends(self._configured)
        self._volumes = VolumeTable(self.backends)
        self._attachments = Attachments(self.backends)
        self._files = OpenFiles(
            self._volumes, config.mount.read_ahead, lambda task: self.background.start_soon(_read_ahead, task)
        )
        self._clients: set[Client] = set()
        self._clients_seen = 0
        self._stopping = False
        self._closed = trio.Event()
        self.errors: list[VolfsError] = []

    def filesystem(self) -> Filesystem:
        mount = self._config.mount
        access = Access(mount.resolve_uid(), mount.resolve_gid(), mount.resolve_mode(), mount.read_only)
        tree = Tree(self._configured, self._attachments)
        return Filesystem(tree, self._volumes, self._files, access, self._socket_path)

    async def close_volumes(self) -> None:
        """Flush and close all volumes. The main loop has ended, so no request can come."""
        with trio.CancelScope(shield=True):
            self.errors = await self._volumes.aclose()
        for error in self.errors:
            log.error("not everything reached the backend: %s", error)
        self._closed.set()

    async def stop(self) -> None:
        """End, after the kernel has written back what programs changed by mmap."""
        self._stopping = True
        with trio.move_on_after(WRITE_BACK_SECONDS) as scope:
            for inode in self._files.written_inodes():
                await write_back(inode)
        if scope.cancelled_caught:
            log.error("the kernel has not written back everything in %g s", WRITE_BACK_SECONDS)
        session.stop()

    async def stop_on_signal(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            await self.stop()

    async def stop_when_idle(self, seconds: float) -> None:
        """Stop when nothing was attached, open or connected for so long; it takes up to twice that to notice."""
        before = -1
        while not self._idle() or before != self._uses():
            before = self._uses()
            await trio.sleep(seconds)
        log.info("idle for %g s: stopping", seconds)
        await self.stop()

    def _idle(self) -> bool:
        return not (self._clients or len(self._attachments) or any(True for _ in self._volumes))

    def _uses(self) -> int:
        return self._clients_seen + self._volumes.opens

    async def handle(self, client: Client, request: control.Request) -> control.Reply:
        match request:
            case control.Hello():
                self._clients.add(client)
                self._clients_seen += 1
                return control.Welcome(mountpoint=self._mountpoint, pid=os.getpid())
            case control.Attach():
                return await self._attach(client, request)
            case control.Detach():
                return await self._detach(client, request)
            case control.Status():
                return self._status(request)
            case control.Unmount():
                return await self._unmount(request)

    async def goodbye(self, client: Client) -> None:
        """A client is gone: its leases end, each when the last file handle on its volume is closed."""
        self._clients.discard(client)
        for lease in client.leases:
            attachment = self._attachments.give_up(lease)
            if attachment is not None:
                self.background.start_soon(self._remove_when_unused, attachment)

    async def _attach(self, client: Client, request: control.Attach) -> control.Attached:
        if (request.source is None) == (request.connection_info is None):
            raise ControlError("attach: expected either a source or a connection info", errno.EINVAL)
        if self._stopping:
            raise ControlError("the daemon is stopping", errno.ECONNRESET)  # a client then starts another
        if request.source is not None:
            source = parse_source(request.source, request.environment)
        else:
            source = parse_connection_info(request.connection_info, request.environment)
        attachment, lease = await self._attachments.attach(source, request.name)
        if request.hold:
            client.leases.add(lease)
        info = attachment.info
        if request.blank and attachment.leases == {lease}:
            self._volumes.promise_blank(attachment.backend, info.source, info.size)
        return control.Attached(
            name=attachment.name,
            path=os.path.join(self._mountpoint, ATTACHED, attachment.name),
            source=info.source.url,
            driver=info.source.driver,
            size=info.size,
            lease=lease,
        )

    async def _detach(self, client: Client, request: control.Detach) -> control.Done:
        if request.lease is not None:
            attachment = self._attachments.of_lease(request.lease)
            if request.lease not in client.leases:
                raise VolumeNotFound(f"lease {request.lease}: this client holds no such lease")
            if attachment is None:  # `volfs detach` took it away before
                return control.Done()
            # Of several leases of one process on one volume, by whatever name, the last one waits for its handles.
            leases = {lease for it in self._attachments if it.same_volume(attachment) for lease in it.leases}
            if request.all_handles and leases == {request.lease}:
                await self._wait_for_handles(attachment, request.wait, None)
            elif not any(
                other is not client and other.pid == client.pid and other.leases & leases
                for other in self._clients
            ):
                await self._wait_for_handles(attachment, request.wait, client.pid)
            client.leases.discard(request.lease)
            self._attachments.give_up(request.lease)
            if self._handles(attachment):  # of other processes
                self.background.start_soon(self._remove_when_unused, attachment)
            else:
                await self._remove_unleased(attachment)
        else:
            attachment = self._named(request.name or "")
            await self._wait_for_handles(attachment, request.wait, None)
            attachment.leases.clear()
            await self._remove_unleased(attachment)
        failure = self._volumes.take_failure(attachment.backend, attachment.info.source)
        if failure is not None:
            raise failure
        return control.Done()

    def _named(self, name: str) -> Attachment:
        directory = os.path.join(self._mountpoint, ATTACHED, "")
        attachment = self._attachments.find(name.removeprefix(directory))
        if attachment is None:
            raise VolumeNotFound(f"{name}: nothing of that name, URL or path is attached")
        return attachment

    def _handles(self, attachment: Attachment, closing_pid: int | None = None) -> list[OpenFile]:
        """The handles on the attached volume: all, or those that a process is closing."""
        files = self._files.of(attachment.backend, attachment.info.source)
        return [file for file in files if closing_pid is None or (file.closing and file.pid == closing_pid)]

    async def _wait_for_handles(self, attachment: Attachment, seconds: float, pid: int | None) -> None:
        """Wait for the handles that process `pid` is closing, or all, to be closed. EBUSY after `seconds`.

        close(2) returns before the kernel tells of the release, so even a good client's detach comes early.
        """
        source = attachment.info.source

        def released() -> bool:
            if self._handles(attachment, pid):
                return False
            return bool(self._handles(attachment)) or not self._volumes.in_use(attachment.backend, source)

        with trio.move_on_after(seconds) as scope:
            await self._volumes.wait_changed(released)
        if scope.cancelled_caught:
            pids = sorted({file.pid for file in self._handles(attachment, pid)})
            raise VolfsError(
                f"{attachment.name}: still open by process {', '.join(map(str, pids)) or 'unknown'}",
                errno.EBUSY,
            )

    async def _remove_when_unused(self, attachment: Attachment) -> None:
        source = attachment.info.source
        await self._volumes.wait_changed(lambda: not self._volumes.in_use(attachment.backend, source))
        await self._remove_unleased(attachment)

    async def _remove_unleased(self, attachment: Attachment) -> None:
        if not attachment.leases:
            self._volumes.forget_blank(attachment.backend, attachment.info.source)
        await self._attachments.remove_unleased(attachment)

    def _status(self, request: control.Status) -> control.StatusReply:
        wanted = None
        if request.connection_info is not None:
            wanted = parse_connection_info(request.connection_info, request.environment).url
        return control.StatusReply(
            pid=os.getpid(),
            version=VERSION,
            mountpoint=self._mountpoint,
            backends={name: backend.driver for name, backend in self._configured.items()},
            attached=[
                control.AttachedStatus(
                    name=it.name,
                    source=_utf8(it.info.source.url),
                    size=it.info.size,
                    leases=len(it.leases),
                    handles=len(self._handles(it)),
                )
                for it in self._attachments
                if wanted in (None, it.info.source.url)
            ],
            open=[
                control.OpenStatus(
                    source=_utf8(volume.source.url),
                    size=volume.properties.size,
                    writable=volume.properties.writable,
                    handles=volume.handles,
                )
                for volume in self._volumes
            ],
            clients=len(self._clients),
        )

    async def _unmount(self, request: control.Unmount) -> control.Reply:
        """Unmount and end. The answer comes when all volumes are closed."""
        try:
            await trio.to_thread.run_sync(lambda: session.unmount(self._mountpoint, lazy=False))
        except OSError as exc:
            if not request.force:
                if exc.errno != errno.EBUSY:
                    raise
                sources = ", ".join(volume.source.url for volume in self._volumes)
                raise VolfsError(f"{exc}; open: {sources or 'a directory'}", errno.EBUSY) from exc
            await self.stop()
        else:
            session.stop()  # where another mount namespace keeps a copy of the mount
        await self._closed.wait()
        if self.errors:
            return control.failure(self.errors[0])
        return control.Done()


def _utf8(text: str) -> str:
    """What has room in a message: the stray bytes of a file's name are spelt out."""
    return text.encode(errors="backslashreplace").decode()


async def _announce(config: Config, mountpoint: str, ready: Callable[[], None]) -> None:
    await session.wait_ready(mountpoint, ATTACHED)
    await trio.to_thread.run_sync(session.tune, mountpoint, config.mount.read_ahead, abandon_on_cancel=True)
    ready()
