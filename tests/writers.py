"""Programs that write to a volume and keep account of it, see journal_writer.py, as a test starts and ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import journal_writer
from journal_writer import SLOT, Journal
from mounts import Mount, wait_until
from volumes import StoredVolume

END_SECONDS = 90.0  # longer than any deadline of volfs that a last request may run into
SYNC_SECONDS = 60.0


@dataclass
class Writer:
    """A writer that runs, or ran."""

    process: subprocess.Popen[bytes]
    journal: Journal

    def end(self) -> None:
        """Wait until it has ended by itself."""
        _, error = self.process.communicate(timeout=END_SECONDS)
        assert self.process.returncode == 0, error.decode()

    def stop(self) -> None:
        """Have it close the volume, and wait."""
        self.process.send_signal(signal.SIGTERM)
        self.end()


@contextlib.contextmanager
def writing(
    volume: Path,
    directory: Path,
    size: int,
    *,
    count: int = 2,
    seed: int = 0,
    keep_going: bool = False,
    flags: Sequence[int] = (0, os.O_DIRECT),
) -> Iterator[list[Writer]]:
    """So many writers on a volume, each with a part of its own, and these flags in turn.

    Their journals are in `directory`, under the volume's name, and go on where an earlier call has left them.
    """
    slots = size // SLOT // count
    writers = []
    try:
        for number in range(count):
            journal = Journal(directory / f"{volume.name}.{number}", number * slots, slots)
            arguments = [volume, journal.path, journal.first, slots, flags[number % len(flags)], seed]
            command = [sys.executable, journal_writer.__file__, *map(str, arguments), str(int(keep_going))]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            writers.append(Writer(process, journal))
        yield writers
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.communicate()


def wait_for_syncs(writers: Sequence[Writer], more: int = 3) -> None:
    """Each of them has so many more fsyncs behind it, which its file has been told."""
    goals = [writer.journal.count("s") + more for writer in writers]
    for writer, goal in zip(writers, goals, strict=True):
        wait_until(
            lambda writer=writer, goal=goal: writer.journal.count("s") >= goal or writer.process.poll(),
            f"{writer.journal.path.name} syncs",
            SYNC_SECONDS,
        )
        assert not writer.process.poll(), writer.process.communicate()[1].decode()


def path_of(mount: Mount, stored: StoredVolume) -> Path:
    """A listed volume, where the backend has the name of its driver."""
    return mount.path.joinpath(stored.driver, *stored.place)
