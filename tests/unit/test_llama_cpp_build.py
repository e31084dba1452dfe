"""How llama.cpp is compiled for arm64, and where what was compiled is put."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backprop.edges.llama_cpp_build import WITHOUT_SME, BuildError, place


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


@pytest.fixture(scope="module")
def cmake(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if found := shutil.which("cmake"):
        return [found]
    folder = tmp_path_factory.mktemp("cmake")
    subprocess.run([sys.executable, "-m", "pip", "-q", "install", "--target", folder, "cmake"], check=True)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import cmake; cmake.cmake()"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the image is built on Linux")
@pytest.mark.parametrize("known", [True, False])
def test_a_compiler_that_does_not_know_sme_is_not_asked_for_it(tmp_path: Path, cmake: list[str], known: bool) -> None:
    """gcc 12 and 13 ended the build of llama.cpp for arm64. A compiler for x86 knows as little of SME."""
    names = ("armv8.6_2", "armv9.2_1", "armv9.2_2")
    flags = ("armv8.6-a+dotprod+sve2", "armv9.2-a+dotprod+fp16+sme", "armv9.2-a+dotprod+sve2+sme")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.19)\nproject(ggml CXX)\nset(CMAKE_EXPORT_COMPILE_COMMANDS ON)\n"
        + "".join(
            f"add_library(ggml-cpu-{name} OBJECT x.cpp)\ntarget_compile_options(ggml-cpu-{name} PRIVATE -O2 -march={flag} -g)\n"
            for name, flag in zip(names, flags, strict=True)
        )
    )
    (tmp_path / "x.cpp").touch()
    (tmp_path / "sme.cmake").write_text(WITHOUT_SME, encoding="utf-8")
    more = [f"-DCMAKE_PROJECT_ggml_INCLUDE={tmp_path / 'sme.cmake'}", *(["-DBACKPROP_HAS_SME=1"] if known else [])]
    arm = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER_WORKS=1"]
    subprocess.run([*cmake, "-S", tmp_path, "-B", tmp_path / "build", *arm, *more], check=True)
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    found = [re.findall(r"-O2 -march=(\S+) -g", each["command"])[0] for each in commands]
    without = (flags[0], "armv8.6-a+dotprod+fp16", "armv8.6-a+dotprod+sve2")
    assert found == list(flags if known else without)
