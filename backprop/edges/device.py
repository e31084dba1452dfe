"""This machine: what there is to train with. Asks the driver and the operating system; never imports torch."""

import dataclasses
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from backprop.core.hardware import Gpu, Hardware
from backprop.edges import nvml, threads


def probe(*, without_gpus: bool = False) -> Hardware:
    """Look at this machine.

    Raises:
        HardwareError: If there is an NVIDIA driver that answers with an error.
    """
    gpus, driver = ((), "") if without_gpus else _gpus()
    return Hardware(
        gpus=gpus,
        driver=driver,
        num_cpus=threads.cpus(),
        memory_bytes=_memory_bytes(),
        platform=f"{platform.system()} {platform.machine()}",
    )


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return (), ""
    import pynvml

    try:
        with nvml.opened():
            return tuple(map(nvml.gpu_of, nvml.visible_handles())), str(pynvml.nvmlSystemGetDriverVersion())
    except FileNotFoundError:
        return (), ""


# A GPU with less of its memory free than this share of another's is at work for somebody else.
ALIKE = 0.9
_beside: dict[str, tuple[Gpu, ...]] = {}
"""By the id of the GPU that this process was left with: those that other processes may use."""


def use_one_gpu(hardware: Hardware) -> Hardware:
    """Let this process see only the GPU with the most free memory; call it before torch is imported.

    Returns:
        The hardware with that GPU, for which the plan is made, and then those like it, which processes of their own may use.
    """
    if not hardware.gpus:
        return hardware
    best = max(hardware.gpus, key=lambda gpu: gpu.memory_free_bytes)
    if len(hardware.gpus) > 1:
        least = ALIKE * best.memory_free_bytes
        _beside[best.uuid] = tuple(
            gpu for gpu in hardware.gpus if gpu is not best and gpu.name == best.name and gpu.memory_free_bytes >= least
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = best.uuid
    _grow_segments(best)
    return dataclasses.replace(hardware, gpus=(best, *_beside.get(best.uuid, ())))


# As guests see a part of a card, say `NVIDIA A40-8Q`.
VIRTUAL = re.compile(r"-\d+[ABCQ](ME|\d)?$")
WSL = Path("/dev/dxg")


def _grow_segments(gpu: Gpu) -> None:
    """Let torch map memory to where it is wanted: else a card that is nearly full is full of gaps. The user's word goes first.

    Windows and virtual cards cannot, and WSL2 fails at the first tensor (pytorch issue 192330).
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform == "linux" and not WSL.exists() and not VIRTUAL.search(gpu.name):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = "expandable_segments:True"


def _memory_bytes() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def memory_free_bytes() -> int:
    """Give the main memory that is not in use, within what this process may use."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _memory_bytes()
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    limit = _memory_bytes() - _used_by_container()
    return max(0, min(limit, 1024 * int(available)) if available else limit)


def _used_by_container() -> int:
    """Give what this container's processes hold, without the files that the system may drop."""
    try:
        folder = Path("/sys/fs/cgroup")
        if not (folder / "memory.max").read_text(encoding="utf-8").strip().isdigit():
            return 0
        files = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int((folder / "memory.current").read_text(encoding="utf-8")) - int(files.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0


def disk_free_bytes(path: Path) -> int:
    """Give the free space of the file system that ``path`` is or would be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
