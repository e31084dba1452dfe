"""How many threads there are, and how they wait, is set where the user has not, before a library is loaded that reads it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

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
    threads.settle()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.max": "nonsense\n"}, None),
    ],
)
def test_a_containers_share_is_read_by_either_version_of_control_groups(
    files: dict[str, str], share: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert threads.cpu_share(tmp_path) == share


@pytest.mark.parametrize(
    ("share", "cpus", "set_to"), [(None, 8, None), (0.5, 1, "1"), (2.5, 3, "3"), (8.0, 8, None), (64.0, 8, None)]
)
def test_no_more_threads_than_a_container_has_time_for(
    share: float | None, cpus: int, set_to: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "cpu_share", lambda: share)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # for what is set to be undone
    monkeypatch.delenv("OMP_NUM_THREADS")
    told: list[int] = []
    monkeypatch.setitem(sys.modules, "torch", cast(Any, SimpleNamespace(set_num_threads=told.append)))
    threads.settle()
    assert threads.cpus() == cpus
    assert os.environ.get("OMP_NUM_THREADS") == set_to
    assert told == ([] if set_to is None else [cpus])
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "5"


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
