"""Where what was compiled is put."""

from pathlib import Path

import pytest

from backprop.edges.llama_cpp_build import BuildError, place


def test_an_older_folder_gives_way_as_a_whole(tmp_path: Path) -> None:
    part, target = tmp_path / "llama-new", tmp_path / "room" / "tools"
    part.write_text("new")
    target.mkdir(parents=True)
    (target / "llama-old").touch()
    place([part], target)
    assert [path.name for path in target.iterdir()] == ["llama-new"]
    assert [path.name for path in target.parent.iterdir()] == ["tools"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(BuildError, match=r"thesis\.txt"):
        place([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
