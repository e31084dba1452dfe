"""Build what `export` needs of llama.cpp, once, into the cache: `python -m backprop.edges.llama_cpp_build [PROGRAM ...]`.

The source release of llama-cpp-python holds all of it. Libraries and programs are compiled once, into one folder; the
converter is unpacked beside it, and the bindings are installed without a copy of the libraries. The second call finds all of
them. Further programs of llama.cpp may be named, such as `server`; `CMAKE_ARGS` adds to how all are compiled.
"""

import hashlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.edges.places import LLAMA_CPP_VERSION as VERSION
from backprop.edges.places import LLAMA_PROGRAMS, llama_cpp_home, llama_library, llama_programs

SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of llama_cpp_python-0.3.36.tar.gz, as in requirements.lock."""

# Portable within the architecture, so that a cache may be shared between machines. The libraries are found beside whatever
# asks for them; the old kind of run path also serves the libraries that the libraries need.
BESIDE = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    f"-DCMAKE_INSTALL_RPATH={BESIDE}",
    "-DCMAKE_SHARED_LINKER_FLAGS=-s",
    "-DCMAKE_MODULE_LINKER_FLAGS=-s",
    f"-DCMAKE_EXE_LINKER_FLAGS=-s{'' if sys.platform == 'darwin' else ' -Wl,--disable-new-dtags'}",
)
WITHOUT_SME = """\
include(CheckCXXCompilerFlag)
function(ggml_without_sme)
    foreach(variant ggml-cpu-armv9.2_1 ggml-cpu-armv9.2_2)
        if(TARGET ${variant})
            get_target_property(options ${variant} COMPILE_OPTIONS)
            string(REGEX REPLACE "-march=armv9[.]2-a([^;]*)[+]sme" "-march=armv8.6-a\\\\1" options "${options}")
            set_target_properties(${variant} PROPERTIES COMPILE_OPTIONS "${options}")
        endif()
    endforeach()
endfunction()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    check_cxx_compiler_flag(-march=armv9.2-a+sme BACKPROP_HAS_SME)
    if(NOT BACKPROP_HAS_SME)
        cmake_language(DEFER CALL ggml_without_sme)
    endif()
endif()
"""
"""Read by CMake within ggml's project. With a library for each instruction set, two of arm64 name SME, which gcc knows from 14
on. ggml itself has no code for it (KleidiAI would, which is off), so an older compiler makes the same of both without it."""
CONVERTER = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE")
OURS = (*CONVERTER, llama_programs().name, ".", "lib", "llama", "ggml")
"""How the names begin of all that is put into place."""
EXIT_TOOL = 7
"""As of a `ToolError`; this module imports little of ours, since the image compiles again whenever that changes."""


def main(programs: Sequence[str] = ()) -> int:
    """Bring converter, libraries, programs and bindings into place and say what was done."""
    try:
        with TemporaryDirectory(prefix="backprop-llama-") as scratch:
            _bring(Path(scratch), (*LLAMA_PROGRAMS, *programs))
    except BuildError as error:
        print(f"error: {error}\n\nhint: a C++ compiler and a package index are needed", file=sys.stderr)
        return EXIT_TOOL
    return 0


class BuildError(Exception):
    """Something that is needed could not be had; says what."""


def _bring(scratch: Path, programs: Sequence[str]) -> None:
    unpacked = (llama_cpp_home() / CONVERTER[0]).is_file()
    installed = _installed_version() == VERSION
    if unpacked and installed and _compiled(programs):
        if os.environ.get("CMAKE_ARGS"):
            _say(f"compiled already, however CMAKE_ARGS has it: to compile again, remove {llama_programs()}")
        return
    source = _fetch(scratch)
    tree = _extract(source, scratch) / "vendor" / "llama.cpp"
    if not unpacked:
        _say(f"unpacking the converter to {llama_cpp_home()}")
        place([tree / name for name in CONVERTER], llama_cpp_home())
    if not _compiled(programs):
        _say("compiling llama.cpp; on 2 cores this takes about 6 minutes, once")
        place(list(_compile(tree, scratch, programs).iterdir()), llama_programs())
    if not installed:
        _say(f"installing the bindings of llama-cpp-python {VERSION}")
        _install_bindings(source)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _compiled(programs: Sequence[str]) -> bool:
    there = [llama_library("llama"), *(llama_programs() / f"llama-{name}" for name in programs)]
    return all(path.is_file() for path in there)


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    argv = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    _run(argv, env)


def _run(argv: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(argv, env=env, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildError(f"`{Path(argv[0]).name}` exited with {done.returncode}: {last}")


def _fetch(scratch: Path) -> Path:
    """Download the source release and check that it is the one that was tried."""
    _pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(scratch), f"llama-cpp-python=={VERSION}")
    source = next(scratch.glob("llama_cpp_python-*.tar.gz"))
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise BuildError(f"{source.name} has the hash {found}, not {SOURCE_SHA256}: check where pip takes it from")
    return source


def _extract(source: Path, scratch: Path) -> Path:
    with tarfile.open(source) as archive:
        # Python 3.11.2, which is Debian 12's, has no filters yet.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(scratch)  # noqa: S202 - by its hash, it is the one that was tried # nosec B202 # nosemgrep
    return scratch / f"llama_cpp_python-{VERSION}"


def _compile(tree: Path, scratch: Path, programs: Sequence[str]) -> Path:
    """Compile libraries and programs into one folder, from which they run wherever it lies."""
    _pip("install", "--target", str(scratch / "cmake"), "cmake", "ninja")
    env = {**os.environ, "PYTHONPATH": str(scratch / "cmake")}
    env["PATH"] = f"{scratch / 'cmake' / 'bin'}{os.pathsep}{env['PATH']}"
    build = scratch / "build"
    more = shlex.split(env.get("CMAKE_ARGS", ""))
    without_sme = scratch / "without_sme.cmake"
    without_sme.write_text(WITHOUT_SME, encoding="utf-8")
    more.append(f"-DCMAKE_PROJECT_ggml_INCLUDE={without_sme.as_posix()}")
    flags = [f"-DLLAMA_BUILD_SERVER={'ON' if 'server' in programs else 'OFF'}", *CMAKE_FLAGS, *more]
    _run(["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(build), *flags], env)
    targets = ["ggml", "llama", *(f"llama-{name}" for name in programs)]
    argv = [
        "cmake",
        "--build",
        str(build),
        "--parallel",
        str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1),
        "--target",
        *targets,
    ]
    _run(argv, env)
    return build / "bin"


def place(parts: Sequence[Path], target: Path) -> None:
    """Copy files and folders into one at ``target``, whole or not at all; an older one of ours gives way.

    Raises:
        BuildError: If it holds something else.
    """
    foreign = sorted(path.name for path in target.glob("*") if not path.name.startswith(OURS))
    if foreign:
        raise BuildError(
            f"{target} holds {foreign[0]}, which is not of llama.cpp: let BACKPROP_LLAMA_CPP name another folder"
        )
    beside, before = (target.with_name(f".{target.name}.{os.getpid()}{end}") for end in ("", ".before"))
    beside.mkdir(parents=True)
    try:
        for part in parts:
            if part.is_dir():
                shutil.copytree(part, beside / part.name)
            else:
                shutil.copy2(part, beside / part.name, follow_symlinks=False)
        if target.exists():
            target.replace(before)
        beside.replace(target)
    finally:
        for left in (beside, before):
            shutil.rmtree(left, ignore_errors=True)


def _install_bindings(source: Path) -> None:
    env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    _pip("install", "--no-deps", "--force-reinstall", str(source), env=env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
