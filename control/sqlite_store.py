"""The SQLite backend of the document store: one file, one node, nothing to install.

Owns ``state.db``. Every call runs in one thread that owns the connection, so statements never
interleave and the event loop never waits for a disk. WAL with synchronous=FULL: a commit that
returned survives power loss.

Watchers live in this process: one daemon owns the file (it holds a lock beside it), so a change
made elsewhere cannot happen.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from control.documents import ANY_REVISION, DOCUMENT_BYTES_MAX, Change, Document
from protocol.errors import Conflict, DiskError

T = TypeVar("T")

BUSY_TIMEOUT_MS = 5000
"""Somebody reads the file with the sqlite3 command: wait for them this long."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    kind TEXT NOT NULL, name TEXT NOT NULL, spec TEXT NOT NULL, status TEXT NOT NULL,
    revision INTEGER NOT NULL, PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL);
INSERT OR IGNORE INTO counter VALUES (1, 0);
"""
SCHEMA_VERSION = 1

MAGIC = b"SQLite format 3\0"


class SqliteStore:
    """``SqliteStore.open(path)``; see ``control.documents.Store`` for the calls."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, path: Path) -> None:
        self._connection = connection
        self._thread = thread
        self._path = path
        self._watchers: dict[str, set[_Watcher]] = {}
        self._changed = asyncio.Lock()  # a watcher's first list and the changes after it must not overlap

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Raises DiskError when the file cannot be read or is not ours; never starts an empty one over it."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state-store")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, _open, path)
        except sqlite3.Error as error:
            thread.shutdown()
            raise DiskError(path=str(path), reason=str(error)) from error
        except BaseException:
            thread.shutdown()
            raise
        return cls(connection, thread, path)

    async def close(self) -> None:
        await self._run(self._connection.close)
        self._thread.shutdown()

    async def get(self, kind: str, name: str) -> Document | None:
        def read() -> Document | None:
            row = self._connection.execute(
                "SELECT spec, status, revision FROM documents WHERE kind = ? AND name = ?", (kind, name)
            ).fetchone()
            return None if row is None else _document(kind, name, *row)

        return await self._run(read)

    async def list(self, kind: str) -> list[Document]:
        def read() -> list[Document]:
            rows = self._connection.execute(
                "SELECT name, spec, status, revision FROM documents WHERE kind = ? ORDER BY name", (kind,)
            )
            return [_document(kind, *row) for row in rows]

        return await self._run(read)

    async def put(self, document: Document) -> Document:
        spec, status = json.dumps(document.spec), json.dumps(document.status)
        assert len(spec) + len(status) <= DOCUMENT_BYTES_MAX, f"{document.kind} {document.name} grew"

        def write() -> int:
            with self._transaction() as execute:
                self._expect(document.kind, document.name, document.revision)
                revision = self._next_revision()
                execute(
                    "INSERT INTO documents VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, name) DO UPDATE "
                    "SET spec = excluded.spec, status = excluded.status, revision = excluded.revision",
                    (document.kind, document.name, spec, status, revision),
                )
                return revision

        return await _to_the_end(self._put(document, spec, status, write))

    async def _put(self, document: Document, spec: str, status: str, write: Callable[[], int]) -> Document:
        async with self._changed:
            revision = await self._run(write)
            # What a reader would get: JSON turns tuples into lists, and the caller keeps its own objects.
            stored = _document(document.kind, document.name, spec, status, revision)
            self._tell(Change(document.kind, document.name, revision, stored))
        return stored

    async def revision(self) -> int:
        """Of the newest change there was."""

        def read() -> int:
            return int(self._connection.execute("SELECT revision FROM counter").fetchone()[0])

        return await self._run(read)

    async def put_all(self, documents: Sequence[Document], *, above: int = 0) -> None:
        """Write all or none, in one transaction, with revisions greater than ``above``. For a start, before
        anybody watches. Raises Conflict."""
        assert not self._watchers

        def write() -> None:
            with self._transaction() as execute:
                execute("UPDATE counter SET revision = max(revision, ?)", (above,))
                self._next_revision()  # also without a document: nothing of before is as new
                for document in documents:
                    self._expect(document.kind, document.name, document.revision)
                    execute(
                        "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?)",
                        (
                            *(document.kind, document.name),
                            *(json.dumps(document.spec), json.dumps(document.status)),
                            self._next_revision(),
                        ),
                    )

        await _to_the_end(self._run(write))

    async def delete(self, kind: str, name: str, *, revision: int = ANY_REVISION) -> None:
        def write() -> int:
            with self._transaction() as execute:
                if revision != ANY_REVISION:
                    self._expect(kind, name, revision)
                removed = execute("DELETE FROM documents WHERE kind = ? AND name = ?", (kind, name))
                return self._next_revision() if removed.rowcount else 0

        await _to_the_end(self._delete(kind, name, write))

    async def _delete(self, kind: str, name: str, write: Callable[[], int]) -> None:
        async with self._changed:
            at = await self._run(write)
            if at:
                self._tell(Change(kind, name, at, None))

    async def watch(self, kind: str) -> AsyncIterator[Change]:
        watcher = _Watcher()
        async with self._changed:
            for document in await self.list(kind):
                watcher.add(Change(kind, document.name, document.revision, document))
            self._watchers.setdefault(kind, set()).add(watcher)
        try:
            while True:
                yield await watcher.next()
        finally:
            self._watchers[kind].discard(watcher)

    def _tell(self, change: Change) -> None:
        for watcher in self._watchers.get(change.kind, ()):
            watcher.add(change)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)

    def _expect(self, kind: str, name: str, revision: int) -> None:
        row = self._connection.execute(
            "SELECT revision FROM documents WHERE kind = ? AND name = ?", (kind, name)
        ).fetchone()
        found = 0 if row is None else int(row[0])
        if found != revision:
            raise Conflict(kind=kind, name=name, revision=found)

    def _next_revision(self) -> int:
        row = self._connection.execute("UPDATE counter SET revision = revision + 1 RETURNING revision")
        return int(row.fetchone()[0])

    async def _run(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except sqlite3.Error as error:
            raise DiskError(path=str(self._path), reason=str(error)) from error


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """A cancelled caller must not leave a write that is done but that no watcher heard of."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK on any exception."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Callable[..., sqlite3.Cursor]:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection.execute

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:  # an error inside, or a COMMIT that failed
                self._connection.execute("ROLLBACK")


class _Watcher:
    """Changes not yet taken: at most one per document, so a slow watcher costs bounded memory."""

    def __init__(self) -> None:
        self._pending: dict[str, Change] = {}
        self._some = asyncio.Event()

    def add(self, change: Change) -> None:
        self._pending.pop(change.name, None)  # to the end: order of revisions
        self._pending[change.name] = change
        self._some.set()

    async def next(self) -> Change:
        await self._some.wait()
        change = self._pending.pop(next(iter(self._pending)))
        if not self._pending:
            self._some.clear()
        return change


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def _open(path: Path) -> sqlite3.Connection:
    if path.exists() and path.stat().st_size and _first_bytes(path) != MAGIC:
        # Looked at first: SQLite takes the WAL beside such a file for another's, and removes it.
        raise sqlite3.DatabaseError("file is not a database")
    # isolation_level None: transactions are written out, nothing begins one behind our back.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=True)
    path.chmod(0o600)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA_VERSION):
        connection.close()
        raise sqlite3.DatabaseError(
            f"its schema version is {version}, this program knows {SCHEMA_VERSION}: use a newer dolmen"
        )
    # A few KiB of documents: a damaged page must be found before a decision rests on it.
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        connection.close()
        raise sqlite3.DatabaseError(f"it is damaged: {verdict}")
    connection.executescript(SCHEMA)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return connection


def _document(kind: str, name: str, spec: str, status: str, revision: int) -> Document:
    loaded_spec: dict[str, Any] = json.loads(spec)
    loaded_status: dict[str, Any] = json.loads(status)
    return Document(kind, name, loaded_spec, loaded_status, revision)
