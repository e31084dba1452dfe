"""The image, through compose, as its users run it. `scripts/test-image` builds it and runs these."""

import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, chat

IMAGE = os.environ.get("BACKPROP_TEST_IMAGE", "")
pytestmark = [
    pytest.mark.skipif(not IMAGE, reason="no image: `scripts/test-image` builds one where an engine can run"),
    pytest.mark.slow,
]
MOST_BYTES = 1_200_000_000
ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]
TRAIN = ("--data", "/data/rows.jsonl", "--model", "/data/model", "--offline", "--json", "--no-rehearse", "--seed", "1")
TRAIN += ("--steps", "600", "--batch-size", "4", "--lora-r", "16", "--learning-rate", "5e-3", "--save-steps", "20")
# For so small a model, threads that wait for each other take longer than what they compute.
ONE_THREAD = ("--env", "OMP_NUM_THREADS=1")
HARDENED = ("--read-only", "--cap-drop=ALL", "--security-opt", "no-new-privileges", "--network", "none")
# Of packet(7), which Python's socket does not name.
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC = 263, 1, 1
# Nothing leaves this network.
CLOSED = "networks: {default: {internal: true}}\n"


def ran(*argv: str | Path, code: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, argv)), cwd=cwd, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def inspected(what: str, kind: str = "image") -> dict[str, Any]:
    return json.loads(ran("docker", kind, "inspect", what))[0]


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder: compose.yaml, .env, data and output."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "compose.yaml").write_text((ROOT / "compose.yaml").read_text())
    (folder / "closed.yaml").write_text(CLOSED)
    ollama = os.environ["BACKPROP_TEST_OLLAMA"]
    (folder / ".env").write_text(
        f"COMPOSE_FILE=compose.yaml:closed.yaml\nCOMPOSE_PROJECT_NAME={IMAGE}\nBACKPROP_IMAGE={IMAGE}\nOLLAMA_IMAGE={ollama}\n"
    )
    data = folder / "data"
    data.mkdir()
    ran("cp", "-r", tiny_model, data / "model")
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ran("chmod", "-R", "a+rX", data)
    (folder / "output").mkdir()
    os.chown(folder / "output", 1000, 1000)
    folder.chmod(0o755)
    yield folder
    ran("docker", "compose", "--profile", "cpu", "down", "--volumes", "--timeout", "5", cwd=folder)


def compose(project: Path, *arguments: str, code: int = 0) -> str:
    return ran("docker", "compose", "--profile", "cpu", *arguments, cwd=project, code=code)


def steps_of(container: str) -> list[int]:
    lines = ran("docker", "logs", container).splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [event["step"] for event in events if event["event"] == "step"]


def wait_for_step(container: str, step: int) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if max(steps_of(container), default=0) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(ran("docker", "logs", container))


def ended(container: str) -> int:
    return int(ran("docker", "wait", container))


@contextmanager
def packets_on(network: str) -> Iterator[set[tuple[str, int]]]:
    """Collect where the containers of a network send IP packets to: address and port."""
    seen: set[tuple[str, int]] = set()
    bridge = f"br-{inspected(network, 'network')['Id'][:12]}"
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(0x0800)) as listener:
        listener.bind((bridge, 0x0800))
        # What goes from one container to another is not for this host: only a promiscuous bridge hears it.
        wanted = struct.pack("iHH8s", socket.if_nametoindex(bridge), PACKET_MR_PROMISC, 0, b"")
        listener.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, wanted)
        listener.settimeout(0.2)
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                try:
                    packet = listener.recv(65535)[14:]
                except TimeoutError:
                    continue
                ports = 4 * (packet[0] & 15)
                seen.add((socket.inet_ntoa(packet[16:20]), int.from_bytes(packet[ports + 2 : ports + 4])))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield seen
        finally:
            time.sleep(0.5)
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def stopped_and_killed(project: Path) -> Path:
    """The run directory of a run that was stopped, went on, was killed, and went on to its end."""
    name = f"{IMAGE}-stopped"
    subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)  # of tests that were stopped
    compose(project, "run", "--no-deps", *ONE_THREAD, "--detach", "--name", name, "cpu", "train", *TRAIN)
    try:
        wait_for_step(name, 40)
        ran("docker", "stop", name)
        assert ended(name) == 75
        ran("docker", "start", name)
        wait_for_step(name, 200)
        ran("docker", "kill", "--signal", "KILL", name)
        assert ended(name) == 137
        reached = max(steps_of(name))
        assert reached < 600
        ran("docker", "start", name)
        assert ended(name) == 0, ran("docker", "logs", name)
        assert '"resumed"' in ran("docker", "logs", name)
    finally:
        ran("docker", "rm", "--force", name)
    return project / "output"


