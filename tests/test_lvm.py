"""Logical volumes: what LVM says in words of ours, and, in the guest, on real ones: listed, active while open, resized.

Scripted commands stand in for LVM's only where it is to fail, or to say something odd.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from disks import opened, succeed
from lvm import GroupFactory, VolumeGroup
from mounts import mounted, wait_until
from services import MIB
from volumes import raises, random_bytes

from volfs import journal
from volfs.backends import lvm
from volfs.backends.base import VolumeInfo
from volfs.backends.block import BlockBackend, BlockSettings, BlockSource
from volfs.errors import BackendError, BackendTimeout, VolfsError, VolumeNotFound
from volfs.source import parse_connection_info

ROW = {
    "vg_name": "vg0",
    "lv_name": "disk",
    "lv_uuid": "6zWX4G-8SIz-UAmU-3r3h-9D8K-nKpX-FdVzmc",
    "lv_size": str(8 * MIB),
    "lv_attr": "-wi-------",
    "lv_path": "/dev/vg0/disk",
    "origin": "",
    "origin_size": "",
    "pool_lv": "",
    "data_percent": "",
    "lv_layout": "linear",
    "lv_time": "1700000000",
    "vg_extent_size": str(4 * MIB),
}
POOL = {
    "lv_name": "pool",
    "lv_attr": "twi-aotz--",
    "lv_layout": "thin,pool",
    "lv_path": "",
    "data_percent": "3.00",
}
THIN = {
    "lv_name": "thin",
    "lv_attr": "Vwi-aotz--",
    "lv_layout": "thin,sparse",
    "pool_lv": "pool",
    "data_percent": "25",
}
SNAPSHOT = {
    "lv_name": "snap",
    "lv_attr": "sri-------",
    "origin": "disk",
    "lv_size": str(4 * MIB),
    "origin_size": str(8 * MIB),
    "lv_layout": "linear",
}


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "volfs"


def records(runtime: Path) -> list[str]:
    return sorted(path.name for path in (runtime / "journal").glob("*"))


def group_backend(name: str, **settings: Any) -> BlockBackend:
    return BlockBackend("disks", BlockSettings(volume_group=name, **settings))


# ---- what LVM says ---------------------------------------------------------------------------------------------

Script = Callable[..., None]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """script(lvs=..., lvchange=...): shell commands in place of LVM's; each call is noted in `calls`.

    All are told first to follow no links below /dev: see lvm.CONFIG.
    """
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def make(**commands: str) -> None:
        for name, text in commands.items():
            path = directory / name
            told = 'case "$1 $2" in "--config devices { obtain_device_list_from_udev = 1"*) shift 2;; *) exit 9;; esac'
            path.write_text(f'#!/bin/sh\n{told}\necho "{name} $*" >> {tmp_path}/calls\n{text}\n')
            path.chmod(0o755)

    return make


def report(*rows: Mapping[str, str]) -> str:
    """A command that prints lvs's report of these volumes, each as ROW otherwise."""
    volumes = [{**ROW, "lv_path": f"/dev/vg0/{row.get('lv_name', 'disk')}", **row} for row in rows]
    return f"cat <<'END'\n{json.dumps({'report': [{'lv': volumes}]})}\nEND"


def fail(*lines: str) -> str:
    said = "\n".join(f"  {line}" for line in lines)
    return f"cat >&2 <<'END'\n{said}\nEND\nexit 5"


async def test_what_holds_data_is_listed_and_pools_are_not(script: Script) -> None:
    script(lvs=report({}, POOL, THIN, SNAPSHOT))
    async with group_backend("vg0") as backend:
        entries = await backend.list(())
        infos = {entry.name: entry for entry in entries if isinstance(entry, VolumeInfo)}
        assert list(infos) == ["disk", "thin", "snap"]
        assert {name: info.size for name, info in infos.items()} == dict.fromkeys(infos, 8 * MIB)
        assert {name for name, info in infos.items() if info.read_only} == {"snap"}
        assert infos["thin"].allocated == 2 * MIB
        assert infos["disk"].allocated is None
        assert infos["disk"].identity == "logical volume 6zWX4G8SIzUAmU3r3h9D8KnKpXFdVzmc"
        assert infos["disk"].mtime_ns == 1_700_000_000 * 10**9
        assert infos["snap"].details == {"active": "no", "lv_attr": "sri-------", "origin": "disk"}
        assert infos["thin"].details == {
            "active": "yes",
            "lv_attr": "Vwi-aotz--",
            "pool": "pool",
            "data_percent": "25",
        }
        assert set(infos["thin"].details) <= set(backend.describes)
        assert await backend.lookup(["thin"]) == infos["thin"]
        for path in (["pool"], ["nosuch"], ["disk", "below"]):
            with pytest.raises(VolumeNotFound):
                await backend.lookup(path)


