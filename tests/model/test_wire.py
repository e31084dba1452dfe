"""What leaves this machine: the packets of whole commands, in a network namespace whose only route leads back to itself."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, ROOT

pytestmark = pytest.mark.model

HUB = {"huggingface.co"}


def _can() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run(["unshare", "-rn", "ip", "link"], capture_output=True, check=False).returncode == 0


apart = pytest.mark.skipif(not _can(), reason="no network namespaces here; in the image, tests/image has one")


def sent_by(*command: str | Path, cwd: Path, **environment: str) -> tuple[int, set[str], str]:
    """Run a command; give its exit code, where its packets went, and what it said."""
    variables = {**os.environ, "RES_OPTIONS": "timeout:1 attempts:1", **environment}
    variables.pop("HF_HUB_OFFLINE", None)
    argv = ["unshare", "-rn", sys.executable, str(ROOT / "tests" / "wire.py"), sys.executable, *map(str, command)]
    done = subprocess.run(argv, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=300)
    told: dict[str, Any] = json.loads(done.stdout)
    return told["code"], set(told["seen"]), done.stderr


@apart
def test_packets_are_seen(tmp_path: Path) -> None:
    """Else the other tests would prove nothing."""
    program = (
        "import contextlib, socket\n"
        "with contextlib.suppress(OSError): socket.getaddrinfo('tracker.example', 443)\n"
        "with contextlib.suppress(OSError): socket.create_connection(('198.51.100.7', 443), timeout=0.5)\n"
    )
    _, seen, _ = sent_by("-c", program, cwd=tmp_path)
    assert "198.51.100.7:443" in seen
    if "nameserver" in Path("/etc/resolv.conf").read_text():
        assert "tracker.example" in seen


@apart
@pytest.mark.parametrize("offline", [["--offline"], []], ids=["offline", "a local model"])
def test_training_sends_nothing(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, offline: list[str]
) -> None:
    """trl reports each training to the model hub, unless it is told not to."""
    options = ["--data", write(HERE), "--model", tiny_model, "--steps", "2", "--skip-proofs", "--no-rehearse"]
    code, seen, said = sent_by("-m", "backprop", "train", *options, *offline, cwd=tmp_path)
    assert code == 0, said
    assert seen == set()


@apart
@pytest.mark.slow
def test_a_whole_export_and_doctor_send_nothing(taught: Callable[[str], Path], tmp_path: Path) -> None:
    run = taught("llama-tied")
    code, seen, said = sent_by("-m", "backprop", "export", run, "-q", "q8_0", "--offline", cwd=tmp_path)
    assert code == 0, said
    assert seen == set()
    _, seen, _ = sent_by("-m", "backprop", "doctor", cwd=tmp_path)
    assert "127.0.0.1:11434" in seen, "it asks whether Ollama listens here"
    assert all(one.startswith("127.0.0.1:") for one in seen)


@apart
@pytest.mark.slow
def test_a_model_of_the_hub_asks_the_hub_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    command = ["-m", "backprop", "train", "--model", "owner/never-fetched", "--data", write(HERE)]
    code, seen, said = sent_by(*command, cwd=tmp_path)
    assert code == 4, said
    assert seen <= HUB
    code, seen, said = sent_by(*command, "--offline", cwd=tmp_path)
    assert code == 4, said
    assert seen == set()
