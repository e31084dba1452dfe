"""Other programs end when nobody waits for them any more."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backprop.edges import process
from backprop.errors import ToolError


def test_a_program_does_not_outlive_its_block(tmp_path: Path) -> None:
    program = f"import time; time.sleep(1); open({str(tmp_path / 'late')!r}, 'w')"
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), process.running([sys.executable, "-c", program]):
        raise ZeroDivisionError
    assert time.monotonic() - started < 0.9
    time.sleep(max(0, started + 1.5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_program_does_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    late = f"import time; time.sleep(1); open({str(tmp_path / 'late')!r}, 'w')"
    main = f"""
import os, signal, sys
from backprop.edges import process
with process.running([sys.executable, "-c", {late!r}]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", main], check=False).returncode == -signal.SIGKILL
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()


def test_what_it_said_is_given_and_what_it_complained_of_is_told() -> None:
    much = "import sys; print('x' * 300_000); print('y' * 300_000, file=sys.stderr)"
    with process.running([sys.executable, "-c", much]) as finish:
        assert finish() == "x" * 300_000 + "\n"
    with pytest.raises(ToolError, match="exited with 3: at last"):
        process.run([sys.executable, "-c", "import sys; print('at last', file=sys.stderr); sys.exit(3)"])


def test_a_program_that_takes_too_long_or_is_missing_is_told() -> None:
    with pytest.raises(ToolError, match=r"did not finish within 0 s"):
        process.run([sys.executable, "-c", "import time; time.sleep(9)"], timeout_s=0.1)
    with pytest.raises(ToolError, match="`no-such` is not installed"):
        process.run(["no-such"])
