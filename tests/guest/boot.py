"""Boot the guest under QEMU (TCG: it works everywhere) and collect what its script printed.

::

    result = run_guest(disks=[uri], script="dd if=/dev/vda bs=4k count=1 | md5sum", timeout_s=60)
    assert result.exit_code == 0, result.console

Disks are image paths, NBD URIs, or ``Disk`` for more; in the guest they are /dev/vda, /dev/vdb, ...
``booting()`` is the same for tests that must act while the guest runs.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tests.guest.initramfs import BEGIN_MARK, END_MARK, base_archive, script_archive
from tests.guest.kernel import get_kernel
from tests.support.processes import Started, running, wait_until

GUEST_MEMORY_MIB = 256
GUEST_TIMEOUT_S_DEFAULT = 90.0
"""A boot takes 5 s alone on two cores under TCG, several times that beside other tests."""

KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 random.trust_cpu=on tsc=reliable mitigations=off"

Json = dict[str, object]


class Network(Enum):
    """HOST: the guest reaches the host's loopback addresses as 10.0.2.2, by QEMU's user-mode stack.
    It has to take the address 10.0.2.15 itself."""

    NONE = "none"
    HOST = "host"


NETWORK_ARGUMENTS = {
    Network.NONE: (),
    Network.HOST: ("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="),
}


@dataclass(frozen=True, slots=True)
class Disk:
    """``source``: an image's path or an NBD URI. ``reconnect_delay_s``: how long QEMU holds requests
    while an NBD server is away, before the guest sees an error."""

    source: str | Path
    reconnect_delay_s: int = 0
    read_only: bool = False
    serial: str = ""


@dataclass(frozen=True, slots=True)
class GuestResult:
    """``exit_code`` of the script; None when the guest ended without saying it (a panic)."""

    exit_code: int | None
    output: str  # what the script printed
    console: str  # all that came over the serial line
    wall_s: float


class GuestTimeout(Exception):
    """The guest did not power off in time; the text has the end of its console."""


@dataclass(slots=True)
class Guest:
    """A guest that runs."""

    _qemu: Started
    _started_s: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self._qemu.pid

    @property
    def console(self) -> str:
        return self._qemu.output.replace("\r", "")

    def wait_for(self, text: str, *, timeout_s: float = GUEST_TIMEOUT_S_DEFAULT) -> None:
        """Until the console has shown ``text``; fails at once if the guest ends without it."""

        def shown() -> bool:
            ended = self._qemu.process.poll() is not None
            if text in self.console:
                return True
            if ended:
                raise AssertionError(f"the guest ended before it said {text!r}:\n{self.console[-4000:]}")
            return False

        wait_until(shown, timeout_s=timeout_s, what=f"the guest saying {text!r}")

    def wait_for_end(self) -> None:
        """After somebody killed it."""
        wait_until(lambda: self._qemu.process.poll() is not None, what="the end of the guest")

    def result(self, *, timeout_s: float = GUEST_TIMEOUT_S_DEFAULT) -> GuestResult:
        """Wait until the guest has powered itself off. Raises GuestTimeout."""
        try:
            wait_until(lambda: self._qemu.process.poll() is not None, timeout_s=timeout_s)
        except TimeoutError:
            raise GuestTimeout(f"no end within {timeout_s} s:\n{self.console[-4000:]}") from None
        wall_s = time.monotonic() - self._started_s
        _, _, after = self.console.partition(f"{BEGIN_MARK}\n")
        output, mark, rest = after.partition(f"{END_MARK} ")
        return GuestResult(
            exit_code=int(rest.split()[0]) if mark else None,
            output=output,
            console=self.console,
            wall_s=wall_s,
        )


def run_guest(
    *,
    disks: Sequence[str | Path | Disk],
    script: str,
    files: Mapping[str, bytes] | None = None,
    network: Network = Network.NONE,
    timeout_s: float = GUEST_TIMEOUT_S_DEFAULT,
) -> GuestResult:
    """Boot, run ``script`` with busybox's shell, power off. ``files`` are put into the guest."""
    with booting(disks=disks, script=script, files=files, network=network) as guest:
        return guest.result(timeout_s=timeout_s)


@contextlib.contextmanager
def booting(
    *,
    disks: Sequence[str | Path | Disk],
    script: str,
    files: Mapping[str, bytes] | None = None,
    network: Network = Network.NONE,
) -> Iterator[Guest]:
    """The guest while it runs; QEMU is gone when the block ends."""
    kernel = get_kernel()
    with tempfile.TemporaryDirectory(prefix="dolmen-guest-") as name:
        initramfs = Path(name) / "initramfs"
        initramfs.write_bytes(base_archive(kernel).read_bytes() + script_archive(script, files))
        command = [
            *_machine(),
            *("-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", KERNEL_ARGUMENTS),
            *disk_arguments(disks),
            *NETWORK_ARGUMENTS[network],
        ]
        with _qemu(command, Path(name)) as guest:
            yield guest


@contextlib.contextmanager
def booting_from(disk: str | Path | Disk, *others: str | Path | Disk) -> Iterator[Guest]:
    """A guest of which the firmware finds the boot loader on ``disk`` itself: see ``bootable.py``."""
    with tempfile.TemporaryDirectory(prefix="dolmen-guest-") as name:
        with _qemu([*_machine(), *disk_arguments([disk, *others], boot=True)], Path(name)) as guest:
            yield guest


@contextlib.contextmanager
def _qemu(command: Sequence[str], directory: Path) -> Iterator[Guest]:
    with running(command, log=directory / "console") as started:
        yield Guest(started)


def _machine() -> list[str]:
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "pc,accel=tcg", "-cpu", "max", "-smp", "1", "-m", f"{GUEST_MEMORY_MIB}M"),
        *("-serial", "stdio"),
    ]


def disk_arguments(disks: Sequence[str | Path | Disk], *, boot: bool = False) -> list[str]:
    arguments: list[str] = []
    for index, given in enumerate(disks):
        disk = given if isinstance(given, Disk) else Disk(given)
        node: Json = {
            "driver": "raw",
            "node-name": f"disk{index}",
            "read-only": disk.read_only,
            "discard": "unmap",
            "file": _protocol(disk),
        }
        device: Json = {"driver": "virtio-blk-pci", "drive": f"disk{index}", "write-cache": "on"}
        if disk.serial:
            device["serial"] = disk.serial
        if boot:
            device["bootindex"] = index
        arguments += ["-blockdev", json.dumps(node), "-device", json.dumps(device)]
    return arguments


def _protocol(disk: Disk) -> Json:
    """The block driver that reaches the bytes."""
    uri = urllib.parse.urlsplit(str(disk.source))
    common: Json = {"read-only": disk.read_only, "discard": "unmap"}
    if uri.scheme not in ("nbd", "nbd+unix"):
        return common | {"driver": "file", "filename": str(disk.source), "locking": "off"}
    server: Json
    if uri.scheme == "nbd+unix":
        (path,) = urllib.parse.parse_qs(uri.query)["socket"]
        server = {"type": "unix", "path": path}
    else:
        server = {"type": "inet", "host": uri.hostname, "port": str(uri.port or 10809)}
    return common | {
        "driver": "nbd",
        "server": server,
        "export": urllib.parse.unquote(uri.path.removeprefix("/")),
        "reconnect-delay": disk.reconnect_delay_s,
    }
