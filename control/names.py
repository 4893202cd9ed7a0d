"""Names of volumes and nodes. Pure; used by the API and by the command."""

from __future__ import annotations

import re

from protocol.errors import BadRequest
from protocol.limits import NAME_CHARS_MAX

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", re.ASCII)


def check_name(name: str) -> str:
    """A DNS label: it becomes a file name, a socket name and a label. Raises BadRequest."""
    if len(name) > NAME_CHARS_MAX:
        raise BadRequest(
            reason=f"the name has {len(name)} characters; {NAME_CHARS_MAX} is the most. Choose a shorter one."
        )
    if not _NAME.fullmatch(name):
        raise BadRequest(
            reason=f"{name!r} cannot be a name. Use lower-case letters, digits and '-', "
            "with a letter or digit first and last, for example data-1."
        )
    return name
