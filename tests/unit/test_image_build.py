"""What can be known of the image without an engine: its version, what it copies, and that a skipped proof is told as one."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import backprop

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these are scripts for bash")
SKIPPED = 77
GB = 1_000_000_000


@pytest.fixture
def programs(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Put programs of our own first on PATH."""

    def make(**scripts: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, script in scripts.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "BACKPROP_"))}
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        return kept | {"PATH": path, "XDG_CACHE_HOME": str(tmp_path), "BACKPROP_SKIPPED": str(tmp_path / "why")}

    return make


def ended(script: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("scripts", "why"),
    [
        ({"docker": "exit 1", "id": "echo 1000"}, "only root on Debian or Ubuntu could install one"),
        ({"docker": "exit 1", "id": "echo 0", "apt_get": "exit 1", "dockerd": "exit 1"}, "no engine can run here"),
        (
            {"docker": "case $1 in image) exit 1;; info) echo /;; esac", "df": f"echo Avail; echo {5 * GB}"},
            "GB of disk, and 5 GB are free in /",
        ),
    ],
    ids=["no engine", "an engine that ends", "a full disk"],
)
def test_where_no_image_can_be_proved_the_script_ends_with_a_code_of_its_own(
    programs: Callable[..., dict[str, str]], tmp_path: Path, scripts: dict[str, str], why: str
) -> None:
    env = programs(**scripts)
    done = ended(ROOT / "scripts" / "test-image", env)
    assert done.returncode == SKIPPED, done.stderr
    assert why in done.stderr
    assert why in (tmp_path / "why").read_text()
    assert "::warning" not in done.stdout
    done = ended(ROOT / "scripts" / "test-image", env | {"GITHUB_ACTIONS": "true"})
    assert re.fullmatch(rf"::warning title=[^:]+::.*{re.escape(why)}\n", done.stdout)


@pytest.mark.parametrize(("code", "ends_with"), [(0, 0), (SKIPPED, 0), (3, 3)])
def test_what_was_skipped_is_not_called_passed(tmp_path: Path, code: int, ends_with: int) -> None:
    for name in ("scripts/setup", ".venv/bin/ruff", ".venv/bin/basedpyright", ".venv/bin/pytest", "scripts/test-image"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        proved = f'echo "no engine" >"$BACKPROP_SKIPPED"; exit {code}' if name.endswith("test-image") else "exit 0"
        path.write_text(f"#!/bin/sh\n{proved}\n")
        path.chmod(0o755)
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts" / "test")
    done = ended(tmp_path / "scripts" / "test", dict(os.environ))
    assert done.returncode == ends_with
    assert ("All passed" in done.stdout) == (code == 0)
    assert ("scripts/test-image: no engine" in done.stdout) == (code == SKIPPED)


def test_the_image_is_labelled_with_the_version_of_the_package() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^ARG VERSION=(.*)$", text, re.MULTILINE) == [backprop.__version__]


def test_a_release_labels_it_as_its_tags_say() -> None:
    """The label was `v1.2.3` where the tag said `1.2.3`."""
    job = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["image"]
    (build,) = (step["with"] for step in job["steps"] if step.get("id") == "build")
    assert "VERSION=${{ steps.version.outputs.version }}" in build["build-args"].splitlines()
    (step,) = (step["run"] for step in job["steps"] if step.get("id") == "version")
    told = subprocess.run(
        ["bash", "-c", step.replace('"$GITHUB_OUTPUT"', "/dev/stdout")], cwd=ROOT, capture_output=True
    )
    assert told.stdout.decode() == f"version={backprop.__version__}\n"
    assert re.findall(r"image\.(\w+)=", build["labels"]) == ["source", "url"]


def test_a_release_names_the_images_of_compose_by_digest(
    tmp_path: Path, programs: Callable[..., dict[str, str]]
) -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    (step,) = (step["run"] for step in jobs["tags"]["steps"] if step.get("name", "").startswith("Pin the images"))
    (tmp_path / "checkout").mkdir()
    shutil.copy(ROOT / "compose.yaml", tmp_path / "checkout")
    env = programs(docker="echo sha256:abc") | {"NAME": "there/of/us", "GITHUB_REF_NAME": "v1.2.3"}
    subprocess.run(["bash", "-e", "-c", step], cwd=tmp_path, env=env, check=True)
    images = re.findall(r"^ *image: (.*)$", (tmp_path / "compose.yaml").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\$\{OLLAMA_IMAGE:-ollama/ollama:[\d.]+@sha256:abc\}", images[0])
    assert images[1:] == [f"${{BACKPROP_IMAGE:-there/of/us}}:1.2.3-{target}" for target in ("gpu", "cpu")]


def test_a_checkout_with_windows_line_endings_gives_the_image_the_same_bytes(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    git = ["git", "-c", "core.autocrlf=true"]
    subprocess.run([*git, "clone", "-q", "--depth", "1", f"file://{ROOT}", tmp_path / "it"], check=True)
    copied = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    files = [path for name in copied for path in ((tmp_path / "it" / name), *(tmp_path / "it" / name).rglob("*"))]
    files += [tmp_path / "it" / name for name in ("Dockerfile", "scripts/test-image", "tests/image/ollama")]
    assert [path for path in files if path.is_file() and b"\r\n" in path.read_bytes()] == []
