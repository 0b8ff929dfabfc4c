"""Progress of a copy on a terminal as a bar, elsewhere as lines that a log can keep."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.filesize import decimal

from volfs.endpoint import Shown

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 5.0


@contextmanager
def show(title: str, *, quiet: bool) -> Iterator[Shown | None]:
    """A function to call with the bytes done so far and in all. It writes to stderr; there is none when `quiet`."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _lines(title)


def _bar() -> Progress:
    # Imported for a terminal alone: a copy that a program starts need not pay for it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _lines(title: str) -> Shown:
    """A line every few seconds, and one at the end."""
    start = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS and done < total:
            return
        last = now
        rate = done / max(now - start, 1e-3)
        print(
            f"{title}: {100 * done // total}% {decimal(done)} of {decimal(total)}, "
            f"{decimal(int(rate))}/s, {(total - done) / rate:.0f} s left",
            file=sys.stderr,
        )

    return line
