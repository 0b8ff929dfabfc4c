"""A storage that hangs beside one that is well, on one mount: the healthy one must hardly notice."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ceph_daemons import standing_still
from disks import opened
from iscsi_proxy import IscsiProxy, iscsi_proxy
from mounts import Mount, mounted, run_volfs, wait_until
from services import MIB, SLOWER, Services
from volumes import Storage, StoredVolume, raises, random_bytes

from volfs import api

pytestmark = pytest.mark.slow

SIZE = 16 * MIB
TIMEOUT = 4  # of the sick one: longer than what is measured meanwhile takes
READERS = 64  # that hang
REQUEST = 128 * 1024
WINDOW_SECONDS = 0.4
WINDOWS = 3
MOST_WINDOWS = 8  # of which the best WINDOWS count, since the machine is shared with others
LATENCY_SECONDS = 0.5 * SLOWER
STATUS_SECONDS = 1.0 * SLOWER

HANGING = """
import os, sys, threading
def read(number):
    file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
    started.release()
    while True:
        try:
            os.pread(file, 65536, number * 65536)
        except OSError:
            pass
started = threading.Semaphore(0)
for number in range(int(sys.argv[2])):
    threading.Thread(target=read, args=(number,), daemon=True).start()
for _ in range(int(sys.argv[2])):
    started.acquire()
print("started", flush=True)
sys.stdin.read()
os._exit(0)
"""


@dataclass
class Pair:
    """Two volumes on one mount; the storage of `sick` hangs for as long as `hanging` lasts."""

    mount: Mount
    services: Services
    between: IscsiProxy
    sick: StoredVolume
    healthy: StoredVolume

    @property
    def sick_path(self) -> Path:
        return self.mount.path.joinpath("sick", *self.sick.place)

    @property
    def healthy_path(self) -> Path:
        return self.mount.path.joinpath("healthy", *self.healthy.place)

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        if self.sick.driver == "rbd":
            with standing_still(self.services, "ceph-osd"):
                yield
        else:
            self.between.silence()
            try:
                yield
            finally:
                self.between.heal()


@pytest.fixture
def pair(
    request: pytest.FixtureRequest,
    storage: Storage,
    services: Services,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    other = {"rbd": "iscsi", "iscsi": "rbd"}[request.param]
    sick, healthy = storage.make(request.param, SIZE), storage.make(other, SIZE)
    place = tmp_path_factory.mktemp("p")
    with iscsi_proxy(services.portal) as between:
        portals = {"sick": between.portal, "healthy": services.portal}
        text = ""
        for name, stored in (("sick", sick), ("healthy", healthy)):
            text += f'[backends.{name}]\ndriver = "{stored.driver}"\ntimeout = {TIMEOUT}\n'
            if stored.driver == "rbd":
                text += f'conf = "{services.ceph_conf}"\nid = "{services.user}"\n'
            else:
                text += f'portals = ["{portals[name]}"]\nreconnect_timeout = {TIMEOUT}\n'
        (place / "volfs.toml").write_text(text)
        with mounted(place, [], ["-c", str(place / "volfs.toml")]) as mount:
            yield Pair(mount, services, between, sick, healthy)


@contextlib.contextmanager
def hanging_readers(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """So many threads wait for an answer from this volume, and ask again when told that there is none."""
    command = [sys.executable, "-c", HANGING, path, str(READERS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"
            yield process
        finally:
            process.kill()


def measure(file: int, chance: random.Random) -> tuple[float, float]:
    """Bytes a second of random reads and writes, one at a time, and the longest time that one of them took."""
    data = random_bytes(REQUEST)
    begun = last = time.monotonic()
    moved, longest = 0, 0.0
    while last - begun < WINDOW_SECONDS:
        offset = chance.randrange(SIZE // REQUEST) * REQUEST
        if chance.random() < 0.5:
            moved += len(os.pread(file, REQUEST, offset))
        else:
            moved += os.pwrite(file, data, offset)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return moved / (last - begun), longest


@pytest.mark.parametrize("pair", ["rbd", "iscsi"], indirect=True)
def test_a_storage_that_hangs_takes_little_from_the_speed_of_another(pair: Pair) -> None:
    pair.healthy.write(random_bytes(SIZE))
    chance = random.Random(1)
    with opened(pair.healthy_path, os.O_RDWR | os.O_DIRECT) as file:
        measure(file, chance)
        before = [measure(file, chance)[0] for _ in range(WINDOWS)]
        goal = 0.8 * statistics.median(before)
        with contextlib.ExitStack() as stack:
            # Opened before it hangs: that open would wait as well.
            readers = stack.enter_context(hanging_readers(pair.sick_path))
            stack.enter_context(pair.hanging())
            during: list[float] = []
            latencies: list[float] = []
            while len(during) < MOST_WINDOWS:
                speed, latency = measure(file, chance)
                during.append(speed)
                latencies.append(latency)
                if statistics.median(sorted(during)[-WINDOWS:]) >= goal and len(during) >= WINDOWS:
                    break
            print(f"before {before}, while the other hangs {during}; longest {latencies}")
            begun = time.monotonic()
            listed = subprocess.run(["ls", "-l", pair.mount.path], capture_output=True, check=True)
            assert {b"sick", b"healthy"} <= set(listed.stdout.split())
            status = api.status(socket_path=str(pair.mount.socket))
            assert len(status.open) == 2
            assert time.monotonic() - begun < STATUS_SECONDS
            assert readers.poll() is None
        assert statistics.median(sorted(during)[-WINDOWS:]) >= goal
        assert sorted(latencies)[WINDOWS - 1] < LATENCY_SECONDS


@pytest.mark.thorough
@pytest.mark.parametrize("pair", ["rbd", "iscsi"], indirect=True)
def test_a_listing_or_an_open_that_hangs_holds_up_no_other(pair: Pair) -> None:
    """More of them than there are tasks for names and opens of one backend at a time."""
    command = ["ls", "-l", pair.sick_path.parent]
    with pair.hanging(), contextlib.ExitStack() as stack:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        hanging = [stack.enter_context(subprocess.Popen(command, **quiet)) for _ in range(20)]
        for process in hanging:
            stack.callback(process.kill)
        begun = time.monotonic()
        assert pair.healthy.place[-1] in os.listdir(pair.healthy_path.parent)
        with opened(pair.healthy_path, os.O_RDWR) as file:
            os.pwrite(file, b"written", 0)
            os.fsync(file)
        assert run_volfs("status", env={"VOLFS_SOCKET": str(pair.mount.socket)}).returncode == 0
        assert time.monotonic() - begun < 3 * STATUS_SECONDS
        assert any(process.poll() is None for process in hanging), "nothing hung"
    assert pair.healthy.read()[:7] == b"written"


@pytest.mark.parametrize("pair", ["rbd", pytest.param("iscsi", marks=pytest.mark.thorough)], indirect=True)
def test_a_signal_is_obeyed_at_once_and_the_healthy_volume_is_whole_while_another_hangs(pair: Pair) -> None:
    with contextlib.ExitStack() as stack:
        healthy = os.open(pair.healthy_path, os.O_WRONLY)
        os.pwrite(healthy, content := random_bytes(MIB), 0)
        stack.enter_context(hanging_readers(pair.sick_path))
        stack.enter_context(pair.hanging())
        pair.mount.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "SIGTERM: stopping" in pair.mount.log, "it is heard", STATUS_SECONDS)
        pair.mount.process.wait(3 * TIMEOUT)
        assert pair.healthy.read()[:MIB] == content
        with raises(errno.ENOTCONN):
            os.close(healthy)
