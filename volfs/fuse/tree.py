"""What the directories of the mount show: which inode is which backend, directory or volume.

Knows no FUSE type; fuse/filesystem.py translates. Asks backends to list and stat, never to open.
"""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import trio

from volfs.attached import Attachments, is_file_name
from volfs.backends.base import Backend, Directory, Entry, Source, VolumeInfo
from volfs.errors import VolfsError, VolumeNotFound

ROOT_INODE = 1
ATTACHED = "attached"
FRESH_SECONDS = 1.0  # how long what a backend told of a volume is believed
LONG_AGO = float("-inf")
SLOW_SECONDS = 0.5  # a listing that took so long is given again, for as long as it took
AT_ONCE = 256  # entries made into nodes before others have their turn


@dataclass(eq=False)
class Node:
    """Something with an inode. `lookups` counts the kernel's references."""

    inode: int
    lookups: int = 0


@dataclass(eq=False)
class RootNode(Node):
    """The mountpoint itself: a directory for each backend, and `attached`."""


@dataclass(eq=False)
class AttachedNode(Node):
    """The directory of the volumes attached on demand."""


@dataclass(eq=False, kw_only=True)
class DirectoryNode(Node):
    """A backend's top directory, or one below it."""

    backend: Backend
    path: tuple[str, ...]
    listing: Listing | None = None  # that took long


@dataclass(frozen=True)
class Listing:
    """What a directory held, to be told again as long as its names have the same version, and for that long."""

    version: Hashable
    children: Children
    until: float  # of trio's clock


@dataclass(eq=False, kw_only=True)
class VolumeNode(Node):
    """A volume. One inode whatever the path to it, so that the kernel keeps one page cache for it.

    (A source that is attached read-only is another one, with an inode of its own.)
    """

    backend: Backend
    info: VolumeInfo
    read_at: float  # of trio's clock
    changes: int = 0  # made through this mount, of what `info` tells
    changed_ns: int = 0  # when the last of them was made
    size_told: int = -1  # to the kernel

    def changed(self) -> None:
        """What the backend told of it, allocation and times, holds no more."""
        self.changes += 1
        self.changed_ns = time.time_ns()
        self.read_at = LONG_AGO

    @property
    def mtime_ns(self) -> int:
        """Moves with every write through this mount. Few backends know a time, and librbd notes it once a minute."""
        return max(self.info.mtime_ns, self.changed_ns)


Key = tuple[Backend, Source] | tuple[Backend, tuple[str, ...]]
Children = list[tuple[str, Node]]  # by name


