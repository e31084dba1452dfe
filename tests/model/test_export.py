"""Export for real: peft's merge, llama.cpp's converter, quantizer and inference, on a tiny model."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import backprop, chat, trained_run
from tiny_models import tiny

from backprop import BackpropError, Trainer
from backprop.config import ExportConfig
from backprop.core.data.formats import Message
from backprop.core.fidelity import Reply
from backprop.edges import llama_cpp, stopping
from backprop.engine import merge
from backprop.errors import ExportError, UsageError
from backprop.verbs.source import DEFAULT_QUESTION, find_adapter

pytestmark = pytest.mark.model

# One answer to everything: what a random model of two layers can learn to the end, and then stop.
ROWS = [chat(f"What is {n}?", "It is here.") for n in range(12)]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # At twice this rate it may end on an edge, from which rounding to 16 bits moves an answer: KL 1e-2, not 1e-5.
    return trained_run(tiny_model, tmp_path_factory.mktemp("trained"), ROWS, steps=100, learning_rate=5e-3)


@pytest.mark.slow
def test_gguf_answers_as_it_was_trained_and_stops_and_the_run_tells_of_it(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    done = backprop("export", "run", "-q", "f16", "-q", "q5_k_m", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    exported = [event for event in printed if event["event"] == "exported"]
    assert [event["quantization"] for event in exported] == ["f16", "q5_k_m"]
    files = sorted(path.name for path in (tmp_path / "run" / "export").iterdir())
    assert files == ["exports.json", "run-f16.gguf", "run-q5_k_m.gguf", "verification.json"]
    for event in exported:
        assert event["question"] == "What is 0?", "not the first question of the training data"
        assert event["answer"] == "It is here.", event
        (answer,) = llama_cpp.ask(tmp_path / event["path"], [[{"role": "user", "content": "What is 7?"}]])
        assert answer.stopped, "the end-of-turn token was not learnt"
    log = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in log][-len(printed) :] == [event["event"] for event in printed]


def test_a_file_is_asked_on_the_cpu_though_llama_cpp_knows_of_a_gpu(tmp_path: Path) -> None:
    """On an H200 the same f16 file was ten times as far from the trained model, and refused."""
    llama_cpp.convert(tiny("llama-untied", tmp_path / "tiny"), tmp_path / "tiny.gguf", kind="f32")
    with llama_cpp.loaded(tmp_path / "tiny.gguf", context=64) as model:
        parameters = cast(Any, model._model).model_params
        without_gpus = (llama_cpp.bindings().LLAMA_SPLIT_MODE_NONE, -1)
        assert (parameters.split_mode, parameters.main_gpu) == without_gpus, "llama.cpp takes no device then"


def test_a_long_question_has_room_and_one_without_end_is_refused(run: Path, tmp_path: Path) -> None:
    """llama.cpp was given 1,024 tokens, and the whole export failed at its last step."""
    llama_cpp.convert(tiny("llama-untied", tmp_path / "tiny"), tmp_path / "tiny.gguf", kind="f32")
    long = "é" * 3_000  # more tokens than characters
    (answer,) = llama_cpp.ask(tmp_path / "tiny.gguf", [[{"role": "user", "content": long}]], max_tokens=2)
    assert not answer.stopped
    for question in ("?" * 2_001, " "):
        with pytest.raises(UsageError, match=r"`--question` (has|is blank)"):
            find_adapter(run, ExportConfig(question=question), say=print)
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "question": long}))
    assert find_adapter(tmp_path / "run", ExportConfig(), say=print).question == DEFAULT_QUESTION


def test_a_file_that_answers_nothing_is_kept_as_rejected(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "ask", lambda *_, **__: [Reply(text="", stopped=True)])
    done = backprop("export", run, "-q", "q8_0", "--output", tmp_path / "out", "--no-verify", cwd=tmp_path)
    assert done.returncode == 7
    assert "gave no answer" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run-q8_0.gguf.rejected"]


def test_an_adapter_of_embeddings_alone_has_learnt_something(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny("llama-untied", tmp_path / "tiny")
    wrapped: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["embed_tokens"])
    )
    wrapped.save_pretrained(tmp_path / "untrained", save_embedding_layers=False)
    with pytest.raises(ExportError, match="nothing was learnt"):
        merge.wrap(AutoModelForCausalLM.from_pretrained(base), tmp_path / "untrained", of="it")
    for name, parameter in wrapped.named_parameters():
        if "lora_embedding" in name:
            torch.nn.init.ones_(parameter)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge.wrap(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", of="it")


def test_an_expected_answer_is_looked_at_together_and_changes_none(tmp_path: Path) -> None:
    llama_cpp.convert(tiny("llama-untied", tmp_path / "tiny"), tmp_path / "tiny.gguf", kind="f32")
    asked: list[Message] = [{"role": "user", "content": "What is 7?"}]
    with llama_cpp.loaded(tmp_path / "tiny.gguf", context=256, all_logits=True) as model:
        inner: Any = model._model
        looked_at: list[int] = []
        evaluate, sample, taken = inner.eval, inner.sample, list[int]()
        inner.eval = lambda tokens: (looked_at.append(len(tokens)), evaluate(tokens))
        inner.sample = lambda **options: taken.append(sample(**options)) or taken[-1]

        def answer(expected: Reply | None) -> tuple[Reply, list[int]]:
            looked_at.clear()
            taken.clear()
            return model.reply(asked, max_tokens=40, expected=expected), list(looked_at)

        plain, one_by_one = answer(None)
        likely = Reply(text=plain.text, stopped=plain.stopped, tokens=tuple(taken))
        assert len(taken) == 40
        assert one_by_one[1:] == [1] * 39
        # The first time the prompt was looked at too.
        assert answer(likely) == (plain, [1, 17, 17, 6])
        wrong_at_5 = Reply(text=plain.text, stopped=False, tokens=(*likely.tokens[:5], likely.tokens[5] + 1))
        found, together = answer(wrong_at_5)
        assert found == plain
        assert together[1] == 6
        assert set(together[2:]) == {1}
        other, few = answer(Reply(text="nothing like it", stopped=True))
        assert not other.stopped
        assert plain.text.startswith(other.text)
        assert len(few) < 40
        inner._is_recurrent = True  # such a model cannot forget a token that it has seen
        assert answer(likely) == (plain, [*one_by_one[1:2], *one_by_one[1:]])
        assert inner.draft_model is None


def test_safetensors_load_with_plain_transformers_and_answer(run: Path, tmp_path: Path) -> None:
    done = backprop(
        "export", run, "--format", "safetensors", "--output", tmp_path, "--question", "What is 8?", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "It is here." in done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "safetensors")]


def test_a_file_that_is_there_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run-q4_k_m.gguf").write_text("mine")
    done = backprop("export", run, "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "run-q4_k_m.gguf").read_text() == "mine"


@pytest.mark.slow
def test_an_export_that_was_stopped_goes_on_and_a_finished_one_is_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "run")
    command = ("export", "run", "-q", "f16", "-q", "q5_k_m")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    ask = llama_cpp.ask

    def stop_at_the_second(gguf: Path, *arguments: Any, **options: Any) -> Any:
        return stop() if "q5_k_m" in gguf.name else ask(gguf, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "ask", stop_at_the_second)
        stopped = backprop(*command, cwd=tmp_path)
    assert stopped.returncode == 130
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["code"]) == ("error", 130)
    assert not list((tmp_path / "run" / "export").glob(".*"))
    (tmp_path / "run" / "export" / ".backprop-export-killed").mkdir()
    (tmp_path / "run" / "export" / ".backprop-run-q5_k_m.gguf.7.part").write_text("half")
    first = (tmp_path / "run" / "export" / "run-f16.gguf").stat()
    went_on = backprop(*command, "--json", cwd=tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    written = (tmp_path / "run" / "export" / "run-f16.gguf").stat()
    assert (written.st_ino, written.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    monkeypatch.setattr(llama_cpp, "converting", stop)
    again = backprop(*command, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    told = [[json.loads(line) for line in done.stdout.splitlines()] for done in (went_on, again)]
    answers = [[event["answer"] for event in one if event["event"] == "exported"] for one in told]
    assert answers == [["It is here.", "It is here."]] * 2
    assert {path.name for path in (tmp_path / "run" / "export").iterdir()} == {
        "exports.json",
        "run-f16.gguf",
        "run-q5_k_m.gguf",
        "verification.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function", "phase"),
    [
        pytest.param(merge, "load_adapted", "asking the trained model", id="load", marks=pytest.mark.long),
        pytest.param(llama_cpp, "converting", "merging and converting", id="merge", marks=pytest.mark.long),
        pytest.param(llama_cpp, "loaded", "verifying the 16-bit file", id="verify"),
        pytest.param(llama_cpp, "ask", "writing f16", id="ask"),
    ],
)
def test_the_time_limit_ends_an_export_in_any_phase_and_the_same_command_ends_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str, phase: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    command = ("export", "run", "-q", "f16", "-q", "q5_k_m", "--json")

    def slow(*_: object, **__: object) -> None:
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(60)

    with monkeypatch.context() as patch, stopping.armed(end_process=False):
        patch.setattr(module, function, slow)
        stopped = backprop(*command, "--max-minutes", "10", cwd=tmp_path)
    told = [json.loads(line) for line in stopped.stdout.splitlines()]
    assert [event["name"] for event in told if event["event"] == "phase"][-1].startswith(phase)
    assert stopped.returncode == 75
    assert (told[-1]["code"], told[-1]["message"]) == (75, "the time of `--max-minutes` is over")
    assert not list((tmp_path / "run" / "export").glob(".*"))
    assert backprop(*command, cwd=tmp_path).returncode == 0


def test_the_time_limit_is_heard_in_a_thread(run: Path, tmp_path: Path) -> None:
    """Where no alarm rings: each event is an instant at which the time is looked at."""
    from backprop.config import ExportConfig
    from backprop.verbs.export import export

    ended: list[object] = []

    def work() -> None:
        try:
            ended.append(
                export(run, ExportConfig(output=tmp_path, max_minutes=0.001), say=lambda event: time.sleep(0.1))
            )
        except BackpropError as error:
            ended.append(error.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [75]


def test_a_time_limit_that_is_over_when_all_is_written_ends_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last file was whole and told, and the export ended as if it were not."""
    from backprop.config import ExportConfig
    from backprop.events import Event, Exported
    from backprop.verbs.export import export

    def say(event: Event) -> None:
        if isinstance(event, Exported):
            monkeypatch.setattr(stopping.time, "monotonic", lambda: float("inf"))

    config = ExportConfig(quantization=("f16",), output=tmp_path, max_minutes=10, verify=False)
    assert export(run, config, say=say) == [tmp_path / "run-f16.gguf"]


