"""How threads wait is set where the user has not, before a library is loaded that reads it."""

import os
import subprocess
import sys

import pytest

from backprop.edges import threads


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_the_users_variables_go_first(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    threads.spin_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(
    "begin", ["from backprop.cli import run; run(['--version'])", "import backprop; backprop.Trainer()"]
)
def test_it_is_set_before_torch_is_loaded(begin: str) -> None:
    told = "import os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}\n{told}"], env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "2000 False"
