"""The volfs command in this process, and what is said of how it ended. conftest.py offers the fixture `run`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from volfs import cli


@dataclass
class Ran:
    """What a command that ran in this process did."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, which takes a tenth of the time that a new one does."""

    def call(*arguments: str | Path, **environment: str) -> Ran:
        with monkeypatch.context() as patch:
            for key, value in {"COLUMNS": "100", "TERM": "dumb", **environment}.items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", ["volfs", *map(str, arguments)])
            patch.setattr(os, "environ", os.environ.copy())
            with pytest.raises(SystemExit) as ended:
                cli.main()
        captured = capsys.readouterr()
        return Ran(ended.value.code or 0, captured.out, captured.err)  # type: ignore[arg-type]

    return call


def ran(done: subprocess.CompletedProcess[str]) -> Ran:
    """What a command that ran in a process of its own did."""
    return Ran(done.returncode, done.stdout, done.stderr)


def failed(done: Ran, code: int, message: str) -> None:
    """It ended with this exit code, and one line on stderr that is this, after "volfs: "."""
    assert (done.code, done.out, done.err) == (code, "", f"volfs: {message}\n")


def succeeded(done: Ran) -> str:
    """Its output; nothing is said on stderr."""
    assert (done.code, done.err) == (0, "")
    return done.out
