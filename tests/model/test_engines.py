"""The other engine behind the same function, and which one `auto` takes. unsloth itself is a double here: see test_gpu."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from conftest import LONG, ROOT, UNEVEN, Done, chat

from backprop.config import TrainConfig
from backprop.core.choice import Choice
from backprop.core.data.render import Example
from backprop.core.hardware import Hardware
from backprop.core.memory import ModelShape
from backprop.core.plan import DataShape, Plan, make_plan
from backprop.engine import race
from backprop.events import Event, Phase
from backprop.verbs.repeat import settings_of

pytestmark = pytest.mark.model

DOUBLE = ROOT / "tests" / "unsloth_double"
RACER = ROOT / "tests" / "racer_double.py"
# As if this were a machine with a GPU, and every run a long one.
HERE = """
import sys
from dataclasses import replace
from backprop.core import duration, engines
from backprop.core.passes import Passes
from backprop.engine import race
engines.why_not_on = lambda hardware: ""
engines.TRIED_ABOVE_S = -1
real = duration.plan_and_seconds
def with_ways(config, hardware, shape, data, *, unsloth, **known):
    plan, seconds = real(config, hardware, shape, data, unsloth=unsloth, **known)
    plan = replace(plan, to_try=(Passes(2, 0), Passes(1, 2)))
    return engines.with_engine(plan, config, hardware, shape, seconds=seconds, installed=unsloth), seconds
duration.plan_and_seconds = with_ways
racer = sys.argv.pop(1)
if racer:
    race.RACER = (sys.executable, racer)
