"""One connection to a Ceph cluster: how it is found and made, its threads, and its errors.

librados and librbd are imported here and only when a connection is made; they carry no types, so what volfs calls
of them is seen through `Any`.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import msgspec
import outcome
import trio

from volfs.backends.base import deadline
from volfs.errors import BackendError, BackendTimeout, SourceError, VolfsError, VolumeNotFound
from volfs.native import load_first

T = TypeVar("T")

log = logging.getLogger(__name__)

_environment = threading.Lock()

THREADS = 8  # blocking calls (connect, list, describe) under way at once for one cluster


class ClusterAccess(msgspec.Struct, frozen=True, kw_only=True):
    """How a cluster is reached. What is not given is as Ceph's own tools would have it."""

    conf: str | None = None  # path of ceph.conf
    client: str | None = None  # user name, without "client."
    cluster: str | None = None
    keyring: str | None = None  # path
    monitors: tuple[str, ...] = ()  # addresses, in place of those in the configuration
    key: str | None = None
    arguments: tuple[str, ...] = ()  # further options, as on the command line of `ceph`

    def __post_init__(self) -> None:
        """SourceError for what librados would take for another name, or the path of its files for another directory."""
        texts = [
            self.conf,
            self.client,
            self.cluster,
            self.keyring,
            self.key,
            *self.monitors,
            *self.arguments,
        ]
        if any("\0" in text for text in texts if text):
            raise SourceError("how a Ceph cluster is reached: expected text without a NUL character")
        for what, name in (("cluster", self.cluster), ("user", self.client)):
            if name and "/" in name:  # /etc/ceph/CLUSTER.conf, CLUSTER.client.USER.keyring
                raise SourceError(f"Ceph {what} {name!r}: expected a name without '/'")

    def __repr__(self) -> str:  # without the key
        return f"ClusterAccess({self.conf or 'default conf'}, client {self.client or 'default'})"


