"""Several processes share each step: the same curve, the same promises. On a CPU, by gloo; test_gpu.py has them on GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import LONG, UNEVEN, Run, plant_in_training, went_on

from backprop import events
from backprop.core import duration
from backprop.core.plan import Choice
from backprop.engine import cross_entropy, ranks

pytestmark = pytest.mark.model

PAIRS = [
    {"prompt": f"question {n}", "chosen": "good " * (n % 5 + 1), "rejected": "bad " * (7 - n % 4)} for n in range(8)
]
# All are wanted, so all become likelier, and the distance that is taken off is not 0.
RATED = [{"prompt": f"question {n}", "completion": "good " * (3 * n + 1), "label": True} for n in range(8)]
QUICK: dict[str, Any] = {"skip_proofs": True, "steps": 4}


def share_by(patch: pytest.MonkeyPatch, num_ranks: int) -> None:
    """Let a CPU train in several processes, as no user can ask for."""
    patch.setattr(duration, "choose_gpus", lambda *_: Choice(num_ranks, "a test"))
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def curves(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[float]]]:
    """Give the losses of the same training in one process, and in several."""

    def curves(rows: Sequence[Any] = UNEVEN, *, num_ranks: int = 2, **options: Any) -> list[list[float]]:
        found: list[list[float]] = []
        for number in (1, num_ranks):
            with monkeypatch.context() as patch:
                share_by(patch, number)
                run = train(rows, **{**QUICK, **options})
                assert not run.all(events.Failed), run.failed
                assert json.loads((run.folder / "run.json").read_text())["plan"]["gpus"]["value"] == number
                found.append(run.losses)
        return found

    return curves


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="packed"),
        pytest.param({"packing": False, "micro_batch": 2}, id="padded", marks=pytest.mark.slow),
        pytest.param({"packing": False, "micro_batch": 1, "lora_dropout": 0.2}, id="dropout", marks=LONG),
        pytest.param({"num_ranks": 3, "batch_size": 5}, id="three", marks=pytest.mark.slow),
        pytest.param({"num_ranks": 3, "batch_size": 2}, id="more ranks than examples", marks=pytest.mark.slow),
        pytest.param({"method": "full", "learning_rate": 1e-3}, id="full", marks=pytest.mark.slow),
        pytest.param({"method": "dora"}, id="dora", marks=LONG),
        pytest.param({"pissa": True}, id="pissa", marks=pytest.mark.slow),
    ],
)
def test_one_process_and_several_give_one_curve(
    curves: Callable[..., list[list[float]]], options: dict[str, Any]
) -> None:
    alone, shared = curves(**options)
    assert alone == pytest.approx(shared, abs=1e-5)


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "objective", [pytest.param("dpo", marks=pytest.mark.slow), pytest.param("orpo", marks=LONG), "kto"]
)
def test_preferences_give_one_curve_too(
    curves: Callable[..., list[list[float]]], objective: str, packing: bool
) -> None:
    alone, shared = curves(RATED if objective == "kto" else PAIRS, objective=objective, packing=packing, beta=0.5)
    assert alone == pytest.approx(shared, abs=1e-5)


def test_no_answer_to_a_share_that_failed_is_left_for_the_next_one() -> None:
    import torch

    class Fails:
        def compute(self, share: ranks.Share) -> Any:
            raise RuntimeError(str(len(share.passes)))

    ours, theirs = Pipe()
    ranks.tell(theirs, ranks.Found(values={}, with_gradient=()))
    both = ranks.Ranks(cast(Any, None), workers=[ranks.Worker(ours, lambda: "", "a test")])
    with pytest.raises(RuntimeError, match="1"):
        both._share_out(cast(Any, Fails()), cast(Any, None), {0: {"input_ids": torch.ones(1, 4)}}, 0, None)
    assert not ours.poll()


@pytest.mark.slow
def test_a_shared_run_goes_on_to_the_same_bits(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    share_by(monkeypatch, 2)
    went_on(train, UNEVEN, **QUICK, step=2, lora_dropout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_more_or_fewer_may_go_on_and_it_is_said(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: int, now: int
) -> None:
    share_by(monkeypatch, before)
    whole = train(**QUICK, save_steps=2, keep_checkpoints=9)
    (whole.folder / "checkpoints" / "step-000002").rename(tmp_path / "kept")
    share_by(monkeypatch, now)
    again = train(**QUICK, resume=str(tmp_path / "kept"))
    assert f"goes on with {now} GPU" in again.warned
    assert again.losses == pytest.approx(whole.losses[2:], abs=1e-5)


PLANTED = """
import os, sys, torch
from backprop.engine import load, objectives, ranks, worker
from backprop.errors import ModelError
real, calls = objectives.sum_of_losses, [0]

def second_pass_does_not_fit(model, one):
    calls[0] += 1
    if calls[0] in (2, 4):
        raise torch.OutOfMemoryError
    return real(model, one)

def die(*_):
    os._exit(3)

def raise_(*_):
    raise ModelError("no such model", hint="another")

