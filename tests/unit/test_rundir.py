"""The run directory: whole or not at all, and never someone else's."""

import errno
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from backprop.edges import rundir, stopping
from backprop.errors import DiskError, UsageError
from backprop.events import Phase

ME: dict[str, object] = {"steps": 3, "data_sha256": "abc"}


def claim(folder: Path, identity: dict[str, object] = ME, *, overwrite: bool = False) -> None:
    with rundir.claim(folder, identity, overwrite=overwrite):
        pass


def claim_and_finish(folder: Path, *, status: str = "finished") -> None:
    claim(folder)
    (folder / "lora").mkdir()
    rundir.write_manifest(folder, {"status": status, "identity": ME})


def test_a_finished_run_is_found_and_kept(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run")
    assert rundir.check(tmp_path / "run", ME, overwrite=False) == "finished"
    with rundir.claim(tmp_path / "run", ME, overwrite=False, keep=True) as goes_on:
        assert goes_on
    assert (tmp_path / "run" / "lora").is_dir()


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run", status="interrupted")
    with pytest.raises(UsageError, match="steps: 3 before, 4 now"):
        claim(tmp_path / "run", {**ME, "steps": 4})


def test_the_same_run_interrupted_goes_on_or_starts_from_a_clean_folder(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run", status="interrupted")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / ".backprop-lora.1.part").mkdir()
    (tmp_path / "run" / "checkpoints" / ".backprop-step-000003.1.part").mkdir()
    with rundir.claim(tmp_path / "run", ME, overwrite=False, keep=True) as goes_on:
        assert goes_on
    kept = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert kept == {"run.json", "lora", "checkpoints"}
    claim(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_files_of_other_programs_are_not_swept(tmp_path: Path) -> None:
    for name in (".bashrc.old", ".download.part", ".export-mine"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".backprop-lora.7.old").mkdir()
    (tmp_path / ".backprop-x.gguf.7.part").write_text("half")
    rundir.sweep(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".bashrc.old", ".download.part", ".export-mine", "lora"}


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        rundir.write_text(tmp_path / "mine", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_lock_file_outlives_the_claim(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    claim(tmp_path)
    assert (tmp_path / ".lock").is_file()


def test_overwrite_goes_on_with_the_very_same_run(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run", status="interrupted")
    assert rundir.check(tmp_path / "run", ME, overwrite=True) == "unfinished"
    assert rundir.check(tmp_path / "run", {**ME, "steps": 4}, overwrite=True) == "nothing"


def test_an_option_that_is_new_has_its_default_in_an_older_run(tmp_path: Path) -> None:
    claim_and_finish(tmp_path / "run", status="interrupted")
    assert rundir.check(tmp_path / "run", {**ME, "on_divergence": "stop"}, overwrite=False) == "unfinished"
    with pytest.raises(UsageError, match="on_divergence"):
        rundir.check(tmp_path / "run", {**ME, "on_divergence": "rollback"}, overwrite=False)


def test_a_run_killed_at_its_first_file_leaves_a_folder_that_is_free(tmp_path: Path) -> None:
    (tmp_path / ".backprop-run.json.1.part").write_text("{")
    (tmp_path / ".writable").write_text("")
    claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_ended_before_the_next(tmp_path: Path) -> None:
    with rundir.event_log(tmp_path) as say:
        say(Phase(name="one"))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "pha')
    with rundir.event_log(tmp_path) as say:
        say(Phase(name="two"))
    assert rundir.read_events(tmp_path) == [Phase(name="one"), Phase(name="two")]


def test_a_full_disk_at_an_event_is_a_disk_error(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with rundir.event_log(tmp_path) as say:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            with pytest.raises(DiskError, match=r"events\.jsonl.*too large"):
                say(Phase(name="one"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_a_folder_cannot_be_locked_a_file_in_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS locks only what is open for writing."""
    import fcntl
    import stat

    def flock(descriptor: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(descriptor, how)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with rundir.locked(tmp_path), pytest.raises(UsageError, match="another process"), rundir.locked(tmp_path):
        pass
    assert (tmp_path / ".lock").is_file()


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


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("safetensors: I/O error: No space left on device (os error 28)", "No space left on device"),
        ("`python` exited with 1: OSError: [Errno 28] No space left on device", "No space left on device"),
        (
            "`python` exited with 1:     ^^^^\nOSError: 3145728 requested and 103792 written",
            "3145728 requested and 103792 written",
        ),
        ("llama.cpp cannot convert this model: KeyError: 'Qwen9'", None),
    ],
)
def test_a_full_disk_is_known_by_what_other_programs_say_of_it(tmp_path: Path, told: str, why: str | None) -> None:
    """The converter's last words were once taken for a model that it does not know."""
    found = rundir.disk_error(tmp_path, RuntimeError(told))
    assert (found and found.message) == (why and f"`{tmp_path}` cannot be written: {why}")


def test_a_name_that_is_too_long_to_be_one_holds_no_run(tmp_path: Path) -> None:
    assert rundir.read_manifest(tmp_path / ("é" * 3000)) is None


def test_a_folder_of_another_user_is_told_with_who_asks(tmp_path: Path) -> None:
    found = rundir.disk_error(tmp_path, PermissionError(13, "Permission denied"))
    assert found is not None
    assert f"user {os.getuid()}" in str(found.hint)
    assert "BACKPROP_USER" in str(found.hint)


def test_a_stop_while_a_scratch_folder_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tempfile.mkdtemp

    def stopped(*arguments: Any, **named: Any) -> str:
        folder = made(*arguments, **named)
        signal.raise_signal(signal.SIGINT)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with stopping.armed(end_process=False), pytest.raises(KeyboardInterrupt), rundir.scratch(tmp_path):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())
