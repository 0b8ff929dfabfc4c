"""Many: images in a pool, open volumes, opens and closes. What must not grow with their number, or with time.

`scripts/bench --scale` measures the same in full size, against the clock; here it is smaller, and mostly counted.
"""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import pytest
import trio
from bench_scale import mixed_io, osd_operations, pool_mount, write_each
from many import Images, many_images, many_luns
from mounts import Mount, mounted, wait_until
from processes import Usage, switches, usage
from services import MIB, Services
from trio.testing import MockClock
from volumes import Storage, StoredVolume, raises

from volfs import api
from volfs.attached import Attachments
from volfs.backends.base import Directory, Entry, VolumeInfo
from volfs.backends.file import FileBackend, FileSettings, FileSource
from volfs.backends.rbd import RbdBackend
from volfs.backends.registry import Backends
from volfs.fuse import filesystem
from volfs.fuse.tree import DirectoryNode, Tree, VolumeNode

IMAGES = 300
STAT_REQUESTS = 6  # the image's id, header and object map, for a lookup and for its attributes
MEMORY = 400 * MIB  # that the daemon may have


@pytest.fixture(scope="module")
def images(services: Services) -> Iterator[Images]:
    with many_images(services, IMAGES) as made:
        yield made


@pytest.fixture(scope="module")
def pool(
    services: Services, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Mount, Path]]:
    with pool_mount(services, tmp_path_factory.mktemp("m"), images) as found:
        yield found


# Listing


@pytest.mark.slow
def test_a_listing_asks_twice_for_each_image_and_opens_none(
    services: Services, images: Images, pool: tuple[Mount, Path]
) -> None:
    mount, path = pool
    os.stat(path)  # connects
    before = osd_operations(services)
    shown = subprocess.run(["ls", "-l", path], capture_output=True, text=True, check=True).stdout
    asked = osd_operations(services) - before
    lines = [line.split() for line in shown.splitlines()[1:]]
    sizes = {line[8]: int(line[4]) for line in lines}
    assert {name: sizes[name] for name in images.sizes} == images.sizes
    assert 2 * IMAGES <= asked <= 2 * IMAGES + 30  # header and object map; the rest is of the pool
    assert api.status(socket_path=str(mount.socket)).open == []
    assert all(not images.image(name).watchers() for name in list(images.sizes)[::50])


@pytest.mark.slow
def test_a_stat_touches_one_image(services: Services, images: Images, tmp_path: Path) -> None:
    """Of a mount of its own: what a listing has told, the kernel knows for a while."""
    with pool_mount(services, tmp_path, images) as (_, path):
        os.stat(path)
        before = osd_operations(services)
        os.stat(path / "disk-00123")
        assert 0 < osd_operations(services) - before <= STAT_REQUESTS


@pytest.mark.slow
def test_an_image_that_was_made_by_copying_is_one_to_librbd(images: Images, pool: tuple[Mount, Path]) -> None:
    """Else the tests here would be of something that does not exist."""
    _, path = pool
    (path / "disk-00007").write_bytes(b"through volfs")
    image = images.image("disk-00007")
    assert image.read()[:13] == b"through volfs"
    assert len(image.read()) == image.size


@pytest.mark.slow
def test_a_large_directory_is_told_whole_and_in_parts(tmp_path: Path, volumes: Path) -> None:
    """In answers short enough that others have their turn."""
    names = [f"disk-{number:04}" for number in range(3 * filesystem.READDIR_ENTRIES + 1)]
    for number, name in enumerate(names):
        os.truncate(os.open(volumes / name, os.O_CREAT | os.O_WRONLY), number * 512)
    gc.collect()
    with mounted(tmp_path, [f"file:{volumes}"]) as mount:
        path = mount.path / "file"
        with os.scandir(path) as entries:
            found = [(entry.name, entry.stat().st_size) for entry in entries]
    assert found == [(name, number * 512) for number, name in enumerate(names)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["system.posix_acl_access", "security.selinux"])
def test_ls_need_not_ask_each_file_for_attributes_that_there_are_not(
    tmp_path: Path, volumes: Path, name: str
) -> None:
    """ENODATA would be an answer for one file, after which ls asks for the next one's."""
    (volumes / "disk").write_bytes(bytes(512))
    with mounted(tmp_path, [f"file:{volumes}"]) as mount, raises(errno.EOPNOTSUPP):
        os.getxattr(mount.path / "file" / "disk", name)


class SlowBackend(FileBackend):
    """Lists what it is told, in `seconds` of the test's clock."""

    seconds = 2.0
    lists = 0

    def __init__(self) -> None:
        super().__init__("slow", FileSettings(path="/nowhere"))
        self.names = ["a", "b"]

    async def list(self, path: Sequence[str]) -> list[Entry]:
        self.lists += 1
        await trio.sleep(self.seconds)
        return [self._entry(name, self.lists) for name in self.names]

    async def names_version(self, path: Sequence[str]) -> tuple[str, ...] | None:
        return tuple(self.names)

    async def stat(self, source: FileSource) -> VolumeInfo:  # type: ignore[override]
        return self._entry(source.name, 1000)

    def _entry(self, name: str, size: int) -> VolumeInfo:
        return VolumeInfo(name=name, source=FileSource(path=f"/nowhere/{name}"), size=size)


@pytest.fixture
def slow() -> SlowBackend:
    return SlowBackend()


@pytest.fixture
def tree(slow: SlowBackend) -> Tree:
    return Tree({"slow": slow}, Attachments(Backends({"slow": slow})))


