"""Ask the HTTP application thousands of valid and broken requests, made from its own OpenAPI: no answer may be a 5xx.

    make fuzz-http                         # 10,000 cases
    python benchmarks/fuzz_http.py --cases 1000 --seed 7

The application runs in this process over a small untrained bundle, a real SQLite event log and a stand-in for the text
encoder. Every answer must have a documented status and content type, fit its documented schema, and be an
`{"error": {"code", "message"}}` if it is an error. Exits with 1 and a curl command at the first that is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from springtide.bundle import load_bundle
from springtide.serving.app import Edge, create_app
from springtide.serving.engine import Engine
from springtide.serving.options import AppOptions
from springtide.serving.popular import load_popular
from springtide.serving.query_cache import Encoded
from springtide.serving.service import Service
from springtide.serving.store import open_store
from toy import ITEMS_IN_TOY, toy_bundle

WIDTH = 384
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]


@contextmanager
def toy_application(folder: Path) -> Iterator[FastAPI]:
    """The application over a toy bundle in `folder`, its parts in this process."""
    path = toy_bundle(folder)
    engine = Engine(load_bundle(path), "toy")

    async def encode(texts: list[str]) -> Encoded:
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH) for text in texts]
        return Encoded(np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32))

    async def call(method: str, *arguments: Any) -> Any:
        if method == "score":
            return engine.score([arguments[0]])[0]
        if method == "models":
            return {"models": [{**engine.describe(), "primary": True}]}
        return getattr(engine, method)(*arguments)

    log = str(folder / "events.sqlite3")
    service = Service(open_store(log), encode, call, AppOptions(store=log).limits())
    service.popular = load_popular(path, "toy")
    try:
        yield create_app(service, Edge(hosts=("testserver",)))  # as schemathesis calls it
    finally:
        service.close()


def fuzz(app: FastAPI, cases: int, start: int = 0) -> Counter[tuple[str, int]]:
    """Ask `cases` requests, shared out over operations, half of them invalid by the schema where that is possible.

    Returns the answers counted by operation and status. Raises FailureGroup or AssertionError at the first wrong one.
    """
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    heavy = [operation for operation in operations if operation.body or operation.path_parameters or operation.query]
    answers: Counter[tuple[str, int]] = Counter()
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if operation in heavy else (None,):
            share = 5 if mode is None else max(1, (cases - 5 * (len(operations) - len(heavy))) // (2 * len(heavy)) + 1)
            _ask(operation, mode or GenerationMode.POSITIVE, share, start, answers)
    return answers


def _ask(operation: Any, mode: GenerationMode, cases: int, start: int, answers: Counter[tuple[str, int]]) -> None:
    name = f"{operation.method.upper()} {operation.path}"

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=st.none() | st.integers(0, ITEMS_IN_TOY - 1))
    def one(case: Any, known: int | None) -> None:
        if mode is GenerationMode.POSITIVE and known is not None:
            item_id = f"i{known:02d}"
            case.body = _with_item(case.body, item_id)
            if "item_id" in (case.path_parameters or {}):
                case.path_parameters["item_id"] = item_id
        answer = case.call()
        answers[name, answer.status_code] += 1
        assert answer.status_code < 500, f"{answer.status_code} to {case.as_curl_command()}: {answer.text[:300]}"
        if answer.status_code >= 400:
            body = answer.json()
            assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}, answer.text[:300]
        case.validate_response(answer, checks=CHECKS)

    one()


def _with_item(body: Any, item_id: str) -> Any:
    """The body about an item of the catalogue: made-up ids never meet one."""
    if isinstance(body, dict):
        return {key: item_id if key == "item_id" else _with_item(value, item_id) for key, value in body.items()}
    return [_with_item(value, item_id) for value in body] if isinstance(body, list) else body


def main() -> int:
    parser = argparse.ArgumentParser(description="Thousands of valid and broken requests; no answer may be a 5xx.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, toy_application(Path(folder)) as app:
        try:
            answers = fuzz(app, given_.cases, given_.seed)
        except (AssertionError, FailureGroup) as error:
            print(error, file=sys.stderr)
            for inner in getattr(error, "exceptions", ()):
                print(inner, file=sys.stderr)
            return 1
    for (name, status), count in sorted(answers.items()):
        print(f"{count:6d}  {status}  {name}")
    print(f"{sum(answers.values())} requests in {time.monotonic() - began:.0f} s, none answered by a 5xx")
    return 0


if __name__ == "__main__":
    sys.exit(main())
