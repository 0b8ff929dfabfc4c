"""What tests of encrypted volumes have in common: LUKS headers, and cryptsetup past os-brick and volfs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kernel_targets import succeed
from services import MIB

HEADER = 2 * MIB  # of LUKS 1, as cryptsetup makes it
SIGNATURE = b"LUKS\xba\xbe"
# What makes a passphrase cheap, of the commands that begin so.
CHEAP = {
    ("cryptsetup", "luksFormat"): "--pbkdf-force-iterations 1000",
    ("qemu-img", "create"): "-o iter-time=1",
}
# qemu-img measures its processor in any case, by a clock that in the guest goes by ten milliseconds, and gives up when
# that has not moved meanwhile.
NOT_MEASURED = "Unable to get accurate CPU usage"


def quick_passphrases(directory: Path) -> str:
    """A value of PATH that has cryptsetup and qemu-img spend no time on passphrases; it needs the new `directory`.

    They make one as dear as takes this processor two seconds, to whoever guesses or knows it, and neither os-brick
    nor Cinder can tell them otherwise; the disks of tests are nobody's to guess.
    """
    directory.mkdir()
    for (program, command), options in CHEAP.items():
        script, real = directory / program, shutil.which(program)
        script.write_text(f"""#!/bin/sh
case " $* " in
*" {command} "*) set -- "$@" {options};;
*) exec {real} "$@";;
esac
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    said=$({real} "$@" 2>&1)
    status=$?
    case $said in *"{NOT_MEASURED}"*) ;; *) break;; esac
done
[ -z "$said" ] || echo "$said" >&2
exit "$status"
""")
        script.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@contextlib.contextmanager
def decrypted(stored: Path, passphrase: str, *options: str) -> Iterator[Path]:
    """The device of what a file or device holds; `options` go to cryptsetup."""
    name = f"test-{secrets.token_hex(4)}"
    command = ["cryptsetup", "open", "--type", "luks", "--key-file=-", *options, stored, name]
    subprocess.run(command, input=passphrase.encode(), check=True, timeout=60)
    try:
        yield Path("/dev/mapper") / name
    finally:
        succeed("cryptsetup", "close", name)


def encrypt(device: Path, passphrase: str) -> None:
    """As os-brick does at the first attach, but for the time that the passphrase takes."""
    command = ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--key-file=-"]
    command += [
        "--cipher",
        "aes-xts-plain64",
        "--key-size",
        "256",
        "--pbkdf-force-iterations",
        "1000",
        str(device),
    ]
    subprocess.run(command, input=passphrase.encode(), check=True, timeout=60)


def header_size(begin: bytes) -> int:
    """Bytes before the data, of what begins with a header of LUKS 1."""
    assert begin.startswith(SIGNATURE + b"\0\1"), begin[:8]
    return int.from_bytes(begin[104:108]) * 512
