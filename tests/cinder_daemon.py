"""The daemon that Cinder's services start when they need one, and what they may not leave behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from openstack import GIB, Openstack, fill

from volfs import api
from volfs.control import StatusReply
from volfs.errors import ControlError


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a daemon that goes with the module."""
    path = tmp_path_factory.mktemp("d") / "control"
    path.parent.chmod(0o700)
    yield str(path)
    stop_daemon(str(path))


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


def fill_everywhere(cinder: Openstack, volume: str, length: int) -> None:
    """Data in eight places that add up to `length`, the last of them at the very end."""
    stored = cinder.where(volume)
    for number in range(8):
        fill(stored, length // 8, GIB * (number + 1) // 8 - length // 8, seed=number)
