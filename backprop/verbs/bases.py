"""What an adapter that was trained on weights of 4 bits is merged into: the base as it was then, or the 16-bit original."""

from pathlib import Path
from typing import TYPE_CHECKING

from backprop.config import ExportConfig
from backprop.core import fidelity
from backprop.core.placement import BYTES_FOR_WORK
from backprop.edges import device
from backprop.events import Phase, Sink, Warned
from backprop.verbs.source import Adapter
from backprop.verbs.verify import room_for

if TYPE_CHECKING:
    from backprop.engine.four_bit import Rounding


def measurable(config: ExportConfig) -> bool:
    """Say whether it can be measured which base is nearer."""
    from backprop.engine import four_bit

    return config.verify and not four_bit.why_not()


def name_of(rounding: "Rounding | None", adapter: Adapter, config: ExportConfig) -> str | None:
    """Name the base that an adapter was merged into for having been measured as the nearer one; None if it was not."""
    if adapter.four_bit_dtype is None or not measurable(config):
        return None
    return "rounded" if rounding else "original"


def nearest_base(adapter: Adapter, config: ExportConfig, say: Sink) -> "Rounding | None":
    """Compare both bases, each with the adapter, to the model as it was trained, on the probes; tell the figures.

    Returns:
        How to round the base's weights; None if they are to stay as they are, as of any other training.
    """
    from backprop.engine import four_bit, loop

    if adapter.four_bit_by_card:
        told = "the adapter was trained on weights of 4 bits, in a run that is not known, and is merged into the 16-bit original"
        say(Warned(message=f"{told}: which base is nearer is not measured; to have that, give the run it came from"))
    if adapter.four_bit_dtype is None:
        return None
    into = "the adapter was trained on weights of 4 bits, and is merged into the 16-bit original"
    if not config.verify:
        say(Warned(message=f"{into}: which base is nearer is not measured with `--no-verify`"))
        return None
    unusable = four_bit.why_not()
    if unusable:
        say(Warned(message=f"{into}: bitsandbytes, which could say which base is nearer, {unusable}"))
        return None
    say(Phase(name="asking the model as it was trained, in 4 bits, which base is nearer"))
    trust = config.trust_remote_code
    trained = four_bit.ask_as_trained(
        adapter.base,
        adapter.folder,
        adapter.probes,
        dtype=adapter.four_bit_dtype,
        device=_place_in_four_bits(Path(adapter.base)),
        trust_remote_code=trust,
    )
    loop.release()
    where = room_for(Path(adapter.base))
    both = four_bit.ask_both_bases(
        adapter.base, adapter.folder, trained, dtype=where.dtype, device=where.device, trust_remote_code=trust
    )
    loop.release()
    rounded, original = (fidelity.likeness(trained.logits, one).mean_kl for one in both)
    nearer = "the base as it was trained on" if rounded <= original else "the 16-bit original"
    say(
        Phase(
            name=f"the adapter goes into {nearer}: with the base as it was trained on, in 4 bits, the model is "
            f"KL {rounded:.2g} from the trained one, with the 16-bit original {original:.2g}"
        )
    )
    return trained.rounding if rounded <= original else None


# Half a byte for each weight, its scales, and 32 bits for those of words and norms, which are a fifth of a model of 1B.
FOUR_BIT_BYTES = 1.3


def _place_in_four_bits(base: Path) -> str:
    from backprop.engine.streamed import size_of

    free = max((gpu.memory_free_bytes for gpu in device.probe().gpus), default=0)
    return "cuda" if size_of(base)[0] * FOUR_BIT_BYTES + BYTES_FOR_WORK <= free else "cpu"
