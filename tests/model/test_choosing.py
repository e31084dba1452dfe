"""Ways of sending a step through the model are tried before training; the fastest is taken, kept, and gone on with."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import UNEVEN, Run, chat, went_on

from backprop import Trainer, events
from backprop.config import TrainConfig
from backprop.core import duration
from backprop.core.choice import Choice
from backprop.core.data.render import Example
from backprop.core.memory import ModelShape
from backprop.core.passes import Passes
from backprop.core.phases import Footprint, Phases
from backprop.core.plan import Plan, memory_of
from backprop.edges import cards, tried
from backprop.engine import choosing, footprint, objectives, ranks
from backprop.engine.batches import PassSize, num_tokens
from backprop.engine.layers import layers_of
from backprop.errors import TrainingError
from backprop.verbs import repeat
from backprop.verbs import train as train_verb

WAYS = (Passes(4, 0), Passes(2, 0), Passes(1, 2))
EXPECTED = Phases(load=50, step=400, evaluation=170, save=120, moments=20)
OPTIONS: dict[str, Any] = {"packing": False, "skip_proofs": True, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Passes]:
    """Let each plan name ways to try, as on a GPU, in an empty cache; a test may name others."""
    real, ways = duration.plan_and_seconds, list(WAYS)

    def with_ways(*arguments: Any, **options: Any) -> Any:
        plan, seconds = real(*arguments, **options)
        return replace(plan, to_try=tuple(ways), memory=EXPECTED), seconds

    monkeypatch.setattr(duration, "plan_and_seconds", with_ways)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ways


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[Passes], None]:
    """Let one way seem fast, whatever the clock says."""

    def quick(fast: Passes) -> None:
        real = choosing._seconds
        rank = ranks.Rank

        def seconds(all_ranks: Any, *arguments: Any, **options: Any) -> float | None:
            own: Any = all_ranks._rank
            assert isinstance(own, rank)
            found = real(all_ranks, *arguments, **options)
            examples = max(one["input_ids"].shape[0] for one in arguments[2])
            return found and (1e-9 if Passes(examples, *own._recomputed) == fast else 1.0)

        monkeypatch.setattr(choosing, "_seconds", seconds)

    return quick


def phases(run: Run, word: str) -> list[str]:
    return [event.name for event in run.said if isinstance(event, events.Phase) and word in event.name]


def used(monkeypatch: pytest.MonkeyPatch) -> list[Passes]:
    """Note how each pass of the trained steps goes through the model."""
    seen: list[Passes] = []
    real = ranks.Rank.compute

    def compute(self: Any, share: Any) -> Any:
        assert all(layer.training for layer in layers_of(self._model)), "else nothing is recomputed, nor dropped out"
        seen.extend(Passes(one["input_ids"].shape[0], *self._recomputed) for one in share.passes.values())
        return real(self, share)

    monkeypatch.setattr(ranks.Rank, "compute", compute)
    return seen


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fast", WAYS, ids=str)
def test_the_fastest_is_trained_with_and_changes_no_weight_before(
    train: Callable[..., Run], quick: Callable[[Passes], None], monkeypatch: pytest.MonkeyPatch, fast: Passes
) -> None:
    quick(fast)
    seen = used(monkeypatch)
    tried = train(UNEVEN, **OPTIONS)
    assert [name.split(" ")[1] for name in phases(tried, "trying")] == ["4", "2", "1"]
    steps = seen[2 * len(WAYS) :]
    assert {one.recomputed for one in steps} == {fast.recomputed}
    assert max(one.examples for one in steps) == fast.examples
    monkeypatch.undo()
    plain = train(UNEVEN, **OPTIONS)
    assert not phases(plain, "trying")
    assert tried.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_what_was_found_is_kept_for_the_same_circumstances(
    train: Callable[..., Run], quick: Callable[[Passes], None], tmp_path: Path
) -> None:
    quick(WAYS[2])
    assert phases(train(UNEVEN, **OPTIONS), "trying")
    again = train(UNEVEN, **OPTIONS)
    assert not phases(again, "trying")
    assert phases(again, "1 at once with 2 layers recomputed: was the fastest")
    assert phases(train(UNEVEN, **OPTIONS, lora_dropout=0.1), "trying"), "other circumstances"
    for file in (tmp_path / "cache" / "backprop" / "tried").iterdir():
        file.write_text(json.dumps({"found": {"examples": 64, "recomputed": 0}}))
    assert phases(train(UNEVEN, **OPTIONS), "trying"), "what does not fit is not taken"


@pytest.mark.usefixtures("one_thread")
def test_what_was_found_is_taken_while_it_fits_however_the_free_memory_wanders(
    train: Callable[..., Run],
    quick: Callable[[Passes], None],
    measured: list[Footprint],
    planned: list[Passes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenth of a GiB more or less changed the ways to try, and all was tried again."""

    def tries(room: float, **options: Any) -> int:
        monkeypatch.setattr(footprint, "room", lambda: room)
        return len(phases(train(UNEVEN, **OPTIONS, **options), "trying"))

    quick(WAYS[1])
    measured += [Footprint(90, 300)]  # and 20 for moments
    assert tries(1000) == 3
    planned[:] = [Passes(4, 1), Passes(2, 1)]
    assert [tries(990), tries(320), tries(1099)] == [0, 0, 0]
    assert tries(990, recompute=1) == 2, "an option may forbid it"
    assert tries(1101) == 2, "something else may fit by now"
    assert tries(319) == 3, "what is planned comes after those that do not fit"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("room", "tried"), [(444, True), (445, False)], ids=["tight", "roomy"])
