"""The `gpu` target, as far as that can be proved without a GPU. `scripts/test-image --gpu` builds it and runs these."""

import os
from pathlib import Path

import pytest
from project import HARDENED, inspected, ran

IMAGE = os.environ.get("BACKPROP_TEST_GPU_IMAGE", "")
pytestmark = [
    pytest.mark.skipif(not IMAGE, reason="no image: `scripts/test-image --gpu` builds one where an engine can run"),
    pytest.mark.slow,
]
MOST_BYTES_BESIDE_TORCH = 2_000_000_000


def test_the_image_is_small_beside_torch_and_its_libraries() -> None:
    sizes = "cd /opt/venv/lib/python3*/site-packages && du -bs torch nvidia"
    told = ran("docker", "run", "--rm", "--entrypoint", "sh", IMAGE, "-c", sizes)
    torch = sum(int(line.split()[0]) for line in told.splitlines())
    assert torch > 3_000_000_000  # with CUDA
    assert inspected(IMAGE)["Size"] - torch <= MOST_BYTES_BESIDE_TORCH


def test_triton_compiles_for_any_user_in_a_file_system_that_is_read_only_and_keeps_it() -> None:
    program = f"{Path(__file__).with_name('triton_compiles.py')}:/proof.py:ro"
    volume = "backprop-test-triton"
    argv = ["docker", "run", "--rm", *HARDENED, "--user", "12345:54321", "-v", f"{volume}:/cache", "-v", program]
    try:
        told = ran(*argv, "--entrypoint", "python", IMAGE, "/proof.py")
        kept = ran("docker", "run", "--rm", "-v", f"{volume}:/cache", "--entrypoint", "find", IMAGE, "/cache/triton")
    finally:
        ran("docker", "volume", "rm", volume)
    assert "launcher: compiled" in told
    assert ".cubin" in kept
    assert "cuda_utils" in kept
