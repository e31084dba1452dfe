"""The house: who may import whom, and what starting the program may load."""

import ast
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "backprop"
# From the words at the bottom to the command line at the top: a room imports from rooms below it.
ROOMS = [
    {"", "errors", "events", "presets"},
    {"schema"},
    {"heat_map"},
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


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


MODULES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(MODULES[path]):
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


def may_import(own: str, other: str) -> bool:
    below = ROOM_OF[other] < ROOM_OF[own]
    return below or (own == other and own in OPEN_ROOMS) or (own, other) in ALLOWED


def test_modules_import_downwards() -> None:
    assert len(MODULES) > 50
    upwards: list[str] = []
    for path in MODULES:
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts)).removesuffix("__init__")
        upwards += [f"{path} imports {name}" for name in imports_of(path) if not may_import(own, room(name))]
    assert not upwards


def test_modules_and_functions_stay_small() -> None:
    large = [f"{path}" for path in MODULES if path.read_text().count("\n") > 450]
    for path, tree in MODULES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        large += [f"{node.name} in {path}" for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert not large


def test_modules_of_tests_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in names if names.count(name) > 1] == []  # pytest could not import both


def test_text_is_read_and_written_in_an_encoding_that_is_named() -> None:
    """Windows reads a file of settings in UTF-8 as one of its own code page, without a word."""
    unnamed = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and _opens_text(node)
        and not any(word.arg == "encoding" for word in node.keywords)
    ]
    assert not unnamed


def _opens_text(call: ast.Call) -> bool:
    """Say whether a call opens a file as text; `open` of other modules does not, but where it says so."""
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if name in ("read_text", "write_text"):
        return method and owner != "rundir"
    modes = [getattr(one, "value", "") for one in call.args if isinstance(one, ast.Constant)]
    return name == "open" and owner not in {"os", "gzip", "tarfile"} and not any("b" in str(mode) for mode in modes)