from backprop.__main__ import main
main()
"""
OPTIONS = ["--batch-size", "8", "--lora-r", "4", "--lr", "1e-2", "--skip-proofs", "--no-rehearse"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path, write: Callable[..., Path]) -> Start:
    """Start a command on such a machine, with the double of unsloth installed, in an empty folder."""
    data = write(UNEVEN)
    here = tmp_path / "here"
    here.mkdir()

    def start(
        *options: str | Path, steps: int = 5, racer: str | Path = "", **environment: str
    ) -> "subprocess.Popen[str]":
        argv = ["train", "--data", data, "--model", tiny_model, "--output", tmp_path / "run", *OPTIONS, *options]
        argv += ["--steps", str(steps)]
        paths = {"PYTHONPATH": f"{DOUBLE}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.Popen(
            [sys.executable, "-c", HERE, str(racer), *map(str, argv), "--json"],
            cwd=here,
            env={**os.environ, "OMP_NUM_THREADS": "1", **paths, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def ended(process: "subprocess.Popen[str]") -> Done:
    out, err = process.communicate(timeout=300)
    return Done(process.returncode, out, err)


def told(done: Done, kind: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == kind]


def losses(done: Done) -> list[float]:
    return [event["loss"] for event in told(done, "step")]


def phases(done: Done, word: str) -> list[str]:
    return [event["name"] for event in told(done, "phase") if word in event["name"]]


def engine_in(run: Path) -> dict[str, str]:
    return json.loads((run / "run.json").read_text())["plan"]["engine"]


@pytest.mark.parametrize("packing", ["--packing", pytest.param("--no-packing", marks=LONG)])
def test_the_other_engine_trains_as_torch_does_and_leaves_nothing_beside(
    start: Start, tmp_path: Path, packing: str
) -> None:
    options = [packing, "--micro-batch", "2", "--recompute", "1", "--verbose"]
    other = ended(start(*options, "--engine", "unsloth"))
    assert other.returncode == 0, other.stderr
    assert engine_in(tmp_path / "run") == {"value": "unsloth", "reason": "set by `--engine`"}
    (tmp_path / "run").rename(tmp_path / "other")
    own = ended(start(*options, "--engine", "torch"))
    assert losses(other) == pytest.approx(losses(own), rel=1e-5)
    proofs = [proof["ok"] for proof in told(other, "proof") if proof["name"] == "packed documents are isolated"]
    assert proofs == ([True] if packing == "--packing" else [])
    assert not re.search("banner|imported before|nobody asked|a layer says", other.stdout + other.stderr)
    assert list((tmp_path / "here").iterdir()) == []
    assert (tmp_path / "cache" / "backprop" / "unsloth").is_dir()


def test_what_it_trains_loads_in_plain_peft(start: Start, tmp_path: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert ended(start("--engine", "unsloth")).returncode == 0
    loader: Any = AutoModelForCausalLM
    model: Any = PeftModel.from_pretrained(loader.from_pretrained(tiny_model), str(tmp_path / "run" / "lora"))
    moved = [weight.abs().max() > 0 for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14
    assert all(moved)


@pytest.mark.parametrize("asked", [True, False])
def test_documents_that_it_does_not_keep_apart_are_seen(start: Start, asked: bool) -> None:
    done = ended(start("--engine", "unsloth", *["--packing"][:asked], UNSLOTH_DOUBLE_LEAKS="1"))
    (proof,) = [proof for proof in told(done, "proof") if proof["name"] == "packed documents are isolated"]
    assert not proof["ok"]
    assert done.returncode == (6 if asked else 0), done.stderr
    if not asked:
        assert any("rows are padded instead" in event["message"] for event in told(done, "warning"))


def test_one_that_cannot_be_loaded_is_exit_4(start: Start) -> None:
    done = ended(start("--engine", "unsloth", UNSLOTH_DOUBLE="broken"))
    assert done.returncode == 4
    assert "unsloth cannot load" in done.stderr
    assert "this double is broken" in done.stderr
    assert "hint: add `--engine torch`" in done.stderr


ANSWERS = """
import sys, torch
from backprop.config import TrainConfig
from backprop.core.plan import Choice, Plan
from backprop.engine import layers, load, loop
one = lambda value: Choice(value, "")
plan = Plan(
    **{name: one(1) for name in ("model", "max_length", "batch_size", "micro_batch", "steps", "eval_steps", "learning_rate")},
    engine=one("unsloth"), device=one("cpu"), dtype=one("float32"), packing=one(False), lora_alpha=one(8),
    recompute=one(1), compile=one(False),
)
loop.quieten()
model = load.load_model(sys.argv[1], TrainConfig(data=("x",)), plan)
layers.recompute(model, 1)
before = [layer.gradient_checkpointing for layer in layers.layers_of(model)]
model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
print(before, [layer.gradient_checkpointing for layer in layers.layers_of(model)])
model.eval()
row = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
with torch.no_grad():
    every, some = model(**row).logits, model(**row, logits_to_keep=torch.tensor([0, 3])).logits
