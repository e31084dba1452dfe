"""Converters, and the double of racers, in forks of a process that has loaded what they need: a start of their own spends six seconds on that.

Whoever starts `backprop` in a process of its own starts real ones. Linux only.
"""

import fcntl
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from backprop.edges import process

LIBRARIES = ("peft", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")
PROGRAMS = ("backprop.engine.streamed", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "racer_double.py")
FIRST_FREE = 100
"""Descriptors below may be what a program is to inherit."""


def is_known(argv: Sequence[str]) -> bool:
    return argv[0] == sys.executable and any(Path(one).name in PROGRAMS for one in argv[1:3])


class Forks:
    """Asks a process that has loaded the libraries for forks; that is started when the first is needed."""

    def __init__(self) -> None:
        # As each program is told, while its libraries read it; and no threads, which no fork would have.
        told = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
        self._environment = {**os.environ, **told}
        self._server: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def start(self, argv: Sequence[str], env: dict[str, str], cwd: Path | None, inherited: Sequence[int]) -> "Forked":
        """Become ``argv`` in a fork."""
        assert max(inherited, default=0) < FIRST_FREE
        if self._server is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                program = [sys.executable, __file__, str(theirs.fileno())]
                self._server = subprocess.Popen(program, env=self._environment, pass_fds=[theirs.fileno()]), ours
        request = {"argv": list(argv[1:]), "env": env, "cwd": str(cwd or Path.cwd()), "inherited": list(inherited)}
        pipes = [os.pipe() for _ in range(3)]
        try:
            ends = [write for _, write in pipes]
            socket.send_fds(self._server[1], [json.dumps(request).encode()], [*ends, *inherited])
        finally:
            for _, write in pipes:
                os.close(write)
        return Forked(argv, *(read for read, _ in pipes))

    def close(self) -> None:
        if self._server is not None:
            server, connection = self._server
            connection.close()
            server.kill()  # and its forks with it
            server.wait()


class Forked:
    """What `edges.process` needs of `subprocess.Popen`. A program that ends by a signal is said to be killed."""

    def __init__(self, argv: Sequence[str], out: int, err: int, end: int) -> None:
        self.args = argv
        self.stdout, self.stderr = (os.fdopen(one, encoding="utf-8", errors="replace") for one in (out, err))
        self._end = os.fdopen(end)
        begun = self._end.readline()
        assert begun, "the process that is forked from has ended: its stderr says why"
        self.pid, self.returncode = int(begun), None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._has_ended(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._end.readline() or -signal.SIGKILL)
        return self.returncode

    def _has_ended(self, within_s: float | None) -> bool:
        return bool(select.select([self._end], [], [], within_s)[0])

    def kill(self) -> None:
        if not self._has_ended(0):
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for one in (self.stdout, self.stderr, self._end):
            one.close()


def serve(connection: socket.socket) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    # Arrow's allocator has one that mends itself in the child.
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, "a fork has the calling thread only"
    me = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        request, files, _, _ = socket.recv_fds(connection, 2**17, 9)
        if not request:
            return
        if os.fork() == 0:
            connection.close()
            _become(json.loads(request), files, parent=me)
        for one in files:
            os.close(one)


def _become(request: dict[str, Any], files: Sequence[int], *, parent: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process._end_with(parent)
    out, err, end, *inherited = (fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for one in files)
    for one in files:
        os.close(one)
    if inherited:
        os.setsid()
    os.write(end, f"{os.getpid()}\n".encode())
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, number in zip((nothing, out, err, *inherited), (0, 1, 2, *request["inherited"]), strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    code = 1
    try:
        os.chdir(request["cwd"])
        sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
        if "OMP_NUM_THREADS" in os.environ:
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        first, *rest = request["argv"]
        if first == "-m":
            sys.argv, sys.path[0] = rest, request["cwd"]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code & 0xFF if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - told as Python tells it
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody listens any more
            stream.flush()
    os.write(end, f"{code}\n".encode())
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