def test_a_run_that_was_stopped_and_killed_ends_as_one_that_was_not(stopped_and_killed: Path, project: Path) -> None:
    # Beside it: any user, and an engine that grants nothing, with named volumes.
    volumes = [f"{IMAGE}-output", f"{IMAGE}-cache"]
    mounts = ["-v", f"{project / 'data'}:/data:ro", "-v", f"{volumes[0]}:/output", "-v", f"{volumes[1]}:/cache"]
    try:
        ran(
            "docker",
            "run",
            "--rm",
            *HARDENED,
            *ONE_THREAD,
            "--user",
            "12345:54321",
            *mounts,
            f"{IMAGE}:cpu",
            "train",
            *TRAIN,
        )
        hashed = "sha256sum /output/lora/adapter_model.safetensors; stat -c %u:%g /output/run.json"
        told = ran("docker", "run", "--rm", *mounts, "--entrypoint", "sh", f"{IMAGE}:cpu", "-c", hashed).split()
    finally:
        ran("docker", "volume", "rm", *volumes)
    adapter = (stopped_and_killed / "lora" / "adapter_model.safetensors").read_bytes()
    assert told[0] == sha256(adapter).hexdigest()
    assert told[-1] == "12345:54321"


def test_a_model_that_the_user_may_not_read_is_told(project: Path) -> None:
    weights = project / "data" / "model" / "model.safetensors"
    weights.chmod(0o600)
    told = compose(project, "run", "--rm", "--no-deps", "cpu", "train", *TRAIN, "--output", "/output/unread", code=4)
    weights.chmod(0o644)
    assert "may not be read by this user (1000)" in told


def test_an_output_of_another_user_is_told(project: Path) -> None:
    os.environ["BACKPROP_USER"] = "4321:4321"
    try:
        told = compose(project, "run", "--rm", "--no-deps", "cpu", "train", *TRAIN, code=9)
    finally:
        del os.environ["BACKPROP_USER"]
    assert "BACKPROP_USER" in told


def test_files_belong_to_the_user(stopped_and_killed: Path) -> None:
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in stopped_and_killed.rglob("*")}
    assert owners == {(1000, 1000)}


def test_a_run_offline_sends_nothing(stopped_and_killed: Path, project: Path) -> None:
    compose(project, "up", "--detach", "--wait", "ollama-cpu")
    connect = "import socket; socket.create_connection(({!r}, {}), 3)"
    python = ("run", "--rm", "--no-deps", "--entrypoint", "python", "cpu", "-c")
    with packets_on(f"{IMAGE}_default") as seen:
        compose(project, "run", "--rm", "--no-deps", *ONE_THREAD, "cpu", "train", *TRAIN, "--output", "/output/offline")
        assert not seen
        compose(project, *python, connect.format("192.0.2.1", 80), code=1)  # there is no way out
        compose(project, *python, connect.format("ollama", 11434))
    assert 11434 in {port for _, port in seen}


