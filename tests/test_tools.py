"""The tools with which people copy, compare and archive files, on volume files: dd, cp, cmp, tar, rsync and their like.

What they wrote is compared with what the storage itself has, past volfs; what they read, with what was put there that
way. What a volume cannot do (be renamed, truncated, given times) has to fail clearly and change nothing.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from disks import SIZE, Disk, MakeDisk, disk_maker, opened, run, succeed
from mounts import wait_until
from services import MIB
from volumes import raises, random_bytes, sha256, variants

SMALL = 100_000  # bytes, for tools that write them one sector at a time


make_disk = disk_maker(variants(quick=("rbd",)))


# What takes its time, on the two that people use most.
over_network = pytest.mark.parametrize("make_disk", variants(only=("rbd", "iscsi-512")), indirect=True)


@pytest.fixture(scope="module")
def shared_second_disk(make_disk: MakeDisk) -> Disk:
    return make_disk()


@pytest.fixture
def second_disk(shared_second_disk: Disk) -> Iterator[Disk]:
    """Another volume on the same mount."""
    yield shared_second_disk
    shared_second_disk.assert_released()


def refused(*command: str | Path, says: str, **more: Any) -> None:
    """The tool fails, and tells why in these words."""
    done = run(*command, **more)
    told = done.stderr.decode()
    assert done.returncode != 0, f"{' '.join(map(str, command))} succeeded: {told}"
    assert says in told, told


def file_of(tmp_path: Path, content: bytes) -> Path:
    """A file of these bytes, fully allocated."""
    path = tmp_path / "content"
    path.write_bytes(content)
    return path


def sparse_bytes() -> bytes:
    """As many as a volume has: holes at the begin, in the middle and at the end, with data between them."""
    content = bytearray(SIZE)
    for offset, length in ((MIB, MIB), (3 * MIB + 4096, 100_001)):
        content[offset : offset + length] = random_bytes(length, seed=offset)
    return bytes(content)


def sparse_file(tmp_path: Path) -> Path:
    path = tmp_path / "sparse"
    content = sparse_bytes()
    with path.open("wb") as file:
        for offset in range(0, SIZE, 4096):
            if (block := content[offset : offset + 4096]) != bytes(4096):
                file.seek(offset)
                file.write(block)
        file.truncate(SIZE)
    assert path.stat().st_blocks * 512 < SIZE, "the file system of this test has no sparse files"
    return path


def full_file(tmp_path: Path) -> Path:
    """The same bytes, but all allocated."""
    return file_of(tmp_path, sparse_bytes())


# ---- dd --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["iflag=direct", "oflag=direct"])
def test_dd_probes_for_direct_io_as_cinder_does(disk: Disk, second_disk: Disk, flag: str) -> None:
    """With count=0 and without conv=notrunc: it opens the target with O_TRUNC, and writes nothing."""
    contents = [disk.fill(1), second_disk.fill(2)]
    done = run("dd", "count=0", f"if={disk.path}", f"of={second_disk.path}", flag)
    assert done.returncode == 0, done.stderr
    assert second_disk.path.stat().st_size == SIZE
    assert [disk.stored.read(), second_disk.stored.read()] == contents


CINDER = (
    ("bs=1M", "iflag=count_bytes,direct", "oflag=direct"),
    ("bs=1M", "iflag=count_bytes,direct", "oflag=direct", "conv=sparse"),
    ("bs=1M", "iflag=count_bytes", "conv=fdatasync"),
    ("bs=1M", "iflag=count_bytes", "conv=fdatasync,sparse"),
    ("bs=64k", "iflag=count_bytes"),
)


@over_network
@pytest.mark.parametrize("flags", CINDER, ids=" ".join)
def test_dd_copies_as_cinder_does(
    disk: Disk, second_disk: Disk, tmp_path: Path, flags: Sequence[str]
) -> None:
    """From a volume to another one, and to and from a file; zeros at the end are where conv=sparse truncates."""
    content = random_bytes(2 * MIB, seed=3) + bytes(MIB) + random_bytes(MIB, seed=4) + bytes(SIZE - 4 * MIB)
    disk.stored.write(content)
    second_disk.stored.write(bytes(SIZE))
    copy = ("dd", f"count={SIZE}", *flags)
    succeed(*copy, f"if={disk.path}", f"of={second_disk.path}")
    assert second_disk.stored.sha256() == sha256(content)
    succeed(*copy, f"if={second_disk.path}", f"of={tmp_path / 'copy'}")
    assert sha256((tmp_path / "copy").read_bytes()) == sha256(content)
    disk.stored.write(bytes(SIZE))
    succeed(*copy, f"if={tmp_path / 'copy'}", f"of={disk.path}")
    assert disk.stored.sha256() == sha256(content)


@over_network
def test_dd_without_any_flag_copies_sector_by_sector(disk: Disk, second_disk: Disk, tmp_path: Path) -> None:
    content, new = disk.fill(5), random_bytes(SMALL, seed=6)
    assert succeed("dd", f"if={disk.path}", "status=none") == content
    succeed("dd", f"if={file_of(tmp_path, new)}", f"of={disk.path}")
    assert disk.stored.read() == new + content[SMALL:]


def test_dd_seek_without_notrunc_writes_there_and_says_that_it_could_not_truncate(disk: Disk) -> None:
    """dd would cut the file off there, and complains; that it counts as success is dd's. The rest stays as it is."""
    content, new = bytearray(disk.fill(7)), random_bytes(8192, seed=8)
    done = run("dd", f"of={disk.path}", "bs=4096", "seek=300", input=new)
    assert b"failed to truncate to 1228800 bytes" in done.stderr
    assert b"Operation not permitted" in done.stderr
    content[300 * 4096 : 302 * 4096] = new
    assert disk.stored.read() == content
    succeed("dd", f"of={disk.path}", "bs=4096", "seek=299", "conv=notrunc", input=new)
    content[299 * 4096 : 301 * 4096] = new
    assert disk.stored.read() == content


