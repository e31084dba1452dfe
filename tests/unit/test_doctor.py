"""What doctor leaves alone."""

from backprop.core.hardware import Gpu, Hardware
from backprop.verbs.doctor import check_product

GIB = 2**30


def test_a_card_that_a_run_has_filled_is_left_to_it() -> None:
    card = Gpu(name="a card", uuid="GPU-1", memory_bytes=8 * GIB, memory_free_bytes=GIB // 2, capability=(8, 6))
    machine = Hardware(platform="linux", num_cpus=1, memory_bytes=8 * GIB, driver="580", gpus=(card,))
    assert check_product(machine).startswith("not tried: only 0.5 GiB")
