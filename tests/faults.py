"""Faults below the mount: a driver that fails or stalls where a test says, around a real one.

In the manner of nbdkit's error and delay filters: `FaultyBackend` wraps any driver, `Faults` says what goes wrong and
counts what came through. In a test on the loop both are objects at hand. In a daemon, which is another process, the
backend's setting `faults` names a file with the rules as JSON, looked at for each request: `volfs_with_faults` is the
command of a volfs that knows the driver `faulty-file`.
"""

from __future__ import annotations

import errno
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import trio

from volfs.backends import DRIVERS, Registration
from volfs.backends.base import Backend, BackendVolume, Entry, Properties, Settings, Source, VolumeInfo
from volfs.backends.file import FileBackend, FileSettings
from volfs.errors import BackendError

POLL_SECONDS = 0.01  # how soon a stalled request finds its rule gone from the file


@dataclass(frozen=True)
class Rule:
    """`operation` (a method of the contract, or "*") fails with `errno`, or stalls when that is 0.

    For reads and writes: if the byte at `offset` is in their range, wherever they are when it is None.
    """

    operation: str
    errno: int = errno.EIO
    offset: int | None = None

    def hits(self, operation: str, start: int, length: int) -> bool:
        return self.operation in (operation, "*") and (
            self.offset is None or start <= self.offset < start + length
        )


@dataclass
class Faults:
    """What goes wrong now, and what was asked so far."""

    rules: list[Rule] = field(default_factory=list)
    file: Path | None = None  # where the rules come from, in a daemon
    calls: Counter[str] = field(default_factory=Counter)
    opened: int = 0  # volumes open now
    stalled: int = 0  # requests waiting for their rule to go
    _healed: trio.Event = field(default_factory=trio.Event)

    def fail(self, operation: str, number: int = errno.EIO, offset: int | None = None) -> Rule:
        rule = Rule(operation, number, offset)
        self.rules.append(rule)
        return rule

    def stall(self, operation: str, offset: int | None = None) -> Rule:
        """Until `heal`."""
        return self.fail(operation, 0, offset)

    def heal(self, *rules: Rule) -> None:
        """Take these rules back, or all."""
        self.rules = [rule for rule in self.rules if rules and rule not in rules]
        self._healed.set()
        self._healed = trio.Event()

    async def meet(self, operation: str, start: int = 0, length: int = 1) -> None:
        """The fault of this request, if there is one for it."""
        self.calls[operation] += 1
        self.stalled += 1
        try:
            while rule := self._rule(operation, start, length):
                if rule.errno:
                    raise BackendError(f"injected: {operation} at {start}", rule.errno)
                with trio.move_on_after(POLL_SECONDS if self.file else math.inf):
                    await self._healed.wait()
        finally:
            self.stalled -= 1

    def _rule(self, operation: str, start: int, length: int) -> Rule | None:
        if self.file is not None:
            self.rules = [Rule(**rule) for rule in json.loads(self.file.read_text())]
        return next((rule for rule in self.rules if rule.hits(operation, start, length)), None)


def write_rules(path: Path, *rules: Rule) -> None:
    """Tell a daemon its faults from now on."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps([asdict(rule) for rule in rules]))
    new.rename(path)


class FaultyVolume(BackendVolume):
    """A volume of the wrapped driver, as good as that one where no rule says otherwise."""

    def __init__(self, inner: BackendVolume, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    @property
    def properties(self) -> Properties:  # type: ignore[override]
        return self._inner.properties

    async def pread(self, offset: int, length: int) -> bytes:
        await self._faults.meet("pread", offset, length)
        return await self._inner.pread(offset, length)

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        await self._faults.meet("pwrite", offset, len(data))
        await self._inner.pwrite(offset, data)

    async def flush(self) -> None:
        await self._faults.meet("flush")
        await self._inner.flush()

    async def refresh(self) -> Properties:
        await self._faults.meet("refresh")
        return await self._inner.refresh()

    async def resize(self, size: int) -> None:
        await self._faults.meet("resize")
        await self._inner.resize(size)

    async def aclose(self) -> None:
        """Closes in any case, as the contract says; the error is that of the flush."""
        try:
            await self._faults.meet("aclose")
        finally:
            self._faults.opened -= 1
            await self._inner.aclose()


class FaultyFileSettings(FileSettings, frozen=True, kw_only=True):
    faults: str = ""  # file of rules


class FaultyBackend(Backend):
    """A backend of the class `wraps`, which a subclass names."""

    wraps: ClassVar[type[Backend]]

    def __init__(self, name: str, settings: Any) -> None:
        super().__init__(name, settings)
        self.inner = self.wraps(name, settings)
        path = getattr(settings, "faults", "")
        self.faults = Faults(file=Path(path) if path else None)

    @classmethod
    def parse_url(cls, rest: str, environment: Mapping[str, str]) -> Source:
        return cls.wraps.parse_url(rest, environment)

    @classmethod
    def parse_prefix(cls, rest: str, environment: Mapping[str, str]) -> tuple[Settings, tuple[str, ...]]:
        return cls.wraps.parse_prefix(rest, environment)

    @classmethod
    def settings_for(cls, source: Source) -> Settings:
        return cls.wraps.settings_for(source)

    def serves(self, source: Source) -> bool:
        return self.inner.serves(source)

    async def list(self, path: Sequence[str]) -> list[Entry]:
        await self.faults.meet("list")
        return await self.inner.list(path)

    async def lookup(self, path: Sequence[str]) -> Entry:
        await self.faults.meet("lookup")
        return await self.inner.lookup(path)

    async def stat(self, source: Source) -> VolumeInfo:
        await self.faults.meet("stat")
        return await self.inner.stat(source)

    async def describe(self, source: Source) -> Mapping[str, str]:
        await self.faults.meet("describe")
        return await self.inner.describe(source)

    async def open(self, source: Source, *, writable: bool) -> BackendVolume:
        await self.faults.meet("open-writable" if writable else "open")
        volume = FaultyVolume(await self.inner.open(source, writable=writable), self.faults)
        self.faults.opened += 1
        return volume

    async def aclose(self) -> None:
        self.faults.calls["release"] += 1
        await self.inner.aclose()


class FaultyFileBackend(FaultyBackend):
    driver = "faulty-file"
    settings_type = FaultyFileSettings
    wraps = FileBackend


def register() -> None:
    """Make the driver known in this process, in place of none."""
    DRIVERS["faulty-file"] = Registration(__name__, FaultyFileBackend.__name__)


def volfs_with_faults() -> list[str]:
    """The volfs command with the driver `faulty-file`."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import faults; faults.main()"
    return [sys.executable, "-c", code]


def main() -> None:
    from volfs.cli import main as volfs

    register()
    volfs()
