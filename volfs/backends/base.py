"""The backend contract: all that a new driver must know. Nothing here knows a driver or FUSE.

A driver is one module with

- a `Source`: what names one of its volumes,
- a `Settings`: what an operator may say of a backend in volfs.toml,
- a `Backend`: a place volumes come from; lists, describes and opens them,
- a `BackendVolume`: one open volume; moves bytes.

Concurrency. Everything runs on the trio loop; any number of tasks may call any method at the same time, except
`aclose`, which the owner calls once no other call is under way (a second call is harmless). No method blocks the
loop: blocking libraries are called in threads under a limiter that belongs to the backend, so that a hung backend
cannot take threads from another.

Errors. Only `VolfsError`s and trio.Cancelled leave a driver: `VolumeNotFound` when what the source names is not
there, otherwise `BackendError` with the errno and the message of the storage itself.

Deadlines. No call waits longer than the backend's `timeout` for an answer of the storage; then it raises
`BackendTimeout`. Local files are the exception: Linux offers no way to take back such a request, and what it would do
later is the page cache's. block_device.py tells how devices keep the promise.
"""

from __future__ import annotations

import abc
import contextlib
import errno
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
import trio

from volfs.errors import BackendError, BackendTimeout
from volfs.extents import Extent as Extent  # a part of the contract

