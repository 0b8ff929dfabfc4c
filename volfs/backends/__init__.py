"""The drivers, by name. A driver is one module with one `Backend` class, and one line here.

A driver's module is imported when one of its volumes is used, and the vendor's library when a connection is
made: a machine without librbd serves files all the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from volfs.backends.base import Backend


class Registration(NamedTuple):
    """Where a driver is, and what must be known of it without importing it."""

    module: str
    backend: str
    protocols: tuple[str, ...] = ()  # the `driver_volume_type`s of connection infos that it takes
    environment: tuple[str, ...] = ()  # variables of the caller that say how to reach its storage


DRIVERS: dict[str, Registration] = {
    "rbd": Registration("volfs.backends.rbd", "RbdBackend", ("rbd",), ("CEPH_CONF", "CEPH_ARGS")),
    "iscsi": Registration(
        "volfs.backends.iscsi",
        "IscsiBackend",
        ("iscsi",),
        (
            "LIBISCSI_CHAP_USERNAME",
            "LIBISCSI_CHAP_PASSWORD",
            "LIBISCSI_CHAP_TARGET_USERNAME",
            "LIBISCSI_CHAP_TARGET_PASSWORD",
        ),
    ),
    "block": Registration("volfs.backends.block", "BlockBackend", ("local",)),
    "file": Registration("volfs.backends.file", "FileBackend"),
}


PATHS = {"CEPH_CONF"}  # of these variables, those that are a path


def backend_class(driver: str) -> type[Backend]:
    """The `Backend` class of a registered driver. KeyError for any other name."""
    registration = DRIVERS[driver]
    cls: type[Backend] = getattr(importlib.import_module(registration.module), registration.backend)
    return cls


def is_url(text: str) -> bool:
    """Whether the text is meant as a source rather than as a path."""
    driver, colon, _ = text.partition(":")
    return bool(colon) and driver in DRIVERS


def caller_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of a caller's environment that says how its storage is reached, for a process elsewhere."""
    wanted = {name for registration in DRIVERS.values() for name in registration.environment}
    return {
        name: os.path.abspath(value) if name in PATHS and value else value
        for name, value in environ.items()
        if name in wanted
    }
