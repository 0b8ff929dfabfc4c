"""Requests that come past pyfuse3, by the helper below it (native/fuse_session.c), each for one of our handlers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from volfs.fuse.filesystem import Filesystem

if TYPE_CHECKING:
    from volfs.native.fuse_session import Request

log = logging.getLogger(__name__)

EXPIRY_SECONDS = 1.0  # between two looks at what is past its deadline


class Requests:
    """Starts a task for each request that needs one. The helper calls all of it on the trio loop."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._tasks: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self.start_read = filesystem.start_read
        self.start_write = filesystem.start_write

    async def serve(self, min_tasks: int, max_tasks: int) -> None:
        """Run pyfuse3's main loop, and wait for our own tasks when it ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expire)
            try:
                async with trio.open_nursery() as self._tasks:
                    self._token = trio.lowlevel.current_trio_token()
                    await pyfuse3.main(min_tasks=min_tasks, max_tasks=max_tasks)
            finally:
                self._tasks = None
            nursery.cancel_scope.cancel()

    def start(self, name: str, request: Request, arguments: tuple[object, ...]) -> None:
        """Have the handler of that name answer the request. From any thread."""
        if trio.lowlevel.in_trio_task():
            self._spawn(name, request, arguments)
            return
        if self._token is None:  # before `serve`
            return
        try:
            self._token.run_sync_soon(self._spawn, name, request, arguments)
        except trio.RunFinishedError:
            pass  # the request is answered when it is dropped

    def _spawn(self, name: str, request: Request, arguments: tuple[object, ...]) -> None:
        if self._tasks is None:
            return
        try:
            self._tasks.start_soon(self._answer, name, request, arguments)
        except RuntimeError:  # its last task has ended, and `serve` has not got to know it yet
            log.debug("%s: came when the mount ended", name)

    async def _answer(self, name: str, request: Request, arguments: tuple[object, ...]) -> None:
        handler: Callable[..., Awaitable[Any]] = getattr(self._filesystem, name)
        try:
            match name:
                case "read" | "read_failed":
                    request.data(await handler(*arguments))
                case "write":
                    request.count(await handler(*arguments))
                case "copy_file_range":
                    request.count(await handler(*arguments, request.interrupted))
                case "lseek":
                    request.offset(await handler(*arguments))
                case "fallocate":
                    await handler(*arguments)
                    request.error(0)
        except pyfuse3.FUSEError as exc:
            request.error(exc.errno)

    async def _expire(self) -> None:
        while True:
            await self._filesystem.wait_open()  # a daemon that has nothing open is not woken
            await trio.sleep(EXPIRY_SECONDS)
            self._filesystem.expire_reads()
