"""Requests on an RBD image that Python does not wait for (native/rbd_image.c): what they hold, and let go of."""

from __future__ import annotations

import gc

from services import Image, Services
from volumes import ceph_environment

from volfs.backends import backend_class
from volfs.backends.rbd_writes import UnconfirmedWrites
from volfs.source import parse_prefix, parse_source


async def test_a_closed_image_leaves_nothing_in_memory(services: Services, rbd_image: Image) -> None:
    """Each open would leave librbd's image and its ioctx, for as long as the daemon runs."""

    def alive() -> int:
        gc.collect()
        return sum(isinstance(it, UnconfirmedWrites) for it in gc.get_objects())

    environment = ceph_environment(services)
    driver, settings, _ = parse_prefix("rbd:volumes", environment)
    before = alive()
    async with backend_class(driver)(driver, settings) as backend:
        for _ in range(3):
            async with await backend.open(parse_source(rbd_image.url, environment), writable=True) as volume:
                await volume.pwrite(0, b"written")
        del volume
        assert alive() == before
