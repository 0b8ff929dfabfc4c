"""iSCSI targets that die, fall silent in the middle of a PDU, or answer with errors, under a mount that is in use.

The driver alone is tested in test_iscsi.py and test_iscsi_session.py; here programs see what comes of it. The harm is
done by a proxy (iscsi_proxy.py), since tgtd answers only as it should.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import opened
from iscsi_proxy import (
    BUSY,
    CHECK_CONDITION,
    COMMAND,
    DATA_IN,
    DATA_OUT,
    FLUSHES,
    MEDIUM_ERROR,
    NO_SPACE,
    READS,
    RESERVATION_CONFLICT,
    TASK_SET_FULL,
    WRITES,
    IscsiProxy,
    iscsi_proxy,
)
from mounts import Mount, mounted, wait_until
from services import MIB
from targets import Tgtd, running_tgtd
from volumes import raises, random_bytes
from writers import wait_for_syncs, writing

from volfs import api

pytestmark = pytest.mark.slow

SIZE = 6 * MIB
TIMEOUT = 2  # seconds for an answer
RECONNECT = 3  # and for a new connection
ENOUGH = 2 * TIMEOUT + 2 * RECONNECT + 2.0


@dataclass
class San:
    """A target of a test's own, with one LUN, behind a proxy, on a mount."""

    tgtd: Tgtd
    iqn: str
    backing: Path
    between: IscsiProxy
    mount: Mount

    @property
    def path(self) -> Path:
        return self.mount.path / "san" / self.iqn / "1"

    def released(self) -> bool:
        return not api.status(socket_path=str(self.mount.socket)).open


@contextlib.contextmanager
def mounted_san(place: Path, reconnect: float = RECONNECT) -> Iterator[San]:
    with contextlib.ExitStack() as stack:
        tgtd = stack.enter_context(running_tgtd("/dev/shm"))
        target = tgtd.target()
        backing = target.lun(SIZE)
        between = stack.enter_context(iscsi_proxy(tgtd.portal))
        (place / "volfs.toml").write_text(
            f'[backends.san]\ndriver = "iscsi"\nportals = ["{between.portal}"]\ntimeout = {TIMEOUT}\n'
            f"reconnect_timeout = {reconnect}\n"
        )
        mount = stack.enter_context(mounted(place, [], ["-c", str(place / "volfs.toml")]))
        yield San(tgtd, target.iqn, backing, between, mount)


@pytest.fixture(scope="module")
def shared_san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    with mounted_san(tmp_path_factory.mktemp("s")) as made:
        yield made


@pytest.fixture
def san(shared_san: San) -> Iterator[San]:
    """Zeros, and all well with it."""
    shared_san.backing.write_bytes(bytes(SIZE))
    yield shared_san
    shared_san.between.heal()
    wait_until(shared_san.released, "it is closed", ENOUGH)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


# ---- a target that dies ----------------------------------------------------------------------------------------


def test_programs_wait_for_a_target_that_restarts_within_the_reconnect_deadline(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with mounted_san(tmp_path_factory.mktemp("s"), reconnect=30) as san:
        with writing(san.path, tmp_path, SIZE) as writers:
            wait_for_syncs(writers)
            for _ in range(3):
                san.tgtd.kill()
                san.tgtd.start()
                wait_for_syncs(writers)
            for writer in writers:
                writer.stop()
                assert writer.journal.errors() == []
                writer.journal.verify(san.backing.read_bytes(), "after restarts", acknowledged=True)
        wait_until(san.released, "it is closed")


def test_a_target_that_is_gone_for_longer_is_an_error_in_time_and_the_same_files_work_when_it_is_back(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with mounted_san(tmp_path_factory.mktemp("s")) as san:
        with writing(san.path, tmp_path, SIZE, keep_going=True) as writers:
            wait_for_syncs(writers)
            san.tgtd.kill()
            wait_until(lambda: all(it.journal.errors() for it in writers), "all are told", ENOUGH)
            with within(1):
                assert set(os.listdir(san.mount.path)) == {"attached", "san"}
            with within(ENOUGH), pytest.raises(ConnectionError):  # the proxy hangs up where tgtd would refuse
                san.path.open("rb")
            san.tgtd.start()
            wait_for_syncs(writers)
            for writer in writers:
                writer.stop()
                assert {number for number, _ in writer.journal.errors()} <= {"ECONNREFUSED", "ECONNRESET"}
                assert writer.journal.slowest() < ENOUGH
                writer.journal.verify(san.backing.read_bytes(), "after a restart")
        wait_until(san.released, "it is closed")


# ---- a target, or the way to it, that falls silent -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        pytest.param(DATA_IN, 3, id="answer"),
        pytest.param(COMMAND, 5, id="command", marks=pytest.mark.thorough),
        pytest.param(DATA_OUT, 1, id="data", marks=pytest.mark.thorough),
    ],
)
def test_half_a_pdu_and_then_silence_is_a_timeout_for_some_and_the_rest_goes_on(
    san: San, tmp_path: Path, kind: int, after: int
) -> None:
    cuts = san.between.cuts
    with writing(san.path, tmp_path, SIZE, keep_going=True) as writers:
        wait_for_syncs(writers)
        san.between.cut(kind, after)
        wait_until(lambda: san.between.cuts > cuts, "it is cut", ENOUGH)
        wait_for_syncs(writers)
        for writer in writers:
            writer.stop()
            assert {number for number, _ in writer.journal.errors()} <= {"ETIMEDOUT"}
            assert writer.journal.slowest() < ENOUGH
        content = san.backing.read_bytes()
        for writer in writers:
            writer.journal.verify(content, "after half a PDU")
        assert any(writer.journal.errors() for writer in writers)