print(torch.allclose(every[:, [0, 3]], some, atol=1e-5))
"""


def test_an_answer_that_is_written_switches_nothing_off_and_logits_are_those_asked_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    paths = {"PYTHONPATH": f"{DOUBLE}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(tmp_path)}
    argv = [sys.executable, "-c", ANSWERS, str(tiny_model)]
    done = subprocess.run(argv, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[True, False] [True, False]", "True"], done.stderr


def test_both_engines_are_tried_in_processes_of_their_own_and_the_faster_one_is_known_to_the_next_run(
    start: Start, tmp_path: Path
) -> None:
    done = ended(start())
    assert done.returncode == 0, done.stderr
    assert phases(done, "trying the engine") == [
        f"trying the engine {engine} on the longest examples, in a process of its own" for engine in race.ENGINES
    ]
    chosen = engine_in(tmp_path / "run")
    assert chosen["reason"].startswith("the faster here:"), chosen
    assert phases(done, "the engine is") == [f"the engine is {chosen['value']}: {chosen['reason']}"]
    assert phases(done, "was the fastest when this was tried"), "what the child has found is not known here"
    again = ended(start("--overwrite", "--resume", "never"))
    assert not phases(again, "trying")
    assert engine_in(tmp_path / "run") == {"value": chosen["value"], "reason": f"in an earlier run {chosen['reason']}"}


def test_a_dry_run_tries_nothing(start: Start) -> None:
    done = ended(start("--dry-run"))
    assert done.returncode == 0, done.stderr
    assert not phases(done, "trying")
    (plan,) = told(done, "plan")
    assert "unless unsloth, tried beside it first, is faster" in plan["reasons"]["engine"]


def test_one_that_cannot_be_tried_leaves_torch_with_the_reason(start: Start, tmp_path: Path) -> None:
    done = ended(start(UNSLOTH_DOUBLE="broken"))
    assert done.returncode == 0, done.stderr
    chosen = engine_in(tmp_path / "run")
    assert chosen["value"] == "torch"
    assert chosen["reason"].startswith("unsloth could not be tried: unsloth cannot load")
    assert "this double is broken" in chosen["reason"]


def test_a_run_that_goes_on_keeps_its_engine(start: Start, tmp_path: Path) -> None:
    answers = {"TRIED": str(tmp_path / "tried"), "ANSWERS": json.dumps({"unsloth": {"tokens_per_second": 200}})}
    first = start("--save-steps", "1", steps=40, racer=RACER, **answers)
    assert first.stdout
    for line in first.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] == 3:
            first.kill()
    assert first.wait() == -signal.SIGKILL
    assert engine_in(tmp_path / "run")["value"] == "unsloth"
    for file in (tmp_path / "cache" / "backprop" / "tried").iterdir():
        file.unlink()
    answers["ANSWERS"] = json.dumps({"torch": {"tokens_per_second": 200}})
    again = ended(start("--save-steps", "1", steps=40, racer=RACER, **answers))
    assert again.returncode == 0, again.stderr
    assert told(again, "resumed")
    assert not phases(again, "trying the engine")
    assert engine_in(tmp_path / "run") == {"value": "unsloth", "reason": "as this run began"}
    (tmp_path / "run").rename(tmp_path / "killed")
    done_again = settings_of(TrainConfig(from_run=tmp_path / "killed", output=tmp_path / "again"))
    assert done_again.engine == "unsloth"
    by_torch = TrainConfig(from_run=tmp_path / "killed", output=tmp_path / "again", engine="torch")
    assert settings_of(by_torch).engine == "torch"
    whole = ended(start("--save-steps", "1", "--engine", "unsloth", steps=40))
    assert losses(whole)[-len(losses(again)) :] == pytest.approx(losses(again), rel=1e-3)


def test_a_run_goes_on_with_torch_where_the_engine_that_was_chosen_is_not_there_any_more(
    start: Start, tmp_path: Path
) -> None:
    answers = {"TRIED": str(tmp_path / "tried"), "ANSWERS": json.dumps({"unsloth": {"tokens_per_second": 200}})}
    first = start("--save-steps", "1", steps=40, racer=RACER, **answers)
    assert first.stdout
    for line in first.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] == 3:
            first.kill()
    assert first.wait() == -signal.SIGKILL
    again = ended(start("--save-steps", "1", steps=40, PYTHONPATH=str(ROOT)))
    assert again.returncode == 0, again.stderr
    assert told(again, "resumed")
    warned = "\n".join(event["message"] for event in told(again, "warning"))
    assert "goes on with the engine torch, and had unsloth before" in warned
    told_so = {"value": "torch", "reason": "the run began with unsloth, which is not here"}
    assert engine_in(tmp_path / "run") == told_so


def test_what_cannot_be_loaded_any_more_goes_on_as_its_hint_says(start: Start, tmp_path: Path) -> None:
    """The hint, `--engine torch`, was refused as that of another run."""
    done = ended(start("--engine", "unsloth", UNSLOTH_DOUBLE="broken"))
    assert "hint: add `--engine torch`" in done.stderr
    assert (tmp_path / "run" / "run.json").is_file()
    again = ended(start("--engine", "torch"))
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("engine", [pytest.param(one, marks=LONG if one == "torch" else ()) for one in race.ENGINES])
def test_a_run_that_is_stopped_while_engines_are_tried_leaves_none_of_them(
    start: Start, tmp_path: Path, engine: str
) -> None:
    answers = {"TRIED": str(tmp_path / "tried"), "ANSWERS": json.dumps({engine: {"ends": "never"}})}
    stopped = start(racer=RACER, **answers)
    assert stopped.stdout
    for line in stopped.stdout:
        if f"{engine}: hangs" in line:
            stopped.terminate()
    assert stopped.wait(timeout=60) == 75
    assert not Path("/proc", (tmp_path / "tried.pid").read_text()).exists()
    assert not (tmp_path / "run" / "run.json").exists()
    done = ended(start(racer=RACER, TRIED=str(tmp_path / "tried"), ANSWERS="{}"))
    assert done.returncode == 0, done.stderr


ON_A_CARD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import nvml_double
from backprop.edges import cards
card = nvml_double.Card(sensor=lambda: nvml_double.Now(core=int(Path({file!r}).read_text())))
sys.modules["pynvml"] = nvml_double.Nvml([card])
look_after, cards.EVERY_S = cards.look_after, 0.02
cards.look_after = lambda _: look_after([card.gpu])
from backprop.engine import racer
racer.main()
"""


