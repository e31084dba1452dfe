"""What the tests of the image share: an engine's commands, a user's folder, and an ear at a network."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, chat

IMAGE = os.environ.get("BACKPROP_TEST_IMAGE", "")
CPU = f"{IMAGE}:cpu"
MARKS = [
    pytest.mark.skipif(not IMAGE, reason="no image: `scripts/test-image` builds one where an engine can run"),
    pytest.mark.slow,
]
HERE = Path(__file__).parent
ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]
# For so small a model, threads that wait for each other take longer than what they compute.
ONE_THREAD = ("--env", "OMP_NUM_THREADS=1")
HARDENED = ("--read-only", "--cap-drop=ALL", "--security-opt", "no-new-privileges", "--network", "none")

Packets = set[tuple[int, str, int]]
"""Each kind of packet: its EtherType, where to, and the port there."""


def ran(*argv: str | Path, code: int = 0, cwd: Path | None = None, also_errors: bool = False) -> str:
    done = subprocess.run(list(map(str, argv)), cwd=cwd, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + (done.stderr if also_errors else "")


def inspected(what: str, kind: str = "image") -> dict[str, Any]:
    return json.loads(ran("docker", kind, "inspect", what))[0]


def in_image(*argv: str, options: tuple[str, ...] = (), image: str = CPU) -> str:
    """Run a program of the image in place of `backprop`."""
    return ran("docker", "run", "--rm", *options, "--entrypoint", argv[0], image, *argv[1:])


def given_to(owner: str, folder: Path) -> None:
    """Change whom a folder belongs to, which takes root, as the engine is."""
    mount = ("--user", "0", "--network", "none", "--volume", f"{folder}:/it")
    in_image("chown", "-R", owner, "/it", options=mount)


@contextmanager
def folder_with(folder: Path, model: Path, override: str) -> Iterator[Path]:
    """Make a user's folder: compose.yaml with an override, .env, data and output."""
    (folder / "compose.yaml").write_text((ROOT / "compose.yaml").read_text())
    (folder / "override.yaml").write_text(override)
    ollama = os.environ["BACKPROP_TEST_OLLAMA"]
    (folder / ".env").write_text(
        f"COMPOSE_FILE=compose.yaml:override.yaml\nCOMPOSE_PROJECT_NAME={IMAGE}\nBACKPROP_IMAGE={IMAGE}\nOLLAMA_IMAGE={ollama}\n"
    )
    data, output = folder / "data", folder / "output"
    data.mkdir()
    ran("cp", "-r", model, data / "model")
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ran("chmod", "-R", "a+rX", data)
    output.mkdir()
    folder.chmod(0o755)
    given_to("1000:1000", output)
    try:
        yield folder
    finally:
        compose(folder, "down", "--volumes", "--timeout", "5")
        given_to(f"{os.getuid()}:{os.getgid()}", output)


def compose(project: Path, *arguments: str, code: int = 0, also_errors: bool = False) -> str:
    command = ("docker", "compose", "--profile", "cpu")
    return ran(*command, *arguments, cwd=project, code=code, also_errors=also_errors)


def events_of(told: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def wait_until(holds: Callable[[], bool], what: str, *, most_s: float = 300) -> None:
    until = time.monotonic() + most_s
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.1)


@contextmanager
def packets_on(network: str) -> Iterator[Callable[[], Packets]]:
    """Hear what the containers of a network send; what was heard until now is told at each call."""
    bridge = f"br-{inspected(network, 'network')['Id'][:12]}"
    rights = ("--user", "0", "--cap-drop", "ALL", "--cap-add", "NET_RAW", "--network", "host")
    mount = ("--volume", f"{HERE / 'packets.py'}:/packets.py:ro", "--entrypoint", "python")
    ear = ran("docker", "run", "--detach", *rights, *mount, CPU, "/packets.py", bridge).strip()

    def heard() -> list[str]:
        return ran("docker", "logs", ear).splitlines()

    def seen() -> Packets:
        time.sleep(0.5)
        return {tuple(json.loads(line)) for line in heard()[1:]}

    try:
        wait_until(lambda: heard()[:1] == ["listening"], "nobody listens", most_s=30)
        yield seen
    finally:
        ran("docker", "rm", "--force", ear)
