"""No document, header or drawing names what is not there; no file outgrows the limit."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

import pytest

from engine import replica_entry
from engine.phase import NEXT_PHASES, VolumePhase
from engine.replica_entry import ReplicaState
from tests.docs.drawings import edges_of

ROOT = Path(__file__).parents[2]

PACKAGES = ("bench", "cli", "control", "engine", "protocol", "replica", "tests")
FOLDERS = (*PACKAGES, "dataplane", "deploy", "docs")

GENERATED = ("bench/out",)
"""Made by ``make bench``: named in documents, absent in a fresh tree."""

LINES_MAX = 800
LONGER = {
    "engine/volume.py": "one step function over one state; its parts with an order of their own stand apart",
}

RUST_ITEM = r"\b(?:fn|struct|enum|trait|mod|const|static|type)\s+{}\b"


def sources(*suffixes: str) -> list[Path]:
    found = [p for f in (*PACKAGES, "dataplane") for s in suffixes for p in (ROOT / f).rglob(f"*{s}")]
    return sorted(p for p in found if not {"target", "out", "__pycache__"} & set(p.relative_to(ROOT).parts))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PYTHON = sources(".py")
RUST = sources(".rs")


def python_has(path: Path, symbol: str) -> bool:
    """Whether ``symbol`` ("name" or "Class.name") is defined at that level of the module."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for name in symbol.split("."):
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() if node.name == name:
                    body = node.body
                    break
                case ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                    body = []
                    break
                case ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                    body = []
                    break
        else:
            return False
    return True


def has_symbol(path: Path, symbol: str) -> bool:
    if path.suffix == ".py":
        return python_has(path, symbol)
    text = path.read_text()
    return all(re.search(RUST_ITEM.format(re.escape(name)), text) for name in symbol.split("."))


def named_paths(text: str) -> Iterator[tuple[str, str]]:
    """(path, symbol or "") for everything in ``text`` that begins with a folder of ours."""
    folders = "|".join(FOLDERS)
    for match in re.finditer(rf"(?<![\w./-])((?:{folders})/[\w./-]*)(?:::(\w+(?:\.\w+)*))?", text):
        yield match[1].rstrip(".-"), match[2] or ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    missing = []
    for path, symbol in named_paths(text):
        if path.startswith(GENERATED):
            continue
        if not (ROOT / path).exists():
            missing.append(path)
        elif symbol and not has_symbol(ROOT / path, symbol):
            missing.append(f"{path}::{symbol}")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and not (document.parent / target).exists():
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_a_document_in_capitals_is_one_of_ours(document: Path) -> None:
    named = set(re.findall(r"\b[A-Z]{4,}\.md\b", document.read_text()))
    assert not {name for name in named if not (ROOT / name).exists()}


def resolves(name: str, source: Path) -> bool:
    """A file named in a header: from the file's own folder, its crate, or the root."""
    crates = ("dataplane", "dataplane/binding", "dataplane/core", "dataplane/core/src")
    return any((base / name).exists() for base in (source.parent, ROOT, *(ROOT / crate for crate in crates)))


def header(source: Path) -> str:
    if source.suffix == ".py":
        return ast.get_docstring(ast.parse(source.read_text())) or ""
    return "\n".join(line for line in source.read_text().splitlines() if line.startswith("//!"))


@pytest.mark.parametrize("source", [*PYTHON, *RUST], ids=relative)
def test_files_that_a_header_names_exist(source: Path) -> None:
    text = header(source)
    named = set(re.findall(r"(?<![\w./*{-])[\w./-]*\w\.(?:pyi|py|rs|md)\b", text))
    missing = {name for name in named if not resolves(name, source)}
    missing |= {
        path for path, _ in named_paths(text) if not path.startswith(GENERATED) and not resolves(path, source)
    }
    assert not missing


@pytest.mark.parametrize("source", PYTHON, ids=relative)
def test_every_module_says_what_it_is(source: Path) -> None:
    assert len(header(source).split()) > 3


@pytest.mark.parametrize(("door", "binding"), [("engine", "engine"), ("replica", "replica")])
def test_a_door_and_what_is_behind_it_name_each_other(door: str, binding: str) -> None:
    python = header(ROOT / door / "io_path.py")
    behind = f"dataplane/binding/src/{binding}.rs"
    assert behind in python and f"dataplane/core/src/{door}/" in python
    assert f"{door}/io_path.py" in header(ROOT / behind)
    core = [header(path) for path in (ROOT / "dataplane/core/src" / door).glob("*.rs")]
    assert any(f"{door}/io_path.py" in text for text in core)


def test_files_stay_below_the_limit() -> None:
    lengths = {
        relative(p): len(p.read_text().splitlines()) for p in sources(".py", ".pyi", ".rs", ".c", ".h")
    }
    assert not {path: count for path, count in lengths.items() if count > LINES_MAX and path not in LONGER}


S = TypeVar("S", bound=Enum)


def pairs(table: Mapping[S, frozenset[S]]) -> set[tuple[str, str]]:
    return {(one.name, other.name) for one in table for other in table[one]}


def test_the_drawing_of_a_volumes_phases_is_its_table() -> None:
    text, table = VolumePhase.__doc__ or "", pairs(NEXT_PHASES)
    drawing, rest = text.split("\n\n", 2)[1:]
    assert "ENDED may follow each" in rest
    ends = {(one, "ENDED") for one, _ in table}
    assert edges_of(drawing) | ends == table


def test_the_drawing_of_a_replicas_states_is_its_table() -> None:
    text, table = ReplicaState.__doc__ or "", pairs(replica_entry._NEXT)
    assert "OFFLINE, from any state." in text
    lost = {(one, "OFFLINE") for one, _ in table if one != "OFFLINE"}
    assert edges_of(text.replace("OFFLINE, from", "")) | lost == table


def test_a_drawing_is_read_as_people_read_it() -> None:
    drawing = """
    ONE -> TWO <-> THREE -- in words --> FOUR
            ^                             |
            |     beside it               |
            +-- FIVE <-- either way -----+
    """
    edges = {("ONE", "TWO"), ("TWO", "THREE"), ("THREE", "TWO"), ("THREE", "FOUR"), ("FIVE", "TWO")}
    assert edges_of(drawing) == edges  # the wire from FOUR misses its corner by one
    assert edges_of(drawing.replace("-----+", "------+")) == edges | {("FOUR", "FIVE")}
