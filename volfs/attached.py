"""The volumes attached on demand: their names, and the leases that keep them.

No FUSE types and no messages here: fuse/tree.py shows what this module knows, daemon.py does what clients ask.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from volfs.backends.base import Backend, Source, VolumeInfo
from volfs.backends.registry import Backends
from volfs.errors import SourceError, VolfsError

MAX_NAME = 255  # bytes in a file name, NAME_MAX of limits.h


@dataclass(eq=False)
class Attachment:
    """A volume under attached/<name>. It stays as long as it has a lease."""

    name: str
    backend: Backend
    info: VolumeInfo
    leases: set[int] = field(default_factory=set)

    def same_volume(self, other: Attachment) -> bool:
        """Whether both show one volume, though their names may differ."""
        return self.backend is other.backend and self.info.source == other.info.source


class Attachments:
    """The attached volumes by name. A lease is a number that one client holds."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self._by_name: dict[str, Attachment] = {}
        self._numbers = itertools.count(1)

    def __iter__(self) -> Iterator[Attachment]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Attachment | None:
        return self._by_name.get(name)

    def find(self, text: str) -> Attachment | None:
        """The attachment of that name or URL."""
        return self.get(text) or next((it for it in self if it.info.source.url == text), None)

    def of_lease(self, lease: int) -> Attachment | None:
        """The attachment that the lease is on."""
        return next((it for it in self if lease in it.leases), None)

    async def attach(self, source: Source, name: str | None) -> tuple[Attachment, int]:
        """Attach, or share what is attached already; returns the attachment and a new lease on it.

        The volume is looked up, so that a wrong source fails here and not at the first read. Without `name` it is
        the volume's own, with a number behind it where another volume has that. VolumeNotFound, BackendError; EEXIST
        when `name` belongs to another volume.
        """
        if name is not None:
            check_name(name)
        backend = self._backends.acquire(source)
        try:
            info = await backend.stat(source)
            if name is None:
                name = self._free_name(backend, info.source)
            attachment = self.get(name)
            if attachment is None:
                attachment = self._by_name[name] = Attachment(name, backend, info)
                self._backends.hold(backend)  # the attachment's own use of it
            elif attachment.info.source != info.source or attachment.backend is not backend:
                raise VolfsError(f"attached/{name} is {attachment.info.source.url} already", errno.EEXIST)
            else:
                attachment.info = info  # its size may be another by now
        finally:
            await self._backends.release(backend)
        lease = next(self._numbers)
        attachment.leases.add(lease)
        return attachment, lease

    def _free_name(self, backend: Backend, source: Source) -> str:
        """The volume's own name, or the first of `<name>-2`, `<name>-3`, ... that no other volume has."""
        check_name(source.name)
        for number in itertools.count(1):
            name = source.name if number == 1 else f"{source.name}-{number}"
            taken = self.get(name)
            if taken is None or (taken.backend is backend and taken.info.source == source):
                return name
        raise AssertionError("numbers do not end")

    def give_up(self, lease: int) -> Attachment | None:
        """Give up a lease; returns its attachment, or None when it was given up before."""
        attachment = self.of_lease(lease)
        if attachment is not None:
            attachment.leases.discard(lease)
        return attachment

    async def remove_unleased(self, attachment: Attachment) -> None:
        """Take the name away, unless there is a lease on it again."""
        if not attachment.leases and self.get(attachment.name) is attachment:
            del self._by_name[attachment.name]
            await self._backends.release(attachment.backend)


def check_name(name: str) -> None:
    """Refuse what cannot be a file's name."""
    if is_file_name(name):
        return
    if len(_bytes(name)) > MAX_NAME:
        raise SourceError(f"{name[:20]!r}...: expected a file name of at most {MAX_NAME} bytes")
    raise SourceError(f"{name!r}: expected a file name, without '/'")


def is_file_name(name: str) -> bool:
    return (
        name not in ("", ".", "..") and "/" not in name and "\0" not in name and len(_bytes(name)) <= MAX_NAME
    )


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")
