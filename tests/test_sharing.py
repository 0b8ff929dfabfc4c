"""Many at once: processes, paths, mounts and other clients of the storage on the same volume, through the kernel.

What the storage has is asked of the storage itself. The module has two mounts of each driver, each a daemon of its
own; what needs a short deadline has one more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from disks import ATTRIBUTE_SECONDS, OBJECT, SIZE, Disk, disk_maker, opened, run
from mounts import Mount, mounted, wait_until
from services import MIB, Image, ImageFactory, Services
from volumes import Storage, raises, random_bytes, variants

from volfs import api

slow = pytest.mark.slow
both_ways = pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])

# The contract suite tells sectors of 512 and 4096 bytes apart; here the larger ones are the harder case.
DRIVERS = variants(quick=("rbd",), only=("rbd", "iscsi-4096", "block", "file"))

BLOCK = 4096
TIMEOUT = 2.0  # of the backend of `impatient`
ENOUGH = 3 * TIMEOUT + 2  # for a write, a flush and a close that each run into it, and some


make_disk = disk_maker(DRIVERS)


@pytest.fixture(scope="module")
def other_mount(shared_disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    stored = shared_disk.stored
    with mounted(tmp_path_factory.mktemp("n"), [stored.prefix], env=stored.environment) as mount:
        yield mount


@pytest.fixture
def twin(disk: Disk, other_mount: Mount) -> Iterator[Disk]:
    """The volume of `disk`, on another mount of the same storage."""
    twin = Disk(other_mount, disk.stored)
    yield twin
    wait_until(lambda: not twin.status().open, "the other mount has nothing open any more")


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, services: Services) -> Iterator[Mount]:
    """A mount of Ceph that waits for no answer longer than TIMEOUT."""
    with mounted_with_timeout(tmp_path_factory.mktemp("i"), services) as mount:
        yield mount


@contextlib.contextmanager
def mounted_with_timeout(directory: Path, services: Services) -> Iterator[Mount]:
    config = directory / "volfs.toml"
    config.write_text(f"""
[backends.ceph]
driver = "rbd"
conf = "{services.ceph_conf}"
id = "{services.user}"
timeout = {TIMEOUT}

[backends.san]
driver = "iscsi"
portals = ["{services.portal}"]
timeout = {TIMEOUT}
reconnect_timeout = {TIMEOUT}
""")
    with mounted(directory, [], ("--config", str(config))) as mount:
        yield mount


def path_of(mount: Mount, image: Image) -> Path:
    return mount.path / "ceph" / image.pool / image.name


@contextlib.contextmanager
def librbd(image: Image, **how: Any) -> Iterator[Any]:
    """The image as another client has it open."""
    import rados
    import rbd

    conf = str(image.services.ceph_conf)
    with (
        rados.Rados(conffile=conf, name="client.admin") as cluster,
        cluster.open_ioctx(image.pool) as pool,
        rbd.Image(pool, image.name, **how) as opened_image,
    ):
        yield opened_image


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes no longer, whatever comes of it."""
    begin = time.monotonic()
    try:
        yield
    finally:
        took = time.monotonic() - begin
        assert took < seconds, f"took {took:.1f} s, more than {seconds:g} s"


def close_in_time(file: int) -> None:
    """Whatever close(2) has to tell."""
    with within(ENOUGH), contextlib.suppress(OSError):
        os.close(file)


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(code, *arguments): another Python process; killed at the end of the test if it still runs."""
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str, *arguments: object, **more: Any) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, **(pipes | more)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    assert not any(code for _, code in ended), b"\n".join(error for error, _ in ended).decode()


# ---- the same blocks -------------------------------------------------------------------------------------------

BLOCKS = 64  # of BLOCK bytes, around a boundary of RBD's objects
BEGIN = OBJECT - BLOCKS // 2 * BLOCK

WRITERS = 4

# Writes or checks 1 to 4 blocks at a time. What a writer writes is its own number, in every byte; 0 is a reader.
WORKER = f"""
import os, random, sys
path, number, flags, rounds = sys.argv[1], *map(int, sys.argv[2:])
choose = random.Random(number * 1000 + flags)
file = os.open(path, flags)
for _ in range(rounds):
    first, count = choose.randrange({BLOCKS - 3}), choose.randint(1, 4)
    offset, length = {BEGIN} + first * {BLOCK}, count * {BLOCK}
    if number:
        assert os.pwrite(file, bytes([number]) * length, offset) == length
    else:
        data = os.pread(file, length, offset)
        assert len(data) == length
        assert set(data) <= set(range({WRITERS + 1})), f"at {{offset}}: {{sorted(set(data))}}"
