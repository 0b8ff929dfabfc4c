"""The volfs command: arguments in, exit codes out. What it does is in the modules a Python program would call.

Exit codes: 0 done; 1 it failed (or `verify` found a difference); 2 the command line, a source or the configuration
is wrong. Errors are one line on stderr; a traceback means a bug.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from typing import Annotated, Any, NoReturn

import typer

from volfs.backends import caller_environment, environment_variables
from volfs.errors import ConfigError, SourceError, error_text

FAILED, WRONG_USE = 1, 2
CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage, source or configuration."

app = typer.Typer(
    name="volfs",
    help="Block volumes of Ceph RBD, iSCSI and local storage as regular files.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Side = Annotated[
    str, typer.Argument(help="A source, a path on a volfs mount, a block device or an ordinary file")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON")]
Socket = Annotated[str | None, typer.Option("--socket", metavar="PATH", help="Control socket of the daemon")]
Conf = Annotated[str | None, typer.Option("--conf", metavar="PATH", help="Ceph configuration, as CEPH_CONF")]
Id = Annotated[
    str | None, typer.Option("--id", metavar="USER", help="Ceph user, as in CEPH_ARGS='--id USER'")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress")]


def _seconds(value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"expected a number of seconds, not {value:g}")
    return value


def main() -> None:
    """Entry point of the volfs command."""
    try:
        code = app(prog_name="volfs", standalone_mode=False)
        sys.stdout.flush()  # here, where an error of it still has an exit code of ours
        sys.exit(code)
    except typer.TyperException as exc:
        context = getattr(exc, "ctx", None)
        command = context.command_path if context else "volfs"
        text = exc.format_message().rstrip(".")
        _fail(f"{text}{'' if text.endswith('?') else ';'} see {command} --help", WRONG_USE)
    except (SourceError, ConfigError) as exc:
        _fail(error_text(exc), WRONG_USE)
    except OSError as exc:
        if isinstance(exc, BrokenPipeError):  # `volfs ls | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        _fail(error_text(exc), FAILED)


@app.command(epilog=f"Example: volfs mount /mnt rbd:volumes --daemon. {CODES}")
def mount(
    mountpoint: Annotated[str, typer.Argument(help="An empty directory")],
    prefixes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE-PREFIX", help="rbd:[POOL], iscsi://PORTAL, block:/DIR, file:/DIR"),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", envvar="VOLFS_CONFIG", help="volfs.toml")
    ] = None,
    options: Annotated[
        str, typer.Option("-o", metavar="OPTIONS", help="allow_other, ro, uid=, gid=, mode=, read_ahead=")
    ] = "",
    daemon: Annotated[bool, typer.Option("--daemon", help="Return when I/O works, and serve on")] = False,
    socket: Socket = None,
    exit_idle: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            callback=_seconds,
            help="End when nothing was attached or open for so long",
        ),
    ] = None,
    conf: Conf = None,
    id: Id = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each failed request")] = False,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    first_request: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Show volumes as files below MOUNTPOINT, until unmounted."""
    from volfs import config as configuration
    from volfs import control, mounting

    if first_request and (refused := mounting.refuse_request(sys.stdin.buffer.readline())):
        sys.stdout.buffer.write(control.encode(refused))
        sys.exit(WRONG_USE)
    _ceph_environment(conf, id)
    settings = configuration.Config()
    if config is not None:
        settings = configuration.load(config)
        for warning in configuration.exposed_secrets(config, settings):
            print(f"volfs: warning: {warning}", file=sys.stderr)
    settings = configuration.add_prefixes(settings, prefixes or [], os.environ)
    settings = configuration.add_options(settings, options)
    what = ", ".join([*settings.backends, "attached"])
    line = f"{mountpoint}: ready ({what})"
    if daemon:
        arguments = [os.path.abspath(mountpoint), *(prefixes or []), *(["-o", options] if options else [])]
        arguments += ["--config", os.path.abspath(config)] if config is not None else []
        arguments += ["--exit-idle", str(exit_idle)] if exit_idle is not None else []
        mounting.serve_in_background([*arguments, *(["-v"] if verbose else [])], socket)
        print(line)
        return

    def ready() -> None:
        print(line, flush=True)
        if ready_fd is not None:
            mounting.tell_parent(ready_fd)

    mounting.log_to_stderr(verbose=verbose)
    if mounting.serve(settings, mountpoint, socket_path=socket, exit_idle=exit_idle, ready=ready):
        sys.exit(FAILED)  # the daemon has logged each


@app.command(epilog=f"Example: volfs umount /mnt. {CODES}")
def umount(
    mountpoint: str,
    force: Annotated[bool, typer.Option("--force", help="Even while files are open")] = False,
) -> None:
    """Unmount, and return when everything has reached the backends."""
    from volfs import api

    api.unmount(os.path.abspath(mountpoint), force=force)


