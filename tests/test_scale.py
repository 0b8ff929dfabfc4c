"""Many: images in a pool, open volumes, opens and closes. What must not grow with their number, or with time.

`scripts/bench --scale` measures the same in full size, against the clock; here it is smaller, and mostly counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

import pytest
from bench_scale import mixed_io, pool_mount, write_each
from many import many_images, many_luns
from mounts import Mount, mounted, wait_until
from processes import Usage, switches, usage
from services import MIB, Services
from volumes import Storage, StoredVolume

from volfs import api

MEMORY = 400 * MIB  # that the daemon may have


# Open volumes


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["rbd", "iscsi"])
def test_many_volumes_have_fair_shares_and_the_daemon_little_memory(
    services: Services, tmp_path: Path, driver: str
) -> None:
    with_volumes = rbd_volumes if driver == "rbd" else iscsi_volumes
    for mount, paths in with_volumes(services, tmp_path, 24):
        write_each(paths)
        operations, errors = mixed_io(paths, 2)
        assert errors == 0
        assert min(operations) >= median(operations) / 2, sorted(operations)
        assert usage(mount.process.pid).peak_rss < MEMORY


def rbd_volumes(services: Services, place: Path, count: int) -> Iterator[tuple[Mount, list[Path]]]:
    with (
        many_images(services, count, 16 * MIB, shrink=0) as made,
        pool_mount(services, place, made) as (
            mount,
            path,
        ),
    ):
        yield mount, [path / name for name in made.sizes]


def iscsi_volumes(services: Services, place: Path, count: int) -> Iterator[tuple[Mount, list[Path]]]:
    prefix = f"iscsi://{services.portal}"
    with many_luns(services, count, 16 * MIB) as luns, mounted(place, [prefix]) as mount:
        yield mount, [mount.path / "iscsi" / lun.iqn / str(lun.number) for lun in luns]


# An idle daemon


@pytest.mark.slow
def test_a_daemon_with_nothing_open_is_not_woken(tmp_path: Path, volumes: Path) -> None:
    """Its own thread: those of libraries are theirs."""
    seconds = 3.0
    (volumes / "disk").write_bytes(bytes(512))
    with mounted(tmp_path, [f"file:{volumes}"]) as mount:
        (mount.path / "file" / "disk").read_bytes()
        wait_until(lambda: not api.status(socket_path=str(mount.socket)).open, "nothing is open")
        own = Path("/proc", str(mount.process.pid), "task", str(mount.process.pid))

        def rests() -> bool:
            """Whether the threads that it used are done, for a moment at least."""
            before = switches(own)
            time.sleep(0.3)
            return switches(own) == before

        wait_until(rests, "it rests")
        before, cpu = switches(own), usage(mount.process.pid).cpu
        time.sleep(seconds)  # nothing to wait for: that nothing happens is the point
        assert switches(own) - before <= 1
        assert usage(mount.process.pid).cpu - cpu <= 0.02


@pytest.mark.slow
def test_reads_past_their_deadline_are_given_up_after_an_idle_time(tmp_path: Path, volumes: Path) -> None:
    """The look at them, which an idle daemon leaves out, begins anew with the next open."""
    (volumes / "disk").write_bytes(bytes(512))
    with mounted(tmp_path, [f"file:{volumes}"]) as mount:
        path = mount.path / "file" / "disk"
        path.read_bytes()
        wait_until(lambda: not api.status(socket_path=str(mount.socket)).open, "nothing is open")
        own = Path("/proc", str(mount.process.pid), "task", str(mount.process.pid))
        with path.open("rb"):
            before = switches(own)
            wait_until(lambda: switches(own) >= before + 2, "it looks once a second")


# Cycles

CYCLES = 64  # of each kind; a quarter as many go before, until caches and pools are full
RSS_TOLERANCE = 6 * MIB
RSS_PER_CYCLE = (
    256  # bytes: librbd and glibc are not ours; ten thousand cycles may take as much as one open volume
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For the daemon's temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return temporary


def settled(mount: Mount) -> Usage:
    """When what the last close began is over."""
    status = api.status(socket_path=str(mount.socket))
    wait_until(
        lambda: not (status := api.status(socket_path=str(mount.socket))).open and not status.attached,
        f"nothing is open or attached: {status}",
    )
    return usage(mount.process.pid)


def assert_no_growth(mount: Mount, before: Usage, cycles: int) -> None:
    """The last client's connection, and threads that wait for more to do, may stay for a while."""
    wait_until(
        lambda: (
            usage(mount.process.pid).descriptors <= before.descriptors
            and usage(mount.process.pid).threads <= before.threads
        ),
        f"no more descriptors and threads than {before}",
        30,
    )
    after = settled(mount)
    assert after.rss - before.rss <= RSS_TOLERANCE + cycles * RSS_PER_CYCLE, (before, after)


def cycle_by_path(mount: Mount, stored: StoredVolume, path: Path, number: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(number.to_bytes(8) * 512)
        file.seek(0)
        assert file.read(8) == number.to_bytes(8)


def cycle_by_attaching(mount: Mount, stored: StoredVolume, path: Path, number: int) -> None:
    with closing(api.open_volume(stored.url, "r+b", 0, socket_path=str(mount.socket))) as file:
        file.write(number.to_bytes(8) * 512)
        file.seek(0)
        assert file.read(8) == number.to_bytes(8)


@pytest.mark.slow
@pytest.mark.parametrize("cycle", [cycle_by_path, cycle_by_attaching])
@pytest.mark.parametrize("driver", ["rbd", "iscsi", "file"])
@pytest.mark.parametrize(
    "count", [CYCLES, pytest.param(20_000, marks=[pytest.mark.thorough, pytest.mark.timeout(3600)])]
)
def test_opening_and_attaching_leave_nothing_behind(
    tmp_path: Path,
    place: Path,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    cycle: Callable[[Mount, StoredVolume, Path, int], None],
    count: int,
) -> None:
    stored = storage.make(driver)
    for name, value in stored.environment.items():
        monkeypatch.setenv(name, value)  # an attach tells the client's
    with mounted(tmp_path / "m", [stored.prefix], env={**stored.environment, "TMPDIR": str(place)}) as mount:
        path = mount.path.joinpath(stored.backend, *stored.place)
        for number in range(count // 4):
            cycle(mount, stored, path, number)
        before = settled(mount)
        for number in range(count):
            cycle(mount, stored, path, number)
        assert_no_growth(mount, before, count)
        assert stored.users() == []
        assert list(place.iterdir()) == []
    assert stored.read()[:8] == (count - 1).to_bytes(8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count", [20, pytest.param(1000, marks=[pytest.mark.thorough, pytest.mark.timeout(1800)])]
)
def test_an_image_with_many_snapshots_is_listed_again_and_again(
    tmp_path: Path, services: Services, storage: Storage, count: int
) -> None:
    stored = storage.make("rbd", MIB)
    with services.open_pool(stored.place[0]) as ioctx:
        import rbd

        with rbd.Image(ioctx, stored.place[-1]) as image:
            for number in range(count):
                image.create_snap(f"snap-{number:04}")
    with mounted(tmp_path, [stored.prefix], env=stored.environment) as mount:
        directory = mount.path.joinpath("rbd", *stored.place[:-1])

        def listed() -> list[str]:
            return sorted(name for name in os.listdir(directory) if name.startswith(f"{stored.place[-1]}@"))

        for _ in range(5):
            assert len(listed()) == count
        before = settled(mount)
        for _ in range(20):
            assert len(listed()) == count
        assert_no_growth(mount, before, 20)
        assert (directory / listed()[-1]).read_bytes() == bytes(MIB)
