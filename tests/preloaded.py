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

LIBRARIES = ("peft", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")
PROGRAMS = ("backprop.engine.streamed", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "racer_double.py")
FIRST_FREE = 100
"""Descriptors below may be what a program is to inherit."""


def is_known(argv: Sequence[str]) -> bool:
    return any(Path(one).name in PROGRAMS for one in argv[1:3])


class Forks:
    """The process that has loaded the libraries, started when the first converter is."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None

    def start(self, argv: Sequence[str], env: dict[str, str], cwd: Path | None, inherited: Sequence[int]) -> "Forked":
        """Become ``argv`` in a fork of it."""
        if self._connection is None:
            self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                argument = str(theirs.fileno())
                subprocess.Popen([sys.executable, __file__, argument], env=env, pass_fds=[theirs.fileno()])
        ours, given = zip(*(os.pipe() for _ in range(3)), strict=True)
        request = {"argv": list(argv[1:]), "env": env, "cwd": str(cwd or Path.cwd()), "inherited": list(inherited)}
        socket.send_fds(self._connection, [json.dumps(request).encode()], [*given, *inherited])
        for one in given:
            os.close(one)
        return Forked(argv, int(self._connection.recv(64)), *ours)


class Forked:
    """What `edges.process` needs of `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], pid: int, out: int, err: int, end: int) -> None:
        self.args, self.pid = argv, pid
        self.stdout, self.stderr = (os.fdopen(one, encoding="utf-8", errors="replace") for one in (out, err))
        self._end = os.fdopen(end, "rb", buffering=0)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._end.read(64) or -signal.SIGKILL)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None and not select.select([self._end], [], [], 0)[0]:
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
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has the calling thread only"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        request, files, _, _ = socket.recv_fds(connection, 2**20, 9)
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(json.loads(request), files)
        for one in files:
            os.close(one)
        connection.send(str(pid).encode())


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, end, *inherited = (fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for one in files)
    for one in files:
        os.close(one)
    for file, number in zip((out, err, *inherited), (1, 2, *request["inherited"]), strict=True):
        os.dup2(file, number)
        os.close(file)
    if inherited:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    code = 1
    try:
        first, *rest = request["argv"]
        if first == "-m":
            sys.argv, sys.path[0] = rest, request["cwd"]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - told as Python tells it
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.write(end, str(code).encode())
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
