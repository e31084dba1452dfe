"""The rehearsal goes the whole way before training, and finds what would fail after it."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, backprop, chat

from backprop import Trainer, events
from backprop.core import duration
from backprop.edges import device, rundir
from backprop.errors import TrainingError
from backprop.verbs import rehearsal as rehearsal_verb
from backprop.verbs import train as train_verb

pytestmark = pytest.mark.model

ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]


@pytest.mark.slow
def test_a_model_that_cannot_become_a_gguf_is_found_before_training(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    """A tokenizer that splits words in a way unknown to llama.cpp: six hours of training once ended there."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    words = json.loads(path.read_text())
    words["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
    path.write_text(json.dumps(words))
    options = ["--data", write(ROWS), "--model", "model", "--rehearse"]
    done = backprop("train", *options, cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "the rehearsal failed, before any training" in done.stderr
    assert "pre-tokenizer" in done.stderr
    assert "add `--no-rehearse`" in done.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_the_rehearsal_goes_through_and_trains_nothing_in_a_dry_run(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    done = backprop("train", "--data", write(ROWS), "--model", tiny_model, "--rehearse", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a GGUF, q4_k_m, and a question to llama.cpp" in done.stderr
    assert not (tmp_path / "output").exists()


@pytest.fixture
def long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any run be a long one."""
    monkeypatch.setattr(duration, "REHEARSED_ABOVE_S", 0)


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BACKPROP_LLAMA_CPP", str(tmp_path / "nowhere"))


def rehearsals(run: Run) -> list[str]:
    """What the run says of rehearsing."""
    return [event.name for event in run.all(events.Phase) if "rehears" in event.name]


QUICK: dict[str, Any] = {"skip_proofs": True, "packing": False, "lora_dropout": 0.1}


def test_a_short_run_is_not_rehearsed_and_says_why(train: Callable[..., Run]) -> None:
    run = train(**QUICK)
    assert rehearsals(run) == [
        f"no rehearsal: under a minute are estimated, at {45 * device.probe().num_cpus:,} GFLOP/s of this CPU, at most 30 minutes"
    ]
    assert "rehears" not in run.warned


@pytest.mark.slow
def test_a_long_run_is_rehearsed_by_itself_and_ends_with_the_same_adapter(
    train: Callable[..., Run], long_run: None, no_llama_cpp: None
) -> None:
    """Without llama.cpp, which is optional, as far as it goes: an automatic rehearsal may not forbid the run."""
    plain = train(rehearse=False, **QUICK)
    assert rehearsals(plain) == ["no rehearsal: set by `--no-rehearse`"]
    run = train(**QUICK)
    assert "rehearsing on a small copy of the model: under a minute" in rehearsals(run)[0]
    assert "the way to a GGUF was not rehearsed: llama.cpp's converter is not in" in run.warned
    assert "python -m backprop.edges.llama_cpp_build" in run.warned
    (proof,) = [proof for proof in run.all(events.Proved) if proof.name == "the rehearsal went through"]
    assert proof.found == "3 steps, a checkpoint, going on from it, and the merge"
    assert run.losses == plain.losses
    (ended,), (ended_plain,) = run.all(events.RunFinished), plain.all(events.RunFinished)
    assert ended.result["adapter_sha256"] == ended_plain.result["adapter_sha256"]


def test_a_dry_run_only_says_that_a_rehearsal_would_come(train: Callable[..., Run]) -> None:
    run = train(dry_run=True, steps=10_000_000)
    assert len(rehearsals(run)) == 1
    assert rehearsals(run)[0].startswith("a rehearsal would come first: ")
    assert rehearsals(run)[0].endswith("more than 30 minutes")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_is_not_rehearsed_again(
    train: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    long_run: None,
    no_llama_cpp: None,
    asked: bool | None,
) -> None:
    options = {**QUICK, "rehearse": asked, "overwrite": False, "resume": "auto", "save_steps": 1}
    real = train_verb.measures
    monkeypatch.setattr(train_verb, "measures", lambda *_: (_ for _ in ()).throw(TrainingError("stopped at the end")))
    assert len(train(**options).all(events.Proved)) > 0
    monkeypatch.setattr(train_verb, "measures", real)
    run = train(**options)
    assert rehearsals(run) == ["no rehearsal: this run goes on"]
    assert len(run.all(events.Resumed)) == 1


@pytest.mark.slow
def test_a_run_that_goes_on_is_rehearsed_if_it_was_not_and_this_is_asked_for(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, no_llama_cpp: None
) -> None:
    options = {**QUICK, "overwrite": False, "resume": "auto", "save_steps": 1}
    real = train_verb.measures
    monkeypatch.setattr(train_verb, "measures", lambda *_: (_ for _ in ()).throw(TrainingError("stopped at the end")))
    train(**options)
    monkeypatch.setattr(train_verb, "measures", real)
    run = train(**options, rehearse=True)
    assert rehearsals(run) == ["rehearsing on a small copy of the model: set by `--rehearse`"]
    assert len(run.all(events.Resumed)) == 1


def test_a_full_disk_is_exit_9_and_what_a_killed_rehearsal_left_is_removed(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    left, alive = (tmp_path / "tmp" / f"backprop-rehearsal-{name}" for name in ("left", "alive"))
    for folder in (left, alive):
        (folder / "model").mkdir(parents=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rehearsal_verb, "train_one", full)
    with rundir.locked(alive):
        run = train(rehearse=True, **QUICK)
    assert run.failed.code == 9
    assert "TMPDIR" in run.failed.hint
    assert list((tmp_path / "tmp").iterdir()) == [alive]


@pytest.fixture
def odd_model(tiny_model: Path, tmp_path: Path) -> Path:
    """GPT-Neo, whose configuration lists a kind of attention for each layer, so that two layers do not fit it."""
    from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

    shape = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = GPTNeoConfig(vocab_size=49152, attention_types=[[["global", "local"], 2]], **shape, **ends)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "odd")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "odd")
    return tmp_path / "odd"


def test_an_architecture_that_cannot_be_made_small_is_told_and_trained_all_the_same(
    train: Callable[..., Run], odd_model: Path, long_run: None
) -> None:
    run = train(model=odd_model, rows=ROWS, **QUICK)
    assert "not rehearsed: no small copy of this architecture can be made" in run.warned
    assert len(run.losses) == 3
    asked = train(model=odd_model, rows=ROWS, rehearse=True, **QUICK)
    assert asked.failed.code == 4
    assert asked.losses == []


@pytest.mark.slow
def test_the_parts_of_a_multi_run_are_rehearsed_once(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path], long_run: None, no_llama_cpp: None
) -> None:
    said: list[events.Event] = []
    trainer = Trainer(str(tiny_model), say=said.append, output=tmp_path / "run", skip_proofs=True, packing=False)
    trainer.multi_run(write(ROWS), num_runs=2, steps_per_run=1)
    proofs = [event for event in said if isinstance(event, events.Proved)]
    assert [proof.name for proof in proofs].count("the rehearsal went through") == 1
