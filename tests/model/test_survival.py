"""A run that is stopped anywhere and started again ends as if nothing had happened."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import UNEVEN, Done, Run, backprop, chat, plant_in_training

from backprop import Trainer, events
from backprop.core import schedule
from backprop.core.data.order import SampleOrder
from backprop.core.plan import Choice
from backprop.engine import batches, cross_entropy, exam, loop, objectives, trainer, validation
from backprop.errors import Interrupted
from backprop.verbs import prepare
from backprop.verbs import train as train_verb

pytestmark = pytest.mark.model

EVAL = [chat(f"question {n}", "word " * (n + 2)) for n in range(3)]
OPTIONS: dict[str, Any] = {
    "steps": 8,
    "batch_size": 3,
    "overwrite": False,
    "resume": "auto",
    "save_steps": 3,
    "lora_dropout": 0.2,
}
OPTIONS["skip_proofs"] = True  # they take most of the time of so short a run


def facts(run: Run) -> dict[str, Any]:
    """What must be the same: the adapter, each step's loss, how often each row was seen."""
    manifest = json.loads((run.folder / "run.json").read_text())
    log = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    proofs = {proof["name"]: (proof["ok"], proof["found"]) for proof in manifest["proofs"]}
    return {
        "status": manifest["status"],
        "adapter": manifest["result"]["adapter_sha256"],
        "steps": manifest["result"]["steps"],
        "eval": manifest["result"]["eval_loss"],
        "losses": {event["step"]: event["loss"] for event in log if event["event"] == "step"},
        "seen": proofs["every example is seen as often as planned"],
        "proofs": sorted(proofs),
        "files": sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*")),
    }


def facts_and_remove(run: Run) -> dict[str, Any]:
    found = facts(run)
    shutil.rmtree(run.folder)
    return found