os.close(file)
"""


def work_on_the_same_blocks(start: Start, paths: Sequence[Path], rounds: int) -> None:
    """Writers and readers side by side, buffered and direct in turn, spread over the paths."""
    workers = [(number, os.O_RDWR) for number in range(1, WRITERS + 1)] + [(0, os.O_RDONLY)] * 4
    processes = []
    for index, (number, access) in enumerate(workers):
        flags = access | (os.O_DIRECT if index % 2 else 0)
        processes.append(start(WORKER, paths[index // 2 % len(paths)], number, flags, rounds))
    finish(processes)


def assert_whole_blocks(content: bytes) -> None:
    """Each block is one writer's, or as it was; nothing around them has changed."""
    written = set()
    for offset in range(BEGIN, BEGIN + BLOCKS * BLOCK, BLOCK):
        found = set(content[offset : offset + BLOCK])
        assert len(found) == 1, f"the block at {offset} is mixed: {sorted(found)}"
        written |= found
    assert written <= set(range(WRITERS + 1))
    assert len(written) > 1
    assert not any(content[:BEGIN])
    assert not any(content[BEGIN + BLOCKS * BLOCK :])


@slow
def test_blocks_that_many_write_at_once_end_as_one_of_theirs(disk: Disk, start: Start) -> None:
    disk.stored.write(bytes(SIZE))
    with opened(disk.path, os.O_RDONLY) as held:
        os.pread(held, SIZE, 0)
        work_on_the_same_blocks(start, [disk.path], rounds=150)
        content = disk.stored.read()
        assert_whole_blocks(content)
        assert os.pread(held, SIZE, 0) == content  # the page cache that all of them went through
    with opened(disk.path, os.O_RDONLY | os.O_DIRECT) as direct:
        assert os.pread(direct, SIZE, 0) == content


@slow
def test_blocks_that_two_mounts_write_at_once_end_as_one_of_theirs(
    disk: Disk, twin: Disk, start: Start
) -> None:
    disk.stored.write(bytes(SIZE))
    work_on_the_same_blocks(start, [disk.path, twin.path], rounds=40)
    content = disk.stored.read()
    assert_whole_blocks(content)
    assert disk.path.read_bytes() == twin.path.read_bytes() == content


# Writes each `count`-th piece of random bytes, and reads it back.
WEAVER = """
import os, random, sys
path, number, count, piece, size, flags = sys.argv[1], *map(int, sys.argv[2:])
file = os.open(path, os.O_RDWR | flags)
for offset in range(number * piece, size, count * piece):
    data = random.Random(offset).randbytes(min(piece, size - offset))
    assert os.pwrite(file, data, offset) == len(data)
    found = os.pread(file, len(data), offset)
    assert found == data, f"{flags=}: at {offset}: wrong at {[i for i, it in enumerate(data) if it != found[i]]}"
os.close(file)
"""


@slow
@pytest.mark.parametrize("piece", [777, 8192])
def test_processes_that_write_neighbouring_pieces_do_not_lose_each_others(
    disk: Disk, piece: int, start: Start
) -> None:
    """Pieces share sectors and pages, some of which go through the page cache and others past it."""
    old = disk.fill(1)
    size = 600 * piece
    weavers = [
        start(WEAVER, disk.path, number, 4, piece, size, os.O_DIRECT if number % 2 else 0)
        for number in range(4)
    ]
    finish(weavers)
    new = b"".join(random_bytes(piece, seed=offset) for offset in range(0, size, piece))
    assert disk.stored.read() == new + old[size:]


# ---- one volume, several ways to it ----------------------------------------------------------------------------


