"""How fast a machine computes: from what can be asked of it, and what training was measured to reach of that."""

from backprop.core.hardware import Gpu, Hardware
from backprop.presets import GIB

# Every GPU from Ampere (compute capability 8.0) on multiplies in bfloat16.
BF16_CAPABILITY = (8, 0)
# Operations of a core and cycle in bfloat16, with sums in float32, by the data sheets: A100 and H100 (312 and 989 TFLOP/s),
# B200 (2,250); other cards, such as RTX A6000 and L40S (155 and 362), of which a GeForce does half (RTX 3060 to 5090: 26 to 210).
LARGE_CARDS = {(8, 0): 32, (9, 0): 32, (10, 0): 64, (10, 3): 64}
OTHER_CARDS, GEFORCE = 8, 4
# A product and a sum, where there is no bfloat16.
FLOAT32 = 2
# Of that, what a 7B reaches in long passes on an H200: 0.36 as its layers are, 0.48 compiled (docs/benchmarks.md).
REACHED = 0.4
# What is reached where the driver does not tell of cores, for each GiB of memory. Where it does: 1 TFLOP/s of a GeForce RTX 3060,
# 1.6 of an A100 and 3 of an RTX 6000 Ada or H200.
REACHED_PER_GIB = 1e12
# A core of a CPU: SmolLM2 135M in float32 on two, whose 138 to 301 tokens a second (docs/benchmarks.md) are 40 to 90 GFLOP/s
# for each; with `duration.LOW`, 45.
OF_A_CPU = 56.25e9


def rate_of(hardware: Hardware) -> float:
    """Give the operations per second that training is expected to reach on this machine, with one of its GPUs."""
    return rate_of_gpu(hardware.gpus[0]) if hardware.gpus else OF_A_CPU * hardware.num_cpus


def rate_of_gpu(gpu: Gpu) -> float:
    """Give the operations per second that training is expected to reach on a GPU in long passes."""
    in_bf16 = gpu.capability >= BF16_CAPABILITY
    if not (gpu.cores and gpu.clock_mhz):
        return REACHED_PER_GIB * gpu.memory_bytes / GIB / (1 if in_bf16 else OTHER_CARDS / FLOAT32)
    other = GEFORCE if "GeForce" in gpu.name else OTHER_CARDS
    each = LARGE_CARDS.get(gpu.capability, other) if in_bf16 else FLOAT32
    return REACHED * each * gpu.cores * gpu.clock_mhz * 1e6
