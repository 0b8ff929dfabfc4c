"""A pool of Ceph that is full: who writes is told so at once, and who makes room is let to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pools
import pytest
from disks import opened
from mounts import Mount
from services import MIB, ImageFactory, Services
from volumes import ceph_environment, raises, random_bytes

OBJECT = 4 * MIB


@pytest.mark.slow
def test_a_full_pool_takes_what_needs_no_room_and_is_EDQUOT_for_the_rest(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory
) -> None:
    image = new_image(5 * OBJECT, pool="rbd")
    image.write(content := random_bytes(2 * OBJECT))
    path = mount("rbd:rbd", env=ceph_environment(services)).path / "rbd" / "rbd" / image.name
    early = os.open(path, os.O_RDWR)
    with pools.full(services, "rbd"):
        late = os.open(path, os.O_RDWR | os.O_DIRECT)
        for number, file in enumerate((early, late)):
            os.pwrite(file, b"new", number * MIB)
            os.fsync(file)
            os.pwrite(file, b"new", (2 + number) * OBJECT)
            for descriptor in (early, late):  # whoever may have written it
                with raises(errno.EDQUOT):
                    os.fsync(descriptor)
        os.close(early)
        os.close(late)
        with opened(path, os.O_WRONLY | os.O_DSYNC) as file, raises(errno.EDQUOT):
            os.pwrite(file, b"new", 2 * OBJECT)
        services.run("fallocate", "--punch-hole", f"--offset={OBJECT}", f"--length={OBJECT}", str(path))
    with opened(path, os.O_RDWR) as file:
        os.pwrite(file, b"more", 4 * OBJECT)
        os.fsync(file)
    expected = bytearray(content[:OBJECT] + bytes(3 * OBJECT) + b"more" + bytes(OBJECT - 4))
    expected[:3] = expected[MIB : MIB + 3] = b"new"
    assert image.read() == expected
