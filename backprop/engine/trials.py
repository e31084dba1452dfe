"""What doctor runs rather than believes: small computations of each kind that a training is made of, held to references.

In a process of its own, since a broken library may end or hang it: `python -m backprop.engine.trials FILE MACHINE NAME…`
appends a line to FILE before each trial and after it.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backprop.edges import process
from backprop.errors import BackpropError, HardwareError, PackageError, ToolError

# Operations per clock of a multiprocessor with matrices in bfloat16, summed in float32; consumer cards of 8.6 and 8.9 have
# this half rate, others of these generations twice as much (NVIDIA's white papers: GA102, AD102, H100, Blackwell).
BF16_PER_CLOCK = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192, (12, 0): 512}
# The highest clock of a card is above what it holds under load, and its power limit below: a good card reaches half or more.
LEAST_OF_RATE = 0.3
# Rows and columns: on the fastest card a product of these takes a fifth of a millisecond.
SIZE = 4096
ROUNDS = 20
FP8_CAPABILITY = (8, 9)
# These keep a CPU busy for seconds, and the GPU for none.
COMPILING = ("triton kernel", "compiled function")
RAMP_UP_S = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a trial must know of the machine."""

    gpus: Sequence[str] = ()
    """Ids of those that may be used; the first is torch's first."""
    clocks_mhz: Sequence[int | None] = ()
    """Of each, the highest; None if the driver does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """How a trial ended: what was found; or what is needed, and what mends it, with the exit code, which is 0 for advice."""

    name: str
    found: str = ""
    needed: str = ""
    mend: str = ""
    code: int = 0


def main(file: str, machine: Machine, names: Sequence[str]) -> None:
    """Try these, one after the other."""
    with Path(file).open("a", encoding="utf-8") as out:
        for name in names:
            print(json.dumps({"begun": name}), file=out, flush=True)
            try:
                found = TRIALS[name](machine)
                tried = found if isinstance(found, Tried) else Tried(name=name, found=found)
            except BackpropError as error:
                tried = Tried(name=name, needed=error.message, mend=error.hint or "", code=error.code)
            print(json.dumps(asdict(tried)), file=out, flush=True)


def names_for(*, num_gpus: int, with_bitsandbytes: bool, with_triton: bool) -> list[str]:
    """Say what is worth trying on a machine."""
    if not num_gpus:
        return ["torch product", "packed attention"]
    named = ["torch product", "fp8 product", "packed attention"]
    named += ["4-bit product"] if with_bitsandbytes else []
    named += COMPILING if with_triton else []
    return [*named, "several gpus"] if num_gpus > 1 else named


def _device() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise ToolError(
            f"a torch that can be imported: {error}", hint="install it again: `pip install --force-reinstall torch`"
        ) from error
    return "cuda" if torch.cuda.is_available() else "cpu"


def try_product(machine: Machine) -> str | Tried:
    """Multiply with torch, and compare with a product made by hand; on a GPU, compare its speed to the card's."""
    device = _device()
    import torch

    if device == "cpu" and machine.gpus:
        raise HardwareError(
            f"a torch that sees the GPU which the driver shows; this is {torch.__version__}",
            hint="install a CUDA build of torch that fits the driver",
        )
    rows = [[float(4 * i + j) for j in range(4)] for i in range(4)]
    expected = [[sum(rows[i][k] * rows[k][j] for k in range(4)) for j in range(4)] for i in range(4)]
    with _kernels():
        matrix = torch.tensor(rows, device=device)
        if (matrix @ matrix).tolist() != expected:
            raise HardwareError(f"a {device} that multiplies rightly", hint="run a memory test")
        if device == "cpu":
            return f"multiplies rightly on cpu, {torch.get_num_threads()} threads"
        rates = [_rate_of_product(number, clock) for number, clock in enumerate(machine.clocks_mhz)]
        found = f"multiplies rightly on cuda, {'; '.join(told for told, _ in rates)}"
        return next(
            (Tried(name="torch product", found=found, needed=SLOW[0], mend=SLOW[1]) for _, slow in rates if slow), found
        )


@contextmanager
def _kernels() -> Generator[None]:
    """Say what it means when a GPU's kernel does not start.

    Raises:
        HardwareError: In its place.
    """
    try:
        yield
    except RuntimeError as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        lacking = "no kernel image" in told
        hint = "install a torch that is built for this card" if lacking else "look at `nvidia-smi` and `dmesg`"
        raise HardwareError(f"kernels that run on this GPU: {told}", hint=hint) from error


def expected_rate(capability: tuple[int, int], *, multiprocessors: int, clock_hz: float) -> float | None:
    """Give the operations per second that a card's data sheet would name for bfloat16; None for an unknown kind."""
    per_clock = BF16_PER_CLOCK.get(capability)
    return None if per_clock is None else per_clock * multiprocessors * clock_hz


