"""Bodies are read as FastAPI reads them, but for less, and large ones apart from the event loop.

FastAPI looks for dependencies in every request, which takes a tenth of the time of an Ingress; no route here has any.
While a large body, or one of many values, is parsed, everybody else is answered. Python's JSON parser shares the
interpreter with nobody until it is done, so bodies of very many values were refused before (limits.too_deep): others
wait for some ten milliseconds at most.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

AT_ONCE = 128 * 2**10  # bytes that are read within a millisecond or two, where a thread would cost as much
A_VALUE = 64  # bytes of text that take as long as checking one value
TOGETHER = 2  # large bodies that are read at the same time; others wait for their turn
_threads = ThreadPoolExecutor(TOGETHER, "large-bodies")
Result = TypeVar("Result")


async def read_apart(size: int, work: Callable[[], Result]) -> Result:
    """What `work` makes of a body of so many bytes, in a thread if they are many."""
    if size <= AT_ONCE:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


def weight(body: bytes) -> int:
    """Bytes of plain text that would take as long to read: what stands in many lists, objects and values takes longer.

    Commas and openers within strings count too, which costs a thread at most.
    """
    return max(len(body), A_VALUE * sum(map(body.count, (b",", b"[", b"{"))))


class BodyRoute(APIRoute):
    """A route whose endpoint takes its body as the last parameter, and before it those of its path alone.

    Refuses a body as FastAPI does.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual, endpoint = super().get_route_handler(), self.endpoint
        hints = get_type_hints(endpoint, include_extras=True)
        adapters: dict[str, TypeAdapter[Any]] = {
            name: TypeAdapter(hint) for name, hint in hints.items() if name != "return"
        }
        *of_path, last = adapters

        async def handler(request: Request) -> Response:
            body = await request.body()
            if not body or not is_json(request.headers):
                return await usual(request)
            given = {name: _fitting(request.path_params[name], adapters[name], "path", name) for name in of_path}
            given[last] = await read_apart(weight(body), lambda: parsed(body, adapters[last]))
            response: Response = await endpoint(**given)
            return response

        return handler


def is_json(headers: Mapping[str, str]) -> bool:
    """Whether a body is said to be JSON, as FastAPI reads it."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def parsed(body: bytes, adapter: TypeAdapter[Any]) -> Any:
    """The value of a JSON body. Raises what FastAPI raises for one that is no JSON or does not fit."""
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        told = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([told]) from None
    except (ValueError, RecursionError):  # not UTF-8, a number of thousands of digits, or nested too deep
        raise HTTPException(400) from None
    return _fitting(value, adapter, "body")


def _fitting(value: Any, adapter: TypeAdapter[Any], *place: str) -> Any:
    """The value as its type has it. Raises RequestValidationError with the place in the request if it does not fit."""
    try:
        return adapter.validate_python(value, from_attributes=True)  # as FastAPI asks it
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**one, "loc": (*place, *one["loc"])} for one in problems]) from None
