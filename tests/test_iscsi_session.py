"""What a session makes of answers that no target here gives on demand: a fake connection gives them."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from volfs.backends import scsi
from volfs.backends.iscsi_session import MAX_RESENDS, Request, SenseError, Session
from volfs.errors import BackendError, BackendTimeout
from volfs.native import libiscsi

GOOD = {"status": libiscsi.GOOD}
SILENCE: dict[str, Any] = {}


def sense(key: int, ascq: int = 0, *, deferred: bool = False) -> dict[str, Any]:
    return {"status": libiscsi.CHECK_CONDITION, "sense_key": key, "ascq": ascq, "deferred": deferred}


class FakeCommand:
    def __init__(self, owner: Any, name: str = "", **_: Any) -> None:
        self.owner = owner
        self.name = name
        self.detached = False
        self.reset()

    def reset(self) -> None:
        self.status, self.sense_key, self.ascq, self.residual = libiscsi.PENDING, 0, 0, 0
        self.deferred, self.error = False, "as told"

    def detach(self) -> None:
        self.detached = True


class FakeContext:
    """Answers each command as `script` says, with a dict of attributes; SILENCE: not at all."""

    def __init__(self, script: Callable[[FakeCommand], dict[str, Any]]) -> None:
        self.script = script
        self.sent: list[FakeCommand] = []
        self.new: list[FakeCommand] = []
        self.unanswered: list[FakeCommand] = []
        self.lost, self.writing, self.error = False, False, ""
        self.ours, self.theirs = socket.socketpair()

    @property
    def fd(self) -> int:
        return self.ours.fileno()

    def submit(self, command: FakeCommand) -> None:
        command.reset()
        self.sent.append(command)
        self.new.append(command)

    def logout(self) -> FakeCommand:
        command = FakeCommand(None, "logout")
        self.new.append(command)
        return command

    def service(self, events: int) -> list[FakeCommand]:
        finished = []
        for command in self.new:
            outcome = GOOD if command.name == "logout" else self.script(command)
            vars(command).update(outcome)
            (finished if outcome else self.unanswered).append(command)
        self.new = []
        return finished

    def close(self) -> list[FakeCommand]:
        self.ours.close()
        self.theirs.close()
        dropped = self.new + self.unanswered
        for command in dropped:
            command.status = libiscsi.CANCELLED
        return dropped


class Fake:
    """A session and the connections it made, each with the next script."""

    def __init__(self, *scripts: Callable[[FakeCommand], dict[str, Any]], **more: Any) -> None:
        self.scripts = list(scripts)
        self.contexts: list[FakeContext] = []
        limits = {"timeout": 5.0, "reconnect_timeout": 5.0, "queue_depth": 4, **more}
        self.session = Session("lun", self.connect, **limits)

    async def connect(self) -> Any:
        if not self.scripts:
            raise BackendError("nobody there", errno.ECONNREFUSED)
        self.contexts.append(FakeContext(self.scripts.pop(0)))
        return self.contexts[-1]

    def request(self, *names: str, **more: Any) -> Request:
        request = Request("request", **more)
        request.commands.extend(FakeCommand(request, name) for name in names)  # type: ignore[arg-type]
        return request


@asynccontextmanager
async def running(*scripts: Callable[[FakeCommand], dict[str, Any]], **more: Any) -> AsyncIterator[Fake]:
    fake = Fake(*scripts, **more)
    await fake.session.start()
    try:
        yield fake
    finally:
        await fake.session.aclose(trio.current_time() + 1)


def in_turn(*outcomes: dict[str, Any]) -> Callable[[FakeCommand], dict[str, Any]]:
    """The outcomes one after the other, whatever the command, and the last one for ever."""
    rest = list(outcomes)
    return lambda _: rest.pop(0) if len(rest) > 1 else rest[0]


@pytest.mark.parametrize(
    ("outcome", "number"),
    [
        (sense(0x2, 0x0400), errno.ENODEV),
        (sense(0x2, 0x3A00), errno.ENOMEDIUM),
        (sense(0x3, 0x1100), errno.EIO),
        (sense(0x4, 0x4400), errno.EIO),
        (sense(0x5, 0x2000), errno.EOPNOTSUPP),
        (sense(0x5, 0x2500), errno.ENXIO),
        (sense(0x7, 0x2700), errno.EROFS),
        (sense(0x7, 0x2707), errno.ENOSPC),
        (sense(0xE, 0x1D00), errno.EIO),
        ({"status": libiscsi.RESERVATION_CONFLICT}, errno.EBUSY),
        ({"status": 0x0F000001}, errno.EIO),
    ],
)
async def test_errnos(outcome: dict[str, Any], number: int) -> None:
    async with running(in_turn(outcome)) as fake:
        with pytest.raises(BackendError, match="lun: request: ") as caught:
            await fake.session.execute(fake.request("a"))
        assert caught.value.errno == number
        if "sense_key" in outcome:
            assert isinstance(caught.value, SenseError)
            assert caught.value.ascq == outcome["ascq"]
        assert len(fake.contexts) == 1


@pytest.mark.parametrize(
    "outcome",
    [
        {"status": libiscsi.BUSY},
        {"status": libiscsi.TASK_SET_FULL},
        {"status": libiscsi.TASK_ABORTED},
        sense(0x2, 0x0401),
        sense(0x6, 0x2900),
        sense(0x6, 0x3F0E),
        sense(0xB, 0x4700),
        sense(0x1, 0x1700),
    ],
)
async def test_what_passes_is_tried_again(outcome: dict[str, Any]) -> None:
    async with running(in_turn(outcome, outcome, GOOD)) as fake:
        await fake.session.execute(fake.request("a"))
        assert len(fake.contexts) == 1


@pytest.mark.parametrize("outcome", [sense(0x6, 0x2900), sense(0xB), {"status": libiscsi.TASK_ABORTED}])
async def test_but_not_for_ever(outcome: dict[str, Any]) -> None:
    async with running(in_turn(outcome)) as fake:
        with pytest.raises(BackendError):
            await fake.session.execute(fake.request("a"))
        assert len(fake.contexts[0].sent) == MAX_RESENDS + 1


async def test_busy_for_too_long_is_a_timeout() -> None:
    async with running(in_turn({"status": libiscsi.BUSY}), timeout=0.2) as fake:
        with pytest.raises(BackendTimeout, match="busy"):
            await fake.session.execute(fake.request("a"))


async def test_recovered_is_a_success() -> None:
    async with running(in_turn(sense(0x1, 0x1701))) as fake:
        await fake.session.execute(fake.request("a"))
        assert len(fake.contexts[0].sent) == 1


async def test_a_deferred_error_is_kept_and_the_command_repeated() -> None:
    async with running(in_turn(sense(0x3, 0x0C00, deferred=True), GOOD)) as fake:
        await fake.session.execute(fake.request("a"))
        assert fake.session.deferred_error is not None
        assert fake.session.deferred_error.errno == errno.EIO


async def test_a_changed_capacity_is_noted() -> None:
    async with running(in_turn(sense(0x6, 0x2A09), GOOD)) as fake:
        await fake.session.execute(fake.request("a"))
        assert fake.session.capacity_changed


async def test_a_reset_makes_a_new_connection_where_that_matters() -> None:
    resumed = []

    async with running(in_turn(sense(0x6, 0x2901)), in_turn(GOOD)) as fake:

        async def resume() -> None:
            await fake.session.execute(fake.request("setup", setup=True))
            resumed.append([command.name for command in fake.contexts[1].sent])

        fake.session.resume, fake.session.resume_after_reset = resume, True
        await fake.session.execute(fake.request("a"))
        assert resumed == [["setup"]]  # before anything else
        assert [command.name for command in fake.contexts[1].sent] == ["setup", "a"]


async def test_the_window_is_bounded() -> None:
    async with running(in_turn(SILENCE), in_turn(GOOD)) as fake:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fake.session.execute, fake.request(*map(str, range(10))))
            nursery.start_soon(fake.session.execute, fake.request("x"))
            await trio.testing.wait_all_tasks_blocked()
            assert len(fake.contexts[0].sent) == 4
            fake.contexts[0].lost = True
            fake.contexts[0].theirs.send(b"!")
        assert len(fake.contexts[1].sent) == 11


async def test_a_write_is_repeated_as_a_whole() -> None:
    def first(command: FakeCommand) -> dict[str, Any]:
        return GOOD if command.name == "a" else SILENCE

    for undivided in (False, True):
        async with running(first, in_turn(GOOD)) as fake:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fake.session.execute, fake.request("a", "b", undivided=undivided))
                await trio.testing.wait_all_tasks_blocked()
                fake.contexts[0].lost = True
                fake.contexts[0].theirs.send(b"!")
            assert {command.name for command in fake.contexts[1].sent} == ({"a", "b"} if undivided else {"b"})


async def test_what_is_cancelled_is_neither_sent_nor_repeated() -> None:
    async with running(in_turn(SILENCE), in_turn(GOOD)) as fake:
        settled = []
        request = fake.request(*"abcdef")
        commands = list(request.commands)
        with trio.move_on_after(0.01):
            await fake.session.execute(request)
        request.when_settled(lambda: settled.append(True))
        assert all(command.detached for command in commands)  # type: ignore[attr-defined]
        assert not settled  # four may still have an effect
        fake.contexts[0].lost = True
        fake.contexts[0].theirs.send(b"!")
        await fake.session.execute(fake.request("x"))
        assert settled
        assert [command.name for command in fake.contexts[1].sent] == ["x"]


async def test_a_failure_while_resuming_is_tried_again_until_the_deadline() -> None:
    scripts = [in_turn(SILENCE), *[in_turn(sense(0x3, 0x1100))] * 30]
    async with running(*scripts, reconnect_timeout=0.5) as fake:

        async def resume() -> None:
            await fake.session.execute(fake.request("setup", setup=True))

        fake.session.resume = resume
        async with trio.open_nursery() as nursery:

            async def cut() -> None:
                await trio.testing.wait_all_tasks_blocked()
                fake.contexts[0].lost = True
                fake.contexts[0].theirs.send(b"!")

            nursery.start_soon(cut)
            with pytest.raises(BackendError) as caught:
                await fake.session.execute(fake.request("a"))
        assert caught.value.errno == errno.EIO
        assert len(fake.contexts) > 2


async def test_an_unexpected_error_reaches_who_waits(caplog: pytest.LogCaptureFixture) -> None:
    def broken(command: FakeCommand) -> dict[str, Any]:
        return SILENCE if command.name == "a" else vars(command)["no such thing"]

    async with running(broken) as fake:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(BackendError, match="unexpected"):
                    await fake.session.execute(fake.request("a"))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            fake.contexts[0].new.append(FakeCommand(None, "b"))
            fake.contexts[0].theirs.send(b"!")
        with pytest.raises(BackendError):
            await fake.session.execute(fake.request("b"))
    assert "no such thing" in caplog.text


def test_luns() -> None:
    def entries(*addresses: str) -> bytes:
        data = b"".join(bytes.fromhex(address).ljust(8, b"\0") for address in addresses)
        return len(data).to_bytes(4, "big") + bytes(4) + data

    assert scsi.parse_luns(entries("0000", "00ff", "0101")) == {0: 0, 255: 255, 257: 0x0101}
    assert scsi.parse_luns(entries("4100", "7fff")) == {256: 0x4100, 16383: 0x7FFF}
    assert scsi.parse_luns(entries("8000", "c101", "0001 0002")) == {}  # other methods, a second level
    assert scsi.parse_luns(entries("0001")[:-3]) == {}  # cut short
    assert scsi.parse_luns(b"") == {}


def test_short_replies() -> None:
    assert not scsi.parse_inquiry(b"\x7f").connected
    assert scsi.parse_mode6(b"") == scsi.Mode(write_protected=False, volatile_cache=True)
    assert scsi.parse_mode6(bytes([0, 0, 0x80, 0, 0x08, 0x12, 0x00])) == scsi.Mode(True, False)
    assert scsi.parse_mode6(bytes([0, 0, 0, 8]) + bytes(8) + bytes([0x88, 0x12, 0x04])).volatile_cache
    assert scsi.parse_vpd(b"\0\x80\0\x04ab", 0x80) == b"ab"
    assert scsi.parse_vpd(b"\0\x80\0\x04abcd", 0xB0) == b""
    assert scsi.parse_max_transfer(b"") == 0