@app.command(epilog=f"Example: volfs attach rbd:volumes/disk-1. {CODES}")
def attach(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE", help="rbd:POOL/IMAGE, iscsi://PORTAL/IQN/LUN, block:/DEV, file:/PATH"
        ),
    ] = None,
    connection_info: Annotated[
        str | None, typer.Option(metavar="FILE", help="A Cinder connection info as JSON, - for stdin")
    ] = None,
    name: Annotated[str | None, typer.Option(help="File name; by default the volume's own")] = None,
    hold: Annotated[bool, typer.Option("--hold", help="Stay, and detach when this process ends")] = False,
    as_json: Json = False,
    socket: Socket = None,
    conf: Conf = None,
    id: Id = None,
) -> None:
    """Attach a volume, print its path, and hold it until `volfs detach`. Starts a daemon when there is none."""
    from volfs import api

    _ceph_environment(conf, id)
    if (source is None) == (connection_info is None):
        raise SourceError("attach: expected either a SOURCE or --connection-info")
    what: Any = source if connection_info is None else _read_json(connection_info)
    attached, client = api.attach(what, name, hold=hold, socket_path=socket)
    facts = {key: getattr(attached, key) for key in ("path", "name", "source", "driver", "size")}
    print(json.dumps(facts) if as_json else attached.path, flush=True)
    if hold:
        client.wait_closed(None)  # as long as the user lets us
    client.close()


@app.command(epilog=f"Example: volfs detach disk-1. {CODES}")
def detach(
    name: Annotated[str, typer.Argument(help="Attached name, path or source")],
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", callback=_seconds, help="For open files to be closed")
    ] = 5.0,
    socket: Socket = None,
) -> None:
    """Detach a volume, and return when its backend has let go of it."""
    from volfs import api

    api.detach(name, wait=wait, socket_path=socket)


@app.command(epilog=f"Example: volfs ls rbd:volumes. {CODES}")
def ls(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE-PREFIX|PATH",
            help="rbd:[POOL], iscsi://PORTAL, /DIR, ...; by default the mountpoint",
        ),
    ] = None,
    as_json: Json = False,
    socket: Socket = None,
    conf: Conf = None,
    id: Id = None,
) -> None:
    """List volumes, without opening them."""
    from volfs import api, report

    _ceph_environment(conf, id)
    rows = report.listing(what or api.status(socket_path=socket).mountpoint, os.environ)
    print(json.dumps(rows) if as_json else report.table(rows))


@app.command(epilog=f"Example: volfs info rbd:volumes/disk-1. {CODES}")
def info(
    what: Annotated[str, typer.Argument(metavar="SOURCE|PATH", help="A source, or a path on a volfs mount")],
    as_json: Json = False,
    conf: Conf = None,
    id: Id = None,
) -> None:
    """Tell what is known of a volume."""
    from volfs import report

    _ceph_environment(conf, id)
    facts = report.facts(what, os.environ)
    print(json.dumps(facts) if as_json else report.lines(facts))


@app.command(
    epilog=f"Example: volfs copy rbd:volumes/disk-1 iscsi://san/iqn.2026-01.org.example:disk/1. {CODES}"
)
def copy(
    source: Side,
    target: Side,
    verify: Annotated[bool, typer.Option("--verify", help="Read both again and compare")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    conf: Conf = None,
    id: Id = None,
) -> None:
    """Copy a volume's content. The target must be large enough; it is not created, unless it is an ordinary file."""
    from volfs import endpoint, progress

    _ceph_environment(conf, id)
    with progress.show("copy", quiet=quiet) as shown:
        done: list[endpoint.Summary] = [endpoint.copy(source, target, progress=shown)]
    if verify:
        # Opened anew, so that nothing cached is taken for what the storage has.
        with progress.show("verify", quiet=quiet) as shown:
            done.append(endpoint.verify(source, target, progress=shown))
    print(json.dumps(done[-1].as_dict()) if as_json else "\n".join(map(str, done)))


@app.command(
    epilog="Example: volfs verify rbd:volumes/disk-1 disk-1.raw. "
    "Exit codes: 0 same, 1 different or failed, 2 wrong usage or source."
)
def verify(
    source: Side,
    target: Side,
    quiet: Quiet = False,
    as_json: Json = False,
    conf: Conf = None,
    id: Id = None,
) -> None:
    """Compare a volume with its copy, which may be larger."""
    from volfs import endpoint, progress

    _ceph_environment(conf, id)
    with progress.show("verify", quiet=quiet) as shown:
        summary = endpoint.verify(source, target, progress=shown)
    print(json.dumps(summary.as_dict()) if as_json else summary)


@app.command(epilog=f"Example: volfs status --json. {CODES}")
def status(as_json: Json = False, socket: Socket = None) -> None:
    """Tell what the daemon serves."""
    import msgspec

    from volfs import api, report

    reply = api.status(socket_path=socket)
    print(msgspec.json.encode(reply).decode() if as_json else report.status(reply))


def _ceph_environment(conf: str | None, id: str | None) -> None:
    """--conf and --id are what CEPH_CONF and CEPH_ARGS say, for this process and those it starts.

    These may work elsewhere, so the paths in there become absolute; what is set to nothing is not set.
    """
    if conf:
        os.environ["CEPH_CONF"] = conf
    if id:
        os.environ["CEPH_ARGS"] = f"{os.environ.get('CEPH_ARGS', '')} --id {shlex.quote(id)}".strip()
    given = caller_environment(os.environ)
    for name in environment_variables():
        os.environ.pop(name, None)
    os.environ.update(given)


def _read_json(path: str) -> Any:
    try:
        if path == "-":
            info = json.load(sys.stdin)
        else:
            with open(path) as file:
                info = json.load(file)
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{path}: expected a connection info as JSON: {exc}") from exc
    if not isinstance(info, dict):
        raise SourceError(f"{path}: expected a connection info, an object, not {type(info).__name__}")
    return info


def _fail(text: str, code: int) -> NoReturn:
    print(f"volfs: {text}", file=sys.stderr)
    sys.exit(code)
