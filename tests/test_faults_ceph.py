"""Ceph's daemons stop, die and come back under programs that read and write; images and locks change beneath them.

More of what other clients do to an image, and a fenced client, is in test_sharing.py; a full pool in test_full_pool.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ceph_daemons import killed, standing_still
from disks import ATTRIBUTE_SECONDS, opened
from mounts import Mount, mounted, wait_until
from services import MIB, Image, ImageFactory, Services
from volumes import raises, random_bytes
from writers import Writer, wait_for_syncs, writing

from volfs import api

pytestmark = pytest.mark.slow

SIZE = 6 * MIB
STANDSTILL_SECONDS = 10.0
TIMEOUT = 2  # of the mount that waits no longer
ENOUGH = 3 * TIMEOUT + 2.0  # for a write, a flush and a close that each run into it, and some


@contextlib.contextmanager
def mounted_ceph(directory: Path, services: Services, timeout: int = 30, user: str = "") -> Iterator[Mount]:
    conf = f'[backends.ceph]\ndriver = "rbd"\nconf = "{services.ceph_conf}"\ntimeout = {timeout}\n'
    (directory / "volfs.toml").write_text(f'{conf}id = "{user or services.user}"\n')
    with mounted(directory, [], ["-c", str(directory / "volfs.toml")]) as mount:
        yield mount


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


def path_of(mount: Mount, image: Image) -> Path:
    return mount.path / "ceph" / image.pool / image.name


def finish(writers: list[Writer], mount: Mount, image: Image, when: str) -> None:
    """They close; the image holds what they say, by the mount and past it."""
    for writer in writers:
        writer.stop()

    def sources() -> set[str]:
        return {it.source for it in api.status(socket_path=str(mount.socket)).open}

    wait_until(lambda: image.url not in sources(), "it is closed")
    for content in (image.read(), path_of(mount, image).read_bytes()):
        for writer in writers:
            writer.journal.verify(content, when)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


@contextlib.contextmanager
def osd_stands_still(services: Services) -> Iterator[None]:
    with standing_still(services, "ceph-osd"):
        end = (
            time.monotonic() + STANDSTILL_SECONDS
        )  # how long it lasts is the fault, and not a wait for something
        wait_until(lambda: time.monotonic() > end, "time passes", STANDSTILL_SECONDS + 1)
        yield


@contextlib.contextmanager
def osd_dies(services: Services) -> Iterator[None]:
    with killed(services, "ceph-osd"):
        yield


@contextlib.contextmanager
def monitor_dies(services: Services) -> Iterator[None]:
    with killed(services, "ceph-mon"):
        yield


@pytest.mark.thorough
@pytest.mark.parametrize("fault", [osd_stands_still, osd_dies, monitor_dies])
def test_programs_wait_and_go_on_when_ceph_is_back_within_the_timeout(
    services: Services,
    new_image: ImageFactory,
    place: Path,
    tmp_path: Path,
    fault: Callable[[Services], contextlib.AbstractContextManager[None]],
) -> None:
    image = new_image(SIZE)
    with mounted_ceph(place, services) as mount:
        with writing(path_of(mount, image), tmp_path, SIZE) as writers:
            wait_for_syncs(writers)
            with fault(services):
                assert len(os.listdir(mount.path)) == 2  # it is nobody's business but theirs
            wait_for_syncs(writers)
            finish(writers, mount, image, f"after {fault.__name__}")
            for writer in writers:
                assert writer.journal.errors() == []
            if fault is osd_stands_still:
                assert max(it.journal.slowest() for it in writers) > STANDSTILL_SECONDS - 3, "nobody waited"
        assert image.name in os.listdir(path_of(mount, image).parent)


def test_an_osd_that_stands_still_for_longer_than_the_timeout_is_ETIMEDOUT_and_nothing_synced_is_lost(
    services: Services, new_image: ImageFactory, place: Path, tmp_path: Path
) -> None:
    """The programs go on with the files that they have open."""
    image, quiet = new_image(SIZE), new_image(MIB)
    with mounted_ceph(place, services, TIMEOUT) as mount, contextlib.ExitStack() as stack:
        writers = stack.enter_context(writing(path_of(mount, image), tmp_path, SIZE, keep_going=True))
        with opened(path_of(mount, quiet), os.O_RDONLY | os.O_DIRECT) as reader:
            wait_for_syncs(writers)
            with standing_still(services, "ceph-osd"):
                with within(ENOUGH), raises(errno.ETIMEDOUT):
                    os.pread(reader, 4096, 4096)
                with within(ENOUGH), raises(errno.ETIMEDOUT):
                    path_of(mount, quiet).open("r+b")
                with within(1):
                    assert set(os.listdir(mount.path)) == {"attached", "ceph"}
                    api.status(socket_path=str(mount.socket))
                wait_until(lambda: all(it.journal.errors() for it in writers), "all are told", ENOUGH)
            assert os.pread(reader, 4096, 4096) == bytes(4096)
            wait_for_syncs(writers)
            for writer in writers:
                assert {number for number, _ in writer.journal.errors()} == {"ETIMEDOUT"}
                assert writer.journal.slowest() < ENOUGH
            finish(writers, mount, image, "after a timeout")


def test_an_image_that_is_renamed_stays_with_those_who_have_it_open(
    services: Services, new_image: ImageFactory, place: Path, tmp_path: Path
) -> None:
    image = new_image(SIZE)
    with mounted_ceph(place, services) as mount:
        path = path_of(mount, image)
        renamed = path.with_name(f"renamed-{secrets.token_hex(4)}")
        with writing(path, tmp_path, SIZE) as writers:
            wait_for_syncs(writers)
            services.run("rbd", "mv", image.spec, f"{image.pool}/{renamed.name}")
            try:
                wait_until(lambda: not path.exists() and renamed.exists(), "it is seen", ATTRIBUTE_SECONDS)
                wait_for_syncs(writers)
                for writer in writers:
                    writer.stop()
                    assert writer.journal.errors() == []
                    writer.journal.verify(renamed.read_bytes(), "after a rename")
            finally:
                services.run("rbd", "mv", f"{image.pool}/{renamed.name}", image.spec)
        for writer in writers:
            writer.journal.verify(image.read(), "after a rename and another")


def test_who_takes_the_lock_by_force_fences_volfs_which_writes_no_more(
    services: Services, new_image: ImageFactory, place: Path, tmp_path: Path
) -> None:
    """Breaking a lock of RBD puts its owner on the blocklist, so that its late writes come to nothing."""
    import rados
    import rbd

    image = new_image(SIZE)
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(mounted_ceph(place, services, TIMEOUT))
        writers = stack.enter_context(writing(path_of(mount, image), tmp_path, SIZE))
        wait_for_syncs(writers)
        (owner,) = image.lockers()
        with (
            rados.Rados(conffile=str(services.ceph_conf), name="client.admin") as cluster,
            cluster.open_ioctx(image.pool) as pool,
            rbd.Image(pool, image.name) as thief,
        ):
            (lock,) = thief.lock_get_owners()
            thief.lock_break(rbd.RBD_LOCK_MODE_EXCLUSIVE, lock["owner"])
            try:
                thief.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
                for writer in writers:
                    writer.end()
                    assert {number for number, _ in writer.journal.errors()} == {"ESHUTDOWN"}
                    assert writer.journal.slowest() < ENOUGH
                content = thief.read(0, SIZE)
                thief.write(b"theirs", 0)
                with within(ENOUGH), raises(errno.ESHUTDOWN):
                    path_of(mount, image).open("r+b")
                with within(2 * ENOUGH):
                    assert mount.stop() == 1, "a write was lost"
                assert thief.read(0, 6) == b"theirs"
            finally:
                services.run("ceph", "osd", "blocklist", "rm", owner["address"])
    for writer in writers:
        writer.journal.verify(content, "after the lock was broken")


def test_a_user_that_may_only_read_reads_and_is_told_so_by_open_for_writing(
    services: Services, new_image: ImageFactory, place: Path
) -> None:
    image = new_image(MIB)
    image.write(content := random_bytes(MIB))
    user = f"reader-{secrets.token_hex(4)}"
    profile = ("mon", "profile rbd-read-only", "osd", "profile rbd-read-only")
    keyring = place / "keyring"
    keyring.touch(0o600)
    keyring.write_bytes(services.run("ceph", "auth", "get-or-create", f"client.{user}", *profile))
    try:
        (place / "volfs.toml").write_text(
            f'[backends.ceph]\ndriver = "rbd"\nconf = "{services.ceph_conf}"\nid = "{user}"\n'
            f'keyring = "{keyring}"\npools = ["volumes"]\ntimeout = {TIMEOUT}\n'
        )
        with mounted(place, [], ["-c", str(place / "volfs.toml")]) as mount:
            path = path_of(mount, image)
            assert path.read_bytes() == content
            for flags in (os.O_WRONLY, os.O_RDWR | os.O_DIRECT):
                with within(ENOUGH), raises(errno.EPERM):
                    file = os.open(path, flags)
                    try:
                        os.pwrite(file, b"x", 0)
                        os.fsync(file)
                    finally:
                        with contextlib.suppress(OSError):
                            os.close(file)
            assert path.read_bytes() == image.read() == content
    finally:
        services.run("ceph", "auth", "rm", f"client.{user}")
