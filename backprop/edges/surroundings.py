"""What the operating system tells of this machine and container, for doctor. Looks, and writes one small file to each volume."""

import contextlib
import os
import platform
import re
import shutil
import socket
import sysconfig
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from backprop.config import OUTPUT
from backprop.core.checkup import Surroundings, Torch, Volume
from backprop.edges import places, rundir, threads

NVIDIA = "0x10de"
DISPLAY = "0x03"
"""How the class of a graphics card begins on the bus (PCI code and ID assignment, base class 03)."""
ASKED = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
"""The variables that are looked at, beside those of proxies; others may hold secrets."""
PROBE_BYTES = 8 * 2**20
TEMPORARY = "temporary files"
"""Where every user has some, which nobody writes over."""
PROXY_S = 0.5
PROXY_MOST_S = 1.0
PORTS = {"https": 443, **dict.fromkeys(("socks4", "socks4a", "socks5", "socks5h"), 1080)}
CUDA_LIBRARIES = ("libcudart.so", "libcudnn", "libcublas", "libnccl", "libcuda.so")


def look(root: Path = Path("/")) -> Surroundings:
    """Look around.

    Args:
        root: Where `/proc`, `/sys` and `/dev` are.
    """
    environment = {
        name: value for name, value in os.environ.items() if name.lower().endswith("_proxy") or name in ASKED
    }
    nodes = tuple(sorted(f"/dev/{path.name}" for path in (root / "dev").glob("nvidia*") if path.name != "nvidia-caps"))
    return Surroundings(
        system=platform.system(),
        in_container=_in_container(root),
        clock=time.time(),
        cpu_flags=_cpu_flags(root),
        cpu_share=threads.cpu_share(root),
        address_limit=_limit("RLIMIT_AS"),
        open_files=_limit("RLIMIT_NOFILE"),
        shared_bytes=_shared_bytes(root),
        pci_gpus=_pci_gpus(root),
        kernel_driver=_kernel_driver(root),
        device_nodes=nodes,
        closed_nodes=tuple(node for node in nodes if not os.access(root / node[1:], os.R_OK | os.W_OK)),
        wsl=all((root / name).exists() for name in ("dev/dxg", "usr/lib/wsl/lib/libcuda.so.1")),
        compiler=next((name for name in (os.environ.get("CC"), "gcc", "clang") if name and shutil.which(name)), ""),
        headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        foreign_libraries=_foreign_libraries(environment),
        docker=shutil.which("docker") is not None,
        toolkit=any(shutil.which(name) for name in ("nvidia-ctk", "nvidia-container-cli")),
        environment=environment,
        silent_proxies=_silent_proxies(environment),
        volumes=tuple(
            look_at_volume(name, path)
            for name, path in (
                ("output", OUTPUT.absolute()),
                ("cache", places.cache_dir()),
                (TEMPORARY, Path(tempfile.gettempdir())),
            )
        ),
    )