# Advice, and no error: cards that are made for some countries are this slow by design.
SLOW = (
    f"at least {LEAST_OF_RATE:.0%} of what a card of this generation could reach",
    "look at `nvidia-smi -q -d PERFORMANCE,POWER`: heat, the power limit, or another program on it",
)


def judge_rate(measured: float, expected: float | None) -> tuple[str, bool]:
    """Say how a measured rate compares, and whether it is far below."""
    told = f"{measured / 1e12:,.0f} TFLOP/s in bfloat16"
    if expected is None:
        return told, False
    share = measured / expected
    return f"{told}, {share:.0%} of what this card could reach at its highest clock", share < LEAST_OF_RATE


def _rate_of_product(number: int, clock_mhz: int | None) -> tuple[str, bool]:
    import torch

    capability = torch.cuda.get_device_capability(number)
    if capability < (8, 0):
        return "without bfloat16", False
    with torch.cuda.device(number):
        left, right = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        reference = left[:8].float().cpu() @ right.float().cpu()
        _hold((left @ right)[:8].float().cpu(), reference, what="a product in bfloat16", most=0.02)
        measured = _rate(lambda: left @ right)
    properties: Any = torch.cuda.get_device_properties(number)
    expected = clock_mhz and expected_rate(
        capability, multiprocessors=properties.multi_processor_count, clock_hz=clock_mhz * 1e6
    )
    return judge_rate(measured, expected or None)


def _rate(product: Callable[[], object]) -> float:
    """Measure operations per second, when the card has come up to speed: the best of a few rounds."""
    import torch

    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < RAMP_UP_S:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(ROUNDS):
            product()
        after.record()
        torch.cuda.synchronize()
        best = min(best, before.elapsed_time(after) / 1000 / ROUNDS)
    return 2 * SIZE**3 / best


def _hold(found: Any, reference: Any, *, what: str, most: float) -> None:
    """Hold a result to its reference, by the norm of their difference.

    Raises:
        HardwareError: If it is further away than ``most`` of the reference's norm.
    """
    away = float((found - reference).norm() / reference.norm())
    if not away <= most:
        raise HardwareError(
            f"{what} within {most:.0%} of its reference; it is {away:.1%} away",
            hint="run the command again; if it stays so, look at `nvidia-smi -q -d ECC` and install the packages again",
        )