async def test_many_stats_ask_lvm_once(script: Script, tmp_path: Path) -> None:
    script(lvs=report({}))
    async with group_backend("vg0") as backend, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(backend.stat, BlockSource(path="/dev/vg0/disk"))
    assert (tmp_path / "calls").read_text().count("lvs ") <= 2


@pytest.mark.parametrize(
    ("said", "number", "message"),
    [
        (('Volume group "vg0" not found', "Cannot process volume group vg0"), errno.ENOENT,
         'lvs: Volume group "vg0" not found'),
        (("WARNING: Running as a non-root user. Functionality may be unavailable.",
          "/run/lock/lvm/P_global:aux: open failed: Permission denied"), errno.EACCES,
         "lvs: /run/lock/lvm/P_global:aux: open failed: Permission denied"),
        (("Something else.",), errno.EIO, "lvs: Something else."),
        ((), errno.EIO, "lvs: failed"),
    ],
)  # fmt: skip
async def test_an_error_of_lvm_is_one_line_and_an_errno(
    script: Script, said: tuple[str, ...], number: int, message: str
) -> None:
    script(lvs=fail(*said))
    async with group_backend("vg0") as backend:
        with raises(number) as caught:
            await backend.list(())
        assert str(caught.value) == message
        assert isinstance(caught.value, VolfsError)


async def test_an_answer_that_is_no_report_is_told(script: Script) -> None:
    for text in ("echo hello", "echo '{}'", """echo '{"report": [{"lv": [{"lv_name": "x"}]}]}'"""):
        script(lvs=text)
        async with group_backend("vg0") as backend:
            with pytest.raises(BackendError, match="not the report that was asked for") as caught:
                await backend.list(())
            assert caught.value.errno == errno.EPROTO


async def test_without_lvm_a_volume_group_says_which_package_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(lvm, "DIRECTORIES", ())
    async with group_backend("vg0") as backend:
        with pytest.raises(BackendError) as caught:
            await backend.list(())
    assert str(caught.value) == "lvs is not installed (apt install lvm2)"
    source = BlockSource(path="/dev/vg0/disk")
    async with BlockBackend("block", BlockBackend.settings_for(source)) as backend:
        with pytest.raises(VolumeNotFound):
            await backend.stat(source)


async def test_an_lvm_that_hangs_ends_at_the_deadline(script: Script) -> None:
    script(lvs="exec sleep 20")
    async with group_backend("vg0", timeout=0.2) as backend:
        with trio.fail_after(10), pytest.raises(BackendTimeout, match=r"lvs vg0: no answer within 0\.2 s"):
            await backend.list(())


async def test_an_activation_that_fails_leaves_no_record(
    script: Script, runtime: Path, tmp_path: Path
) -> None:
    script(lvs=report({}), lvchange='[ "$3" = n ] || { echo "  device-mapper: no space" >&2; exit 5; }')
    async with group_backend("vg0") as backend:
        with pytest.raises(BackendError) as caught:
            await backend.open(BlockSource(path="/dev/vg0/disk"), writable=True)
    assert str(caught.value) == "lvchange: device-mapper: no space"
    assert records(runtime) == []
    changes = [line for line in (tmp_path / "calls").read_text().splitlines() if "lvchange" in line]
    assert changes[-1] == "lvchange --yes --activate n -- vg0/disk"


async def test_a_volume_that_cannot_be_deactivated_is_left_to_the_next_start(
    script: Script, runtime: Path
) -> None:
    """After an open that fails, since activation brought no node: there is no device mapper here."""
    script(lvs=report({}), lvchange='[ "$3" = y ] || { echo "  Unable to deactivate" >&2; exit 5; }')
    async with group_backend("vg0") as backend:
        with pytest.raises(VolfsError):
            await backend.open(BlockSource(path="/dev/vg0/disk"), writable=True)
    (record,) = journal.orphans()
    assert record.driver == "block"
    assert record.facts == {"logical_volume": "vg0/disk", "uuid": ROW["lv_uuid"]}
    script(lvs=report({"lv_attr": "-wi-a-----", "lv_name": "renamed"}), lvchange="exit 0")
    await BlockBackend.clean_up(record.facts)
    record.remove()
    assert "lvchange --yes --activate n -- vg0/renamed" in (runtime.parent / "calls").read_text()


