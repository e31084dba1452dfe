"""The prepared pages of help, and those in the README, are what the program draws."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.model  # for its time; `scripts/check` asks the same


def test_the_help_texts_are_those_of_the_program() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
