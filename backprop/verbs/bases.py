"""What an adapter that was trained on weights of 4 bits is merged into: the base as it was then, or the 16-bit original."""

from pathlib import Path
from typing import TYPE_CHECKING

from backprop.config import ExportConfig
from backprop.core import fidelity
from backprop.edges import device
from backprop.events import Phase, Sink, Warned
from backprop.verbs.source import Adapter
from backprop.verbs.verify import room_for

if TYPE_CHECKING:
    from backprop.engine.four_bit import Rounding


def nearest_base(adapter: Adapter, config: ExportConfig, say: Sink) -> "Rounding | None":
    """Compare both bases, each with the adapter, to the model as it was trained, on the probes; tell the figures.

    Returns:
        How to round the base's weights; None if they are to stay as they are, as of any other training.
    """
    from backprop.engine import four_bit, loop

    if adapter.four_bit_dtype is None:
        return None
    into = "the adapter was trained on weights of 4 bits, and is merged into the 16-bit original"
    if not config.verify:
        say(Warned(message=f"{into}: which base is nearer is not measured with `--no-verify`"))
        return None
    if not four_bit.available():
        say(Warned(message=f"{into}: bitsandbytes, which could say which base is nearer, is not installed"))
        return None
    say(Phase(name="asking the model as it was trained, in 4 bits, which base is nearer"))
    trust = config.trust_remote_code
    trained = four_bit.ask_as_trained(
        adapter.base,
        adapter.folder,
        adapter.probes,
        dtype=adapter.four_bit_dtype,
        device="cuda" if device.probe().gpus else "cpu",
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
