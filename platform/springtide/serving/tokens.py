"""Bearer tokens: their file, their rates and quotas, and the command that makes one.

    python -m springtide.serving.tokens new --name shop --scopes read,write --file tokens.json

The file holds `{"tokens": [{"name", "sha256", "scopes", "rate"?, "burst"?, "daily"?}]}`. It never holds a token itself:
a token has 256 random bits, so its plain sha256 gives nothing away. Removing an entry revokes the token, within
RELOAD_S seconds and without a restart.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from springtide.errors import SpringtideError

log = logging.getLogger("springtide.serving")
SCOPES = ("read", "write", "admin")
PREFIX = "st_"  # so that scanners for leaked secrets can know one
RELOAD_S = 5.0
DAY_S = 86_400


class Token(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Literal["read", "write", "admin"], ...] = Field(min_length=1)
    rate: float | None = Field(None, gt=0)  # requests per second, in the long run
    burst: int | None = Field(None, ge=1)  # requests at once; None: those of two seconds
    daily: int | None = Field(None, ge=1)  # requests per day (UTC)

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class TokenFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: tuple[Token, ...]

    @model_validator(mode="after")
    def _all_differ(self) -> TokenFile:
        for values in ([t.name for t in self.tokens], [t.sha256 for t in self.tokens]):
            if len(set(values)) < len(values):
                raise ValueError("two tokens have the same name or sha256")
        return self


class TokenBook:
    """The tokens that are valid now, and what each has used. A daily quota goes by the clock (seconds since 1970 UTC),
    rates and revocation by the steady one, which nobody sets."""

    def __init__(
        self,
        source: Path | str,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """source: the path of a token file, or the text of one. Raises SpringtideError if it cannot be read."""
        self._path = source if isinstance(source, Path) else None
        self._clock, self._steady = clock, steady
        self._used: dict[str, _Use] = {}
        self._stamp = self._stamp_now()
        self._looked_at = steady()
        self._tokens = read_tokens(source)
        if not self._tokens:
            raise SpringtideError(
                "the token file names no token, so nobody could ask; make one with serving.tokens new"
            )

    def find(self, secret: str) -> Token | None:
        """The token, compared with every entry in a time that does not tell how near a guess was."""
        self._reload()
        digest = sha256_of(secret)
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found

    def wait_s(self, token: Token) -> int:
        """0 if the token may be used now, which is then counted; else whole seconds after which to try again."""
        use = self._used.setdefault(token.name, _Use())
        return use.take(token, self._clock(), self._steady())

    def _reload(self) -> None:
        if self._path is None or self._steady() - self._looked_at < RELOAD_S:
            return
        self._looked_at = self._steady()
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        if stamp is None:  # a file that was taken away revokes every token
            log.error("the token file %s is gone: no token is valid", self._path)
            self._tokens, self._stamp = (), stamp
            return
        try:
            self._tokens = read_tokens(self._path)
            self._stamp = stamp
        except SpringtideError as error:
            log.error("the tokens read before stay valid: %s", error)

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            state = self._path.stat() if self._path else None
        except OSError:
            return None
        return None if state is None else (state.st_mtime_ns, state.st_ino)


class _Use:
    """A token bucket and a day's count."""

    def __init__(self) -> None:
        self._level, self._filled_at = math.inf, 0.0  # full
        self._day, self._today = -1, 0

    def take(self, token: Token, now: float, steady: float) -> int:
        day = int(now // DAY_S)
        if day != self._day:
            self._day, self._today = day, 0
        if token.daily is not None and self._today >= token.daily:
            return max(1, math.ceil((day + 1) * DAY_S - now))
        if token.rate is not None:
            size = float(token.burst or max(1, math.ceil(2 * token.rate)))
            self._level = min(size, self._level + (steady - self._filled_at) * token.rate)
            self._filled_at = steady
            if self._level < 1:
                return max(1, math.ceil((1 - self._level) / token.rate))
            self._level -= 1
        self._today += 1
        return 0


def read_tokens(source: Path | str) -> tuple[Token, ...]:
    """The entries of a token file, or of its text. Raises SpringtideError that says what is wrong, never a hash."""
    where = f"the token file {source}" if isinstance(source, Path) else "the tokens of the environment"
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        return TokenFile.model_validate(json.loads(text)).tokens
    except OSError as error:
        raise SpringtideError(f"{where} cannot be read: {error.strerror}; make it with {_COMMAND}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "tokens"
        raise SpringtideError(f"{where}: {place}: {first['msg']}; make entries with {_COMMAND}") from None
    except ValueError:
        raise SpringtideError(f"{where} is not JSON; make it with {_COMMAND}") from None


def open_tokens(file: str | None, variable: str | None) -> TokenBook:
    """The tokens of a file, or of an environment variable that holds the text of one."""
    if file is not None:
        return TokenBook(Path(file))
    text = os.environ.get(variable or "")
    if text is None:
        raise SpringtideError(f"the environment variable {variable} is not set; put the text of a token file in it")
    return TokenBook(text)


def sha256_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new_token(
    name: str, scopes: Sequence[str], rate: float | None = None, burst: int | None = None, daily: int | None = None
) -> tuple[str, Token]:
    """A new secret and its entry. Raises ValidationError for a name, scope or limit that is out of bounds."""
    secret = PREFIX + secrets.token_urlsafe(32)
    values = {"name": name, "sha256": sha256_of(secret), "scopes": scopes, "rate": rate, "burst": burst, "daily": daily}
    return secret, Token.model_validate(values)


def add_token(path: Path, token: Token) -> None:
    """Write the entry into the file, for its owner's eyes only. Raises SpringtideError if the name is taken."""
    tokens = read_tokens(path) if path.exists() else ()
    if token.name in {known.name for known in tokens}:
        raise SpringtideError(f"{path} has a token named {token.name} already; remove its entry or choose another name")
    entries = [entry.model_dump(mode="json", exclude_none=True) for entry in (*tokens, token)]
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump({"tokens": entries}, file, indent=1)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise SpringtideError(f"cannot write {path}: {error.strerror}; check the folder") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m springtide.serving.tokens", description="Bearer tokens.")
    new = parser.add_subparsers(dest="command", required=True).add_parser("new", help="make a token; it is shown once")
    new.add_argument("--name", required=True, help="stands in logs in place of the token")
    new.add_argument("--scopes", required=True, help=f"some of {','.join(SCOPES)}; admin includes the others")
    new.add_argument("--rate", type=float, help="requests per second, in each Ingress replica")
    new.add_argument("--burst", type=int, help="requests at once; default: those of two seconds")
    new.add_argument("--daily", type=int, help="requests per day (UTC), in each Ingress replica")
    new.add_argument("--file", type=Path, help="the token file to add it to; without it the entry is printed")
    given = parser.parse_args(arguments)
    try:
        secret, token = new_token(given.name, given.scopes.split(","), given.rate, given.burst, given.daily)
        if given.file is not None:
            add_token(given.file, token)
        else:
            print(token.model_dump_json(exclude_none=True), file=sys.stderr)
    except ValidationError as error:
        first = error.errors()[0]
        print(f"--{first['loc'][0]} {first['input']!r}: {first['msg']}", file=sys.stderr)
        return 1
    except SpringtideError as error:
        print(error, file=sys.stderr)
        return 1
    print(secret)
    return 0


_COMMAND = "python -m springtide.serving.tokens new"

if __name__ == "__main__":
    sys.exit(main())
