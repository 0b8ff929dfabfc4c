"""The extended attributes `user.volfs.*`: what volfs knows of a file, for people and for volfs's own clients.

Names are listed without asking a backend, since tools list them for each file of a directory; only reading one that
costs a question asks it.
"""

from __future__ import annotations

from volfs.errors import VolfsError
from volfs.fuse.handles import OpenFiles
from volfs.fuse.tree import DirectoryNode, Node, RootNode, VolumeNode
from volfs.version import VERSION

PREFIX = "user.volfs."
ROOT_NAMES = ("control", "version")
DIRECTORY_NAMES = ("backend", "driver")
VOLUME_NAMES = ("source", "driver", "backend", "size", "read_only", "sessions", "identity")


def names(node: Node) -> list[str]:
    """The attributes of a node, without the prefix."""
    match node:
        case RootNode():
            return list(ROOT_NAMES)
        case DirectoryNode():
            return list(DIRECTORY_NAMES)
        case VolumeNode():
            return [*VOLUME_NAMES, *node.backend.describes]
    return []


async def value(node: Node, name: str, files: OpenFiles, control: str) -> str:
    """The text of one attribute of `names(node)`; an empty one where the backend has nothing to tell."""
    match node:
        case RootNode():
            return {"control": control, "version": VERSION}[name]
        case DirectoryNode():
            return {"backend": node.backend.name, "driver": node.backend.driver}[name]
        case VolumeNode() if name in VOLUME_NAMES:
            return {
                "source": node.info.source.url,
                "driver": node.backend.driver,
                "backend": node.backend.name,
                "size": str(node.info.size),
                "read_only": "yes" if node.info.read_only else "no",
                "sessions": str(len(files.of(node.backend, node.info.source))),
                "identity": node.info.identity,
            }[name]
        case VolumeNode():
            return (await node.backend.describe(node.info.source)).get(name, "")
    raise VolfsError(f"{name}: no such attribute")
