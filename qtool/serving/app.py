"""The routes of OpenAI's API over a responder, as an ASGI application."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from qtool.serving.bodies import ChatBody, CompletionBody
from qtool.serving.connection import ClientGoneError, RequestGate, json_response, refusal_response
from qtool.serving.prompts import BAD_REQUEST
from qtool.serving.refusals import NOT_FOUND, OWN_FAULT, UNAVAILABLE, RefusalError
from qtool.serving.responder import Responder


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What a request may take."""

    timeout_seconds: float = 600.0
    """From its first byte to the last of the answer."""
    max_body_bytes: int = 4 * 2**20


def make_app(
    responder: Responder, *, limits: RequestLimits = RequestLimits(), api_key: str | None = None
) -> ASGIApp:
    """Return the application; its engine begins with it and ends with it."""
    app = FastAPI(title="qtool", lifespan=_lifespan(responder), docs_url=None, redoc_url=None)
    _add_routes(app, responder)
    app.add_exception_handler(RefusalError, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientGoneError, _on_gone)
    app.add_exception_handler(Exception, _on_bug)
    return RequestGate(app, api_key, limits.max_body_bytes, limits.timeout_seconds)


def _lifespan(responder: Responder) -> Any:  # noqa: ANN401
    @asynccontextmanager
    async def run(_app: FastAPI) -> AsyncIterator[None]:
        responder.engine.start()
        try:
            yield
        finally:
            responder.engine.stop()

    return run


def _add_routes(app: FastAPI, responder: Responder) -> None:
    engine, name, created = responder.engine, responder.model.name, int(time.time())
    model = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "qtool",
        "max_model_len": engine.max_length,
    }

    @app.get("/health")
    async def health() -> Response:
        load = {"running": engine.load.running, "waiting": engine.load.waiting}
        status = "ok" if engine.is_ready else "stopping"
        return json_response({"status": status, **load}, 200 if engine.is_ready else UNAVAILABLE)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model]})

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> Response:
        if wanted != name:
            message = f"The model {wanted!r} isn't served here. This server has {name!r}."
            raise RefusalError(NOT_FOUND, message, param="model", code="model_not_found")
        return json_response(model)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await responder.complete(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await responder.chat(body, request)


async def _on_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusalError)
    return refusal_response(error)


async def _on_invalid(_request: Request, error: Exception) -> Response:
    """Say what is wrong first."""
    assert isinstance(error, RequestValidationError)
    first = _first_wrong(error)
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return _no_json(f"{why}, at character {first['loc'][-1]}.")
    where = ".".join(map(str, _place_in(error.body, first)))
    if not where and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        message = "The body must be a JSON object, sent as Content-Type: application/json."
        return refusal_response(RefusalError(BAD_REQUEST, message))
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "this server doesn't know it; leave it out"
    elif first["type"] == "none_required" or first.get("ctx", {}).get("max_length") == 0:
        what = "this server doesn't have that; leave it out"
    message = f"{where}: {what}" if where else what
    return refusal_response(RefusalError(BAD_REQUEST, message, param=where or None))


def _first_wrong(error: RequestValidationError) -> Mapping[str, Any]:
    """Return what is wrong in the first field that isn't right: of several types, the nearest."""
    found = error.errors()
    fields = [each for each in found if each["loc"][:2] == found[0]["loc"][:2]]
    return max(fields, key=lambda each: len(_place_in(error.body, each)))


def _place_in(body: object, wrong: Mapping[str, Any]) -> list[str | int]:
    """Return where in a body something is wrong, without the names of the types that were tried."""
    steps: list[str | int] = []
    at, loc = body, wrong["loc"][1:]
    for step in loc:
        is_key = isinstance(at, dict) and step in at
        if is_key or (isinstance(at, list) and isinstance(step, int) and step < len(at)):
            at = at[step]  # type: ignore[index]
            steps.append(step)
    return [*steps, loc[-1]] if wrong["type"] == "missing" and loc else steps


def _no_json(why: str) -> Response:
    message = f"The body isn't JSON: {why}"
    return refusal_response(RefusalError(BAD_REQUEST, message, code="invalid_json"))


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == BAD_REQUEST:  # what FastAPI says of all that its parser raises
        return _no_json("it isn't UTF-8, is nested too deeply, or has a number that is too long.")
    headers = dict(error.headers or {})
    message = f"{error.detail}. This server has /v1/chat/completions, /v1/completions, /v1/models."
    return refusal_response(RefusalError(error.status_code, message, headers=headers))


async def _on_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(_request: Request, error: Exception) -> Response:
    message = f"Internal error, a bug of qtool: {type(error).__name__}."
    return refusal_response(RefusalError(OWN_FAULT, message, code="internal_error"))