@pytest.mark.thorough
def test_a_target_that_falls_silent_is_a_timeout_and_no_late_write_comes_when_it_speaks_again(
    san: San, tmp_path: Path
) -> None:
    with writing(san.path, tmp_path, SIZE, keep_going=True) as writers:
        wait_for_syncs(writers)
        san.between.silence()
        wait_until(lambda: all(it.journal.errors() for it in writers), "all are told", ENOUGH)
        with within(ENOUGH), raises(errno.ETIMEDOUT):
            san.path.open("rb")
        with within(1):
            api.status(socket_path=str(san.mount.socket))
        san.between.heal()
        wait_for_syncs(writers, 10)
        for writer in writers:
            writer.stop()
            assert {number for number, _ in writer.journal.errors()} == {"ETIMEDOUT"}
            assert writer.journal.slowest() < ENOUGH
        content = san.backing.read_bytes()
        for writer in writers:
            writer.journal.verify(content, "after silence")


# ---- what a target says ----------------------------------------------------------------------------------------


def test_a_medium_error_is_EIO_there_and_nowhere_else(san: San) -> None:
    san.backing.write_bytes(content := random_bytes(SIZE))
    bad = 3 * MIB
    san.between.answer(READS, CHECK_CONDITION, MEDIUM_ERROR, block=bad // 512)
    for flags in (os.O_RDONLY, os.O_RDONLY | os.O_DIRECT):
        with opened(san.path, flags) as file:
            with within(ENOUGH), raises(errno.EIO):
                os.pread(file, 4096, bad)
            assert os.pread(file, 4096, 0) == content[:4096]
            assert os.pread(file, 4096, 5 * MIB) == content[5 * MIB : 5 * MIB + 4096]


@pytest.mark.parametrize(
    ("status", "sense", "number"),
    [
        (CHECK_CONDITION, MEDIUM_ERROR, errno.EIO),
        (CHECK_CONDITION, NO_SPACE, errno.ENOSPC),
        (RESERVATION_CONFLICT, None, errno.EBUSY),
    ],
    ids=["medium-error", "no-space", "reservation-conflict"],
)
def test_a_write_or_a_flush_that_the_target_refuses_is_its_errno_and_the_next_one_works(
    san: San, status: int, sense: tuple[int, int] | None, number: int
) -> None:
    with opened(san.path, os.O_RDWR) as file:
        for commands in (WRITES, FLUSHES):
            refusal = san.between.answer(commands, status, sense, times=1)
            with within(ENOUGH), raises(number):
                os.pwrite(file, b"refused", 0)
                os.fsync(file)
            assert refusal.given == 1
            os.pwrite(file, b"welcome", 0)
            os.fsync(file)
            assert san.backing.read_bytes()[:7] == b"welcome"


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(BUSY, id="busy"),
        pytest.param(TASK_SET_FULL, id="task-set-full", marks=pytest.mark.thorough),
    ],
)
def test_a_target_that_is_busy_is_asked_again_and_is_a_timeout_in_the_end(san: San, status: int) -> None:
    with opened(san.path, os.O_RDWR | os.O_DIRECT) as file:
        passing = san.between.answer(READS | WRITES | FLUSHES, status, times=4)
        os.pwrite(file, b"busy", 0)
        os.fsync(file)
        assert os.pread(file, 4, 0) == b"busy"
        assert passing.given == 4
        san.between.answer(READS | WRITES, status)
        with within(ENOUGH), raises(errno.ETIMEDOUT):
            os.pread(file, 4096, MIB)
        with within(ENOUGH), raises(errno.ETIMEDOUT):
            os.pwrite(file, bytes(4096), MIB)
        san.between.heal()
        os.pwrite(file, b"again", MIB)
        os.fsync(file)
        assert san.backing.read_bytes()[MIB : MIB + 5] == b"again"


def test_a_lun_that_becomes_read_only_is_EROFS_for_those_who_write_and_goes_on_being_read(san: San) -> None:
    unit = ("--mode", "logicalunit", "--tid", "1", "--lun", "1", "--op", "update", "--params")
    san.backing.write_bytes(content := random_bytes(SIZE))
    with opened(san.path, os.O_RDWR | os.O_DIRECT) as file:
        san.tgtd.run(*unit, "readonly=1")
        try:
            with within(ENOUGH), raises(errno.EROFS):
                os.pwrite(file, b"x", 0)
            assert os.pread(file, 4096, 4096) == content[4096:8192]
            # The next program that is started closes its copy of the descriptor, and Python, and so the proxy, stands
            # still meanwhile: nothing may be left to flush then.
            os.fsync(file)
        finally:
            san.tgtd.run(*unit, "readonly=0")
        os.pwrite(file, b"y", 0)
        os.fsync(file)
    assert san.backing.read_bytes() == b"y" + content[1:]
