"""The drivers, by name. A driver is one module with one `Backend` class, and one line here.

A driver's module is imported when one of its volumes is used, and the vendor's library when a connection is
made: a machine without librbd serves files all the same.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from volfs.errors import SourceError

if TYPE_CHECKING:
    from volfs.backends.base import Backend


class Registration(NamedTuple):
    """Where a driver is, and what must be known of it without importing it."""

    module: str
    backend: str
    protocols: tuple[str, ...] = ()  # the `driver_volume_type`s of connection infos that it takes
    environment: tuple[str, ...] = ()  # variables of the caller that say how to reach its storage
    urls: bool = True  # whether a volume can be named by a URL


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
    "brick": Registration(
        "volfs.backends.brick",
        "BrickBackend",
        # What os-brick 7.1 has connectors for, and no driver above takes. Not asked of os-brick itself, which need
        # not be there, and takes a second to import.
        (
            "fibre_channel",
            "glusterfs",
            "gpfs",
            "huaweisdshypervisor",
            "iser",
            "lightos",
            "nfs",
            "nvme",
            "nvmeof",
            "quobyte",
            "scality",
            "scaleio",
            "storpool",
            "vmdk",
            "vzstorage",
        ),
        urls=False,
    ),
}


PATHS = {"CEPH_CONF"}  # of these variables, those that are a path
OPTIONS = {"CEPH_ARGS"}  # and those that are options, of which these are followed by one:
PATH_OPTIONS = {"-c", "--conf", "-k", "--keyring", "--keyfile"}


def backend_class(driver: str) -> type[Backend]:
    """The `Backend` class of a registered driver. KeyError for any other name."""
    registration = DRIVERS[driver]
    cls: type[Backend] = getattr(importlib.import_module(registration.module), registration.backend)
    return cls


def split_url(url: str) -> tuple[str, str]:
    """The driver of a URL and what is behind the colon. SourceError when no driver is named."""
    driver, colon, rest = url.partition(":")
    if not colon or driver not in DRIVERS:
        schemes = ", ".join(f"{name}:" for name, registration in DRIVERS.items() if registration.urls)
        # An account, if only the scheme is mistyped; a password may have a slash in it, or another "@".
        shown = re.sub(r"//.*@", "//***@", url, flags=re.DOTALL)
        raise SourceError(f"{shown!r}: not a volume's URL; expected one that begins with {schemes}")
    return driver, rest


def is_url(text: str) -> bool:
    """Whether the text is meant as a source rather than as a path."""
    driver, colon, _ = text.partition(":")
    return bool(colon) and driver in DRIVERS


def caller_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of a caller's environment that says how its storage is reached, for a process elsewhere.

    "Elsewhere" has another working directory: paths are absolute.
    """
    return {name: _absolute(name, environ[name]) for name in environment_variables() if environ.get(name)}


def environment_variables() -> set[str]:
    """All of a caller's environment that any driver looks at."""
    return {name for registration in DRIVERS.values() for name in registration.environment}


def secret_variables() -> set[str]:
    """Of these, those that are a secret."""
    return {name for name in environment_variables() if "PASSWORD" in name}


def _absolute(name: str, value: str) -> str:
    if name in PATHS:
        return os.path.abspath(value)
    if name not in OPTIONS:
        return value
    try:
        words = shlex.split(value)
    except ValueError:
        return value  # as it is, for whoever reads it to refuse
    for number, word in enumerate(words):
        option, equals, path = word.partition("=")
        if option in PATH_OPTIONS and equals:
            words[number] = f"{option}={_absolute_paths(path)}"
        elif number and words[number - 1] in PATH_OPTIONS:
            words[number] = _absolute_paths(word)
    return shlex.join(words)


def _absolute_paths(paths: str) -> str:
    """Of one path, or of several with commas between them, which Ceph takes as a keyring."""
    return ",".join(os.path.abspath(path) if path else "" for path in paths.split(","))
