"""Look up every pinned dependency in the database of known vulnerabilities; a found one fails, a missing network not.

.ci/audit-ignore.txt holds what was looked at and does not concern us: one `ID reason` in a line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 300


def ignored(text: str) -> dict[str, str]:
    """Identifier -> reason. Raises ValueError for a line without a reason."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.strip().partition(" ")
            if not reason.strip():
                raise ValueError(f".ci/audit-ignore.txt: {name} has no reason")
            found[name] = reason.strip()
    return found


def judge(report: Mapping[str, Any], known: Mapping[str, str]) -> tuple[list[str], int, int]:
    """Sentences about vulnerabilities that are not ignored, and how many packages were and were not looked up."""
    audited = [package for package in report["dependencies"] if "skip_reason" not in package]
    problems = []
    for package in audited:
        for found in package["vulns"]:
            names = {found["id"], *found.get("aliases", ())}
            if not names & known.keys():
                fixed = ", ".join(found.get("fix_versions", ())) or "no release yet"
                problems.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    return problems, len(audited), len(report["dependencies"]) - len(audited)


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(HERE.parent / "constraints.txt"), "--no-deps",
               "--disable-pip", "--format", "json", "--progress-spinner", "off"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        print("audit: NOT DONE, the database of vulnerabilities cannot be reached from here")
        return 0
    problems, audited, skipped = judge(report, ignored((HERE / "audit-ignore.txt").read_text(encoding="utf-8")))
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    if not audited:
        print("audit: NOT DONE, the package index of this machine knows no vulnerabilities")
    else:
        print(f"audit: {audited} packages looked up, {skipped} unknown to the database, {len(problems)} to mend")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
