"""What scripts/audit finds, and that there is nothing to be found."""

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
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
