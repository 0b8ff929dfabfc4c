"""Streams of direct reads of an RBD image, which are read ahead past Python (native/held_read.c), by the kernel."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import opened
from mounts import Mount, mounted
from services import MIB, Image, ImageFactory, Services, script
from volumes import ceph_environment, raises, random_bytes

from volfs.readahead import STREAM

SIZE = 48 * MIB + 4096
HOLE = (8 * MIB, 36 * MIB)


@pytest.fixture(scope="module")
def content() -> bytes:
    return random_bytes(HOLE[0]) + bytes(HOLE[1] - HOLE[0]) + random_bytes(SIZE - HOLE[1], 1)


@pytest.fixture
def image(new_image: ImageFactory, content: bytes) -> Image:
    made = new_image(SIZE)
    made.write(content[: HOLE[0]])
    made.write(content[HOLE[1] :], HOLE[1])
    return made


@pytest.fixture
def rbd(mount: Callable[..., Mount], services: Services) -> Mount:
    return mount("rbd:volumes", env=ceph_environment(services))


def path_of(rbd: Mount, image: Image) -> Path:
    return rbd.path / "rbd" / image.pool / image.name


def read(file: int, offset: int, length: int) -> bytes:
    """By a buffer that is aligned, as the kernel wants it."""
    with mmap.mmap(-1, length) as buffer:
        return buffer[: os.preadv(file, [buffer], offset)]


@pytest.mark.parametrize("length", [4096, 36 * 1024, MIB, 3 * MIB])
def test_every_byte_is_where_it_belongs(rbd: Mount, image: Image, content: bytes, length: int) -> None:
    with opened(path_of(rbd, image), os.O_RDONLY | os.O_DIRECT) as file:
        for offset in range(0, SIZE, length):
            data = read(file, offset, length)
            assert data == content[offset : offset + length], f"{length} bytes at {offset}"


def test_what_is_written_just_ahead_of_the_reader_is_what_he_reads(
    rbd: Mount, image: Image, content: bytes
) -> None:
    now = bytearray(content)
    with (
        opened(path_of(rbd, image), os.O_RDONLY | os.O_DIRECT) as file,
        opened(path_of(rbd, image), os.O_WRONLY | os.O_DIRECT) as other,
        mmap.mmap(-1, 4096) as page,
    ):
        for number, offset in enumerate(range(0, SIZE - 2 * MIB, MIB)):
            if number % 3 == 2:  # in data, and in the hole
                page[:] = now[offset + MIB : offset + MIB + 4096] = random_bytes(4096, number)
                assert os.pwritev(other, [page], offset + MIB) == 4096
            assert read(file, offset, MIB) == now[offset : offset + MIB], offset


@pytest.fixture
def osd(services: Services) -> Iterator[int]:
    """The process of the one OSD; goes on after the test."""
    pid = script.running(script.Place(services.var))["ceph-osd"]
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_storage_that_stops_answering_is_ETIMEDOUT_for_the_stream_which_goes_on_when_it_answers(
    tmp_path: Path, services: Services, image: Image, content: bytes, osd: int
) -> None:
    config = tmp_path / "volfs.toml"
    config.write_text('[backends.rbd]\ndriver = "rbd"\npools = ["volumes"]\ntimeout = 2\n')
    with (
        mounted(tmp_path, (), ("--config", str(config)), ceph_environment(services)) as rbd,
        opened(path_of(rbd, image), os.O_RDONLY | os.O_DIRECT) as file,
    ):
        for number in range(STREAM + 2):
            assert read(file, number * 4096, 4096) == content[number * 4096 : (number + 1) * 4096]
        os.kill(osd, signal.SIGSTOP)
        with raises(errno.ETIMEDOUT):
            for offset in range((STREAM + 2) * 4096, HOLE[0], 4096):
                assert read(file, offset, 4096) == content[offset : offset + 4096]
        os.kill(osd, signal.SIGCONT)
        assert read(file, offset, 4096) == content[offset : offset + 4096]
