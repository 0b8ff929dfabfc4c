"""What is RBD's own: the cluster's connection, image headers read past librbd, images removed while open."""

from __future__ import annotations

import datetime
import errno
import functools
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio.testing
from services import Image, Services
from volumes import raises

from volfs.backends import rbd_header
from volfs.backends.rbd import RbdBackend, RbdSettings
from volfs.backends.rbd_cluster import Cluster, ClusterAccess
from volfs.errors import BackendError, BackendTimeout, VolfsError

MIB = 1024**2


@asynccontextmanager
async def a_cluster(services: Services, **access: Any) -> AsyncIterator[Cluster]:
    cluster = Cluster(ClusterAccess(conf=str(services.ceph_conf), **access), timeout=10)
    try:
        yield cluster
    finally:
        await cluster.close()


@asynccontextmanager
async def a_backend(services: Services, **settings: Any) -> AsyncIterator[RbdBackend]:
    backend = RbdBackend("ceph", RbdSettings(conf=str(services.ceph_conf), **settings))
    try:
        yield backend
    finally:
        await backend.aclose()


async def test_closing_waits_for_calls_under_way(services: Services, rbd_image: Image) -> None:
    """librados crashes the process when it is shut down beneath them."""
    late: list[int | None] = []  # errors of calls that came when it was closing
    for _ in range(5):
        async with a_backend(services) as backend:
            source = RbdBackend.parse_url(rbd_image.url.removeprefix("rbd:"), {})
            await backend.stat(source)

            async def stat(backend: RbdBackend = backend, source: Any = source) -> None:
                try:
                    await backend.stat(source)
                except VolfsError as exc:
                    late.append(exc.errno)

            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(stat)
                await trio.testing.wait_all_tasks_blocked()
                await backend.aclose()
    assert set(late) <= {errno.ESHUTDOWN}


async def test_closing_waits_for_an_open_that_was_given_up(services: Services, rbd_image: Image) -> None:
    async with a_backend(services) as backend:
        source = RbdBackend.parse_url(rbd_image.url.removeprefix("rbd:"), {})
        await backend.stat(source)
        with trio.CancelScope() as scope:
            scope.cancel()
            await backend.open(source, writable=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(backend.open, source, writable=True))
            await trio.testing.wait_all_tasks_blocked(0.002)
            nursery.cancel_scope.cancel()
        await backend.aclose()
    assert rbd_image.watchers() == []


async def test_a_closed_cluster_does_not_connect_again(services: Services) -> None:
    async with a_cluster(services) as cluster:
        assert "rbd" in await cluster.list_pools()
        await cluster.close()
        with raises(errno.ESHUTDOWN):
            await cluster.list_pools()


async def test_who_waits_while_connecting_fails_shares_the_failure(tmp_path: Any) -> None:
    conf = tmp_path / "ceph.conf"
    # A port of the host that nothing answers at; connecting is tried again until the deadline.
    conf.write_text("[global]\nmon host = v2:127.0.0.1:1/0\nauth client required = none\n")
    cluster = Cluster(ClusterAccess(conf=str(conf)), timeout=1)
    errors: list[VolfsError] = []

    async def connect() -> None:
        try:
            await cluster.connect()
        except VolfsError as exc:
            errors.append(exc)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(connect)
    assert trio.current_time() - start < 4, "each waited for an attempt of its own"
    assert len(errors) == 5
    assert all(isinstance(exc, BackendTimeout) and "127.0.0.1" not in repr(exc.__cause__) for exc in errors)
    assert all("within 1 s" in str(exc) for exc in errors), errors


async def test_a_configuration_that_is_no_file_is_named(tmp_path: Any) -> None:
    cluster = Cluster(ClusterAccess(conf=str(tmp_path)), timeout=5)
    with pytest.raises(BackendError, match=f"{tmp_path}: cannot read this Ceph configuration"):
        await cluster.connect()


async def test_a_missing_keyring_is_no_missing_volume(services: Services, tmp_path: Any) -> None:
    async with a_cluster(services, client="nobody", keyring=str(tmp_path / "none")) as cluster:
        with pytest.raises(BackendError, match="keyring") as caught:
            await cluster.connect()
        assert caught.value.errno == errno.EACCES


