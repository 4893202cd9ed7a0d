"""FORMAT.md's byte tables, the constants in Rust and Python, and the files of a real store say the same."""

from __future__ import annotations

import re
from pathlib import Path

import _dataplane
import msgpack
import pytest

from protocol.limits import BLOCK_BYTES, REGION_BLOCKS, REGION_BYTES
from protocol.membership import MembershipRecord
from replica import disk, metadata
from replica.checksum import xxh3_64
from replica.metadata import ReplicaMeta, encode_meta
from replica.replicas import FIRST_LAYER
from replica.scrub_file import SCRUB_NAME, SCRUB_TMP_NAME
from tests.protocol.test_spec import evaluate

ROOT = Path(__file__).parents[2]
SPEC = (ROOT / "FORMAT.md").read_text()
RUST = (ROOT / "dataplane" / "core" / "src" / "replica" / "format.rs").read_text()

REGIONS = 17
"""One more than a group of the map holds, so that strides show."""

SIZE_BYTES = REGIONS * REGION_BYTES


def section(heading: str) -> str:
    match = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", SPEC, re.MULTILINE | re.DOTALL)
    assert match, f"FORMAT.md has no section {heading}"
    return match[1]


def table(heading: str, *columns: str) -> list[list[str]]:
    """The rows of the table under ``heading`` whose head is ``columns``."""
    lines = section(heading).splitlines()
    head = "| " + " | ".join(columns) + " |"
    assert lines.count(head) == 1, f"{heading}: {lines.count(head)} tables {head}"
    rows = []
    for line in lines[lines.index(head) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
    assert rows
    return rows


def fields(heading: str) -> dict[str, tuple[int, int]]:
    """Offset and size by name; checks that nothing overlaps and nothing is left out."""
    found: dict[str, tuple[int, int]] = {}
    at = 0
    for offset, size, name in table(heading, "offset", "size", "field"):
        assert int(offset) == at, f"{heading}: {name} does not follow what is before it"
        at += int(size)
        if name != "reserved":
            found[name] = (int(offset), int(size))
    found["(end)"] = (at, 0)
    return found


def rust_constants() -> dict[str, int]:
    names = {"REGION_BLOCKS": REGION_BLOCKS, "REGION_BYTES": REGION_BYTES}
    for name, expression in re.findall(
        r"^(?:pub )?const (\w+): (?:u32|u64|usize) = ([^;]+);", RUST, re.MULTILINE
    ):
        names[name] = evaluate(re.sub(r" as \w+", "", expression), names)
    return names


def rust_block(name: str, part: str) -> str:
    """The body of ``fn part`` in ``impl name``."""
    match = re.search(rf"^impl {name} \{{(.*?)^\}}", RUST, re.MULTILINE | re.DOTALL)
    assert match, name
    body = re.search(rf"    pub fn {part}\(.*?^    \}}", match[1], re.MULTILINE | re.DOTALL)
    assert body, f"{name}::{part}"
    return body[0]


def encoded_places(name: str) -> dict[tuple[int, int], str]:
    """What ``encode`` puts where: (offset, size) to the line that does it."""
    return {
        (int(start), int(end) - int(start)): line
        for line in rust_block(name, "encode").splitlines()
        for start, end in re.findall(r"bytes\[(\d+)\.\.(\d+)\]", line)
    }


def magics() -> dict[str, bytes]:
    found = re.findall(r'pub const (\w+)_MAGIC: \[u8; 8\] = \*b"(\w{8})";', RUST)
    return {name.lower(): text.encode() for name, text in found}


def strides() -> dict[str, list[int]]:
    """The numbers of the table of parts of ``map``: offsets, then the size."""
    return {
        part: [int(number) for number in re.findall(r"\d+", f"{offset} {size}")]
        for part, offset, size in table("map", "part", "offset", "size")
    }


# -- FORMAT.md and the constants


@pytest.mark.parametrize(
    ("heading", "struct", "whole"),
    [
        ("Superblock", "Superblock", "SUPERBLOCK_USED_BYTES"),
        ("map", "RegionHeader", "REGION_HEADER_BYTES"),
        ("regions", "Record", "RECORD_BYTES"),
    ],
)
def test_every_field_stands_where_the_rust_code_puts_it(heading: str, struct: str, whole: str) -> None:
    documented = fields(heading)
    end, _ = documented.pop("(end)")
    assert end == rust_constants()[whole]
    places = encoded_places(struct)
    stable = documented.pop("stable", None)  # written word by word
    if stable is not None:
        assert stable == (0, REGION_BLOCKS // 8)
    assert set(documented.values()) == set(places)
    for name, place in documented.items():
        word = {"format_version": "FORMAT_VERSION", "chunk_check": "clean", "header_check": "check"}.get(
            name, name
        )
        word = "dirty" if (struct, name) == ("Record", "flags") else word
        assert word in places[place], f"{name}: {places[place]}"


@pytest.mark.parametrize(
    ("heading", "struct", "check"),
    [
        ("Superblock", "Superblock", "check"),
        ("map", "RegionHeader", "header_check"),
        ("regions", "Record", "check"),
    ],
)
def test_a_check_covers_everything_before_it(heading: str, struct: str, check: str) -> None:
    offset, size = fields(heading)[check]
    assert size == 8
    assert f"xxh3_64 of bytes 0 to {offset - 1}" in section(heading).replace("\n", " ")
    for part in ("encode", "decode"):
        assert f"&bytes[..{offset}]" in rust_block(struct, part)
    seeded = "seeded with the region's number" in section(heading)
    assert seeded == ("xxh3_64_with_seed" in rust_block(struct, "encode"))


def test_magics_version_and_flags_are_the_same() -> None:
    text = section("Superblock")
    assert magics().keys() == {"map", "regions"}
    for magic in magics().values():
        assert f"`{magic.decode()}`" in text
    constants = rust_constants()
    assert f"`format_version` is {constants['FORMAT_VERSION']};" in text
    assert f"Flag {constants['HEADER_CLEAN']}, *clean*" in section("map")
    assert f"Flag {constants['RECORD_DIRTY']} is *dirty*" in section("regions")


def test_strides_are_the_same() -> None:
    constants, parts = rust_constants(), strides()
    header, group, group_header, chunk = (
        constants[f"{name}_BYTES"] for name in ("REGION_HEADER", "GROUP", "GROUP_HEADER", "CHUNK")
    )
    assert constants["GROUP_REGIONS"] == 16
    assert parts == {
        "superblock": [0, constants["SUPERBLOCK_BYTES"]],
        "group g": [constants["SUPERBLOCK_BYTES"], group, group],
        "header of region r": [16, header, 16, header],
        "chunk of region r": [16, group_header, chunk, 16, chunk],
    }
    assert f"one record of {constants['RECORD_BYTES']} bytes per region" in section("regions")


# -- FORMAT.md and replica.meta, disk.json


def test_replica_meta_is_what_python_writes() -> None:
    rows = table("replica.meta", "offset", "size", "field")
    sizes = [int(size) for _, size, _ in rows[:4]]
    letters = {"8s": 8, "H": 2, "I": 4}
    assert sizes == [letters[letter] for letter in re.findall(r"8s|[HI]", metadata.HEADER.format)]
    assert [int(offset) for offset, *_ in rows[:4]] == [sum(sizes[:count]) for count in range(4)]
    assert rows[4:] == [["16", "n", "body"], ["16 + n", str(metadata.TRAILER.size), "check"]]
    text = section("replica.meta")
    assert f"`{metadata.MAGIC.decode()}`" in text
    assert f"`format_version` is {metadata.FORMAT_VERSION};" in text
    assert f"at most {metadata.META_BODY_BYTES_MAX};" in text
    assert f"1 to {metadata.LAYERS_MAX} names of at most {metadata.LAYER_NAME_CHARS_MAX}" in text
    assert f"reserve {metadata.SPARE_BYTES} bytes" in text


def test_the_fields_of_replica_meta_have_the_documented_types() -> None:
    record = MembershipRecord(1, 1, frozenset({"r"}))
    meta = ReplicaMeta("v", "r", "n", SIZE_BYTES, (FIRST_LAYER,), 1, "e", record, (1, 1), "b", True, False)
    data = encode_meta(meta, identity=None)
    body = msgpack.unpackb(data[metadata.HEADER.size : -metadata.TRAILER.size])
    documented = {name: kind for name, kind, _ in table("replica.meta", "body field", "type", "meaning")}
    types = {
        "str": str,
        "int": int,
        "bool": bool,
        "map": dict,
        "list of str": list,
        "list of 2 int": list,
        "list": list,
    }
    assert {name: types[kind] for name, kind in documented.items()} == {k: type(v) for k, v in body.items()}


def test_names_on_a_disk_are_the_documented_ones() -> None:
    text = section("A disk")
    for name in (disk.DISK_FILE, disk.LOCK_FILE, f"{disk.REPLICAS_DIR}/.new-", f"{disk.REPLICAS_DIR}/.del-"):
        assert name in text
    assert f"`format` is `{disk.FORMAT}`, `version` is {disk.FORMAT_VERSION}" in text
    assert f"At most {disk.DISK_FILE_BYTES_MAX} bytes" in text
    assert f"Today's chain is one layer, `{FIRST_LAYER}`." in SPEC


# -- FORMAT.md and the files of a real store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that was created, opened and closed."""
    loop = _dataplane.ReplicaLoop()
    try:
        loop.create_store(str(tmp_path), FIRST_LAYER, SIZE_BYTES)
        loop.open_store("v", str(tmp_path), [FIRST_LAYER], SIZE_BYTES, 5, (5, 9))
        loop.begin_resync("v", [REGIONS - 1])  # marks it
        loop.close_store("v")
    finally:
        loop.shutdown()
    return tmp_path


def number(data: bytes, place: tuple[int, int], base: int = 0) -> int:
    offset, size = place
    return int.from_bytes(data[base + offset : base + offset + size], "little")


def test_a_real_stores_files_are_the_documented_ones(store: Path) -> None:
    drawing = re.search(r"```text\n<replica>/\n(.*?)```", SPEC, re.DOTALL)
    assert drawing
    drawn = {line.split()[0].replace("<layer>", FIRST_LAYER) for line in drawing[1].splitlines()}
    real = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    assert drawn - {metadata.FILE_NAME, metadata.TMP_NAME, SCRUB_NAME, SCRUB_TMP_NAME} == real
    assert (store / "lock").read_bytes() == b""
    parts = strides()
    superblock_bytes, group_bytes = parts["superblock"][1], parts["group g"][1]
    assert (store / FIRST_LAYER / "data").stat().st_size == SIZE_BYTES
    groups = -(-REGIONS // 16)
    assert (store / FIRST_LAYER / "map").stat().st_size == superblock_bytes + groups * group_bytes
    records = fields("regions")["(end)"][0] * REGIONS
    used = superblock_bytes + records
    assert (store / "regions").stat().st_size == -(-used // BLOCK_BYTES) * BLOCK_BYTES


def test_a_real_superblock_is_the_documented_one(store: Path) -> None:
    places = fields("Superblock")
    offset, size = places["boot_id"]
    for name, path in (("map", store / FIRST_LAYER / "map"), ("regions", store / "regions")):
        data = path.read_bytes()[: strides()["superblock"][1]]
        assert data[: places["magic"][1]] == magics()[name]
        assert number(data, places["format_version"]) == rust_constants()["FORMAT_VERSION"]
        assert number(data, places["size_bytes"]) == SIZE_BYTES
        assert any(data[offset : offset + size]) == (name == "regions")
        assert number(data, places["check"]) == xxh3_64(data[: places["check"][0]])
        assert not any(data[places["(end)"][0] :])


def test_a_real_record_is_the_documented_one(store: Path) -> None:
    data = (store / "regions").read_bytes()
    places = fields("regions")
    region = REGIONS - 1
    base = strides()["superblock"][1] + region * places["(end)"][0]
    assert number(data, places["epoch"], base) == 5
    assert number(data, places["version"], base) == 9
    assert number(data, places["flags"], base) == 1
    covered = data[base : base + places["check"][0]]
    assert number(data, places["check"], base) == xxh3_64(covered, region)
    assert not any(data[strides()["superblock"][1] : base]), "a region that was never marked is all zero"
