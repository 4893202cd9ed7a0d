"""What may come in by HTTP: size, depth and shape of a request, checked before anything is done. Pure.

Owns the caps. A request past one is refused with ``bad_request``; nothing of it is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from control.views import WaitS
from protocol.errors import BadRequest

BODY_BYTES_MAX = 64 * 1024
"""Our largest request is below 300 bytes."""

JSON_DEPTH_MAX = 16
"""Our deepest request has two levels. Python's parser recurses, so depth is checked before it."""

PROBLEMS_SHOWN_MAX = 5

M = TypeVar("M", bound=BaseModel)

_WAIT_S: TypeAdapter[float] = TypeAdapter(WaitS)

WAIT_DEFAULT_S = 30.0


def parse_body(body: bytes, model: type[M]) -> M:
    """Raises BadRequest, which names each field that is wrong. No body means an empty object."""
    if len(body) > BODY_BYTES_MAX:
        raise BadRequest(reason=f"the body is over {BODY_BYTES_MAX} bytes")
    _check_depth(body)
    try:
        found = json.loads(body.decode() or "{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(reason=f"the body is not JSON: {str(error)[:100]}") from error
    if not isinstance(found, dict):
        raise BadRequest(reason="the body is not a JSON object")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise BadRequest(reason=_problems(error)) from error


def parse_query(query: Mapping[str, str], allowed: tuple[str, ...]) -> dict[str, Any]:
    """Raises BadRequest for parameters nobody knows. ``wait_s`` always has a value."""
    unknown = sorted(set(query) - set(allowed))
    if unknown:
        raise BadRequest(
            reason=f"unknown query parameter {unknown[0][:40]!r}; known: {', '.join(allowed) or 'none'}"
        )
    parsed: dict[str, Any] = dict(query)
    try:
        parsed["wait_s"] = _WAIT_S.validate_python(query.get("wait_s", WAIT_DEFAULT_S))
    except ValidationError as error:
        raise BadRequest(reason="wait_s is a number of seconds from 0 to 300") from error
    return parsed


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _check_depth(body: bytes) -> None:
    depth, quoted, escaped = 0, False, False
    for byte in body:
        if quoted:
            if escaped:
                escaped = False
            elif byte == 0x5C:  # backslash
                escaped = True
            elif byte == 0x22:  # quote
                quoted = False
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            if depth > JSON_DEPTH_MAX:
                raise BadRequest(reason=f"the body is nested deeper than {JSON_DEPTH_MAX}")
        elif byte in b"]}":
            depth -= 1


def _problems(error: ValidationError) -> str:
    listed = []
    for problem in error.errors(include_url=False, include_context=False)[:PROBLEMS_SHOWN_MAX]:
        where = ".".join(str(part) for part in problem["loc"])[:80]
        what = problem["msg"].removeprefix("Value error, ")
        # Our own checks name what they speak of; pydantic's do not.
        listed.append(f"{where}: {what}" if where and problem["type"] != "value_error" else what)
    return "; ".join(listed)
