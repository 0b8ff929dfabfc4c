"""Fixtures that more than one module uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Mount, mounted


@pytest.fixture
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Mount]]:
    """Mount: `mount(*prefixes, options=(), env=None)`. Unmounted after the test."""
    with contextlib.ExitStack() as stack:

        def make(*prefixes: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Mount:
            return stack.enter_context(mounted(tmp_path_factory.mktemp("m"), prefixes, options, env))

        yield make


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """An empty directory for the file driver."""
    directory = tmp_path / "volumes"
    directory.mkdir()
    return directory
