"""Listing and describing volumes by source, without a daemon: one short-lived backend, nothing left behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import trio

from volfs.backends import backend_class
from volfs.backends.base import Backend, Entry, Settings, VolumeInfo
from volfs.source import parse_prefix, parse_source

T = TypeVar("T")


def list_volumes(prefix: str, environment: Mapping[str, str]) -> list[Entry]:
    """What a prefix such as `rbd:volumes` holds: volumes and directories, sorted by name. SourceError, BackendError."""
    driver, settings, path = parse_prefix(prefix, environment)
    entries = _ask(driver, settings, lambda backend: backend.list(path))
    return sorted(entries, key=lambda entry: entry.name)


def describe_volume(url: str, environment: Mapping[str, str]) -> tuple[VolumeInfo, Mapping[str, str]]:
    """A volume, and all that its backend tells of it. SourceError, VolumeNotFound, BackendError."""
    source = parse_source(url, environment)

    async def describe(backend: Backend) -> tuple[VolumeInfo, Mapping[str, str]]:
        return await backend.stat(source), await backend.describe(source)

    return _ask(source.driver, backend_class(source.driver).settings_for(source), describe)


def _ask(driver: str, settings: Settings, question: Callable[[Backend], Awaitable[T]]) -> T:
    async def ask() -> T:
        backend = backend_class(driver)(driver, settings)
        try:
            return await question(backend)
        finally:
            await backend.aclose()

    return trio.run(ask)
