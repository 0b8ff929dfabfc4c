"""Driver `rbd`: Ceph RBD images through librbd, without the kernel's rbd driver.

Directories are pools and namespaces; a snapshot is a read-only file `<image>@<snapshot>` beside its image.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from volfs.backends import rbd_header
from volfs.backends.base import Backend, Directory, Entry, Settings, Source, VolumeInfo
from volfs.backends.rbd_cluster import Cluster, ClusterAccess, access_from_environment
from volfs.backends.rbd_image import RbdImage, open_image
from volfs.backends.rbd_object_map import read_allocated
from volfs.errors import BackendError, SourceError, VolumeNotFound

# In a listing of more than so many images, what each has allocated is not asked: that is one more request
# for each, and takes as long as all else. A stat of one tells.
MANY = 4096
NAME = r"[^/@\0\ud800-\udfff]+"  # of a pool, namespace, image or snapshot: librados wants UTF-8


class RbdSource(Source, frozen=True, kw_only=True):
    """An image or a snapshot of one, and the cluster it is on."""

    driver: ClassVar[str] = "rbd"
    pool: str
    namespace: str = ""
    image: str
    snapshot: str = ""
    access: ClusterAccess = ClusterAccess()

    @property
    def url(self) -> str:
        return "rbd:" + "/".join(part for part in (self.pool, self.namespace, self.name) if part)

    @property
    def name(self) -> str:
        return _file_name(self.image, self.snapshot)


class RbdSettings(Settings, frozen=True, kw_only=True):
    """A backend of driver `rbd`."""

    paths = ("conf", "keyring")
    secret_paths = ("keyring",)

    conf: str | None = None  # ceph.conf; by default CEPH_CONF, or /etc/ceph/<cluster>.conf
    id: str | None = None  # Ceph user, without "client."
    cluster: str | None = None
    keyring: str | None = None
    key: str | None = None  # in place of a keyring
    monitors: tuple[str, ...] = ()  # in place of the configuration's
    arguments: tuple[str, ...] = ()  # further options, as on the command line of `ceph`
    pools: tuple[str, ...] = ()  # all pools with the rbd application when empty

    def __post_init__(self) -> None:
        if not self.timeout.is_integer():
            raise ValueError(f"timeout: expected whole seconds, as librados takes them, not {self.timeout:g}")
        for pool in self.pools:
            if not _is_name(pool):
                raise ValueError(f"pools: expected names of pools, not {pool!r}")
        try:
            self._given()
        except SourceError as exc:
            raise ValueError(f"id: {exc}") from exc

    def secrets(self) -> Sequence[str]:
        inline = any(argument.partition("=")[0] == "--key" for argument in self.arguments)
        return [key for key, given in (("key", self.key), ("arguments", inline)) if given]

    def cluster_access(self) -> ClusterAccess:
        """How the cluster is reached; the environment counts where the settings say nothing at all."""
        access = self._given()
        return access_from_environment(os.environ) if access == ClusterAccess() else access

    def _given(self) -> ClusterAccess:
        return ClusterAccess(
            conf=self.conf,
            client=self.id,
            cluster=self.cluster,
            keyring=self.keyring,
            key=self.key,
            monitors=self.monitors,
            arguments=self.arguments,
        )


def _settings(access: ClusterAccess, **more: Any) -> RbdSettings:
    return RbdSettings(
        conf=access.conf,
        id=access.client,
        cluster=access.cluster,
        keyring=access.keyring,
        key=access.key,
        monitors=access.monitors,
        arguments=access.arguments,
        **more,
    )


class RbdBackend(Backend):
    driver = "rbd"
    settings_type = RbdSettings
    describes = ("features", "snapshots", "object_size", "parent", "watchers", "lock_owners")
    settings: RbdSettings

    def __init__(self, name: str, settings: RbdSettings) -> None:
        super().__init__(name, settings)
        self._access = settings.cluster_access()
        self._cluster = Cluster(self._access, settings.timeout)

    @classmethod
    def parse_url(cls, rest: str, environment: Mapping[str, str]) -> RbdSource:
        return RbdSource(**_parse_image(rest, f"rbd:{rest}"), access=access_from_environment(environment))

    @classmethod
    def parse_prefix(cls, rest: str, environment: Mapping[str, str]) -> tuple[RbdSettings, tuple[str, ...]]:
        path = tuple(rest.split("/")) if rest else ()
        if len(path) > 2 or not all(map(_is_name, path)):
            raise SourceError(f"rbd:{rest}: expected rbd:POOL[/NAMESPACE], or rbd: for all pools")
        return _settings(access_from_environment(environment), pools=path[:1]), path

    @classmethod
    def parse_connection(
        cls, protocol: str, data: Mapping[str, Any], environment: Mapping[str, str]
    ) -> RbdSource:
        where = "connection info of type rbd: data."
        fields = {key: _field(data, key, where) for key in ("cluster_name", "auth_username", "keyring")}
        monitors = _monitors(data, where)
        access = access_from_environment(environment)
        access = ClusterAccess(
            conf=access.conf,
            cluster=fields["cluster_name"] or access.cluster,
            client=fields["auth_username"] or access.client,
            keyring=access.keyring,
            key=_key_of(fields["keyring"]),
            # A configuration that the caller names knows its monitors; Cinder's list may be older.
            monitors=() if access.conf else monitors,
        )
        name = _field(data, "name", where) or ""
        parsed = _parse_image(name, f"{where}name: {name!r}")
        return RbdSource(**parsed, access=access, read_only=data.get("access_mode") == "ro")

    @classmethod
    def settings_for(cls, source: Source) -> RbdSettings:
        assert isinstance(source, RbdSource)
        return _settings(source.access)

    def serves(self, source: Source) -> bool:
        return isinstance(source, RbdSource) and source.access in (self._access, ClusterAccess())

    async def list(self, path: Sequence[str]) -> list[Entry]:
        if not path:
            return [Directory(pool) for pool in self.settings.pools or await self._cluster.list_pools()]
        pool, namespace = self._directory(path)
        async with self._cluster.pool(pool, namespace) as ioctx:
            return await self._cluster.run(
                lambda: list(self._scan(ioctx, pool, namespace)), doing=f"list rbd:{'/'.join(path)}"
            )

    async def names_version(self, path: Sequence[str]) -> Hashable | None:
        if not path:
            return None
        pool, namespace = self._directory(path)
        async with self._cluster.pool(pool, namespace) as ioctx:
            return await self._cluster.run(
                lambda: _names_version(ioctx, namespace), doing=f"list rbd:{'/'.join(path)}"
            )

    async def lookup(self, path: Sequence[str]) -> Entry:
        if len(path) == 1:
            if not _is_name(path[0]) or (self.settings.pools and path[0] not in self.settings.pools):
                raise VolumeNotFound(f"rbd:{path[0]}: no pool of backend {self.name}")
            async with self._cluster.pool(path[0]):
                return Directory(path[0])
        pool, namespace = self._directory(path[:-1])
        if not path[-1].isprintable():
            # Stray bytes, which librados does not take; line ends and the like, which no tool of Ceph does.
            raise VolumeNotFound(f"rbd:{'/'.join(path)}: no such image")
        image, at, snapshot = path[-1].partition("@")
        if at and not snapshot:  # would be another name of the image itself
            raise VolumeNotFound(f"rbd:{'/'.join(path)}: no such snapshot")
        source = RbdSource(
            pool=pool, namespace=namespace, image=image, snapshot=snapshot, access=self._access
        )
        try:
            return await self.stat(source)
        except VolumeNotFound:
            if namespace or snapshot or not await self._has_namespace(pool, path[-1]):
                raise
            return Directory(path[-1])

    async def stat(self, source: Source) -> VolumeInfo:
        assert isinstance(source, RbdSource)
        source = msgspec.structs.replace(source, access=self._access)

        def find() -> VolumeInfo | None:
            image_id = rbd_header.read_image_id(ioctx, source.image)
            (header,) = rbd_header.read_headers(ioctx, [image_id])
            if header is None:
                raise VolumeNotFound("removed meanwhile")
            snapshot = next((it for it in header.snapshots if it.name == source.snapshot), None)
            if source.snapshot and snapshot is None:
                return None
            (allocated,) = read_allocated(ioctx, [(image_id, header, snapshot)])
            return self._info(source, image_id, header, snapshot, allocated)

        async with self._cluster.pool(source.pool, source.namespace) as ioctx:
            try:
                info = await self._cluster.run(find, doing=source.url)
            except VolumeNotFound:
                place = f"rbd:{source.pool}/{source.namespace}"
                if source.namespace and not await self._cluster.run(
                    lambda: _namespace_exists(ioctx, source.namespace), doing=place
                ):
                    raise VolumeNotFound(f"{place}: no such namespace") from None
                raise VolumeNotFound(f"{source.url}: no such image") from None
        if info is None:
            raise VolumeNotFound(f"{source.url}: no such snapshot")
        return info

    async def describe(self, source: Source) -> Mapping[str, str]:
        assert isinstance(source, RbdSource)
        info = await self.stat(source)
        image = await self.open(source, writable=False)
        try:
            return {**info.details, **await image.describe()}
        finally:
            await image.aclose()

    async def open(self, source: Source, *, writable: bool) -> RbdImage:
        assert isinstance(source, RbdSource)
        if writable and (source.snapshot or source.read_only or self.settings.read_only):
            raise BackendError(f"{source.url}: read-only", errno.EROFS)
        return await open_image(
            self._cluster,
            pool=source.pool,
            namespace=source.namespace,
            image=source.image,
            snapshot=source.snapshot,
            writable=writable,
        )

    async def aclose(self) -> None:
        await self._cluster.close()

    def _directory(self, path: Sequence[str]) -> tuple[str, str]:
        """The pool and namespace of a directory's path."""
        if len(path) > 2 or (self.settings.pools and path[0] not in self.settings.pools):
            raise VolumeNotFound(f"rbd:{'/'.join(path)}: no such pool or namespace in backend {self.name}")
        return path[0], path[1] if len(path) == 2 else ""

    async def _has_namespace(self, pool: str, namespace: str) -> bool:
        async with self._cluster.pool(pool) as ioctx:
            return bool(
                await self._cluster.run(
                    lambda: _namespace_exists(ioctx, namespace), doing=f"rbd:{pool}/{namespace}"
                )
            )

    def _scan(self, ioctx: Any, pool: str, namespace: str) -> Iterator[Entry]:
        import rbd

        if not namespace:
            for name in rbd.RBD().namespace_list(ioctx):
                yield Directory(name)
        elif not _namespace_exists(ioctx, namespace):  # to RADOS it would be an empty one
            raise VolumeNotFound(f"rbd:{pool}/{namespace}: no such namespace")
        try:
            listed = list(rbd.RBD().list2(ioctx))
        except UnicodeDecodeError:  # one name that is no text, and the library lists none
            listed = list(rbd_header.read_directory(ioctx))
        images = [image for image in listed if _is_name(image["name"])]
        keys = rbd_header.KEYS if len(images) <= MANY else rbd_header.SHOWN
        headers = rbd_header.read_headers(ioctx, [image["id"] for image in images], keys)
        found = [
            (image, header, snapshot)
            for image, header in zip(images, headers, strict=True)
            if header is not None  # removed since, or of format 1, which has no id
            for snapshot in (None, *header.snapshots)
        ]
        volumes = [(image["id"], *headers) for image, *headers in found]
        sizes: Iterator[int | None] = (
            read_allocated(ioctx, volumes) if len(images) <= MANY else itertools.repeat(None, len(volumes))
        )
        for (image, header, snapshot), allocated in zip(found, sizes, strict=True):
            source = RbdSource(pool=pool, namespace=namespace, image=image["name"], access=self._access)
            yield self._info(source, image["id"], header, snapshot, allocated)

    def _info(
        self,
        source: RbdSource,
        image_id: str,
        header: rbd_header.Header,
        snapshot: rbd_header.SnapshotHeader | None,
        allocated: int | None,
    ) -> VolumeInfo:
        """The file of an image, or of a snapshot of it."""
        identity = f"rbd {image_id}"  # half of it is random: no two clusters have the same
        features = {"features": header.feature_names}
        if snapshot is None:
            return VolumeInfo(
                name=source.image,
                source=msgspec.structs.replace(source, snapshot=""),
                size=header.size,
                mtime_ns=header.modified_ns,
                allocated=allocated,
                read_only=source.read_only or self.settings.read_only,
                identity=identity,
                details={**features, "snapshots": str(len(header.snapshots))},
            )
        return VolumeInfo(
            name=_file_name(source.image, snapshot.name),
            source=msgspec.structs.replace(source, snapshot=snapshot.name),
            size=snapshot.size,
            mtime_ns=snapshot.created_ns,
            allocated=allocated,
            read_only=True,
            identity=f"{identity}@{snapshot.name}",
            details=features,
        )