async def sizes(tree: Tree) -> dict[str, int]:
    top = await tree.lookup(tree.root, "slow")
    children = await tree.list(top)
    for _, node in children:
        tree.remember(node)
    return {name: node.info.size for name, node in children if isinstance(node, VolumeNode)}


async def test_a_slow_listing_is_told_again_for_as_long_as_it_took(
    tree: Tree, slow: SlowBackend, autojump_clock: MockClock
) -> None:
    assert await sizes(tree) == {"a": 1, "b": 1}
    await trio.sleep(1.9)
    assert await sizes(tree) == {"a": 1, "b": 1}
    await trio.sleep(0.2)
    assert await sizes(tree) == {"a": 2, "b": 2}
    assert slow.lists == 2


async def test_a_new_or_removed_name_shows_at_once(
    tree: Tree, slow: SlowBackend, autojump_clock: MockClock
) -> None:
    await sizes(tree)
    slow.names = ["b", "c"]
    assert await sizes(tree) == {"b": 2, "c": 2}


@pytest.mark.parametrize("how", ["quick", "no version"])
async def test_what_is_listed_soon_or_has_no_version_is_asked_each_time(
    tree: Tree, slow: SlowBackend, autojump_clock: MockClock, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "quick":
        slow.seconds = 0.4
    else:

        async def none(path: Sequence[str]) -> None:
            return None

        monkeypatch.setattr(slow, "names_version", none)
    for number in range(1, 4):
        assert await sizes(tree) == {"a": number, "b": number}


async def test_a_listing_told_again_has_what_is_known_since(
    tree: Tree, slow: SlowBackend, autojump_clock: MockClock
) -> None:
    """A volume that was written, and looked at, is not told as it was before."""
    await sizes(tree)
    top = await tree.lookup(tree.root, "slow")
    assert isinstance(top, DirectoryNode)
    (_, node), _ = await tree.list(top)
    assert isinstance(node, VolumeNode)
    node.changed()
    await tree.refresh(node)
    assert await sizes(tree) == {"a": 1000, "b": 1}


async def test_a_volume_has_one_inode_though_the_kernel_forgot_it_meanwhile(
    tree: Tree, slow: SlowBackend, autojump_clock: MockClock
) -> None:
    top = await tree.lookup(tree.root, "slow")
    first = [node for _, node in await tree.list(top)]
    tree.drop_unknown(first)
    renewed = tree._volume(slow, slow._entry("a", 7), trio.current_time())
    assert renewed is not first[0]
    again = [node for _, node in await tree.list(top)]
    assert slow.lists == 1
    assert again[0] is renewed
    assert all(tree.node(node.inode) is node for node in again)


@pytest.mark.slow
async def test_names_of_images_have_a_version(storage: Storage, services: Services) -> None:
    stored = storage.make("rbd")
    backend = stored.make_backend()
    assert isinstance(backend, RbdBackend)
    place = stored.place[:-1]
    try:
        assert await backend.names_version(()) is None
        seen = [await backend.names_version(place)]
        stored.write(b"something")
        stored.resize(2 * stored.size)
        assert await backend.names_version(place) == seen[0] is not None
        for change in (
            lambda: storage.make("rbd"),
            lambda: services.run("rbd", "mv", stored.url[4:], f"{stored.url[4:]}-moved"),
            lambda: services.run("rbd", "rm", "--no-progress", f"{stored.url[4:]}-moved"),
        ):
            await trio.to_thread.run_sync(change)
            seen.append(await backend.names_version(place))
        assert len(set(seen)) == len(seen)
    finally:
        await backend.aclose()


@pytest.mark.slow
async def test_images_with_snapshots_are_listed_with_them_among_many(
    services: Services, images: Images, storage: Storage
) -> None:
    """Whether an image has any is told by the few keys that are read of each."""
    for name in ("disk-00003", "disk-00299"):
        images.image(name).snapshot("one")
        images.image(name).snapshot("two")
    backend = storage.make("rbd", namespace=images.namespace).make_backend()
    try:
        listed = {entry.name: entry for entry in await backend.list(images.place)}
    finally:
        await backend.aclose()
        services.run("rbd", "snap", "purge", "--no-progress", images.image("disk-00003").spec)
        services.run("rbd", "snap", "purge", "--no-progress", images.image("disk-00299").spec)
    assert {name for name in listed if "@" in name} == {
        f"disk-{number}@{name}" for number in ("00003", "00299") for name in ("one", "two")
    }
    assert not any(isinstance(entry, Directory) for entry in listed.values())


@pytest.mark.slow
async def test_of_very_many_images_the_listing_leaves_out_what_is_allocated(
    services: Services, images: Images, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volfs.backends.rbd.MANY", IMAGES - 1)
    stored = storage.make("rbd", namespace=images.namespace)
    backend = stored.make_backend()
    try:
        before = await trio.to_thread.run_sync(osd_operations, services)
        listed = [entry for entry in await backend.list(images.place) if isinstance(entry, VolumeInfo)]
        asked = await trio.to_thread.run_sync(osd_operations, services) - before
        one = next(entry for entry in listed if entry.name == "disk-00100")
        told = await backend.stat(one.source)
    finally:
        await backend.aclose()
    assert {entry.allocated for entry in listed} == {None}
    assert asked <= IMAGES + 30
    assert (one.size, told.size, told.allocated) == (images.sizes["disk-00100"], one.size, 0)


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
