"""One connection to a Ceph cluster: how it is found and made, its threads, and its errors.

librados and librbd are imported here and only when a connection is made; they carry no types, so what volfs calls
of them is seen through `Any`.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import outcome
import trio

from volfs.backends.base import deadline
from volfs.errors import BackendError, BackendTimeout, SourceError, VolumeNotFound

T = TypeVar("T")

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
        self._rados: Any = None

    async def connect(self) -> None:
        """Connect unless that is done. BackendError when monitors, user or key are refused or not there."""
        async with self._connecting:
            if self._rados is None:
                with rados_errors(f"Ceph cluster ({self._where()})", self.timeout):
                    # Not abandoned at a deadline: librados keeps its own, set below, and a thread left behind
                    # would own a half-made connection.
                    self._rados = await trio.to_thread.run_sync(self._connect, limiter=self._threads)

    async def open_pool(self, pool: str, namespace: str = "") -> Any:
        """A rados.Ioctx for the pool; the caller closes it, or gives it to an image that outlives it."""

        def open_ioctx() -> Any:
            ioctx = self._rados.open_ioctx(pool)
            ioctx.set_namespace(namespace)
            return ioctx

        await self.connect()
        try:
            return await self.run(open_ioctx, doing=f"rbd:{pool}")
        except VolumeNotFound:
            raise VolumeNotFound(f"rbd:{pool}: no such pool") from None

    async def run(self, call: Callable[[], T], *, doing: str) -> T:
        """Run a blocking call of the library in a thread. librados ends it at the timeouts set in `_connect`."""
        await self.connect()
        with rados_errors(doing, self.timeout):
            return await trio.to_thread.run_sync(call, limiter=self._threads)

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
        """Disconnect. No image and no ioctx may be in use any more."""
        async with self._connecting:
            rados, self._rados = self._rados, None
            if rados is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(rados.shutdown, limiter=self._threads)

    def _where(self) -> str:
        access = self.access
        where = ", ".join(access.monitors) or access.conf or f"/etc/ceph/{access.cluster or 'ceph'}.conf"
        return f"{where}, client.{access.client or 'admin'}"

    def _connect(self) -> Any:
        try:
            import rados
        except ImportError as exc:
            raise BackendError(
                f"the rbd driver needs python3-rados and python3-rbd: {exc}", errno.EOPNOTSUPP
            ) from exc
        access = self.access
        if access.conf is not None and not os.access(access.conf, os.R_OK):
            raise BackendError(f"{access.conf}: cannot read this Ceph configuration", errno.ENOENT)
        cluster = rados.Rados(rados_id=access.client, clustername=access.cluster or "")
        try:
            if access.conf is not None:
                cluster.conf_read_file(access.conf)
            elif os.path.exists(f"/etc/ceph/{access.cluster or 'ceph'}.conf") or not access.monitors:
                cluster.conf_read_file()
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


async def aio(start: Callable[[Callable[..., None]], Any], *, doing: str, timeout: float) -> Any:
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
            result.aio_close(lambda completion: None)

    def callback(completion: Any, result: Any = None) -> None:  # on a thread of librbd
        try:
            token.run_sync_soon(arrived, completion.get_return_value(), result)
        except trio.RunFinishedError:
            pass  # the daemon is gone; so is whoever asked

    def give_up(_: Any) -> trio.lowlevel.Abort:
        nonlocal waiting
        waiting = False
        return trio.lowlevel.Abort.SUCCEEDED

    with rados_errors(doing, timeout), deadline(timeout, doing):
        start(callback)
        status, result = await trio.lowlevel.wait_task_rescheduled(give_up)
    if status < 0:
        raise _error(-status, f"{doing}: {os.strerror(-status)}", timeout)
    return result


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
        raise _error(abs(number), f"{doing}: {text}", timeout) from exc


def _error(number: int, text: str, timeout: float) -> BackendError | VolumeNotFound:
    if number == errno.ENOENT:
        return VolumeNotFound(text)
    if number == errno.ETIMEDOUT:
        return BackendTimeout(f"{text} (no answer within {timeout:g} s)")
    return BackendError(text, number)
