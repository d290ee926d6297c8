"""Tokens, scopes, rates and headers of the HTTP application, over a backend that answers anything."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from springtide.errors import SpringtideError
from springtide.serving.app import Edge, create_app
from springtide.serving.security import needed_scope
from springtide.serving.tokens import Token, TokenBook, add_token, main, new_token, open_tokens, read_tokens, sha256_of


class Backend:
    """Answers with the least that is valid."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def recommend(self, request: Any) -> dict[str, Any]:
        self.asked.append("recommend")
        return {"items": [], "model": "m@1", "source": "popular", "gate": {"long": None, "short": None}}

    async def events(self, events: Any) -> dict[str, Any]:
        self.asked.append("events")
        return {"accepted": len(events), "duplicates": 0}

    async def interests(self, user_id: str) -> dict[str, Any]:
        return {"user_id": user_id}

    async def similar(self, item_id: str, k: int) -> dict[str, Any]:
        return {"item_id": item_id}

    async def encode(self, request: Any) -> dict[str, Any]:
        return {"dim": 0}

    async def models(self) -> dict[str, Any]:
        return {"models": []}

    async def ready(self) -> dict[str, Any]:
        return {"ready": True, "checks": {}}

    def close(self) -> None:
        self.asked.append("close")


class Clock:
    now = 1_000_000 * 86_400.0

    def __call__(self) -> float:
        return self.now


HERE = "http://127.0.0.1"
SECRETS: dict[str, str] = {}


def entry(name: str, **values: Any) -> Token:
    SECRETS[name], token = new_token(name, values.pop("scopes", ["read"]), **values)
    return token


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    for token in (
        entry("reader"),
        entry("writer", scopes=["read", "write"]),
        entry("admin", scopes=["admin"]),
        entry("slow", rate=0.5, burst=2),
        entry("poor", daily=2),
    ):
        add_token(path, token)
    return path


@pytest.fixture
def client(file: Path, clock: Clock) -> Iterator[TestClient]:
    with TestClient(create_app(Backend(), Edge(tokens=TokenBook(file, clock, clock)))) as opened:  # type: ignore[arg-type]
        yield opened


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


def ask(client: TestClient, name: str | None, method: str = "POST", path: str = "/v1/recommend", **body: Any) -> Any:
    json_body = (body or {"user_id": "u"}) if method == "POST" else None
    return client.request(method, path, json=json_body, headers=bearer(name) if name else {})


# ---------------------------------------------------------------- who may
def test_without_a_token_only_health_and_documentation_answer(client: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for method, path in [("POST", "/v1/recommend"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/none"),
                         ("POST", "/v1/events"), ("GET", "/v1/users/u/interests"), ("DELETE", "/docs/x")]:  # fmt: skip
        answer = ask(client, None, method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), path
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="springtide"'


def test_the_document_says_which_routes_take_a_token(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"token": []}]
    paths = document["paths"]
    assert paths["/healthz"]["get"]["security"] == [] and "security" not in paths["/v1/recommend"]["post"]
    with TestClient(create_app(Backend(), Edge()), HERE) as open_to_all:  # type: ignore[arg-type]
        assert "security" not in open_to_all.get("/openapi.json").json()


@pytest.mark.parametrize(
    "header",
    ["Bearer", "Bearer ", "Bearer st_wrong", "Basic dTpw", "bearer\u00e9", "Bearer " + "x" * 5000, "Bearer \u00e9"],
)
def test_a_wrong_token_is_refused(client: TestClient, header: str) -> None:
    answer = client.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert "Bearer" in answer.headers["WWW-Authenticate"]


def test_the_stored_hash_is_no_token(client: TestClient, file: Path) -> None:
    for token in read_tokens(file):
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {token.sha256}"}).status_code == 401


@pytest.mark.parametrize(
    ("name", "method", "path", "status"),
    [
        ("reader", "POST", "/v1/recommend", 200),
        ("reader", "POST", "/v1/encode", 200),
        ("reader", "GET", "/v1/users/u/interests", 200),
        ("reader", "GET", "/v1/items/i/similar", 200),
        ("reader", "GET", "/v1/models", 200),
        ("reader", "GET", "/metrics", 200),
        ("reader", "POST", "/v1/events", 403),
        ("reader", "PUT", "/v1/items/i", 403),
        ("reader", "GET", "/elsewhere", 403),
        ("writer", "POST", "/v1/events", 202),
        ("admin", "POST", "/v1/events", 202),
        ("admin", "GET", "/elsewhere", 404),
    ],
)
def test_scopes(client: TestClient, name: str, method: str, path: str, status: int) -> None:
    bodies: dict[str, Any] = {"/v1/events": {"user_id": "u", "item_id": "i"}, "/v1/encode": {"text": "a"}}
    answer = ask(client, name, method, path, **bodies.get(path, {}))
    assert answer.status_code == status
    if status == 403:
        assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]


