"""Other programs: run one to its end, or beside other work."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from backprop.errors import ToolError


def run(
    argv: list[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 3600,
    errors_too: bool = False,
) -> str:
    """Run ``argv`` to its end and return its standard output.

    Args:
        errors_too: Also return, after it, what it wrote to standard error.

    Raises:
        ToolError: If the program is missing, exits non-zero or runs past ``timeout_s``; with its own last words.
    """
    with running(argv, cwd=cwd, env=env, timeout_s=timeout_s, errors_too=errors_too) as finish:
        return finish()


@contextmanager
def running(
    argv: list[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 3600,
    errors_too: bool = False,
    inherited: Sequence[int] = (),
) -> Generator[Callable[[], str]]:
    """Run ``argv`` beside the block, which may wait for its end with what it is given; it does not outlive the block.

    Args:
        inherited: Open files that it is given; then it is a part of this program, and Ctrl-C is not for it.

    Raises:
        ToolError: As `run`, when waited for; at once if the program is missing.
    """
    name, me = Path(argv[0]).name, os.getpid()
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    apart: dict[str, Any] = {}
    if hasattr(os, "fork"):  # not on Windows
        apart = {"pass_fds": inherited, "start_new_session": bool(inherited), "preexec_fn": lambda: _end_with(me)}
    try:
        child = subprocess.Popen(argv, cwd=cwd, env=env, text=True, errors="replace", **pipes, **apart)
    except FileNotFoundError as error:
        raise ToolError(f"`{name}` is not installed", hint="run `backprop doctor`") from error
    heard = [_Reader(stream) for stream in (child.stdout, child.stderr)]

    def finish() -> str:
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"`{name}` did not finish within {timeout_s:.0f} s") from error
        said, complained = (reader.text() for reader in heard)
        if code != 0:
            last = "\n".join(complained.strip().splitlines()[-5:])
            raise ToolError(f"`{name}` exited with {code}: {last}", hint="run `backprop doctor`")
        return said + complained if errors_too else said

    with child:
        try:
            yield finish
        finally:
            child.kill()


PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with(parent: int) -> None:
    """Let this new process end with its parent, however that ends. Only on Linux."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


class _Reader:
    """Reads a stream to its end, in a thread, so that the program never waits to be read."""

    def __init__(self, stream: Any) -> None:
        self._parts: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: Any) -> None:
        with suppress(ValueError):  # closed, because nobody waits for it any more
            self._parts.extend(stream)

    def text(self) -> str:
        self._thread.join()
        return "".join(self._parts)