def try_fp8(machine: Machine) -> str:
    """Multiply 8-bit floats, where the card can."""
    _device()
    import torch

    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return "this card has none"
    with _kernels():
        left, right = (torch.randn(SIZE, SIZE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device="cuda")
        scaled: Any = vars(torch)["_scaled_mm"]

        def product() -> Any:
            return scaled(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        reference = left[:8].float().cpu() @ right.float().cpu().t()
        _hold(product()[:8].float().cpu(), reference, what="a product in 8-bit floats", most=0.02)
        return f"{_rate(product) / 1e12:,.0f} TFLOP/s"


def try_four_bit(machine: Machine) -> str:
    """Multiply by a weight that bitsandbytes holds in 4 bits, and by what its codes say by hand."""
    device = _device()
    import torch

    try:
        from bitsandbytes import functional, matmul_4bit  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise PackageError(
            f"a bitsandbytes that can be imported, for `--method qlora`: {told}",
            hint="install it again: `pip install --force-reinstall bitsandbytes`",
        ) from error
    dtype = torch.bfloat16 if device == "cpu" or torch.cuda.is_bf16_supported() else torch.float16
    with _kernels():
        weight = torch.randn(256, 512, device=device, dtype=dtype)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        rows = torch.randn(8, 512, device=device, dtype=dtype)
        product = matmul_4bit(rows, packed.t(), quant_state=state)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
        by_hand = (state.code[codes].view(-1, 64) * state.absmax[:, None]).view(256, 512)
        _hold(by_hand.cpu().float(), weight.cpu().float(), what="a weight in 4 bits", most=0.15)
        _hold(product.cpu().float(), rows.cpu().float() @ by_hand.cpu().float().t(), what="its product", most=0.02)
    return f"as by hand on {device}"


def try_attention(machine: Machine) -> str:
    """Attend within the documents of a packed row, and to each document by itself."""
    device = _device()
    import torch

    from backprop.engine.attention import Documents, attend_within_documents

    half = device == "cuda" and torch.cuda.is_bf16_supported()
    lengths, dtype = (5, 64, 1, 30), torch.bfloat16 if half else torch.float32
    with _kernels():
        query, key, value = (torch.randn(1, heads, sum(lengths), 64, dtype=dtype) for heads in (4, 2, 2))
        documents = Documents.of(lengths).to(device)
        q, k, v = (one.to(device) for one in (query, key, value))
        packed, _ = attend_within_documents(None, q, k, v, None, documents=documents)
        whole = (one.float().split(lengths, dim=2) for one in (query, key, value))
        alone = [
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            for q, k, v in zip(*whole, strict=True)
        ]
        reference = torch.cat(alone, dim=2).transpose(1, 2)
        _hold(packed.float().cpu(), reference, what="attention on packed rows", most=0.02)
    return f"each of {len(lengths)} documents attends to itself alone, on {device}"


KERNEL = """
import triton, triton.language as tl

@triton.jit
def twice(source, target, n: tl.constexpr):
    at = tl.program_id(0) * n + tl.arange(0, n)
    tl.store(target + at, 2 * tl.load(source + at))
"""


def try_triton(machine: Machine) -> str:
    """Compile a kernel of Triton afresh, and run it."""
    import torch

    with TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        (Path(folder) / "kernel.py").write_text(KERNEL, encoding="utf-8")
        try:
            spec: Any = importlib.util.spec_from_file_location("kernel", Path(folder) / "kernel.py")
            kernel: Any = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(kernel)
            started = time.perf_counter()
            source = torch.arange(1024, device="cuda", dtype=torch.float32)
            target = torch.empty_like(source)
            kernel.twice[(4,)](source, target, n=256)
            right = torch.equal(target, 2 * source)
        except Exception as error:
            raise _not_compiled("a kernel of Triton", error) from error
        if not right:
            raise HardwareError("a kernel of Triton that computes rightly", hint="install triton and torch again")
        return f"compiled in {time.perf_counter() - started:.1f} s"


def try_compile(machine: Machine) -> str:
    """Compile a function with torch afresh, and compare."""
    import torch

    with TemporaryDirectory() as folder:
        # In this process: others would have to import torch for the sake of one kernel.
        here = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder, **here}
        try:
            started = time.perf_counter()
            compiled: Any = torch.compile(_function)
            rows = torch.randn(64, 256, device="cuda")
            found, reference = compiled(rows), _function(rows)
        except Exception as error:
            raise _not_compiled("a function", error) from error
        _hold(found.cpu(), reference.cpu(), what="a compiled function", most=0.001)
        return f"compiled in {time.perf_counter() - started:.1f} s"


def _function(rows: Any) -> Any:
    import torch

    return torch.nn.functional.gelu(rows).softmax(dim=-1) * rows.mean()


def _not_compiled(what: str, error: Exception) -> ToolError:
    told = " ".join(str(error).split())[:300]
    return ToolError(
        f"{what} that can be compiled: {type(error).__name__}: {told}",
        hint="install a C compiler and Python's headers, and look whether /tmp can be written and programs run there",
    )


def try_several(machine: Machine) -> str:
    """Add numbers up over all GPUs, as gradients are: one process for each."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        store, count = str(Path(folder) / "store"), len(machine.gpus)
        device = _device()
        waiting: list[Callable[[], str]] = []
        for rank in range(1, count):
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": machine.gpus[rank] if device == "cuda" else ""}
            argv = [sys.executable, "-m", "backprop.engine.trials", "--rank", store, str(rank), str(count), device]
            waiting.append(stack.enter_context(process.running(argv, env=environment, timeout_s=30)))
        total = exchanged(store, 0, count, device)
        for wait in waiting:
            wait()
    if total != sum(range(1, count + 1)):
        raise HardwareError("GPUs that add up rightly", hint="look at `nvidia-smi topo -m`; try `NCCL_P2P_DISABLE=1`")
    return f"{count} of them add up rightly"


def exchanged(store: str, rank: int, count: int, device: str) -> float:
    """Add the numbers from 1 to ``count`` up over as many processes, one of each; rank 0 has the sum."""
    import torch

    from backprop.engine import ranks

    try:
        group: Any = ranks.join(store, rank, count, device)
        tensor: Any = torch.full((2**20,), rank + 1.0, device=device)
        group.reduce(tensor, 0).wait()
        return float(tensor.mean())
    except RuntimeError as error:
        raise HardwareError(
            f"GPUs that reach each other: {str(error).splitlines()[0]}",
            hint="look at `nvidia-smi topo -m` and the size of /dev/shm; try `NCCL_P2P_DISABLE=1`",
        ) from error


TRIALS: dict[str, Callable[[Machine], str | Tried]] = {
    "torch product": try_product,
    "fp8 product": try_fp8,
    "packed attention": try_attention,
    "4-bit product": try_four_bit,
    "triton kernel": try_triton,
    "compiled function": try_compile,
    "several gpus": try_several,
}

if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        exchanged(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main(sys.argv[1], Machine(**json.loads(sys.argv[2])), sys.argv[3:])
