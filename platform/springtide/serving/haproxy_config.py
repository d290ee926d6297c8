"""What is changed in the HAProxy configuration that Ray writes: text in, text out.

Its side doors (statistics, metrics) move to loopback, its log lines lose the path, `springtide-haproxy` keeps its front
and its admin socket, and it sheds: an Ingress gets no more requests at once than it takes, a few wait for a place, and
all others are answered 503 with Retry-After by HAProxy itself, which costs microseconds where Python needs a
millisecond.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from springtide.errors import SpringtideError

LOOPBACK = "127.0.0.1"
FRONT = "frontend http_frontend"
SIDE_DOORS = ("frontend prometheus", "listen stats")
MAX_CONCURRENT = 100  # requests under way in one Ingress, unless the Serve file says otherwise
CALLER_S = 15  # for the headers of a request, and again for its body
VITAL = "/healthz /readyz /metrics"  # which must answer under load too
_SECTION = re.compile(r"^(?:frontend|backend|listen|global|defaults|resolvers|peers|userlist|ring|log-forward)\b.*$")
_BIND = re.compile(r"^(\s+bind\s+)(\S*:\d+)(.*)$")
_ADMIN = re.compile(r"^(\s+stats\s+socket\s+)(\S+)(.*)$")
_SERVED = re.compile(r"^backend http-\S+$")  # the backends of applications, in Ray's words

Sections = dict[str, list[str]]
Change = Callable[[str, str], list[str]]  # section, line -> what stands in the place of the line


@dataclass(frozen=True)
class Limits:
    """When HAProxy refuses a request (Ingress' own `max_concurrent` stays behind it), and how long it outlives Ray's
    manager."""

    at_once: int = MAX_CONCURRENT // 2  # requests that one Ingress gets
    waiting: int = MAX_CONCURRENT // 2  # requests that wait for a place in any Ingress; a further one is refused
    wait_ms: int = 1000  # then one that waits is refused too
    linger_s: int = 20  # to serve on when Ray's manager of HAProxy has died, and also where Serve was shut down

    @property
    def large(self) -> int:
        """Requests with large bodies that pass at once: whoever stalls in one takes no more places than these."""
        return max(1, self.at_once // 4)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Limits:
        """As SPRINGTIDE_HAPROXY_AT_ONCE, ..._WAITING, ..._WAIT_MS and ..._LINGER_S say. Raises SpringtideError for no
        number."""
        default = cls()
        return cls(
            at_once=_number(environment, "AT_ONCE", default.at_once),
            waiting=_number(environment, "WAITING", default.waiting),
            wait_ms=_number(environment, "WAIT_MS", default.wait_ms),
            linger_s=_number(environment, "LINGER_S", default.linger_s),
        )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    written = environment.get(variable := f"SPRINGTIDE_HAPROXY_{name}", str(default))
    if not written.isdecimal() or not 0 < int(written) < 1_000_000:
        raise SpringtideError(f"{variable} is {written!r}; it must be a whole number above 0")
    return int(written)


# ---------------------------------------------------------------- reading
def admin_socket(config: str) -> Path:
    """Where Ray expects HAProxy's admin socket. Raises SpringtideError if the configuration names none."""
    for line in sections(config).get("global", []):
        if found := _ADMIN.match(line):
            return Path(found[2])
    raise _foreign("names no admin socket")


def front_addresses(config: str) -> list[str]:
    """What callers connect to: host:port, the host * for all."""
    return [bind[2] for line in sections(config).get(FRONT, []) if (bind := _BIND.match(line))]


def serves(config: str) -> bool:
    """Does it know a replica of any application? Ray's first one after a start never does."""
    return any(
        line.split()[:1] == ["server"]
        for name, lines in sections(config).items()
        if _SERVED.match(name)
        for line in lines
    )


def sections(config: str) -> Sections:
    """The lines below each section's name."""
    found: Sections = {}
    lines = found.setdefault("", [])
    for line in config.splitlines():
        if _SECTION.match(line):
            lines = found.setdefault(" ".join(line.split()), [])
        else:
            lines.append(line)
    return found


# ---------------------------------------------------------------- writing
def on_loopback(config: str) -> str:
    """With the side doors' addresses replaced. Raises SpringtideError if one is not found."""
    closed = set()

    def close(section: str, line: str) -> list[str]:
        bind = _BIND.match(line) if section in SIDE_DOORS else None
        if bind is None:
            return [line]
        closed.add(section)
        return [f"{bind[1]}{LOOPBACK}:{bind[2].rpartition(':')[2]}{bind[3]}"]

    written = _rewritten(config, close)
    if missing := sorted(set(SIDE_DOORS) - closed):
        raise _foreign(f"has no address in `{missing[0]}`")
    return written


def discreet(config: str) -> str:
    """With log lines that hold no path, and so no ids of users and items."""

    def change(_: str, line: str) -> list[str]:
        return [f"    log-format {_quoted(_LINE)}"] if line.split() == ["option", "httplog"] else [line]

    return _rewritten(config, change)


def shedding(config: str, limits: Limits) -> str:
    """With the limits, and with errors that tell callers to come again.

    Ray's own answers are 500 where nothing is free, and 404 for every path while no application is known.
    """
    body = {code: json.dumps({"error": {"code": code, "message": message}}) for code, message in _MESSAGES.items()}
    unavailable = f"{_JSON} string {_quoted(body['unavailable'])} hdr Retry-After 1"
    untold = not serves(config)
    held = _held(config)
    full = f"{{ queue ge {limits.waiting} }} !{{ path {VITAL} }}"

    def limit(section: str, line: str) -> list[str]:
        words = line.split()
        if section == "defaults" and words[:2] == ["errorfile", "503"]:
            return []
        if section == "defaults" and words[:1] == ["mode"]:
            return [
                line,
                f"    timeout http-request {CALLER_S}s",
                f"    http-error status 503 {unavailable}",
                f"    http-error status 408 {_JSON} string {_quoted(body['body_timeout'])}",
            ]
        if section == "backend default_backend" and words[:4] == ["http-request", "return", "status", "404"] and untold:
            return [f"    http-request return status 503 {unavailable}"]
        if _SERVED.match(section) and words[:1] == ["http-reuse"]:
            return [
                line,
                f"    default-server maxconn {limits.at_once}",
                f"    timeout queue {limits.wait_ms}ms",
                # A line for each refused request would cost Ray's collector of metrics more than the refusal.
                f"    http-request set-log-level silent if {full}",
                f"    http-request return status 503 {_JSON} string {_quoted(body['overloaded'])}"
                f" hdr Retry-After 1 if {full}",
                # Who stalls in mid-request waits here, and takes no place in an Ingress, which reads the body of any
                # method. A request without a body passes at once.
                f"    http-request wait-for-body time {CALLER_S}s",
                # But for one whose body is larger than what is held here: of those an Ingress gets a few.
                "    stick-table type integer size 10 expire 1m store conn_cur",
                "    http-request set-var(txn.springtide_body) req.hdr(content-length)",
                f"    acl springtide_large req.hdrs,length,add(txn.springtide_body) -m int gt {held}",
                "    acl springtide_large req.hdr(transfer-encoding) -m found",
                "    http-request track-sc0 int(1) if springtide_large",
                f"    http-request return status 503 {_JSON} string {_quoted(body['overloaded'])}"
                f" hdr Retry-After 1 if springtide_large {{ sc0_conn_cur gt {limits.large} }}",
            ]
        return [line]

    return _rewritten(config, limit)


def _held(config: str) -> int:
    """Bytes of a request, its headers included, that HAProxy surely waits for as a whole."""
    lines = (line.split() for line in sections(config).get("global", []))
    size = next((int(words[1]) for words in lines if words[:1] == ["tune.bufsize"] and words[1:2]), 16_384)
    return size * 3 // 4


def handed_over(config: str, admin: Path, fronts: Mapping[str, int] | None) -> str:
    """With another admin socket and the front on inherited sockets (address -> descriptor); None: without a front."""

    def hand_over(section: str, line: str) -> list[str]:
        if section == "global" and (found := _ADMIN.match(line)):
            return [f"{found[1]}{admin}{found[3].replace('mode 666', 'mode 600')}"]
        if section == FRONT and (bind := _BIND.match(line)):
            return [] if fronts is None else [f"{bind[1]}fd@{fronts[bind[2]]}{bind[3]}"]
        return [line]

    return _rewritten(config, hand_over)


_JSON = "content-type application/json"
# HAProxy's own line without the caller's address, the captured headers and, of the request, all but the method.
_LINE = "[%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %tsc %ac/%fc/%bc/%sc/%rc %sq/%bq %HM"
_MESSAGES = {
    "overloaded": "too many requests are under way; try again",
    "unavailable": "nothing that could answer is there yet, or was free in time; try again",
    "body_timeout": "the request did not arrive in time",
}


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


def _rewritten(config: str, change: Change) -> str:
    return "\n".join([*_changed(config, change), ""])


def _changed(config: str, change: Change) -> Iterator[str]:
    section = ""
    for line in config.splitlines():
        if _SECTION.match(line):
            section = " ".join(line.split())
            yield line
        else:
            yield from change(section, line)


def _foreign(what: str) -> SpringtideError:
    return SpringtideError(
        f"HAProxy's configuration {what}, so this version of Ray writes it differently; "
        "unset RAY_SERVE_HAPROXY_BINARY_PATH and keep its ports behind a firewall"
    )
