"""Takes away what only POSIX has, so that code which needs it without asking is found: `pytest -p windows_double`.

Not a Windows: paths, file locks and the way programs are started stay those of this machine.
"""

import importlib.abc
import multiprocessing.connection  # noqa: F401 - the standard library itself knows where it is
import os
import platform
import shutil
import signal
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
OF_OS = (
    *("fork", "getuid", "geteuid", "getppid", "sysconf", "statvfs", "sched_getaffinity", "sched_setaffinity", "killpg"),
    *("memfd_create", "mkfifo", "set_blocking", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "ST_RDONLY", "ST_NOEXEC"),
)
OF_SIGNAL = ("SIGALRM", "SIGHUP", "setitimer", "ITIMER_REAL", "pthread_kill")


Usage = namedtuple("Usage", "total used free")


class Absent(importlib.abc.MetaPathFinder):
    """Finds that these modules do not exist, where our own code asks for them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def switch() -> None:
    """Take it all away."""
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Absent())
    room = os.statvfs
    shutil.disk_usage = lambda path: _usage(room(path))  # which asks Windows itself, there
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    platform.system = lambda: "Windows"
    platform.machine = lambda: "AMD64"


def _usage(told: os.statvfs_result) -> Usage:
    total, free = (blocks * told.f_frsize for blocks in (told.f_blocks, told.f_bavail))
    return Usage(total, total - free, free)


def pytest_configure() -> None:
    from _pytest import tmpdir

    tmpdir.get_user_id = lambda: None
    switch()
