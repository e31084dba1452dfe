"""Programs with bitsandbytes, which `scripts/setup` puts into a folder of its own where there is no GPU, since every start would import it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Done

from backprop.engine import four_bit

APART = ROOT / ".venv" / "apart"
needs_bitsandbytes = pytest.mark.skipif(
    four_bit.why_not() and not APART.is_dir(), reason="no bitsandbytes: `scripts/setup`"
)


def with_bitsandbytes(program: str, *arguments: str | Path, cwd: Path, apart: Path = APART) -> Done:
    path = os.pathsep.join([*([str(apart)] if apart.is_dir() else []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)
