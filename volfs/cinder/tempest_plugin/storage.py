"""A volume's bytes, behind Cinder's back, by the commands that tempest.conf names."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import IO

MIB = 1 << 20
BLOCK = 4 * MIB
COMMAND_SECONDS = 600


def sha256(commands: Sequence[str], backend: str, name: str, size: int) -> str:
    """Of the volume's first `size` bytes, as its storage has them."""
    command = _command(commands, backend, name=name)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        digest, length = hashlib.sha256(), 0
        while block := process.stdout.read(min(BLOCK, size - length)):
            digest.update(block)
            length += len(block)
        process.stdout.read()  # what the storage rounded the size up by
    if process.returncode or length != size:
        raise AssertionError(
            f"{shlex.join(command)}: {length} bytes of {size}, exit code {process.returncode}"
        )
    return digest.hexdigest()


def write(commands: Sequence[str], backend: str, name: str, path: str) -> None:
    """Fill the volume from a file."""
    subprocess.run(_command(commands, backend, name=name, file=path), check=True, timeout=COMMAND_SECONDS)


def fill(file: IO[bytes], size: int, one_in: int) -> str:
    """Make a file of `size` bytes, in every `one_in`th MiB random data, and holes else; its SHA-256.

    The last MiB has data as well, so that an end that is cut off is noticed.
    """
    digest = hashlib.sha256()
    for offset in range(0, size, MIB):
        number = offset // MIB
        is_data = bool(one_in) and (number % one_in == 0 or offset + MIB == size)
        block = os.urandom(MIB) if is_data else bytes(MIB)
        digest.update(block)
        if is_data:
            file.seek(offset)
            file.write(block)
    file.truncate(size)
    file.flush()
    return digest.hexdigest()


def _command(commands: Sequence[str], backend: str, **values: str) -> list[str]:
    for line in commands:
        name, _, command = line.partition(":")
        if name.strip() == backend:
            return [word.format(**values) for word in shlex.split(command)]
    raise AssertionError(f"tempest.conf: [volfs]: no command for backend {backend}")