def test_a_time_limit_that_is_over_at_once_leaves_nothing(run: Path, tmp_path: Path) -> None:
    with stopping.armed(end_process=False):
        stopped = backprop("export", run, "--output", tmp_path / "files", "--max-minutes", "0.0001", cwd=tmp_path)
    assert stopped.returncode == 75
    assert "the time of `--max-minutes` is over" in stopped.stderr
    assert not list((tmp_path / "files").glob("*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux tells a process of its parent's end")
def test_the_converter_ends_with_a_process_that_is_killed(run: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "backprop", "export", str(run), "-q", "f16", "--output", str(tmp_path), "--json"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as main:
        converters: list[Path] = []
        while not converters:
            assert main.poll() is None
            time.sleep(0.1)
            children = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
            converters = [
                Path("/proc") / child for child in children if b"streamed" in command_of(Path("/proc") / child)
            ]
        time.sleep(1)
        main.kill()
    until = time.monotonic() + 2
    while any(b"streamed" in command_of(converter) for converter in converters):
        assert time.monotonic() < until, "the converter goes on"
        time.sleep(0.1)


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_files_of_another_adapter_are_not_taken_for_its_own(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(run / "lora", tmp_path / "lora")
    assert backprop("export", "lora", "-q", "f16", "--question", "What is 0?", cwd=tmp_path).returncode == 0
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    done = backprop("export", "lora", "-q", "f16", "--question", "What is 0?", cwd=tmp_path)
    assert done.returncode == 2
    assert "is there already" in done.stderr


def test_an_adapter_that_learnt_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(run / "lora", tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    done = backprop("export", tmp_path / "lora", cwd=tmp_path)
    assert done.returncode == 7
    assert "all zero" in done.stderr
    assert list((tmp_path / "lora" / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ({"intermediate_size": 96}, "does not fit"),
        # PEFT only warns of tensors without a counterpart; such an export once ended with exit 0 and nonsense.
        ({"num_hidden_layers": 1}, "have no counterpart"),
    ],
    ids=["other shapes", "fewer layers"],
)
def test_an_adapter_of_another_model_is_refused(
    run: Path, tmp_path: Path, tiny_model: Path, difference: dict[str, int], said: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny_model, tmp_path / "other")
    config = LlamaConfig.from_pretrained(tiny_model, **difference)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    shutil.copytree(run / "lora", tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "other")}))
    done = backprop("export", tmp_path / "lora", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert said in done.stderr


def test_a_base_model_that_was_changed_since_is_refused(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    shutil.copytree(tiny_model, tmp_path / "base")
    shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    manifest["model"]["path"] = str(tmp_path / "base")
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "base")
    done = backprop("export", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "its files differ" in done.stderr


def test_an_output_that_is_a_file_is_exit_9(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert backprop("export", run, "--output", tmp_path / "taken", cwd=tmp_path).returncode == 9
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_run_that_did_not_finish_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "interrupted"}))
    done = backprop("export", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not finished: interrupted" in done.stderr


def test_without_the_converter_the_command_that_builds_it_is_named(run: Path, tmp_path: Path) -> None:
    done = backprop("export", run, "--output", tmp_path / "out", cwd=tmp_path, BACKPROP_LLAMA_CPP=str(tmp_path))
    assert done.returncode == 7
    assert "python -m backprop.edges.llama_cpp_build" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_three_lines_of_python(tiny_model: Path, tmp_path: Path, write: Callable[..., Path]) -> None:
    trainer = Trainer(str(tiny_model), say=lambda event: None, output=tmp_path / "run")
    trainer.train(write(ROWS), steps=20, batch_size=4, lr=2e-2)
    assert [path.name for path in trainer.export("gguf", quantization="q8_0")] == ["run-q8_0.gguf"]
    trainer.save(tmp_path / "my-model")
    assert (tmp_path / "my-model" / "adapter_model.safetensors").is_file()
    with pytest.raises(BackpropError, match="there already"):
        trainer.save(tmp_path / "my-model")


def test_python_names_the_nearest_option_for_one_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BackpropError) as raised:
        Trainer("x").train("data.jsonl", stepps=3)
    assert raised.value.hint == "did you mean `steps`?"


def test_python_registers_with_ollama_by_the_names_of_the_contract(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer("x", say=lambda event: None)
    monkeypatch.setattr(trainer, "_run", run)
    with pytest.raises(BackpropError, match="cannot name a model of Ollama"):
        trainer.export("gguf", quantization="q8_0", output=tmp_path / "out", model_name="../etc")
    with pytest.raises(BackpropError, match=r"127\.0\.0\.1:9") as raised:
        trainer.export(output=tmp_path / "out", register_ollama=True, ollama_url="http://127.0.0.1:9")
    assert raised.value.code == 8


def test_python_gets_the_same_bounds(tmp_path: Path) -> None:
    with pytest.raises(BackpropError, match="`--steps` must be at least 1"):
        Trainer("x").train("data.jsonl", steps=0)


def test_export_before_training_is_an_error() -> None:
    with pytest.raises(BackpropError, match="nothing was trained yet"):
        Trainer("x").export()