{}
worker.main()
"""


def plant_in_worker(patch: pytest.MonkeyPatch, planted: str) -> None:
    patch.setattr(ranks, "WORKER", (sys.executable, "-c", PLANTED.format(planted)))


@pytest.mark.parametrize("where", ["worker", pytest.param("rank 0", marks=pytest.mark.slow)])
def test_a_memory_that_is_full_on_one_rank_shrinks_the_step_on_all(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The first pass of each rank has left gradients by then, which must not be counted twice."""
    import torch

    options: dict[str, Any] = {**QUICK, "packing": False, "micro_batch": 2}
    undisturbed = train(**options)
    share_by(monkeypatch, 2)
    calls = [0]

    def second_pass_does_not_fit(model: Any, one: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 4):  # in the second attempt, which recomputes, again
            raise torch.OutOfMemoryError
        return cross_entropy.sum_of_losses(model, one)

    if where == "worker":
        plant_in_worker(monkeypatch, "objectives.sum_of_losses = second_pass_does_not_fit")
    else:
        plant_in_training(monkeypatch, second_pass_does_not_fit)
    run = train(**options)
    assert not run.all(events.Failed), run.failed
    assert (
        "the memory was full in step 1: it was done again, and from here on every layer is computed again" in run.warned
    )
    assert "the memory was full in step 1: it was done again with 1 examples at once" in run.warned
    assert run.losses == pytest.approx(undisturbed.losses, abs=1e-5)


@pytest.mark.parametrize(
    ("planted", "code", "said"),
    [
        pytest.param(
            "sys.exit('no such card')", 5, "the process for GPU 2 of 2 ended: ", id="started", marks=pytest.mark.slow
        ),
        pytest.param("load.load_model = raise_", 4, "no such model", id="loading", marks=pytest.mark.slow),
        pytest.param("worker.join = die", 5, "exited with 3", id="joining", marks=LONG),
        pytest.param("ranks.Rank.take_weights = die", 5, "exited with 3", id="weights", marks=LONG),
        pytest.param("ranks.Rank.compute = die", 5, "exited with 3", id="computing", marks=LONG),
        pytest.param("ranks.Rank.add_up = die", 5, "exited with 3", id="adding up"),
        pytest.param("ranks.Rank.compute = lambda *_: 1 / 0", 5, "division by zero", id="a fault", marks=LONG),
    ],
)
def test_a_worker_that_ends_ends_the_run_at_once_with_what_it_said(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, planted: str, code: int, said: str
) -> None:
    share_by(monkeypatch, 2)
    plant_in_worker(monkeypatch, planted)
    started = time.monotonic()
    failed = train(**QUICK).failed
    assert failed.code == code
    assert said in failed.message
    assert time.monotonic() - started < 60


SHARED = """
import sys
from backprop.core import duration
from backprop.core.plan import Choice
duration.choose_gpus = lambda *_: Choice(2, "a test")
from backprop.__main__ import main
main()
"""
OPTIONS = (
    *("--data", "data.jsonl", "--steps", "40", "--batch-size", "8", "--lora-r", "4", "--lora-dropout", "0.1"),
    *("--save-steps", "3", "--skip-proofs", "--json"),
)


def shared(model: Path, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line in two processes, as Ctrl-C in a terminal would find it."""
    (cwd / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in UNEVEN))
    argv = [sys.executable, "-c", SHARED, "train", *OPTIONS, "--model", str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Where the tests run in the background of a shell, it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def worker_of(process: subprocess.Popen[str]) -> int:
    (number,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(number)


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def adapter_of(cwd: Path) -> str:
    return json.loads((cwd / "output" / "run.json").read_text())["result"]["adapter_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = shared(tiny_model, folder)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return adapter_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code"),
    [
        pytest.param("SIGKILL", -signal.SIGKILL, id="SIGKILL"),
        pytest.param("SIGTERM", 75, id="SIGTERM"),
        pytest.param("Ctrl-C", 130, id="Ctrl-C", marks=pytest.mark.long),
        pytest.param("a dead worker", 5, id="a dead worker", marks=pytest.mark.long),
    ],
)
def test_a_shared_run_that_is_stopped_leaves_no_process_and_goes_on_to_the_same_end(
    tiny_model: Path, undisturbed: str, tmp_path: Path, stop: str, code: int
) -> None:
    stopped = shared(tiny_model, tmp_path)
    assert stopped.stdout
    for line in stopped.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] == 7:
            break
    worker, asked = worker_of(stopped), time.monotonic()
    match stop:
        case "SIGKILL":
            stopped.kill()
        case "SIGTERM":
            stopped.terminate()
        case "Ctrl-C":
            os.killpg(stopped.pid, signal.SIGINT)
        case _:
            os.kill(worker, signal.SIGKILL)
    _, said = stopped.communicate()
    assert stopped.returncode == code, said
    assert time.monotonic() - asked < 8
    while is_alive(worker):
        assert time.monotonic() - asked < 8, "the worker outlived its run"
        time.sleep(0.05)
    again = shared(tiny_model, tmp_path)
    told = [json.loads(line) for line in again.communicate()[0].splitlines()]
    assert again.returncode == 0
    (resumed,) = [event["step"] for event in told if event["event"] == "resumed"]
    assert resumed >= 6
    assert adapter_of(tmp_path) == undisturbed
