"""The learning rate over a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprop.core.schedule import rate_share

kinds = st.sampled_from(["cosine", "linear", "constant"])


@given(num_steps=st.integers(1, 500), warmup=st.floats(0, 0.5), kind=kinds)
def test_every_step_moves_and_the_peak_is_reached(num_steps: int, warmup: float, kind: str) -> None:
    """A run of one step once trained with a rate of zero, and said that it was done."""
    num_warmup = int(warmup * num_steps)
    shares = [rate_share(s, num_steps=num_steps, num_warmup=num_warmup, kind=kind) for s in range(num_steps)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) == 1
    assert shares[:num_warmup] == sorted(shares[:num_warmup])
    assert shares[num_warmup:] == sorted(shares[num_warmup:], reverse=True)


@pytest.mark.parametrize(("kind", "halfway"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1)])
def test_halfway_down(kind: str, halfway: float) -> None:
    assert rate_share(50, num_steps=100, num_warmup=0, kind=kind) == pytest.approx(halfway, abs=1e-12)
