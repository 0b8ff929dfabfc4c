"""cinder-volume with its volumes as files of volfs: `volume_manager = volfs.cinder.manager.VolumeManager`.

A manager, since Cinder lets an operator name one, once for all backends and in each of their processes; drivers stay
as they are, and so does what Nova gets from them. The source's backend attaches both volumes of a copy, in its own
process, so the settings of that process decide.
"""

from __future__ import annotations

from typing import Any

from cinder import exception
from cinder.volume import manager, rpcapi, volume_types, volume_utils
from cinder.volume.drivers.rbd import RBDDriver
from oslo_config import cfg

from volfs.cinder import copying, images, options
from volfs.cinder.attaching import AttachInfo, Attaching

GIB = 1 << 30


class VolumeManager(manager.VolumeManager):  # type: ignore[misc]
    """Attaches volumes by volfs for what [volfs] use_for says, and copies them by [volfs] copy_method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = options.register(cfg.CONF)
        self._attaching = Attaching(self._settings)
        # New volumes, by id, that are to be attached: _connect_device is told no more than what the driver says.
        self._blank: set[str] = set()
        if self._attaching.is_for(options.IMAGES):
            images.Images(self.driver, self._attaching, self._new_is_zero)

    def get_capabilities(self, context: Any, discover: bool) -> dict[str, Any]:
        """Cinder's, and that new images of RBD read as zeros, which its driver does not tell."""
        capabilities: dict[str, Any] = super().get_capabilities(context, discover)
        if isinstance(self.driver, RBDDriver):
            return {**(capabilities or {}), "sparse_copy_volume": True}
        return capabilities

    def _new_is_zero(self, context: Any) -> bool:
        """Of volumes that the driver makes."""
        return bool((self.get_capabilities(context, False) or {}).get("sparse_copy_volume"))

    def _connect_device(self, conn: dict[str, Any]) -> AttachInfo:
        if self._attaching.is_for(options.COPIES):
            blank = conn["data"].get("volume_id") in self._blank
            return self._attaching.connect(conn, super()._connect_device, blank=blank)
        stock: AttachInfo = super()._connect_device(conn)
        return stock

    def _copy_volume_data(self, ctxt: Any, src_vol: Any, dest_vol: Any, remote: str | None = None) -> None:
        """Copy one volume to another, in place of Cinder's, which has no choice of method, and leaves out zeros also
        on a target that has old data, when a volume is reverted to a snapshot.

        Whatever fails, also letting go of the target, fails the migration.
        """
        # Through dm-crypt only when the volumes are not encrypted alike; else the encrypted bytes are copied.
        decrypt = volume_types.volume_types_encryption_changed(
            ctxt, src_vol.volume_type_id, dest_vol.volume_type_id
        )
        properties = volume_utils.brick_get_connector_properties(
            self.configuration.use_multipath_for_image_xfer,
            self.configuration.enforce_multipath_for_image_xfer,
        )
        how = {"attach_encryptor": decrypt}
        far = {"remote": remote in ("dest", "both")}
        near = {"remote": remote in ("src", "both")}
        blank = is_blank(ctxt, dest_vol)
        if blank:
            self._blank.add(dest_vol["id"])
        try:
            target = self._attach_volume(ctxt, dest_vol, properties, **far, **how)
        finally:
            self._blank.discard(dest_vol["id"])
        try:
            source = self._attach_volume(ctxt, src_vol, properties, **near, **how)
            try:
                copying.copy(
                    source["device"]["path"],
                    target["device"]["path"],
                    bytes_to_copy(src_vol, source, decrypt=decrypt),
                    self._settings,
                    block_size=self.configuration.volume_dd_blocksize,
                    blank=blank,
                    title=f"volume {src_vol['id']} to {dest_vol['id']}",
                )
            finally:
                self._detach_volume(ctxt, source, src_vol, properties, force=True, **near, **how)
        finally:
            self._detach_volume(ctxt, target, dest_vol, properties, force=True, **far, **how)


def bytes_to_copy(volume: Any, attached: AttachInfo, *, decrypt: bool) -> int:
    """The volume's size; of what is copied encrypted from Ceph, whose driver has the header beside that, all there is.

    VolumeBackendAPIException when nobody can tell: the end would be missing.
    """
    if not volume["encryption_key_id"] or decrypt or attached["conn"]["driver_volume_type"] != "rbd":
        return int(volume["size"] * GIB)
    path = attached["device"]["path"]
    size = copying.size_of(path)
    if size is None:
        reason = f"volfs: {path}: this user cannot see how large the encrypted image is"
        raise exception.VolumeBackendAPIException(data=reason)
    return size


def is_blank(ctxt: Any, volume: Any) -> bool:
    """Whether a volume reads as zeros: it is new, made for a migration, on a backend whose new volumes do.

    One that is encrypted has a header from the beginning on, where its driver makes that (Ceph's does).
    """
    if volume["encryption_key_id"] or not (volume["migration_status"] or "").startswith("target:"):
        return False
    capabilities = rpcapi.VolumeAPI().get_capabilities(ctxt, volume.service_topic_queue, False)
    return bool(capabilities and capabilities.get("sparse_copy_volume"))
