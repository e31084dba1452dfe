"""Two models compared by what they say."""

import pytest

from backprop.core.data.formats import Message
from backprop.core.fidelity import (
    MOST_KL,
    MOST_P99,
    Reply,
    have_parted,
    likeness,
    prove_equal,
    prove_likeness,
    prove_replies,
)
from backprop.core.probes import prompts_of


def replies(*texts: str) -> list[Reply]:
    return [Reply(text=text.removesuffix("…"), stopped=not text.endswith("…")) for text in texts]


@pytest.mark.parametrize(
    ("kind", "expected", "found", "ok"),
    [
        ("f16", ["It is here."], ["It is here."], True),
        ("f16", ["It is here."], ["It is here. It is here. It…"], False),
        ("q4_k_m", ["It is here."], ["It is here. It is here. It…"], False),
        ("q4_k_m", ["It is here."], ["It is over there, I think, and then…"], True),
        ("f16", ["It is here.", "So it is.", "No."], ["It is here.", "So it is.", "Never before."], True),
        ("f16", ["It is here.", "So it is.", "No."], ["It is here.", "Well, yes.", "Never before."], False),
        ("q4_k_m", ["It is here.", "So it is.", "No."], ["Who?", "Well, yes.", "Never before."], True),
        ("f16", [], [], True),
    ],
)
def test_answers_start_alike_and_none_goes_on(kind: str, expected: list[str], found: list[str], ok: bool) -> None:
    proof = prove_replies(kind, [f"{n}?" for n in range(len(expected))], replies(*expected), replies(*found))
    assert proof.ok == ok, proof.found
    assert bool(expected) != proof.found.startswith("not asked")


@pytest.mark.parametrize(
    ("begun", "parted"),
    [
        ("", False),
        ("It is her", False),
        ("It is here. It is", False),
        ("It was", False),  # too short to say that it starts alike
        ("It is here in town", True),
        ("Somewhere else", True),
    ],
)
def test_an_answer_has_parted_once_nothing_can_bring_it_back(begun: str, parted: bool) -> None:
    (expected,) = replies("It is here.")
    assert have_parted(expected, begun) == parted
    if parted:  # however it goes on, the proof says the same
        ends = [prove_replies("f16", ["?"], [expected], replies(begun + rest)).found for rest in ("", "…", " or not")]
        assert len({tuple(found.split(";")[:2]) for found in ends}) == 1


def test_the_first_difference_is_shown() -> None:
    assert prove_equal("x", ["a", "b"], ["same", "one"], ["same", "one"]).found == "2 of 2 are equal"
    proof = prove_equal("x", ["a", "b"], ["same", "<user> hello"], ["same", "<user>hello"])
    assert not proof.ok
    assert "'b'" in proof.found


def test_the_divergence_is_that_of_the_distributions_whatever_is_added_to_their_logits() -> None:
    import numpy

    expected, found = ([numpy.log([[0.5, 0.5], share], dtype="f4") + 7] for share in ([0.25, 0.75], [0.5, 0.5]))
    told = likeness(expected, [found[0] - 1000])
    assert told.mean_kl == pytest.approx((0.25 * numpy.log(0.5) + 0.75 * numpy.log(1.5)) / 2, rel=1e-4)
    assert told.positions == 2


def test_a_model_that_rounding_moves_far_may_be_moved_further() -> None:
    """Training far beyond need makes distributions so sharp that 16 bits change them: no copy can be held to more."""
    import numpy

    trained = [numpy.array([[0.0, 9.0], [9.0, 0.0]] * 8, numpy.float32)]
    near, found, far = (trained[0] * numpy.float32(share) for share in (0.8, 0.7, 0.6))  # 4e-4, 1.4e-3, 3e-3 nats away
    allowed = [
        prove_likeness("f16", "it", trained, [one], noise=noise).ok
        for one in (found, far)
        for noise in (None, likeness(trained, [near]), likeness(trained, [found]))
    ]
    assert allowed == [False, True, True, False, False, False]
    proof = prove_likeness("f16", "it", trained, [near], noise=likeness(trained, trained))
    assert not proof.ok, "1e-4 is asked for where rounding does nothing"
    assert proof.found.endswith("at most 0.0001 and 0.002, and at least 99%, allowed (rounding alone: 0, 100.0%)")


def test_a_few_wrong_positions_are_not_hidden_by_the_mean() -> None:
    import numpy

    trained = [numpy.array([[0.0, 2.0]] * 200, numpy.float32)]
    found = [trained[0].copy()]
    found[0][:3] *= 0.85  # 5e-3 nats away each, 7e-5 in the mean
    proof = prove_likeness("f16", "it", trained, found)
    assert likeness(trained, found).mean_kl < 1e-4
    assert not proof.ok, proof.found


def test_what_16_bits_make_of_ties_is_allowed() -> None:
    import numpy

    trained = [numpy.array([[0.0, 1.0]] * 90 + [[0.0, 0.06]] * 10, numpy.float32)]
    tied = [numpy.array([[0.0, 1.0]] * 90 + [[0.06, 0.059]] * 10, numpy.float32)]
    assert not prove_likeness("f16", "it", trained, tied).ok
    assert prove_likeness("f16", "it", trained, tied, noise=likeness(trained, tied)).ok


def test_noise_never_lets_everything_pass() -> None:
    import numpy

    trained = [numpy.array([[0.0, 9.0]] * 4, numpy.float32)]
    for noise in (trained[0] * numpy.float32(-1), trained[0] * numpy.float32("nan")):
        proof = prove_likeness(
            "f16", "it", trained, [trained[0] * numpy.float32(0.6)], noise=likeness(trained, [noise])
        )
        assert not proof.ok
        assert "at least 90%, allowed" in proof.found or "at least 95%, allowed" in proof.found


def test_figures_near_a_bound_are_told_apart() -> None:
    import numpy

    trained = [numpy.array([[0.0, 9.0]], numpy.float32)]
    proof = prove_likeness("f16", "it", trained, [trained[0] * numpy.float32(0.727)])
    assert "KL 0.00101 in the mean" in proof.found, proof.found


def test_each_question_is_a_prompt_and_then_the_whole_without_and_with_a_system_turn() -> None:
    roles = ("user", "assistant", "user", "assistant")
    chat: list[Message] = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    found = [("".join(turn["role"][0] for turn in turns), follows) for turns, follows in prompts_of(chat)]
    assert found == [("u", True), ("uau", True), ("uaua", False), ("su", True), ("suau", True), ("suaua", False)]


# Mean and 99th percentile of good files of Gemma 3 270M, which had learnt its rows by heart (docs/export.md).
GOOD = {
    "f16": (1.82e-5, 2.8e-4),
    "bf16": (3.1e-4, 3e-3),
    "q8_0": (0.0209, 0.17),
    "q6_k": (0.0586, 0.3),
    "q5_0": (0.948, 18),
    "q4_k_m": (1.29, 20),
    "q4_0": (2.83, 60),
    "iq4_nl": (2.04, 38),
    "iq4_xs": (2.08, 37),
    "q3_k_l": (2.75, 76),
    "q3_k_s": (3.07, 31),
    "q2_k": (2.86, 22),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_files_of_a_real_model_are_within_the_bounds(kind: str) -> None:
    """Four of these were refused by bounds that were taken from one model alone."""
    mean, late = GOOD[kind]
    assert mean < MOST_KL[kind]
    assert late < MOST_P99 * MOST_KL[kind]
