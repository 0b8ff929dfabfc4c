"""The private Cinder of scripts/openstack, and volumes of it.

`openstack` starts it once a session, as `services` does with the storage that it works on. `Openstack` asks Cinder
to do things, by its API, and `where` tells how to look at a volume's bytes past Cinder. What a daemon says is in its
log: `mark` before, `since` after.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import random
import subprocess
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from services import (
    MIB,
    TOP,
    Image,
    Services,
    describe,
    is_last,
    load_script,
    script_command,
    skip_or_fail,
)
from volumes import processes_with

GIB = 1024**3
COMMAND_SECONDS = 280.0
NONE_SECONDS = 5.0
SCRIPT = TOP / "scripts" / "openstack"
POOLS = {"ceph": "volumes", "ceph2": "rbd"}

script = load_script(SCRIPT)


@dataclass(frozen=True)
class StoredFile:
    """A volume of the san or local backend."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, data: bytes, offset: int = 0) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def exists(self) -> bool:
        return self.path.exists()

    def allocated(self) -> int:
        return self.path.stat().st_blocks * 512

    def users(self) -> list[str]:
        return processes_with(self.path)


@dataclass(frozen=True)
class StoredImage(Image):
    """A volume of one of the Ceph backends."""

    def users(self) -> list[str]:
        return self.watchers()

    def allocated(self) -> int:
        import rbd

        runs: list[int] = []
        with self._pool() as pool, rbd.Image(pool, self.name, read_only=True) as image:
            image.diff_iterate(0, image.size(), None, lambda _, length, exists: runs.append(length * exists))
        return sum(runs)

    def exists(self) -> bool:
        return self.name in self.services.run("rbd", "ls", self.pool).decode().split()


def fill(stored: StoredFile | StoredImage, size: int, offset: int = 0, seed: int = 1) -> None:
    """With bytes that differ everywhere, and are the same for the same seed."""
    generator = random.Random(seed)
    for at in range(offset, offset + size, 8 * MIB):
        stored.write(generator.randbytes(min(8 * MIB, offset + size - at)), at)


class CinderError(Exception):
    """An answer of the API that is no success, or a volume that came to an error."""


