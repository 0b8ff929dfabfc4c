"""What os-brick is to connect, and how: the settings of a backend, and the connection properties of one volume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from volfs.backends import brick_library as library
from volfs.backends.base import Settings


class ConnectorSettings(Settings, frozen=True, kw_only=True):
    """What every driver may be told that connects volumes by os-brick. The names are os-brick's own."""

    paths: ClassVar[tuple[str, ...]] = ("lock_path",)

    use_multipath: bool = False
    enforce_multipath: bool = False  # an error where multipathd does not run, instead of a single path
    device_scan_attempts: int = 3
    root_helper: str = "sudo"  # how an unprivileged daemon starts os-brick's helper (privsep)
    lock_path: str = ""  # shared with Nova and Cinder on the same machine; by default one of volfs's own
    connect_timeout: float = 120.0  # seconds for a volume to be connected, and to be disconnected

    def __post_init__(self) -> None:
        if self.device_scan_attempts < 1:
            raise ValueError("device_scan_attempts: expected at least 1")
        if not self.connect_timeout > 0:
            raise ValueError("connect_timeout: expected seconds above 0")

    @property
    def options(self) -> library.Options:
        return library.Options(
            root_helper=self.root_helper,
            lock_path=self.lock_path or library.default_lock_path(),
            use_multipath=self.use_multipath,
            enforce_multipath=self.enforce_multipath,
            device_scan_attempts=self.device_scan_attempts,
        )


@dataclass(frozen=True)
class Target:
    """What to connect, and how. `name` is what messages call it; `data` is os-brick's `connection_properties`."""

    name: str
    protocol: str
    data: Mapping[str, Any] = field(repr=False)
    options: library.Options
    timeout: float  # seconds, for all of it

    @property
    def key(self) -> tuple[str, bytes, library.Options]:
        """Equal for what is the same in all, secrets too: not to be shown."""
        return self.protocol, msgspec.json.encode(self.data, order="sorted"), self.options

    @property
    def identity(self) -> str:
        """Equal for what may lead to the same device or mount, which is to be done one after the other. For threads:
        it may need os-brick's libraries, which take a second to import.
        """
        data = self.data
        if self.protocol in library.REMOTE_FILE_SYSTEMS:
            parts: list[object] = [data.get("export")]
        elif "target_iqn" in data or "target_iqns" in data:
            parts = [
                first_of(data, "target_iqns", "target_iqn"),
                first_of(data, "target_luns", "target_lun"),
            ]
        else:
            parts = [
                data.get("volume_id") or msgspec.json.encode(library.without_secrets(data), order="sorted")
            ]
        return f"{self.protocol} {parts!r}"


def first_of(data: Mapping[str, Any], several: str, single: str) -> Any:
    """The first value of a key that has a list, or else that of the other key. Of whatever type: nobody has checked."""
    values = data.get(several)
    return values[0] if isinstance(values, list | tuple) and values else data.get(single)


def make_target(
    name: str, protocol: str, data: Mapping[str, Any], settings: ConnectorSettings, *, multipath: bool = False
) -> Target:
    """The target of a connection info, connected as the settings say; `multipath` when it asks for that itself."""
    enforce = bool(data.get("enforce_multipath")) or settings.enforce_multipath
    options = msgspec.structs.replace(
        settings.options, use_multipath=settings.use_multipath or multipath, enforce_multipath=enforce
    )
    properties = dict(data) | {
        "enforce_multipath": enforce,
        # For an encrypted volume os-brick gives a link in /dev/disk/by-id that is there for an encryptor to replace.
        # We want the device, and have nobody replace it.
        "encrypted": False,
    }
    return Target(name, protocol, properties, options, settings.connect_timeout)
