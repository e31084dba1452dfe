"""What the image asks of a network that has a way out: nothing, with `--offline`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from project import CPU, HERE, IMAGE, MARKS, ONE_THREAD, Packets, compose, folder_with, packets_on

pytestmark = MARKS
SUBNET, WAY_OUT = "10.213.77.0/24", "10.213.77.254"
IPV4, ARP = 0x0800, 0x0806
OUTSIDE = "192.0.2.1"  # of documentation: nobody's
# All that leaves goes to a container of ours, and so does every name; it passes nothing on.
ROUTED = f"""\
networks:
  default:
    ipam:
      config: [{{subnet: {SUBNET}, aux_addresses: {{DefaultGatewayIPv4: {WAY_OUT}}}}}]
services:
  sink:
    image: {CPU}
    user: "0"
    cap_add: [NET_ADMIN]
    sysctls: {{net.ipv4.ip_forward: 0}}
    entrypoint: [python, /sink.py, {WAY_OUT}]
    healthcheck: {{test: [CMD, python, -c, "import socket; socket.gethostbyname('localhost')"], interval: 1s}}
    volumes: ["{HERE / "sink.py"}:/sink.py:ro"]
  cpu:
    dns: [{WAY_OUT}]
"""
TRAIN = ("--data", "/data/rows.jsonl", "--json", "--no-rehearse", "--seed", "1", "--steps", "20", "--overwrite")


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with folder_with(tmp_path_factory.mktemp("project"), tiny_model, ROUTED) as folder:
        compose(folder, "up", "--detach", "--wait", "sink", "ollama-cpu")
        yield folder


def train(project: Path, *options: str, code: int = 0) -> str:
    # The surroundings of tests forbid the hub; here `--offline` alone is to do that.
    allowed = ("--env", "HF_HUB_OFFLINE=0")
    command = ("run", "--rm", "--no-deps", *ONE_THREAD, *allowed, "cpu", "train", *TRAIN)
    return compose(project, *command, *options, code=code)


def reached(seen: Packets) -> set[tuple[str, int]]:
    return {(to, port) for kind, to, port in seen if kind == IPV4}


def test_a_run_offline_sends_nothing(project: Path) -> None:
    with packets_on(f"{IMAGE}_default") as seen:
        train(project, "--model", "/data/model", "--offline")
        train(project, "--model", "Qwen/Qwen3-0.6B", "--offline", code=4)
        assert not seen()


def test_what_a_run_sends_without_that_is_seen(project: Path) -> None:
    """That nothing is heard means something only where anything would be."""
    with packets_on(f"{IMAGE}_default") as seen:
        train(project, "--model", "Qwen/Qwen3-0.6B", code=4)
        assert (WAY_OUT, 53) in reached(seen())


def test_what_a_program_sends_to_an_address_is_seen(project: Path) -> None:
    connect = "import socket; socket.create_connection(({!r}, {}), 2)"
    python = ("run", "--rm", "--no-deps", "--entrypoint", "python", "cpu", "-c")
    with packets_on(f"{IMAGE}_default") as seen:
        compose(project, *python, connect.format(OUTSIDE, 80), code=1)
        assert (OUTSIDE, 80) in reached(seen())
        assert (ARP, WAY_OUT, 0) in seen()
        compose(project, *python, connect.format("ollama-cpu", 11434))
        assert 11434 in {port for _, port in reached(seen())}
