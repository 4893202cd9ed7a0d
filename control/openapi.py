"""``/openapi.json``, generated from the route table and the pydantic models. Pure."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import control
from control.http_status import HTTP_STATUS
from control.routes import PLAIN_ROUTES, QUERY_MEANING, ROUTES, Route
from control.views import ErrorView

REF = "#/components/schemas/{model}"


def openapi() -> dict[str, Any]:
    models: set[type[BaseModel]] = {ErrorView}
    for route in ROUTES:
        models.add(route.answer)
        if route.body is not None:
            models.add(route.body)
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    for path, summary in PLAIN_ROUTES.items():
        paths[path] = {
            "get": {"summary": summary, "security": [], "responses": {"200": {"description": "OK"}}}
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Dolmen",
            "version": control.version(),
            "description": "Replicated block storage. Errors are {code, message, fields}; the codes: "
            + ", ".join(sorted(HTTP_STATUS)),
        },
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__.removeprefix("_"),
        "summary": route.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", route.path)
        ]
        + [
            {
                "name": name,
                "in": "query",
                "description": QUERY_MEANING[name],
                "schema": {"type": "number" if name == "wait_s" else "string"},
            }
            for name in route.query
        ],
        "responses": {
            "200": {"description": "OK", "content": _json(route.answer)},
            "default": {"description": "An error", "content": _json(ErrorView)},
        },
    }
    if route.body is not None:
        operation["requestBody"] = {"content": _json(route.body)}
    if route.public:
        operation["security"] = []
    return operation


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
