"""scripts/bench --vm: volfs beside the kernel's ways to an RBD image, krbd and rbd-nbd, in the guest of scripts/vm.

What each of them writes to one image, it and librbd have to read. The guest has one processor, and each system call
is caught by ptrace: its times are no measure of anything outside.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench_subjects import Subject, Volume, volfs
from services import MIB, TOP, Image, Services, image, running_services
from volumes import random_bytes, sha256

REMARK = "That the bytes are the same counts. The guest's times are no measure of anything outside."


@contextlib.contextmanager
def krbd(services: Services, volume: Volume, directory: Path) -> Iterator[Path]:
    """The kernel's own client."""
    # Of the protocol's two versions the private Ceph speaks the second, which the kernel has to be told.
    with _mapped(services, volume, "krbd", "--options", "ms_mode=prefer-crc") as device:
        yield device


@contextlib.contextmanager
def rbd_nbd(services: Services, volume: Volume, directory: Path) -> Iterator[Path]:
    """librbd in a process, behind the kernel's nbd."""
    subprocess.run(["modprobe", "nbd"], check=True)
    with _mapped(services, volume, "nbd") as device:
        yield device


SUBJECTS: Mapping[str, Subject] = {"volfs": volfs, "krbd": krbd, "rbd-nbd": rbd_nbd}


def run(size_mib: int) -> int:
    """Print a line for each; 1 when one read other bytes than were written. On the host: in the guest."""
    if "VOLFS_VM" not in os.environ:
        command = [
            TOP / "scripts" / "vm",
            "run",
            "--",
            "env",
            f"PYTHONPATH={os.environ.get('PYTHONPATH', 'tests')}",
        ]
        again = [sys.executable, "tests/bench.py", "--vm", "--size-mib", str(size_mib)]
        return subprocess.run([*command, *again], cwd=TOP, check=False).returncode
    size, wrong = size_mib * MIB, 0
    print(f"{size_mib} MiB by dd with O_DIRECT. {REMARK}", flush=True)
    with running_services() as services, image(services, size) as volume:
        for number, (name, subject) in enumerate(SUBJECTS.items()):
            content = random_bytes(size, number)
            with tempfile.TemporaryDirectory(prefix="volfs-bench-") as text:
                directory = Path(text)
                before, after = directory / "before", directory / "after"
                before.write_bytes(content)
                with contextlib.redirect_stdout(None), subject(services, volume, directory) as path:
                    wrote = _dd(f"if={before}", f"of={path}", "oflag=direct", "conv=notrunc,fsync")
                with contextlib.redirect_stdout(None), subject(services, volume, directory) as path:
                    read = _dd(f"if={path}", f"of={after}", "iflag=direct")
                same = after.read_bytes() == content and volume.sha256() == sha256(content)
            wrong += not same
            told = "the same bytes" if same else "OTHER BYTES"
            print(f"{name:8} write {wrote:.2f} s, read {read:.2f} s, {told}", flush=True)
    return 1 if wrong else 0


@contextlib.contextmanager
def _mapped(services: Services, volume: Volume, kind: str, *options: str) -> Iterator[Path]:
    assert isinstance(volume, Image)
    device = ("rbd", "device", "--device-type", kind)
    path = services.run(*device, "map", *options, volume.spec).decode().strip()
    try:
        yield Path(path)
    finally:
        services.run(*device, "unmap", path)


def _dd(*arguments: str) -> float:
    begin = time.monotonic()
    subprocess.run(["dd", *arguments, "bs=1M", "status=none"], check=True)
    return time.monotonic() - begin
