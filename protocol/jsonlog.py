"""One JSON line per event on stderr, for processes that import little. Standard library logging beneath.

Owns the shape of a line: ``ts`` (UTC), ``level``, ``logger``, ``event`` (past tense, no values in it), then
the fields by their glossary names. Does not own where the lines go: the daemon hands a file to stderr.

::

    log = logging.getLogger("dolmen.engine")
    log_event(log, "record committed", volume="data", version=3)
"""

from __future__ import annotations

import json
import logging
import sys
import time

FIELD_CHARS_MAX = 2000
"""Of one field's text: a peer's message must not fill the disk."""


class JsonFormatter(logging.Formatter):
    """Also formats what others log by plain ``logging`` calls: their message becomes the event."""

    def __init__(self, **always: object) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        whole_s = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "ts": f"{whole_s}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage()[:FIELD_CHARS_MAX],
            **self._always,
        }
        for name, value in getattr(record, "fields", {}).items():
            line[name] = value[:FIELD_CHARS_MAX] if isinstance(value, str) else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def setup_logging(**always: object) -> None:
    """Log from INFO on to stderr. ``always``: fields of every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**always))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def log_event(logger: logging.Logger, event: str, /, *, level: int = logging.INFO, **fields: object) -> None:
    logger.log(level, "%s", event, extra={"fields": fields})
