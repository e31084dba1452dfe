"""The README says what the program does."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_tree_names_every_module() -> None:
    tree = README.split("## The tree")[1]
    for path in (ROOT / "backprop").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in tree, f"{path.name} is missing in the tree of README.md"


def test_every_path_and_command_that_is_named_exists() -> None:
    for name in re.findall(r"`((?:scripts|examples|docs|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_test_command_and_nothing_else() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec bash scripts/test"
    assert "scripts/test" in README
