"""Facts about a machine, as plans and checks use them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    uuid: str
    memory_bytes: int
    memory_free_bytes: int
    capability: tuple[int, int]
    """Compute capability, such as (8, 6)."""
    cores: int = 0
    """Units that add and multiply in float32; 0 where the driver does not tell."""
    clock_mhz: int = 0
    """At most; 0 where the driver does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What there is to train with. No GPU: the CPU trains."""

    gpus: tuple[Gpu, ...]
    """In a plan's: the one that trains, then those like it that can share its work."""
    driver: str
    """Version of the NVIDIA driver; empty if there is none."""
    num_cpus: int
    memory_bytes: int
    """Main memory that this process may use: the machine's, or its container's limit."""
    platform: str

    @property
    def memory_for_each_gpu(self) -> int:
        """Main memory that the process of each GPU may count on; 0 without a GPU."""
        return self.memory_bytes // len(self.gpus) if self.gpus else 0
