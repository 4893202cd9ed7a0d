"""Programs of Debian's packages inside the guest, with the shared libraries that they need."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.guest.kernel import get_packages

LIBRARY_DIRS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
LDD_TIMEOUT_S = 10


def nbd_client() -> dict[str, bytes]:
    """``/sbin/nbd-client``: it negotiates and hands the socket to the kernel's NBD driver."""
    root = get_packages("nbd-client", ("nbd-client", "libnl-3-200", "libnl-genl-3-200"))
    return with_libraries(
        root / "sbin/nbd-client", "/sbin/nbd-client", [root / name for name in LIBRARY_DIRS]
    )


def with_libraries(program: Path, guest_path: str, libraries: Sequence[Path]) -> dict[str, bytes]:
    """The program and what ld.so would load for it, from ``libraries`` or from the host, which is the
    same release of Debian."""
    listed = subprocess.run(
        ["ldd", program],
        env={**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))},
        capture_output=True,
        text=True,
        timeout=LDD_TIMEOUT_S,
        check=True,
    ).stdout
    assert "not found" not in listed, listed
    files = {guest_path: program.read_bytes()}
    for name, path in re.findall(r"^\s*(?:(\S+) => )?(/\S+) \(", listed, re.MULTILINE):
        # ld.so itself is named by its path, the others by their names.
        files[f"/lib/x86_64-linux-gnu/{name}" if name else path] = Path(path).read_bytes()
    return files
