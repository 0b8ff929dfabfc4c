"""What sequences of steps on small volumes are made of, for tests against a model of the bytes in memory.

VOLFS_MODEL_STEPS is the number of steps of the long run on each driver, for more than CI has the time for.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import strategies as st
from volumes import random_bytes

OBJECT = 64 << 10  # of RBD here, so that a small volume has many
PAGE = 4096
SIZE = 9 * OBJECT + PAGE  # ends inside an object, on a sector
LONG_STEPS = int(os.environ.get("VOLFS_MODEL_STEPS", "2000"))
LONG_SEQUENCE = 40

OFFSETS = st.one_of(
    st.tuples(st.integers(0, SIZE // OBJECT), st.sampled_from([-513, -1, 0, 1, 512, PAGE])).map(
        lambda it: min(max(0, it[0] * OBJECT + it[1]), SIZE - 1)
    ),
    st.integers(0, SIZE // PAGE - 1).map(lambda number: number * PAGE),
    st.integers(0, SIZE - 1),
)
# To be cut where the volume ends.
LENGTHS = st.one_of(
    st.sampled_from((1, 511, 512, PAGE, PAGE + 1, OBJECT, 2 * OBJECT + 5, SIZE)), st.integers(1, 3 * OBJECT)
)
STARTS = st.sampled_from(["empty", "full", "mixed"])


def start_content(start: str) -> bytearray:
    """What a volume holds before the first step."""
    content = bytearray(SIZE)
    if start == "full":
        content[:] = random_bytes(SIZE)
    elif start == "mixed":
        content[OBJECT + 5 : 3 * OBJECT] = random_bytes(2 * OBJECT - 5)
    return content


def small_objects(driver: str) -> dict[str, Any]:
    """The options of `Storage.make` for a volume of many objects."""
    return {"options": ("--object-size", f"{OBJECT}B")} if driver == "rbd" else {}