@slow
def test_the_listed_and_the_attached_file_are_one_open_for_the_storage(disk: Disk) -> None:
    content = bytearray(disk.fill(2))
    attached, client = api.attach(disk.stored.url, hold=True, socket_path=str(disk.mount.socket))
    with contextlib.closing(client), contextlib.ExitStack() as stack:
        paths = [disk.path, Path(attached.path)]
        flags = [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_DIRECT]
        files = [stack.enter_context(opened(path, flag)) for flag in flags for path in paths]
        (volume,) = disk.status().open
        assert (volume.handles, volume.writable) == (6, True)
        assert len(disk.stored.users()) == 1
        for number, writer in enumerate(files[2:]):
            offset = OBJECT - 5000 + number * 3000
            content[offset : offset + 4000] = data = random_bytes(4000, seed=number)
            os.pwrite(writer, data, offset)
            for reader in files:
                assert os.pread(reader, 30_000, OBJECT - 10_000) == content[OBJECT - 10_000 :][:30_000]
    assert disk.stored.read() == content
    disk.assert_released()
    wait_until(lambda: not disk.status().attached, "the attachment ends with its client")


# Opens a volume, and does one thing for each line.
OPENER = """
import sys, volfs
file = volfs.open_volume(sys.argv[1], "r+b", buffering=0)
print(file.name, flush=True)
for line in sys.stdin:
    file.seek(0)
    file.write(line.strip().encode())
    print("written", flush=True)
file.close()
print("closed", flush=True)
"""


@slow
def test_a_volume_stays_attached_until_the_last_of_two_processes_closes_it(disk: Disk, start: Start) -> None:
    content = disk.fill(3)
    environment = {**os.environ, **disk.stored.environment, "VOLFS_SOCKET": str(disk.mount.socket)}

    def line(opener: subprocess.Popen[bytes]) -> bytes:
        assert opener.stdout is not None
        return opener.stdout.readline().strip()

    def write(opener: subprocess.Popen[bytes], data: bytes) -> None:
        assert opener.stdin is not None
        opener.stdin.write(data + b"\n")
        opener.stdin.flush()
        assert line(opener) == b"written"

    openers = [start(OPENER, disk.stored.url, env=environment) for _ in range(2)]
    names = [line(opener) for opener in openers]
    assert names[0] == names[1] != b"", [opener.communicate()[1] for opener in openers if opener.poll()]
    assert disk.status().attached[0].leases == 2
    assert len(disk.stored.users()) == 1
    write(openers[0], b"first!")
    write(openers[1], b"second")
    finish(openers[:1])
    assert disk.stored.read() == b"second" + content[6:]  # closed is stable, whoever wrote it
    assert Path(names[0].decode()).exists()
    write(openers[1], b"third!")
    openers[1].kill()
    openers[1].communicate()
    assert openers[1].returncode == -signal.SIGKILL
    disk.assert_released()
    wait_until(lambda: not disk.status().attached, "nobody has it attached any more")
    assert disk.stored.read() == b"third!" + content[6:]


@slow
@both_ways
def test_a_killed_writer_leaves_whole_blocks_and_no_user(disk: Disk, direct: int, start: Start) -> None:
    disk.stored.write(bytes(SIZE))
    writers = [start(WORKER, disk.path, number, os.O_RDWR | direct, 1_000_000) for number in range(1, 4)]
    with opened(disk.path, os.O_RDONLY | os.O_DIRECT) as file:
        wait_until(lambda: any(os.pread(file, SIZE, 0)), "they write")
    for writer in writers:
        writer.kill()
        writer.communicate()
    disk.assert_released()
    assert_whole_blocks(disk.stored.read())


# ---- two mounts ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("direct", [0, pytest.param(os.O_DIRECT, marks=slow)], ids=["buffered", "direct"])
def test_what_one_mount_wrote_and_closed_another_one_reads_at_its_next_open(
    disk: Disk, twin: Disk, direct: int
) -> None:
    content = bytearray(disk.fill(4))
    for number, (writer, reader) in enumerate([(disk, twin), (twin, disk), (disk, twin)]):
        with opened(reader.path, os.O_RDONLY) as held, opened(reader.path, os.O_RDONLY | direct) as other:
            assert os.pread(held, SIZE, 0) == content  # now the reader's page cache has all of it
            assert os.pread(other, SIZE, 0) == content
            with opened(writer.path, os.O_WRONLY | direct) as file:
                for offset in (number * 10, 70_000, OBJECT - 3, SIZE - 100):
                    content[offset : offset + 100] = data = random_bytes(100, seed=offset + number)
                    os.pwrite(file, data, offset)
            assert disk.stored.read() == content
            with opened(reader.path, os.O_RDONLY | direct) as file:
                assert os.pread(file, SIZE, 0) == content
            assert os.pread(held, SIZE, 0) == content  # an open renews the cache for all of a mount
        assert reader.path.read_bytes() == content


