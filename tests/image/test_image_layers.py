"""What is in the image, and what is in none of its layers."""

import io
import json
import platform
import re
import runpy
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from project import CPU, MARKS, in_image, inspected

import backprop
from backprop.edges.places import LLAMA_CPP_VERSION

pytestmark = MARKS
MOST_BYTES = 1_200_000_000
LEFT_OVER = re.compile(
    r"(^|/)(pip\.conf|\.netrc|\.git|\.env|id_(rsa|ed25519)|.*\.whl)$|(^|/)\.cache/.|^var/lib/apt/lists/.|^var/cache/.|^tmp/."
    r"|^build/|\.(key|pem\.key)$|^root/\.(?!bashrc$|profile$)"
)
MOST_TEXT_BYTES = 1_000_000
# Packages of others, which are what the hashes of the lock say: some hold what looks like a secret, such as a font.
NOT_OURS = re.compile(r"^opt/venv/lib/python3[^/]*/site-packages/")


def test_the_image_is_small_and_says_what_it_is() -> None:
    image = inspected(CPU)
    assert image["Size"] <= MOST_BYTES
    config = image["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["tini", "--", "backprop"]
    assert config["Healthcheck"]["Test"] == ["CMD", "backprop", "doctor"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.version"] == backprop.__version__


def found_in(layer: Iterator[tarfile.TarInfo], archive: tarfile.TarFile, secrets: re.Pattern[str]) -> Iterator[str]:
    for member in layer:
        name = member.name.removeprefix("./")
        if not member.isdir() and LEFT_OVER.search(name):
            yield f"{name}: left over"
        elif member.isfile() and member.size <= MOST_TEXT_BYTES and not NOT_OURS.search(name):
            content = archive.extractfile(member)
            assert content
            if secret := secrets.search(content.read().decode(errors="replace")):
                yield f"{name}: {secret[0][:8]}…"


def scanned(saved: io.BufferedIOBase, secrets: re.Pattern[str]) -> tuple[list[str], int]:
    """Look through each layer of what `docker save` writes, in the form of engines before and after 25."""
    found: list[str] = []
    num_layers = 0
    with tarfile.open(fileobj=saved, mode="r|") as image:
        for part in image:
            content = image.extractfile(part) if part.isfile() else None
            if content is None:
                continue
            if part.size <= MOST_TEXT_BYTES:
                content = io.BytesIO(content.read())
                if secret := secrets.search(content.getvalue().decode(errors="replace")):
                    found.append(f"{part.name}: {secret[0][:8]}…")
            try:
                with tarfile.open(fileobj=content, mode="r|*") as layer:
                    num_layers += 1
                    found += found_in(iter(layer), layer, secrets)
            except tarfile.ReadError:
                continue  # not a layer: the settings of the image, and what was run to make it
    return found, num_layers


@pytest.fixture(scope="module")
def secrets() -> re.Pattern[str]:
    return runpy.run_path(str(ROOT / "scripts" / "audit"))["SECRETS"]


def test_no_layer_holds_a_secret_or_a_cache(secrets: re.Pattern[str]) -> None:
    with subprocess.Popen(["docker", "save", CPU], stdout=subprocess.PIPE) as saving:
        assert saving.stdout
        found, num_layers = scanned(saving.stdout, secrets)
    assert num_layers == len(inspected(CPU)["RootFS"]["Layers"])
    assert found == []


def test_what_would_be_left_over_is_found(tmp_path: Path, secrets: re.Pattern[str]) -> None:
    token = b"hf_" + b"a1B2" * 9
    files = {"etc/pip.conf": b"", "opt/a/.cache/x": b"", "var/lib/apt/lists/x": b"", "opt/n": b"t=" + token}
    layer, image = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for name, content in {**files, "opt/fine": b"x"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(fileobj=image, mode="w") as archive:
        for name, content in {"abc/layer.tar": layer.getvalue(), "abc.json": b'{"Env": ["T=' + token + b'"]}'}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    image.seek(0)
    found, num_layers = scanned(image, secrets)
    assert num_layers == 1
    assert {line.partition(":")[0] for line in found} == {*files, "abc/layer.tar", "abc.json"}


def test_the_bill_of_materials_names_what_is_installed() -> None:
    listed = json.loads(in_image("cat", "/usr/share/backprop/sbom.json"))
    assert listed["bomFormat"] == "CycloneDX"
    found = {(part["name"].lower().replace("_", "-"), part["version"]) for part in listed["components"]}
    program = (
        "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    )
    python = {
        (name.lower().replace("_", "-"), version) for name, version in json.loads(in_image("python", "-c", program))
    }
    assert {"backprop", "llama-cpp-python", "torch"} <= {name for name, _ in python}
    assert python - found == set()
    system = in_image("dpkg-query", "--show", "--showformat", "${db:Status-Status} ${Package} ${Version}\\n")
    packages = {tuple(line.split()[1:]) for line in system.splitlines() if line.startswith("installed ")}
    assert len(packages) > 50
    assert packages - found == set()
    assert ("llama.cpp", f"of llama-cpp-python {LLAMA_CPP_VERSION}") in found


def test_the_bytecode_of_models_that_are_trained_commonly_is_there() -> None:
    folder = "/opt/venv/lib/python3*/site-packages/transformers/models"
    told = in_image("sh", "-c", f"cd {folder} && ls -d */__pycache__").split()
    kept = {path.partition("/")[0] for path in told}
    assert {"auto", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "smollm3"} <= kept
    assert len(kept) < 50


def test_llama_cpp_chooses_the_instructions_of_this_machine() -> None:
    program = (
        "from backprop.edges import llama_cpp as l; l.bindings(); print([p.split('/')[-1].strip() for p in open('/proc/self/maps')"
        " if 'libggml-cpu' in p][:1])"
    )
    assert "libggml-cpu-" in in_image("python", "-c", program)
    # A machine of the first x86-64, or of the first arm64, has a file too; none is for CUDA, whose libraries are not here.
    files = in_image("ls", "/opt/llama.cpp/tools").split()
    baseline = {"x86_64": "x64", "aarch64": "armv8.0_1"}[platform.machine()]
    assert f"libggml-cpu-{baseline}.so" in files
    assert len([name for name in files if name.startswith("libggml-cpu-")]) > 5
    assert not [name for name in files if "cuda" in name]


def test_the_programs_of_llama_cpp_are_of_one_version() -> None:
    programs = ("llama-server", "llama-imatrix", "llama-gguf-split")
    told = {in_image("sh", "-c", f"{name} --version 2>&1 | sed -n 's/^version: //p'") for name in programs}
    assert len(told) == 1, told
    assert told != {""}