def test_an_export_is_registered_in_the_ollama_beside_it(stopped_and_killed: Path, project: Path) -> None:
    compose(project, "up", "--detach", "--wait", "ollama-cpu")
    beside = inspected(compose(project, "ps", "--quiet", "ollama-cpu").strip(), "container")
    address = beside["NetworkSettings"]["Networks"][f"{IMAGE}_default"]["IPAddress"]
    with packets_on(f"{IMAGE}_default") as seen:
        wanted = ("--quantization", "q4_k_m", "--ollama", "--ollama-name", "my-model", "--json")
        told = compose(project, "run", "--rm", "cpu", "export", "/output/lora", *wanted)
    events = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [event["name"] for event in events if event["event"] == "registered"] == ["my-model"]
    answers = {port for to, port in seen if to != address}  # what comes back goes to ports of the client
    assert (address, 11434) in seen
    assert {to for to, _ in seen} == {address, *(to for to, port in seen if port in answers)}
    assert all(port >= 32768 for port in answers)
    assert "It is here." in compose(project, "exec", "ollama-cpu", "ollama", "run", "my-model", "What is 3?")
    assert (stopped_and_killed / "export" / "verification.json").is_file()


def test_doctor_finds_nothing_wrong_and_nothing_can_be_written_elsewhere(project: Path) -> None:
    told = compose(project, "run", "--rm", "--no-deps", "cpu", "doctor", "--json")
    checks = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert all(check["ok"] for check in checks if check["event"] == "check"), told
    trying = "import pathlib; pathlib.Path('/opt/app/x').touch()"
    compose(project, "run", "--rm", "--no-deps", "--entrypoint", "python", "cpu", "-c", trying, code=1)


def test_the_image_is_small_and_holds_nothing_of_its_making() -> None:
    image = inspected(f"{IMAGE}:cpu")
    assert image["Size"] <= MOST_BYTES
    config = image["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["tini", "--", "backprop"]
    assert config["Healthcheck"]["Test"] == ["CMD", "backprop", "doctor"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.version"]
    looking = "find / -xdev ( -path /proc -prune ) -o ( -name pip.conf -o -name *.whl -o -path */.cache/* -o -name *.lists ) -print"
    assert not ran("docker", "run", "--rm", "--user", "0", "--entrypoint", "find", f"{IMAGE}:cpu", *looking.split()[1:])


def test_the_bill_of_materials_names_what_is_installed() -> None:
    listed = json.loads(
        ran("docker", "run", "--rm", "--entrypoint", "cat", f"{IMAGE}:cpu", "/usr/share/backprop/sbom.json")
    )
    found = {part["name"]: part["version"] for part in listed["components"]}
    assert listed["bomFormat"] == "CycloneDX"
    versions = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'peft')}))"
    installed = json.loads(ran("docker", "run", "--rm", "--entrypoint", "python", f"{IMAGE}:cpu", "-c", versions))
    assert {name: found[name] for name in installed} == installed


def test_llama_cpp_chooses_the_instructions_of_this_machine() -> None:
    program = (
        "from backprop.edges import llama_cpp as l; l.bindings(); print([p.split('/')[-1].strip() for p in open('/proc/self/maps')"
        " if 'libggml-cpu' in p][:1])"
    )
    told = ran("docker", "run", "--rm", "--entrypoint", "python", f"{IMAGE}:cpu", "-c", program)
    assert "libggml-cpu-" in told
    # A machine of the first x86-64, or of the first arm64, has a file too.
    files = ran("docker", "run", "--rm", "--entrypoint", "ls", f"{IMAGE}:cpu", "/opt/llama.cpp/tools").split()
    assert len([name for name in files if name.startswith("libggml-cpu-")]) > 5
    version = ran("docker", "run", "--rm", "--entrypoint", "llama-server", f"{IMAGE}:cpu", "--help")
    assert "--model" in version


def test_the_gpu_service_asks_for_the_gpu_and_the_other_does_not(project: Path) -> None:
    services = json.loads(compose(project, "config", "--format", "json"))["services"]
    for name in ("backprop", "ollama"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    for name in ("cpu", "ollama-cpu"):
        assert "deploy" not in services[name]
    assert not any("ports" in service for service in services.values())
