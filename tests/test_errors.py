"""The exceptions: errno, message and what survives pickling; and the tree that errors.py promises in its docstring."""

from __future__ import annotations

import copy
import errno
import pickle
import re

import pytest

import volfs
from volfs import errors
from volfs.control import Failed, failure
from volfs.errors import CopyError, VolfsError, error_text

DEFAULTS = {
    "VolfsError": errno.EIO,
    "SourceError": errno.EINVAL,
    "ConfigError": errno.EINVAL,
    "VolumeNotFound": errno.ENOENT,
    "BackendError": errno.EIO,
    "BackendTimeout": errno.ETIMEDOUT,
    "ControlError": errno.ECONNREFUSED,
    "MountError": errno.ENOTDIR,
    "CopyError": errno.EIO,
}
CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, VolfsError)
]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def test_every_class_is_known_to_this_test() -> None:
    assert {cls.__name__ for cls in CLASSES} == DEFAULTS.keys()


@each_class
def test_is_an_os_error_with_a_fitting_errno_and_its_message_alone_as_text(cls: type[VolfsError]) -> None:
    exc = cls("disk is on fire")
    assert isinstance(exc, OSError)
    assert exc.errno == DEFAULTS[cls.__name__]
    assert exc.strerror == str(exc) == "disk is on fire"


@each_class
def test_takes_the_errno_of_the_cause(cls: type[VolfsError]) -> None:
    exc = cls("full", errno.ENOSPC)
    assert type(exc) is cls  # OSError's constructor likes to choose another class by errno
    assert (exc.errno, str(exc)) == (errno.ENOSPC, "full")


@each_class
@pytest.mark.parametrize("number", [None, errno.ENOSPC, errno.ENOENT])
@pytest.mark.parametrize("duplicate", [lambda exc: pickle.loads(pickle.dumps(exc)), copy.copy])
def test_survives_pickling_and_copying(cls: type[VolfsError], number: int | None, duplicate: object) -> None:
    exc = cls("disk is on fire", number)
    again = duplicate(exc)  # type: ignore[operator]
    assert type(again) is cls
    assert (again.errno, again.strerror, str(again)) == (exc.errno, exc.strerror, str(exc))


@each_class
def test_is_one_line_whatever_name_it_tells(cls: type[VolfsError]) -> None:
    """Names come from users and clusters: line ends, terminal escapes, and bytes that are no UTF-8."""
    exc = cls("a\nb\r\x1b[31m\udcff: no such Ünïcode\u2028")
    assert str(exc) == r"a\nb\r\x1b[31m\udcff: no such Ünïcode\u2028"
    assert str(cls(str(exc))) == str(exc)
    assert failure(exc).error().strerror == exc.strerror


def test_copy_error_keeps_its_offset_when_pickled() -> None:
    again = pickle.loads(pickle.dumps(CopyError("stopped", errno.ENOSPC, offset=4096)))
    assert (again.offset, again.errno, str(again)) == (4096, errno.ENOSPC, "stopped")
    assert CopyError("stopped").offset == 0


@each_class
def test_comes_out_of_the_control_protocol_as_it_went_in(cls: type[VolfsError]) -> None:
    again = failure(cls("no such thing", errno.EBUSY)).error()
    assert type(again) is cls
    assert (again.errno, str(again)) == (errno.EBUSY, "no such thing")


@pytest.mark.parametrize("kind", ["", "OSError", "error_text", "os", "annotations", "NoSuchError", "__doc__"])
def test_failures_of_another_kind_become_the_base_class(kind: str) -> None:
    """A newer daemon may know classes that this client does not, and nothing else may be called by name."""
    exc = Failed(kind=kind, errno=errno.EBUSY, message="busy").error()
    assert type(exc) is VolfsError
    assert (exc.errno, str(exc)) == (errno.EBUSY, "busy")


def test_the_tree_in_the_docstring_is_that_of_the_classes() -> None:
    text = errors.__doc__ or ""
    drawn: list[tuple[int, str]] = [(0, "VolfsError")]
    for line in text.splitlines():
        if match := re.match(r"([ |]*)\|- (\w+)", line):
            drawn.append((match.start(2) // 4 + 1, match[2]))
    tree = {}
    for position, (depth, name) in enumerate(drawn[1:], 1):
        tree[name] = next(other for level, other in reversed(drawn[:position]) if level < depth)
    assert tree == {cls.__name__: cls.__base__.__name__ for cls in CLASSES if cls is not VolfsError}


def test_the_errnos_in_the_docstring_are_the_defaults() -> None:
    text = errors.__doc__ or ""
    for name, told in re.findall(r"\|- (\w+).*\((E[A-Z]+)", text):
        assert errno.errorcode[DEFAULTS[name]] == told, name


@each_class
def test_is_offered_by_the_package(cls: type[VolfsError]) -> None:
    assert getattr(volfs, cls.__name__) is cls


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (VolfsError("disk is on fire"), "disk is on fire"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), "/x: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x\n\udcff"), r"/x\n\udcff: No such file"),
        (ValueError("a\nb"), r"a\nb"),
        (OSError(errno.ENOSPC, None), "No space left on device"),
        (OSError("text without a number"), "text without a number"),
        (ValueError("x"), "x"),
        (ValueError(), "ValueError"),
        (OSError(), "OSError"),
    ],
    ids=repr,
)
def test_error_text_is_one_line_for_people(exc: BaseException, text: str) -> None:
    assert error_text(exc) == text