ZEROES = bytes(1 << 20)
BLOCK_UNIT = 512  # the unit of st_blocks and of SCSI's and the kernel's sector counts


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What names one volume of a driver. Hashable: equal sources are the same volume.

    A driver whose sources hold secrets hides them from `repr`.
    """

    driver: ClassVar[str]
    read_only: bool = False

    @property
    def url(self) -> str:
        """The source as the user would write it, without secrets."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The volume's own name: one path component, for attached/<name>."""
        raise NotImplementedError


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every backend may be told in volfs.toml; drivers add their own. Hashable."""

    # The keys that are the path of a file, or of several with commas between them.
    paths: ClassVar[tuple[str, ...]] = ()
    secret_paths: ClassVar[tuple[str, ...]] = ()  # of these, the files that hold a secret

    timeout: float = 30.0  # seconds the storage may take to answer one request
    read_only: bool = False
    resize: bool = False  # truncate(2) to another size is a real resize, not EPERM

    def secrets(self) -> Sequence[str]:
        """The keys that are set to a secret."""
        return ()

    def __repr__(self) -> str:  # they may hold keys and passwords, and logs show reprs
        return f"{type(self).__name__}(...)"


@dataclass(frozen=True, slots=True)
class Directory:
    """A listed directory, such as a pool, a namespace or an iSCSI target."""

    name: str


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """A volume as `ls -l` shows it, learnt without opening it."""

    name: str  # of the file in its directory
    source: Source
    size: int
    mtime_ns: int = 0  # stable as long as nobody writes; 0 when the backend does not know
    allocated: int | None = None  # bytes; None when unknown
    read_only: bool = False  # a snapshot, or write-protected
    # By what the storage itself knows the volume: equal whatever name, portal or user leads to it, and for no other
    # volume in the world. "" when unknown.
    identity: str = ""
    details: Mapping[str, str] = field(default_factory=dict)  # more for `volfs info` and user.volfs.*


Entry = Directory | VolumeInfo


@dataclass(frozen=True, slots=True)
class Properties:
    """What is true of an open volume until `refresh` says otherwise. Sizes in bytes."""

    size: int
    block_size: int  # the storage's smallest write; any offset and length is accepted all the same
    writable: bool
    can_resize: bool = False


class BackendVolume(trio.abc.AsyncResource):
    """One open volume. The caller checks bounds: ranges lie within `properties.size` and are not empty.

    The caller also orders: overlapping writes under way together may land in any order, and a `flush` covers the
    writes that returned before it was called. On a volume that was not opened for writing, `pwrite`, `discard` and
    `write_zeroes` are EROFS and change nothing.
    """

    properties: Properties

    def check_writable(self, name: str) -> None:
        """For drivers: EROFS unless the volume, which messages call `name`, was opened for writing."""
        if not self.properties.writable:
            raise BackendError(f"{name}: not open for writing", errno.EROFS)

    @abc.abstractmethod
    async def pread(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes."""

    @abc.abstractmethod
    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`, which stays unchanged until this returns; what is read from then on is what was written.

        A driver may return before the storage has confirmed it. An error that comes later is then raised by the next
        `pwrite`, and by the next `flush` or `aclose` in any case.
        After an error or a cancellation none, some or all of it may be written, even later on; bytes outside the
        range keep their value.
        """

    def start_read(self, offset: int, length: int, sink: object) -> bool:
        """Begin a read whose bytes go past Python to `sink` (native/sink.h), and return; False when that is not to be.

        As `pread` otherwise, but that what fails is told the sink. `aclose` waits for it.
        """
        return False

    def start_write(self, offset: int, data: memoryview) -> bool:
        """Do a `pwrite` for which nothing must be waited for, and return; False when that is not to be.

        `data` is the caller's again at once.
        """
        return False

    def expire(self) -> None:
        """Give up what was begun by `start_read` and has no answer since the deadline. Called every second or so."""

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        """The range in runs of data and holes: in order, without gaps between them, none beyond it.

        What the storage does not know, or not for sure, is data; so is every byte of a `pwrite` that returned before
        the call, stable or not. The answer may stop before the end of the range, after one run at the least, where
        more would cost more than a caller who wants the first one should pay. Two of a kind may follow each other.
        """
        return [Extent(offset, length, data=True)]

    async def discard(self, offset: int, length: int) -> None:
        """Make the range read as zeros, as `pwrite` of that many zeros would, and give its space back.

        The zeros are a promise, the space an attempt: what cannot be given back, such as half a block, is written.
        Takes any offset and length, up to all of the volume; each step of a long one has a deadline of its own.
        """
        await self.write_zeroes(offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros, as `pwrite` of that many zeros would, in the quickest way the storage has.

        Whether that gives space back is the storage's choice. Otherwise as `discard`.
        """
        for begin in range(offset, offset + length, len(ZEROES)):
            await self.pwrite(begin, memoryview(ZEROES)[: offset + length - begin])

    @abc.abstractmethod
    async def flush(self) -> None:
        """Return when every finished write is on stable storage. An error tells that some may be lost."""

    @abc.abstractmethod
    async def refresh(self) -> Properties:
        """Ask the storage for the size again (it may have been resized elsewhere) and renew `properties`."""

    async def resize(self, size: int) -> None:
        """Make the volume `size` bytes long and renew `properties`; EOPNOTSUPP where the storage cannot."""
        raise BackendError("this storage cannot resize a volume", errno.EOPNOTSUPP)

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Flush what was written and let go of the volume: afterwards the storage knows no user of it.

        Always closes; an error (of the flush, as a rule) tells that the data may not be stable. Its waits are
        shielded from cancellation and end at the backend's timeout.
        """


class Backend(trio.abc.AsyncResource):
    """A place volumes come from. Made without connecting; the first call that needs the storage connects.

    `name` is the operator's name for it, and its directory below the mountpoint.
    """

    driver: ClassVar[str]
    settings_type: ClassVar[type[Settings]]
    describes: ClassVar[tuple[str, ...]] = ()  # the keys that `describe` may answer

    def __init__(self, name: str, settings: Any) -> None:
        self.name = name
        self.settings = settings

    @classmethod
    @abc.abstractmethod
    def parse_url(cls, rest: str, environment: Mapping[str, str]) -> Source:
        """The source that `<driver>:<rest>` names, reached as the caller's environment says. SourceError."""

    @classmethod
    @abc.abstractmethod
    def parse_prefix(cls, rest: str, environment: Mapping[str, str]) -> tuple[Settings, tuple[str, ...]]:
        """What `<driver>:<rest>` names when it is to be mounted or listed: the settings of a backend that shows it,
        and the path of the directory in that backend that it is. SourceError.
        """

    @classmethod
    def parse_connection(
        cls, protocol: str, data: Mapping[str, Any], environment: Mapping[str, str]
    ) -> Source:
        """The source that a Cinder connection info's `data` names; `protocol` is its type. SourceError."""
        raise NotImplementedError(f"driver {cls.driver} is registered for no protocol")

    @classmethod
    @abc.abstractmethod
    def settings_for(cls, source: Source) -> Settings:
        """The settings of a backend that serves this source, when the operator configured none that does."""

    @abc.abstractmethod
    def serves(self, source: Source) -> bool:
        """Whether the source's volume is reached through this very backend, judged without connecting."""

    def settings_like(self, source: Source) -> Settings | None:
        """Of a backend for a source that this one does not serve though its storage has it, for it asks for another
        account: with all else that the operator has told here. None where that is not so; SourceError.
        """
        return None

    @abc.abstractmethod
    async def list(self, path: Sequence[str]) -> list[Entry]:
        """The entries of the directory `path` below the backend (() is its top), in any order.

        Leaves nothing behind on the storage: no watcher, no lock, no session. VolumeNotFound when there is no
        such directory.
        """

    async def names_version(self, path: Sequence[str]) -> Hashable | None:
        """Something that is another once a name in the directory `path` comes or goes, or is of another volume.

        For little, whatever the directory holds; None where the storage cannot tell.
        """
        return None

    @abc.abstractmethod
    async def lookup(self, path: Sequence[str]) -> Entry:
        """The one entry at `path` (never empty), for a cost that does not grow with its siblings' number."""

    @abc.abstractmethod
    async def stat(self, source: Source) -> VolumeInfo:
        """The volume of a source that this backend `serves`; leaves nothing behind, as `list`.

        Its own source is the one that `list` gives, whichever way to this backend the asked one told (only
        `read_only` stays): one volume has one identity.
        """

    async def describe(self, source: Source) -> Mapping[str, str]:
        """More than `stat` tells, for `volfs info` and user.volfs.*: may cost more, leaves nothing behind either.

        Keys are of `describes`, values are for people. Never a secret.
        """
        return (await self.stat(source)).details

    @abc.abstractmethod
    async def open(self, source: Source, *, writable: bool) -> BackendVolume:
        """Open the volume; the caller owns what is returned. EROFS if `writable` and the storage cannot."""

    async def aclose(self) -> None:
        """Let go of connections. Volumes opened here are closed before, by their owners."""

    @classmethod
    async def clean_up(cls, facts: Mapping[str, Any]) -> None:
        """Undo what a dead process left on this machine, by the facts of its journal record (volfs/journal.py).

        What is undone already is fine. An error keeps the record for the next start of a daemon; the caller sets a
        deadline. For drivers that change this machine to open a volume.
        """
        raise BackendError(
            f"driver {cls.driver} leaves nothing behind that it could clean up", errno.EOPNOTSUPP
        )


@contextlib.contextmanager
def deadline(seconds: float, doing: str) -> Iterator[None]:
    """Raise BackendTimeout, saying what was being done, when the block takes longer than `seconds`."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise BackendTimeout(f"{doing}: no answer within {round(seconds, 3):g} s")
