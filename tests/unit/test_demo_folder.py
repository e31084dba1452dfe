"""The folder of the demo model: made once, kept, and never mistaken for another."""

from pathlib import Path

import pytest

from backprop.edges.demo_model import CHECKPOINT_FILES, move_into_place, unpack
from backprop.errors import ModelError


def fill(folder: Path, content: str) -> Path:
    folder.mkdir()
    for name in CHECKPOINT_FILES:
        (folder / name).write_text(content)
    return folder


def test_a_complete_checkpoint_is_returned_without_a_look_at_the_gguf(tmp_path: Path) -> None:
    folder = fill(tmp_path / "smollm2", "kept")
    assert unpack(tmp_path / "absent.gguf", folder) == folder


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        unpack(tmp_path / "absent.gguf", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_second_of_two_processes_keeps_the_checkpoint_of_the_first(tmp_path: Path) -> None:
    first, second = fill(tmp_path / "smollm2", "first"), fill(tmp_path / ".smollm2-2", "second")
    move_into_place(second, first)
    assert {path.read_text() for path in first.iterdir()} == {"first"}