def access_from_environment(environment: Mapping[str, str]) -> ClusterAccess:
    """Read CEPH_CONF and CEPH_ARGS as Ceph's tools do; the options that name conf and user are taken out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--conf")
    parser.add_argument("--id", "--user", dest="client")
    parser.add_argument("-n", "--name")
    parser.add_argument("--cluster")
    parser.add_argument("-k", "--keyring")
    try:
        known, rest = parser.parse_known_args(shlex.split(environment.get("CEPH_ARGS", "")))
    except (argparse.ArgumentError, ValueError) as exc:
        raise SourceError(f"CEPH_ARGS: {exc}") from exc
    client = known.client
    if known.name:
        kind, _, client = known.name.partition(".")
        if kind != "client" or not client:
            raise SourceError(f"CEPH_ARGS: --name {known.name}: expected client.USER")
    return ClusterAccess(
        conf=known.conf or environment.get("CEPH_CONF"),
        client=client,
        cluster=known.cluster,
        keyring=known.keyring,
        arguments=tuple(rest),
    )


class Cluster:
    """A connection, made at the first use and shared by all volumes of a backend. Owned by the backend."""

    def __init__(self, access: ClusterAccess, timeout: float) -> None:
        self.access = access
        self.timeout = timeout
        self._threads = trio.CapacityLimiter(THREADS)
        self._connecting = trio.Lock()
        self._attempts = 0
        self._failure: VolfsError | None = None  # of the last attempt
        self._rados: Any = None
        self._users = (
            0  # calls under way and images open: librados does not stand being shut down beneath them
        )
        self._unused = trio.Event()
        self._closed = False

    async def connect(self) -> None:
        """Connect unless that is done. BackendError when monitors, user or key are refused or not there.

        Who waits while an attempt fails shares its error: with an attempt for each, deadlines would add up.
        """
        attempts = self._attempts
        async with self._connecting:
            if self._closed:
                raise BackendError(f"Ceph cluster ({self._where()}): disconnected", errno.ESHUTDOWN)
            if self._rados is not None:
                return
            if self._attempts > attempts and self._failure is not None:
                raise type(self._failure)(str(self._failure), self._failure.errno)
            self._attempts += 1
            try:
                with rados_errors(f"Ceph cluster ({self._where()})", self.timeout):
                    # Not abandoned at a deadline: librados keeps its own, set below, and a thread left behind
                    # would own a half-made connection.
                    self._rados = await trio.to_thread.run_sync(self._connect, limiter=self._threads)
            except VolumeNotFound as exc:  # it is no volume that is missing
                self._failure = BackendError(f"{exc}; is its keyring there?", errno.EACCES)
                raise self._failure from exc
            except VolfsError as exc:
                self._failure = exc
                raise

    def hold(self) -> None:
        """Note a user of the connection, who owes one `release`."""
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()

    @asynccontextmanager
    async def pool(self, pool: str, namespace: str = "") -> AsyncIterator[Any]:
        """A rados.Ioctx for the pool. The connection stays as long as it is used."""
        self.hold()
        try:
            ioctx = await self.open_pool(pool, namespace)
            try:
                yield ioctx
            finally:
                ioctx.close()
        finally:
            self.release()

    async def open_pool(self, pool: str, namespace: str = "") -> Any:
        """A rados.Ioctx for the pool; the caller holds the connection, and closes it."""

        def open_ioctx() -> Any:
            ioctx = self._rados.open_ioctx(pool)
            ioctx.set_namespace(namespace)
            # In a pool that is full, or at its quota, requests would wait for room, those that make room too.
            ioctx.set_osdmap_full_try()
            return ioctx

        await self.connect()
        try:
            return await self.run(open_ioctx, doing=f"rbd:{pool}")
        except VolumeNotFound:
            raise VolumeNotFound(f"rbd:{pool}: no such pool") from None

    async def run(self, call: Callable[[], T], *, doing: str) -> T:
        """Run a blocking call of the library in a thread. librados ends it at the timeouts set in `_connect`."""
        self.hold()
        try:
            await self.connect()
            with rados_errors(doing, self.timeout):
                return await trio.to_thread.run_sync(call, limiter=self._threads)
        finally:
            self.release()

    async def list_pools(self) -> list[str]:
        """Pools made for RBD (`rbd pool init`, or its application tag)."""

        def pools() -> list[str]:
            found = []
            for pool in self._rados.list_pools():
                with self._rados.open_ioctx(pool) as ioctx:
                    if "rbd" in ioctx.application_list():
                        found.append(pool)
            return found

        return await self.run(pools, doing="list the pools")

    async def close(self) -> None:
        """Disconnect for good, when calls that were given up have come back too."""
        with trio.move_on_after(self.timeout, shield=True):
            self._closed = True
            while self._users:
                self._unused = trio.Event()
                await self._unused.wait()
            async with self._connecting:
                rados, self._rados = self._rados, None
            if rados is not None:
                await trio.to_thread.run_sync(rados.shutdown, limiter=self._threads)
        if self._users:
            # Shutting down beneath them would crash the process, and every other volume with it.
            log.warning("Ceph cluster (%s): %d calls hang; left connected", self._where(), self._users)

    async def aio(self, start: Callable[[Callable[..., None]], Any], *, doing: str) -> Any:
        """Run one asynchronous call of librbd and return what it passes to its callback besides the completion.

        `start` makes the call with the callback it is given. When the deadline passes or the task is cancelled the
        request goes on in librbd, and its result is dropped; an image that arrives that late is closed.
        """
        token = trio.lowlevel.current_trio_token()
        task = trio.lowlevel.current_task()
        waiting = True

        def arrived(status: int, result: Any) -> None:  # on the trio loop
            nonlocal waiting
            if waiting:
                waiting = False
                trio.lowlevel.reschedule(task, outcome.Value((status, result)))
            elif status >= 0 and hasattr(result, "aio_close"):
                self.hold()
                result.aio_close(lambda completion: token.run_sync_soon(self.release))
            self.release()

        def callback(completion: Any, result: Any = None) -> None:  # on a thread of librbd
            try:
                token.run_sync_soon(arrived, completion.get_return_value(), result)
            except trio.RunFinishedError:
                pass  # the daemon is gone; so is whoever asked

        def give_up(_: Any) -> trio.lowlevel.Abort:
            nonlocal waiting
            waiting = False
            return trio.lowlevel.Abort.SUCCEEDED

        with rados_errors(doing, self.timeout), deadline(self.timeout, doing):
            start(callback)
            self.hold()  # until the callback, which may come long after we gave up
            status, result = await trio.lowlevel.wait_task_rescheduled(give_up)
        if status < 0:
            raise rados_error(-status, doing, os.strerror(-status), self.timeout)
        return result

    def _where(self) -> str:
        access = self.access
        where = ", ".join(access.monitors) or access.conf or f"/etc/ceph/{access.cluster or 'ceph'}.conf"
        return f"{where}, client.{access.client or 'admin'}"

    def _connect(self) -> Any:
        try:
            load_first("rbd_image")
        except ImportError as exc:
            raise BackendError(
                f"the rbd driver needs librbd (apt install librbd-dev, then install volfs again): {exc}",
                errno.EOPNOTSUPP,
            ) from exc
        try:
            import rados
            import rbd  # noqa: F401 - that it is missing is told now, not at the first image
        except ImportError as exc:
            raise BackendError(
                f"the rbd driver needs python3-rados and python3-rbd: {exc}", errno.EOPNOTSUPP
            ) from exc
        access = self.access
        if access.conf is not None and (os.path.isdir(access.conf) or not os.access(access.conf, os.R_OK)):
            raise BackendError(f"{access.conf}: cannot read this Ceph configuration", errno.ENOENT)
        with _own_ceph_args_hidden():
            cluster = rados.Rados(rados_id=access.client, clustername=access.cluster or "")
        try:
            with _own_ceph_args_hidden():
                if access.conf is not None:
                    cluster.conf_read_file(access.conf)
                elif os.path.exists(f"/etc/ceph/{access.cluster or 'ceph'}.conf") or not access.monitors:
                    cluster.conf_read_file()
                else:
                    # Before it has read a configuration, librados looks for the keyring of a client without name, in
                    # a cluster without name, though it tells the right path when asked.
                    cluster.conf_set("keyring", cluster.conf_get("keyring"))
            if access.arguments:
                cluster.conf_parse_argv(list(access.arguments))
            for option, value in self._options().items():
                cluster.conf_set(option, value)
            cluster.connect()
        except BaseException:
            cluster.shutdown()
            raise
        return cluster

    def _options(self) -> dict[str, str]:
        access, seconds = self.access, f"{self.timeout:g}"
        options = {
            # It keeps what was read, and images opened read-only are not told of others' writes; or it keeps only
            # what is being written, and answers by one more thread. rbd_writes.py does that without.
            "rbd_cache": "false",
            # Without a copy, writes that librbd refuses before it sends them (a lock that another keeps, a place that
            # was shrunk away) are never answered, and the image cannot be closed.
            "rbd_disable_zero_copy_writes": "true",
            # librados waits for ever unless told otherwise (300 s for the first contact).
            "client_mount_timeout": seconds,
            "rados_mon_op_timeout": seconds,
            "rados_osd_op_timeout": seconds,
        }
        if access.monitors:
            options["mon_host"] = ",".join(access.monitors)
        if access.keyring:
            options["keyring"] = access.keyring
        if access.key:
            # Given in memory: os-brick writes such keys to temporary files, which it forgets when attach fails.
            options["key"] = access.key
        return options


@contextmanager
def _own_ceph_args_hidden() -> Iterator[None]:
    """librados adds CEPH_ARGS to each configuration it reads. A client means its own, which are in its access."""
    with _environment:
        arguments = os.environ.pop("CEPH_ARGS", None)
        try:
            yield
        finally:
            if arguments is not None:
                os.environ["CEPH_ARGS"] = arguments


@contextmanager
def rados_errors(doing: str, timeout: float) -> Iterator[None]:
    """Turn the exceptions of rados and rbd into ours, keeping errno and text."""
    try:
        yield
    except (OSError, trio.Cancelled):
        raise
    except Exception as exc:
        # The two modules have unrelated exception trees, and importing them here to name those would load
        # librbd for users of other drivers. Both put the errno on every exception that comes from a call.
        number = getattr(exc, "errno", None)
        if not isinstance(number, int):
            raise
        text = str(exc.args[0]) if exc.args else type(exc).__name__
        raise rados_error(abs(number), doing, text, timeout) from exc


def rados_error(number: int, doing: str, text: str, timeout: float) -> BackendError | VolumeNotFound:
    """Ours for an errno of librados or librbd, which took `timeout` seconds where that is what went wrong."""
    if number == errno.ENOENT:
        return VolumeNotFound(f"{doing}: {text}")
    if number == errno.ETIMEDOUT:
        return BackendTimeout(f"{doing}: no answer within {timeout:g} s")
    return BackendError(f"{doing}: {text}", number)