def installed_torch() -> Torch | None:
    """Read what torch is installed, without importing it; None if there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    version, cuda = (re.search(rf"^{name}[^=\n]*= '([^'\n]*)'", text, re.MULTILINE) for name in ("__version__", "cuda"))
    return Torch(version=version[1] if version else "?", cuda=cuda[1] if cuda else "")


def look_at_volume(name: str, path: Path) -> Volume:
    """Look at the place where ``path`` is or would be, and write a file there for a moment if that may be."""
    # Unlike a path's own methods, these fail nowhere, also not below folders that this user may not look into.
    nearest = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    usage = shutil.disk_usage(nearest)
    volume = Volume(name=name, path=str(path), free_bytes=usage.free)
    if hasattr(os, "statvfs"):
        told = os.statvfs(nearest)
        volume = replace(
            volume,
            free_files=told.f_favail if told.f_files else None,
            read_only=bool(told.f_flag & os.ST_RDONLY),
            no_programs=bool(told.f_flag & getattr(os, "ST_NOEXEC", 8)),
        )
    if volume.read_only:
        return volume
    if not os.access(nearest, os.W_OK | os.X_OK):
        return replace(volume, refused=rundir.whose_it_is())
    foreign = "" if name == TEMPORARY else _foreign_file(path)
    if foreign:
        return replace(volume, whose=foreign)
    if usage.free < 4 * PROBE_BYTES:
        return volume
    speed, skew = _written(nearest)
    return replace(volume, bytes_per_second=speed, skew_s=skew)


def _foreign_file(folder: Path) -> str:
    """Find something in a folder, or one below, that this user may not write over."""
    if not os.path.isdir(folder) or not hasattr(os, "getuid") or os.getuid() == 0:
        return ""
    with contextlib.suppress(OSError):
        for child in [*sorted(folder.iterdir())[:200], *sorted(folder.glob("*/*"))[:200]]:
            if not os.access(child, os.W_OK) and child.lstat().st_uid != os.getuid():
                return f"`{child}` belongs to user {child.lstat().st_uid}, and this is user {os.getuid()}"
    return ""


def _written(folder: Path) -> tuple[float | None, float | None]:
    """Write a file, and give how fast that was, in bytes per second, and how far ahead the volume's clock is."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{rundir.MARK}doctor-", suffix=".part") as file:
            started, asked_at = time.perf_counter(), time.time_ns() / 1e9
            file.write(os.urandom(2**20) * (PROBE_BYTES // 2**20))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
            written_at = os.stat(file.name).st_mtime
            skew = written_at - min(max(written_at, asked_at), time.time_ns() / 1e9)
    except OSError:
        return None, None
    return PROBE_BYTES / max(seconds, 1e-6), skew


def _in_container(root: Path) -> bool:
    return any((root / path).exists() for path in (".dockerenv", "run/.containerenv"))


def _cpu_flags(root: Path) -> frozenset[str] | None:
    """Give what this processor can do; None but for x86, where it matters."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        lines = (root / "proc" / "cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), None)
    return None if flags is None else frozenset(flags.split())


def _limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def _shared_bytes(root: Path) -> int | None:
    folder = root / "dev" / "shm"
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def _pci_gpus(root: Path) -> int:
    found = 0
    for device in (root / "sys" / "bus" / "pci" / "devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text(encoding="utf-8").strip() for name in ("vendor", "class"))
            found += vendor == NVIDIA and kind.startswith(DISPLAY)
    return found


def _kernel_driver(root: Path) -> str:
    """Give the version of the driver that the kernel has loaded; empty if it has none."""
    with contextlib.suppress(OSError):
        text = (root / "proc" / "driver" / "nvidia" / "version").read_text(encoding="utf-8")
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
        return found[1] if found else "of unknown version"
    return ""


def _foreign_libraries(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Give CUDA's libraries that LD_LIBRARY_PATH puts before those that come with torch; the driver's own are none."""
    found: list[str] = []
    for folder in filter(None, environment.get("LD_LIBRARY_PATH", "").split(":")):
        names = sorted(path.name for path in Path(folder).glob("lib*.so*"))
        stubs = "stubs" in Path(folder).parts
        found += [
            str(Path(folder) / name)
            for name in names
            if name.startswith(CUDA_LIBRARIES) and (stubs or not name.startswith("libcuda.so"))
        ]
    return tuple(found)


def _silent_proxies(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Give the proxies that do not answer, without user and password."""
    silent: list[str] = []
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        value = environment.get(name.lower()) or environment.get(name)
        if not value:
            continue
        try:
            url = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
            host, port = url.hostname or "", url.port or PORTS.get(url.scheme, 80)
        except ValueError:
            silent.append(f"{name}, which is no address,")
            continue
        if not _answers(host, port):
            silent.append(f"{name} ({host}:{port})")
    return tuple(silent)


def _answers(host: str, port: int) -> bool:
    """Say whether somebody listens there; soon, also where names are looked up in vain, which has no limit of time of its own."""
    heard = threading.Event()

    def call() -> None:
        with contextlib.suppress(OSError, UnicodeError):  # the latter of a name that can be none
            socket.create_connection((host, port), timeout=PROXY_S).close()
            heard.set()

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(PROXY_MOST_S)
    return heard.is_set()
