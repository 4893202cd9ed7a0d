"""Sizes as people write them, and as people read them. Pure; used by the API and by the command."""

from __future__ import annotations

import re

from protocol.errors import BadRequest
from protocol.limits import BLOCK_BYTES, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1024,
    "kib": 1024,
    "m": 1024**2,
    "mib": 1024**2,
    "g": 1024**3,
    "gib": 1024**3,
    "t": 1024**4,
    "tib": 1024**4,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
}
"""One letter is binary, as in qemu-img and lvcreate; KB, MB, GB and TB are decimal."""

_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,9}))?\s*([a-zA-Z]{0,3})", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of "2GiB", "500M", "1.5T" or "4194304", as a volume may have. Raises BadRequest."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[3].lower() not in _UNITS:
        raise BadRequest(reason=f"{text[:40]!r} is not a size. Write for example 2GiB, 500M or 4194304.")
    unit_bytes = _UNITS[match[3].lower()]
    size_bytes = int(match[1]) * unit_bytes
    if match[2]:
        fraction, rest = divmod(int(match[2]) * unit_bytes, 10 ** len(match[2]))
        if rest:
            raise BadRequest(reason=f"{text!r} is not a whole number of bytes. Write it in a smaller unit.")
        size_bytes += fraction
    return check_size(size_bytes)


def check_size(size_bytes: int) -> int:
    """Raises BadRequest, which names the nearest size that works."""
    if size_bytes < VOLUME_BYTES_MIN:
        raise BadRequest(
            reason=f"{size_bytes} byte{'s' * (size_bytes != 1)} is below the smallest volume. "
            f"Ask for {format_size(VOLUME_BYTES_MIN)} or more."
        )
    if size_bytes > VOLUME_BYTES_MAX:
        raise BadRequest(
            reason=f"{size_bytes} bytes is above the largest volume. "
            f"Ask for {format_size(VOLUME_BYTES_MAX)} or less."
        )
    if size_bytes % BLOCK_BYTES:
        up = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        raise BadRequest(
            reason=f"{size_bytes} bytes is not a multiple of {BLOCK_BYTES}. The next size that is: {up}."
        )
    return size_bytes


def format_size(size_bytes: float) -> str:
    """ "2 GiB", "1.5 TiB", "512 B"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size_bytes) < 1024 or unit == "TiB":
            text = f"{size_bytes:.1f}".removesuffix(".0")
            return f"{text} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")