def test_a_card_that_is_too_warm_is_waited_for_while_engines_are_tried(start: Start, tmp_path: Path) -> None:
    temperature, racer = tmp_path / "temperature", tmp_path / "racer.py"
    temperature.write_text("91")
    racer.write_text(ON_A_CARD.format(tests=str(ROOT / "tests"), file=str(temperature)))
    run = start("--gpu-max-temp", "80", racer=racer)
    assert run.stdout
    said: list[dict[str, Any]] = []
    too_long = threading.Timer(120, run.kill)
    too_long.start()
    for line in run.stdout:
        said.append(json.loads(line))
        if said[-1]["event"] == "paused":
            temperature.write_text("60")
    too_long.cancel()
    assert run.wait(timeout=60) == 0
    names = [event.get("name", event["event"]) for event in said]
    paused = names.index("paused")
    assert "91 °C" in said[paused]["reason"]
    assert names[paused + 1].startswith("torch: going on after")
    assert names[paused + 2].startswith("torch: trying 2 at once"), "it waited before the first"
    assert engine_in(tmp_path / "run")["reason"].startswith("the faster here")


TWO_CORES = Hardware(gpus=(), driver="", num_cpus=2, memory_bytes=2**34, platform="Linux x86_64")
SHAPE = ModelShape(hidden_size=64, intermediate_size=128, num_layers=2, max_positions=512, vocabulary=49152)
EXAMPLES = [Example((1,) * length, (True,) * length) for length in (3, 9, 5, 7)]


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Plan, list[Event]]]:
    """Try both engines, whose programs answer as is said."""
    monkeypatch.setattr(race, "RACER", (sys.executable, str(RACER)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRIED", str(tmp_path / "tried"))
    config = TrainConfig(data=("x",), method="lora", batch_size=2)
    data = DataShape(num_examples=4, num_tokens=24)
    plan = make_plan(config, TWO_CORES, SHAPE, data, model=Choice("m", ""), max_length=Choice(9, ""))
    plan = replace(plan, try_engines=True)

    def tried(options: Mapping[str, Any] = MappingProxyType({}), **answers: Any) -> tuple[Plan, list[Event]]:
        monkeypatch.setenv("ANSWERS", json.dumps(answers))
        said: list[Event] = []
        own = replace(config, **options)
        known = race.with_known(own, plan)
        return (race.with_faster("m", own, plan, EXAMPLES, say=said.append) if known is plan else known), said

    return tried


FAST = {"tokens_per_second": 200}


@pytest.mark.parametrize(
    ("answers", "engine", "reason"),
    [
        ({"unsloth": FAST}, "unsloth", "the faster here: it is at 200 tokens/s, and torch at 100; loss and gradient"),
        ({"torch": FAST}, "torch", "the faster here: unsloth is at 100 tokens/s, and torch at 200"),
        ({}, "torch", "the faster here: unsloth is at 100 tokens/s, and torch at 100"),
        ({"unsloth": {**FAST, "loss": 2.03}}, "torch", "unsloth's loss is 2.03, and torch's 2"),
        ({"unsloth": {**FAST, "loss": float("nan")}}, "torch", "unsloth's loss is nan"),
        ({"unsloth": {**FAST, "loss": 2.01, "scale": 1.1}}, "unsloth", "the faster here"),
        ({"unsloth": {**FAST, "scale": 1.2}}, "torch", "unsloth's gradient is 19% of its norm away from torch's"),
        ({"unsloth": {**FAST, "proved": False, "unproved": "it leaks"}}, "torch", "unsloth is not proved: it leaks"),
        ({"unsloth": {"ends": "badly"}}, "torch", "unsloth could not be tried: `python"),
        ({"unsloth": {"ends": "in silence"}}, "torch", "unsloth could not be tried: its process ended without a word"),
        ({"unsloth": {"ends": "refused"}}, "torch", "unsloth could not be tried: the memory is full"),
        ({"torch": {"ends": "refused"}, "unsloth": FAST}, "torch", "torch could not be tried: the memory is full"),
    ],
    ids=lambda one: json.dumps(one) if isinstance(one, dict) else "",
)
def test_the_faster_engine_that_passes_the_checks_is_taken(
    tried: Callable[..., tuple[Plan, list[Event]]], tmp_path: Path, answers: Any, engine: str, reason: str
) -> None:
    plan, said = tried(**answers)
    assert plan.engine.value == engine
    assert plan.engine.reason.startswith(reason), plan.engine.reason
    assert not plan.try_engines
    assert said[-1] == Phase(name=f"the engine is {engine}: {plan.engine.reason}")
    assert Phase(name="torch: a word") in said
    asked = (tmp_path / "tried").read_text().splitlines()
    # The longest, as many as a step has.
    assert asked == [f"{name} [9, 7]" for name in race.ENGINES][: len(asked)]
    again, _ = tried(torch=FAST)
    failed = "could not" in reason
    assert again.engine.reason.startswith("in an earlier run") == (not failed), "a failure may be gone the next time"
    if not failed:
        assert again.engine.value == engine
        assert "fell over" not in again.engine.reason


def test_what_was_found_is_not_known_to_a_run_whose_passes_are_given(
    tried: Callable[..., tuple[Plan, list[Event]]],
) -> None:
    tried(unsloth=FAST)
    for options in ({"offload": False}, {"recompute": 2}, {"micro_batch": 1}):
        assert tried(options, torch=FAST)[0].engine.value == "torch"
    assert tried(torch=FAST)[0].engine.value == "unsloth"


def test_one_that_hangs_leaves_torch(
    tried: Callable[..., tuple[Plan, list[Event]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "MOST_SILENT_S", 0.01)
    plan, _ = tried(torch={"ends": "never"}, unsloth=FAST)
    assert plan.engine == Choice("torch", "torch could not be tried: its process said nothing for 0 minutes")


@pytest.mark.parametrize("found", ["torch", ["jax", "faster"], ["unsloth"], ["unsloth", 3], {}, None], ids=repr)
def test_what_else_a_cache_holds_is_not_taken(
    tried: Callable[..., tuple[Plan, list[Event]]], tmp_path: Path, found: Any
) -> None:
    tried(unsloth=FAST)
    (file,) = (tmp_path / "cache" / "backprop" / "tried").iterdir()
    file.write_text(json.dumps({"found": found}))
    plan, said = tried(torch=FAST)
    assert said
    assert plan.engine.reason.startswith("the faster here")


@pytest.mark.parametrize(
    ("options", "code", "said", "hint"),
    [
        (["--method", "dora"], 2, "`--engine unsloth` does not do `--method dora`", "leave out one of them"),
        (["--method", "full"], 2, "`--method full`", "leave out one of them"),
        (["--objective", "dpo"], 2, "`--objective dpo`", "leave out one of them"),
        (["--deterministic"], 2, "`--deterministic`", "leave out one of them"),
        (["--fp8-backward"], 2, "`--fp8-backward`", "leave out one of them"),
        (["--pissa"], 2, "`--pissa`", "leave out one of them"),
        (["--lora-dropout", "0.1"], 2, "`--lora-dropout`", "leave out one of them"),
        (["--trust-remote-code"], 2, "`--trust-remote-code`", "leave out one of them"),
        ([], 5, "`--engine unsloth`: unsloth needs an NVIDIA GPU, and none was found", "leave out `--engine`"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
@pytest.mark.parametrize("command", ["train", "multi-run"])
def test_what_the_other_engine_cannot_do_is_refused_before_any_work(
    tmp_path: Path, command: str, options: list[str], code: int, said: str, hint: str
) -> None:
    if command == "multi-run" and options[:1] in (["--pissa"], ["--objective"]):
        pytest.skip("multi-run has no such option")
    argv = [sys.executable, "-m", "backprop", command, "--data", "not-there.jsonl", "--engine", "unsloth", *options]
    paths = {"PYTHONPATH": f"{DOUBLE}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        argv, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stderr.endswith(f"hint: {hint}\n")
    assert list(tmp_path.iterdir()) == []


def test_several_runs_have_one_engine_and_are_merged(
    tmp_path: Path, tiny_model: Path, write: Callable[..., Path]
) -> None:
    sources = [
        option
        for name, answer in (("a", "It is here."), ("b", "It is here, beside the old mill."))
        for option in ("--data", write([chat(f"What is {n}?", answer) for n in range(12)], f"{name}.jsonl"))
    ]
    answers = {"TRIED": str(tmp_path / "tried"), "ANSWERS": json.dumps({"unsloth": FAST})}
    answers["UNSLOTH_DOUBLE_LOADS"] = str(tmp_path / "loads")
    paths = {"PYTHONPATH": f"{DOUBLE}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    # The second time it is known what was found with the first part; of the second, whose rows are longer, nothing is.
    for number, output in enumerate((tmp_path / "run", tmp_path / "again"), start=1):
        argv = ["multi-run", *sources, "--model", tiny_model, "--output", output, "--steps", "5", *OPTIONS, "--json"]
        done = subprocess.run(
            [sys.executable, "-c", HERE, str(RACER), *map(str, argv)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **paths, **answers},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "tried").read_text().splitlines()[0].startswith("torch")
        assert len((tmp_path / "tried").read_text().splitlines()) == 2, "tried once for all runs"
        assert engine_in(output)["value"] == "unsloth"
        assert len((tmp_path / "loads").read_text().splitlines()) == 2 * number, "each run on the same engine"


def test_a_checkpoint_of_another_engine_is_told(start: Start, tmp_path: Path) -> None:
    done = ended(start("--engine", "unsloth", "--save-steps", "2", "--keep-checkpoints", "9"))
    assert done.returncode == 0, done.stderr
    (tmp_path / "run").rename(tmp_path / "first")
    again = ended(start("--engine", "torch", "--resume", tmp_path / "first" / "checkpoints" / "step-000002"))
    assert again.returncode == 0, again.stderr
    warned = "\n".join(event["message"] for event in told(again, "warning"))
    assert "goes on with the engine torch, and had unsloth before" in warned
    assert losses(again) == pytest.approx(losses(done)[2:], rel=1e-4)