def test_a_token_may_be_given_in_any_case_of_bearer(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"Authorization": f"bEARER {SECRETS['reader']}"}).status_code == 200


def test_what_is_unknown_needs_admin() -> None:
    assert needed_scope("POST", "/v1/recommend/") == "write"
    assert needed_scope("GET", "/healthz/") == "admin"
    assert needed_scope("GET", "/static-offline-docs-of-mine") == "admin"
    assert needed_scope("DELETE", "/v1/users/u") == "write"
    assert needed_scope("HEAD", "/v1/models") == "read"


def test_a_refused_caller_has_no_body_read(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        yield b"["
        raise AssertionError("the body was read")

    assert client.post("/v1/events", content=endless(), headers=bearer("reader")).status_code == 403


# ---------------------------------------------------------------- rates and quotas
def test_a_rate_lets_a_burst_pass_and_then_refills(client: TestClient, clock: Clock) -> None:
    assert [ask(client, "slow").status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(client, "slow")
    assert (refused.json()["error"]["code"], refused.headers["Retry-After"]) == ("too_many_requests", "2")
    clock.now += 2
    assert [ask(client, "slow").status_code for _ in range(2)] == [200, 429]
    assert ask(client, "reader").status_code == 200  # another token has a rate of its own


def test_a_quota_lasts_until_midnight(client: TestClient, clock: Clock) -> None:
    clock.now += 86_000
    assert [ask(client, "poor").status_code for _ in range(3)] == [200, 200, 429]
    assert ask(client, "poor").headers["Retry-After"] == "400"
    clock.now += 400
    assert ask(client, "poor").status_code == 200


def test_the_long_run_rate_is_the_one_given(clock: Clock) -> None:
    book, token = TokenBook(json.dumps({"tokens": [entry("x", rate=5).model_dump(mode="json")]}), clock, clock), None
    token = book.find(SECRETS["x"])
    assert token is not None
    passed = 0
    for _ in range(10_000):
        clock.now += 0.01
        passed += book.wait_s(token) == 0
    assert passed == pytest.approx(100 * 5 + 10, abs=1)  # 100 seconds and the first burst


# ---------------------------------------------------------------- the file
def test_a_token_taken_out_of_the_file_is_refused_soon(client: TestClient, file: Path, clock: Clock) -> None:
    kept = [token for token in read_tokens(file) if token.name != "reader"]
    file.write_text(json.dumps({"tokens": [token.model_dump(mode="json") for token in kept]}))
    clock.now += 10
    assert ask(client, "reader").status_code == 401
    assert ask(client, "writer").status_code == 200
    file.write_text("{")
    clock.now += 10
    assert ask(client, "writer").status_code == 200  # a file half written takes nobody's access
    file.write_text('{"tokens": []}')
    clock.now += 10
    assert ask(client, "writer").status_code == 401


def test_a_file_that_is_taken_away_revokes_every_token(client: TestClient, file: Path, clock: Clock) -> None:
    kept = file.read_text()
    file.unlink()
    clock.now += 10
    assert ask(client, "writer").status_code == 401
    file.write_text(kept)
    clock.now += 10
    assert ask(client, "writer").status_code == 200


def test_a_wall_clock_that_is_set_back_revives_no_token_and_stops_no_rate(file: Path, clock: Clock) -> None:
    steady = Clock()
    book = TokenBook(file, clock, steady)
    slow = book.find(SECRETS["slow"])
    assert slow is not None and [book.wait_s(slow) for _ in range(3)] == [0, 0, 2]
    clock.now -= 3600
    steady.now += 2
    assert book.wait_s(slow) == 0
    file.unlink()
    steady.now += 10
    assert book.find(SECRETS["slow"]) is None


def test_a_file_without_a_token_is_refused_at_the_start() -> None:
    with pytest.raises(SpringtideError, match="names no token"):
        TokenBook('{"tokens": []}')


def test_the_command_writes_an_entry_and_shows_the_token_once(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "tokens.json"
    arguments = ["new", "--name", "shop", "--scopes", "read,write", "--rate", "50", "--file", str(path)]
    assert main(arguments) == 0
    secret = capsys.readouterr().out.strip()
    assert secret not in path.read_text()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    (token,) = read_tokens(path)
    assert (token.name, token.scopes, token.rate, token.sha256) == ("shop", ("read", "write"), 50, sha256_of(secret))
    assert main(arguments) == 1
    assert "already" in capsys.readouterr().err
    assert main(["new", "--name", "shop two", "--scopes", "read"]) == 1
    capsys.readouterr()
    assert main(["new", "--name", "other", "--scopes", "read,root"]) == 1
    assert capsys.readouterr().err.startswith("--scopes 'root': ")
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ('{"tokens": []}', "tokens"),
        ('{"tokens": [{"name": "a", "sha256": "0", "scopes": ["read"]}]}', "tokens.0.sha256"),
        ('{"tokens": [{"name": "a", "sha256": "%s", "scopes": ["root"]}]}' % ("0" * 64), "tokens.0.scopes"),
        ('{"tokens": [%s, %s]}' % (('{"name": "a", "sha256": "%s", "scopes": ["read"]}' % ("0" * 64),) * 2), "same"),
    ],
)  # fmt: skip
def test_a_wrong_file_gets_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(SpringtideError, match=sentence):
        TokenBook(path)
    with pytest.raises(SpringtideError, match="cannot be read"):
        TokenBook(tmp_path / "none.json")


def test_tokens_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpringtideError, match="SHOP_TOKENS is not set"):
        open_tokens(None, "SHOP_TOKENS")
    monkeypatch.setenv("SHOP_TOKENS", json.dumps({"tokens": [entry("env").model_dump(mode="json")]}))
    found = open_tokens(None, "SHOP_TOKENS").find(SECRETS["env"])
    assert found is not None and found.name == "env"


