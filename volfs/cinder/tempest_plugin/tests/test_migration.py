"""Volumes migrate between Ceph and other backends, block for block, attached to nothing."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from typing import Any, ClassVar

from tempest import config
from tempest.api.volume import base
from tempest.common import waiters
from tempest.lib import decorators
from tempest.lib import exceptions as lib_exc

from volfs import api
from volfs.cinder.tempest_plugin import storage

CONF = config.CONF
GIB = 1 << 30
STATUS = "os-vol-mig-status-attr:migstat"
NAME_ID = "os-vol-mig-status-attr:name_id"
HOST = "os-vol-host-attr:host"
PAUSE_SECONDS = 0.5
COPYING_SECONDS = 1.0


class MigrationTest(base.BaseVolumeAdminTest):  # type: ignore[misc]
    """There and back again, by retype and by migrate."""

    # Users see no host; with this version the administrator's name_id is part of the answer.
    volume_min_microversion = "3.27"
    volume_max_microversion = "latest"
    types: ClassVar[dict[str, str]]  # name of a volume type, by backend
    any_type: ClassVar[str]  # of one that fits all

    @classmethod
    def skip_checks(cls) -> None:
        super().skip_checks()
        if not CONF.volfs.ceph_backend or not CONF.volfs.other_backends:
            raise cls.skipException("tempest.conf names no ceph_backend or no other_backends in [volfs]")

    @classmethod
    def resource_setup(cls) -> None:
        super().resource_setup()
        cls.types = {
            backend: cls.create_volume_type(extra_specs={"volume_backend_name": backend})["name"]
            for backend in [CONF.volfs.ceph_backend, *CONF.volfs.other_backends]
        }
        # A volume whose type names a backend is retyped to another, and does not migrate away from its type.
        cls.any_type = cls.create_volume_type()["name"]

    @decorators.idempotent_id("5d0f4a3e-3a08-4b4c-a5bb-0c6b3f0b8f01")
    def test_full_volume(self) -> None:
        """Data in every block."""
        self._there_and_back(one_in=1)

    @decorators.idempotent_id("5d0f4a3e-3a08-4b4c-a5bb-0c6b3f0b8f02")
    def test_sparse_volume(self) -> None:
        """Data in an eighth of the blocks."""
        self._there_and_back(one_in=8)

    @decorators.idempotent_id("5d0f4a3e-3a08-4b4c-a5bb-0c6b3f0b8f03")
    def test_empty_volume(self) -> None:
        """Nothing was ever written."""
        self._there_and_back(one_in=0)

    @decorators.idempotent_id("5d0f4a3e-3a08-4b4c-a5bb-0c6b3f0b8f04")
    def test_extended_volume(self) -> None:
        """Data up to an end that was not there when the volume was made."""
        volume = self._create()
        size = volume["size"] + 1
        self.volumes_client.extend_volume(volume["id"], new_size=size)
        waiters.wait_for_volume_resource_status(self.volumes_client, volume["id"], "available")
        self._move_through_all(volume["id"], self._fill(volume["id"], size * GIB, 8), size * GIB)

    @decorators.idempotent_id("5d0f4a3e-3a08-4b4c-a5bb-0c6b3f0b8f05")
    def test_volume_with_a_snapshot_is_refused(self) -> None:
        """By Cinder itself: a snapshot does not migrate."""
        volume = self._create()
        before = self._fill(volume["id"], GIB, 8)
        self.create_snapshot(volume["id"])
        host = self._host_of(CONF.volfs.other_backends[0])
        self.assertRaises(
            lib_exc.BadRequest,
            self.admin_volume_client.migrate_volume,
            volume["id"],
            host=host,
            force_host_copy=True,
        )
        self.assertEqual(before, self._sha256(volume["id"], GIB))

    @decorators.idempotent_id("5d0f4a3e-3a08-4b4c-a5bb-0c6b3f0b8f06")
    def test_daemon_killed_half_way(self) -> None:
        """The migration fails, the source has what it had, and the next migration succeeds."""
        socket = CONF.volfs.daemon_socket
        if not socket:
            raise self.skipException("tempest.conf names no daemon_socket in [volfs]")
        volume = self._create()
        before = self._fill(volume["id"], GIB, 1)
        self._unpin(volume["id"])
        host = self._host_of(CONF.volfs.other_backends[0])
        self.admin_volume_client.migrate_volume(volume["id"], host=host, force_host_copy=True)
        os.kill(self._daemon_that_copies(socket), signal.SIGKILL)
        self.assertEqual("error", self._wait_migrated(volume["id"]))
        self.assertEqual(before, self._sha256(volume["id"], GIB))
        self._migrate(volume["id"], CONF.volfs.other_backends[0])
        self.assertEqual(before, self._sha256(volume["id"], GIB))

    def _there_and_back(self, one_in: int) -> None:
        volume = self._create()
        before = self._fill(volume["id"], volume["size"] * GIB, one_in) if one_in else None
        size = volume["size"] * GIB
        self._move_through_all(volume["id"], before or self._sha256(volume["id"], size), size)

    def _move_through_all(self, volume_id: str, expected: str, size: int) -> None:
        ceph = CONF.volfs.ceph_backend
        for backend in CONF.volfs.other_backends:
            for target in (backend, ceph):
                self._retype(volume_id, target)
                self.assertEqual(expected, self._sha256(volume_id, size), f"after retype to {target}")
        self._unpin(volume_id)
        for backend in CONF.volfs.other_backends:
            for target in (backend, ceph):
                self._migrate(volume_id, target)
                self.assertEqual(expected, self._sha256(volume_id, size), f"after migration to {target}")

    def _create(self) -> dict[str, Any]:
        created: dict[str, Any] = self.create_volume(volume_type=self.types[CONF.volfs.ceph_backend], size=1)
        return created

    def _fill(self, volume_id: str, size: int, one_in: int) -> str:
        with tempfile.NamedTemporaryFile() as file:
            digest = storage.fill(file, size, one_in)
            storage.write(
                CONF.volfs.write_command, self._backend(volume_id), self._name(volume_id), file.name
            )
        self.assertEqual(digest, self._sha256(volume_id, size), "as written")
        return digest

    def _sha256(self, volume_id: str, size: int) -> str:
        return storage.sha256(CONF.volfs.read_command, self._backend(volume_id), self._name(volume_id), size)

    def _show(self, volume_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.admin_volume_client.show_volume(volume_id)["volume"]
        return shown

    def _name(self, volume_id: str) -> str:
        return f"volume-{self._show(volume_id).get(NAME_ID) or volume_id}"

    def _backend(self, volume_id: str) -> str:
        """volume_backend_name: the pool's name in HOST@SECTION#POOL, by Cinder's default."""
        host: str = self._show(volume_id)[HOST]
        return host.partition("#")[2]

    def _host_of(self, backend: str) -> str:
        pools = self.admin_scheduler_stats_client.list_pools()["pools"]
        host: str = next(pool["name"] for pool in pools if pool["name"].endswith(f"#{backend}"))
        return host

    def _unpin(self, volume_id: str) -> None:
        self.admin_volume_client.retype_volume(volume_id, new_type=self.any_type, migration_policy="never")
        waiters.wait_for_volume_retype(self.admin_volume_client, volume_id, self.any_type)

    def _retype(self, volume_id: str, backend: str) -> None:
        self.admin_volume_client.retype_volume(
            volume_id, new_type=self.types[backend], migration_policy="on-demand"
        )
        waiters.wait_for_volume_retype(self.admin_volume_client, volume_id, self.types[backend])
        self._wait_alone(volume_id)
        self.assertEqual(backend, self._backend(volume_id))

    def _migrate(self, volume_id: str, backend: str) -> None:
        self.admin_volume_client.migrate_volume(volume_id, host=self._host_of(backend), force_host_copy=True)
        self.assertEqual("success", self._wait_migrated(volume_id))
        self._wait_alone(volume_id)
        self.assertEqual(backend, self._backend(volume_id))

    def _wait_migrated(self, volume_id: str) -> str:
        """How the migration ended: "success" or "error"."""
        deadline = time.monotonic() + CONF.volume.build_timeout
        while time.monotonic() < deadline:
            shown = self._show(volume_id)
            if shown["status"] == "available" and shown[STATUS] in ("success", "error"):
                return str(shown[STATUS])
            time.sleep(PAUSE_SECONDS)
        raise lib_exc.TimeoutException(f"volume {volume_id} still migrates: {self._show(volume_id)}")

    def _wait_alone(self, volume_id: str) -> None:
        """Until the volume that the migration made, or left behind, is deleted."""
        shown = self._show(volume_id)
        params = {"all_tenants": True, "name": shown["name"]}
        for volume in self.admin_volume_client.list_volumes(params=params)["volumes"]:
            if volume["id"] != volume_id:
                self.admin_volume_client.wait_for_resource_deletion(volume["id"])

    def _daemon_that_copies(self, socket: str) -> int:
        """Its process, as soon as a volume has been open for longer than it takes to look at it."""
        deadline = time.monotonic() + CONF.volume.build_timeout
        since = None
        while time.monotonic() < deadline:
            status = api.status(socket_path=socket)
            now = time.monotonic()
            since = (since or now) if any(volume.handles for volume in status.open) else None
            if since is not None and now - since > COPYING_SECONDS:
                return int(status.pid)
            time.sleep(PAUSE_SECONDS / 10)
        raise lib_exc.TimeoutException("nothing is copied")
