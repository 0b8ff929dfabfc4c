"""Images of Glance from and to volumes that are files of volfs, in place of a driver's own way.

A driver moves images by itself, so its object is given other methods: it may be of any class, and what Nova gets from
it stays. Attached by volfs is only the volume of an image under way, and never an encrypted one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cinder.image import image_utils
from cinder.volume import volume_utils
from cinder.volume.driver import BaseVD
from cinder.volume.drivers.rbd import RBDDriver

from volfs.cinder.attaching import AttachInfo, Attaching
from volfs.cinder.connector import VolfsConnector

GENERIC = {name: getattr(BaseVD, name) for name in ("copy_volume_to_image", "copy_image_to_volume")}


class Images:
    """What a driver is given. `new_is_zero(context)` tells whether its new volumes read as zeros.

    Drivers that do not attach volumes for images (NFS, LVM) are left alone. That of Ceph has a way of its own too, but
    it takes a local copy of the volume for any format but raw, and one of each image that it imports.
    """

    def __init__(self, driver: Any, attaching: Attaching, new_is_zero: Callable[[Any], bool]) -> None:
        self._driver = driver
        self._attaching = attaching
        self._new_is_zero = new_is_zero
        self._connect_stock = driver._connect_device
        self._upload_stock = driver.copy_volume_to_image
        self._download_stock = driver.copy_image_to_volume
        driver._connect_device = self._connect_device
        by_ceph = isinstance(driver, RBDDriver) and attaching.takes("rbd")
        for name, generic in GENERIC.items():
            if by_ceph or getattr(type(driver), name) is generic:
                setattr(driver, name, getattr(self, name))

    def copy_volume_to_image(self, context: Any, volume: Any, image_service: Any, image_meta: Any) -> None:
        """Cinder's for any driver, which reads the volume's path, or has qemu-img do so."""
        if volume["encryption_key_id"] or self._attaching.is_left_to_stock():
            self._upload_stock(context, volume, image_service, image_meta)
            return
        with _moving(blank=False):
            BaseVD.copy_volume_to_image(self._driver, context, volume, image_service, image_meta)

    def copy_image_to_volume(
        self, context: Any, volume: Any, image_service: Any, image_id: str, disable_sparse: bool = False
    ) -> None:
        """Fill a volume with an image; with `disable_sparse` one that has old data. What cannot be written raises.

        Not Cinder's for any driver: it has qemu-img make the target, which truncates what is no block device.
        """
        if volume["encryption_key_id"] or self._attaching.is_left_to_stock():
            self._download_stock(context, volume, image_service, image_id, disable_sparse=disable_sparse)
            return
        driver = self._driver
        properties = volume_utils.brick_get_connector_properties(
            driver.configuration.use_multipath_for_image_xfer,
            driver.configuration.enforce_multipath_for_image_xfer,
        )
        with _moving(blank=not disable_sparse and self._new_is_zero(context)):
            attach_info, volume = driver._attach_volume(context, volume, properties)
        try:
            path, size_gib = attach_info["device"]["path"], volume["size"]
            fetch = functools.partial(
                image_utils.fetch_to_raw,
                context,
                image_service,
                image_id,
                blocksize=driver.configuration.volume_dd_blocksize,
                size=size_gib,
                disable_sparse=disable_sparse,
            )
            if isinstance(attach_info["connector"], VolfsConnector):
                with _fetched(fetch, context, image_service, image_id) as (local, kind):
                    data = image_utils.qemu_img_info(local, run_as_root=True)
                    image_utils.check_virtual_size(data.virtual_size, size_gib, image_id)
                    image_utils.convert_image(
                        local,
                        path,
                        "raw",
                        src_format=kind,
                        image_id=image_id,
                        data=data,
                        disable_sparse=disable_sparse,
                        skip_create=True,
                    )
            else:
                fetch(path)
        finally:
            driver._detach_volume(context, attach_info, volume, properties, force=True)

    def _connect_device(self, conn: dict[str, Any]) -> AttachInfo:
        blank = _blank.get()
        if blank is None:
            stock: AttachInfo = self._connect_stock(conn)
            return stock
        as_root = not self._driver.secure_file_operations_enabled()
        return self._attaching.connect(conn, self._connect_stock, as_root=as_root, blank=blank)


@contextmanager
def _fetched(
    fetch_to_raw: Callable[[str], None], context: Any, image_service: Any, image_id: str
) -> Iterator[tuple[str, str]]:
    """A local file of the image, verified as Cinder does that, and its format; removed at the end."""
    meta = image_service.show(context, image_id)
    if meta["container_format"] != "bare":  # unpacking is left to Cinder, which does it into a file
        with image_utils.temporary_file(prefix=f"image_download_{image_id}_") as raw:
            fetch_to_raw(raw)
            yield raw, "raw"
        return
    image_utils.check_image_conversion_disable(meta["disk_format"], "raw", image_id)
    kind = image_utils.fixup_disk_format(meta["disk_format"])
    images = image_utils.TemporaryImages
    if at_hand := images.for_image_service(image_service).get(context, image_id):
        yield at_hand, kind
    else:
        with images.fetch(image_service, context, image_id) as local:
            yield local, kind


# Of the volume that this green thread moves an image of; None when it does something else.
_blank: ContextVar[bool | None] = ContextVar("blank", default=None)


@contextmanager
def _moving(*, blank: bool) -> Iterator[None]:
    token = _blank.set(blank)
    try:
        yield
    finally:
        _blank.reset(token)
