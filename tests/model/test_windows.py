"""What runs where only Windows is: with what POSIX alone has taken away (tests/windows_double.py)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import HERE, ROOT

pytestmark = [pytest.mark.model, pytest.mark.slow]

# These are about what is taken away: user ids, locks and syncing of folders, file systems, limits of processes.
POSIX_ALONE = (
    "tests/unit/test_doctor.py",
    "tests/unit/test_rundir.py::test_where_a_folder_cannot_be_locked_a_file_in_it_is",
    "tests/unit/test_rundir.py::test_a_folder_of_another_user_is_told_with_who_asks",
    "tests/unit/test_rundir.py::test_a_full_disk_at_an_event_is_a_disk_error",
    "tests/unit/test_checkpoints.py::test_a_power_cut_finds_only_what_was_synced",
    "tests/unit/test_process.py::test_a_program_does_not_outlive_a_process_that_is_killed",
)

TRAINED = """
import sys
import accelerate, datasets, peft, torch, transformers, trl
import peft.optimizers, transformers.trainer, trl.trainer.sft_trainer  # as libraries, they know where they are
import windows_double
windows_double.switch()
from backprop.cli import main
main(sys.argv[1:])
"""


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    argv = [sys.executable, *map(str, arguments)]
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_unit_tier_passes_there() -> None:
    left_out = [option for name in POSIX_ALONE for option in ("--deselect", name)]
    options = ["-q", "-p", "no:cacheprovider", "-p", "windows_double", "--ignore", "tests/unit/test_doctor.py"]
    done = run("-m", "pytest", *options, *left_out, "tests/unit", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def test_a_model_is_trained_and_goes_on_there(tiny_model: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    options = ["train", "--data", write(HERE), "--model", tiny_model, "--steps", "4", "--no-rehearse", "--skip-proofs"]
    options += ["--save-steps", "2"]
    stopped = run("-c", TRAINED, *options, "--max-minutes", "0.0001", cwd=tmp_path)
    assert stopped.returncode == 75, stopped.stderr
    done = run("-c", TRAINED, *options, "--max-minutes", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "lora" / "adapter_model.safetensors").is_file()