def test_a_single_way_is_tried_where_it_takes_nearly_all_of_the_memory(
    train: Callable[..., Run],
    planned: list[Passes],
    measured: list[Footprint],
    monkeypatch: pytest.MonkeyPatch,
    room: float,
    tried: bool,
) -> None:
    """400 are expected. None was tried, and a full memory was found with the longest examples."""
    del planned[1:]
    measured += [Footprint(90, 300)]
    monkeypatch.setattr(footprint, "room", lambda: room)
    assert bool(phases(train(UNEVEN, **OPTIONS), "trying 4 at once")) == tried


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("offload", [None, False], ids=["could wait in main memory", "needs least"])
def test_where_not_even_the_least_fits_the_run_ends_before_its_first_step(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, offload: bool | None
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(ranks.Rank, "_compute", lambda _, share: seen.append(share.seed))
    run = train(UNEVEN, **OPTIONS, micro_batch=1, recompute=2, offload=offload)
    assert (run.failed.code, run.losses) == (5, [])
    assert run.failed.message.startswith("the GPU's memory is too small for one example of up to")
    assert (len(seen) > 2 * len(WAYS)) == (offload is None), "a step may still do with less"


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "null", "3", "[" * 100_000, "\0"], ids=repr)
def test_a_cache_that_holds_something_else_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    known: dict[str, Any] = {"gpu": "a test"}
    tried.remember(known, {"examples": 1, "recomputed": 0})
    assert tried.recall(known) == {"examples": 1, "recomputed": 0}
    (file,) = (tmp_path / "cache" / "backprop" / "tried").iterdir()
    file.write_text(text)
    assert tried.recall(known) is None
    file.write_bytes(b"\xff")
    assert tried.recall(known) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    tried.remember(known, {})
    assert tried.recall(known) is None


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_rated_answers_are_tried_with_those_of_other_prompts(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    rows = [{"prompt": f"question {n}", "completion": "word " * (3 * n + 1), "label": n % 2 == 0} for n in range(8)]
    shares: list[int] = []
    real = ranks.Rank.compute
    monkeypatch.setattr(
        ranks.Rank, "compute", lambda rank, share: (shares.append(len(share.passes)), real(rank, share))[1]
    )
    run = train(rows, **{**OPTIONS, "packing": packing}, objective="kto", steps=1)
    assert not run.all(events.Failed)
    assert phases(run, "the fastest here")
    assert shares[: 4 * len(WAYS)] == [1] * 4 * len(WAYS), "twice each, and without a gradient before"


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_more_is_tried_than_a_step_brings(num_ranks: int, packing: bool) -> None:
    examples = [Example(ids=(1,) * length, mask=(True,) * length) for length in (9, 40, 7, 8, 6, 5)]
    planned = cast(Plan, SimpleNamespace(batch_size=Choice(4, ""), gpus=Choice(num_ranks, "")))
    size = PassSize(examples=4, tokens=160, packing=packing)
    found = choosing._hardest(objectives.Supervised(), examples, size, planned)
    lengths = [sum(num_tokens(one) for one in found), len(found)]
    assert lengths == [40 + 9 + 8 + 7, num_ranks]


@pytest.mark.usefixtures("one_thread")
def test_what_does_not_fit_is_left_out_and_if_nothing_does_the_plan_stands(
    train: Callable[..., Run], quick: Callable[[Passes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(WAYS[0])
    real = ranks.Rank._compute
    full = {4, 2}

    def compute(self: Any, share: Any) -> Any:
        return None if {one["input_ids"].shape[0] for one in share.passes.values()} & full else real(self, share)

    monkeypatch.setattr(ranks.Rank, "_compute", compute)
    run = train(UNEVEN, **OPTIONS)
    assert phases(run, "the fastest here: 1 at once with 2 layers recomputed")
    assert phases(run, "no other fits")
    full.add(1)
    monkeypatch.setattr(choosing.tried, "recall", lambda _: None)
    before = run.losses
    calls = [0]

    def full_at_first(self: Any, share: Any) -> Any:
        calls[0] += 1
        return None if calls[0] <= most else real(self, share)

    most = 2 * (len(WAYS) + 1)  # and, after them, what is planned
    monkeypatch.setattr(ranks.Rank, "_compute", full_at_first)
    seen = used(monkeypatch)
    run = train(UNEVEN, **OPTIONS)
    assert not phases(run, "the fastest here")
    assert "the memory was full with the longest examples in all that was tried" in run.warned
    assert max(one.examples for one in seen[most:]) == 8
    assert {one.recomputed for one in seen[most:]} == {0}
    assert run.losses == pytest.approx(before, rel=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_with_what_was_chosen(
    train: Callable[..., Run], quick: Callable[[Passes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(WAYS[2])
    seen = used(monkeypatch)
    went_on(train, UNEVEN, step=2, **OPTIONS)
    assert seen[-1] == WAYS[2]


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_goes_on_says_of_what_it_began_with_that_it_did(
    train: Callable[..., Run], quick: Callable[[Passes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan said that an option had set the method, and how a step would go through, which was not how it went."""
    quick(WAYS[2])
    options = {**OPTIONS, "overwrite": False, "resume": "auto", "save_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(train_verb, "measures", lambda *_: (_ for _ in ()).throw(TrainingError("stopped at the end")))
        begun = train(UNEVEN, **options)
        again = train(UNEVEN, **options, recompute=1)
    assert begun.failed.message == again.failed.message == "stopped at the end"
    before, after = (run.all(events.PlanMade)[0] for run in (begun, again))
    assert before.reasons["method"] == "the exact one that trains least"
    assert before.choices["micro_batch"] == 8
    as_begun = {name for name, reason in after.reasons.items() if reason == "as this run began"}
    assert as_begun == {"method", "optimizer", "engine"}
    saved = "as in this run's last checkpoint"
    assert (after.choices["micro_batch"], after.reasons["micro_batch"]) == (1, saved)
    assert after.reasons["recompute"] == "set by `--recompute`, of 2 layers", "by this command"
    seen = used(monkeypatch)
    last = train(UNEVEN, **options)
    assert not seen, "every step is done already"
    (plan,) = last.all(events.PlanMade)
    assert (plan.choices["recompute"], plan.reasons["recompute"]) == (2, saved)
    assert (plan.choices["offload"], plan.reasons["offload"]) == (False, saved)


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_done_again_takes_what_was_chosen(
    train: Callable[..., Run], quick: Callable[[Passes], None]
) -> None:
    quick(WAYS[1])
    run = train(UNEVEN, **OPTIONS)
    again = repeat.settings_of(TrainConfig(from_run=run.folder, output=run.folder.parent / "again"))
    assert again.micro_batch == 2
    said: list[Any] = []
    Trainer(say=said.append, output=run.folder.parent / "again").train(from_run=run.folder)
    (plan,) = [event for event in said if isinstance(event, events.PlanMade)]
    assert plan.reasons["micro_batch"] == plan.reasons["steps"] == plan.reasons["method"] == f"as in `{run.folder}`"
    assert not [reason for reason in plan.reasons.values() if reason.startswith("set by")]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Footprint]:
    """Let each measurement find the next of these, as on a GPU; the last again and again."""
    found: list[Footprint] = []
    monkeypatch.setattr(footprint, "end", lambda _: found.pop(0) if len(found) > 1 else found[0])
    return found


def mended(run: Run) -> list[tuple[str, int, int, int]]:
    return [
        (event.how, event.phases["step"], event.phases["evaluation"], event.phases["save"])
        for event in run.all(events.MemoryMended)
    ]


@pytest.mark.usefixtures("one_thread")
def test_what_was_measured_mends_the_memory_that_is_expected_and_is_kept(
    train: Callable[..., Run], quick: Callable[[Passes], None], measured: list[Footprint]
) -> None:
    quick(WAYS[1])
    measured += [Footprint(90, 900), Footprint(90, 300), Footprint(90, 100), Footprint(95, 301)]
    run = train(UNEVEN, **OPTIONS)
    # Of the chosen way, with the optimizer's state; then of the first step.
    assert mended(run) == [("tried", 320, 160, 110), ("in the first step", 321, 165, 115)]
    manifest = json.loads((run.folder / "run.json").read_text())
    assert [one["phases"]["step"] for one in manifest["memory_mended"]] == [320, 321]
    assert manifest["memory"]["step"] == manifest["memory_mended"][0]["estimated"]["step"] == 400
    (plan,) = run.all(events.PlanMade)
    assert plan.memory == manifest["memory"]
    assert mended(train(UNEVEN, **OPTIONS))[0] == ("tried in an earlier run", 320, 160, 110)


@pytest.mark.usefixtures("one_thread")
def test_what_has_no_room_for_the_moments_of_the_first_update_is_not_taken(
    train: Callable[..., Run],
    quick: Callable[[Passes], None],
    measured: list[Footprint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick(WAYS[0])
    monkeypatch.setattr(footprint, "room", lambda: 320)
    measured += [Footprint(90, 301), Footprint(90, 300), Footprint(90, 100)]
    run = train(UNEVEN, **OPTIONS)
    (told,) = phases(run, "the fastest here")
    assert "4 at once" not in told
    assert mended(run)[0][1] <= 320


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_goes_on_has_its_moments_already(train: Callable[..., Run], measured: list[Footprint]) -> None:
    measured += [Footprint(110, 320)]
    whole = train(UNEVEN, **OPTIONS, save_steps=1, keep_checkpoints=9)
    assert mended(whole)[-1] == ("in the first step", 340, 180, 130)
    kept = (whole.folder / "checkpoints" / "step-000002").rename(whole.folder.parent / "kept")
    again = train(UNEVEN, **OPTIONS, resume=str(kept))
    assert mended(again) == [("in the first step", 320, 160, 110)]


@pytest.mark.usefixtures("one_thread")
def test_passes_after_the_first_are_tried_with_its_gradients(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, bool]] = []
    real = ranks.Rank._compute

    def compute(self: Any, share: Any) -> Any:
        having = any(weight.grad is not None for weight in self.trained)
        found.append((max(one["input_ids"].shape[0] for one in share.passes.values()), having))
        return real(self, share)

    monkeypatch.setattr(ranks.Rank, "_compute", compute)
    train(UNEVEN, **OPTIONS, batch_size=4)
    assert found[: 2 * len(WAYS)] == [(4, False), (4, False), (2, False), (2, True), (1, False), (1, True)]


SHAPE = ModelShape(hidden_size=64, intermediate_size=128, num_layers=2, max_positions=512, vocabulary=49152, tied=True)


@pytest.mark.usefixtures("one_thread")
def test_the_memory_that_is_told_is_of_the_way_that_was_chosen(
    train: Callable[..., Run],
    quick: Callable[[Passes], None],
    measured: list[Footprint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluation was that of the planned way, whose passes may be many times as large."""
    quick(WAYS[2])
    plans: list[Plan] = []
    real = duration.plan_and_seconds

    def of_a_shape(*arguments: Any, **options: Any) -> Any:
        plan, seconds = real(*arguments, **options)
        plans.append(replace(plan, shape=SHAPE))
        return plans[-1], seconds

    monkeypatch.setattr(duration, "plan_and_seconds", of_a_shape)
    measured += [Footprint(90, 900)]
    for first in ("tried", "tried in an earlier run"):
        found = train(UNEVEN, **OPTIONS).all(events.MemoryMended)
        assert [one.how for one in found] == [first, "in the first step"]
        for one in found:
            config = TrainConfig(data=("x",), method="lora", lora_r=4, optimizer="adamw")
            way = {"tokens": plans[-1].max_length.value, "recomputed": 2, "offloaded": False}
            expected, planned = (
                memory_of(config, plans[-1], **{**way, "tokens": size * way["tokens"]}) for size in (1, 8)
            )
            assert expected is not None
            assert expected.evaluation < (planned.evaluation if planned else 0)
            assert one.estimated == asdict(expected)
            assert one.phases["evaluation"] - one.phases["save"] == expected.evaluation - expected.save


@pytest.mark.usefixtures("one_thread")
def test_each_run_of_several_names_itself_with_its_memory(
    tiny_model: Path,
    tmp_path: Path,
    write: Callable[..., Path],
    quick: Callable[[Passes], None],
    measured: list[Footprint],
) -> None:
    """All said that they were the first."""
    quick(WAYS[1])
    measured += [Footprint(90, 300)]
    said: list[Any] = []
    trainer = Trainer(str(tiny_model), say=said.append, output=tmp_path / "run")
    data = [write([chat(f"{word} {n}", "It is here.") for n in range(8)], f"{word}.jsonl") for word in "ab"]
    trainer.multi_run(data, steps=2, batch_size=8, lora_r=4, **OPTIONS)
    told = [(event.run, event.how) for event in said if isinstance(event, events.MemoryMended)]
    assert told == [(1, "tried"), (1, "in the first step"), (2, "tried in an earlier run"), (2, "in the first step")]
    first, second = [event for event in said if isinstance(event, events.PlanMade)]
    assert first.reasons["method"] == "the exact one that trains least"
    assert second.reasons["method"] == second.reasons["optimizer"] == "as in the first run"


def test_nothing_is_tried_on_the_small_copy_of_a_rehearsal(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was the fastest for the copy was kept in the cache."""
    monkeypatch.setenv("BACKPROP_LLAMA_CPP", str(tmp_path / "nowhere"))
    tries: list[object] = []
    real = choosing.measured_fastest
    monkeypatch.setattr(choosing, "measured_fastest", lambda *given, **more: tries.append(1) or real(*given, **more))
    run = train(UNEVEN, **OPTIONS, rehearse=True, dry_run=True)
    assert "the rehearsal went through" in [proof.name for proof in run.all(events.Proved)]
    assert tries == []
    assert not (tmp_path / "cache" / "backprop" / "tried").exists()


def test_a_card_that_is_too_warm_is_waited_for_before_each_try(
    train: Callable[..., Run], quick: Callable[[Passes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(WAYS[0])
    said: list[str] = []

    def rest(save: Callable[[], object]) -> None:
        said.append("rest")
        save()  # there is nothing to save, which is no reason to fail

    real = ranks.Rank.compute
    monkeypatch.setattr(ranks.Rank, "compute", lambda rank, share: said.append("pass") or real(rank, share))
    monkeypatch.setattr(cards, "rest", rest)
    train(UNEVEN, **OPTIONS)
    tries = said[: said.index("rest", said.index("pass") + 1)], said[: 3 * len(WAYS)]
    assert tries == (["rest", "pass", "pass"], ["rest", "pass", "pass"] * len(WAYS))
