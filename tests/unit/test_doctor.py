"""Doctor on environments that were sabotaged, each in one way, and on healthy ones. docs/doctor.md has the table."""

import collections
import functools
import io
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pynvml
import pytest
from conftest import ROOT
from nvml_double import GIB, Card, Now, install
from ollama_double import OllamaDouble

from backprop.config import DoctorConfig
from backprop.core.checkup import Finding, Torch, Volume, check_volume
from backprop.edges import device, llama_cpp, surroundings
from backprop.engine import trials
from backprop.errors import BackpropError
from backprop.events import Checked
from backprop.verbs import doctor as doctor_verb

CUDA_TORCH = Torch(version="2.13.0+cu130", cuda="13.0")
THERMAL = pynvml.nvmlClocksEventReasonHwThermalSlowdown
STRANGER = 999_999_999
HEALTHY_CARD = Card(
    answers={
        "nvmlDeviceGetEnforcedPowerLimit": 350_000,
        "nvmlDeviceGetClockInfo": 210,
        "nvmlDeviceGetMaxClockInfo": 2100,
        "nvmlDeviceGetPersistenceMode": 0,
        "nvmlDeviceGetComputeMode": 0,
        "nvmlDeviceGetMigMode": (0, 0),
        "nvmlDeviceGetTotalEccErrors": 0,
        "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
    }
)