def interrupt_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Plant one Ctrl-C."""
    left = [1]

    def once(*_: Any, **__: Any) -> None:
        if left:
            left.clear()
            raise KeyboardInterrupt

    def before(owner: Any, name: str, *, skip: int = 0) -> None:
        real = getattr(owner, name)
        calls = [0]

        def planted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > skip:
                once()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, planted)

    def in_pass(number: int) -> None:
        calls = [0]

        def planted(model: Any, one: Any) -> Any:
            calls[0] += 1
            if calls[0] >= number:
                once()
            return cross_entropy.sum_of_losses(model, one)

        plant_in_training(monkeypatch, planted)

    match where:
        case "the first step":
            in_pass(1)
        case "the third step":
            in_pass(3)
        case "the fifth step":
            in_pass(5)
        case "an evaluation":
            before(validation.Validation, "evaluate", skip=1)
        case "the examination":
            before(exam.Exam, "judge")
        case "saving the adapter":
            before(train_verb, "measures")
        case "loading":
            before(loop, "pass_size")
        case _:
            raise AssertionError(where)


PLACES = ("loading", "the first step", "the fifth step", "an evaluation", "the examination", "saving the adapter")
MOST_TELLING = "the examination"  # all that is trained is in the checkpoint, and nothing of the end


@pytest.mark.parametrize(
    "where", [place if place == MOST_TELLING else pytest.param(place, marks=pytest.mark.slow) for place in PLACES]
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"early_stopping": 3, "skip_proofs": False}, id="packed"),
        pytest.param({"packing": False, "lora_plus": 4.0}, id="padded", marks=pytest.mark.slow),
        pytest.param(
            {"early_stopping": 50, "learning_rate": 0.05, "scheduler": "constant"}, id="best", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_end(
    train: Callable[..., Run],
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    options: dict[str, Any],
) -> None:
    given = {**OPTIONS, **options, "eval_data": (str(write(EVAL, "eval.jsonl")),), "eval_steps": 2}
    undisturbed = facts_and_remove(train(**given))
    with monkeypatch.context() as patch:
        interrupt_at(patch, where)
        stopped = train(**given)
        assert stopped.failed.code == 130
    resumed = train(**given)
    assert not resumed.all(events.Failed)
    told = [event.step for event in resumed.all(events.Resumed)]
    assert told == {"loading": [], "the first step": [], "the fifth step": [4], "an evaluation": [4]}.get(where, [8])
    assert facts(resumed) == undisturbed


def test_a_finished_run_is_done_and_stays_untouched(train: Callable[..., Run]) -> None:
    first = train(**OPTIONS)
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    again = train(**OPTIONS)
    assert not again.all(events.Step)
    assert again.all(events.RunFinished)[0].result == first.all(events.RunFinished)[0].result
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_finished_run_whose_adapter_changed_since_is_no_success(train: Callable[..., Run]) -> None:
    path = train(**OPTIONS).folder / "lora" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "is not what it wrote" in train(**OPTIONS).failed.message


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_taken(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = facts_and_remove(train(**OPTIONS))
    with monkeypatch.context() as patch:
        interrupt_at(patch, "the examination")
        stopped = train(**OPTIONS)
    newest = stopped.folder / "checkpoints" / "step-000008" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    resumed = train(**OPTIONS)
    assert "step-000008` is damaged: `optimizer.safetensors` is not what was written: the one before is taken" in (
        resumed.warned
    )
    assert [event.step for event in resumed.all(events.Resumed)] == [6]
    assert facts(resumed) == undisturbed


@pytest.mark.slow
def test_never_begins_anew_and_a_folder_begins_from_it(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "the examination")
        stopped = train(**OPTIONS)
    shutil.copytree(stopped.folder / "checkpoints" / "step-000006", tmp_path / "kept")
    anew = train(**{**OPTIONS, "resume": "never"})
    assert not anew.all(events.Resumed)
    shutil.rmtree(anew.folder)
    kept = {"resume": str(tmp_path / "kept")}
    from_folder = train(**{**OPTIONS, **kept})
    assert [event.step for event in from_folder.all(events.Resumed)] == [6]
    assert from_folder.losses == anew.losses[6:]
    for change, said in (
        ({"learning_rate": 1e-3}, "learning_rate: 0.01 before, 0.001 now"),
        ({"lora_r": 2}, "lora_r: 4 before, 2 now"),
        ({"seed": 1}, "seed: 42 before, 1 now"),
        ({"rows": UNEVEN[1:]}, "the rows of the data"),
        ({"resume": "atuo"}, "`atuo` is no checkpoint"),
    ):
        other = train(**{**OPTIONS, **kept, "overwrite": True, **change})
        assert said in other.failed.message


@pytest.mark.slow
def test_changed_data_are_refused_with_what_differs(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "the fifth step")
        train(**OPTIONS)
    assert "the rows of the data" in train(rows=UNEVEN[:-1], **OPTIONS).failed.message
    assert not train(**OPTIONS).all(events.Failed)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param({"order": lambda order, step: (0, 1, 2)}, "examples", id="order"),
        pytest.param({"rate": lambda step, **_: 0.25}, "rate share", id="rate", marks=pytest.mark.slow),
        pytest.param({"draws": lambda self, step: step}, "random seed", id="draws", marks=pytest.mark.slow),
    ],
)
def test_a_version_that_would_go_on_in_another_way_is_refused(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, spoil: dict[str, Any], said: str
) -> None:
    """A resumed run would end green all the same, with rows seen twice and rows never seen."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, "the fifth step")
        train(**OPTIONS)
    places = {"order": (SampleOrder, "of_step"), "rate": (schedule, "rate_share")}
    places["draws"] = (schedule.Schedule, "random_seed")
    with monkeypatch.context() as patch:
        for name, changed in spoil.items():
            patch.setattr(*places[name], changed)
        failed = train(**OPTIONS).failed
    assert failed.code == 2
    assert f"was to go on with other {said} than this version would choose" in failed.message
    assert not train(**OPTIONS).all(events.Failed)


def test_a_checkpoint_holds_all_that_the_next_step_depends_on(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "the examination")
        stopped = train(**OPTIONS)
    ended, middle = sorted((stopped.folder / "checkpoints").iterdir(), reverse=True)
    assert {path.name for path in middle.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"),
        *("progress.safetensors", "state.json", "manifest.json"),
    }
    state = json.loads((middle / "state.json").read_text())
    assert state["step"] == 6
    assert len(state["next"]["examples"]) == OPTIONS["batch_size"]
    assert 0 < state["next"]["rate_share"] < 1
    assert state["next"]["random_seed"] != 0
    assert json.loads((ended / "state.json").read_text())["next"] == {}


