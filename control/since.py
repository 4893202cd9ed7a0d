"""Since when something is so, for what no document says: kept while the daemon lives. Pure.

Owns the memory. A finding that names its own time keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from control.why import Finding

FORGET_AFTER_S = 30.0
"""A finding that nobody saw for this long has ended; the next one begins anew. Three times the interval at
which the daemon looks by itself."""


class Since:
    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[str, float]] = {}  # first, as text; last, in seconds

    def stamp(self, findings: Iterable[Finding], now_s: float) -> list[Finding]:
        """``now_s``: seconds since 1970. Looks may be at a part of the cluster: others are not forgotten."""
        self._seen = {k: v for k, v in self._seen.items() if now_s - v[1] <= FORGET_AFTER_S}
        stamped = []
        for finding in findings:
            key = (finding.about, finding.reason)
            now = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="seconds")
            first = self._seen.get(key, (now, now_s))[0]
            self._seen[key] = (first, now_s)
            stamped.append(finding if finding.since else finding.model_copy(update={"since": first}))
        return stamped

    def is_new(self, finding: Finding) -> bool:
        """Whether no look before saw it: asked before ``stamp``."""
        return (finding.about, finding.reason) not in self._seen