def _file_name(image: str, snapshot: str) -> str:
    return f"{image}@{snapshot}" if snapshot else image


def _namespace_exists(ioctx: Any, namespace: str) -> bool:
    import rbd

    return bool(rbd.RBD().namespace_exists(ioctx, namespace))


def _names_version(ioctx: Any, namespace: str) -> Hashable | None:
    import rados
    import rbd

    namespaces = () if namespace else tuple(rbd.RBD().namespace_list(ioctx))
    try:
        ioctx.stat("rbd_directory")  # the names of images and their ids
    except rados.ObjectNotFound:  # there was never one
        return None
    return ioctx.get_last_version(), namespaces


def _parse_image(text: str, where: str) -> dict[str, Any]:
    """Split `pool/[namespace/]image[@snapshot]`; `where` begins the message of the SourceError."""
    match = re.fullmatch(
        rf"(?P<pool>{NAME})/((?P<namespace>{NAME})/)?(?P<image>{NAME})(@(?P<snapshot>{NAME}))?", text
    )
    if match is None or {".", ".."} & set(match.groups()):
        raise SourceError(f"{where}: expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]")
    return {key: value or "" for key, value in match.groupdict().items()}


def _is_name(text: str) -> bool:
    return re.fullmatch(NAME, text) is not None and text not in (".", "..")


def _field(data: Mapping[str, Any], key: str, where: str) -> str | None:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise SourceError(f"{where}{key}: expected text, not {type(value).__name__}")
    return value


def _monitors(data: Mapping[str, Any], where: str) -> tuple[str, ...]:
    hosts, ports = data.get("hosts", []), data.get("ports", [])
    for key, value in (("hosts", hosts), ("ports", ports)):
        if not isinstance(value, list) or not all(isinstance(item, str | int) for item in value):
            raise SourceError(f"{where}{key}: expected a list of texts")
    if len(hosts) != len(ports):
        raise SourceError(f"{where}ports: expected as many as hosts ({len(hosts)}), not {len(ports)}")
    return tuple(
        f"[{host}]:{port}" if ":" in str(host) and not str(host).startswith("[") else f"{host}:{port}"
        for host, port in zip(hosts, ports, strict=True)
    )


def _key_of(keyring: str | None) -> str | None:
    """The key in a keyring's text, which older Cinder releases pass along."""
    match = re.search(r"^\s*key\s*=\s*(\S+)", keyring or "", re.MULTILINE)
    return match.group(1) if match else None
