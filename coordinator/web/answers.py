"""How the API answers: JSON, one token, one sentence for every error; who may ask for what."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from rankfleet.federated.errors import ConfigError, RankfleetError
from rankfleet.federated.trust.roster import decode_key

from ..operators.roster_in_force import Operators, role_for


def answer(data: Any, status: int = 200) -> web.Response:
    """JSON."""
    return web.Response(body=msgspec.json.encode(data), status=status, content_type="application/json")


@web.middleware
async def errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """A RankfleetError is an answer, with its hint."""
    if request.headers.get("Authorization") != f"Bearer {request.app[TOKEN]}" and request.path != "/health":
        return answer({"error": "the token is wrong", "hint": "use the data_dir of the running service"}, 401)
    try:
        if request.path != "/health":
            body = await request.read()
            role = role_for(request.method, request.path, is_dry(request))
            await asyncio.to_thread(
                request.app[OPERATORS].allowed, request.method, request.path_qs, body, request.headers, role
            )
        response: web.StreamResponse = await handler(request)
        return response
    except RankfleetError as error:
        return answer({"error": str(error.args[0]), "hint": error.hint}, 400)


TOKEN: web.AppKey[str] = web.AppKey("token", str)
OPERATORS: web.AppKey[Operators] = web.AppKey("operators", Operators)


def is_dry(request: web.Request) -> bool:
    """Is a job only to be looked at?"""
    return bool(request.query.get("dry"))


def signed_by_operator(request: web.Request) -> tuple[bytes, bytes]:
    """The operator's key and signature over the job itself. Raises ConfigError."""
    try:
        return decode_key(request.headers.get("X-Operator", ""), "the operator's key"), bytes.fromhex(
            request.headers["X-Job"]
        )
    except (KeyError, ValueError):
        raise ConfigError("the job is not signed", "--key FILE, or RANKFLEET_KEY") from None
