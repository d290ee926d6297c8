"""The `springtide` command: every job as a subcommand, and the reports that need no cluster."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from springtide import jobs
from springtide.errors import SpringtideError
from springtide.files import write_json
from springtide.jobs import STAGES

AB_REPORT, REPLAY = "ab-report", "replay"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand as a process: exit status 0, or 1 after one sentence on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in STAGES:
        jobs.main(given[0], given[1:])
        return
    parser = argparse.ArgumentParser(prog="springtide", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for stage in STAGES:
        commands.add_parser(stage, help=f"the {stage} job: springtide {stage} --config FILE", add_help=False)
    _ab_options(
        commands.add_parser(AB_REPORT, help="compare the models of a split by what users took of their answers")
    )
    _replay_options(commands.add_parser(REPLAY, help="feed a log's test part through a running service"))
    options = parser.parse_args(given)
    try:
        _ab_report(options) if options.command == AB_REPORT else _replay(options)
    except SpringtideError as error:
        sys.exit(f"{options.command}: {error}")


def _ab_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workspace", type=Path, default=Path("workspace"), metavar="DIR", help="where exposures/ and the log lie")
    add("--exposures", type=Path, metavar="DIR", help="default: exposures/ of the workspace")
    add("--events", metavar="LOG", help="event log or exported Parquet; default: history.sqlite3 of the workspace")
    add("--window-hours", type=float, default=24.0, metavar="H", help="an event counts for so long after an exposure")
    add("--control", metavar="NAME", help="default: the arm with the most users")
    add("--actions", nargs="+", default=[], metavar="ACTION", help="that count as taking an item; default: all")
    add("--since", metavar="TIME", help="exposures from this time on (ISO-8601 or epoch)")
    add("--until", metavar="TIME", help="exposures before this time")
    add("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap")
    add("--out", type=Path, metavar="FILE", help="default: results/ab-report.json of the workspace")


def _ab_report(options: argparse.Namespace) -> None:
    from springtide.serving.ab_report import Question, plain, report, table
    from springtide.serving.exposures import FOLDER

    if options.window_hours <= 0 or options.resamples < 1:
        raise SpringtideError("--window-hours and --resamples must be above 0")
    question = Question(
        window_ms=round(options.window_hours * 3_600_000),
        control=options.control,
        actions=tuple(options.actions),
        since=_time("--since", options.since),
        until=_time("--until", options.until),
        resamples=options.resamples,
    )
    events = options.events or str(options.workspace / "history.sqlite3")
    found = report(options.exposures or options.workspace / FOLDER, events, question)
    out = options.out or options.workspace / "results" / f"{AB_REPORT}.json"
    write_json(out, {"job": AB_REPORT, "status": "ok", **plain(found)})
    print(table(found))
    print(f"written to {out}")


def _replay_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workspace", type=Path, default=Path("workspace"), metavar="DIR", help="whose prepared/ is replayed")
    add("--events", type=Path, metavar="FILE", help="Parquet, or a folder of it such as exported/, in place of that")
    add("--since", metavar="TIME", help="with --events: replay those from this time on (ISO-8601 or epoch)")
    add("--url", default="http://127.0.0.1:8000", help="of the running service")
    add("--token", metavar="NAME", help="environment variable that holds a token with the scopes read and write")
    add("--limit", type=int, metavar="N", help="only the first N events of the test part")
    add("--k", type=int, default=10, help="length of the answers")
    add("--repeats", action="store_true", help="ask also about items that the user has taken before")
    add("--out", type=Path, metavar="FILE", help="default: results/replay.json of the workspace")


def _replay(options: argparse.Namespace) -> None:
    import httpx

    from springtide.serving.replay import read_log, read_parquet_log, replay, table

    since = _time("--since", options.since)
    if (options.events is None) != (since is None):
        raise SpringtideError("--events and --since belong together: the log, and from when on it is replayed")
    if options.k < 1 or (options.limit is not None and options.limit < 1):
        raise SpringtideError("--k and --limit must be 1 or more")
    if options.token is not None and not os.environ.get(options.token):
        raise SpringtideError(f"--token {options.token}: there is no environment variable of that name")
    headers = {"Authorization": f"Bearer {os.environ[options.token]}"} if options.token else {}
    if options.events is None or since is None:
        log = read_log(options.workspace, options.limit)
    else:
        log = read_parquet_log(options.events, since, options.limit)
    with httpx.Client(base_url=options.url, headers=headers, timeout=30) as client:
        figures = replay(client, log, k=options.k, exclude_seen=not options.repeats).figures()
    out = options.out or options.workspace / "results" / f"{REPLAY}.json"
    write_json(out, {"job": REPLAY, "status": "ok", "url": options.url, **figures})
    print(table(figures))
    print(f"written to {out}")


def _time(option: str, text: str | None) -> int | None:
    from springtide.serving.schemas import parse_timestamp

    try:
        return None if text is None else parse_timestamp(text)
    except ValueError as error:
        raise SpringtideError(f"{option} {text!r}: {error}") from None
