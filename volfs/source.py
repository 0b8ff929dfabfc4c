"""What names volumes, from outside: URLs and Cinder connection infos into typed sources. Connects to nothing.

The grammar of each driver's part is the driver's own; this module only finds the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volfs.backends import DRIVERS, backend_class, split_url
from volfs.backends.base import Settings, Source
from volfs.errors import SourceError


def parse_source(url: str, environment: Mapping[str, str]) -> Source:
    """The source a URL names, reached as the caller's environment says. SourceError."""
    driver, rest = split_url(url)
    return backend_class(driver).parse_url(rest, environment)


def parse_prefix(url: str, environment: Mapping[str, str]) -> tuple[str, Settings, tuple[str, ...]]:
    """What a prefix such as `rbd:volumes` names: driver, settings of a backend, directory in it. SourceError."""
    driver, rest = split_url(url)
    return driver, *backend_class(driver).parse_prefix(rest, environment)


def parse_connection_info(info: Any, environment: Mapping[str, str]) -> Source:
    """The source a Cinder connection info describes: {"driver_volume_type": ..., "data": {...}}. SourceError."""
    if not isinstance(info, dict):
        raise SourceError(f"connection info: expected an object, not {type(info).__name__}")
    protocol, data = info.get("driver_volume_type"), info.get("data")
    if not isinstance(protocol, str):
        raise SourceError("connection info: driver_volume_type: expected the name of a protocol")
    if not isinstance(data, dict):
        raise SourceError("connection info: data: expected an object")
    mode = data.get("access_mode")
    if mode not in (None, "ro", "rw"):
        raise SourceError(f"connection info: data.access_mode: expected ro or rw, not {mode!r}")
    for driver, registration in DRIVERS.items():
        if protocol in registration.protocols:
            return backend_class(driver).parse_connection(protocol, data, environment)
    known = ", ".join(name for registration in DRIVERS.values() for name in registration.protocols)
    raise SourceError(f"connection info: no driver for {protocol!r}; volfs knows {known}")
