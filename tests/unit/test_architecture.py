"""The house: who may import whom, and what starting the program may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "backprop"
# From the words at the bottom to the command line at the top: a room imports from rooms below it.
ROOMS = [
    {"", "errors", "events", "presets"},
    {"report", "console", "ci"},
    {"config"},
    {"core"},
    {"edges"},
    {"engine"},
    {"verbs"},
    {"api", "cli"},
    {"__main__"},
]
ROOM_OF = {name: level for level, names in enumerate(ROOMS) for name in names}
# The rooms whose modules may import each other.
OPEN_ROOMS = {"core", "edges", "engine", "verbs"}
# The lazy public names.
ALLOWED = {("", "api"), ("", "errors")}
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "peft",
    "trl",
    "huggingface_hub",
    "gguf",
    "llm",
    "rich.progress",
    "pynvml",
)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            # `from backprop.core import slao` names a module; `from backprop.core.slao import step` a thing in one.
            modules = {name for name in names if (ROOT / (name.replace(".", "/") + ".py")).is_file()}
            found |= modules or {module}
    return {name for name in found if name.split(".")[0] == "backprop"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_downwards(path: Path) -> None:
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts)).removesuffix("__init__")
    for imported in imports_of(path):
        other = room(imported)
        below = ROOM_OF[other] < ROOM_OF[own]
        assert below or (own == other and own in OPEN_ROOMS) or (own, other) in ALLOWED, (
            f"{own} may not import {imported}"
        )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import backprop, backprop.edges.demo_model; backprop.Trainer",
        "from backprop.cli import run; run(['--help']); run(['train', '--help']); "
        "assert run(['train', '--data', 'no-such-file.jsonl']) == 3",
    ],
    ids=["import", "help and a typo in the data"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    loaded = loaded_by(code)
    assert not [name for name in HEAVY if name in loaded]
    assert "backprop.api" in loaded or "backprop.cli" in loaded