@slow
def test_what_another_mount_wrote_is_read_with_o_direct_without_an_open(disk: Disk, twin: Disk) -> None:
    content = bytearray(disk.fill(5))
    with opened(twin.path, os.O_RDONLY | os.O_DIRECT) as held:
        for number in range(3):
            position = number * 200_000
            for offset in range(position, position + 200_000, 50_000):  # one after the other, as dd does
                assert os.pread(held, 50_000, offset) == content[offset : offset + 50_000]
            with opened(disk.path, os.O_WRONLY) as file:
                content[position : position + MIB] = data = random_bytes(MIB, seed=number)
                os.pwrite(file, data, position)
            for offset in (position, position + 200_000, position + MIB - 5000):
                assert os.pread(held, 5000, offset) == content[offset : offset + 5000]


@slow
def test_two_mounts_write_in_turn_and_keep_each_others_blocks(disk: Disk, twin: Disk) -> None:
    """Of RBD, the exclusive lock goes from one to the other, without being broken."""
    content = bytearray(disk.fill(6))
    with opened(disk.path, os.O_RDWR) as first, opened(twin.path, os.O_RDWR | os.O_DIRECT) as second:
        assert len(disk.stored.users()) == 2
        for number in range(8):
            for index, writer in enumerate((first, second)):
                offset = OBJECT + (2 * number + index - 8) * BLOCK
                content[offset : offset + BLOCK] = data = random_bytes(BLOCK, seed=offset)
                assert os.pwrite(writer, data, offset) == BLOCK
        os.fsync(first)
        os.fsync(second)
        assert disk.stored.read() == content
    assert disk.path.read_bytes() == twin.path.read_bytes() == content


@slow
def test_a_mount_that_closes_leaves_the_volume_to_the_other_one(disk: Disk, twin: Disk) -> None:
    content = bytearray(disk.fill(7))
    with opened(twin.path, os.O_RDWR | os.O_DIRECT) as second:
        with opened(disk.path, os.O_RDWR | os.O_DIRECT) as first:
            os.pwrite(first, b"first", 0)
            os.pwrite(second, b"second", BLOCK)
            assert len(disk.stored.users()) == 2
        wait_until(lambda: len(set(disk.stored.users())) == 1, "the first one has let go of it")
        assert os.pread(second, 5, 0) == b"first"
        os.pwrite(second, b"third", 2 * BLOCK)
    content[:5], content[BLOCK : BLOCK + 6], content[2 * BLOCK : 2 * BLOCK + 5] = (
        b"first",
        b"second",
        b"third",
    )
    disk.assert_released()
    assert disk.stored.read() == content


@slow
def test_a_new_size_is_seen_by_both_mounts_at_their_next_open(own_disk: Disk, other_mount: Mount) -> None:
    twin = Disk(other_mount, own_disk.stored)
    wait_until(twin.path.exists, "the other mount lists it")
    own_disk.fill(8)
    with opened(own_disk.path, os.O_RDONLY) as first, opened(twin.path, os.O_RDONLY) as second:
        for size in (SIZE + OBJECT, SIZE - MIB):
            own_disk.stored.resize(size)
            for side, held in ((own_disk, first), (twin, second)):
                with opened(side.path, os.O_RDONLY) as file:
                    assert os.fstat(file).st_size == os.fstat(held).st_size == size
                    assert len(os.pread(file, 2 * size, 0)) == len(os.pread(held, 2 * size, 0)) == size
    own_disk.assert_released()
    wait_until(lambda: not twin.status().open, "the other mount has closed it")


# ---- changed by its operator while it is open ------------------------------------------------------------------


