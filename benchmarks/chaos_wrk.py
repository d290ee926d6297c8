"""Many requests at once for benchmarks/chaos.py, by wrk, and what became of them.

A burst of ten times what a machine serves must not cost more of the machine than serving does: wrk is written in C and
sends a request in microseconds. Its connections ask for recommendations and pause after an answer, so that together
they start about as many requests a second as wanted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from chaos_figures import Counted
from isolation import Place

PAUSE_S = 0.25
UNDER_WAY = 300  # connections that wait for an answer at any time, beside those that pause
SCRIPT = """
local pause = 0
local threads = {}
ok, degraded, shed, failed, said = 0, 0, 0, 0, {}
function setup(thread) threads[#threads + 1] = thread end
function init(args)
  pause = tonumber(args[1])
  wrk.headers["Content-Type"] = "application/json"
end
function delay() return pause * (0.5 + math.random()) end
function request()
  return wrk.format("POST", "/v1/recommend", nil, '{"user_id": "u' .. math.random(0, 39) .. '", "k": 10}')
end
function response(status, headers, body)
  if status < 300 then
    if body:find('"degraded": ?true') then degraded = degraded + 1 else ok = ok + 1 end
  elseif status == 503 and (headers["retry-after"] or headers["Retry-After"]) and body:find('"overloaded"') then
    shed = shed + 1
  else
    failed = failed + 1
    reason = status .. " " .. body:sub(1, 120):gsub("[^%w ]", " ")
  end
end
function done(summary, latency, _)
  local thread, errors = threads[1], summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format('\\nRESULT {"ok": %d, "degraded": %d, "shed": %d, "failed": %d, "broken": %d, '
    .. '"slowest": %.6f, "seconds": %.6f, "reason": "%s"}\\n', thread:get("ok"), thread:get("degraded"),
    thread:get("shed"), thread:get("failed"), broken, latency.max / 1e6, summary.duration / 1e6,
    thread:get("reason") or ""))
end
"""


def answered_per_second(place: Place, url: str, folder: Path, seconds: float) -> float:
    """What is served to 32 connections without pauses."""
    found = _run(place, url, folder, 32, 0, seconds)
    return (found.sent - found.shed - found.failed) / found.seconds


def at_rate(place: Place, url: str, folder: Path, rate: float, seconds: float) -> Counted:
    """About `rate` requests a second."""
    return _run(place, url, folder, math.ceil(rate * PAUSE_S) + UNDER_WAY, PAUSE_S, seconds)


def _run(place: Place, url: str, folder: Path, connections: int, pause_s: float, seconds: float) -> Counted:
    """Raises SystemExit if wrk does not run."""
    script = folder / "burst.lua"
    script.write_text(SCRIPT)
    options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(script)]
    # A connection for each caller needs a file for each.
    command = ["sh", "-c", 'ulimit -n 65536; exec wrk "$@"', "wrk", *options, url, "--", str(pause_s * 1000)]
    printed = place.ask(command, place.environment({}), seconds + 60)
    line = next((line for line in printed.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"wrk gave no result: {printed[-500:]}")
    return counted(json.loads(line.removeprefix("RESULT ")))


def counted(result: dict[str, float | str]) -> Counted:
    """What the script printed; a connection that broke, or was not answered in time, is a failed request."""
    ok, degraded, shed, failed, broken = (int(result[k]) for k in ("ok", "degraded", "shed", "failed", "broken"))
    reasons = {str(result["reason"]): failed, "connection broken": broken}
    return Counted(
        sent=ok + degraded + shed + failed + broken,
        failed=failed + broken,
        degraded=degraded,
        shed=shed,
        slowest=float(result["slowest"]),
        seconds=float(result["seconds"]),
        reasons={reason: number for reason, number in reasons.items() if number},
    )
