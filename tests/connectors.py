"""A connector for os-brick that does what a test wants, in the place of one that os-brick has.

`Storage` is what it connects to: a file whose link in `connected` is there as long as the volume is connected, as a
device node would be. Real connectors cannot be told to fail at a certain step.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from volfs.backends import brick_library

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its libraries; later imports of it find it there
    from os_brick.initiator import connector
    from os_brick.initiator.connectors.local import LocalConnector
    from oslo_concurrency import processutils as processutils

SECONDS = 10.0  # a step that is held goes on after this
PROTOCOL = "lightos"  # in whose place


@dataclass
class Steps:
    """What the connector was told, and what it is to do wrong. All threads."""

    directory: Path
    calls: list[str] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)  # of each call
    failing: dict[str, Exception] = field(default_factory=dict)  # at the beginning of a call
    failing_late: dict[str, Exception] = field(default_factory=dict)  # at its end: the thing is done
    held: dict[str, threading.Event] = field(default_factory=dict)  # until then the call does not go on
    answer: dict[str, Any] = field(default_factory=dict)  # in place of connect's own

    def connected(self) -> list[str]:
        """The volumes that are connected now."""
        return sorted(path.name for path in self.directory.glob("connected-*"))

    @contextmanager
    def hold(self, call: str) -> Iterator[None]:
        """Inside the block the call hangs."""
        event = self.held[call] = threading.Event()
        try:
            yield
        finally:
            event.set()

    def do(self, call: str, data: dict[str, Any]) -> None:
        self.calls.append(call)
        self.data.append(data)
        if call in self.failing:
            raise self.failing[call]
        if call in self.held:
            self.held[call].wait(SECONDS)

    def done(self, call: str) -> None:
        if call in self.failing_late:
            raise self.failing_late[call]


class Connector(LocalConnector):  # type: ignore[misc]
    """In `connection_properties` the volume's file is `uuid`."""

    steps: ClassVar[Steps]

    def connect_volume(self, connection_properties: dict[str, Any]) -> dict[str, Any]:
        self.steps.do("connect", connection_properties)
        path = self._path(connection_properties)
        if not path.is_symlink():
            path.symlink_to(self.steps.directory / connection_properties["uuid"])
        self.steps.done("connect")
        return {"type": "block", "path": str(path), "object": object(), **self.steps.answer}

    def disconnect_volume(
        self,
        connection_properties: dict[str, Any],
        device_info: dict[str, Any],
        force: bool = False,
        ignore_errors: bool = False,
    ) -> None:
        self.steps.do("disconnect", connection_properties)
        self._path(connection_properties).unlink(missing_ok=True)
        self.steps.done("disconnect")

    def extend_volume(self, connection_properties: dict[str, Any]) -> int:
        self.steps.do("extend", connection_properties)
        return 0

    def _path(self, data: dict[str, Any]) -> Path:
        return self.steps.directory / f"connected-{data['uuid']}"


def set_up_os_brick() -> None:
    """As a program does that uses os-brick by itself, root for what takes root."""
    brick_library.set_up(
        brick_library.Options(
            root_helper="sudo",
            lock_path=brick_library.default_lock_path(),
            use_multipath=False,
            enforce_multipath=False,
            device_scan_attempts=1,
        )
    )


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The fake connector, for connection infos of type PROTOCOL."""
    path = f"{__name__}.{Connector.__name__}"
    monkeypatch.setitem(connector._connector_mapping_linux, PROTOCOL.upper(), path)
    directory = tmp_path / "san"
    directory.mkdir()
    made = Steps(directory)
    monkeypatch.setattr(Connector, "steps", made, raising=False)
    return made