@slow
@both_ways
def test_a_volume_that_grows_while_it_is_open_serves_all_its_holders(own_disk: Disk, direct: int) -> None:
    content = own_disk.fill(9)
    with opened(own_disk.path, os.O_RDWR | direct) as held:
        own_disk.stored.resize(SIZE + MIB)
        assert os.pread(held, SIZE, 0) == content
        with opened(own_disk.path, os.O_RDWR | direct) as new:
            assert os.fstat(new).st_size == os.fstat(held).st_size == SIZE + MIB
            os.pwrite(new, b"beyond", SIZE + 100)
            os.pwrite(held, b"behind", SIZE + 200)
            assert os.pread(held, 300, SIZE) == os.pread(new, 300, SIZE)
            assert os.pread(held, 6, SIZE + 100) == b"beyond"
    expected = content + bytes(100) + b"beyond" + bytes(94) + b"behind"
    assert own_disk.stored.read() == expected + bytes(SIZE + MIB - len(expected))
    own_disk.assert_released()


@slow
def test_a_reader_of_what_was_shrunk_away_is_told_at_close_at_the_latest(
    impatient: Mount, new_image: ImageFactory
) -> None:
    """Nobody tells a client without a watcher that an image was shrunk."""
    image = new_image(2 * OBJECT)
    image.write(b"x" * 2 * OBJECT)
    file = os.open(path_of(impatient, image), os.O_RDONLY | os.O_DIRECT)
    assert os.pread(file, 1, OBJECT) == b"x"
    image.services.run("rbd", "resize", "--no-progress", "--allow-shrink", "--size", f"{OBJECT}B", image.spec)
    with raises(errno.ESTALE):
        try:
            os.pread(file, 4096, OBJECT)
        finally:
            os.close(file)


@slow
def test_a_write_to_what_was_shrunk_away_is_eio_and_the_rest_goes_on(
    impatient: Mount, new_image: ImageFactory
) -> None:
    image = new_image(2 * OBJECT)
    file = os.open(path_of(impatient, image), os.O_RDWR | os.O_DIRECT)
    try:
        os.pwrite(file, b"first", 0)  # with the image's lock, librbd hears of the new size at once
        os.fsync(file)
        image.services.run(
            "rbd", "resize", "--no-progress", "--allow-shrink", "--size", f"{OBJECT}B", image.spec
        )
        for _ in range(2):
            with within(ENOUGH), raises(errno.EIO):
                os.pwrite(file, b"beyond", OBJECT)
                os.fsync(file)
        with within(TIMEOUT), raises(errno.EIO):
            os.pread(file, 4096, OBJECT)
        with within(TIMEOUT):
            os.pwrite(file, b"second", 100)
            os.fsync(file)
    finally:
        close_in_time(file)
    assert image.read()[:106] == b"first" + bytes(95) + b"second"
    wait_until(lambda: not image.watchers(), "it is closed")


@slow
def test_an_image_is_snapshotted_while_it_is_written(impatient: Mount, new_image: ImageFactory) -> None:
    image = new_image(SIZE)
    path = path_of(impatient, image)
    before = random_bytes(SIZE, seed=10)
    with opened(path, os.O_RDWR) as file:
        os.pwrite(file, before, 0)
        os.fsync(file)
        image.snapshot("one")
        os.pwrite(file, bytes(MIB), 100)
        snapshot = path.with_name(f"{path.name}@one")
        assert snapshot.read_bytes() == image.read("@one") == before
        assert os.pread(file, MIB, 100) == bytes(MIB)
    assert image.read() == before[:100] + bytes(MIB) + before[100 + MIB :]
    assert snapshot.read_bytes() == before
    wait_until(lambda: not image.watchers(), "it is closed")


@slow
def test_an_image_that_is_rolled_back_while_it_is_open_is_the_old_one_at_the_next_open(
    impatient: Mount, new_image: ImageFactory
) -> None:
    image = new_image(SIZE)
    path = path_of(impatient, image)
    before, after = random_bytes(SIZE, seed=11), random_bytes(SIZE, seed=12)
    image.write(before)
    image.snapshot("one")
    image.write(after)
    with (
        opened(path, os.O_RDONLY) as reader,
        opened(path, os.O_RDWR) as writer,  # which has written nothing so far, and holds no lock
        opened(path, os.O_RDWR | os.O_DIRECT) as direct,
    ):
        assert os.pread(reader, SIZE, 0) == os.pread(direct, SIZE, 0) == after
        image.services.run("rbd", "snap", "rollback", "--no-progress", f"{image.spec}@one")
        assert os.pread(direct, SIZE, 0) == before
        assert path.read_bytes() == before
        assert os.pread(reader, SIZE, 0) == os.pread(writer, SIZE, 0) == before
        os.pwrite(writer, b"new", 1)
    assert image.read() == before[:1] + b"new" + before[4:]