async def test_a_wrong_key_is_permission_denied(services: Services) -> None:
    wrong = "AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA=="
    async with a_cluster(services, client="volfs", key=wrong) as cluster:
        with pytest.raises(VolfsError) as caught:
            await cluster.connect()
        assert caught.value.errno in (errno.EACCES, errno.EINVAL)
        assert wrong not in str(caught.value)


async def test_a_user_with_profile_rbd_lists_reads_and_writes(services: Services, rbd_image: Image) -> None:
    async with a_backend(services, id="volfs", keyring=str(services.keyring)) as backend:
        assert rbd_image.name in [entry.name for entry in await backend.list((rbd_image.pool,))]
        source = (await backend.lookup((rbd_image.pool, rbd_image.name))).source  # type: ignore[union-attr]
        volume = await backend.open(source, writable=True)
        await volume.pwrite(5, b"volfs")
        await volume.aclose()
    assert rbd_image.read()[:10] == b"\0" * 5 + b"volfs"


async def test_a_removed_image_is_noticed_when_asked(services: Services, new_image: Any) -> None:
    image: Image = new_image(size=8 * MIB)
    async with a_backend(services) as backend:
        volume = await backend.open(RbdBackend.parse_url(image.spec, {}), writable=False)
        services.run("rbd", "rm", "--no-progress", image.spec)
        with raises(errno.ENOENT):
            await volume.refresh()
        await volume.aclose()


async def test_what_another_client_wrote_is_read_though_the_configuration_would_cache(
    services: Services, rbd_image: Image, tmp_path: Any
) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text(services.ceph_conf.read_text() + "\n[client]\nrbd_cache_policy = writeback\n")
    backend = RbdBackend("ceph", RbdSettings(conf=str(conf)))
    volume = await backend.open(RbdBackend.parse_url(rbd_image.spec, {}), writable=False)
    assert await volume.pread(0, 4) == b"\0" * 4
    rbd_image.write(b"anew")
    assert await volume.pread(0, 4) == b"anew"
    await volume.aclose()
    await backend.aclose()


def test_headers_tell_what_librbd_tells(services: Services, rbd_image: Image) -> None:
    import rados
    import rbd

    for name in ("one", "two"):
        rbd_image.snapshot(name)
    with (
        rados.Rados(conffile=str(services.ceph_conf)) as cluster,
        cluster.open_ioctx(rbd_image.pool) as ioctx,
        rbd.Image(ioctx, rbd_image.name, read_only=True) as image,
    ):
        image_id = rbd_header.read_image_id(ioctx, rbd_image.name)
        (header,) = rbd_header.read_headers(ioctx, [image_id])
        assert header is not None
        assert image_id == image.id()
        assert (header.size, header.features) == (image.size(), image.features())
        assert header.created_ns // 10**9 == int(
            image.create_timestamp().replace(tzinfo=datetime.UTC).timestamp()
        )
        assert {(it.name, it.size) for it in header.snapshots} == {
            (it["name"], it["size"]) for it in image.list_snaps()
        }


def test_headers_of_many_images_come_in_order_and_a_removed_one_is_none(
    services: Services, rbd_image: Image
) -> None:
    import rados

    with (
        rados.Rados(conffile=str(services.ceph_conf)) as cluster,
        cluster.open_ioctx(rbd_image.pool) as ioctx,
    ):
        image_id = rbd_header.read_image_id(ioctx, rbd_image.name)
        ids = [image_id, "0" * 12] * (rbd_header.WINDOW + 3)
        headers = list(rbd_header.read_headers(ioctx, ids))
    assert [header is not None for header in headers] == [True, False] * (rbd_header.WINDOW + 3)


def test_an_error_among_many_header_reads_does_not_crash_the_others(
    services: Services, rbd_image: Image
) -> None:
    """librados writes to results that are freed, unless they are waited for: in a process of its own."""
    script = f"""
import rados
from volfs.backends import rbd_header
with rados.Rados(conffile={str(services.ceph_conf)!r}) as cluster, cluster.open_ioctx({rbd_image.pool!r}) as ioctx:
    image_id = rbd_header.read_image_id(ioctx, {rbd_image.name!r})
    for _ in range(20):
        headers = rbd_header.read_headers(ioctx, [image_id] * 200)
        next(headers)
        try:
            headers.throw(RuntimeError("one read failed"))
        except RuntimeError:
            pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
