"""Mutation fuzzing of the Python parsers: bytes and messages from outside, changed at random.

``python -m tests.fuzz.parsers --seconds 60`` runs all of them and prints the executions of each;
``tests/fuzz/test_parsers.py`` runs each briefly. The rule for every parser: a result or a StorageError,
never another exception.

Owns the seeds (valid inputs) and the mutations. Reproduce a finding with the seed that it prints.
"""

from __future__ import annotations

import argparse
import copy
import json
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from xxhash import xxh3_64_intdigest

from control.http_input import parse_body, parse_query
from control.views import VolumeCreate
from engine.config import parse_config
from engine.negotiation import Export, ExportTable, Negotiator
from protocol.errors import StorageError, from_wire
from protocol.frames import HEADER_BYTES, Header, decode_header, encode_header
from protocol.hello import KEY_BYTES, NONCE_BYTES, Greeting, Role, make_hello, parse_greeting, parse_hello
from protocol.membership import parse_record
from protocol.regions import pack_regions, unpack_regions
from protocol.rpc import LENGTH, pack, unpack
from replica.disk import parse_identity
from tests.fuzz import seeds

KEY = bytes(KEY_BYTES)
NONCE = bytes(NONCE_BYTES)
EXPORTS = ExportTable([Export("main", 1 << 26, read_only=False, description="")])
INTERESTING: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan")),
    *("", "\0", "..", "x" * 300, "\ud7ff", b"", b"\xff" * 5, [], {}, [[]], {"": None}),
)


@dataclass(frozen=True, slots=True)
class Target:
    """``parse`` gets a mutated copy of one of ``inputs``."""

    parse: Callable[[Any], object]
    inputs: tuple[Any, ...]


def _negotiate(data: bytes) -> None:
    """A client's flags, then options: a byte that chooses, a length, the data."""
    negotiator = Negotiator(EXPORTS)
    if negotiator.on_client_flags(int.from_bytes(data[:4], "big")).close:
        return
    at = 4
    while at + 6 <= len(data):
        option, length = struct.unpack_from(">IH", data, at)
        answer = negotiator.on_option(option, data[at + 6 : at + 6 + length])
        if answer.close or answer.negotiated is not None:
            return
        at += 6 + length


def _frame(data: bytes) -> object:
    """With a check that fits: without, nothing behind it is ever reached."""
    body = data[: HEADER_BYTES - 4].ljust(HEADER_BYTES - 4, b"\0")
    return decode_header(body + struct.pack("<I", xxh3_64_intdigest(body) & 0xFFFFFFFF), xxh3_64_intdigest)


def _config(wire: Any) -> object:
    return parse_config(json.loads(json.dumps(wire, skipkeys=True, default=repr)))


def _query(wire: Any) -> object:
    text = {str(key): str(value) for key, value in wire.items()} if isinstance(wire, dict) else {}
    return parse_query(text, ("wait_s",))


GREETING = Greeting(nonce=NONCE, boot_id="boot", process_id="process")
HELLO = make_hello(GREETING, key=KEY, role=Role.DATA, volume_id="v", epoch=3, engine_id="e").to_wire()

TARGETS: Mapping[str, Target] = {
    "rpc message": Target(
        unpack, (pack({"id": 1, "call": "replica.inspect", "args": {"volume_id": "v"}})[LENGTH.size :],)
    ),
    "greeting": Target(parse_greeting, (GREETING.to_wire(),)),
    "hello": Target(lambda wire: parse_hello(wire, key=KEY, nonce=NONCE), (HELLO,)),
    "error": Target(from_wire, ({"code": "stale_epoch", "message": "x", "fields": {"volume": "v"}},)),
    "frame header": Target(_frame, (encode_header(Header(kind=1, length_bytes=4096), xxh3_64_intdigest),)),
    "regions": Target(unpack_regions, (pack_regions([1, 2, 70]), pack_regions(range(100)))),
    "membership record": Target(parse_record, ({"epoch": 3, "version": 2, "in_sync": ["a", "b"]},)),
    "engine config": Target(_config, (seeds.ENGINE_CONFIG,)),
    "negotiation": Target(_negotiate, seeds.NEGOTIATIONS),
    "disk.json": Target(
        lambda data: parse_identity(data, path="x", node_id="n", disk_id=None), (seeds.DISK_JSON,)
    ),
    "REST body": Target(lambda data: parse_body(data, VolumeCreate), (seeds.REST_BODY,)),
    "REST query": Target(_query, ({"wait_s": "3"},)),
}


def mutate(random: Random, value: Any) -> Any:
    """One change somewhere in it: bytes are flipped, cut, repeated; objects lose, gain or swap a part."""
    if isinstance(value, bytes):
        return _mutate_bytes(random, bytearray(value))
    value = copy.deepcopy(value)
    if random.random() < 0.05 or not isinstance(value, dict | list) or not value:
        return random.choice(INTERESTING)
    key: Any = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match random.randrange(5):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[random.choice(["extra", "", 0, None, key])] = random.choice(INTERESTING)
        case 1 if isinstance(value, list):
            value.append(random.choice(INTERESTING))
        case 2:
            value[key] = random.choice(INTERESTING)
        case _:
            value[key] = mutate(random, value[key])
    return value


def _mutate_bytes(random: Random, data: bytearray) -> bytes:
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(data) + 1)
        match random.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case 1 if at < len(data):
                data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0xC1, 0xDD))
            case 2:
                del data[at : at + random.randrange(9)]
            case 3:
                data[at:at] = random.randbytes(random.randrange(9))
            case 4:
                data[at:at] = data[max(0, at - 16) : at]
            case _ if len(data) >= 4:
                struct.pack_into("<I", data, min(at, len(data) - 4), random.getrandbits(32))
    return bytes(data)


def run_once(name: str, seed: int) -> None:
    """Raises what the parser should not have raised."""
    target = TARGETS[name]
    random = Random(f"{name} {seed}")
    value = random.choice(target.inputs)
    for _ in range(random.choice((1, 1, 2, 4))):
        value = mutate(random, value)
    if isinstance(target.inputs[0], bytes) and not isinstance(value, bytes):
        return
    try:
        target.parse(value)
    except StorageError:
        pass


def run_for(name: str, *, first_seed: int, seconds: float) -> int:
    """How many inputs were tried. Raises AssertionError with the command that repeats a finding."""
    ends = time.monotonic() + seconds
    seed = first_seed
    while time.monotonic() < ends:
        for _ in range(64):
            try:
                run_once(name, seed)
            except Exception as error:
                again = f"python -m tests.fuzz.parsers --only {name!r} --seed {seed}"
                raise AssertionError(f"{name}: {type(error).__name__}: {error}; again by: {again}") from error
            seed += 1
    return seed - first_seed


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    options.add_argument("--seed", type=int, help="one input, by its seed")
    options.add_argument("--only", choices=sorted(TARGETS))
    options.add_argument("-o", "--output", choices=("text", "json"), default="text")
    chosen = options.parse_args()
    names = [chosen.only] if chosen.only else list(TARGETS)
    if chosen.seed is not None:
        for name in names:
            run_once(name, chosen.seed)
        return 0
    first_seed = time.time_ns()
    counts = {
        name: run_for(name, first_seed=first_seed, seconds=chosen.seconds / len(names)) for name in names
    }
    if chosen.output == "json":
        print(json.dumps({"first_seed": first_seed, "executions": counts}))
    else:
        for name, count in counts.items():
            print(f"{name:20} {count:>12,} inputs, no finding")
        print(f"{'together':20} {sum(counts.values()):>12,} inputs from seed {first_seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