async def test_what_is_gone_or_inactive_needs_no_clean_up(script: Script) -> None:
    facts = {"logical_volume": "vg0/disk", "uuid": ROW["lv_uuid"]}
    for lvs in (report({}), report({"lv_uuid": "another", "lv_attr": "-wi-a-----"}), fail("not found")):
        script(lvs=lvs, lvchange="echo called >&2; exit 5")
        await BlockBackend.clean_up(facts)


@pytest.mark.parametrize(
    ("path", "full_name"),
    [
        ("/dev/vg0/disk", "vg0/disk"),
        ("/dev/mapper/vg0-disk", "vg0/disk"),
        ("/dev/mapper/vg--a-disk--b", "vg-a/disk-b"),
        ("/dev/vg-a/disk-b", "vg-a/disk-b"),
        ("/dev/mapper/mpatha", None),
        ("/dev/sda", None),
        ("/dev/mapper/a-b-c", None),
        ("/srv/vg0/disk", None),
        ("/dev/v g/disk", None),
    ],
)
def test_a_path_of_lvms_tells_the_volume(path: str, full_name: str | None) -> None:
    assert lvm.full_name_of(path) == full_name


async def test_a_connection_info_finds_the_backend_of_its_volume_group() -> None:
    backend = group_backend("vg-a")
    for path in ("/dev/vg-a/disk-b", "/dev/mapper/vg--a-disk--b"):
        info = {"driver_volume_type": "local", "data": {"device_path": path}}
        assert backend.serves(parse_connection_info(info, {}))
    assert not backend.serves(BlockSource(path="/dev/vg-b/disk"))
    assert not backend.serves(BlockSource(path="/dev/sda"))


# ---- in the guest ----------------------------------------------------------------------------------------------


@pytest.fixture
def group(new_group: GroupFactory) -> VolumeGroup:
    return new_group()


def active(group: VolumeGroup) -> set[str]:
    """The volumes that have a node; sooner told than by lvs, which takes a second there."""
    try:
        return set(os.listdir(f"/dev/{group.name}"))
    except FileNotFoundError:  # which udev removes with the last of them
        return set()


async def stats(backend: BlockBackend) -> dict[str, VolumeInfo]:
    return {entry.name: entry for entry in await backend.list(()) if isinstance(entry, VolumeInfo)}


@pytest.mark.vm(seconds=14)
async def test_volumes_are_active_only_while_they_are_open(group: VolumeGroup, runtime: Path) -> None:
    group.create("with-dash", 8 * MIB)
    group.create_thin("thin", 128 * MIB)
    group.create("active", 8 * MIB)
    succeed("lvcreate", "-s", "-n", "thin-snap", f"{group.name}/thin")  # skips activation, as they do
    succeed("lvcreate", "-s", "-p", "r", "-n", "old-snap", "-L", f"{4 * MIB}b", f"{group.name}/with-dash")
    for name in ("with-dash", "thin", "pool"):
        group.activate(name, False)
    assert active(group) == {"active"}

    async with group_backend(group.name) as backend:
        infos = await stats(backend)
        assert set(infos) == {"with-dash", "thin", "active", "thin-snap", "old-snap"}
        assert {name for name, info in infos.items() if info.read_only} == {"old-snap"}
        assert infos["old-snap"].size == 8 * MIB
        assert group.active() == {"active"}, "after a listing"

        content = random_bytes(MIB)
        for name in ("with-dash", "active", "thin", "thin-snap"):
            source = infos[name].source
            writer = await backend.open(source, writable=True)
            assert len(records(runtime)) == (name != "active")
            if name == "with-dash":
                async with await backend.open(source, writable=False):
                    pass
                assert "with-dash" in active(group), "closed by one of two"
            await writer.pwrite(4096 - 7, content)
            assert await writer.pread(4096 - 7, MIB) == content
            await writer.aclose()
            assert active(group) == {"active"}, f"after {name} was closed"
            assert records(runtime) == []

        # A snapshot of the old kind and its origin are active together.
        origin = await backend.open(infos["with-dash"].source, writable=True)
        with raises(errno.EROFS):
            await backend.open(infos["old-snap"].source, writable=True)
        snapshot = await backend.open(infos["old-snap"].source, writable=False)
        await origin.aclose()
        assert await snapshot.pread(4096 - 7, MIB) == bytes(MIB)
        await snapshot.aclose()
        assert active(group) == {"active"}
        assert records(runtime) == []

    # By its paths, which are not there.
    mapped = f"/dev/mapper/{group.name.replace('-', '--')}-with--dash"
    for path in (str(group.path("with-dash")), mapped):
        source = parse_connection_info({"driver_volume_type": "local", "data": {"device_path": path}}, {})
        async with BlockBackend("block", BlockBackend.settings_for(source)) as backend:
            info = await backend.stat(source)
            assert (info.identity, info.size) == (infos["with-dash"].identity, 8 * MIB)
            async with await backend.open(source, writable=False) as volume:
                assert await volume.pread(4096 - 7, MIB) == content
                if path == mapped:
                    with opened(Path(path), os.O_RDONLY):  # somebody else goes on with it
                        await volume.aclose()
    assert "with-dash" in active(group)
    (record,) = journal.orphans()
    await BlockBackend.clean_up(record.facts)
    record.remove()
    assert group.active() == {"active"}


