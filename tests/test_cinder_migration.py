"""cinder-volume migrates through volfs: scripts/openstack's Cinder, with nothing changed but its configuration.

Bytes are compared behind Cinder's back. After each migration nothing may be left: of the source, of attachments, of
sessions and watchers.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pools
import pytest
import tempest_runs
from cinder_daemon import assert_nothing_attached, fill_everywhere, sessions, settings, stop_daemon
from mounts import wait_until
from openstack import GIB, CinderError, Openstack, StoredFile, StoredImage, fill
from services import MIB

from volfs import api

pytestmark = pytest.mark.slow

BACKENDS = ("ceph", "ceph2", "san", "local")
ANY_TYPE = "__DEFAULT__"  # one that names no backend, so that volumes of it migrate anywhere
SECONDS = 60
SPARSE = GIB // 8


@pytest.fixture(scope="module")
def through_volfs(openstack: Openstack, socket: str) -> Iterator[Openstack]:
    with openstack.configured(*settings(socket)):
        yield openstack


@pytest.fixture
def cinder(through_volfs: Openstack, socket: str) -> Iterator[Openstack]:
    """At the end nothing is attached or exported, and no volume is left."""
    yield through_volfs
    assert_nothing_attached(socket)
    assert sessions(through_volfs) == []


def place(cinder: Openstack, volume: str, backend: str) -> None:
    """Have an empty volume of ANY_TYPE there, wherever the scheduler has put it."""
    if cinder.show(volume)["os-vol-host-attr:host"] != cinder.host(backend):
        cinder.migrate(volume, backend, force_host_copy=True)
        cinder.wait_moved(volume, backend)


def move(cinder: Openstack, volume: str, backend: str) -> str:
    """Migrate by a copy, and see that dd did it and nothing is left of the source; what the log has got."""
    source, mark = cinder.where(volume), cinder.mark()
    digest = source.sha256()
    cinder.migrate(volume, backend, force_host_copy=True)
    shown = cinder.wait_moved(volume, backend)
    log = cinder.since(mark)
    assert (shown["status"], shown["migration_status"]) == ("available", "success"), log
    target = cinder.where(volume)
    assert target.sha256() == digest, log
    assert target.users() == []
    wait_until(lambda: not source.exists(), "the source is removed", SECONDS)
    return log


def test_a_volume_goes_round_all_backends(cinder: Openstack, new_volume: Callable[..., str]) -> None:
    """An eighth of it is data, and stays that where the target is new."""
    volume = new_volume(ANY_TYPE)
    place(cinder, volume, "ceph")
    fill_everywhere(cinder, volume, SPARSE)
    for backend in ("san", "ceph2", "local", "ceph"):
        log = move(cinder, volume, backend)
        assert cinder.where(volume).allocated() <= SPARSE + 4 * MIB, backend
        assert f"count={GIB}" in log
        assert "conv=sparse" in log
        assert "Traceback" not in log


def test_tempest_s_tests_and_the_plugin_s_pass(cinder: Openstack, socket: str, tmp_path: Path) -> None:
    """Between Ceph and the iSCSI target. Those that take a while are in test_all_of_the_plugin_s_tests_pass."""
    own = r"volfs.*test_(sparse_volume|volume_with_a_snapshot_is_refused)"
    regex = rf"tempest\.api\.volume\.admin\.test_volume_retype|{own}"
    passed = tempest_runs.run(cinder, tmp_path, regex, backends="ceph,san", others="san", socket=socket)
    assert set(passed) >= {
        "test_available_volume_retype",
        "test_available_volume_retype_with_migration",
        "test_volume_from_snapshot_retype_with_migration",
        "test_sparse_volume",
        "test_volume_with_a_snapshot_is_refused",
    }


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize("others", ["local", "san"])
def test_all_of_the_plugin_s_tests_pass(cinder: Openstack, socket: str, tmp_path: Path, others: str) -> None:
    for test in ("full", "sparse", "empty", "extended", "volume_with", "daemon_killed"):
        passed = tempest_runs.run(
            cinder, tmp_path, f"volfs.*test_{test}", backends=f"ceph,{others}", others=others, socket=socket
        )
        assert len(passed) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("length", [GIB, SPARSE], ids=["full", "sparse"])
@pytest.mark.parametrize(("first", "second"), list(permutations(BACKENDS, 2)), ids="-to-".join)
def test_each_pair_of_backends(
    cinder: Openstack, new_volume: Callable[..., str], first: str, second: str, length: int
) -> None:
    volume = new_volume(ANY_TYPE)
    place(cinder, volume, first)
    fill_everywhere(cinder, volume, length)
    move(cinder, volume, second)
    assert cinder.where(volume).allocated() <= length + 4 * MIB


@pytest.mark.thorough
def test_a_retype_moves_a_volume_too(cinder: Openstack, new_volume: Callable[..., str]) -> None:
    volume = new_volume("ceph")
    fill_everywhere(cinder, volume, SPARSE)
    before = cinder.where(volume).sha256()
    cinder.retype(volume, "san")
    shown = cinder.wait_moved(volume, "san")
    assert shown["volume_type"] == "san"
    assert cinder.where(volume).sha256() == before


@pytest.mark.thorough
def test_four_volumes_migrate_at_once(cinder: Openstack, new_volume: Callable[..., str]) -> None:
    volumes = [new_volume("ceph") for _ in range(4)]
    for number, volume in enumerate(volumes):
        fill(cinder.where(volume), SPARSE, offset=number * SPARSE, seed=number)
    before = [cinder.where(volume).sha256() for volume in volumes]
    for volume, kind in zip(volumes, ("san", "local", "san", "local"), strict=True):
        cinder.retype(volume, kind)
    for volume, kind in zip(volumes, ("san", "local", "san", "local"), strict=True):
        cinder.wait_moved(volume, kind)
    assert [cinder.where(volume).sha256() for volume in volumes] == before


@dataclass(frozen=True)
class Underway:
    """A migration that copies. `before` is the digest of the volume, `copier` the process of its dd."""

    volume: str
    source: StoredFile | StoredImage
    before: str
    copier: int
    daemon: int


@pytest.fixture
def underway(
    cinder: Openstack, socket: str, new_volume: Callable[..., str]
) -> Iterator[Callable[..., Underway]]:
    """underway(to, source="ceph"): have a full volume retyped, and return while dd is stopped half-way."""
    stopped: list[int] = []

    def start(kind: str, source_kind: str = "ceph") -> Underway:
        volume = new_volume(source_kind)
        fill(cinder.where(volume), GIB)
        source = cinder.where(volume)
        before = source.sha256()
        cinder.retype(volume, kind)
        wait_until(lambda: copiers(socket), "dd copies", SECONDS)
        stopped.extend(copiers(socket))
        os.kill(stopped[-1], signal.SIGSTOP)
        return Underway(volume, source, before, stopped[-1], api.status(socket_path=socket).pid)

    yield start
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def assert_failed_and_succeeds_next(cinder: Openstack, it: Underway, kind: str) -> None:
    assert_failed(cinder, it.volume, "ceph")
    assert it.source.sha256() == it.before
    cinder.retype(it.volume, kind)
    cinder.wait_moved(it.volume, kind)
    assert cinder.where(it.volume).sha256() == it.before


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_a_daemon_that_ends_fails_the_migration_and_the_next_one_succeeds(
    cinder: Openstack, underway: Callable[..., Underway], number: signal.Signals
) -> None:
    it = underway("san")
    os.kill(it.daemon, number)
    os.kill(it.copier, signal.SIGCONT)
    assert_failed_and_succeeds_next(cinder, it, "san")


@pytest.mark.thorough
def test_a_killed_cinder_volume_leaves_the_source_and_no_attachment(
    cinder: Openstack, socket: str, underway: Callable[..., Underway]
) -> None:
    """What it had attached is let go of as soon as its dd has ended; what it had made, the administrator removes."""
    it = underway("san")
    os.killpg(cinder.pids()["cinder-volume"], signal.SIGKILL)
    os.kill(it.copier, signal.SIGCONT)
    cinder.restart()
    wait_until(lambda: api.status(socket_path=socket).attached == [], "nothing is attached", SECONDS)
    assert it.source.users() == []
    assert it.source.sha256() == it.before
    (target,) = (shown["id"] for shown in cinder.volumes() if shown["id"] != it.volume)
    for left in (target, it.volume):
        status = {"status": "available", "migration_status": "none"}
        cinder.call("POST", f"/volumes/{left}/action", {"os-reset_status": status})
    cinder.delete(target)
    cinder.retype(it.volume, "san")
    cinder.wait_moved(it.volume, "san")
    assert cinder.where(it.volume).sha256() == it.before


@pytest.mark.thorough
def test_a_full_file_system_fails_the_migration(
    cinder: Openstack, tmp_path: Path, underway: Callable[..., Underway]
) -> None:
    directory = cinder.environment["VOLFS_CINDER_LOCAL"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "full", directory], check=True)
    try:
        it, mark = underway("local"), cinder.mark()
        os.kill(it.copier, signal.SIGCONT)
        assert_failed(cinder, it.volume, "ceph")
        assert os.strerror(errno.ENOSPC) in cinder.since(mark)
    finally:
        subprocess.run(["umount", directory], check=True)
    assert it.source.sha256() == it.before
    assert it.source.users() == []


@pytest.mark.thorough
def test_a_full_pool_fails_the_migration(cinder: Openstack, underway: Callable[..., Underway]) -> None:
    it, mark = underway("ceph2", "local"), cinder.mark()
    with pools.full(cinder.services, "rbd"):
        os.kill(it.copier, signal.SIGCONT)
        wait_until(lambda: os.strerror(errno.EDQUOT) in cinder.since(mark), "dd has failed", SECONDS)
    # Cinder removes the target when the pool has room: to remove an image there its driver waits for that.
    assert_failed(cinder, it.volume, "local")
    assert it.source.sha256() == it.before


@pytest.mark.thorough
def test_a_wrong_key_fails_the_migration_with_a_line_that_says_so(
    openstack: Openstack, tmp_path: Path, new_volume: Callable[..., str]
) -> None:
    """Cinder's driver has the right one, in a configuration of its own; volfs's process has another."""
    conf, right = openstack.services.ceph_conf, tmp_path / "ceph.conf"
    text = conf.read_text()
    right.write_text(text)
    keyring = tmp_path / "keyring"
    keyring.write_text(f"[client.volfs]\n\tkey = {base64.b64encode(bytes(28)).decode()}\n")
    where = [f"{name}.rbd_ceph_conf={right}" for name in ("ceph", "ceph2")]
    socket = str(tmp_path / "control")
    with openstack.configured(*settings(socket, *where)):
        volume, mark = new_volume("ceph"), openstack.mark()
        try:
            conf.write_text(re.sub(r"(?m)^keyring = .*", f"keyring = {keyring}", text))
            openstack.retype(volume, "local")
            assert_failed(openstack, volume, "ceph")
        finally:
            conf.write_text(text)
        log = openstack.since(mark)
        assert re.search(
            r"volfs: rbd: connect: Ceph cluster \(\S+, client\.volfs\): .*permission denied", log
        ), log
        openstack.retype(volume, "local")
        openstack.wait_moved(volume, "local")
    stop_daemon(socket)


def test_without_a_daemon_the_migration_fails_with_a_clear_line(
    openstack: Openstack, tmp_path: Path, new_volume: Callable[..., str]
) -> None:
    nowhere = str(tmp_path / "control")
    with openstack.configured(*settings(nowhere, "volfs.start_daemon=false")):
        volume = new_volume("ceph")
        mark = openstack.mark()
        openstack.retype(volume, "local")
        assert_failed(openstack, volume, "ceph")
        assert f"no volfs daemon answers at {nowhere}" in openstack.since(mark)
        assert openstack.where(volume).users() == []


@pytest.mark.thorough
def test_without_a_daemon_volumes_may_be_attached_as_ever(
    openstack: Openstack, tmp_path: Path, new_volume: Callable[..., str]
) -> None:
    nowhere = str(tmp_path / "control")
    with openstack.configured(*settings(nowhere, "volfs.start_daemon=false", "volfs.without_daemon=stock")):
        volume = new_volume("ceph")
        fill_everywhere(openstack, volume, SPARSE)
        before, mark = openstack.where(volume).sha256(), openstack.mark()
        openstack.retype(volume, "local")
        openstack.wait_moved(volume, "local")
        assert openstack.where(volume).sha256() == before
        assert f"no volfs daemon answers at {nowhere}" in openstack.since(mark)


def test_volfs_copies_by_itself_when_told_so(
    openstack: Openstack, socket: str, new_volume: Callable[..., str]
) -> None:
    with openstack.configured(*settings(socket, "volfs.copy_method=volfs", "volfs.verify=true")):
        volume = new_volume(ANY_TYPE)
        place(openstack, volume, "ceph")
        fill_everywhere(openstack, volume, SPARSE)
        for backend in ("san", "ceph2"):
            log = move(openstack, volume, backend)
            assert openstack.where(volume).allocated() <= SPARSE + 4 * MIB, backend
            assert "verify: 100%" in log
    assert_nothing_attached(socket)


def copiers(socket: str) -> list[int]:
    """The processes of dd that have copied something to or from a path of this daemon's mount."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            copied = int((entry / "io").read_text().split("wchar: ")[1].split()[0])
            if arguments[0].endswith(b"dd") and f"{socket}.mnt".encode() in b" ".join(arguments):
                found += [int(entry.name)] if copied > 16 * MIB else []
    return found


def assert_failed(cinder: Openstack, volume: str, backend: str, seconds: float = SECONDS) -> None:
    """The volume is where and what it was, and what was made for the migration is gone."""
    with pytest.raises(CinderError, match="stayed at"):
        cinder.wait_moved(volume, {"ceph": "san"}.get(backend, "ceph"), seconds)
    shown = cinder.show(volume)
    assert (shown["status"], shown["os-vol-host-attr:host"]) == ("available", cinder.host(backend))
    wait_until(lambda: len(cinder.volumes()) == 1, "the target is removed", SECONDS)