class Place:
    """A machine that looks healthy, with a card if one is given to it, until something is done to it."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.root = patch, folder / "root"
        self.cards: list[Card] = []
        self.nvml: dict[str, Any] = {"fails": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}
        self.torch = Torch(version="2.13.0+cpu", cuda="")
        self.file("proc/cpuinfo", "processor: 0\nflags\t\t: fpu sse2 avx avx2\n")
        self.file("dev/shm/x", "")
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name in ("LD_LIBRARY_PATH", "OLLAMA_HOST", "CC"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        self.program("gcc")
        patch.setenv("PATH", str(self.root / "bin"))
        self.file("llama.cpp/convert_hf_to_gguf.py", "")
        patch.setenv("BACKPROP_LLAMA_CPP", str(self.root / "llama.cpp"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(surroundings, "look", functools.partial(surroundings.look, self.root))
        patch.setattr(surroundings, "installed_torch", lambda: self.torch)

    def file(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def program(self, name: str) -> None:
        self.file(f"bin/{name}", "#!/bin/sh\n")
        (self.root / "bin" / name).chmod(0o755)

    def card(self, **changes: Any) -> None:
        answers = {**HEALTHY_CARD.answers, **changes.pop("answers", {})}
        number = len(self.cards)
        self.cards.append(replace(HEALTHY_CARD, uuid=f"GPU-{number}", answers=answers, **changes))
        self.nvml, self.torch = {}, CUDA_TORCH
        self.file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n")
        self.pci()
        self.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def pci(self) -> None:
        self.file("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
        self.file("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
        self.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def shared(self, size: int) -> None:
        self._usage("/dev/shm", total=size)

    def room(self, where: str, size: int) -> None:
        self._usage(where, free=size)

    def _usage(self, where: str, **changes: int) -> None:
        real, kind = shutil.disk_usage, collections.namedtuple("usage", "total used free")

        def usage(path: Any) -> Any:
            told = real(path)
            return kind(**{**told._asdict(), **changes}) if str(path).endswith(where) else told

        self.patch.setattr(shutil, "disk_usage", usage)

    def mounted(self, where: Path, *, flags: int = 0, files: int | None = None) -> None:
        where.mkdir(parents=True, exist_ok=True)
        real = os.statvfs

        def told(path: Any) -> Any:
            found = list(real(path))
            if Path(path) == where:
                found[8] |= flags  # f_flag
                found[7] = found[7] if files is None else files  # f_favail
                found[5] = 10**6  # f_files
            return os.statvfs_result(found)

        self.patch.setattr(os, "statvfs", told)

    def socks(self) -> None:
        self.patch.setenv("ALL_PROXY", "socks5h://proxy.example")
        connect = surroundings.socket.create_connection

        def connected(address: tuple[str, int], *more: Any, **how: Any) -> Any:
            if address[0] != "proxy.example":
                return connect(address, *more, **how)
            if address[1] != 1080:
                raise OSError("nothing listens")
            return io.BytesIO()

        self.patch.setattr(surroundings.socket, "create_connection", connected)

    def searched_for(self) -> None:
        """Let a name be looked up for ever."""
        connect = surroundings.socket.create_connection
        never = threading.Event()

        def connected(address: tuple[str, int], *more: Any, **how: Any) -> Any:
            return never.wait() if address[0] == "lost.example" else connect(address, *more, **how)

        self.patch.setattr(surroundings, "PROXY_MOST_S", 0.1)
        self.patch.setattr(surroundings.socket, "create_connection", connected)

    def forbidden(self, path: Path) -> None:
        real = os.access
        self.patch.setattr(os, "access", lambda one, mode: Path(one) != path and real(one, mode))
        self.patch.setattr(os, "getuid", lambda: 54321)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    # What is run is tried by tests of its own, below; here it would take a second each time.
    monkeypatch.setattr(doctor_verb, "_trying", lambda names, machine: nullcontext(lambda: ([], [])))
    monkeypatch.setattr(llama_cpp, "quantize_tiny", lambda folder: 1)
    monkeypatch.setattr(llama_cpp, "bindings", lambda: None)
    monkeypatch.setattr(surroundings.os, "fsync", lambda descriptor: None)
    return Place(monkeypatch, tmp_path)


def examined(place: Place, **options: Any) -> tuple[list[Checked], int]:
    """Run doctor; give its checks, and the exit code."""
    install(place.patch, *place.cards, **place.nvml)
    said: list[Any] = []
    code = 0
    try:
        doctor_verb.doctor(DoctorConfig(**options), say=said.append)
    except BackpropError as error:
        code = error.code
    return [event for event in said if isinstance(event, Checked)], code


Sabotage = Callable[[Place, Path], object]
SABOTAGED: dict[str, tuple[Sabotage, str, str, int]] = {}
"""By what was done: how, the check that must name it, words that it must say, and the exit code (0 for advice)."""


def sabotage(name: str, check: str, words: str, code: int) -> Callable[[Sabotage], Sabotage]:
    def kept(how: Sabotage) -> Sabotage:
        SABOTAGED[name] = (how, check, words, code)
        return how

    return kept


@sabotage("no driver for the GPU", "gpu", "no driver is loaded", 5)
def _(place: Place, _: Path) -> None:
    place.pci()


@sabotage("a container without the GPU that the machine has", "gpu", "this container was not given it", 5)
def _(place: Place, _: Path) -> None:
    place.pci()
    place.file(".dockerenv", "")
    place.torch = CUDA_TORCH


@sabotage("the driver's library not found", "gpu", "libnvidia-ml.so.1 is not found", 5)
def _(place: Place, _: Path) -> None:
    place.card()
    place.nvml, place.cards = {"fails": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}, []


@sabotage("the driver's library not found in WSL2", "gpu", "/usr/lib/wsl/lib", 5)
def _(place: Place, _: Path) -> None:
    place.file("dev/dxg", "")
    place.file("usr/lib/wsl/lib/libcuda.so.1", "")
    place.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@sabotage("a driver that was updated under the running one", "gpu", "library and kernel module differ", 5)
def _(place: Place, _: Path) -> None:
    place.card()
    place.nvml = {"fails": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}


@sabotage("a driver too old for torch's CUDA", "gpu driver", "driver 580.65 or newer", 5)
def _(place: Place, _: Path) -> None:
    place.card()
    place.nvml = {"driver": "535.183.01"}


@sabotage("a torch without CUDA beside a GPU", "gpu driver", "a build of torch for CUDA", 5)
def _(place: Place, _: Path) -> None:
    place.card()
    place.torch = Torch(version="2.13.0+cpu", cuda="")


@sabotage("a GPU too old for torch's CUDA", "gpu generation", "7.5 or newer", 5)
def _(place: Place, _: Path) -> None:
    place.card(capability=(6, 1))


@sabotage("a GPU that the driver has lost", "gpu", "reset", 5)
def _(place: Place, _: Path) -> None:
    place.card(readings=[Now(lost=True)])


@sabotage("uncorrected errors of the GPU's memory", "gpu 0", "without uncorrected errors", 5)
def _(place: Place, _: Path) -> None:
    place.card(answers={"nvmlDeviceGetTotalEccErrors": 3})


@sabotage("bad rows of memory that can no longer be replaced", "gpu 0", "have the card replaced", 5)
def _(place: Place, _: Path) -> None:
    place.card(answers={"nvmlDeviceGetRemappedRows": (0, 4, 0, 1)})


@sabotage("MIG switched on, and no instance chosen", "gpu 0", "MIG is on", 5)
def _(place: Place, _: Path) -> None:
    place.card(answers={"nvmlDeviceGetMigMode": (1, 1)})


@sabotage("a compute mode that forbids computing", "gpu 0", "--compute-mode=DEFAULT", 5)
def _(place: Place, _: Path) -> None:
    place.card(answers={"nvmlDeviceGetComputeMode": pynvml.NVML_COMPUTEMODE_PROHIBITED})


@sabotage("a GPU above its slowdown limit", "gpu 0", "less than 93 °C", 5)
def _(place: Place, _: Path) -> None:
    place.card(readings=[Now(core=94)])


@sabotage("a GPU that is slowed down", "gpu 0 clocks", "look at its fans", 0)
def _(place: Place, _: Path) -> None:
    place.card(readings=[Now(slowed=THERMAL)])


@sabotage("another program on the GPU", "gpu 0 memory", f"process {STRANGER} hold 6.0 GiB", 0)
def _(place: Place, _: Path) -> None:
    place.card(readings=[Now(processes=((STRANGER, 6 * GIB),))])


@sabotage("a card in a slot with too few lanes", "gpu 0 link", "1 of 16 lanes", 0)
def _(place: Place, _: Path) -> None:
    place.card(answers={"nvmlDeviceGetCurrPcieLinkWidth": 1})


@sabotage("CUDA_VISIBLE_DEVICES names a GPU that is not there", "gpu", "names a GPU that is not here: `7`", 5)
def _(place: Place, _: Path) -> None:
    place.card()
    place.patch.setenv("CUDA_VISIBLE_DEVICES", "7")


@sabotage("devices that this user may not open", "gpu", "usermod", 5)
def _(place: Place, _: Path) -> None:
    place.file("dev/nvidiactl", "")
    place.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    place.forbidden(place.root / "dev" / "nvidiactl")


@sabotage("64 MB of shared memory for two GPUs", "shared memory", "--shm-size 1g", 5)
def _(place: Place, _: Path) -> None:
    place.card()
    place.card()
    place.shared(64 * 2**20)


@sabotage("no C compiler", "compiler", "apt install gcc", 7)
def _(place: Place, _: Path) -> None:
    place.card()
    (place.root / "bin" / "gcc").unlink()


@sabotage("Docker without NVIDIA's toolkit", "container toolkit", "could not select device driver", 0)
def _(place: Place, _: Path) -> None:
    place.card()
    place.program("docker")


@sabotage("a C compiler without Python's headers", "compiler", "python3-dev", 7)
def _(place: Place, folder: Path) -> None:
    place.card()
    place.patch.setattr(surroundings.sysconfig, "get_paths", lambda: {"include": str(folder)})


@sabotage("another CUDA in LD_LIBRARY_PATH", "library path", "unset LD_LIBRARY_PATH", 0)
def _(place: Place, folder: Path) -> None:
    place.card()
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcublas.so.11").write_text("")
    place.patch.setenv("LD_LIBRARY_PATH", f"/nowhere:{folder / 'lib64'}")


@sabotage("a stub of the driver in LD_LIBRARY_PATH", "library path", "unset LD_LIBRARY_PATH", 0)
def _(place: Place, folder: Path) -> None:
    place.card()
    (folder / "stubs").mkdir()
    (folder / "stubs" / "libcuda.so.1").write_text("")
    place.patch.setenv("LD_LIBRARY_PATH", str(folder / "stubs"))


@sabotage("a container limited to 1 GiB of memory", "memory", "at least 3 GiB", 5)
def _(place: Place, _: Path) -> None:
    place.file(".dockerenv", "")
    real = device.probe
    place.patch.setattr(device, "probe", lambda **how: replace(real(**how), memory_bytes=GIB))


@sabotage("a container limited to half a CPU", "machine", "--cpus", 0)
def _(place: Place, _: Path) -> None:
    place.file("sys/fs/cgroup/cpu.max", "50000 100000\n")


@sabotage("a limit of addresses (`ulimit -v`)", "address space", "ulimit -v unlimited", 5)
def _(place: Place, _: Path) -> None:
    place.card()
    real = resource.getrlimit
    limit = resource.RLIMIT_AS
    place.patch.setattr(resource, "getrlimit", lambda kind: (16 * GIB, 16 * GIB) if kind == limit else real(kind))


@sabotage("a CPU without AVX2", "machine", "illegal instruction", 0)
def _(place: Place, _: Path) -> None:
    place.file("proc/cpuinfo", "flags\t\t: fpu sse2 avx\n")


@sabotage("a clock that is years behind", "clock", "set the clock", 5)
def _(place: Place, _: Path) -> None:
    clock = collections.namedtuple("Clock", "time time_ns perf_counter")(lambda: 1e9, time.time_ns, time.perf_counter)
    place.patch.setattr(surroundings, "time", clock)


@sabotage("a volume mounted read-only", "disk for output", "mounted read-only", 9)
def _(place: Place, folder: Path) -> None:
    place.mounted(folder / "output", flags=os.ST_RDONLY)


@sabotage("no space left", "disk for output", "at least 3 GiB", 9)
def _(place: Place, folder: Path) -> None:
    (folder / "output").mkdir()
    place.room("output", 50 * 2**20)


@sabotage("no room for another file (inodes)", "disk for output", "df -i", 9)
def _(place: Place, folder: Path) -> None:
    place.mounted(folder / "output", files=3)


@sabotage("a cache from which nothing may be loaded (noexec)", "disk for cache", "without `noexec`", 9)
def _(place: Place, folder: Path) -> None:
    place.mounted(folder / "cache" / "backprop", flags=os.ST_NOEXEC)


@sabotage("a folder that this user may not write", "disk for output", "BACKPROP_USER", 9)
def _(place: Place, folder: Path) -> None:
    (folder / "output").mkdir()
    place.forbidden(folder / "output")


@sabotage("a folder that this user may not look into", "disk for output", "BACKPROP_USER", 9)
def _(place: Place, folder: Path) -> None:
    real, closed = os.stat, folder / "closed"
    closed.mkdir()
    place.patch.chdir(closed)
    place.forbidden(closed)

    def stat(path: Any, **how: Any) -> os.stat_result:
        if closed in Path(os.fspath(path) if isinstance(path, str | os.PathLike) else "").parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **how)

    place.patch.setattr(os, "stat", stat)


@sabotage("an earlier run of another user in the output", "disk for output", "chown -R", 9)
def _(place: Place, folder: Path) -> None:
    (folder / "output" / "lora").mkdir(parents=True)
    place.forbidden(folder / "output" / "lora")


@sabotage("a proxy that does not answer", "proxy", "HTTPS_PROXY (127.0.0.1:9) does not answer", 7)
def _(place: Place, _: Path) -> None:
    place.patch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:9")


@sabotage("a proxy whose name is looked up without end", "proxy", "HTTP_PROXY (lost.example:80) does not answer", 7)
def _(place: Place, _: Path) -> None:
    place.patch.setenv("HTTP_PROXY", "lost.example")
    place.searched_for()


@sabotage("a proxy of a name that can be none", "proxy", ".x:80) does not answer", 7)
def _(place: Place, _: Path) -> None:
    place.patch.setenv("HTTP_PROXY", f"{'a' * 70}.x")


@sabotage("an Ollama that is too old", "ollama", "update Ollama", 8)
def _(place: Place, _: Path) -> Any:
    double = OllamaDouble()
    double.version = "0.3.14"
    double.__enter__()
    place.patch.setenv("OLLAMA_HOST", double.url)
    return double


@sabotage("no Ollama where OLLAMA_HOST says", "ollama", "nothing listens", 8)
def _(place: Place, _: Path) -> None:
    place.patch.setenv("OLLAMA_HOST", "127.0.0.1:9")


@sabotage("a proxy's page in the place of Ollama", "ollama", "does not answer as Ollama does", 8)
def _(place: Place, _: Path) -> Any:
    server = page_server()
    place.patch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_address[1]}")
    return server


@sabotage("no llama.cpp", "llama.cpp converter", "llama_cpp_build", 7)
def _(place: Place, folder: Path) -> None:
    place.patch.setenv("BACKPROP_LLAMA_CPP", str(folder / "nowhere"))


@sabotage("a package of a version that does not fit", "transformers", "transformers<=5.17.0,>=5.15", 7)
def _(place: Place, folder: Path) -> None:
    about = folder / "site" / "transformers-4.40.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.40.0\n")
    place.patch.syspath_prepend(str(folder / "site"))


def page_server() -> HTTPServer:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize("name", SABOTAGED)
def test_what_was_sabotaged_is_named_and_nothing_else(place: Place, tmp_path: Path, name: str) -> None:
    how, check, words, code = SABOTAGED[name]
    held = how(place, tmp_path)
    checks, ended = examined(place)
    blamed = [one for one in checks if not one.ok or one.needed]
    assert [one.name for one in blamed] == [check], blamed
    (named,) = blamed
    assert words in f"{named.found} {named.needed} {named.mend}"
    assert named.needed
    assert named.mend
    assert "secret" not in str(checks), "passwords of proxies stay where they are"
    assert ended == code
    assert named.ok == (code == 0)
    if held is not None:
        held.__exit__(None, None, None) if isinstance(held, OllamaDouble) else held.shutdown()


def test_there_are_twenty_and_the_docs_name_them() -> None:
    assert len(SABOTAGED) >= 20
    page = (ROOT / "docs" / "doctor.md").read_text()
    assert not [name for name in SABOTAGED if f"| {name} |" not in page]


@pytest.mark.parametrize(
    ("state", "found", "mend"),
    [
        ({"bytes_per_second": 4e6}, "writes 4 MB/s", "put it on another disk"),
        ({"skew_s": -600.0}, "its clock is 600 s behind ours", "time server"),
        ({"skew_s": 600.0}, "its clock is 600 s ahead of ours", "time server"),
    ],
    ids=["slow", "behind", "ahead"],
)
def test_a_volume_that_could_be_better_is_told(state: dict[str, Any], found: str, mend: str) -> None:
    volume = Volume(name="output", path="/output", free_bytes=9 * GIB, **state)
    finding = check_volume(volume, least_bytes=GIB)
    assert finding.error is None
    assert found in finding.found
    assert mend in (finding.advice or ("", ""))[1]


HEALTHY: dict[str, Sabotage] = {
    "a laptop without a GPU": lambda place, folder: None,
    "one GPU": lambda place, folder: place.card(),
    "one GPU that is hidden": lambda place, folder: (place.card(), place.patch.setenv("CUDA_VISIBLE_DEVICES", "")),
    "one GPU, named by the beginning of its id": lambda place, folder: (
        place.card(),
        place.patch.setenv("CUDA_VISIBLE_DEVICES", "GPU-"),
    ),
    "one GPU with 64 MB of shared memory": lambda place, folder: (place.card(), place.shared(64 * 2**20)),
    "Docker with NVIDIA's toolkit": lambda place, folder: (
        place.card(),
        place.program("docker"),
        place.program("nvidia-ctk"),
    ),
    "two GPUs": lambda place, folder: (place.card(), place.card(), place.shared(GIB)),
    "the image for CPUs on a machine with a GPU": lambda place, folder: (place.pci(), place.file(".dockerenv", "")),
    "a container with a GPU": lambda place, folder: (place.card(), place.file(".dockerenv", "")),
    "WSL2 with a GPU": lambda place, folder: (place.card(), place.file("dev/dxg", "")),
    "WSL2 without an NVIDIA card": lambda place, folder: (
        place.file("dev/dxg", ""),
        place.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False),
    ),
    "a card that tells little": lambda place, folder: place.card(
        slowdown=None, answers=dict.fromkeys(HEALTHY_CARD.answers, pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
    ),
    "a laptop's card on eight lanes": lambda place, folder: place.card(
        answers={"nvmlDeviceGetCurrPcieLinkWidth": 8}, readings=[Now(core=71)]
    ),
    "an older driver and an older torch": lambda place, folder: (
        place.card(capability=(7, 0)),
        place.nvml.update(driver="535.183.01"),
        setattr(place, "torch", Torch(version="2.11.0+cu128", cuda="12.8")),
    ),
    "the driver's folder in LD_LIBRARY_PATH": lambda place, folder: (
        place.card(),
        place.file("lib/libcuda.so.1", ""),
        place.patch.setenv("LD_LIBRARY_PATH", str(place.root / "lib")),
    ),
    "another vendor's graphics": lambda place, folder: (
        place.pci(),
        place.file("sys/bus/pci/devices/0000:01:00.0/vendor", "0x1002\n"),
    ),
    "an NVIDIA sound device alone": lambda place, folder: (
        place.pci(),
        place.file("sys/bus/pci/devices/0000:01:00.0/class", "0x040300\n"),
    ),
    "a container with two CPUs' worth": lambda place, folder: place.file("sys/fs/cgroup/cpu.max", "200000 100000\n"),
    "another user's file beside our temporary ones": lambda place, folder: (
        (folder / "theirs").mkdir(),
        place.patch.setattr(surroundings.tempfile, "tempdir", str(folder)),
        place.forbidden(folder / "theirs"),
    ),
    "a proxy of SOCKS on its usual port": lambda place, folder: place.socks(),
    "a proxy that answers": lambda place, folder: place.patch.setenv(
        "http_proxy", f"127.0.0.1:{page_server().server_address[1]}"
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_machine_is_not_blamed(place: Place, tmp_path: Path, name: str) -> None:
    HEALTHY[name](place, tmp_path)
    checks, code = examined(place)
    assert not [one for one in checks if not one.ok or one.needed]
    assert code == 0


def test_a_card_is_told_with_all_that_its_driver_says(place: Place) -> None:
    place.card(name="NVIDIA RTX", readings=[Now(core=61, watts=120)])
    checks, _ = examined(place)
    (card,) = [one for one in checks if one.name == "gpu 0"]
    assert card.found == (
        "NVIDIA RTX, 23.0 of 24.0 GiB free, 61 of 93 °C, 120 of 350 W, 210 of 2100 MHz, "
        "0 uncorrected errors of its memory, 16 of 16 lanes of PCIe, persistence off"
    )


def test_the_least_memory_that_a_job_asks_for_is_held(place: Place) -> None:
    place.card()
    assert examined(place, min_vram=24)[1] == 0
    assert examined(place, min_vram=24.5)[1] == 5


@pytest.mark.parametrize(
    "card",
    [{"free": GIB // 2}, {"readings": [Now(processes=((STRANGER, 6 * GIB),))]}],
    ids=["full", "busy"],
)
def test_a_card_that_a_run_uses_is_left_to_it(place: Place, card: dict[str, Any]) -> None:
    place.patch.setattr(doctor_verb, "_trying", lambda names, machine: pytest.fail("it was tried"))
    place.card(**card)
    checks, code = examined(place)
    assert next(one.found for one in checks if one.name == "torch product").startswith("not tried")
    assert code == 0


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Put a package of this content before all others."""

    def broken(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    return broken


TWO = ["torch product", "packed attention"]


def test_a_torch_that_cannot_be_imported_is_named(broken: Callable[[str, str], None]) -> None:
    broken("torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    (finding, _), left = doctor_verb.try_all(TWO, trials.Machine())
    assert left == []
    assert finding.error is not None
    assert "libcudart.so.13" in finding.error.message
    assert finding.error.code == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "exited with -4"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exited with -11"),
        ("import os; os._exit(0)", "it ended early"),
        ("import time; time.sleep(60)", "did not finish within"),
    ],
    ids=["illegal instruction", "segmentation fault", "ends well", "hangs"],
)
def test_a_library_that_ends_its_process_is_named_and_the_rest_is_tried(
    broken: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    if "sleep" in text:
        monkeypatch.setattr(doctor_verb, "TRIALS_MOST_S", 0.5)
    broken("torch", text)
    findings, left = doctor_verb.try_all(TWO, trials.Machine())
    assert left == TWO[1:]
    (finding,) = findings
    assert finding.name == TWO[0]
    assert finding.error is not None
    assert said in finding.error.message


@pytest.mark.parametrize("text", ["raise RuntimeError('CUDA Setup failed')", "", "import nothing_of_that_name"])
def test_a_broken_bitsandbytes_is_named(broken: Callable[[str, str], None], text: str) -> None:
    broken("torch", "class cuda:\n    is_available = lambda: False\n")
    broken("bitsandbytes", text)
    (finding,), _ = doctor_verb.try_all(["4-bit product"], trials.Machine())
    assert finding.error is not None
    assert "bitsandbytes" in finding.error.message
    assert "--force-reinstall bitsandbytes" in (finding.error.hint or "")


def test_a_card_far_below_its_rate_is_named() -> None:
    # Data sheets: H100 SXM 989 TFLOP/s (1.83 GHz), A100 312 (1.41), RTX 3090 71 (1.695), RTX 4090 165 (2.52).
    for capability, processors, ghz, sheet in (
        ((9, 0), 132, 1.83, 989),
        ((8, 0), 108, 1.41, 312),
        ((8, 6), 82, 1.695, 71),
        ((8, 9), 128, 2.52, 165),
    ):
        expected = trials.expected_rate(capability, multiprocessors=processors, clock_hz=ghz * 1e9)
        assert expected == pytest.approx(sheet * 1e12, rel=0.01)
        for share, slow in ((0.7, False), (0.2, True)):
            told = trials.judge_rate(share * sheet * 1e12, expected)
            assert told[1] == slow
            assert f"{share:.0%} of what" in told[0]
    assert not trials.judge_rate(1e12, trials.expected_rate((99, 0), multiprocessors=1, clock_hz=1e9))[1]


def test_a_slow_card_is_advised_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an H20 is, which has a seventh of an H100's rate by design; and each trial sees the GPUs that were asked about."""
    seen: list[str] = []

    def running(argv: Sequence[str], *, env: dict[str, str], timeout_s: float) -> Any:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        slow = trials.Tried(name="torch product", found="148 TFLOP/s", needed=trials.SLOW[0], mend=trials.SLOW[1])
        Path(argv[3]).write_text(json.dumps(asdict(slow)) + "\n")
        return nullcontext(lambda: "")

    monkeypatch.setattr(doctor_verb.process, "running", running)
    (finding,), _ = doctor_verb.try_all(["torch product"], trials.Machine(gpus=["GPU-1", "GPU-0"]))
    assert finding.error is None
    assert finding.advice == trials.SLOW
    assert seen == ["GPU-1,GPU-0"]


def test_what_is_tried_suits_the_machine() -> None:
    assert trials.names_for(num_gpus=0, with_bitsandbytes=True, with_triton=True) == TWO
    assert set(trials.names_for(num_gpus=2, with_bitsandbytes=True, with_triton=True)) == set(trials.TRIALS)
    one = trials.names_for(num_gpus=1, with_bitsandbytes=False, with_triton=True)
    assert not {"several gpus", "4-bit product"} & set(one)


def test_what_compiles_is_tried_beside_what_multiplies_and_each_is_told(place: Place) -> None:
    begun: list[Sequence[str]] = []

    @contextmanager
    def trying(names: Sequence[str], machine: trials.Machine) -> Generator[Any]:
        begun.append(names)
        yield lambda: ([Finding(name=names[0], found="it runs")], names[1:])

    place.patch.setattr(doctor_verb, "_trying", trying)
    place.card()
    checks, _ = examined(place)
    assert begun[:2] == [[name] for name in trials.COMPILING]
    told = [check.name for check in checks if check.name in trials.TRIALS]
    assert sorted(told) == sorted([*trials.COMPILING, *begun[2]])


def test_a_card_for_one_program_at_a_time_is_tried_by_one(place: Place) -> None:
    begun: list[Sequence[str]] = []
    place.patch.setattr(
        doctor_verb, "_trying", lambda names, machine: begun.append(names) or nullcontext(lambda: ([], []))
    )
    place.card(answers={"nvmlDeviceGetComputeMode": pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS})
    examined(place)
    assert [len(names) for names in begun] == [1] * len(begun)
    assert {*trials.COMPILING, "torch product"} <= {name for (name,) in begun}


def test_the_torch_that_is_installed_is_read_without_importing_it() -> None:
    found = surroundings.installed_torch()
    assert found is not None
    assert found.version.startswith("2.")


def test_a_volume_tells_how_fast_it_writes_and_leaves_nothing(tmp_path: Path) -> None:
    volume = surroundings.look_at_volume("output", tmp_path / "not" / "there")
    assert volume.bytes_per_second is not None
    assert volume.bytes_per_second > 0
    assert volume.skew_s is not None
    assert abs(volume.skew_s) < 5
    assert list(tmp_path.iterdir()) == []
