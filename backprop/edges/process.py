"""Other programs: run one to its end."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from backprop.errors import ToolError


def cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    argv: list[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout_s: float = 3600
) -> str:
    """Run ``argv`` to its end and return its standard output.

    Raises:
        ToolError: If the program is missing, exits non-zero or runs past ``timeout_s``; with its own last words.
    """
    name = Path(argv[0]).name
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, timeout=timeout_s, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise ToolError(f"`{name}` is not installed", hint="run `backprop doctor`") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"`{name}` did not finish within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ToolError(f"`{name}` exited with {done.returncode}: {last}", hint="run `backprop doctor`")
    return done.stdout
