"""Every way a mount can end while programs write: in time, what was acknowledged is on the storage, and the exit code
tells so."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ceph_daemons import standing_still
from iscsi_proxy import iscsi_proxy
from mounts import Mount, is_mounted, mounted, run_volfs, wait_until
from services import MIB, SLOWER, Services
from volumes import Storage, StoredVolume, raises
from writers import Writer, path_of, wait_for_syncs, writing

SIZE = 6 * MIB
END_SECONDS = 15.0 * SLOWER  # for a healthy storage
TIMEOUT = 2  # of a backend that will not answer


@contextlib.contextmanager
def writers_on(mount: Mount, volumes: list[StoredVolume], directory: Path) -> Iterator[list[Writer]]:
    """Two on each volume, all of which have got going."""
    with contextlib.ExitStack() as stack:
        writers = [
            writer
            for stored in volumes
            for writer in stack.enter_context(writing(path_of(mount, stored), directory, SIZE))
        ]
        wait_for_syncs(writers, 3)
        yield writers


def connection_number(path: Path) -> int:
    """As the kernel calls the mount's connection in /sys/fs/fuse/connections."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(path):
            major, minor = map(int, fields[2].split(":"))
            return os.makedev(major, minor)
    raise AssertionError(f"{path} is not mounted")


@contextlib.contextmanager
def fusectl(directory: Path) -> Iterator[Path]:
    """Where the kernel's files of FUSE connections are."""
    usual = Path("/sys/fs/fuse/connections")
    if any(usual.iterdir()):
        yield usual
        return
    directory.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def terminate(mount: Mount, writers: list[Writer], _: Path) -> None:
    mount.process.send_signal(signal.SIGTERM)


def unmount_by_force(mount: Mount, writers: list[Writer], _: Path) -> None:
    """After those that ask politely were refused, and have disturbed nobody."""
    assert subprocess.run(["umount", mount.path], capture_output=True, check=False).returncode != 0
    refused = run_volfs("umount", mount.path)
    assert (refused.returncode, "busy" in refused.stderr) == (1, True), refused.stderr
    wait_for_syncs(writers, 2)
    assert not any(writer.journal.errors() for writer in writers)
    done = run_volfs("umount", mount.path, "--force")
    assert done.returncode == 0, done.stderr
    assert mount.process.poll() == 0 or mount.process.wait(0.5) == 0, "it had ended before volfs umount did"


def unmount_lazily(mount: Mount, writers: list[Writer], _: Path) -> None:
    """The writers have time to finish; the daemon ends with the last of them."""
    subprocess.run(["fusermount3", "-u", "-z", mount.path], check=True)
    assert not is_mounted(mount.path)
    wait_for_syncs(writers, 2)
    assert mount.process.poll() is None
    for writer in writers:
        writer.stop()
        assert not writer.journal.errors()


def abort(mount: Mount, writers: list[Writer], directory: Path) -> None:
    """The kernel forgets the connection; the daemon hears of it when it asks for the next request."""
    number = connection_number(mount.path)
    with fusectl(directory / "fusectl") as connections:
        (connections / str(number) / "abort").write_text("1")


@pytest.mark.slow
@pytest.mark.parametrize("end", [terminate, unmount_by_force, unmount_lazily, abort])
def test_whatever_ends_a_mount_under_load_all_that_was_acknowledged_is_on_the_storage(
    storage: Storage,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    end: Callable[[Mount, list[Writer], Path], None],
) -> None:
    volumes = [storage.make("rbd", SIZE), storage.make("iscsi", SIZE)]
    environment = {key: value for stored in volumes for key, value in stored.environment.items()}
    prefixes = [stored.prefix for stored in volumes]
    with (
        mounted(tmp_path_factory.mktemp("e"), prefixes, env=environment) as mount,
        writers_on(mount, volumes, tmp_path) as writers,
    ):
        begun = time.monotonic()
        end(mount, writers, tmp_path)
        assert mount.process.wait(END_SECONDS) == 0, mount.log
        assert time.monotonic() - begun < END_SECONDS
        for writer in writers:
            writer.end()
        contents = [stored.read() for stored in volumes]
        for writer, content in zip(writers, [contents[0]] * 2 + [contents[1]] * 2, strict=True):
            writer.journal.verify(content, f"after {end.__name__}", acknowledged=True)
        assert not mount.socket.exists()
        wait_until(lambda: not any(it.users() for it in volumes), "they are closed")
        if end is abort:  # who reads there is told, until somebody unmounts it or mounts again
            with raises(errno.ENOTCONN):
                os.listdir(mount.path)
        else:
            assert not is_mounted(mount.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sick", "how"),
    [
        ("rbd", "SIGTERM"),
        pytest.param("rbd", "umount", marks=pytest.mark.thorough),
        pytest.param("iscsi", "SIGTERM", marks=pytest.mark.thorough),
        pytest.param("iscsi", "umount", marks=pytest.mark.thorough),
    ],
)
def test_the_exit_code_tells_in_time_that_not_all_has_reached_a_storage_that_hangs(
    storage: Storage, services: Services, tmp_path_factory: pytest.TempPathFactory, sick: str, how: str
) -> None:
    stored = storage.make(sick, MIB)
    other = storage.make("block", MIB)
    place = tmp_path_factory.mktemp("e")
    with iscsi_proxy(services.portal) as between, contextlib.ExitStack() as hanging:
        (place / "volfs.toml").write_text(
            f'[backends.rbd]\ndriver = "rbd"\nconf = "{services.ceph_conf}"\nid = "{services.user}"\n'
            f'timeout = {TIMEOUT}\n[backends.iscsi]\ndriver = "iscsi"\nportals = ["{between.portal}"]\n'
            f"timeout = {TIMEOUT}\nreconnect_timeout = {TIMEOUT}\n"
        )
        with mounted(place, [other.prefix], ["-c", str(place / "volfs.toml")]) as mount:
            files = [os.open(path_of(mount, it), os.O_WRONLY) for it in (stored, other)]
            os.pwrite(files[0], b"before", 0)
            os.fsync(files[0])
            if sick == "rbd":
                hanging.enter_context(standing_still(services, "ceph-osd"))
                os.pwrite(files[0], b"lost", 4096)  # as a cache does, it says yes
            else:
                between.silence()
                with raises(errno.ETIMEDOUT):
                    os.pwrite(files[0], b"lost", 4096)
            os.pwrite(files[1], b"healthy", 0)
            begun = time.monotonic()
            if how == "umount":
                done = run_volfs("umount", mount.path, "--force")
                assert done.returncode == 1
                assert f"no answer within {TIMEOUT} s" in done.stderr
            else:
                mount.process.send_signal(signal.SIGTERM)
            assert mount.process.wait(END_SECONDS) == 1, mount.log
            assert time.monotonic() - begun < 4 * TIMEOUT + 2
            assert "not everything reached the backend" in mount.log
            assert other.read()[:7] == b"healthy"
            for file in files:
                with raises(errno.ENOTCONN):
                    os.close(file)
        hanging.close()
        between.heal()
        between.drop()
        stored.evict()
        assert stored.read()[:6] == b"before"
