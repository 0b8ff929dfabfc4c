"""The volfs command: exit codes, one line on stderr for what is wrong, JSON that parses, help that helps, progress."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Run, failed, ran, succeeded
from mounts import VOLFS, Mount, is_mounted, mounted, require_fuse, run_volfs, wait_until
from services import MIB, Services
from volumes import Storage, StoredVolume, random_bytes

from volfs import api, cli, progress

SIZE = MIB
DATA = random_bytes(SIZE)
COMMANDS = ("mount", "umount", "attach", "detach", "ls", "info", "copy", "verify", "status")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, module_storage: Storage) -> Iterator[Mount]:
    """One for all tests here, with a directory of files and a pool of RBD images."""
    prefixes = [module_storage.prefix(driver) for driver in ("file", "rbd")]
    environment = module_storage.environment("rbd")
    with mounted(tmp_path_factory.mktemp("cli"), prefixes, env=environment) as mount:
        yield mount


@pytest.fixture(scope="module")
def stored(module_storage: Storage) -> dict[str, StoredVolume]:
    """A volume of each driver: to make and remove them takes longer than most tests here."""
    return {driver: module_storage.make(driver, SIZE) for driver in ("file", "rbd")}


@pytest.fixture
def volume(request: pytest.FixtureRequest, stored: dict[str, StoredVolume]) -> StoredVolume:
    """A file volume (or, as the parameter says, another driver's) with DATA on it."""
    made = stored[getattr(request, "param", "file")]
    made.write(DATA)
    return made


@pytest.fixture
def no_daemon(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has no daemon."""
    return {"XDG_RUNTIME_DIR": str(tmp_path), "VOLFS_SOCKET": ""}


@pytest.fixture
def ask(run: Run, daemon: Mount) -> Run:
    """Run the command as a client of the daemon."""
    return functools.partial(run, VOLFS_SOCKET=str(daemon.socket), **daemon.environment)


# Usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    assert f"Example: volfs {command} " in text
    assert re.search(r"Exit codes: 0 \w+, 1 .*, 2 wrong usage", text), text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_the_help_is_a_command_line(command: str) -> None:
    parser = cli.app.commands[command]
    example = re.match(r"Example: volfs (.*?)\. Exit codes", parser.epilog or "")
    assert example, parser.epilog
    name, *arguments = example[1].split()
    assert name == command
    parser.make_context(name, arguments)  # an exception otherwise


def test_help_names_every_command(run: Run) -> None:
    done = run("--help")
    assert (done.code, done.err) == (0, "")
    assert re.findall(r"^  ([a-z]+) ", done.out.partition("Commands:")[2], re.MULTILINE) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command; see volfs --help"),
        (["nosuch"], "No such command 'nosuch'; see volfs --help"),
        (["mont"], "No such command 'mont'. (Did you mean one of: 'mount', 'umount'?); see volfs --help"),
        (["--nosuch"], "No such option '--nosuch'; see volfs --help"),
        (["mount"], "Missing argument 'MOUNTPOINT'; see volfs mount --help"),
        (["copy", "a"], "Missing argument 'TARGET'; see volfs copy --help"),
        (["copy", "a", "b", "c"], "Got unexpected extra argument (c); see volfs copy --help"),
        (["verify", "--json=1", "a", "b"], "Option '--json' does not take a value; see volfs --help"),
        (["status", "extra"], "Got unexpected extra argument (extra); see volfs status --help"),
        (["attach"], "attach: expected either a SOURCE or --connection-info"),
        (
            ["attach", "file:/x", "--connection-info", "y"],
            "attach: expected either a SOURCE or --connection-info",
        ),
        (["ls", "rbd:a/b/c"], "rbd:a/b/c: expected rbd:POOL[/NAMESPACE], or rbd: for all pools"),
        (["info", "file:x"], "file:x: expected file:/PATH, the absolute path of a file"),
        (["info", "rbd:a\nb"], r"rbd:a\nb: expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]"),
        (
            ["mount", "/mnt", "nfs:x"],
            "'nfs:x': not a volume's URL; expected one that begins with rbd:, iscsi:, block:, file:",
        ),
        (
            ["mount", "/mnt", "-o", "nosuid"],
            "-o nosuid: expected allow_other, ro, rw, uid=, gid=, mode= or read_ahead=, separated by commas",
        ),
        (
            ["mount", "/mnt", "-o", "mode=999"],
            "mount.mode: expected octal permissions such as \"0640\", not '999'",
        ),
        (["mount", "/mnt", "-c", "/nonexistent.toml"], "/nonexistent.toml: No such file or directory"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_and_2(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    failed(run(*arguments, XDG_RUNTIME_DIR=str(tmp_path)), 2, message)
    assert list(tmp_path.iterdir()) == []  # no daemon was started to find that out


def test_numbers_are_checked(run: Run) -> None:
    for arguments in (["detach", "--wait", "long", "x"], ["mount", "/mnt", "--exit-idle", "x"]):
        done = run(*arguments)
        assert done.code == 2
        assert re.fullmatch(rf"volfs: Invalid value for '{arguments[-2]}'.*--help\n", done.err) or (
            "--wait" in done.err and done.err.count("\n") == 1
        )


def test_python_m_volfs_is_the_command() -> None:
    done = ran(run_volfs("nosuch"))
    assert (done.code, done.out) == (2, "")
    assert done.err == "volfs: No such command 'nosuch'; see volfs --help\n"


def test_an_installed_command_is_the_command() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("volfs"), "nosuch"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "volfs: No such command 'nosuch'; see volfs --help\n")


# No daemon


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["detach", "x"], ["ls"]])
def test_without_a_daemon(run: Run, tmp_path: Path, command: list[str]) -> None:
    done = run(*command, XDG_RUNTIME_DIR=str(tmp_path), VOLFS_SOCKET="")
    failed(done, 1, f"no volfs daemon answers at {tmp_path}/volfs/control: No such file or directory")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/", "/: not on a volfs mount"),
        ("/nonexistent", "/nonexistent: No such file or directory"),
    ],
)
def test_umount_and_info_of_what_is_no_mount(run: Run, path: str, message: str) -> None:
    failed(run("umount", path), 1, message)
    failed(run("info", path), 1, message)


# ls, info, status


@pytest.mark.parametrize("volume", ["file", "rbd"], indirect=True)
def test_ls_of_a_source_prefix(run: Run, volume: StoredVolume) -> None:
    rows = json.loads(succeeded(run("ls", "--json", volume.prefix, **volume.environment)))
    (row,) = (row for row in rows if row["name"] == volume.place[-1])
    assert row == {
        "name": volume.place[-1],
        "type": "volume",
        "size": SIZE,
        "modified": row["modified"],
        "read_only": False,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", row["modified"])
    text = succeeded(run("ls", volume.prefix, **volume.environment))
    assert re.search(rf"^ +1\.0 MB  {row['modified']}  {volume.place[-1]}$", text, re.MULTILINE)


def test_ls_of_a_mount(ask: Run, run: Run, daemon: Mount, volume: StoredVolume) -> None:
    assert succeeded(ask("ls")) == succeeded(run("ls", daemon.path))
    rows = json.loads(succeeded(ask("ls", "--json")))
    assert rows == [{"name": name, "type": "directory"} for name in ("attached", "file", "rbd")]
    rows = json.loads(succeeded(ask("ls", "--json", daemon.path / "file")))
    assert (volume.place[-1], SIZE) in [(row["name"], row["size"]) for row in rows]
    text = succeeded(ask("ls", daemon.path))
    assert [line.split()[-1] for line in text.splitlines()] == ["attached/", "file/", "rbd/"]


def test_ls_of_nothing(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    assert json.loads(run("ls", "--json", f"file:{tmp_path}/empty").out) == []
    assert run("ls", f"file:{tmp_path}/empty").out.strip() == ""
    failed(run("ls", f"file:{tmp_path}/none"), 1, f"{tmp_path}/none: no such file or device")
    failed(run("ls", f"{tmp_path}/none"), 1, f"{tmp_path}/none: No such file or directory")


def test_ls_into_a_pipe_that_is_closed(daemon: Mount) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(
            [*VOLFS, "ls", str(daemon.path)], stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("volume", ["file", "rbd"], indirect=True)
def test_info_of_a_source_and_of_a_path(run: Run, daemon: Mount, volume: StoredVolume) -> None:
    by_source = json.loads(succeeded(run("info", "--json", volume.url, **volume.environment)))
    assert by_source["source"] == volume.url
    assert (by_source["driver"], by_source["size"], by_source["read_only"]) == (volume.driver, SIZE, False)
    path = daemon.path.joinpath(volume.driver, *volume.place)
    by_path = json.loads(succeeded(run("info", "--json", path)))
    assert (by_path["path"], by_path["source"], by_path["driver"]) == (str(path), volume.url, volume.driver)
    assert by_path["sessions"] == "0"
    text = succeeded(run("info", volume.url, **volume.environment))
    assert f"source:        {volume.url}\n" in text
    assert volume.users() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rbd:nosuch/x", "rbd:nosuch: no such pool"),
        ("rbd:volumes/nosuch", "rbd:volumes/nosuch: no such image"),
        ("rbd:volumes/nosuch@s", "rbd:volumes/nosuch@s: no such image"),
        ("file:/nonexistent", "/nonexistent: no such file or device"),
        ("block:/nonexistent", "/nonexistent: no such file or device"),
        ("block:/dev/null", "/dev/null: not a block device"),
    ],
)
def test_info_of_what_is_not_there(run: Run, module_storage: Storage, url: str, message: str) -> None:
    failed(run("info", url, **module_storage.environment("rbd")), 1, message)


def test_conf_and_id_are_as_cephs_own(run: Run, services: Services) -> None:
    options = ["--conf", str(services.ceph_conf), "--id", services.user]
    environment = {"CEPH_CONF": "/nonexistent", "CEPH_ARGS": f"--keyring {services.keyring} --id other"}
    done = run("ls", "--json", "rbd:", *options, **environment)
    assert done.code == 0, done
    assert {"name": "volumes", "type": "directory"} in json.loads(done.out)
    failed(
        run("ls", "rbd:", "--conf", "/nonexistent"), 1, "/nonexistent: cannot read this Ceph configuration"
    )
    done = run("ls", "rbd:", "--conf", str(services.ceph_conf), "--id", "no body's", **environment)
    assert done.code == 1, done
    assert "client.no body's" in done.err


def test_status_as_text_and_json(ask: Run, run: Run, daemon: Mount, volume: StoredVolume) -> None:
    found = json.loads(succeeded(ask("status", "--json")))
    assert (found["pid"], found["mountpoint"]) == (daemon.process.pid, str(daemon.path))
    assert (found["backends"], found["attached"], found["open"]) == ({"file": "file", "rbd": "rbd"}, [], [])
    text = succeeded(run("status", "--socket", daemon.socket))
    assert text.startswith(f"{daemon.path}: volfs ")
    assert "backends: file (file), rbd (rbd)" in text


# attach, detach


def test_attach_and_detach(ask: Run, daemon: Mount, volume: StoredVolume) -> None:
    path = succeeded(ask("attach", volume.url)).strip()
    assert path == f"{daemon.path}/attached/{volume.place[-1]}"
    assert Path(path).read_bytes() == DATA
    (attached,) = json.loads(succeeded(ask("status", "--json")))["attached"]
    assert (attached["source"], attached["handles"]) == (volume.url, 0)
    assert succeeded(ask("detach", path)) == ""
    assert not Path(path).exists()
    failed(ask("detach", path), 1, f"{path}: nothing of that name, URL or path is attached")


@pytest.mark.parametrize("by", ["name", "url", "path"])
def test_attach_by_name_as_json(ask: Run, daemon: Mount, volume: StoredVolume, by: str) -> None:
    found = json.loads(succeeded(ask("attach", "--json", "--name", "my disk", volume.url)))
    assert found == {
        "path": f"{daemon.path}/attached/my disk",
        "name": "my disk",
        "source": volume.url,
        "driver": "file",
        "size": SIZE,
    }
    what = {"name": "my disk", "url": volume.url, "path": found["path"]}[by]
    assert succeeded(ask("detach", what)) == ""


def test_detach_while_it_is_open(ask: Run, volume: StoredVolume) -> None:
    path = Path(succeeded(ask("attach", volume.url)).strip())
    with path.open("rb"):
        done = ask("detach", path.name, "--wait", "0")
        failed(done, 1, f"{path.name}: still open by process {os.getpid()}")
        assert path.exists()
    assert succeeded(ask("detach", path.name)) == ""


def test_attach_with_hold_detaches_when_it_ends(daemon: Mount, volume: StoredVolume) -> None:
    environment = {**os.environ, "VOLFS_SOCKET": str(daemon.socket)}
    with subprocess.Popen(
        [*VOLFS, "attach", "--hold", volume.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path.read_bytes() == DATA
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "")
    wait_until(lambda: not path.exists(), "detached")


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_attach_by_connection_info(
    ask: Run, daemon: Mount, loop_device: Callable[..., Path], tmp_path: Path, way: str
) -> None:
    device = loop_device(SIZE)
    info = json.dumps({"driver_volume_type": "local", "data": {"device_path": str(device)}})
    (tmp_path / "info.json").write_text(info)
    where = str(tmp_path / "info.json") if way == "file" else "-"
    done = ran(
        run_volfs(
            "attach",
            "--connection-info",
            where,
            env={"VOLFS_SOCKET": str(daemon.socket)},
            input=info if way == "stdin" else "",
        )
    )
    path = Path(succeeded(done).strip())
    assert path.read_bytes() == bytes(SIZE)
    assert succeeded(ask("detach", path.name)) == ""


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (None, 1, "{path}: No such file or directory"),
        ("", 2, "{path}: expected a connection info as JSON: Expecting value: line 1 column 1 (char 0)"),
        ("{", 2, "{path}: expected a connection info as JSON: "),
        (b"\xff", 2, "{path}: expected a connection info as JSON: 'utf-8' codec"),
        ("[" * 100_000, 2, "{path}: expected a connection info as JSON: "),
        ("[1, 2]", 2, "{path}: expected a connection info, an object"),
        ('"file:/etc/passwd"', 2, "{path}: expected a connection info, an object"),
        ("5", 2, "{path}: expected a connection info, an object"),
        ("null", 2, "{path}: expected a connection info, an object"),
        ("{}", 2, "connection info: driver_volume_type: expected the name of a protocol"),
        (
            '{"driver_volume_type": "smbfs", "data": {}}',
            2,
            "connection info: no driver for 'smbfs'; volfs knows rbd, iscsi, local, ",
        ),
        (
            '{"driver_volume_type": "local", "data": {"device_path": "sda"}}',
            2,
            "connection info of type local: data.device_path: expected an absolute path",
        ),
        ('{"data": "\\ud800"}', 2, "expected a source of UTF-8 text, or of what JSON has: "),
    ],
    ids=repr,
)
def test_connection_infos_that_are_wrong(
    run: Run, daemon: Mount, tmp_path: Path, text: str | bytes | None, code: int, message: str
) -> None:
    path = tmp_path / "info.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run("attach", "--connection-info", str(path), VOLFS_SOCKET=str(daemon.socket))
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("volfs: " + message.format(path=path)), done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("file:/nonexistent", 1, "/nonexistent: no such file or device"),
        ("rbd:x", 2, "rbd:x: expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]"),
        ("block:/dev/null", 1, "/dev/null: not a block device"),
        ("file:/\udcff", 2, None),
    ],
)
def test_attach_of_what_is_no_volume(ask: Run, source: str, code: int, message: str | None) -> None:
    done = ask("attach", source)
    if message is None:
        assert (done.code, done.err.count("\n")) == (code, 1), done
        assert "Traceback" not in done.err
    else:
        failed(done, code, message)


@pytest.mark.parametrize("name", ["", "..", "a/b", "x" * 256])
def test_attach_by_a_name_that_no_file_can_have(ask: Run, volume: StoredVolume, name: str) -> None:
    done = ask("attach", volume.url, f"--name={name}")
    assert done.code == 2
    assert re.fullmatch(r"volfs: .*expected a file name.*\n", done.err), done.err


# copy and verify


@dataclass
class Sides:
    """A volume, by every name there is for it."""

    daemon: Mount
    directory: Path
    volume: StoredVolume

    def named(self, kind: str) -> str:
        match kind:
            case "url":
                return self.volume.url
            case "path":
                return str(self.daemon.path.joinpath(self.volume.driver, *self.volume.place))
        return str(self.directory / "ordinary")


@pytest.fixture(params=["file", "rbd"])
def sides(
    request: pytest.FixtureRequest, daemon: Mount, stored: dict[str, StoredVolume], tmp_path: Path
) -> Sides:
    return Sides(daemon, tmp_path, stored[request.param])


@pytest.mark.parametrize("kind", ["url", "path"])
@pytest.mark.parametrize("verify", [False, True])
def test_copy_from_a_volume_to_an_ordinary_file(ask: Run, sides: Sides, kind: str, verify: bool) -> None:
    """Which is made, or cut to the volume's length."""
    sides.volume.write(DATA)
    target = Path(sides.named("ordinary"))
    if verify:
        target.write_bytes(b"old" * SIZE)
    done = ask("copy", *(["--verify"] if verify else []), sides.named(kind), target)
    assert done.code == 0, done
    assert target.read_bytes() == DATA
    assert target.stat().st_mode & 0o077 == 0 or verify
    assert f"{sides.named(kind)} -> {target}: {SIZE} bytes copied in " in done.out
    assert ("identical" in done.out) is verify
    assert sides.volume.users() == []


@pytest.mark.parametrize("kind", ["url", "path"])
def test_copy_from_an_ordinary_file_to_a_volume(ask: Run, sides: Sides, kind: str) -> None:
    data = random_bytes(SIZE // 2, seed=3)
    sides.volume.write(DATA)
    Path(sides.named("ordinary")).write_bytes(data)
    done = ask("copy", "--json", "-q", "--verify", sides.named("ordinary"), sides.named(kind))
    found = json.loads(succeeded(done))
    assert found == {
        "source": sides.named("ordinary"),
        "target": sides.named(kind),
        "size": SIZE // 2,
        "seconds": found["seconds"],
        "verified": True,
    }
    assert sides.volume.users() == []
    assert sides.volume.read() == data + DATA[SIZE // 2 :]


def test_copy_between_volumes_and_verify(ask: Run, stored: dict[str, StoredVolume]) -> None:
    stored["file"].write(DATA)
    stored["rbd"].write(bytes(SIZE))
    urls = stored["file"].url, stored["rbd"].url
    assert ask("copy", "-q", *urls).code == 0
    assert stored["rbd"].read() == DATA
    done = ask("verify", "-q", *urls)
    assert re.fullmatch(rf"{urls[0]} -> {urls[1]}: {SIZE} bytes .*identical in .*\n", succeeded(done))
    found = json.loads(succeeded(ask("verify", "-q", "--json", *urls)))
    assert (found["size"], found["verified"]) == (SIZE, True)

    stored["rbd"].write(b"\0", offset=700_001)
    differs = ask("verify", "-q", *urls)
    expected = 700_001 if DATA[700_001] else None
    assert expected, "the seed puts a zero there"
    failed(differs, 1, f"contents differ at offset {expected}")


def test_copy_between_volumes_of_one_name(ask: Run, tmp_path: Path) -> None:
    for directory, content in (("one", DATA), ("other", bytes(SIZE))):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "disk").write_bytes(content)
    succeeded(ask("copy", "-q", f"file:{tmp_path}/one/disk", f"file:{tmp_path}/other/disk"))
    assert (tmp_path / "other" / "disk").read_bytes() == DATA


def test_copy_of_ordinary_files_needs_no_daemon(run: Run, tmp_path: Path, no_daemon: dict[str, str]) -> None:
    (tmp_path / "a").write_bytes(DATA)
    assert run("copy", "-q", tmp_path / "a", tmp_path / "b", **no_daemon).code == 0
    assert (tmp_path / "b").read_bytes() == DATA
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_copy_of_an_empty_file(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a").touch()
    done = run("copy", "--verify", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.code == 0, done
    assert (tmp_path / "b").read_bytes() == b""


def test_copy_to_a_block_device(tmp_path: Path, loop_device: Callable[..., Path], run: Run) -> None:
    device = loop_device(2 * SIZE)
    (tmp_path / "a").write_bytes(DATA)
    assert run("copy", "--verify", str(tmp_path / "a"), str(device)).code == 0
    assert device.read_bytes() == DATA + bytes(SIZE)
    done = run("copy", str(device), str(tmp_path / "b"))
    assert done.code == 0
    assert (tmp_path / "b").read_bytes() == DATA + bytes(SIZE)


@pytest.mark.parametrize("verb", ["copy", "verify"])
def test_a_source_larger_than_the_target(
    ask: Run, stored: dict[str, StoredVolume], tmp_path: Path, verb: str
) -> None:
    """Refused before a byte is written, or compared."""
    volume = stored["rbd"]
    volume.write(DATA)
    (tmp_path / "big").write_bytes(bytes(SIZE + 1))
    done = ask(verb, "-q", tmp_path / "big", volume.url)
    message = {
        "copy": f"the target is too small: {SIZE} bytes, expected at least {SIZE + 1}",
        "verify": f"{volume.url} has {SIZE} bytes, {tmp_path}/big has {SIZE + 1}",
    }[verb]
    failed(done, 1, message)
    assert volume.read() == DATA


def test_verify_with_a_larger_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "b").write_bytes(DATA + b"more")
    assert run("verify", "-q", str(tmp_path / "a"), str(tmp_path / "b")).code == 0


def test_source_and_target_that_are_the_same(ask: Run, sides: Sides) -> None:
    sides.volume.write(DATA)
    for source, target in (("url", "url"), ("path", "path"), ("url", "path"), ("path", "url")):
        done = ask("copy", "-q", sides.named(source), sides.named(target))
        failed(done, 1, "source and target are the same volume")
    assert sides.volume.read() == DATA


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "{path}: No such file or directory"),
        (lambda path: path.mkdir(), "{path}: expected a file, a volume or a block device"),
        (lambda path: os.mkfifo(path), "{path}: expected a file, a volume or a block device"),
        (lambda path: path.symlink_to("/dev/null"), "{path}: expected a file, a volume or a block device"),
        (lambda path: path.symlink_to(path), "{path}: Too many levels of symbolic links"),
    ],
    ids=["missing", "directory", "fifo", "device", "loop"],
)
def test_a_source_that_is_no_file(
    run: Run, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "source")
    for verb in ("copy", "verify"):
        done = run(verb, str(tmp_path / "source"), str(tmp_path / "target"))
        failed(done, 1, message.format(path=tmp_path / "source"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "{path}: Is a directory"),
        (lambda path: os.mkfifo(path), "{path}: expected a file, a volume or a block device"),
        (lambda path: path.symlink_to("none/x"), "{path}: No such file or directory"),
    ],
    ids=["directory", "fifo", "no-directory"],
)
def test_a_target_that_is_no_file(
    run: Run, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "source").write_bytes(DATA)
    make(tmp_path / "target")
    done = run("copy", str(tmp_path / "source"), str(tmp_path / "target"))
    failed(done, 1, message.format(path=tmp_path / "target"))


