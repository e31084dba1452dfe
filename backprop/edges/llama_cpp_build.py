"""Build what `export` needs of llama.cpp, once, into the cache: `python -m backprop.edges.llama_cpp_build`.

The source release of llama-cpp-python holds all of it: the bindings with the quantizer are built into a wheel, the
converter is unpacked beside it, and the programs are compiled against the wheel's libraries, which takes seconds. The
second call finds all three and only installs the wheel into this environment.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.edges import llama_tools, process
from backprop.edges.hub import cache_dir
from backprop.edges.llama_cpp import VERSION, home
from backprop.edges.rundir import whole
from backprop.errors import BackpropError, ToolError

SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of llama_cpp_python-0.3.36.tar.gz, as in requirements.lock."""

# Only the library is used: no server, tools, web page or multi-modal part. Portable within the architecture, so that a
# cache may be shared between machines.
CMAKE_FLAGS = (
    "-DLLAVA_BUILD=OFF",
    "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
CONVERTER = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE")
LIBRARIES = ("llama-common", "llama", "ggml", "ggml-base")
"""In the wheel, of those that the programs call themselves."""
BUILD_TIMEOUT_S = 3600


def main() -> int:
    """Bring converter and bindings into place and say what was done."""
    try:
        with TemporaryDirectory(prefix="backprop-llama-") as scratch:
            _bring(Path(scratch))
    except BackpropError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        return error.code
    return 0


def _bring(scratch: Path) -> None:
    wheels = cache_dir() / "wheels"
    built = next(iter(wheels.glob(f"llama_cpp_python-{VERSION}-*{platform.machine()}.whl")), None)
    # How the libraries are named and found was tried on Linux alone; elsewhere `export` does without the programs.
    programs = [llama_tools.folder() / f"llama-{name}" for name in llama_tools.TOOLS]
    tools = sys.platform != "linux" or all(program.is_file() for program in programs)
    if built is None or not tools or not (home() / CONVERTER[0]).is_file():
        source = _fetch(scratch)
        if not (home() / CONVERTER[0]).is_file():
            _say(f"unpacking the converter to {home()}")
            _unpack(source, scratch)
        if built is None:
            _say("building llama.cpp; on 2 cores this takes about 6 minutes, once")
            built = _build(source, scratch, wheels)
        if not tools:
            _say("compiling llama.cpp's programs for importance matrices and splitting")
            _compile_tools(source, built, scratch)
    if importlib.util.find_spec("llama_cpp") is None or _installed_version() != VERSION:
        _say(f"installing {built.name}")
        _pip("install", "--no-deps", "--force-reinstall", str(built))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _installed_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("llama-cpp-python")


def _pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    argv = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    process.run(argv, env=env, timeout_s=BUILD_TIMEOUT_S)


def _fetch(scratch: Path) -> Path:
    """Download the source release and check that it is the one that was tried."""
    _pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(scratch), f"llama-cpp-python=={VERSION}")
    source = next(scratch.glob("llama_cpp_python-*.tar.gz"))
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise ToolError(
            f"{source.name} has the hash {found}, not {SOURCE_SHA256}", hint="check where pip takes it from"
        )
    return source


def _unpack(source: Path, scratch: Path) -> None:
    root = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
    wanted = tuple(root + name for name in CONVERTER)
    with tarfile.open(source) as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(scratch, members=members, filter="data")
    with whole(home()) as folder:
        shutil.copytree(scratch / root, folder)


def _build(source: Path, scratch: Path, wheels: Path) -> Path:
    env = {**os.environ, "CMAKE_ARGS": " ".join(CMAKE_FLAGS)}
    env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(process.cpus()))
    _pip("wheel", "--no-deps", "-w", str(scratch), str(source), env=env)
    wheel = next(scratch.glob("llama_cpp_python-*.whl"))
    with whole(wheels / wheel.name) as beside:
        shutil.copyfile(wheel, beside)
    return wheels / wheel.name


def _compile_tools(source: Path, wheel: Path, scratch: Path) -> None:
    """Compile the programs against the wheel's libraries, and put both into one folder, from which they run anywhere."""
    root = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
    parts = ("common/", "include/", "ggml/include/", "vendor/", *(f"tools/{name}/" for name in llama_tools.TOOLS))
    with tarfile.open(source) as archive:
        members = [member for member in archive if member.name.startswith(tuple(root + part for part in parts))]
        archive.extractall(scratch / "tools", members=members, filter="data")
    tree = scratch / "tools" / root
    includes = [f"-I{tree / part}" for part in ("common", "include", "ggml/include", "vendor")]
    with whole(llama_tools.folder()) as folder:
        folder.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.fullmatch(r"lib/lib[\w-]+\.so\.0", name):
                    (folder / Path(name).name).write_bytes(archive.read(name))
        libraries = [str(folder / f"lib{name}.so.0") for name in LIBRARIES]
        # The old kind of run path also serves the libraries that the libraries need.
        linked = [*libraries, "-pthread", "-s", f"-Wl,-rpath-link,{folder}", "-Wl,--disable-new-dtags,-rpath,$ORIGIN"]
        for name in llama_tools.TOOLS:
            code = sorted(map(str, (tree / "tools" / name).glob("*.cpp")))
            argv = [os.environ.get("CXX", "c++"), "-O2", "-std=c++17", *code, *includes, *linked]
            process.run([*argv, "-o", str(folder / f"llama-{name}")], timeout_s=BUILD_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