# ---------------------------------------------------------------- headers
def test_headers_of_every_answer(client: TestClient) -> None:
    for answer in (ask(client, "reader"), ask(client, None), client.get("/healthz"), ask(client, "reader", k=0)):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Request-ID"]
    page = client.get("/docs")
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    assert "http" not in page.headers["Content-Security-Policy"]
    preflight = client.options(
        "/v1/recommend", headers={"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 401
    assert not [name for name in preflight.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("10.0.0.7", 200),
     ("api.shop.example", 200), ("evil.example", 421), ("evil.example:8000", 421), ("127.0.0.1.evil.example", 421),
     ("localhost.evil.example", 421), ("[evil.example]", 421), ("127.0.0.1@evil.example", 421)],
)  # fmt: skip
def test_without_tokens_no_other_name_is_answered(host: str, status: int) -> None:
    """A page whose name was pointed at this machine must not read what it answers."""
    edge = Edge(hosts=("api.shop.example",))
    with TestClient(create_app(Backend(), edge), HERE) as client:  # type: ignore[arg-type]
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/events"), ("GET", "/metrics"), ("GET", "/docs")):
            answer = client.request(method, path, headers={"Host": host})
            assert (answer.status_code == 421) == (status == 421), path


def test_with_tokens_any_name_is_answered(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"Host": "shop.example", **bearer("reader")}).status_code == 200


def test_the_backend_is_closed_with_the_application() -> None:
    backend = Backend()
    with TestClient(create_app(backend), HERE) as client:  # type: ignore[arg-type]
        assert client.get("/v1/models").status_code == 200  # without tokens nobody is asked for one
        assert backend.asked == []
    assert backend.asked == ["close"]
