"""Pools of the private Ceph that are at their quota."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mounts import wait_until
from services import Services

SECONDS = 60


@contextlib.contextmanager
def full(services: Services, pool: str) -> Iterator[None]:
    """A pool with something in it takes no more: it has reached its quota, for as long as this lasts."""

    def quota(length: int) -> None:
        services.run("ceph", "osd", "pool", "set-quota", pool, "max_bytes", str(length))

    def is_full() -> bool:
        pools = services.json("ceph", "osd", "pool", "ls", "detail", "--format", "json")
        (flags,) = (it["flags_names"] for it in pools if it["pool_name"] == pool)
        return "full_quota" in flags.split(",")

    quota(1)
    try:
        wait_until(is_full, f"the pool {pool} is full", SECONDS)
        yield
    finally:
        quota(0)
        wait_until(lambda: not is_full(), f"the pool {pool} has room again", SECONDS)
