"""The audit of dependencies: what fails, what is ignored and what is only told, without a network."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "audit.py"
REPORT = {
    "dependencies": [
        {"name": "a", "version": "1", "vulns": []},
        {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"]}]},
        {"name": "c", "skip_reason": "not on the index"},
    ]
}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit_of_dependencies", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_vulnerability_fails_unless_it_is_ignored_by_any_of_its_names(audit: ModuleType) -> None:
    assert audit.judge(REPORT, {}) == (["b 2: PYSEC-1, fixed in 3"], 2, 1)
    assert audit.judge(REPORT, {"CVE-1": "only on Windows"}) == ([], 2, 1)
    assert audit.ignored("# comment\n\nCVE-1 only on Windows\n") == {"CVE-1": "only on Windows"}
    with pytest.raises(ValueError, match="CVE-1 has no reason"):
        audit.ignored("CVE-1\n")


@pytest.mark.parametrize(
    ("output", "code", "told"),
    [
        ("", 0, "NOT DONE"),
        ('{"dependencies": [{"name": "c", "skip_reason": "offline"}]}', 0, "NOT DONE"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X"}]}]}', 1, "1 to mend"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "1 packages looked up"),
    ],
)
def test_the_exit_code(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str, code: int,
    told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=output))
    assert audit.main() == code
    assert told in capsys.readouterr().out
