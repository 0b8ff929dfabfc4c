"""Driver `brick`: volumes of every other kind of storage, attached to this machine by os-brick as Cinder and Nova do.

A volume is named by a connection info only: os-brick lists none, and knows no URLs. What it connects to is a block
device or a file of this machine; whether such a volume is encrypted, its bytes are shown as they are.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NoReturn
from urllib.parse import quote

import msgspec
import trio

from volfs.backends import brick_connection
from volfs.backends.base import BLOCK_UNIT, Backend, Entry, Properties, Source, VolumeInfo
from volfs.backends.brick_target import ConnectorSettings, Target, first_of, make_target
from volfs.backends.brick_volume import ConnectedVolume, Connections, look, open_connected
from volfs.errors import BackendError, SourceError, VolumeNotFound

THREADS = 16  # requests under way at once for one backend, as of the block driver
CONNECTING = 8  # volumes that are being connected or disconnected at once
LONGEST_NAME = 200  # bytes; a number may come behind it


class BrickSource(Source, frozen=True, kw_only=True):
    """A volume by its connection info. `data` is JSON, which makes it hashable; it may hold secrets."""

    driver: ClassVar[str] = "brick"
    protocol: str  # `driver_volume_type`
    data: str

    def __repr__(self) -> str:
        return f"BrickSource({self.url!r}, read_only={self.read_only})"

    @property
    def url(self) -> str:
        """For people, and to find what is attached: it does not say how to connect."""
        return f"brick:{self.protocol}/{self.name}"

    @property
    def name(self) -> str:
        name = quote(_name(self.properties), safe=" :,+@=~%") or self.protocol
        if len(name.encode()) <= LONGEST_NAME and name not in (".", ".."):
            return name
        return f"{self.protocol}-{hashlib.sha256(self.data.encode()).hexdigest()[:16]}"

    @property
    def properties(self) -> dict[str, Any]:
        """What os-brick calls `connection_properties`."""
        decoded: dict[str, Any] = msgspec.json.decode(self.data)
        return decoded


class BrickSettings(ConnectorSettings, frozen=True, kw_only=True):
    """A backend of driver `brick`."""

    protocols: tuple[str, ...] = ()  # those that it serves; all when empty


class BrickBackend(Backend):
    """Volumes that os-brick connects, each as long as it is open."""

    driver = "brick"
    settings_type = BrickSettings
    describes = ("protocol", "volume_id")
    settings: BrickSettings

    def __init__(self, name: str, settings: BrickSettings) -> None:
        super().__init__(name, settings)
        self._threads = trio.CapacityLimiter(THREADS)
        self._connections = Connections(trio.CapacityLimiter(CONNECTING))
        self._seen: dict[BrickSource, Properties] = {}  # when last connected

    @classmethod
    def parse_url(cls, rest: str, environment: Mapping[str, str]) -> NoReturn:
        raise SourceError(
            f"brick:{rest}: such a volume is attached by its connection info (--connection-info)"
        )

    @classmethod
    def parse_prefix(cls, rest: str, environment: Mapping[str, str]) -> NoReturn:
        raise SourceError(f"brick:{rest}: os-brick lists no volumes; attach one by its connection info")

    @classmethod
    def parse_connection(
        cls, protocol: str, data: Mapping[str, Any], environment: Mapping[str, str]
    ) -> BrickSource:
        where = f"connection info of type {protocol}: data"
        form = data.get("format")
        if form not in (None, "raw"):  # of Cinder's file based drivers
            raise SourceError(
                f"{where}.format: expected raw, not {form!r}: its bytes are not those of the volume"
            )
        try:
            text = msgspec.json.encode(data, order="sorted").decode()
        except (TypeError, ValueError, msgspec.MsgspecError) as exc:
            raise SourceError(f"{where}: expected what JSON has: {exc}") from None
        return BrickSource(protocol=protocol, data=text, read_only=data.get("access_mode") == "ro")

    @classmethod
    def settings_for(cls, source: Source) -> BrickSettings:
        return BrickSettings()

    def serves(self, source: Source) -> bool:
        return isinstance(source, BrickSource) and (
            not self.settings.protocols or source.protocol in self.settings.protocols
        )

    async def list(self, path: Sequence[str]) -> list[Entry]:
        if path:
            raise VolumeNotFound(f"{self.name}/{'/'.join(path)}: os-brick lists no volumes")
        return []

    async def lookup(self, path: Sequence[str]) -> Entry:
        raise VolumeNotFound(f"{self.name}/{'/'.join(path)}: os-brick lists no volumes")

    async def stat(self, source: Source) -> VolumeInfo:
        """Connects and disconnects, but only the first time: its size is remembered from then on."""
        assert isinstance(source, BrickSource)
        if source not in self._seen:
            async with self._connections.connected(self._target(source)) as connection:
                self._seen[source] = await look(connection.path, source.url, self._threads)
        seen = self._seen[source]
        return VolumeInfo(
            name=source.name,
            source=source,
            size=seen.size,
            read_only=source.read_only or self.settings.read_only or not seen.writable,
            details={"protocol": source.protocol, "volume_id": str(source.properties.get("volume_id") or "")},
        )

    async def open(self, source: Source, *, writable: bool) -> ConnectedVolume:
        assert isinstance(source, BrickSource)
        if writable and (source.read_only or self.settings.read_only):
            raise BackendError(f"{source.url}: read-only", errno.EROFS)
        volume = await open_connected(
            self._connections,
            self._target(source),
            writable=writable,
            request_timeout=self.settings.timeout,
            threads=self._threads,
            resized=lambda size: self._remember(source, size),
        )
        self._remember(source, volume.properties.size)
        return volume

    @classmethod
    async def clean_up(cls, facts: Mapping[str, Any]) -> None:
        await brick_connection.clean_up(facts)

    def _target(self, source: BrickSource) -> Target:
        return make_target(source.url, source.protocol, source.properties, self.settings)

    def _remember(self, source: BrickSource, size: int) -> None:
        known = self._seen.get(source, Properties(0, BLOCK_UNIT, writable=True))
        self._seen[source] = replace(known, size=size)


def _name(data: Mapping[str, Any]) -> str:
    """What tells the volume from its siblings, of the keys that Cinder's drivers use."""
    if data.get("volume_id"):
        return str(data["volume_id"])
    for key in (
        "name",
        "device_path",
        "volume",
        "volume_name",
        "scaleIO_volname",
        "nguid",
        "volume_nguid",
        "uuid",
    ):
        if data.get(key):
            return str(data[key]).rstrip("/").rpartition("/")[2]
    for key in ("target_iqn", "target_wwn", "nqn", "target_nqn"):
        if value := first_of(data, f"{key}s", key):
            lun = data.get("target_lun", first_of(data, "target_luns", ""))
            return f"{value[0] if isinstance(value, list) else value}-lun-{'' if lun is None else lun}"
    return ""