@dataclass
class Openstack:
    """What runs, and how to reach it."""

    var: Path
    services: Services
    environment: Mapping[str, str] = field(repr=False)  # for clients, as `scripts/openstack env` prints it
    _api: Any = field(default=None, repr=False)
    look_seconds: ClassVar[float] = 0.2  # between two looks at what is waited for

    # ---- the API

    def call(self, method: str, path: str, body: Any = None, service: str = "cinder") -> Any:
        """What Cinder answers, or Glance; path is that below /v3 of Cinder."""
        for attempt in (1, 2):
            if self._api is None:
                self._api = script.Api(script.read_state(script.Place(self.var)))
                self._api.log_in()
            try:
                return self._api.request(method, getattr(self._api, service) + path, body)[0]
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == 401 and attempt == 1:
                        self._api = None
                        continue
                    text = error.read().decode(errors="replace")
                raise CinderError(f"{method} {path}: {error.code} {text}") from None
        raise AssertionError("unreachable")

    def show(self, volume: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/volumes/{volume}")["volume"])

    def volumes(self) -> list[dict[str, Any]]:
        return list(self.call("GET", "/volumes/detail?all_tenants=1")["volumes"])

    def messages(self, volume: str) -> list[str]:
        """What Cinder tells its users about failures."""
        found = self.call("GET", f"/messages?resource_uuid={volume}")["messages"]
        return [message["user_message"] for message in found]

    def backends(self) -> dict[str, str]:
        """State ("up" or "down") by name."""
        found = self.call("GET", "/os-services?binary=cinder-volume")["services"]
        return {service["host"].partition("@")[2]: service["state"] for service in found}

    def late_backends(self, since: datetime.datetime) -> list[str]:
        """Those that have not told the scheduler since then (UTC) that they are up."""
        self.call("GET", "/types")  # which logs in again when it has to
        return list(self._api.late_backends(since))

    def create_volume(self, kind: str, size_gib: int = 1, **more: Any) -> str:
        """The id of a new volume of this type, once it is available."""
        volume = self.start_volume(kind, size_gib, **more)
        self.wait_status(volume, "available")
        return volume

    def start_volume(self, kind: str, size_gib: int = 1, **more: Any) -> str:
        """Ask for it; the id. See wait_status."""
        body = {"size": size_gib, "volume_type": kind, **more}
        return str(self.call("POST", "/volumes", {"volume": body})["volume"]["id"])

    def delete(self, volume: str, seconds: float = 60) -> None:
        """Return when it is gone."""
        self.call("DELETE", f"/volumes/{volume}")
        deadline = time.monotonic() + seconds
        while (status := self._status(volume)) != "":
            if status.startswith("error") or time.monotonic() > deadline:
                raise CinderError(f"volume {volume} is {status} and not deleted: {self.messages(volume)}")
            time.sleep(self.look_seconds)

    def _status(self, volume: str) -> str:
        """ "" when there is no such volume."""
        try:
            return str(self.show(volume)["status"])
        except CinderError as error:
            if ": 404 " in str(error):
                return ""
            raise

    def migrate(self, volume: str, backend: str, *, force_host_copy: bool = False) -> None:
        """Ask for it; see wait_moved. A type that names its backend is in the way: see retype."""
        body = {"host": self.host(backend), "force_host_copy": force_host_copy, "lock_volume": False}
        self.call("POST", f"/volumes/{volume}/action", {"os-migrate_volume": body})

    def retype(self, volume: str, kind: str, policy: str = "on-demand") -> None:
        """Ask for it; see wait_moved. Between backends that is a migration."""
        body = {"new_type": kind, "migration_policy": policy}
        self.call("POST", f"/volumes/{volume}/action", {"os-retype": body})

    def extend(self, volume: str, size_gib: int) -> None:
        self.call("POST", f"/volumes/{volume}/action", {"os-extend": {"new_size": size_gib}})
        self.wait_status(volume, "available")

    def upload(self, volume: str, disk_format: str = "raw") -> str:
        """Ask for an image of it; the image's id. See wait_status."""
        body = {"image_name": "from a volume", "disk_format": disk_format, "container_format": "bare"}
        answer = self.call("POST", f"/volumes/{volume}/action", {"os-volume_upload_image": body})
        return str(answer["os-volume_upload_image"]["image_id"])

    def make_image(self, content: bytes) -> str:
        """The id of an image in Glance."""
        body = {"name": "of a test", "disk_format": "raw", "container_format": "bare"}
        image = str(self.call("POST", "/v2/images", body, service="glance")["id"])
        self.call("PUT", f"/v2/images/{image}/file", content, service="glance")
        return image

    def image_status(self, image: str) -> str:
        """ "" when there is no such image."""
        try:
            return str(self.call("GET", f"/v2/images/{image}", service="glance")["status"])
        except CinderError as error:
            if ": 404 " in str(error):
                return ""
            raise

    def image_path(self, image: str) -> Path:
        """Where Glance keeps its bytes."""
        return Path(self.environment["VOLFS_GLANCE_IMAGES"]) / image

    def delete_images(self) -> None:
        for image in self.call("GET", "/v2/images", service="glance")["images"]:
            self.call("DELETE", f"/v2/images/{image['id']}", service="glance")

    def start_backup(self, volume: str, *, incremental: bool = False) -> str:
        """Ask for it; the backup's id. See wait_backup."""
        body = {"volume_id": volume, "incremental": incremental}
        return str(self.call("POST", "/backups", {"backup": body})["backup"]["id"])

    def back_up(self, volume: str, *, incremental: bool = False) -> str:
        """The id of a backup, once it is available."""
        backup = self.start_backup(volume, incremental=incremental)
        self.wait_backup(backup, "available")
        return backup

    def restore(self, backup: str, volume: str) -> None:
        """Return when the volume has what was backed up."""
        self.call("POST", f"/backups/{backup}/restore", {"restore": {"volume_id": volume}})
        self.wait_backup(backup, "available")
        self.wait_status(volume, "available")

    def wait_backup(self, backup: str, status: str, seconds: float = 120) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (shown := self.call("GET", f"/backups/{backup}")["backup"])["status"] != status:
            if shown["status"] == "error" or time.monotonic() > deadline:
                raise CinderError(
                    f"backup {backup} is {shown['status']} and not {status}: {shown['fail_reason']}"
                )
            time.sleep(self.look_seconds)
        return dict(shown)

    def delete_backups(self, seconds: float = 60) -> None:
        """All of them, the newest first: others may be based on an older one."""
        deadline = time.monotonic() + seconds
        while left := self.call("GET", "/backups/detail?sort=created_at:desc")["backups"]:
            if time.monotonic() > deadline:
                raise CinderError(f"backups are not deleted: {left}")
            if left[0]["status"] in ("available", "error"):
                self.call("DELETE", f"/backups/{left[0]['id']}")
            time.sleep(self.look_seconds)

    def wait_status(self, volume: str, status: str, seconds: float = 60) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (shown := self.show(volume))["status"] != status:
            if shown["status"].startswith("error") or time.monotonic() > deadline:
                raise CinderError(
                    f"volume {volume} is {shown['status']} and not {status}: {self.messages(volume)}"
                )
            time.sleep(self.look_seconds)
        return shown

    def wait_moved(self, volume: str, backend: str, seconds: float = 180) -> dict[str, Any]:
        """Until a migration or a retype has come to its end, and the volume is where it should be."""
        deadline, none_since = time.monotonic() + seconds, None
        while True:
            shown = self.show(volume)
            # Cinder has none for a moment while it exchanges the two volumes, and always where nothing was to be moved.
            none_since = (none_since or time.monotonic()) if shown["migration_status"] is None else None
            settled = shown["migration_status"] in ("success", "error")
            settled |= none_since is not None and time.monotonic() - none_since > NONE_SECONDS
            if settled and shown["status"] in ("available", "error", "in-use"):
                break
            if time.monotonic() > deadline:
                raise CinderError(f"volume {volume} still {shown['status']}, {shown['migration_status']}")
            time.sleep(self.look_seconds)
        if shown["os-vol-host-attr:host"] != self.host(backend):
            raise CinderError(
                f"volume {volume} stayed at {shown['os-vol-host-attr:host']} ({shown['migration_status']}): "
                f"{self.messages(volume)}"
            )
        return shown

    @staticmethod
    def host(backend: str) -> str:
        """As Cinder names a backend's only pool."""
        return f"{script.HOST}@{backend}#{backend}"

    # ---- past the API

    def where(self, volume: str) -> StoredFile | StoredImage:
        """Where its bytes are now."""
        shown = self.show(volume)
        backend = shown["os-vol-host-attr:host"].partition("#")[2]
        name = f"volume-{shown['os-vol-mig-status-attr:name_id'] or volume}"
        if backend in POOLS:
            return StoredImage(self.services, POOLS[backend], name, shown["size"] * GIB)
        return StoredFile(self._directory(backend) / name)

    def _directory(self, backend: str) -> Path:
        return Path(self.environment[f"VOLFS_CINDER_{backend.upper()}"])

    def stored(self, backend: str) -> list[str]:
        """The names of what is stored there, of volumes or not."""
        if backend in POOLS:
            return self.services.run("rbd", "ls", POOLS[backend]).decode().split()
        return sorted(path.name for path in self._directory(backend).iterdir())

    def log_path(self, daemon: str = "cinder-volume") -> Path:
        return Path(self.environment["VOLFS_CINDER_LOGS"]) / f"{daemon}.log"

    def mark(self, daemon: str = "cinder-volume") -> int:
        """For `since`: where the log ends now."""
        return self.log_path(daemon).stat().st_size

    def since(self, mark: int = 0, daemon: str = "cinder-volume") -> str:
        """What the log has got since then."""
        with self.log_path(daemon).open("rb") as file:
            file.seek(mark)
            return file.read().decode(errors="replace")

    def up(self, *settings: str, extras: Sequence[str] = ()) -> None:
        """With these [GROUP.]OPTION=VALUE in cinder.conf, and no others; so with Glance ("images") and "backup"."""
        options = [*(("--set", *settings) if settings else ()), *(("--with", *extras) if extras else ())]
        done = openstack_command("up", *options, var=self.var)
        if done.returncode:
            raise CinderError(done.stderr.strip())

    @contextlib.contextmanager
    def configured(self, *settings: str, extras: Sequence[str] = ()) -> Iterator[None]:
        """For as long as it lasts; cinder-volume restarts before and after."""
        before = script.read_state(script.Place(self.var))
        self.up(*settings, extras=extras)
        try:
            yield
        finally:
            self.up(*before["settings"], extras=before["extras"])

    def restart(self) -> None:
        """cinder-volume, also when it was killed."""
        done = openstack_command("restart", "cinder-volume", var=self.var)
        if done.returncode:
            raise CinderError(done.stderr.strip())

    def pids(self) -> dict[str, int]:
        return dict(script.running(script.Place(self.var)))


def openstack_command(*arguments: str, var: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run scripts/openstack; var other than the default is another, private place."""
    return script_command(SCRIPT, *arguments, var=var, timeout=COMMAND_SECONDS)


@contextlib.contextmanager
def running_openstack(services: Services) -> Iterator[Openstack]:
    """All of it, every backend up; stopped at the end unless it was running before."""
    try:
        script.check_installed()
    except script.Failure as failure:
        skip_or_fail("openstack", str(failure))
    if os.geteuid() != 0:
        skip_or_fail("openstack", "scripts/openstack is root's")
    place = script.Place(services.var)
    with place.users.open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        ran_before = openstack_command("status").returncode == 0
        started = openstack_command("up")
        if started.returncode:  # installed, but it does not work: never a reason to skip
            pytest.fail(started.stderr.strip(), pytrace=False)
        environment = script.client_environment(place, script.read_state(place))
        try:
            yield Openstack(place.var, describe(place.var), environment)
        finally:
            if not ran_before and is_last(users):
                openstack_command("down")


@pytest.fixture(scope="session")
def openstack(services: Services) -> Iterator[Openstack]:
    with running_openstack(services) as openstack:
        yield openstack


@pytest.fixture
def new_volume(openstack: Openstack) -> Iterator[Any]:
    """new_volume(type, size_gib=, and what else the API takes): its id. Goes away after the test, wherever it is."""
    made: list[str] = []

    def make(kind: str, size_gib: int = 1, **more: Any) -> str:
        made.append(openstack.start_volume(kind, size_gib, **more))
        openstack.wait_status(made[-1], "available")
        return made[-1]

    yield make
    for volume in made:
        with contextlib.suppress(CinderError):
            openstack.show(volume)
            openstack.call("POST", f"/volumes/{volume}/action", {"os-reset_status": {"status": "available"}})
        if any(shown["id"] == volume for shown in openstack.volumes()):
            openstack.delete(volume)
