"""What the README says of the commands, against the commands: their names, exit codes, and each line on stderr."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Run
from mounts import Mount, mounted
from services import TOP, Services
from volumes import ceph_environment

import volfs
from volfs import cli, errors
from volfs.errors import error_text

TEXT = (TOP / "README.md").read_text()
SECTION = TEXT[TEXT.index("\n## Commands\n") : TEXT.index("\n## What does not work yet\n")]
COMMANDS = cli.app.commands


def table(header: str) -> list[list[str]]:
    """The rows of the section's table that begins with this header."""
    lines = SECTION[SECTION.index(f"| {header} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@dataclass(frozen=True)
class Mistake:
    """A row of the table of errors."""

    command: str
    line: str
    code: int
    kind: str = ""
    number: str = ""


MISTAKES = [
    Mistake(command.strip("`"), line.strip("`"), int(code), *re.findall(r"`(\w+)`", python))
    for command, line, code, python in table("command")
]


VOLUMES = {"a": b"a" * 1024, "b": b"b" * 1024, "small": bytes(512)}


# The commands


def test_the_commands_are_those_of_the_help() -> None:
    named = re.search(r"^`volfs ([a-z |]+)`, each with `--help`", SECTION, re.MULTILINE)
    assert named is not None
    assert named[1].split(" | ") == [*COMMANDS]


def test_every_command_in_the_text_exists() -> None:
    used = set(re.findall(r"\bvolfs ([a-z]+) (?=[-/<$\[a-z]*[:/.\-])", TEXT)) - {"resize"}
    assert used <= COMMANDS.keys()
    assert {"mount", "umount", "attach", "detach", "copy", "verify"} <= used


def test_the_commands_with_json_are_these() -> None:
    named = re.search(r"`--help`; (.*?) take `--json`", SECTION, re.DOTALL)
    assert named is not None
    takes = [
        name for name, command in COMMANDS.items() if "--json" in str([it.opts for it in command.params])
    ]
    assert sorted(re.findall(r"`(\w+)`", named[1])) == sorted(takes)


def test_the_exit_codes_are_in_every_help() -> None:
    assert [row[0] for row in table("exit code")] == ["0", "1", "2"]
    for name, command in COMMANDS.items():
        codes = re.search(r"Exit codes: 0 (\w+), 1 ([\w ]+), 2 wrong usage", command.epilog)
        assert codes is not None, name
        verify = name == "verify"
        assert (codes[1], codes[2]) == (("same", "different or failed") if verify else ("done", "failed"))


# The errors


def test_every_kind_of_error_has_a_row() -> None:
    kinds = {
        cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, OSError)
    }
    assert {row.kind for row in MISTAKES if row.kind} == kinds - {"OSError"}
    assert {row.code for row in MISTAKES} == {1, 2}
    assert kinds - {"OSError"} <= set(dir(volfs))


@dataclass
class Scene:
    """A machine as in the README's table: what its paths and addresses are here."""

    mount: Mount
    here: Mapping[str, str]
    environment: dict[str, str]

    def translate(self, text: str) -> str:
        pattern = "|".join(map(re.escape, sorted(self.here, key=len, reverse=True)))
        return re.sub(pattern, lambda match: self.here[match[0]], text)


@pytest.fixture(scope="module")
def scene(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("r")
    srv = directory / "srv"
    srv.mkdir()
    for name, content in VOLUMES.items():
        (srv / name).write_bytes(content)
    (directory / "volfs.toml").write_text('[backends.san]\ndriver = "iscsi"\n')
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(
            socket.create_server(("127.0.0.1", 0))
        )  # takes connections, and says nothing
        portal = f"127.0.0.1:{silent.getsockname()[1]}"
        served = directory / "served.toml"
        served.write_text(f'[backends.san]\ndriver = "iscsi"\nportals = ["{portal}"]\ntimeout = 0.25\n')
        mount = stack.enter_context(mounted(directory, [f"file:{srv}"], ["-c", str(served)]))
        here = {
            "/srv": str(srv),
            "/mnt": str(mount.path),
            "/run/none": str(directory / "none"),
            "192.0.2.7:3260": portal,
            "192.0.2.7": portal,
            "30 s": "0.25 s",
            "4711": str(os.getpid()),
        }
        environment = {**ceph_environment(services), "VOLFS_SOCKET": str(mount.socket)}
        attached = mount.volfs("attach", f"file:{srv}/a")
        assert attached.returncode == 0, attached.stderr
        stack.enter_context(open(attached.stdout.strip(), "rb"))
        yield Scene(mount, here, environment)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda it: it.command)
def test_the_line_is_what_the_command_says(
    run: Run, scene: Scene, mistake: Mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[BaseException] = []

    def note(exc: BaseException) -> str:
        raised.append(exc)
        return error_text(exc)

    monkeypatch.setattr(cli, "error_text", note)
    monkeypatch.chdir(scene.mount.path.parent)
    name, *arguments = shlex.split(scene.translate(mistake.command))
    assert name == "volfs"
    quiet = ["-q"] if arguments[0] in ("copy", "verify") else []
    done = run(*arguments, *quiet, **scene.environment)
    assert (done.code, done.out, done.err) == (mistake.code, "", f"volfs: {scene.translate(mistake.line)}\n")
    if mistake.kind:
        (exc,) = raised
        assert isinstance(exc, OSError)
        assert (type(exc).__name__, errno.errorcode[exc.errno or 0]) == (mistake.kind, mistake.number)
    else:
        assert raised == []
    # And nothing was changed.
    assert {path.name: path.read_bytes() for path in Path(scene.here["/srv"]).iterdir()} == VOLUMES
