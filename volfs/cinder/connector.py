"""Connectors for os-brick whose volumes are files of a volfs mount.

They stand in for those of os-brick, which for RBD return a Python object that no dd can copy, and for iSCSI need the
kernel's initiator and root. The interface is that of os_brick.initiator.initiator_connector.InitiatorConnector, where
`connection_properties` is the `data` of a connection info.

A volume stays connected as long as the process that connected it lives, or until it is disconnected; when the process
dies, the daemon lets go of it by itself. One process may connect a volume more than once, and owes as many
disconnects. No lock between processes is needed: the daemon, which serves them all, does one thing at a time to a
volume. Any thread may call.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from os_brick import exception, utils
from os_brick.initiator.connectors.base import BaseLinuxConnector
from os_brick.privileged import rootwrap

from volfs import api
from volfs.control import StatusReply
from volfs.errors import ControlError, SourceError, VolfsError, VolumeNotFound

log = logging.getLogger(__name__)

DISCONNECT_SECONDS = 60.0  # for programs that have the volume open to close it
SECTOR = 512

Properties = Mapping[str, Any]


class VolfsConnector(BaseLinuxConnector):  # type: ignore[misc]
    """For volumes of any protocol that volfs knows. `protocol` is the driver_volume_type of the connection infos;
    `socket_path` that of the daemon, by default this user's own; `detach_seconds` what programs that have a volume
    open are given to close it; `blank` as of api.attach.
    """

    protocol = ""

    def __init__(
        self,
        root_helper: str,
        *args: Any,
        protocol: str = "",
        socket_path: str | None = None,
        detach_seconds: float = DISCONNECT_SECONDS,
        blank: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root_helper, *args, **kwargs)
        self.protocol = protocol or self.protocol
        self.socket_path = socket_path
        self._detach_seconds = detach_seconds
        self._blank = blank

    @staticmethod
    def get_connector_properties(root_helper: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing that a storage would have to know of this host."""
        return {}

    def connect_volume(self, connection_properties: Properties) -> dict[str, Any]:
        """Attach the volume. `path` is a str, the volume's file, or where it is `encrypted` a link to that for an
        encryptor to replace; `volfs_lease` is for `disconnect_volume`.
        """
        with _errors(f"{self.protocol}: connect"):
            info = self._info(connection_properties)
            lease = api.Lease(info, None, self.socket_path, all_handles=True, blank=self._blank)
        path = lease.attached.path
        device = {"type": "block", "path": path, "volfs_lease": _LEASES.keep(lease)}
        if connection_properties.get("encrypted"):
            device |= {"path": new_link(path), "volfs_path": path}
            try:
                with _errors(f"{self.protocol}: link for an encryptor"):
                    rootwrap.link_root(path, device["path"], force=True)
            except BaseException:
                self.disconnect_volume(connection_properties, device, force=True, ignore_errors=True)
                raise
        return device

    def disconnect_volume(
        self,
        connection_properties: Properties,
        device_info: Properties | None = None,
        force: bool = False,
        ignore_errors: bool = False,
    ) -> None:
        """Return when all is stable and the storage knows of no user any more, but for those who connected it as well.

        BrickException when something could not be made stable, or a program has the volume open still; in this case it
        stays connected, but with `force`, which has the daemon let go when that program ends. What this process did
        not connect is detached from everybody. `ignore_errors` makes log lines of errors.
        """
        known = device_info or connection_properties
        has_ended = force or ignore_errors
        try:
            with _errors(f"{self.protocol}: disconnect"):
                if not _LEASES.release(known.get("volfs_lease"), self._detach_seconds, force):
                    self._detach(connection_properties, known)
            has_ended = True
        except exception.BrickException as exc:
            if not ignore_errors:
                raise
            log.warning("%s", exc)
        finally:
            if has_ended:
                _remove_links(known.get("path"), connection_properties.get("device_path"))

    def get_volume_paths(self, connection_properties: Properties) -> list[str]:
        """The volume's path where it is connected, by whomever; else none."""
        with _errors(f"{self.protocol}: paths"):
            status = self._status(self._info(connection_properties))
        if status is None:
            return []
        return [os.path.join(_directory(status), it.name) for it in status.attached]

    def get_search_path(self) -> str | None:
        """The directory of all connected volumes; None without a daemon."""
        with _errors("status"):
            status = self._status()
        return None if status is None else _directory(status)

    def extend_volume(self, connection_properties: Properties) -> int:
        """The size in bytes that the volume has on the storage now."""
        with _errors(f"{self.protocol}: extend"):
            lease = api.Lease(self._info(connection_properties), None, self.socket_path)
            try:
                return lease.attached.size
            finally:
                lease.release()

    def check_valid_device(self, path: str, run_as_root: bool = True) -> bool:
        """Whether a first sector can be read there, as root or as this user."""
        if run_as_root:
            return bool(super().check_valid_device(path, run_as_root))
        try:
            with open(path, "rb", 0) as file:
                return len(file.read(SECTOR)) > 0
        except OSError as exc:
            log.warning("%s: %s", path, exc.strerror)
            return False

    def _status(self, info: Properties | None = None) -> StatusReply | None:
        """None without a daemon: the first volume starts one."""
        try:
            return api.status(info, socket_path=self.socket_path)
        except ControlError as exc:
            if exc.errno not in (errno.ECONNREFUSED, errno.ECONNRESET):
                raise
            return None

    def _info(self, connection_properties: Properties) -> dict[str, Any]:
        return {"driver_volume_type": self.protocol, "data": dict(connection_properties)}

    def _detach(self, connection_properties: Properties, known: Properties) -> None:
        path = known.get("volfs_path") or known.get("path")
        paths = [path] if isinstance(path, str) else self.get_volume_paths(connection_properties)
        for each in paths:
            try:
                api.detach(each, wait=self._detach_seconds, socket_path=self.socket_path)
            except VolumeNotFound:  # already
                pass


