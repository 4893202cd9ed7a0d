"""PROTOCOL.md's tables, protocol/*.py and the Rust twins say the same, or a test here says where not."""

from __future__ import annotations

import re
from pathlib import Path

import protocol.errors
from protocol import frames, hello, limits
from protocol.frames import Entry, Flag, Kind, Status
from replica.calls import Calls
from replica.replicas import ReplicaState

ROOT = Path(__file__).parents[2]
SPEC = (ROOT / "PROTOCOL.md").read_text()
RUST = ROOT / "dataplane" / "core" / "src"


def table(*heading: str) -> list[list[str]]:
    """The rows of the one table whose head is ``heading``."""
    lines = SPEC.splitlines()
    head = "| " + " | ".join(heading) + " |"
    assert lines.count(head) == 1, f"PROTOCOL.md has {lines.count(head)} tables {head}"
    rows = []
    for line in lines[lines.index(head) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
    assert rows
    return rows


def rust_module(text: str, name: str) -> dict[str, int]:
    """The constants of ``pub mod name { ... }``."""
    match = re.search(rf"pub mod {name} \{{(.*?)\n\}}", text, re.DOTALL)
    assert match, f"no module {name}"
    return {key: int(value) for key, value in re.findall(r"pub const (\w+): u\d+ = (\d+);", match[1])}


def evaluate(expression: str, names: dict[str, int]) -> int:
    """The value of a Rust constant's expression: numbers, names, + * / and parentheses."""
    assert re.fullmatch(r"[\w\s+*/()]+", expression), expression
    return int(eval(expression.replace("/", "//"), {"__builtins__": {}}, names))


def rust_constants(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, expression in re.findall(
        r"^pub const (\w+): (?:u8|u16|u32|u64|usize) = ([^;]+);", text, re.MULTILINE
    ):
        found[name] = evaluate(expression, found) if not expression.startswith("0x") else int(expression, 16)
    return found


def test_the_header_table_is_the_struct() -> None:
    rows = [(int(offset), int(size), name) for offset, size, name in table("offset", "size", "field")]
    at = 0
    for offset, size, name in rows:
        assert offset == at, name
        at += size
    assert at == frames.HEADER_BYTES
    letters = {"4s": 4, "B": 1, "H": 2, "I": 4, "Q": 8}
    sizes = [letters[letter] for letter in re.findall(r"4s|[BHIQ]", frames.HEADER.format)]
    assert [size for _, size, _ in rows] == sizes
    documented = [name for *_, name in rows if name not in ("magic", "version", "header_check")]
    assert documented == list(frames.Header.__dataclass_fields__)


def test_the_header_is_the_rust_struct() -> None:
    text = (RUST / "frame.rs").read_text()
    match = re.search(r"pub struct Header \{(.*?)\}", text, re.DOTALL)
    assert match
    assert re.findall(r"pub (\w+):", match[1]) == list(frames.Header.__dataclass_fields__)
    constants = rust_constants(text)
    assert constants["HEADER_BYTES"] == frames.HEADER_BYTES
    assert constants["FRAME_VERSION"] == frames.FRAME_VERSION
    assert constants["REPLY"] == frames.REPLY
    assert f'*b"{frames.MAGIC.decode()}"' in text
    for offset, size, name in table("offset", "size", "field"):
        if name not in ("version", "kind"):  # single bytes
            assert f"bytes[{offset}..{int(offset) + int(size)}]" in text, name


def test_kinds_flags_and_statuses_are_the_same_three_times() -> None:
    text = (RUST / "frame.rs").read_text()
    kinds = {
        name: int(number) for number, name, *_ in table("kind", "name", "request payload", "reply payload")
    }
    flags = {name: int(number) for number, name in table("flag", "name")}
    statuses = {name: int(number) for number, name in table("status", "name")}
    assert kinds == {kind.name: kind.value for kind in Kind} == rust_module(text, "kind")
    assert flags == {flag.name: flag.value for flag in Flag} == rust_module(text, "flag")
    assert statuses == {status.name: status.value for status in Status} == rust_module(text, "status")
    assert all(kind.value < frames.REPLY for kind in Kind)


def test_block_map_entries_are_the_same_in_rust() -> None:
    constants = rust_constants((RUST / "checksum.rs").read_text())
    assert {f"ENTRY_{entry.name}": entry.value for entry in Entry} | {
        "CHECKSUM_MIN": frames.CHECKSUM_MIN
    } == constants


def test_limits_are_the_same_in_rust() -> None:
    constants = rust_constants((RUST / "limits.rs").read_text())
    assert len(constants) >= 8
    for name, value in constants.items():
        assert getattr(limits, name) == value, name


def test_times_are_the_same_in_the_engines_loop() -> None:
    text = (RUST / "engine" / "limits.rs").read_text()
    for name in ("READ_LEASE", "LINK_STALL_TIMEOUT"):
        match = re.search(rf"^pub const {name}_US: u64 = ([\d_]+);", text, re.MULTILINE)
        assert match, name
        assert int(match[1]) == getattr(limits, f"{name}_S") * 1_000_000, name


def test_every_limit_has_a_reason() -> None:
    text = (ROOT / "protocol" / "limits.py").read_text()
    derived = {"REGION_BLOCKS", "VOLUME_BYTES_MIN"}
    for name in re.findall(r"^([A-Z_]+) = ", text, re.MULTILINE):
        if name not in derived:
            assert re.search(rf'^{name} = .*\n"""', text, re.MULTILINE), f"{name} has no reason"


def test_every_role_is_in_the_table() -> None:
    assert [row[0] for row in table("role", "after the hello", "who")] == [role.value for role in hello.Role]


def test_every_call_to_a_replica_server_has_a_handler_and_the_other_way_round() -> None:
    documented = {row[0] for row in table("call to a replica server", "arguments", "answer")}
    handlers = Calls.__new__(Calls)
    Calls.__init__(handlers, None)  # type: ignore[arg-type] # no call is made
    assert handlers.names == documented


def test_every_state_of_a_replica_that_a_peer_can_see_is_documented() -> None:
    (inspect,) = [
        row for row in table("call to a replica server", "arguments", "answer") if row[0] == "replica.inspect"
    ]
    for state in set(ReplicaState) - {ReplicaState.GONE}:
        assert f'"{state.value}"' in inspect[2]


def test_every_error_word_in_the_spec_is_a_code() -> None:
    codes = protocol.errors.all_error_classes()
    for word in re.findall(r"error (?:`)?([a-z]+_[a-z_]+)", SPEC):
        assert word in codes, word
