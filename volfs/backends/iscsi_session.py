"""One iSCSI session: commands in a bounded window, deadlines, and a new connection when the old one breaks.

A session serves one task or many. Its pump is a trio system task, because it lives from the `start` in one task to
the `aclose` in another; nothing is ever raised out of it. All runs on the loop, and libiscsi never calls us: what it
has finished is handed out by `Context.service`, so no state changes under anybody's feet.

Deadlines. A command has `timeout` seconds from being sent to its answer; then its request fails with BackendTimeout,
and the connection is given up, since nobody can tell a slow target from a dead one. When a connection breaks, requests
under way are sent again on the next one, which has `reconnect_timeout` seconds from the break to be there; then they
fail with the reason why it is not. A connection that breaks without anybody waiting is made anew at the next request.

Sending again. A command whose answer was lost may have been carried out already. Reads, and writes of the same bytes
to the same place, may be carried out twice, as long as nothing newer comes between. Within the session nothing does:
the new connection logs in with the old one's ISID, so that the target ends the old session's tasks before it lets
us in (RFC 7143 6.3.5); and two overlapping writes under way together have no order anyway (backends/base.py). A
fail-over to a portal of another portal group is another nexus, though, where only the target's own care helps.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import trio

from volfs.backends import scsi
from volfs.backends.iscsi_login import connection_error, libiscsi
from volfs.errors import BackendError, BackendTimeout, VolfsError

if TYPE_CHECKING:
    from volfs.native.libiscsi import Command, Context

log = logging.getLogger(__name__)

MAX_RESENDS = 8  # of one command: for lost connections, unit attentions, aborts
FIRST_DELAY = 0.05  # seconds between attempts to connect, or of a command that the target is too busy for;
LONGEST_DELAY = 2.0  # doubled each time up to this


class SenseError(BackendError):
    """A command failed with sense data; 0 where the target gave none."""

    sense_key = 0
    ascq = 0


class Request:
    """Commands that succeed or fail together. They carry the request as their `owner`."""

    __slots__ = (
        "commands",
        "done",
        "error",
        "failed",
        "on_settled",
        "remaining",
        "resends",
        "setup",
        "undivided",
        "what",
    )

    def __init__(self, what: str, *, setup: bool = False, undivided: bool = False) -> None:
        self.what = what
        self.setup = setup  # part of making a connection: fails with it, and goes before all others
        # When a connection breaks, send all commands again, also those that have been answered. So a write has to be
        # done: until it is complete, nobody but us knows that a part of it may be lost with the target's cache, or
        # covered by an older write that is repeated.
        self.undivided = undivided
        self.commands: list[Command] = []
        self.remaining = 0  # commands that have not finished; may outlive the caller's interest
        self.failed: list[Command] = []
        self.error: VolfsError | None = None  # set: the caller has its answer
        self.resends = 0
        self.done = trio.Event()
        self.on_settled: Callable[[], None] | None = None

    def when_settled(self, call: Callable[[], None]) -> None:
        """Call once no command of this request can have an effect any more; now, if that is so."""
        if self.remaining:
            self.on_settled = call
        else:
            call()

    def finish(self, error: VolfsError) -> None:
        """Give the caller an answer before all commands have theirs."""
        if self.error is None:
            self.error = error
            for command in self.commands:
                command.detach()
            self.done.set()

    def settle_one(self) -> None:
        self.remaining -= 1
        if not self.remaining:
            self.done.set()
            if self.error is not None:
                self.let_go()
            if self.on_settled is not None:
                self.on_settled()

    def let_go(self) -> None:
        """Release the buffers now: request and commands are a cycle, which waits for the garbage collector."""
        for command in self.commands:
            command.detach()
        self.commands.clear()


class Session:
    """Owns the connection. `name` begins each message. `execute` may be called by any number of tasks."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Awaitable[Context]],
        *,
        timeout: float,
        reconnect_timeout: float,
        queue_depth: int,
    ) -> None:
        self.name = name
        self.library = libiscsi()
        # Called on each new connection but the first, before any request goes out; its requests are `setup` ones.
        self.resume: Callable[[], Awaitable[None]] | None = None
        self.resume_after_reset = False  # whether a device reset calls for it, too
        self.capacity_changed = False
        self.deferred_error: BackendError | None = None  # of a write that had succeeded
        self._connect = connect
        self._timeout, self._reconnect_timeout, self._queue_depth = timeout, reconnect_timeout, queue_depth
        self._queue: deque[Command] = deque()
        self._setup_queue: deque[Command] = deque()
        self._inflight: dict[Command, float] = {}  # to the time of sending, which is also the order
        self._context: Context | None = None
        self._connections = 0  # there have been
        self._ready = False  # requests may go out
        self._lost_at = 0.0
        self._loss: VolfsError | None = None  # why there is no connection
        self._reset_seen = False
        self._closing = False
        self._scope = trio.CancelScope()
        self._begun, self._stopped, self._lost = trio.Event(), trio.Event(), trio.Event()
        self._wanted, self._sent, self._blocked = trio.Event(), trio.Event(), trio.Event()

    async def start(self) -> None:
        """Connect; the one attempt's error is raised."""
        trio.lowlevel.spawn_system_task(self._run, name=f"volfs {self.name}")
        try:
            await self._begun.wait()
        except trio.Cancelled:
            await self.aclose(trio.current_time())
            raise
        if self._stopped.is_set():
            raise self._loss or self._closed()

    async def execute(self, request: Request) -> int:
        """Send the request's commands and return when all have succeeded: how many bytes they left out.

        See the module for deadlines. Lets go of the commands, at the latest when none can have an effect any more.
        """
        try:
            await self._execute(request)
            return sum(command.residual for command in request.commands)
        except trio.Cancelled:
            self._forget(request, BackendError(f"{self.name}: cancelled", errno.ECANCELED))
            raise
        finally:
            if not request.remaining:
                request.let_go()

    async def _execute(self, request: Request) -> None:
        delay, waited = FIRST_DELAY, 0.0
        commands = request.commands
        while True:
            connection = self._connections
            request.remaining = len(commands)
            self._submit(request, commands)
            await request.done.wait()
            if request.error is not None:
                # One error may be that of many requests; each raises its own, with its own traceback.
                raise type(request.error)(str(request.error), request.error.errno) from request.error
            if not request.failed:
                return
            commands, request.failed, request.done = request.failed, [], trio.Event()
            for command in commands:
                if not self._is_busy(command):
                    raise self._command_error(request, command)
            if waited + delay > self._timeout:
                raise BackendTimeout(f"{self.name}: {request.what}: busy for {self._timeout:g} s")
            await trio.sleep(delay)
            waited, delay = waited + delay, min(2 * delay, LONGEST_DELAY)
            if request.undivided and self._connections != connection:
                commands = request.commands

    async def aclose(self, until: float) -> None:
        """Log out and disconnect, by the time `until` (trio's) at the latest. Nothing else may be under way."""
        if self._closing:
            return
        self._closing = True
        with trio.CancelScope(shield=True):
            if self._ready and self._context is not None:
                with trio.move_on_at(until):
                    await self._log_out(self._context)
            self._scope.cancel()
            await self._stopped.wait()

    async def _log_out(self, context: Context) -> None:
        try:
            command = context.logout()
        except OSError:  # it went down this moment
            return
        command.owner = answered = trio.Event()
        self._inflight[command] = trio.current_time()
        self._pump(self.library.POLLOUT)
        await answered.wait()

    # --- the pump -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._keep_connected()
        except Exception as exc:
            log.exception("%s: unexpected error", self.name)
            self._loss = BackendError(f"{self.name}: unexpected {type(exc).__name__}", errno.EIO)
        finally:
            self._closing = True
            error = self._loss or self._closed()
            self._fail(self._queue, error)
            for command in self._inflight:  # none, unless something unexpected happened
                if isinstance(command.owner, Request):
                    command.owner.finish(error)
            self._stopped.set()
            self._begun.set()

    async def _keep_connected(self) -> None:
        delay = FIRST_DELAY
        while True:
            try:
                await self._serve(await self._connect())
                delay = FIRST_DELAY
            except VolfsError as exc:
                # Also "no such target" and refused logins are tried again: a target that restarts offers its portal
                # before its targets and accounts.
                self._loss = exc
                if not self._begun.is_set():
                    return
                if trio.current_time() + delay < self._lost_at + self._reconnect_timeout:
                    await trio.sleep(delay)
                    delay = min(2 * delay, LONGEST_DELAY)
                    continue
                self._fail(self._queue, exc)
            if not self._queue:
                self._wanted = trio.Event()
                await self._wanted.wait()

    async def _serve(self, context: Context) -> None:
        """Pump a connection until it is lost. Raises why when that is before requests could go out."""
        self._context, self._lost = context, trio.Event()
        self._connections += 1
        again = self._begun.is_set()
        failure: VolfsError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, context)
                nursery.start_soon(self._write, context)
                nursery.start_soon(self._watch)
                try:
                    if again and self.resume is not None:
                        await self.resume()
                except VolfsError as exc:
                    failure = exc
                else:
                    if self._lost.is_set():
                        failure = self._loss
                    else:
                        self._ready = True
                        self._begun.set()
                        if again:
                            log.warning("%s: connected again", self.name)
                        self._pump(0)
                        await self._lost.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._lose(failure or self._closed())
        if failure is not None:
            raise failure

    async def _read(self, context: Context) -> None:
        events = self.library.POLLIN | self.library.POLLOUT  # answers make room for more to be written
        try:
            while self._context is context:
                await trio.lowlevel.wait_readable(context.fd)
                self._pump(events)
        except trio.ClosedResourceError:
            pass

    async def _write(self, context: Context) -> None:
        """Only what the socket would not take at once: `_pump` writes directly."""
        try:
            while self._context is context:
                await self._blocked.wait()
                self._blocked = trio.Event()
                if self._context is context:
                    await trio.lowlevel.wait_writable(context.fd)
                    self._pump(self.library.POLLOUT)
        except trio.ClosedResourceError:
            pass

    async def _watch(self) -> None:
        """Look when the oldest command is due, not when each is: commands are many and timeouts few."""
        while True:
            if not self._inflight:
                self._sent = trio.Event()
                await self._sent.wait()
                continue  # it may have been answered before we got here
            due = next(iter(self._inflight.values())) + self._timeout
            if due > trio.current_time():
                await trio.sleep_until(due)
                continue
            late = f"no answer within {self._timeout:g} s"
            now = trio.current_time()
            for command, sent in list(self._inflight.items()):
                request = command.owner
                if sent + self._timeout <= now and isinstance(request, Request):
                    self._forget(request, BackendTimeout(f"{self.name}: {request.what}: {late}"))
            self._lose(BackendTimeout(f"{self.name}: {late}"))
            return

    def _pump(self, events: int) -> None:
        """Send what the window has room for, then read and write. Not a coroutine: nothing gets in between."""
        context = self._context
        while context is not None:
            if self._send(context, self._queue if self._ready else self._setup_queue):
                events |= self.library.POLLOUT
            if not events:
                break
            finished = context.service(events)
            if context.lost:
                self._lose(connection_error(context.error, self.name), finished)
                return
            for command in finished:
                self._finished(command)
            if self._reset_seen:
                self._lose(BackendError(f"{self.name}: the device was reset", errno.EIO))
                return
            events = 0
            if not finished:
                break
        if context is not None and context.writing:
            self._blocked.set()

    def _send(self, context: Context, queue: deque[Command]) -> bool:
        if not queue:
            return False
        now = trio.current_time()
        while queue and len(self._inflight) < self._queue_depth:
            command = queue.popleft()
            try:
                context.submit(command)
            except OSError as exc:
                queue.appendleft(command)
                self._lose(BackendError(f"{self.name}: {exc.strerror}", exc.errno))
                return False
            self._inflight[command] = now
        self._sent.set()
        return True

    def _finished(self, command: Command) -> None:
        del self._inflight[command]
        request = command.owner
        if not isinstance(request, Request):
            assert isinstance(request, trio.Event)
            request.set()
            return
        if command.status != self.library.GOOD and request.error is None:
            if self._wants_resend(command):
                request.resends += 1
                if request.resends <= MAX_RESENDS * len(request.commands):
                    (self._setup_queue if request.setup else self._queue).appendleft(command)
                    return
            if not self._succeeded_all_the_same(command):
                request.failed.append(command)
        request.settle_one()

    def _submit(self, request: Request, commands: Iterable[Command]) -> None:
        if self._closing:
            request.remaining = 0
            request.finish(self._loss or self._closed())
        elif request.setup:
            self._setup_queue.extend(commands)
            if self._context is None:
                self._fail(self._setup_queue, self._loss or self._closed())
            self._pump(0)
        else:
            self._queue.extend(commands)
            self._wanted.set()
            if self._ready:
                self._pump(0)

    def _forget(self, request: Request, error: VolfsError) -> None:
        """Answer the request; what of it has not been sent will not be."""
        queue = self._setup_queue if request.setup else self._queue
        for command in request.commands:
            if command in queue:
                queue.remove(command)
                request.remaining -= 1
        request.finish(error)

    def _lose(self, error: VolfsError, finished: Iterable[Command] = ()) -> None:
        """Drop the connection; requests under way go back to the queue."""
        context, self._context = self._context, None
        if context is None:
            return
        if self._ready:
            self._lost_at = trio.current_time()
            if not self._closing:
                log.warning("%s", error)
        self._ready = self._reset_seen = False
        self._loss = error
        trio.lowlevel.notify_closing(context.fd)
        for command in [*finished, *context.close()]:
            self._finished(command)
        for request in {command.owner for command in self._queue}:
            assert isinstance(request, Request)
            if request.undivided:
                answered = [command for command in request.commands if command not in self._queue]
                request.remaining += len(answered)
                request.failed.clear()
                self._queue.extendleft(answered)
        self._fail(self._setup_queue, error)
        self._lost.set()

    def _fail(self, queue: deque[Command], error: VolfsError) -> None:
        while queue:
            request = queue.popleft().owner
            assert isinstance(request, Request)
            request.finish(error)
            request.settle_one()

    def _closed(self) -> BackendError:
        return BackendError(f"{self.name}: the session is closed", errno.ESHUTDOWN)

    # --- what an outcome means ------------------------------------------------------------------------------------

    def _wants_resend(self, command: Command) -> bool:
        library = self.library
        if command.status == library.CANCELLED:
            return not (isinstance(command.owner, Request) and command.owner.setup)
        if command.status == library.TASK_ABORTED:
            return True
        if command.status != library.CHECK_CONDITION:
            return False
        if command.deferred:
            # The answer is about an earlier write that had been acknowledged; this command was not carried out.
            self.deferred_error = BackendError(
                f"{self.name}: an earlier write failed: {command.error}",
                scsi.sense_errno(command.sense_key, command.ascq),
            )
            return True
        if command.sense_key == scsi.UNIT_ATTENTION:
            if command.ascq in scsi.CAPACITY_CHANGED:
                self.capacity_changed = True
            elif scsi.device_was_reset(command.ascq) and self.resume_after_reset and self._ready:
                # Start over with a new connection, where nothing else is under way: `resume` is made for that.
                self._reset_seen = True
            return True
        return command.sense_key == scsi.ABORTED_COMMAND

    def _succeeded_all_the_same(self, command: Command) -> bool:
        return (
            command.status == self.library.CHECK_CONDITION
            and not command.deferred
            and command.sense_key == scsi.RECOVERED_ERROR
        )

    def _is_busy(self, command: Command) -> bool:
        if command.status in (self.library.BUSY, self.library.TASK_SET_FULL):
            return True
        return (
            command.status == self.library.CHECK_CONDITION
            and command.sense_key == scsi.NOT_READY
            and command.ascq in scsi.PASSING_ASCQS
        )

    def _command_error(self, request: Request, command: Command) -> BackendError:
        library = self.library
        where = f"{self.name}: {request.what}"
        if command.status == library.CANCELLED:
            reason = self._loss or self._closed()
            return BackendError(f"{where}: {str(reason).removeprefix(self.name + ': ')}", reason.errno)
        if command.status == library.CHECK_CONDITION:
            error = SenseError(f"{where}: {command.error}", scsi.sense_errno(command.sense_key, command.ascq))
            error.sense_key, error.ascq = command.sense_key, command.ascq
            return error
        if command.status == library.RESERVATION_CONFLICT:
            return BackendError(f"{where}: reserved by another initiator", errno.EBUSY)
        return BackendError(f"{where}: {command.error}", errno.EIO)