class Tree:
    """All nodes that the kernel knows. Single-threaded, on the trio loop."""

    def __init__(self, configured: dict[str, Backend], attachments: Attachments) -> None:
        self._configured = configured
        self._attachments = attachments
        self._numbers = itertools.count(ROOT_INODE)
        self.root = RootNode(next(self._numbers))
        self._attached = AttachedNode(next(self._numbers))
        self._nodes: dict[int, Node] = {node.inode: node for node in (self.root, self._attached)}
        self._by_key: dict[Key, Node] = {}

    def node(self, inode: int) -> Node:
        """The node of an inode that the kernel knows; ESTALE otherwise."""
        try:
            return self._nodes[inode]
        except KeyError:
            raise VolfsError(f"inode {inode} is not known", errno.ESTALE) from None

    async def lookup(self, parent: Node, name: str) -> Node:
        """The child of that name; VolumeNotFound."""
        match parent:
            case RootNode() if name == ATTACHED:
                return self._attached
            case RootNode() if name in self._configured:
                return self._directory(self._configured[name], ())
            case AttachedNode() if (attachment := self._attachments.get(name)) is not None:
                return self._volume(attachment.backend, attachment.info, LONG_AGO)
            case DirectoryNode():
                entry = await parent.backend.lookup((*parent.path, name))
                return self._of(parent, entry)
        raise VolumeNotFound(f"{name}: no such volume or directory")

    async def list(self, parent: Node) -> Children:
        """The children and their names, sorted, so that positions in the listing mean something."""
        children: Children = []
        match parent:
            case RootNode():
                children = [
                    (name, self._directory(backend, ())) for name, backend in self._configured.items()
                ]
                children.append((ATTACHED, self._attached))
            case AttachedNode():
                children = [
                    (it.name, self._volume(it.backend, it.info, LONG_AGO)) for it in self._attachments
                ]
            case DirectoryNode():
                return await self._list_directory(parent)
        return sorted(children, key=lambda child: child[0])

    async def _list_directory(self, parent: DirectoryNode) -> Children:
        """What the backend has there; or had, if it tells that names are the same and to ask it takes long.

        Then sizes, times and snapshots of what this mount has not changed are as old as it took to ask for them, or
        up to twice that: no more than half of the time goes to who lists ten thousand volumes over and over.
        """
        begin = trio.current_time()
        version = await parent.backend.names_version(parent.path)
        before = parent.listing
        if before is not None and before.until >= begin and before.version == version:
            return [(name, self._restored(node)) for name, node in before.children]
        parent.listing = None
        children: Children = []
        for number, entry in enumerate(await parent.backend.list(parent.path), 1):
            if is_file_name(entry.name):  # one that no file can have would spoil the listing of all
                children.append((entry.name, self._of(parent, entry)))
            if number % AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        children.sort(key=lambda child: child[0])
        end = trio.current_time()
        if version is not None and end - begin >= SLOW_SECONDS:
            parent.listing = Listing(version, children, end + (end - begin))
        return children

    def _restored(self, node: Node) -> Node:
        """The node, or the one that has taken its place since the kernel forgot it."""
        if node.inode in self._nodes or (key := self._key(node)) is None:
            return node
        self._nodes[node.inode] = node
        other = self._by_key.setdefault(key, node)
        if other is not node:
            del self._nodes[node.inode]
        return other

    async def refresh(self, node: VolumeNode) -> VolumeInfo:
        """What the backend tells of the volume, no older than FRESH_SECONDS."""
        if trio.current_time() - node.read_at > FRESH_SECONDS:
            changes = node.changes
            node.info = await node.backend.stat(node.info.source)
            if node.changes == changes:
                node.read_at = trio.current_time()
        return node.info

    def resized(self, node: VolumeNode, size: int) -> None:
        """An open of the volume has told its size; older news must not come back when it is closed."""
        if node.info.size != size:
            node.info = replace(node.info, size=size)

    def remember(self, node: Node) -> None:
        """The kernel was told of the node once more."""
        node.lookups += 1
        if node.inode not in self._nodes:  # forgotten while a listing still held it
            self._nodes[node.inode] = node
            if (key := self._key(node)) is not None:
                self._by_key.setdefault(key, node)

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel gave up references; the last one ends the node."""
        node = self._nodes.get(inode)
        if node is not None:
            node.lookups -= lookups
            self.drop_unknown([node])

    def drop_unknown(self, nodes: Sequence[Node]) -> None:
        """Let go of nodes that the kernel was never told of, or has forgotten."""
        for node in nodes:
            if node.lookups <= 0 and not isinstance(node, RootNode | AttachedNode):
                self._nodes.pop(node.inode, None)
                key = self._key(node)
                if key is not None and self._by_key.get(key) is node:
                    del self._by_key[key]

    def _of(self, parent: DirectoryNode, entry: Entry) -> Node:
        if isinstance(entry, Directory):
            return self._directory(parent.backend, (*parent.path, entry.name))
        return self._volume(parent.backend, entry, trio.current_time())

    def _directory(self, backend: Backend, path: tuple[str, ...]) -> Node:
        return self._get((backend, path), lambda inode: DirectoryNode(inode, backend=backend, path=path))

    def _volume(self, backend: Backend, info: VolumeInfo, read_at: float) -> VolumeNode:
        node = self._get(
            (backend, info.source),
            lambda inode: VolumeNode(inode, backend=backend, info=info, read_at=read_at),
        )
        assert isinstance(node, VolumeNode)
        if read_at > node.read_at:
            node.info, node.read_at = info, read_at
        return node

    def _get(self, key: Key, make: Callable[[int], Node]) -> Node:
        node = self._by_key.get(key)
        if node is None:
            node = self._by_key[key] = make(next(self._numbers))
            self._nodes[node.inode] = node
        return node

    @staticmethod
    def _key(node: Node) -> Key | None:
        match node:
            case DirectoryNode():
                return node.backend, node.path
            case VolumeNode():
                return node.backend, node.info.source
        return None
