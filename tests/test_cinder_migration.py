"""cinder-volume migrates through volfs: scripts/openstack's Cinder, with nothing changed but its configuration.

Bytes are compared behind Cinder's back. After each migration nothing may be left: of the source, of attachments, of
sessions and watchers.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import pytest
import tempest_runs
from mounts import wait_until
from openstack import GIB, CinderError, Openstack, fill
from services import MIB

from volfs import api
from volfs.control import StatusReply
from volfs.errors import ControlError

pytestmark = pytest.mark.slow

BACKENDS = ("ceph", "ceph2", "san", "local")
ANY_TYPE = "__DEFAULT__"  # one that names no backend, so that volumes of it migrate anywhere
SECONDS = 60
SPARSE = GIB // 8


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the daemon that cinder-volume starts when it needs one."""
    path = tmp_path_factory.mktemp("d") / "control"
    path.parent.chmod(0o700)
    yield str(path)
    stop_daemon(str(path))


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


def settings(socket: str, *more: str) -> list[str]:
    manager = "volume_manager=volfs.cinder.manager.VolumeManager"
    return [manager, f"volfs.socket={socket}", "volfs.detach_timeout=20", *more]


def stop_daemon(socket: str) -> None:
    if status := status_of(socket):
        api.unmount(status.mountpoint)


def assert_nothing_attached(socket: str) -> None:
    if status := status_of(socket):
        assert (status.attached, status.open) == ([], [])


def status_of(socket: str) -> StatusReply | None:
    """None when the daemon was killed, or has ended as nobody used it."""
    try:
        return api.status(socket_path=socket)
    except ControlError as exc:
        if exc.errno != errno.ECONNREFUSED:
            raise
        return None


def sessions(cinder: Openstack) -> list[str]:
    """Of the volumes' targets; there are none without an export."""
    shown = cinder.services.run("tgtadm", "--lld", "iscsi", "--op", "show", "--mode", "target").decode()
    return [line for line in shown.splitlines() if line.startswith("Target ") and ":volume-" in line]


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


def fill_everywhere(cinder: Openstack, volume: str, length: int) -> None:
    """Data in eight places that add up to `length`, the last of them at the very end."""
    stored = cinder.where(volume)
    for number in range(8):
        fill(stored, length // 8, GIB * (number + 1) // 8 - length // 8, seed=number)


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


def test_tempest_retypes_with_migration(cinder: Openstack, socket: str, tmp_path: Path) -> None:
    """Its own tests, between Ceph and the iSCSI target."""
    regex = r"tempest\.api\.volume\.admin\.test_volume_retype"
    passed = tempest_runs.run(cinder, tmp_path, regex, backends="ceph,san", others="san", socket=socket)
    assert {"test_available_volume_retype_with_migration", "test_available_volume_retype"} <= set(passed)
    assert "test_volume_from_snapshot_retype_with_migration" in passed


def test_the_plugin_s_tests_pass(cinder: Openstack, socket: str, tmp_path: Path) -> None:
    """Those that take a while are in test_all_of_the_plugin_s_tests_pass."""
    regex = r"volfs.*test_(sparse_volume|volume_with_a_snapshot_is_refused)"
    passed = tempest_runs.run(cinder, tmp_path, regex, backends="ceph,san", others="san", socket=socket)
    assert sorted(passed) == ["test_sparse_volume", "test_volume_with_a_snapshot_is_refused"]


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


def test_a_daemon_that_is_killed_fails_the_migration_and_the_next_one_succeeds(
    cinder: Openstack, socket: str, new_volume: Callable[..., str]
) -> None:
    volume = new_volume("ceph")
    fill(cinder.where(volume), GIB)
    source, before = cinder.where(volume), cinder.where(volume).sha256()
    cinder.retype(volume, "san")
    pid = wait_until_copying(cinder, socket)
    os.kill(pid, signal.SIGKILL)
    assert_failed(cinder, volume, "ceph")
    assert source.sha256() == before
    cinder.retype(volume, "san")
    cinder.wait_moved(volume, "san")
    assert cinder.where(volume).sha256() == before


@pytest.mark.thorough
def test_a_killed_cinder_volume_leaves_the_source_and_no_attachment(
    cinder: Openstack, socket: str, new_volume: Callable[..., str]
) -> None:
    """What it had attached is let go of as soon as its dd has ended; what it had made, the administrator removes."""
    volume = new_volume("ceph")
    fill(cinder.where(volume), GIB)
    source, before = cinder.where(volume), cinder.where(volume).sha256()
    cinder.retype(volume, "san")
    wait_until_copying(cinder, socket)
    os.killpg(cinder.pids()["cinder-volume"], signal.SIGKILL)
    cinder.restart()
    wait_until(lambda: api.status(socket_path=socket).attached == [], "nothing is attached", SECONDS)
    assert source.users() == []
    assert source.sha256() == before
    (target,) = (shown["id"] for shown in cinder.volumes() if shown["id"] != volume)
    for left in (target, volume):
        status = {"status": "available", "migration_status": "none"}
        cinder.call("POST", f"/volumes/{left}/action", {"os-reset_status": status})
    cinder.delete(target)
    cinder.retype(volume, "san")
    cinder.wait_moved(volume, "san")
    assert cinder.where(volume).sha256() == before


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


def wait_until_copying(cinder: Openstack, socket: str) -> int:
    """The daemon's process, once data has reached a target of the san backend."""

    def written() -> bool:
        directory = Path(cinder.environment["VOLFS_CINDER_SAN"])
        return any(path.stat().st_blocks * 512 > 16 * MIB for path in directory.iterdir())

    wait_until(written, "the target has data", SECONDS)
    return api.status(socket_path=socket).pid


def assert_failed(cinder: Openstack, volume: str, backend: str, seconds: float = SECONDS) -> None:
    """The volume is where and what it was, and what was made for the migration is gone."""
    with pytest.raises(CinderError, match="stayed at"):
        cinder.wait_moved(volume, {"ceph": "san"}.get(backend, "ceph"), seconds)
    shown = cinder.show(volume)
    assert (shown["status"], shown["os-vol-host-attr:host"]) == ("available", cinder.host(backend))
    wait_until(lambda: len(cinder.volumes()) == 1, "the target is removed", SECONDS)
