"""Documents: the control plane's state, one JSON object per thing, changed by compare-and-swap.

Owns what a document is and the interface of a store of them. Does not own any backend
(``control/sqlite_store.py``) or what a spec means (``control/model.py``).

Promises, of every backend: a write that returned is durable; of two writers that read the same
revision one gets Conflict; a watcher sees the last state of every document that changed, in the
order of revisions, though not every state in between. Narrow on purpose, so that etcd
(mod_revision, transactions, watch) and Kubernetes (resourceVersion) fit behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from protocol.errors import Conflict

UPDATE_TRIES_MAX = 20
"""Read-change-write rounds before a Conflict is passed on. Writers are few; past this two of them
fight, and that is a bug worth seeing."""

DOCUMENT_BYTES_MAX = 1024 * 1024
"""What etcd accepts by default is 1.5 MiB; our documents are below 10 KiB."""

ANY_REVISION = -1
"""For ``delete``: whatever is there."""


@dataclass(frozen=True, slots=True)
class Document:
    """``spec`` is what somebody wants; ``status`` is what was done about it. ``revision`` grows with
    every change in the store and is 0 for a document that does not exist yet."""

    kind: str
    name: str
    spec: dict[str, Any]
    status: dict[str, Any] = field(default_factory=dict)
    revision: int = 0

    def with_spec(self, **changes: Any) -> Document:
        return replace(self, spec={**self.spec, **changes})

    def with_status(self, **changes: Any) -> Document:
        return replace(self, status={**self.status, **changes})


@dataclass(frozen=True, slots=True)
class Change:
    """``document`` is None when it was deleted."""

    kind: str
    name: str
    revision: int
    document: Document | None


class Store(Protocol):
    async def get(self, kind: str, name: str) -> Document | None: ...

    async def list(self, kind: str) -> list[Document]:
        """By name, ascending. One consistent cut."""
        ...

    async def put(self, document: Document) -> Document:
        """Write if the stored revision is still ``document.revision`` (0: it must not exist).

        Returns the document with its new revision, after it is durable. Raises Conflict.
        """
        ...

    async def delete(self, kind: str, name: str, *, revision: int = ANY_REVISION) -> None:
        """Remove, if it still has that revision. Nothing there: nothing happens. Raises Conflict."""
        ...

    def watch(self, kind: str) -> AsyncIterator[Change]:
        """First every document there is, then changes as they come. Never ends by itself."""
        ...

    async def close(self) -> None: ...


async def update(
    store: Store, kind: str, name: str, change: Callable[[Document], Document | None]
) -> Document | None:
    """Read, change, write, and again if somebody else was faster. ``change`` is pure and may run more
    than once; it returns None to leave the document as it is.

    Returns the document as it then stands, or None if there is none. Raises Conflict after
    UPDATE_TRIES_MAX rounds, and whatever ``change`` raises.
    """
    revision = 0
    for _ in range(UPDATE_TRIES_MAX):
        current = await store.get(kind, name)
        if current is None:
            return None
        wanted = change(current)
        if wanted is None or wanted == current:
            return current
        try:
            return await store.put(wanted)
        except Conflict:
            revision = current.revision
    raise Conflict(kind=kind, name=name, revision=revision)
