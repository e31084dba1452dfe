"""What doctor makes of a machine: pure functions from facts to findings, each with what is needed and what mends it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from backprop.core.hardware import Hardware
from backprop.errors import BackpropError, DiskError, HardwareError, ToolError

GIB, MIB = 2**30, 2**20
# A run of the smallest preset with its export: checkpoint, merged copy, GGUF files.
LEAST_DISK_BYTES = 3 * GIB
LEAST_TEMPORARY_BYTES = 256 * MIB
# The smallest preset in float32, its optimizer and activations, and the libraries.
LEAST_MEMORY_BYTES = 3 * GIB
# What NCCL takes of /dev/shm for two GPUs is above Docker's default of 64 MiB.
LEAST_SHARED_BYTES = 256 * MIB
# CUDA maps the memory of every GPU into its address space.
LEAST_ADDRESSES = 64 * GIB
LEAST_OPEN_FILES = 1024
# A checkpoint of a 7B's adapter is some 500 MB; slower than this, saving would cost minutes.
SLOW_DISK_BYTES = 20 * MIB
MOST_SKEW_S = 120.0
# Before this, certificates of the model hub are not valid yet: 2025-01-01.
EARLIEST_CLOCK = 1735689600.0

# Oldest driver on Linux for each CUDA that torch is built with (CUDA release notes, table "CUDA Toolkit and Minimum Required
# Driver Version for CUDA Minor Version Compatibility"); in WSL2 it is that of Windows, of the same branch.
DRIVER_FLOOR = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
# Oldest cards that each still has code for: Kepler, Maxwell, Turing.
CAPABILITY_FLOOR = {11: (3, 5), 12: (5, 0), 13: (7, 5)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: what was found, and the error it stands for when it is not good enough."""

    name: str
    found: str
    error: BackpropError | None = None
    advice: tuple[str, str] | None = None
    """Of what works, and could be better: what would be, and what brings it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """A place that is written to."""

    name: str
    path: str
    free_bytes: int
    free_files: int | None = None
    """None where the file system sets no limit."""
    read_only: bool = False
    no_programs: bool = False
    """Whether programs on it may not run (noexec)."""
    refused: str = ""
    """Why it cannot be written; empty if it can."""
    whose: str = ""
    """Who else owns something in it that is to be written over; empty if nobody does."""
    bytes_per_second: float | None = None
    skew_s: float | None = None
    """How far its clock is ahead of this machine's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the operating system tells, beside its GPUs."""

    system: str = "Linux"
    in_container: bool = False
    clock: float = 2e9
    cpu_flags: frozenset[str] | None = None
    """None where they are not told."""
    cpu_share: float | None = None
    """CPUs' worth of time that this container may use; None without such a limit."""
    address_limit: int | None = None
    open_files: int | None = None
    shared_bytes: int | None = None
    pci_gpus: int = 0
    """NVIDIA's on the bus, whether or not a driver drives them."""
    kernel_driver: str = ""
    device_nodes: tuple[str, ...] = ()
    closed_nodes: tuple[str, ...] = ()
    """Those of them that this user may not open."""
    wsl: bool = False
    compiler: str = ""
    headers: bool = True
    """Whether Python.h is there."""
    foreign_libraries: tuple[str, ...] = ()
    """CUDA's, in the folders of LD_LIBRARY_PATH."""
    docker: bool = False
    toolkit: bool = False
    """NVIDIA's, for containers."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """What is looked at of it; a proxy's address may hold a password."""
    silent_proxies: tuple[str, ...] = ()
    """Of those that variables name: who does not answer."""
    volumes: tuple[Volume, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CardState:
    """What the driver says of one GPU, for a look at it; None where it does not say."""

    temperature_c: int | None = None
    slowdown_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    slowed_by: tuple[str, ...] = ()
    others: tuple[tuple[str, int], ...] = ()
    """Other programs that compute on it, and the bytes they hold."""
    uncorrected: int | None = None
    """Errors of its memory since the driver was loaded."""
    remap_pending: bool = False
    remap_failed: bool = False
    mig: bool = False
    persistence: bool | None = None
    prohibited: bool = False
    """Whether its compute mode lets no program compute."""
    exclusive: bool = False
    """Whether it lets one program compute at a time."""
    link: tuple[int, int] | None = None
    """Lanes of PCIe in use, and lanes there could be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Torch:
    """The torch that is installed, as far as its files tell."""

    version: str
    cuda: str
    """Such as `13.0`; empty for a build without."""

    @property
    def major(self) -> int:
        """The first number of its CUDA."""
        return int(self.cuda.partition(".")[0])


def check_machine(facts: Surroundings, hardware: Hardware) -> Iterator[Finding]:
    """Judge processor, memory, clock and limits."""
    memory = f"{hardware.memory_bytes / GIB:.0f} GiB of memory"
    share = "" if facts.cpu_share in (None, hardware.num_cpus) else f" (this container may use {facts.cpu_share:g})"
    found = f"{hardware.platform}, {hardware.num_cpus} CPUs{share}, {memory}"
    yield Finding(name="machine", found=found, advice=_processor_advice(facts))
    if 0 < hardware.memory_bytes < LEAST_MEMORY_BYTES:
        limited = "this container may use" if facts.in_container else "there are"
        yield Finding(
            name="memory",
            found=f"{limited} {hardware.memory_bytes / GIB:.1f} GiB",
            error=HardwareError(
                f"at least {LEAST_MEMORY_BYTES / GIB:.0f} GiB of memory",
                hint="give the container more (`--memory`, or the settings of Docker Desktop), or use another machine",
            ),
        )
    if facts.clock < EARLIEST_CLOCK:
        error = HardwareError("the present date", hint="set the clock, e.g. `timedatectl set-ntp true`")
        yield Finding(name="clock", found="it is years behind: no certificate will be valid", error=error)
    yield from _check_limits(facts, hardware)


def _processor_advice(facts: Surroundings) -> tuple[str, str] | None:
    if facts.cpu_flags is not None and "avx2" not in facts.cpu_flags:
        return (
            "AVX2: without it, a CPU is several times slower, and some libraries end with `illegal instruction`",
            "in a virtual machine, let it see the host's CPU (`-cpu host`); else use another machine",
        )
    if facts.cpu_share is not None and facts.cpu_share < 1:
        return "one CPU or more", "give the container more (`--cpus`)"
    return None


def _check_limits(facts: Surroundings, hardware: Hardware) -> Iterator[Finding]:
    addresses = facts.address_limit
    if addresses is not None and hardware.gpus and addresses < LEAST_ADDRESSES:
        yield Finding(
            name="address space",
            found=f"limited to {addresses / GIB:.1f} GiB",
            error=HardwareError("no such limit: CUDA maps all of the GPU's memory", hint="`ulimit -v unlimited`"),
        )
    if facts.open_files is not None and facts.open_files < LEAST_OPEN_FILES:
        yield Finding(
            name="open files",
            found=f"at most {facts.open_files}",
            advice=(f"{LEAST_OPEN_FILES} or more", f"`ulimit -n {LEAST_OPEN_FILES}`"),
        )
    shared = facts.shared_bytes
    if shared is not None:
        found = f"{shared / MIB:,.0f} MiB"
        error = None
        if len(hardware.gpus) > 1 and shared < LEAST_SHARED_BYTES:
            error = HardwareError(
                f"{LEAST_SHARED_BYTES / MIB:.0f} MiB or more, through which several GPUs exchange gradients",
                hint="start the container with `--shm-size 1g`, or `--ipc host`",
            )
        yield Finding(name="shared memory", found=found, error=error)


def check_volume(volume: Volume, *, least_bytes: int) -> Finding:
    """Judge a place that is written to."""
    name, where = f"disk for {volume.name}", volume.path
    free = f"{volume.free_bytes / GIB:.0f} GiB free at {where}"
    if volume.read_only:
        error = DiskError(
            "a volume that may be written", hint=f"mount it without `:ro`, or choose another place than {where}"
        )
        return Finding(name=name, found=f"{where} is mounted read-only", error=error)
    if volume.refused:
        error = DiskError("a folder that may be written", hint=volume.refused)
        return Finding(name=name, found=f"{where} may not be written", error=error)
    if volume.free_bytes < least_bytes:
        error = DiskError(f"at least {least_bytes / GIB:.2g} GiB", hint=f"make room at {where} (`df -h`)")
        return Finding(name=name, found=f"{volume.free_bytes / GIB:.1f} GiB free at {where}", error=error)
    if volume.free_files is not None and volume.free_files < 1000:
        error = DiskError("room for more files", hint=f"remove files at {where} (`df -i`)")
        return Finding(name=name, found=f"{free}, but for {volume.free_files} more files only", error=error)
    if volume.whose:
        error = DiskError("files that this user may write over", hint=f"`sudo chown -R $(id -u) {where}`")
        return Finding(name=name, found=volume.whose, error=error)
    if volume.no_programs and volume.name == "cache":
        error = DiskError("a place from which libraries may be loaded", hint="mount it without `noexec`")
        return Finding(name=name, found=f"{where} is mounted noexec", error=error)
    if volume.skew_s is not None and abs(volume.skew_s) > MOST_SKEW_S:
        advice = ("clocks that agree", "let this machine and the server of this volume ask the same time server")
        found = f"{free}; its clock is {abs(volume.skew_s):.0f} s {'ahead of' if volume.skew_s > 0 else 'behind'} ours"
        return Finding(name=name, found=found, advice=advice)
    speed = volume.bytes_per_second
    if speed is None:
        return Finding(name=name, found=free)
    slow = speed < SLOW_DISK_BYTES
    advice = (f"{SLOW_DISK_BYTES / 1e6:.0f} MB/s or more", "put it on another disk") if slow else None
    return Finding(name=name, found=f"{free}, writes {speed / 1e6:,.0f} MB/s", advice=advice)


def check_network(facts: Surroundings) -> Iterator[Finding]:
    """Judge the proxies that variables name; Ollama is always asked without one."""
    named = {name: value for name, value in facts.environment.items() if name.lower().endswith("_proxy")}
    if not named or set(named) <= {"NO_PROXY", "no_proxy"}:
        return
    found = ", ".join(sorted({name.upper() for name in named}))
    if facts.silent_proxies:
        error = ToolError(
            "a proxy that answers, or none",
            hint=f"unset {' '.join(sorted(named))}, or correct it; with `--offline` none is used",
        )
        yield Finding(name="proxy", found=f"{', '.join(facts.silent_proxies)} does not answer", error=error)
    else:
        yield Finding(name="proxy", found=f"{found}, and it answers")


def check_driver(facts: Surroundings, hardware: Hardware, torch: Torch | None) -> Iterator[Finding]:
    """Judge what is between torch and the GPUs: kernel driver, its library, the container, and torch's own CUDA."""
    if facts.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding(name="gpu", found="none: CUDA_VISIBLE_DEVICES hides all; the CPU trains")
    elif not hardware.gpus and facts.in_container and torch is not None and not torch.cuda:
        yield Finding(name="gpu", found=f"none: torch {torch.version} of this container is built for CPUs alone")
    elif not hardware.gpus:
        yield _no_gpu(facts)
    elif torch is not None and not torch.cuda:
        yield Finding(
            name="gpu driver",
            found=f"{hardware.driver}; torch {torch.version} is built for CPUs alone",
            error=HardwareError(
                "a build of torch for CUDA", hint="`pip install --force-reinstall torch`, from an index that has one"
            ),
        )
    elif torch is not None:
        yield from _check_versions(hardware, torch)
    if hardware.gpus and facts.system == "Linux":
        yield _compiler(facts)
    if facts.docker and facts.pci_gpus and not (facts.toolkit or facts.in_container or facts.wsl):
        yield Finding(
            name="container toolkit",
            found="Docker is here, and NVIDIA's toolkit for it is not: `could not select device driver` is what it would say",
            advice=("the toolkit, for the image; without Docker it is not used", "install `nvidia-container-toolkit`"),
        )
    if facts.foreign_libraries:
        yield Finding(
            name="library path",
            found=f"LD_LIBRARY_PATH comes before torch's own libraries: {', '.join(facts.foreign_libraries[:3])}",
            advice=("torch's own CUDA libraries, which are of the version that it needs", "`unset LD_LIBRARY_PATH`"),
        )


def _no_gpu(facts: Surroundings) -> Finding:
    """Say why there is none, as far as that can be seen."""
    if facts.closed_nodes:
        return Finding(
            name="gpu",
            found=f"{facts.closed_nodes[0]} is there, and this user may not open it",
            error=HardwareError(
                "access to the GPU's devices", hint="`sudo usermod -aG video,render $USER`, log in again"
            ),
        )
    if facts.kernel_driver or facts.device_nodes or facts.wsl:
        inside = "start it with `--gpus all` and `NVIDIA_DRIVER_CAPABILITIES=compute,utility`"
        where = "add /usr/lib/wsl/lib to" if facts.wsl else "run `sudo ldconfig`; look at"
        return Finding(
            name="gpu",
            found=f"NVIDIA's driver {facts.kernel_driver or ''} is loaded, but its library libnvidia-ml.so.1 is not found",
            error=HardwareError(
                "the library of the driver, of the same version",
                hint=inside if facts.in_container else f"{where} LD_LIBRARY_PATH",
            ),
        )
    if facts.pci_gpus and facts.in_container:
        return Finding(
            name="gpu",
            found="the machine has an NVIDIA GPU, and this container was not given it",
            error=HardwareError(
                "the GPU in the container",
                hint="install NVIDIA's container toolkit, and start it with `--gpus all`; or hide it: CUDA_VISIBLE_DEVICES=",
            ),
        )
    if facts.pci_gpus:
        return Finding(
            name="gpu",
            found="there is an NVIDIA GPU, and no driver is loaded for it",
            error=HardwareError(
                "NVIDIA's driver",
                hint="install it, e.g. `sudo ubuntu-drivers install`; or hide it: CUDA_VISIBLE_DEVICES=",
            ),
        )
    return Finding(name="gpu", found="none: the CPU trains, which suits models up to about 0.5B")


def _check_versions(hardware: Hardware, torch: Torch) -> Iterator[Finding]:
    least = DRIVER_FLOOR.get(torch.major)
    text = f"{hardware.driver}; torch {torch.version} is built with CUDA {torch.cuda}"
    numbers = tuple(int(part) for part in hardware.driver.split(".")[:2] if part.isdecimal())
    error = None
    if least is not None and numbers < least:
        error = HardwareError(
            f"driver {least[0]}.{least[1]} or newer for CUDA {torch.cuda}",
            hint=f"update the driver, or install a torch for CUDA {_newest_cuda(numbers)}",
        )
    yield Finding(name="gpu driver", found=text, error=error)
    floor = CAPABILITY_FLOOR.get(torch.major, (0, 0))
    for gpu in hardware.gpus:
        if gpu.capability < floor:
            yield Finding(
                name="gpu generation",
                found=f"{gpu.name} is of compute capability {gpu.capability[0]}.{gpu.capability[1]}",
                error=HardwareError(
                    f"{floor[0]}.{floor[1]} or newer for CUDA {torch.cuda}",
                    hint="install a torch for an older CUDA, or hide this GPU by CUDA_VISIBLE_DEVICES",
                ),
            )


def _newest_cuda(driver: tuple[int, ...]) -> int:
    return max((major for major, floor in DRIVER_FLOOR.items() if driver >= floor), default=min(DRIVER_FLOOR))


def _compiler(facts: Surroundings) -> Finding:
    """Triton, which makes kernels, compiles a piece of C when a run starts."""
    if not facts.compiler:
        error = ToolError("a C compiler, with which Triton makes its kernels", hint="`sudo apt install gcc`")
        return Finding(name="compiler", found="neither CC, gcc nor clang", error=error)
    if not facts.headers:
        error = ToolError("Python.h, with which Triton makes its kernels", hint="`sudo apt install python3-dev`")
        return Finding(name="compiler", found=f"{facts.compiler}, without Python's headers", error=error)
    return Finding(name="compiler", found=facts.compiler)


def check_card(number: int, name: str, free: str, state: CardState) -> Iterator[Finding]:
    """Judge one GPU by what its driver says."""
    label = f"gpu {number}"
    yield Finding(name=label, found=", ".join([f"{name}, {free}", *_told(state)]), error=_wrong_with(state))
    if state.slowed_by:
        yield Finding(
            name=f"{label} clocks",
            found=f"slowed down by {', '.join(state.slowed_by)}: {state.clock_mhz} of {state.max_clock_mhz} MHz",
            advice=(
                "clocks that nothing holds down",
                "look at its fans, its air, its power cables and `nvidia-smi -q -d PERFORMANCE`",
            ),
        )
    if state.others:
        held = sum(size for _, size in state.others)
        yield Finding(
            name=f"{label} memory",
            found=f"{', '.join(name for name, _ in state.others[:5])} hold {held / GIB:.1f} GiB of it",
            advice=("all of it, for larger models and batches", "stop them, or `docker compose stop ollama`"),
        )
    if state.link is not None and state.link[0] < state.link[1] and state.link[0] < 8:
        yield Finding(
            name=f"{label} link",
            found=f"{state.link[0]} of {state.link[1]} lanes of PCIe",
            advice=("8 lanes or more", "put the card into another slot, or seat it anew"),
        )


def _wrong_with(state: CardState) -> HardwareError | None:
    if state.prohibited:
        return HardwareError(
            "a compute mode that lets programs compute", hint="`sudo nvidia-smi --compute-mode=DEFAULT`"
        )
    if state.remap_failed:
        return HardwareError(
            "a memory whose bad rows could be replaced", hint="have the card replaced: its spare rows are used up"
        )
    if state.remap_pending or state.uncorrected:
        return HardwareError(
            "a memory without uncorrected errors",
            hint="`sudo nvidia-smi --gpu-reset`, or restart; if they come again, replace it",
        )
    if state.mig:
        return HardwareError(
            "an instance of it, since MIG is on and the whole card cannot compute",
            hint="set CUDA_VISIBLE_DEVICES to one of `nvidia-smi -L`, or `sudo nvidia-smi -mig 0`",
        )
    hot, limit = state.temperature_c, state.slowdown_c
    if hot is not None and limit is not None and hot >= limit:
        return HardwareError(f"less than {limit} °C, where it slows itself down", hint="give it air, clean its fans")
    return None


def _told(state: CardState) -> Iterator[str]:
    if state.temperature_c is not None:
        limit = "" if state.slowdown_c is None else f" of {state.slowdown_c}"
        yield f"{state.temperature_c}{limit} °C"
    if state.power_w is not None:
        limit = "" if state.power_limit_w is None else f" of {state.power_limit_w:.0f}"
        yield f"{state.power_w:.0f}{limit} W"
    if state.clock_mhz is not None:
        yield f"{state.clock_mhz} of {state.max_clock_mhz} MHz"
    if state.uncorrected is not None:
        yield f"{state.uncorrected} uncorrected errors of its memory"
    if state.link is not None:
        yield f"{state.link[0]} of {state.link[1]} lanes of PCIe"
    if state.persistence is not None:
        yield f"persistence {'on' if state.persistence else 'off'}"