@slow
def test_an_image_that_is_being_written_is_not_rolled_back(impatient: Mount, new_image: ImageFactory) -> None:
    """librbd does not ask the owner of the lock to give it up for that."""
    image = new_image(SIZE)
    image.snapshot("one")
    with opened(path_of(impatient, image), os.O_RDWR | os.O_DIRECT) as file:
        os.pwrite(file, b"written", 0)
        with pytest.raises(subprocess.CalledProcessError):
            image.services.run("rbd", "snap", "rollback", "--no-progress", f"{image.spec}@one")
        assert os.pread(file, 7, 0) == b"written"
        os.pwrite(file, b"more", 7)
    assert image.read()[:11] == b"writtenmore"
    wait_until(lambda: not image.watchers(), "it is closed")
    image.services.run("rbd", "snap", "rollback", "--no-progress", f"{image.spec}@one")
    assert path_of(impatient, image).read_bytes() == bytes(SIZE)


@slow
def test_a_lun_that_is_removed_while_it_is_open_is_an_error_in_time_and_others_go_on(
    services: Services, storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gone, other = storage.make("iscsi", MIB, b"gone"), storage.make("iscsi", MIB, b"other")
    with mounted_with_timeout(tmp_path_factory.mktemp("g"), services) as on:
        paths = [on.path.joinpath("san", *stored.place) for stored in (gone, other)]
        reader, writer = os.open(paths[0], os.O_RDONLY | os.O_DIRECT), os.open(paths[0], os.O_RDWR)
        with opened(paths[1], os.O_RDWR | os.O_DIRECT) as file:
            try:
                assert os.pread(reader, 4, 0) == os.pread(writer, 4, 0) == b"gone"
                gone.remove()

                def write() -> None:
                    os.pwrite(writer, b"lost", 0)
                    os.fsync(writer)

                for attempt in (lambda: os.pread(reader, 4, 4096), write):
                    with within(ENOUGH), pytest.raises(OSError):  # noqa: PT011 - it is gone, or does not answer
                        attempt()
                    assert os.pread(file, 5, 0) == b"other"
            finally:
                for descriptor in (reader, writer):
                    close_in_time(descriptor)
            os.pwrite(file, b"still", 0)
        assert other.read()[:5] == b"still"
        with within(ENOUGH), raises(errno.ENOENT):
            paths[0].open("rb")
        wait_until(lambda: not api.status(socket_path=str(on.socket)).open, "nothing is open", 2 * ENOUGH)
        with within(ENOUGH):
            assert on.stop() == 1, "a write was lost"


@slow
def test_a_file_that_is_removed_while_it_is_open_stays_for_its_holder(
    storage: Storage, mount: Callable[..., Mount]
) -> None:
    stored = storage.make("file", MIB, b"content")
    path = mount(stored.prefix).path.joinpath("file", *stored.place)
    with opened(path, os.O_RDWR | os.O_DIRECT) as file:
        stored.remove()
        wait_until(lambda: not path.exists(), "its name is gone", ATTRIBUTE_SECONDS)
        with raises(errno.ENOENT):
            path.open("rb")
        os.pwrite(file, b"more", 0)
        assert os.pread(file, 7, 0) == b"moreent"


# ---- locks of RBD ----------------------------------------------------------------------------------------------


def attribute(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.volfs.{name}").decode()


def assert_write_fails(path: Path, number: int) -> None:
    """By write or by fsync, and in time."""
    file = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with within(ENOUGH), raises(number):
            os.pwrite(file, b"volfs!", 0)
            os.fsync(file)
    finally:
        close_in_time(file)


@slow
def test_the_exclusive_lock_goes_to_who_writes(impatient: Mount, new_image: ImageFactory) -> None:
    image = new_image(SIZE)
    path = path_of(impatient, image)
    with librbd(image) as other, opened(path, os.O_RDWR | os.O_DIRECT) as file:
        for number in range(5):
            other.write(b"other", number * 100)
            assert other.is_exclusive_lock_owner()
            os.pwrite(file, b"volfs", number * 100 + 50)
            os.fsync(file)
            assert not other.is_exclusive_lock_owner()
        for number in range(5):
            expected = b"other" + bytes(45) + b"volfs"
            assert os.pread(file, 55, number * 100) == other.read(number * 100, 55) == expected
    wait_until(lambda: not image.watchers(), "all have closed it")


@slow
def test_a_lock_that_another_client_keeps_is_erofs_for_writers_and_is_not_broken(
    impatient: Mount, new_image: ImageFactory
) -> None:
    import rbd

    image = new_image(SIZE)
    path = path_of(impatient, image)
    with librbd(image) as other:
        other.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        other.write(b"theirs", 0)
        owner = image.lockers()
        assert attribute(path, "lock_owners") == owner[0]["address"]
        assert path.read_bytes()[:6] == b"theirs"
        assert_write_fails(path, errno.EROFS)
        assert image.lockers() == owner
        assert other.is_exclusive_lock_owner()
        other.write(b"still!", 0)
        assert path.read_bytes()[:6] == b"still!"
        other.lock_release()
        with opened(path, os.O_RDWR) as file:
            os.pwrite(file, b"volfs!", 0)
        assert other.read(0, 6) == b"volfs!"
    wait_until(lambda: not image.watchers(), "all have closed it")
    assert image.lockers() == []


@slow
def test_an_advisory_lock_is_shown_and_not_broken_and_its_image_can_be_read(
    impatient: Mount, new_image: ImageFactory
) -> None:
    image = new_image(SIZE)
    image.write(b"locked")
    path = path_of(impatient, image)
    image.services.run("rbd", "lock", "add", image.spec, "mine")
    (lock,) = image.lockers()
    assert attribute(path, "lock_owners") == lock["address"]
    assert path.read_bytes()[:6] == b"locked"
    assert_write_fails(path, errno.ETIMEDOUT)
    assert image.lockers() == [lock]
    assert image.read()[:6] == b"locked"
    image.services.run("rbd", "lock", "rm", image.spec, lock["id"], lock["locker"])
    with opened(path, os.O_RDWR) as file:
        os.pwrite(file, b"again!", 0)
    assert image.read()[:6] == b"again!"
    wait_until(lambda: not image.watchers(), "what waited for the lock has closed it, too")


LOCK_OWNER = """
import rados, rbd, sys
with rados.Rados(conffile=sys.argv[1], name="client.admin") as cluster, cluster.open_ioctx(sys.argv[2]) as pool:
    with rbd.Image(pool, sys.argv[3]) as image:
        image.write(b"theirs", 0)
        print("written", flush=True)
        sys.stdin.read()
"""


@slow
def test_the_lock_of_a_client_that_hangs_is_etimedout_for_writers_and_is_not_broken(
    impatient: Mount, new_image: ImageFactory, start: Start
) -> None:
    image = new_image(SIZE)
    path = path_of(impatient, image)
    owner = start(LOCK_OWNER, image.services.ceph_conf, image.pool, image.name)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"written\n"
    lock = image.lockers()
    owner.send_signal(signal.SIGSTOP)
    try:
        assert path.read_bytes()[:6] == b"theirs"
        assert_write_fails(path, errno.ETIMEDOUT)
        assert image.lockers() == lock
    finally:
        owner.send_signal(signal.SIGCONT)
    with opened(path, os.O_RDWR) as file:
        os.pwrite(file, b"again!", 0)
    finish([owner])
    assert image.read()[:6] == b"again!"
    wait_until(lambda: not image.watchers(), "all have closed it")


@slow
def test_a_fenced_client_gets_an_errno_in_time_and_works_again_after_a_new_mount(
    services: Services, new_image: ImageFactory, tmp_path_factory: pytest.TempPathFactory
) -> None:
    written, read = new_image(MIB), new_image(MIB)
    with mounted_with_timeout(tmp_path_factory.mktemp("f"), services) as on, contextlib.ExitStack() as stack:
        writer = os.open(path_of(on, written), os.O_RDWR)
        reader = os.open(path_of(on, read), os.O_RDONLY | os.O_DIRECT)
        for file in (writer, reader):
            stack.callback(close_in_time, file)
        os.pwrite(writer, b"before", 0)
        os.fsync(writer)
        assert os.pread(reader, 6, 0) == bytes(6)
        (address,) = written.watchers()
        services.run("ceph", "osd", "blocklist", "add", address)
        try:

            def write() -> None:
                os.pwrite(writer, b"fenced", 0)
                os.fsync(writer)

            for attempt in (
                write,
                lambda: os.pread(reader, 4096, 4096),
                lambda: os.listdir(path_of(on, written).parent),
                lambda: path_of(on, read).open("r+b"),
            ):
                with within(ENOUGH), raises(errno.ESHUTDOWN):
                    attempt()
            assert written.read()[:6] == b"before"
            with within(2 * ENOUGH):
                stack.close()
                done = on.volfs("umount", on.path)
            assert done.returncode == 1, "not all that was written has been flushed"
            on.process.wait(ENOUGH)
        finally:
            services.run("ceph", "osd", "blocklist", "rm", address)
    with mounted_with_timeout(tmp_path_factory.mktemp("f"), services) as on:
        path_of(on, written).write_bytes(b"after!")
        assert written.read()[:6] == b"after!"


# ---- large pools -----------------------------------------------------------------------------------------------

# Images come and go, change their size and have snapshots, until stdin ends; a line for each.
CHURN = """
import rados, rbd, select, sys
with rados.Rados(conffile=sys.argv[1], name="client.admin") as cluster, cluster.open_ioctx(sys.argv[2]) as pool:
    pool.set_namespace(sys.argv[3])
    rounds = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        name = f"passing-{rounds % 7}"
        rbd.RBD().create(pool, name, 2**22, old_format=False, features=rbd.RBD_FEATURE_LAYERING)
        with rbd.Image(pool, name) as image:
            image.create_snap("one")
            image.resize(2**23)
            image.remove_snap("one")
        with rbd.Image(pool, f"image-{rounds % 300:03}") as image:
            image.resize(2**20 * (rounds % 3 + 1))
        rbd.RBD().remove(pool, name)
        rounds += 1
        print(rounds, flush=True)
"""
IMAGES = 300
LISTING_SECONDS = 30.0


@slow
def test_listings_of_a_large_pool_go_well_while_images_come_and_go(
    impatient: Mount, services: Services, new_namespace: Callable[..., str], start: Start
) -> None:
    import rados
    import rbd

    namespace = new_namespace()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(rados.Rados(conffile=str(services.ceph_conf), name="client.admin"))
        pool = stack.enter_context(cluster.open_ioctx("volumes"))
        pool.set_namespace(namespace)
        names = [f"image-{number:03}" for number in range(IMAGES)]
        for name in names:
            rbd.RBD().create(pool, name, MIB, old_format=False, features=rbd.RBD_FEATURE_LAYERING)
        stack.callback(lambda: [rbd.RBD().remove(pool, it["name"]) for it in list(rbd.RBD().list2(pool))])
        directory = impatient.path / "ceph" / "volumes" / namespace
        churn = start(CHURN, services.ceph_conf, "volumes", namespace)
        try:
            assert churn.stdout is not None
            for _ in range(3):
                churn.stdout.readline()
                for command in (
                    ["ls", "-la", directory],
                    ["ls", "-R", directory],
                    ["find", directory, "-ls"],
                    ["find", directory, "-type", "f", "-exec", "stat", "{}", "+"],
                    ["du", "-a", directory],
                ):
                    with within(LISTING_SECONDS):
                        done = run(*command)
                    shown, errors = done.stdout.decode(), done.stderr.decode().splitlines()
                    missing = [name for name in names if name not in shown]
                    assert not missing, f"{command}: {missing}"
                    for error in errors:
                        assert "passing-" in error, f"{command}: {error}"
                        assert "No such file or directory" in error, f"{command}: {error}"
        finally:
            _, errors_of_churn = churn.communicate(timeout=60)
        assert churn.returncode == 0, errors_of_churn.decode()
        assert not api.status(socket_path=str(impatient.socket)).open
        for name in names:
            with rbd.Image(pool, name, read_only=True) as image:
                assert list(image.watchers_list()) == [], name
        wait_until(lambda: sorted(os.listdir(directory)) == names, "all that came has gone")