@pytest.mark.parametrize("verb", ["train", "multi_run"])
def test_a_run_goes_on_with_the_method_that_was_chosen_when_it_began(
    tiny_model: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    data = [write(UNEVEN)] if verb == "train" else [write(UNEVEN, f"{name}.jsonl") for name in "ab"]

    def method() -> str:
        trainer = Trainer(str(tiny_model), say=lambda _: None, output=tmp_path / "run", skip_proofs=True, lora_r=4)
        getattr(trainer, verb)(data, steps=6, batch_size=4, save_steps=1)
        return json.loads((tmp_path / "run" / "run.json").read_text())["config"]["method"]

    with monkeypatch.context() as patch:
        # What another amount of free memory would do to a GPU, with a method that a CPU has.
        patch.setattr(prepare, "choose_method", lambda *_, **__: Choice("dora", "a test"))
        interrupt_at(patch, "the fifth step")
        with pytest.raises(Interrupted):
            method()
    assert method() == "dora"
    adapters = list((tmp_path / "run").rglob("lora/adapter_config.json"))
    assert adapters
    assert all(json.loads(path.read_text())["use_dora"] for path in adapters)


@pytest.mark.slow
def test_a_smaller_micro_batch_may_go_on(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "the fifth step")
        train(**OPTIONS)
    sizes: list[Any] = []
    real = batches.passes
    monkeypatch.setattr(objectives, "passes", lambda examples, size: sizes.append(size) or real(examples, size))
    assert train(**OPTIONS, micro_batch=1).all(events.Resumed)
    assert {size.examples for size in sizes} == {1}


@pytest.mark.slow
def test_layers_that_are_recomputed_from_a_stop_on_are_so_after_the_next(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from backprop.engine.ranks import Rank

    seen: list[int] = []
    real = Rank.compute
    monkeypatch.setattr(Rank, "compute", lambda rank, share: seen.append(rank._recomputed[0]) or real(rank, share))
    for options in ({}, {"recompute": 2}):
        with monkeypatch.context() as patch:
            interrupt_at(patch, "the third step")
            train(**OPTIONS, **options)
    assert set(seen) == {0, 2}
    seen.clear()
    assert train(**OPTIONS).all(events.Resumed)
    assert set(seen) == {2}


def test_a_run_that_goes_on_keeps_where_the_inputs_of_layers_wait_unless_it_is_told_otherwise(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; a CPU leaves them where they are."""
    from backprop.engine.ranks import Ranks

    monkeypatch.setattr("backprop.core.plan.refuse_without_gpu", lambda *_: None)
    seen: list[tuple[int, bool]] = []
    real = Ranks.recompute

    def noted(ranks: Any, *how: Any) -> bool:
        seen.append(how)
        return real(ranks, *how)

    monkeypatch.setattr(Ranks, "recompute", noted)
    kept = "as in this run's last checkpoint"
    for options, expected, reason in (
        ({"offload": True, "recompute": 1}, (1, True), "set by `--offload`"),
        ({}, (1, True), kept),
        ({"offload": False}, (1, False), "set by `--no-offload`"),
        ({}, (1, False), kept),
        ({"offload": True, "recompute": 2}, (2, True), "set by `--offload`"),
    ):
        seen.clear()
        with monkeypatch.context() as patch:
            interrupt_at(patch, "the third step")
            (plan,) = train(**{**OPTIONS, "steps": 40, "save_steps": 1}, **options).all(events.PlanMade)
        assert seen == [expected]
        assert (plan.choices["recompute"], plan.choices["offload"]) == expected
        assert plan.reasons["offload"] == reason


@pytest.mark.parametrize("command", ["train", "multi-run"])
def test_main_memory_as_a_place_to_wait_is_refused_without_a_gpu(
    tiny_model: Path, write: Callable[..., Path], tmp_path: Path, command: str
) -> None:
    done = backprop(command, "--data", write(UNEVEN), "--model", tiny_model, "--offload", cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.endswith("error: `--offload` needs an NVIDIA GPU, and none was found\n\nhint: leave it out\n")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_memory_is_one_event_and_changes_no_loss(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    import torch

    options = {**OPTIONS, "packing": packing, "lora_dropout": 0.0, "batch_size": 8, "overwrite": True}
    undisturbed = train(**options)
    real, calls = cross_entropy.sum_of_losses, [0]

    def small_card(model: Any, one: Any) -> Any:
        calls[0] += 1
        if calls[0] > 2 and one["input_ids"].numel() > 100 and model.training:
            raise torch.OutOfMemoryError
        return real(model, one)

    plant_in_training(monkeypatch, small_card)
    run = train(**options)
    assert not run.all(events.Failed)
    told = [event.message for event in run.all(events.Warned) if "the memory was full in step" in event.message]
    assert ["computed again" in message for message in told] == [True, False]  # first what changes no pass
    assert run.losses == pytest.approx(undisturbed.losses, abs=1e-5)


def test_a_full_memory_recomputes_then_shrinks_then_offloads_and_then_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial
    from types import SimpleNamespace
    from typing import cast

    from backprop.core.plan import Plan
    from backprop.engine import trainer
    from backprop.engine.batches import PassSize

    monkeypatch.setattr(trainer, "layers_of", lambda layers: layers)
    width = 8 * 4  # of a token, in float32

    def ways(
        size: PassSize,
        recompute: int,
        offload: bool,
        model: Sequence[None] = (None,) * 4,
        *,
        may: bool = True,
        room: int = 4 * 40 * width,
    ) -> list[tuple[int, int, bool]]:
        steps: Any = trainer.StepPasses.__new__(trainer.StepPasses)
        steps.size, steps._longest, steps._planned, steps._may_offload = size, 10, (recompute, offload), may
        steps._plan = SimpleNamespace(shape=SimpleNamespace(hidden_size=8), may_wait_bytes=room)
        steps._plan.may_wait = partial(Plan.may_wait, steps._plan)
        calls: list[tuple[int, bool]] = []
        ranks = cast(Any, SimpleNamespace(recompute=lambda *given: not calls.append((*given, False)[:2])))
        found: list[tuple[int, int, bool]] = []
        while steps.recompute_all(ranks, model) or steps.shrink() or steps.offload(ranks, model):
            found.append((steps.size.examples, *steps.recomputed))
            assert calls[-1:] in ([], [steps.recomputed])
        return found

    padded = PassSize(examples=4, tokens=40, packing=False)
    assert ways(padded, 1, False) == [(4, 4, False), (2, 4, False), (1, 4, False), (1, 4, True)]
    assert ways(padded, 4, False) == [(2, 4, False), (1, 4, False), (1, 4, True)]
    assert ways(padded, 4, True) == [(2, 4, True), (1, 4, True)]
    assert ways(padded, 1, True) == [(4, 4, True), (2, 4, True), (1, 4, True)], "what was asked for stays"
    one_token_less = 4 * 10 * width - 1
    assert ways(padded, 4, False, room=one_token_less + 1) == [(2, 4, False), (1, 4, False), (1, 4, True)]
    assert ways(padded, 4, False, room=one_token_less) == [(2, 4, False), (1, 4, False)], "main memory is too small"
    assert ways(padded, 1, True, room=one_token_less) == [(2, 1, True), (1, 1, True)], (
        "no more layers than it has room for"
    )
    assert ways(padded, 1, False, may=False) == [(4, 4, False), (2, 4, False), (1, 4, False)]
    packed = PassSize(examples=1, tokens=10, packing=True, recomputed=2)
    assert ways(packed, 0, False) == [(1, 4, False), (1, 4, True)]
    assert ways(packed, 0, False, ()) == [], "no layer can be told apart"


@pytest.mark.slow
def test_a_memory_that_is_full_in_the_backward_pass_is_no_other(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    options = {**OPTIONS, "packing": False, "lora_dropout": 0.0, "batch_size": 8, "micro_batch": 4, "overwrite": True}
    options["resume"] = "never"
    undisturbed = train(**options)
    real, calls = cross_entropy.sum_of_losses, [0]

    def full(gradient: Any) -> None:
        raise torch.OutOfMemoryError

    def small_card(model: Any, one: Any) -> Any:
        loss = real(model, one)
        calls[0] += int(model.training)
        if calls[0] == 2 and model.training:  # the first half of the step has left its gradients
            loss.register_hook(full)
        return loss

    plant_in_training(monkeypatch, small_card)
    run = train(**options)
    assert not run.all(events.Failed)
    assert len([1 for event in run.all(events.Warned) if "the memory was full in step 1" in event.message]) == 1
    assert run.losses == pytest.approx(undisturbed.losses, abs=1e-5)


def test_a_memory_too_small_for_one_example_is_exit_5(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from backprop.engine import trainer

    def no_card(model: Any, one: Any) -> Any:
        raise torch.OutOfMemoryError

    plant_in_training(monkeypatch, no_card)
    failed = train(**OPTIONS).failed
    assert failed.code == 5
    assert "too small for one example" in failed.message
    assert failed.hint.startswith("add a `--max-length`")
    may: list[bool] = []
    real = trainer.StepPasses.offload
    noted = lambda steps, *given: may.append(steps._may_offload) or real(steps, *given)  # noqa: E731
    monkeypatch.setattr(trainer.StepPasses, "offload", noted)
    for offload, hint in ((None, "add a `--max"), (False, "leave out `--no-offload`, or add a `--max-length`")):
        assert train(**OPTIONS, offload=offload).failed.hint.startswith(hint)
    assert may == [True, False]


@pytest.mark.slow
def test_a_gpu_that_falls_off_is_exit_5_and_the_run_goes_on_later(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = cross_entropy.sum_of_losses, [0]

    def fallen(model: Any, one: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("CUDA error: unspecified launch failure\nmore")
        return real(model, one)

    with monkeypatch.context() as patch:
        plant_in_training(patch, fallen)
        failed = train(**OPTIONS).failed
    assert (failed.code, failed.message) == (5, "the GPU failed: CUDA error: unspecified launch failure")
    assert [event.step for event in train(**OPTIONS).all(events.Resumed)] == [3]


def test_a_disk_too_small_is_refused_before_any_work(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backprop.edges.device.disk_free_bytes", lambda path: 10 * 2**20)
    run = train(**OPTIONS)
    assert run.failed.code == 9
    assert "there is room for 10.0" in run.failed.message
    assert not run.folder.exists()


@pytest.mark.slow
def test_the_time_limit_saves_and_is_exit_75(train: Callable[..., Run]) -> None:
    options = {**OPTIONS, "steps": 100_000, "rehearse": False}
    run = train(**options, max_minutes=0.05)
    assert run.failed.code == 75
    assert "`--max-minutes`" in run.failed.message
    assert (run.folder / "checkpoints" / f"step-{len(run.losses):06d}").is_dir()


def test_a_sample_that_is_skipped_fails_the_run(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.Watch._count

    def forgets(watch: Any, loss: float) -> None:
        watch.numbers = watch.numbers[:-1]
        real(watch, loss)

    monkeypatch.setattr(trainer.Watch, "_count", forgets)
    failed = train(**OPTIONS).failed
    assert failed.code == 6
    assert "every example is seen as often as planned" in failed.message


@pytest.mark.slow
def test_the_report_of_a_resumed_run_tells_of_all_steps(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, "the fifth step")
        train(**OPTIONS)
    run = train(**OPTIONS)
    assert ", 8 steps, " in (run.folder / "report.html").read_text()
    assert json.loads((run.folder / "run.json").read_text())["started_again"] == 1


def multi(cwd: Path, *arguments: str | Path) -> Done:
    return backprop(
        "multi-run", *arguments, "--steps", "4", "--batch-size", "2", "--save-steps", "2", "--skip-proofs", cwd=cwd
    )


@pytest.mark.slow
@pytest.mark.parametrize("skip", [1, pytest.param(6, marks=pytest.mark.long), 10])
def test_a_multi_run_that_is_stopped_ends_the_same(
    tmp_path: Path, tiny_model: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, skip: int
) -> None:
    data = ["--data", write(UNEVEN[:4], "a.jsonl"), "--data", write(UNEVEN[4:], "b.jsonl"), "--model", tiny_model]
    data += ["--runs", "3"]  # with two, what is merged into nothing would be right
    assert multi(tmp_path, *data, "-o", "undisturbed").returncode == 0
    real, calls = trainer.Watch._count, [0]

    def stop(watch: Any, loss: float) -> None:
        calls[0] += 1
        real(watch, loss)
        if calls[0] == skip:
            monkeypatch.setattr(trainer.Watch, "_count", real)
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Watch, "_count", stop)
    stopped = multi(tmp_path, *data, "-o", "stopped")
    assert stopped.returncode == 130, stopped.stderr
    assert multi(tmp_path, *data, "-o", "stopped").returncode == 0
    results = [json.loads((tmp_path / name / "run.json").read_text())["result"] for name in ("undisturbed", "stopped")]
    assert results[0] == results[1]