@pytest.mark.vm(seconds=2)
async def test_a_resize_is_seen_and_done(group: VolumeGroup) -> None:
    path = group.create("disk", 8 * MIB)
    async with group_backend(group.name) as backend:
        async with await backend.open(BlockSource(path=str(path)), writable=True) as volume:
            succeed("lvextend", "-L", f"{16 * MIB}b", f"{group.name}/disk")
            assert (await volume.refresh()).size == 16 * MIB
            await volume.pwrite(16 * MIB - 5, b"in it")
            await volume.resize(24 * MIB)
            assert volume.properties.size == 24 * MIB
            assert await volume.pread(16 * MIB - 5, 5) == b"in it"
            with raises(errno.EINVAL):
                await volume.resize(24 * MIB + 512)
            with raises(errno.ENOSPC):
                await volume.resize(1 << 40)
        assert (await backend.stat(BlockSource(path=str(path)))).size == 24 * MIB
        assert "disk" in group.active()


def mounted_group(directory: Path, group: VolumeGroup) -> Any:
    settings = directory / "volfs.toml"
    settings.write_text(f'[backends.disks]\ndriver = "block"\nvolume_group = "{group.name}"\nresize = true\n')
    return mounted(directory, [], ["-c", str(settings)])


@pytest.mark.vm(seconds=6)
def test_what_a_killed_daemon_left_active_is_deactivated_at_the_next_start(
    group: VolumeGroup, runtime: Path, tmp_path: Path
) -> None:
    group.create_thin("thin", 32 * MIB)
    for name in ("thin", "pool"):
        group.activate(name, False)
    directory = tmp_path / "m"
    directory.mkdir()
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(32 * MIB)
        file.seek(20 * MIB)
        file.write(random_bytes(MIB))
    with mounted_group(directory, group) as mount:
        path = mount.path / "disks" / "thin"
        done = mount.volfs("copy", source, path)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: not active(group), "inactive after the copy", 60)
        file = os.open(path, os.O_RDWR)
        os.pwrite(file, b"stable", 5)
        os.fsync(file)
        assert active(group) == {"thin"}
        assert float(os.getxattr(path, "user.volfs.data_percent")) < 10, "holes take no space"
        mount.process.send_signal(signal.SIGKILL)
        mount.process.wait()
        with pytest.raises(OSError, match="not connected"):
            os.close(file)
        succeed("umount", "-l", mount.path)
    assert active(group) == {"thin"}
    assert len(records(runtime)) == 1
    with mounted_group(directory, group) as mount:
        assert active(group) == set()
        assert records(runtime) == []
        content = (mount.path / "disks" / "thin").read_bytes()
        assert content[5:11] == b"stable"
        assert content[20 * MIB : 21 * MIB] == random_bytes(MIB)
        wait_until(lambda: not active(group), "inactive after it was read", 60)
    assert group.active() == set()
