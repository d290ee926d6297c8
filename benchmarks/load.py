"""HTTP load from a process of its own: N connections, each sending its next request when answered, or at a fixed rate.

    python benchmarks/load.py URL BODIES.jsonl CONNECTIONS SECONDS [--tool wrk|aiohttp] [--rate R]

POSTs the lines of BODIES in turn and prints one JSON line: requests, whole, seconds, errors, p50_ms, p99_ms, max_ms.
`whole` are the 2xx answers that are not degraded, and all others are errors; times are those of all answers. wrk costs
little of the machine it shares with the server; aiohttp is the fallback where it is not installed. With --rate (always
aiohttp) requests are due R times a second, answered or not, and each one's time runs from when it was due: a server
that stalls is charged for all that waited meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

DEGRADED = re.compile(rb'"degraded": ?true')  # no text within an answer looks so: its quotes are escaped
WRK_SCRIPT = """
local bodies = {}
local last = 0
local threads = {}
whole = 0
function setup(thread) threads[#threads + 1] = thread end
function init(args)
  for line in io.lines(args[1]) do bodies[#bodies + 1] = line end
end
function request()
  last = last % #bodies + 1
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, bodies[last])
end
function response(status, headers, body)
  if status < 300 and not body:find('"degraded": ?true') then whole = whole + 1 end
end
function done(summary, latency, requests)
  local e, whole = summary.errors, threads[1]:get("whole")
  io.write(string.format(
    '\\nRESULT {"requests": %d, "whole": %d, "seconds": %.6f, "errors": %d, '
    .. '"p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f}\\n', summary.requests, whole,
    summary.duration / 1e6, summary.requests - whole + e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


def wrk(url: str, bodies: Path, connections: int, seconds: float) -> dict[str, Any]:
    """Load by wrk with one thread. Durations are whole seconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK_SCRIPT)
        script.flush()
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s", script.name]
        command = ["wrk", *options, url, "--", str(bodies)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds + 120)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if done.returncode or line is None:
        raise SystemExit(f"wrk failed: {done.stderr or done.stdout}")
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


async def by_aiohttp(
    url: str, bodies: list[bytes], connections: int, seconds: float, rate: float | None = None
) -> dict[str, Any]:
    """Load by one asyncio loop; its own cost is a third of a millisecond a request. rate: per second; None: as fast as
    the connections go."""
    import aiohttp

    latencies: list[float] = []
    whole = sent = 0
    begin = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections), headers=headers) as session:

        async def client() -> None:
            nonlocal whole, sent
            while True:
                started = time.perf_counter() if rate is None else begin + sent / rate
                if started - begin >= seconds:
                    return
                body, sent = bodies[sent % len(bodies)], sent + 1
                if (early := started - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                try:
                    async with session.post(url, data=body, timeout=aiohttp.ClientTimeout(20)) as answer:
                        told = await answer.read()
                        whole += answer.status < 300 and DEGRADED.search(told) is None
                except (aiohttp.ClientError, TimeoutError):
                    pass  # no whole answer
                latencies.append((time.perf_counter() - started) * 1e3)

        await asyncio.gather(*(client() for _ in range(connections)))
    took = time.perf_counter() - begin
    latencies.sort()
    requests, p50_ms, p99_ms = len(latencies), latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    return {"requests": requests, "whole": whole, "seconds": took, "errors": requests - whole, "p50_ms": p50_ms,
            "p99_ms": p99_ms, "max_ms": latencies[-1]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--tool", choices=["wrk", "aiohttp"], default="wrk" if shutil.which("wrk") else "aiohttp")
    parser.add_argument("--rate", type=float, help="requests per second, over at most CONNECTIONS connections")
    args = parser.parse_args()
    if args.tool == "wrk" and args.rate is None:
        result = wrk(args.url, args.bodies, args.connections, args.seconds)
    else:
        lines = args.bodies.read_bytes().splitlines()
        result = asyncio.run(by_aiohttp(args.url, lines, args.connections, args.seconds, args.rate))
    print(json.dumps({**result, "tool": args.tool if args.rate is None else "aiohttp"}))


if __name__ == "__main__":
    main()
