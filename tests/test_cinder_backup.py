"""Backup and restore by a cinder-backup that attaches volumes by volfs; by Ceph's own driver, too.

Bytes are compared behind Cinder's back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cinder_daemon import assert_nothing_attached, fill_everywhere, sessions, settings
from openstack import GIB, CinderError, Openstack, fill
from services import MIB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first one starts what it needs of Cinder

PROTOCOLS = {"ceph": "rbd", "san": "iscsi"}
DAEMON = "cinder-backup"
USE = ("volfs.use_for=copies,backups", "backup_manager=volfs.cinder.backup.BackupManager")
BY_CEPH = "backup_driver=cinder.backup.drivers.ceph.CephBackupDriver"
DATA = GIB // 16

NewVolume = Callable[..., str]


@contextmanager
def backups(openstack: Openstack, *options: str) -> Iterator[Openstack]:
    """Openstack with cinder-backup. At the end nothing is attached, exported or backed up."""
    with openstack.configured(*options, extras=["backup"]):
        try:
            yield openstack
        finally:
            openstack.delete_backups()
        assert sessions(openstack) == []


@pytest.fixture
def cinder(openstack: Openstack, socket: str) -> Iterator[Openstack]:
    with backups(openstack, *settings(socket, *USE)):
        yield openstack
    assert_nothing_attached(socket)


def attached(log: str) -> list[tuple[str, str]]:
    """Protocol and id of the volumes that volfs has attached."""
    return re.findall(r"volfs: (\w+) volume (\S+) is /", log)


def restore(cinder: Openstack, backup: str, volume: str, digest: str) -> str:
    """Onto a volume with old data, and look at what it has then. Returns what the log has got."""
    stored, mark = cinder.where(volume), cinder.mark(DAEMON)
    fill(stored, 16 * MIB, offset=MIB, seed=99)
    cinder.restore(backup, volume)
    log = cinder.since(mark, DAEMON)
    assert stored.sha256() == digest, log
    assert stored.users() == []
    return log


def test_volumes_are_backed_up_and_restored_from_path_to_path(
    cinder: Openstack, new_volume: NewVolume
) -> None:
    """Of Ceph to iSCSI, and back, by a driver that makes files."""
    volume, other = new_volume("ceph"), new_volume("san")
    fill_everywhere(cinder, volume, DATA)
    mark, digest = cinder.mark(DAEMON), cinder.where(volume).sha256()
    backup = cinder.back_up(volume)
    assert attached(cinder.since(mark, DAEMON)) == [("rbd", volume)]
    assert attached(restore(cinder, backup, other, digest)) == [("iscsi", other)]

    fill(cinder.where(other), 8 * MIB, offset=GIB // 2, seed=5)
    mark, digest = cinder.mark(DAEMON), cinder.where(other).sha256()
    backup = cinder.back_up(other)
    assert attached(cinder.since(mark, DAEMON)) == [("iscsi", other)]
    assert attached(restore(cinder, backup, volume, digest)) == [("rbd", volume)]
    assert cinder.where(volume).users() == []


def test_ceph_backs_up_its_own_volumes_by_differences(
    openstack: Openstack, socket: str, new_volume: NewVolume
) -> None:
    """For which its driver wants librbd's handle, and no path."""
    with backups(openstack, *settings(socket, *USE, BY_CEPH)) as cinder:
        volume, mark = new_volume("ceph"), cinder.mark(DAEMON)
        fill_everywhere(cinder, volume, DATA)
        cinder.back_up(volume)
        fill(cinder.where(volume), 8 * MIB, offset=GIB // 2, seed=5)
        changed = cinder.back_up(volume, incremental=True)
        restore(cinder, changed, volume, cinder.where(volume).sha256())
        log = cinder.since(mark, DAEMON)
        assert attached(log) == []
        whole, difference = re.findall(r"cmd1='(rbd export-diff [^']*-)'", log)[:2]
        assert "--from-snap" not in whole
        assert "--from-snap" in difference


@pytest.mark.thorough
def test_ceph_backs_up_volumes_of_others_from_their_paths(
    openstack: Openstack, socket: str, new_volume: NewVolume
) -> None:
    with backups(openstack, *settings(socket, *USE, BY_CEPH)) as cinder:
        volume = new_volume("san")
        fill(cinder.where(volume), 8 * MIB, offset=GIB // 2)
        mark, digest = cinder.mark(DAEMON), cinder.where(volume).sha256()
        backup = cinder.back_up(volume)
        assert attached(cinder.since(mark, DAEMON)) == [("iscsi", volume)]
        assert attached(restore(cinder, backup, volume, digest)) == [("iscsi", volume)]
    assert_nothing_attached(socket)


@pytest.mark.thorough
def test_without_a_daemon_the_backup_fails_with_a_clear_line(
    openstack: Openstack, tmp_path: Path, new_volume: NewVolume
) -> None:
    nowhere = str(tmp_path / "control")
    with backups(openstack, *settings(nowhere, "volfs.start_daemon=false", *USE)) as cinder:
        volume = new_volume("ceph")
        mark = cinder.mark(DAEMON)
        with pytest.raises(CinderError, match=f"is error .*no volfs daemon answers at {nowhere}"):
            cinder.back_up(volume)
        assert f"no volfs daemon answers at {nowhere}" in cinder.since(mark, DAEMON)
        cinder.wait_status(volume, "available")
        assert cinder.where(volume).users() == []


@pytest.mark.thorough
def test_backups_are_made_as_ever_when_volfs_is_not_for_them(
    openstack: Openstack, socket: str, new_volume: NewVolume
) -> None:
    with backups(openstack, *settings(socket)) as cinder:
        volume = new_volume("ceph")
        fill_everywhere(cinder, volume, DATA)
        mark, digest = cinder.mark(DAEMON), cinder.where(volume).sha256()
        backup = cinder.back_up(volume)
        assert attached(cinder.since(mark, DAEMON)) == []
        assert attached(restore(cinder, backup, volume, digest)) == []