class RbdConnector(VolfsConnector):
    """Ceph RBD by librbd, without the kernel's client."""

    protocol = "rbd"


class IscsiConnector(VolfsConnector):
    """iSCSI in user space, or as the daemon is configured."""

    protocol = "iscsi"


class _Leases:
    """What this process has connected. A child that it forks has none of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: dict[str, api.Lease] = {}
        self._numbers = itertools.count(1)

    def keep(self, lease: api.Lease) -> str:
        """What the lease is known by, in an answer that its caller may want to keep as JSON."""
        with self._lock:
            key = f"{os.getpid()}-{next(self._numbers)}"
            self._leases[key] = lease
        return key

    def release(self, key: object, seconds: float, force: bool) -> bool:
        """Release it; False when it is none of this process. With `force` it is given up whatever happens."""
        with self._lock:
            lease = self._leases.pop(key, None) if isinstance(key, str) else None
        if lease is None or not lease.is_own:
            return False
        try:
            lease.release(seconds)
        except VolfsError:
            if force:
                lease.abandon()
            elif lease.is_held:
                with self._lock:
                    self._leases[str(key)] = lease
            raise
        return True


_LEASES = _Leases()


def new_link(path: str) -> str:
    """Where a link to it is for one encryptor: of a name that no other attachment of the volume has.

    os-brick's own has the whole path in its name, and "crypt-" before that as the name of the decrypted device is more
    than the 127 bytes that the device mapper takes, if the path is long or has a long IQN.
    """
    return f"{utils.CUSTOM_LINK_PREFIX}-volfs-{hashlib.sha256(path.encode()).hexdigest()[:16]}-{secrets.token_hex(4)}"


def _remove_links(*paths: object) -> None:
    """Those of them that `new_link` has named, which may be gone."""
    links = [
        path
        for path in paths
        if isinstance(path, str) and path.startswith(f"{utils.CUSTOM_LINK_PREFIX}-volfs-")
    ]
    if links:
        rootwrap.unlink_root(*set(links), no_errors=True)


def _directory(status: StatusReply) -> str:
    """Of all volumes that are attached on a mount."""
    return os.path.join(status.mountpoint, "attached")


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """Ours as os-brick's, with our words."""
    try:
        yield
    except SourceError as exc:
        raise exception.InvalidParameterValue(err=f"volfs: {doing}: {exc}") from exc
    except OSError as exc:
        raise exception.BrickException(message=f"volfs: {doing}: {exc}") from exc
