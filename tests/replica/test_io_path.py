"""The door to the data plane: every kind of native error has a class, and threads are where they belong."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path

import pytest

from protocol.errors import DiskError, NoSpace, ReplicaDamaged, ReplicaNotFound, StorageError
from replica.io_path import IoPath, translate
from tests.replica.fakes import SIZE_BYTES

ROOT = Path(__file__).parents[2]


def documented_kinds() -> list[str]:
    text = (ROOT / "dataplane" / "binding" / "_dataplane.pyi").read_text()
    match = re.search(r"one of:(.*?)\. The doors translate", text, re.DOTALL)
    assert match
    return re.findall(r'"(\w+)"', match[1])


@pytest.mark.parametrize("kind", documented_kinds())
def test_every_kind_of_native_error_has_a_class_that_says_what_happened(kind: str) -> None:
    error = translate(kind, "because", volume_id="v", path="/d")
    assert type(error) is not StorageError
    assert "{" not in str(error)
    assert any(word in str(error) for word in ("because", "/d", "v"))


def test_the_kinds_are_those_of_the_rust_code() -> None:
    text = (ROOT / "dataplane" / "core" / "src" / "replica" / "error.rs").read_text()
    assert set(re.findall(r'=> "(\w+)"', text)) == set(documented_kinds())


def test_an_unknown_kind_is_internal_and_not_retried() -> None:
    error = translate("nonsense", "why", volume_id="v", path="/d")
    assert (error.code, error.retryable) == ("internal", False)
    assert "nonsense" in str(error) and "why" in str(error)


def test_native_errors_come_out_translated(tmp_path: Path) -> None:
    async def main() -> None:
        io = IoPath(str(tmp_path))
        try:
            with pytest.raises(ReplicaNotFound):
                await io.stats("absent")
            with pytest.raises(ReplicaNotFound):
                await io.set_epoch("absent", 1)
            await io.create_store(str(tmp_path), layer="layer-1", size_bytes=SIZE_BYTES)
            with pytest.raises(StorageError):
                await io.create_store(str(tmp_path), layer="layer-1", size_bytes=SIZE_BYTES)
            (tmp_path / "layer-1" / "map").write_bytes(b"")
            with pytest.raises(ReplicaDamaged):
                await io.open_store(
                    "v", str(tmp_path), chain=("layer-1",), size_bytes=SIZE_BYTES, epoch=0, stamp=(0, 0)
                )
        finally:
            await io.shutdown()
        with pytest.raises((StorageError, RuntimeError)):
            await io.stats("v")

    asyncio.run(main())


def test_operating_system_errors_come_out_translated_and_off_the_event_loop(tmp_path: Path) -> None:
    def full() -> None:
        assert threading.current_thread().name.startswith("short")
        raise OSError(28, "No space left on device")

    def broken() -> None:
        assert threading.current_thread().name.startswith("long")
        raise OSError(5, "Input/output error")

    async def main() -> None:
        io = IoPath(str(tmp_path))
        try:
            with pytest.raises(NoSpace):
                await io.run_short(full)
            with pytest.raises(DiskError, match="Input/output error"):
                await io.run_long(broken)
        finally:
            await io.shutdown()

    asyncio.run(main())
