"""How many threads numeric libraries have, and how these wait for each other."""

import contextlib
import os
import sys
from math import ceil
from pathlib import Path


def cpu_share(root: Path = Path("/")) -> float | None:
    """Give the CPUs' worth of time that the container's group may use, by either version of control groups; None without a limit."""
    folder = root / "sys" / "fs" / "cgroup"
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            int((folder / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period")
        )
        return None if quota < 0 else quota / period
    return None


def cpus() -> int:
    """Count the CPUs that this process may use, in a container no more than it has time for."""
    there, share = _seen(), cpu_share()
    return there if share is None else max(1, min(there, ceil(share)))


def settle() -> None:
    """Let OpenMP's threads sleep after a few microseconds of spinning for their turn, unless the user's variables say otherwise.

    To be called before torch or llama.cpp is loaded, if that can be. Beside other work on the same cores, threads that spin for
    milliseconds, as GNU's library has it, keep each other from it: docs/benchmarks.md has what that costs. In a container that may
    use few of a machine's CPUs, libraries would begin a thread for each of them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    number = cpus()
    if number < _seen():
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(number)
            if "torch" in sys.modules:  # in a notebook
                sys.modules["torch"].set_num_threads(number)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(number))


def _seen() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