@over_network
def test_dd_seek_to_the_end_or_past_it_is_enospc(disk: Disk) -> None:
    digest = sha256(disk.fill(9))
    for seek in (SIZE // 4096, SIZE // 4096 + 1, 1 << 30):
        for conv in ((), ("conv=notrunc",)):
            command = ("dd", f"of={disk.path}", "bs=4096", f"seek={seek}", *conv)
            refused(*command, input=b"x" * 4096, says="No space left on device")
            assert disk.path.stat().st_size == SIZE
    assert disk.stored.sha256() == digest


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["dsync", "sync", "direct,dsync", "direct,sync"])
def test_dd_with_synchronous_writes_makes_each_of_them_stable(disk: Disk, flags: str) -> None:
    """Seen on the storage while dd still waits for the rest of its input."""
    disk.stored.write(bytes(SIZE))
    first, rest = random_bytes(4096, seed=10), random_bytes(40_000, seed=11)
    command = ["dd", f"of={disk.path}", "bs=4096", f"oflag={flags}", "iflag=fullblock", "conv=notrunc"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as dd:
        assert dd.stdin is not None
        dd.stdin.write(first)
        dd.stdin.flush()
        wait_until(lambda: disk.stored.read()[:4096] == first, "the first block is on the storage")
        _, told = dd.communicate(rest, timeout=60)
    assert dd.returncode == 0, told
    assert disk.stored.read() == first + rest + bytes(SIZE - 4096 - 40_000)


@pytest.mark.slow
def test_appending_is_enospc_and_changes_nothing(disk: Disk) -> None:
    digest = sha256(disk.fill(12))
    assert disk.path.stat().st_size == SIZE
    refused("tee", "-a", disk.path, input=b"more", says="No space left on device")
    refused(
        "dd", f"of={disk.path}", "oflag=append", "conv=notrunc", input=b"more", says="No space left on device"
    )
    refused("sh", "-c", 'seq 9 >>"$1"', "sh", disk.path, says="No space left on device")
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.sha256() == digest


@pytest.mark.slow
def test_appending_is_enospc_right_after_an_open_that_truncates(disk: Disk) -> None:
    digest = sha256(disk.fill(13))
    appending, truncating = os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC
    with opened(disk.path, appending) as file, opened(disk.path, truncating), raises(errno.ENOSPC):
        os.write(file, b"more")
    assert disk.stored.sha256() == digest


# ---- cp --------------------------------------------------------------------------------------------------------

CP = ("--sparse=auto", "--sparse=always", "--sparse=never", "--reflink=auto")


@over_network
@pytest.mark.parametrize("option", CP)
def test_cp_from_a_volume(disk: Disk, tmp_path: Path, option: str) -> None:
    for content in (disk.fill(13), sparse_bytes()):
        disk.stored.write(content)
        succeed("cp", option, disk.path, tmp_path / "copy")
        assert sha256((tmp_path / "copy").read_bytes()) == sha256(content)


@over_network
@pytest.mark.parametrize("option", CP)
def test_cp_onto_an_empty_volume(disk: Disk, tmp_path: Path, option: str) -> None:
    for make in (sparse_file, full_file):
        disk.stored.write(bytes(SIZE))
        succeed("cp", option, make(tmp_path), disk.path)
        assert disk.path.stat().st_size == SIZE
        assert disk.stored.sha256() == sha256(sparse_bytes())


@over_network
def test_dd_with_sparse_makes_zeros_of_what_it_skips_before_its_last_block(
    disk: Disk, tmp_path: Path
) -> None:
    disk.fill(18)
    content = sparse_bytes()[:-1] + b"x"
    succeed("dd", f"of={disk.path}", "bs=64k", "conv=sparse", "iflag=fullblock", input=content)
    assert disk.stored.sha256() == sha256(content)


@over_network
@pytest.mark.parametrize("option", CP)
def test_cp_from_a_volume_to_another(disk: Disk, second_disk: Disk, option: str) -> None:
    disk.stored.write(sparse_bytes())
    second_disk.stored.write(bytes(SIZE))
    succeed("cp", option, disk.path, second_disk.path)
    assert second_disk.stored.sha256() == disk.stored.sha256() == sha256(sparse_bytes())


@over_network
def test_cp_of_what_does_not_fit_fills_the_volume_and_fails(disk: Disk, tmp_path: Path) -> None:
    content = random_bytes(SIZE + 4096, seed=16)
    refused("cp", file_of(tmp_path, content), disk.path, says="No space left on device")
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.read() == content[:SIZE]


ONTO_USED = (
    pytest.param('cp --sparse=never "$1" "$2"', id="cp --sparse=never"),
    pytest.param('cp "$1" "$2"', id="cp"),
    pytest.param('cp --sparse=always "$1" "$2"', id="cp --sparse=always"),
    pytest.param('cat "$1" >"$2"', id="cat"),
    pytest.param('dd if="$1" of="$2" bs=64k', id="dd"),
    pytest.param(
        'dd if="$1" of="$2" bs=64k conv=sparse',
        id="dd conv=sparse",
        marks=pytest.mark.xfail(
            strict=True,
            reason="dd sees that the file is long enough already, and does not extend it over its last hole",
        ),
    ),
    pytest.param('rsync --inplace --sparse --ignore-times "$1" "$2"', id="rsync --inplace --sparse"),
    pytest.param('tar -cSf- -C "${1%/*}" "${1##*/}" | tar -xOf- | cat >"$2"', id="tar -S, through a pipe"),
    pytest.param('tar -cSf- -C "${1%/*}" "${1##*/}" | tar -xSOf- >"$2"', id="tar -S, onto the volume"),
    pytest.param('qemu-img convert -n -f raw -O raw "$1" "$2"', id="qemu-img convert -n"),
)


@over_network
@pytest.mark.parametrize("script", ONTO_USED)
def test_a_file_with_holes_replaces_all_of_a_used_volume(disk: Disk, tmp_path: Path, script: str) -> None:
    disk.fill(17)
    succeed("sh", "-ec", script, "sh", sparse_file(tmp_path), disk.path)
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.sha256() == sha256(sparse_bytes())


# ---- comparing and looking -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cmp_tells_where_a_volume_differs(disk: Disk, second_disk: Disk, tmp_path: Path) -> None:
    content = bytearray(disk.fill(18))
    second_disk.stored.write(bytes(content))
    succeed("cmp", disk.path, second_disk.path)
    content[SIZE - 1000] ^= 1
    second_disk.stored.write(bytes(content))
    for other in (second_disk.path, file_of(tmp_path, content)):
        done = run("cmp", disk.path, other)
        assert done.returncode == 1
        assert f"byte {SIZE - 999}," in done.stdout.decode()
    done = run("cmp", disk.path, file_of(tmp_path, content[: SIZE // 2]))
    assert done.returncode == 1
    assert b"EOF on" in done.stderr


@pytest.mark.slow
def test_checksums_are_those_of_the_storage(disk: Disk) -> None:
    digest = sha256(disk.fill(19))
    for command in (["sha256sum", disk.path], ["openssl", "dgst", "-sha256", "-r", disk.path]):
        assert succeed(*command).decode().split()[0] == digest == disk.stored.sha256()
    check = f"{digest}  {disk.path}\n".encode()
    succeed("sha256sum", "--check", "--strict", input=check)
    disk.stored.write(b"else", SIZE // 2)
    assert run("sha256sum", "--check", "--strict", input=check).returncode == 1


@over_network
def test_head_and_tail_and_their_like_read_the_ends(disk: Disk) -> None:
    content = disk.fill(20)
    assert succeed("head", "-c", "5000", disk.path) == content[:5000]
    assert succeed("head", "-c", "-5000", disk.path) == content[:-5000]
    assert succeed("tail", "-c", "5000", disk.path) == content[-5000:]
    assert succeed("tail", "-c", f"+{SIZE - 99}", disk.path) == content[-100:]
    *_, last_but_one, last = content.split(b"\n")
    assert succeed("head", "-n", "3", disk.path) == b"".join(
        line + b"\n" for line in content.split(b"\n")[:3]
    )
    assert succeed("tail", "-n", "2", disk.path) == last_but_one + b"\n" + last  # no newline at the end
    assert int(succeed("wc", "-c", disk.path).split()[0]) == SIZE
    assert succeed("cat", disk.path) == content
    assert succeed("od", "-An", "-tx1", "-v", "-w16", f"-j{SIZE - 16}", disk.path).split() == [
        f"{byte:02x}".encode() for byte in content[-16:]
    ]


# ---- tar and rsync ---------------------------------------------------------------------------------------------


@over_network
@pytest.mark.parametrize("options", ["-cf", "-cSf", "-cSf --hole-detection=raw"])
def test_tar_archives_and_compares_a_volume(disk: Disk, tmp_path: Path, options: str) -> None:
    first, *more = options.split()
    names = ("-C", disk.directory, disk.path.name)
    archive = tmp_path / "archive"
    content = sparse_bytes()
    disk.stored.write(content)
    succeed("tar", first, archive, *more, *names)
    assert sha256(succeed("tar", "-xOf", archive)) == sha256(content)
    succeed("tar", "-xf", archive, "-C", tmp_path)
    assert sha256((tmp_path / disk.path.name).read_bytes()) == sha256(content)
    succeed("tar", "-df", archive, "-C", disk.directory)
    disk.stored.write(b"else", 2 * MIB)
    done = run("tar", "-df", archive, "-C", disk.directory)
    assert done.returncode == 1
    assert b"Contents differ" in done.stdout


@over_network
def test_tar_extracts_onto_a_volume_when_asked_not_to_replace_it(disk: Disk, tmp_path: Path) -> None:
    old = sha256(disk.fill(22))
    new = random_bytes(SIZE, seed=23)
    (tmp_path / disk.path.name).write_bytes(new)
    archive = tmp_path / "archive"
    succeed("tar", "-cf", archive, "--mode=600", "-C", tmp_path, disk.path.name)
    extract = ("tar", "-xf", archive, "-C", disk.directory, "--no-same-owner")
    refused(*extract, says="File exists")  # it unlinks what is there, or tries to
    assert disk.stored.sha256() == old
    succeed(*extract, "--overwrite", "--touch")  # and without its times, which cannot be set
    assert disk.stored.read() == new


RSYNC_OPTIONS = (
    ("--inplace",),
    ("--inplace", "--no-whole-file"),
    ("--inplace", "--checksum"),
    ("--archive", "--inplace", "--no-times", "--no-perms", "--no-owner", "--no-group"),
    ("--write-devices",),
)


@over_network
@pytest.mark.parametrize("options", RSYNC_OPTIONS, ids=" ".join)
def test_rsync_inplace_of_a_file_of_the_same_size(disk: Disk, tmp_path: Path, options: Sequence[str]) -> None:
    content = bytearray(disk.fill(24))
    content[2 * MIB : 2 * MIB + 70_000] = random_bytes(70_000, seed=25)
    succeed("rsync", "--ignore-times", *options, file_of(tmp_path, content), disk.path)
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.read() == content


@over_network
def test_rsync_that_wants_the_times_kept_says_so_after_it_has_copied_all(disk: Disk, tmp_path: Path) -> None:
    new = file_of(tmp_path, random_bytes(SIZE, seed=26))
    new.chmod(0o600)
    for options in (("-a",), ("-t",), ("-rlptD",)):
        disk.fill(27)
        refused(
            "rsync", "--ignore-times", "--inplace", *options, new, disk.path, says="failed to set times on"
        )
        assert disk.stored.read() == new.read_bytes()


@over_network
def test_rsync_that_would_replace_or_resize_the_volume_says_so(disk: Disk, tmp_path: Path) -> None:
    old = disk.fill(28)
    new = file_of(tmp_path, random_bytes(SIZE, seed=29))
    refused(
        "rsync", "--ignore-times", new, disk.path, says="Operation not permitted"
    )  # into a new file, to be renamed
    refused(
        "rsync", "--ignore-times", "--inplace", "--backup", new, disk.path, says="Operation not permitted"
    )
    assert os.listdir(disk.directory).count(disk.path.name) == 1
    assert disk.stored.read() == old
    os.truncate(new, MIB)
    refused("rsync", "--inplace", new, disk.path, says="ftruncate failed on")
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.read() == new.read_bytes() + old[MIB:]


@over_network
@pytest.mark.parametrize("options", ["--sparse", "-a", "--inplace -S", "-S --no-whole-file"])
def test_rsync_from_a_volume(disk: Disk, tmp_path: Path, options: str) -> None:
    copy = tmp_path / "copy"
    for content in (disk.fill(30), sparse_bytes()):
        disk.stored.write(content)
        succeed("rsync", "--ignore-times", *options.split(), disk.path, copy)
        assert sha256(copy.read_bytes()) == sha256(content)
    if "S" in options or "sparse" in options:
        assert copy.stat().st_blocks * 512 < SIZE


@pytest.mark.slow
def test_rsync_copies_again_what_was_written_through_the_mount(disk: Disk, tmp_path: Path) -> None:
    """It trusts size and mtime, so that a write has to move the latter."""
    disk.fill(31)
    succeed("rsync", "-a", disk.path, tmp_path / "copy")
    for number in range(2):
        before = disk.path.stat().st_mtime_ns
        with disk.path.open("r+b") as file:
            file.write(b"written %d" % number)
        assert disk.path.stat().st_mtime_ns != before
        succeed("rsync", "-a", "--modify-window=-1", disk.path, tmp_path / "copy")  # to the nanosecond
        assert sha256((tmp_path / "copy").read_bytes()) == disk.stored.sha256()
        after = disk.path.stat().st_mtime_ns
        with disk.path.open("r+b") as file:
            file.read()
        assert disk.path.stat().st_mtime_ns == after


# ---- what would replace, remove or relabel a volume -------------------------------------------------------------

REFUSED = {
    "mv onto it": ('mv "$1" "$2"', "Operation not permitted"),
    "mv it away": ('mv "$2" "$1.new"', "Operation not permitted"),
    "rm": ('rm -f "$2"', "Operation not permitted"),
    "cp --remove-destination": ('cp --remove-destination "$1" "$2"', "Operation not permitted"),
    "cp --backup": ('cp --backup "$1" "$2"', "Operation not permitted"),
    "cp beside it": ('cp "$1" "$2.new"', "Operation not permitted"),
    "cp --reflink=always": ('cp --reflink=always "$1" "$2"', "failed to clone"),
    "cp -T link": ('cp -l "$2" "$2.new"', "Operation not permitted"),
    "install": ('install -m 600 "$1" "$2"', "Operation not permitted"),
    "ln -sf": ('ln -sf "$1" "$2"', "Operation not permitted"),
    "ln -f": ('ln -f "$1" "$2"', "link"),
    "sed -i": ('sed -i s/a/b/ "$2"', "Operation not permitted"),
    "truncate smaller": ('truncate -s -1 "$2"', "Operation not permitted"),
    "truncate larger": ('truncate -s +1M "$2"', "Operation not permitted"),
    "fallocate larger": ('fallocate -o 100M -l 1M "$2"', "fallocate failed"),
    "fallocate --collapse-range": ('fallocate -c -o 0 -l 4096 "$2"', "fallocate"),
    "touch": ('touch "$2"', "Operation not permitted"),
    "chmod": ('chmod 0777 "$2"', "Operation not permitted"),
    "setfattr": ('setfattr -n user.volfs.size -v 1 "$2"', "Operation not permitted"),
    "mktemp": ('mktemp -p "${2%/*}"', "Operation not permitted"),
    "qemu-img create": ('qemu-img create -f qcow2 "$2" 1G', "Operation not permitted"),
    "qemu-img resize": ('qemu-img resize -f raw "$2" 128M', "Operation not permitted"),
    "qemu-img resize --shrink": ('qemu-img resize -f raw --shrink "$2" 1M', "Operation not permitted"),
    "dd conv=excl": ('dd if="$1" of="$2" conv=excl', "File exists"),
}


@over_network
def test_what_a_volume_cannot_do_fails_with_its_reason_and_changes_nothing(
    disk: Disk, tmp_path: Path
) -> None:
    digest, other = sha256(disk.fill(32)), file_of(tmp_path, b"other")
    status = disk.path.stat()
    for what, (script, says) in REFUSED.items():
        refused("sh", "-c", script, "sh", other, disk.path, says=says)
        assert other.read_bytes() == b"other", what
        if disk.stored.driver != "rbd":  # where reading takes its time
            assert disk.stored.sha256() == digest, what
    assert disk.stored.sha256() == digest
    names = os.listdir(disk.directory)
    assert [name for name in names if name.startswith(disk.path.name)] == [disk.path.name]
    assert disk.path.stat() == status


@over_network
@pytest.mark.parametrize("option", ["-p", "--preserve=mode"])
def test_cp_that_wants_attributes_kept_says_so_after_it_has_copied_all(
    disk: Disk, tmp_path: Path, option: str
) -> None:
    disk.fill(33)
    new = file_of(tmp_path, random_bytes(SIZE, seed=34))
    new.chmod(0o644)
    refused("cp", option, new, disk.path, says="preserving")
    assert disk.stored.read() == new.read_bytes()


@over_network
def test_shred_overwrites_all_of_a_volume(disk: Disk) -> None:
    content = disk.fill(35)
    succeed("shred", "--exact", "-n1", "-z", disk.path)  # it would go on to the end of a block of its own
    assert disk.stored.read() == bytes(SIZE) != content