def test_a_target_on_the_mount_is_not_made(ask: Run, daemon: Mount, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    target = daemon.path / "file" / "new"
    failed(ask("copy", tmp_path / "source", target), 1, f"{target}: Operation not permitted")


def test_a_snapshot_as_target(ask: Run, module_storage: Storage, tmp_path: Path) -> None:
    volume = module_storage.make("rbd", SIZE, DATA)
    url = volume.protect()
    (tmp_path / "source").write_bytes(bytes(SIZE))
    done = ask("copy", "-q", tmp_path / "source", url)
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(r"volfs: .*Read-only file system\n", done.err), done.err
    done = ask("copy", "-q", url, tmp_path / "target")
    assert done.code == 0
    assert (tmp_path / "target").read_bytes() == DATA
    volume.remove()


# Progress


def test_progress_on_no_terminal_is_lines(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a").write_bytes(DATA)
    done = run("copy", "--verify", str(tmp_path / "a"), str(tmp_path / "b"))
    first, second = done.err.splitlines()
    for title, line in (("copy", first), ("verify", second)):
        assert re.fullmatch(rf"{title}: 100% 1\.0 MB of 1\.0 MB, \S+ \wB/s, 0 s left", line), line
    assert run("copy", "-q", str(tmp_path / "a"), str(tmp_path / "b")).err == ""


def test_progress_lines_come_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.show("copy", quiet=False) as shown:
        assert shown is not None
        for second in range(0, 21):
            now = 100.0 + second
            shown(max(1, second) * 1_000_000, 20_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["25%", "50%", "75%", "100%"]
    assert lines[1] == "copy: 50% 10.0 MB of 20.0 MB, 1.0 MB/s, 10 s left"


def on_terminal(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command with stderr on a terminal: exit code, output, and what the terminal got."""
    terminal, inner = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO is the end of a terminal
            while data := os.read(terminal, 65536):
                shown.append(data)

    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    reader = threading.Thread(target=read)
    reader.start()
    try:
        process = subprocess.run(
            [*VOLFS, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=inner,
            text=True,
            env=environment,
            check=False,
        )
    finally:
        os.close(inner)
        reader.join(10)
        os.close(terminal)
    return process.returncode, process.stdout, b"".join(shown).decode()


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    code, out, shown = on_terminal("copy", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert "bytes copied in" in out
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"copy ━+ +100% 1\.0/1\.0 MiB (\?|\S+ \wB/s) 0:00:00", plain), plain
    code, _, shown = on_terminal("copy", "-q", tmp_path / "a", tmp_path / "b")
    assert (code, shown) == (0, "")


# mount in the background


@pytest.mark.slow
def test_mount_with_daemon_returns_when_io_works_and_umount_ends_it(tmp_path: Path, volumes: Path) -> None:
    """Also with the socket named by a relative path: the daemon has a working directory of its own."""
    require_fuse()
    (volumes / "raw").write_bytes(DATA)
    (tmp_path / "mnt").mkdir()
    (tmp_path / "run").mkdir(mode=0o700)
    try:
        done = ran(
            run_volfs("mount", "mnt", f"file:{volumes}", "--daemon", "--socket", "run/control", cwd=tmp_path)
        )
        assert (done.code, done.out) == (0, "mnt: ready (file, attached)\n"), done
        assert (tmp_path / "mnt/file/raw").read_bytes() == DATA
        assert (tmp_path / "run/control").is_socket()
        assert api.status(socket_path=str(tmp_path / "run/control")).mountpoint == str(tmp_path / "mnt")
        done = ran(
            run_volfs(
                "mount", "mnt", f"file:{volumes}", "--daemon", cwd=tmp_path, env={"VOLFS_SOCKET": "run/2"}
            )
        )
        failed(done, 1, f"{tmp_path}/mnt: something is mounted there already")
    finally:
        done = ran(run_volfs("umount", "mnt", cwd=tmp_path))
    assert succeeded(done) == ""
    assert not is_mounted(tmp_path / "mnt")
    assert not (tmp_path / "run/control").exists()
