"""The run directory: whole or not at all, and never someone else's."""

import subprocess
import sys
from pathlib import Path

import pytest

from backprop.edges import rundir
from backprop.errors import DiskError, UsageError

ME: dict[str, object] = {"steps": 3, "data_sha256": "abc"}


def claim(folder: Path, identity: dict[str, object] = ME, *, overwrite: bool = False) -> None:
    with rundir.claim(folder, identity, overwrite=overwrite):
        pass


def claim_and_finish(folder: Path, *, status: str = "finished") -> None:
    claim(folder)
    (folder / "lora").mkdir()
    rundir.write_manifest(folder, {"status": status, "identity": ME})


def test_a_finished_run_is_never_overwritten(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run")
    with pytest.raises(UsageError, match="this very run, finished"):
        claim(tmp_path / "run")
    assert (tmp_path / "run" / "lora").is_dir()


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run", status="interrupted")
    with pytest.raises(UsageError, match="steps: 3 before, 4 now"):
        claim(tmp_path / "run", {**ME, "steps": 4})


def test_the_same_run_interrupted_may_start_again_from_a_clean_folder(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run", status="interrupted")
    claim(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_overwrite_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    claim(tmp_path / "run", {}, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_overwrite_does_not_take_a_folder_that_never_held_a_run(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    with pytest.raises(UsageError, match="not of a run"):
        claim(tmp_path, overwrite=True)


def test_overwrite_does_not_take_the_folder_of_another_program(tmp_path: Path) -> None:
    """Any program may write a run.json; its files were once taken for those of a run."""
    (tmp_path / "run.json").write_text('{"speed": 3}')
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a manifest of a run"):
        claim(tmp_path, overwrite=True)
    assert (tmp_path / "export" / "precious.txt").read_text() == "mine"


def test_a_second_process_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from backprop.edges import rundir\n"
        "with rundir.claim(Path(sys.argv[1]), {}, overwrite=False): print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin
    assert first.stdout
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match="another process is at work"):
        claim(tmp_path / "run")
    first.kill()
    first.wait()
    claim(tmp_path / "run")  # a dead process holds no lock


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match=r"run\.json"):
        claim(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    rundir.write_text(tmp_path / "a.txt", "old")

    def fail_half_way() -> None:
        with rundir.whole(tmp_path / "a.txt") as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with rundir.whole(tmp_path / "lora") as folder:
        folder.mkdir()
        (folder / "x").write_text("old")

    def fill_the_disk() -> None:
        with rundir.whole(tmp_path / "lora") as folder:
            folder.mkdir()
            raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match="No space left"):
        fill_the_disk()
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert (tmp_path / "lora" / "x").read_text() == "old"


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with rundir.whole(tmp_path / "lora") as folder:
            folder.mkdir()
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
