"""The FUSE operations: names, inodes, attributes and errnos, translated between the kernel and the tree.

Each handler runs inside `_errors`, the one place where exceptions become errnos: pyfuse3 ends its main loop, and
with it every volume, for anything else that escapes. What volfs does not do at all is in refusals.py.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyfuse3
import trio

from volfs.attached import MAX_NAME
from volfs.backends.base import BLOCK_UNIT
from volfs.copy_range import Interrupted
from volfs.errors import BackendError, BackendTimeout, VolfsError, VolumeNotFound
from volfs.fuse import xattrs
from volfs.fuse.handles import OpenFiles
from volfs.fuse.refusals import Refusals
from volfs.fuse.tree import LONG_AGO, AttachedNode, Node, Tree, VolumeNode
from volfs.volume import VolumeTable

log = logging.getLogger(__name__)

TIMEOUT = 1.0  # seconds the kernel may believe names and attributes; an open asks again in any case
READDIR_ENTRIES = 256  # told at once, about 3 ms: of a large directory the kernel would take thousands
# Asked for by ls of each file. That none has any (ENODATA) tells nothing of the next file; that there are none does.
NO_ATTRIBUTES = (b"system.", b"security.selinux")
PREFERRED_IO = 1024 * 1024  # st_blksize: the buffer that cp, cat and Python's open() choose; a request's most


@dataclass(frozen=True, slots=True)
class Access:
    """Whom the files belong to and who may use them; the kernel enforces it (default_permissions)."""

    uid: int
    gid: int
    mode: int  # of a volume that may be written; directories get x where this has r
    read_only: bool


@dataclass(slots=True)
class _Listing:
    """An open directory: what it held when it was opened, or rewound."""

    parent: Node
    children: list[tuple[str, Node]]
    begun: bool = False


class Filesystem(Refusals):
    """The handlers. Many run at once, each in a task of its own, on the trio loop."""

    supports_dot_lookup = False
    enable_writeback_cache = False  # with it, errors of the backend would come long after the write

    def __init__(
        self, tree: Tree, volumes: VolumeTable, files: OpenFiles, access: Access, control: str
    ) -> None:
        super().__init__()
        self._tree = tree
        self._volumes = volumes
        self._files = files
        self._access = access
        self._control = control  # the control socket's path, for clients that know only the mountpoint
        self._listings: dict[int, _Listing] = {}
        self._listing_numbers = itertools.count(1)

    # Names

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        with _errors("lookup"):
            if len(name) > MAX_NAME:  # not each backend's way to say so
                raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
            parent = self._tree.node(parent_inode)
            node = await self._tree.lookup(parent, os.fsdecode(name))
            await self._refresh(node)
            self._tree.remember(node)
            return self._entry(parent, node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, lookups in inode_list:
            self._tree.forget(inode, lookups)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        with _errors("opendir"):
            number = next(self._listing_numbers)
            node = self._tree.node(inode)
            self._listings[number] = _Listing(node, await self._tree.list(node))
            return number

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        with _errors("readdir"):
            listing = self._listings[fh]
            if start_id == 0 and listing.begun:  # rewinddir(3) wants to see what is there now
                stale, listing.children = listing.children, await self._tree.list(listing.parent)
                self._tree.drop_unknown([node for _, node in stale])
            listing.begun = True
            some = listing.children[start_id : start_id + READDIR_ENTRIES]
            for position, (name, node) in enumerate(some, start_id + 1):
                entry = self._entry(listing.parent, node)
                if isinstance(node, VolumeNode) and node.read_at == LONG_AGO:
                    entry.attr_timeout = 0  # written since the storage was asked
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position):
                    break
                self._tree.remember(node)

    async def releasedir(self, fh: int) -> None:
        with _errors("releasedir"):
            self._tree.drop_unknown([node for _, node in self._listings.pop(fh).children])

    # Attributes

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        with _errors("getattr"):
            node = self._tree.node(inode)
            await self._refresh(node)
            return self._attributes(node)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        with _errors("setattr"):
            node = self._tree.node(inode)
            now = self._attributes(node)
            unchanged = (
                (not fields.update_uid or attr.st_uid == now.st_uid)
                and (not fields.update_gid or attr.st_gid == now.st_gid)
                and (not fields.update_mode or stat.S_IMODE(attr.st_mode) == stat.S_IMODE(now.st_mode))
                # With a size come times as well, which ftruncate(2) sets; alone they are utimensat(2).
                and (fields.update_size or not (fields.update_mtime or fields.update_atime))
            )
            if not unchanged:
                raise VolfsError(
                    "owner, mode and times of a volume are not the file's to change", errno.EPERM
                )
            if fields.update_size:
                await self._truncate(node, attr.st_size, fh, ctx.pid)
            return self._attributes(node)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        with _errors("statfs"):
            # The size is that of the open volumes, and none of it is free: no file can be made here.
            total = sum(volume.properties.size for volume in self._volumes)
            data = pyfuse3.StatvfsData()
            data.f_bsize = data.f_frsize = 4096
            data.f_blocks = -(-total // 4096)
            data.f_bfree = data.f_bavail = 0
            data.f_files = data.f_ffree = data.f_favail = 0
            data.f_namemax = MAX_NAME
            return data

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        with _errors("listxattr"):
            return [os.fsencode(xattrs.PREFIX + name) for name in xattrs.names(self._tree.node(inode))]

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        with _errors("getxattr"):
            if name.startswith(NO_ATTRIBUTES):
                raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
            node = self._tree.node(inode)
            key = os.fsdecode(name).removeprefix(xattrs.PREFIX)
            if not name.startswith(os.fsencode(xattrs.PREFIX)) or key not in xattrs.names(node):
                raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
            if isinstance(node, VolumeNode):
                await self._tree.refresh(node)
            return os.fsencode(await xattrs.value(node, key, self._files, self._control))

    # Data

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        with _errors("open"):
            node = self._tree.node(inode)
            assert isinstance(node, VolumeNode)
            if self._access.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
                raise VolfsError("the mount is read-only", errno.EROFS)
            # O_TRUNC does not come among the flags, but as a setattr of its own; without our helper below pyfuse3 it
            # does, and the kernel takes the file for empty until it asks again.
            handle = await self._files.open(node, flags, ctx.pid)
            self._tree.resized(node, self._size(node))
            if node.size_told != self._size(node):
                try:
                    pyfuse3.invalidate_inode(inode, attr_only=True)
                except OSError as exc:  # the kernel has forgotten the inode, or is unmounting
                    log.debug("open: cannot renew the attributes of inode %d: %s", inode, exc)
            # To a handle that only writes (dd, cp), the page cache would be one more copy, and nothing gained.
            past_cache = bool(flags & os.O_DIRECT) or flags & os.O_ACCMODE == os.O_WRONLY
            return pyfuse3.FileInfo(fh=handle, direct_io=past_cache, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        with _errors("read"):
            return await self._files[fh].read(off, size)

    async def write(self, fh: int, off: int, buf: bytes, synchronous: bool = False) -> int:
        with _errors("write"):
            return await self._files[fh].write(off, buf, synchronous)

    def start_read(self, fh: int, off: int, size: int, sink: object) -> bool | bytes:
        """Begin a read without a task, or answer it; False when it takes `read` to do it, or to say why not."""
        try:
            return self._files[fh].start_read(off, size, sink)
        except OSError as exc:
            log.debug("read: %s", exc)
            return False

    def start_write(self, fh: int, off: int, data: memoryview) -> bool:
        """Do a write without a task; False when it takes `write` to do it, or to say why not."""
        try:
            return self._files[fh].start_write(off, data)
        except OSError as exc:
            log.debug("write: %s", exc)
            return False

    async def read_failed(self, fh: int, off: int, size: int, number: int) -> bytes:
        """A read that was begun had an error: what it means is found by asking again, unless time is up."""
        with _errors("read"):
            file = self._files[fh]
            if number == errno.ETIMEDOUT:
                raise BackendTimeout(f"{file.volume.source.url}: read: no answer in time")
            return await file.read(off, size)

    async def wait_open(self) -> None:
        """Return when a volume is open."""
        await self._volumes.wait_changed(lambda: any(True for _ in self._volumes))

    def expire_reads(self) -> None:
        """Give up reads that were begun and are past their deadline."""
        for volume in self._volumes:
            volume.expire()

    async def lseek(self, fh: int, off: int, whence: int) -> int:
        with _errors("lseek"):
            file = self._files[fh]
            if self._files.may_be_mapped(file.node):
                await write_back(file.node.inode)
            return await file.seek(off, whence)

    async def fallocate(self, fh: int, mode: int, off: int, length: int) -> None:
        with _errors("fallocate"):
            file = self._files[fh]
            try:
                await file.allocate(mode, off, length)
            except BackendError:
                await write_back(file.node.inode)  # see copy_file_range
                raise

    async def copy_file_range(
        self, fh_in: int, off_in: int, fh_out: int, off_out: int, length: int, interrupted: Interrupted
    ) -> int:
        """Both ranges are written back by the kernel before it asks.

        It drops from the target's page cache what it is told to be copied, but nothing after an error: behind what is
        copied without a gap there may be more.
        """
        with _errors("copy_file_range"):
            source, target = self._files[fh_in], self._files[fh_out]
            copied = 0
            try:
                copied = await target.copy_from(source, off_in, off_out, length, interrupted)
            finally:
                if copied < length:
                    await write_back(target.node.inode)
            return copied

    async def flush(self, fh: int) -> None:
        with _errors("flush"):
            await self._files[fh].close()

    async def fsync(self, fh: int, datasync: bool) -> None:
        with _errors("fsync"):
            await self._files[fh].fsync()

    async def release(self, fh: int) -> None:
        with _errors("release"):
            await self._files.release(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        return None

    # Help

    async def _refresh(self, node: Node) -> None:
        if isinstance(node, VolumeNode):
            volume = self._volumes.get(node.backend, node.info.source)
            if volume is not None and volume.dirty:
                # The kernel asks after each write, to find the end; size and times are known here, and how much is
                # allocated is not told until a flush.
                return
            try:
                await self._tree.refresh(node)
            except VolfsError:
                # An open file goes on with what is known, as an unlinked one does elsewhere.
                if volume is None:
                    raise

    def _size(self, node: VolumeNode) -> int:
        volume = self._volumes.get(node.backend, node.info.source)
        return node.info.size if volume is None else volume.properties.size

    def _entry(self, parent: Node, node: Node) -> pyfuse3.EntryAttributes:
        """The attributes of a node found under a name in `parent`."""
        attributes = self._attributes(node)
        if isinstance(parent, AttachedNode):
            attributes.entry_timeout = 0  # a detached name is gone at once
            attributes.attr_timeout = 0  # what is known may be as old as the attachment
        return attributes

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = node.inode
        attributes.st_uid, attributes.st_gid = self._access.uid, self._access.gid
        attributes.entry_timeout = attributes.attr_timeout = TIMEOUT
        attributes.st_blksize = PREFERRED_IO
        mode = self._access.mode & ~(0o222 if self._access.read_only else 0)
        if isinstance(node, VolumeNode):
            info = node.info
            attributes.st_mode = stat.S_IFREG | (mode & ~0o222 if info.read_only else mode)
            attributes.st_nlink = 1
            volume = self._volumes.get(node.backend, info.source)
            attributes.st_size = info.size if volume is None else volume.properties.size
            node.size_told = attributes.st_size
            # 0 for "unknown" would make tar and cp take the volume for one hole. So it is while something is on its way
            # to the backend, which may not count it yet.
            dirty = volume is not None and volume.dirty
            if dirty:
                attributes.attr_timeout = 0
            allocated = attributes.st_size if dirty or info.allocated is None else info.allocated
            attributes.st_blocks = -(-allocated // BLOCK_UNIT)
            attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = node.mtime_ns
        else:
            attributes.st_mode = stat.S_IFDIR | (mode & 0o444) | (mode & 0o444) >> 2
            attributes.st_nlink = 2
        return attributes

    async def _truncate(self, node: Node, size: int, fh: int | None, thread: int) -> None:
        assert isinstance(node, VolumeNode)
        read_only = self._access.read_only or node.info.read_only  # whoever opened it did so to read
        opening = self._files.opening(node, thread) if fh is None and size == 0 and not read_only else None
        if opening is not None:  # open(2) with O_TRUNC: the size is the backend's
            opening.truncate_at_open()
            return
        if size == self._size(node):
            if fh is not None:
                await self._files[fh].extend()
            return
        if not node.backend.settings.resize or read_only:
            raise VolfsError(f"{node.info.source.url}: its size is the backend's", errno.EPERM)
        volume = await self._volumes.open(node.backend, node.info.source, writable=True)
        try:
            await volume.resize(size)
            self._tree.resized(node, size)
        finally:
            await self._volumes.release(node.backend, node.info.source)


async def write_back(inode: int) -> None:
    """Have the kernel send what mmap left in its page cache for this file, and drop the rest.

    The main loop must go on meanwhile. May be awaited while the kernel waits for an answer about the same file.

    Not by syncfs(2): for FUSE the kernel begins to write and does not wait. Dropping a file's cache writes its dirty
    pages first, and returns when that is answered.
    """
    try:
        await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode, abandon_on_cancel=True)
    except OSError as exc:  # forgotten, or unmounted
        log.debug("inode %d: %s", inode, exc)


@contextmanager
def _errors(operation: str) -> Iterator[None]:
    try:
        yield
    except pyfuse3.FUSEError:
        raise
    except VolumeNotFound as exc:
        log.debug("%s: %s", operation, exc)
        raise pyfuse3.FUSEError(errno.ENOENT) from exc
    except OSError as exc:
        level = logging.WARNING if isinstance(exc, BackendError) else logging.DEBUG
        log.log(level, "%s: %s", operation, exc)
        number = exc.errno or errno.EIO
        raise pyfuse3.FUSEError(number if number in errno.errorcode else errno.EIO) from exc
    except Exception as exc:
        log.exception("%s: unexpected error; a bug in volfs", operation)
        raise pyfuse3.FUSEError(errno.EIO) from exc
