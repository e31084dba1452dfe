"""Small real doubles: a tokenizer of letters, a tiny random Llama with the SmolLM2 tokenizer, the command line in process."""

import functools
import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from backprop import BackpropError, Trainer, events
from backprop.core.data.formats import Message
from backprop.core.data.render import Token
from backprop.edges import llama_cpp, threads
from backprop.edges.places import cache_dir
from backprop.schema import schema as event_schema

threads.settle()
ROOT = Path(__file__).parent.parent

# Time is measured by scripts/bench: a busy machine makes no example wrong.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# Workers that share cores wait for each other in torch and llama.cpp, which makes both many times slower.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cpus[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_cpus)]})
LONG = (pytest.mark.slow, pytest.mark.long)
COMPILED = cache_dir() / "compiled-in-tests"
ASSETS = Path(__file__).parent / "assets"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, which one worker is busy with while the other does the rest."""
    items.sort(key=lambda item: item.path.name != "test_whole_path.py")


@pytest.fixture(autouse=True)
def _clean_surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's settings and network out of every test, and the GPU out of those that are not about it."""
    for name in [name for name in os.environ if name.startswith("BACKPROP_") and name != "BACKPROP_LLAMA_CPP"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def _programs_are_forked() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import preloaded

    from backprop.edges import process

    forks, known = preloaded.Forks(), os.environ.get("PYTHONPATH")

    def popen(argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None, **rest: Any) -> Any:
        if preloaded.is_known(argv) and env and os.environ.get("PYTHONPATH") == known:
            return forks.start(argv, env, cwd, rest.get("pass_fds", ()))
        return subprocess.Popen(argv, env=env, cwd=cwd, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
        yield
    forks.close()


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_not_collected() -> Iterator[None]:
    """Each run collects, which with the libraries' own objects takes a tenth of a small one's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _every_event_fits_the_schema() -> Iterator[None]:
    """Hold every event that any test writes to the schema of its kind."""
    from backprop.edges import rundir

    def checked(event: events.Event) -> dict[str, events.JSON]:
        written = events.to_json(event)
        _validators()[str(written["event"])].validate(json.loads(json.dumps(written)))
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir, "to_json", checked)
        yield


@functools.cache
def _validators() -> dict[str, Any]:
    import jsonschema

    schema: Any = event_schema()
    return {one["title"]: jsonschema.Draft202012Validator(one) for one in schema["oneOf"]}


class LetterTokenizer:
    """One token per character; the marks `<u>`, `</a>` and the like are one character each, and special."""

    SPECIAL = ("<s>", "<u>", "<a>", "</s>", "</u>", "</a>", "<end>")
    FIRST = 0x10FFF0  # private use: no text has these

    def render(self, messages: Sequence[Message], *, tools: Sequence[object] = (), add_generation_prompt: bool) -> str:
        text = ""
        for message in messages:
            mark = f"<{message['role'][0]}>"
            text += self.mark(mark) + message["content"] + self.mark(mark.replace("<", "</")) + "\n"
        return text + self.mark("<a>") if add_generation_prompt else text

    def tokenize(self, text: str) -> list[Token]:
        return [Token(ord(char), start) for start, char in enumerate(text)]

    def encode_text(self, text: str) -> list[int]:
        return [ord(char) for char in text + self.mark("<end>")]

    def is_special(self, token: int) -> bool:
        return token >= self.FIRST

    def special_texts(self) -> set[str]:
        return {self.mark(name) for name in self.SPECIAL}

    def mark(self, name: str) -> str:
        return chr(self.FIRST + self.SPECIAL.index(name))

    def shown(self, token: int) -> str:
        return self.SPECIAL[token - self.FIRST] if self.is_special(token) else chr(token)


class ForgetfulTokenizer(LetterTokenizer):
    """Rewrites earlier answers, as templates do that drop old reasoning: only the last keeps its words."""

    def render(self, messages: Sequence[Message], *, tools: Sequence[object] = (), add_generation_prompt: bool) -> str:
        last = None if add_generation_prompt else len(messages) - 1
        kept: list[Message] = [
            message if message["role"] != "assistant" or number == last else {"role": "assistant", "content": "…"}
            for number, message in enumerate(messages)
        ]
        return super().render(kept, add_generation_prompt=add_generation_prompt)


@pytest.fixture
def letters() -> LetterTokenizer:
    return LetterTokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines, or text or bytes as they are, and give the path."""

    def write(content: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return path

    return write


def chat(*texts: str) -> dict[str, object]:
    """A row of turns: user, assistant, user, …"""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def backprop(*arguments: str | Path, cwd: Path, **environment: str) -> Done:
    """Run the command line in this process, which has torch loaded already: exit code and both streams."""
    from backprop.cli import run

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        for name, value in environment.items():
            patch.setenv(name, value)
        code = run([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def backprop_process(*arguments: str | Path, cwd: Path, timeout_s: float = 300, **environment: str) -> Done:
    """Run the command line as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "backprop", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the real SmolLM2 tokenizer: 3.3 million weights, nearly all of them embeddings."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    # Wider than the usual 0.02: at this width, no adapter could make one token much likelier than the others.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.25)
    model.save_pretrained(folder)
    for path in (ASSETS / "smollm2-tokenizer").iterdir():
        if path.name != "README.md":
            shutil.copy(path, folder / path.name)
    return folder


def trained_run(model: Path, folder: Path, rows: Sequence[Any], *, steps: int, learning_rate: float = 1e-2) -> Path:
    """Train a tiny model on ``rows`` until it has learnt them, quietly, and give the run directory."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = Trainer(str(model), say=lambda event: None, output=folder / "run")
    return trainer.train(folder / "data.jsonl", steps=steps, batch_size=4, lora_r=16, learning_rate=learning_rate)


def lose_last_tensors(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the last tensors of a file that is quantized on the way be lost, as a disk may lose them."""
    converting = llama_cpp.converting

    @contextmanager
    def faulty(folder: Path, gguf: Path, *, kind: str, through: Sequence[str]) -> Iterator[Callable[[], None]]:
        with converting(folder, gguf, kind=kind, through=through) as finish:

            def finish_badly() -> None:
                finish()
                made = gguf.with_name(name)
                made.write_bytes(made.read_bytes()[:-300_000] + bytes(300_000))

            yield finish_badly

    monkeypatch.setattr(llama_cpp, "converting", faulty)


# One answer to everything, for 16 steps: what a random model of any architecture learns to the end, and then stops.
HERE = [chat(f"What is {n}?", "It is here.") for n in range(6)]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the run directory of a tiny model of an architecture, trained once."""
    from tiny_models import tiny

    @functools.cache
    def taught(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        return trained_run(tiny(architecture, folder / "model"), folder, HERE, steps=16, learning_rate=5e-3)

    return taught


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch and llama.cpp have one thread: for tiny models, waiting for each other costs more than the sums."""
    import torch

    number = torch.get_num_threads()
    monkeypatch.setattr(threads, "cpus", lambda: 1)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def compiled_code_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace anew, and keep what compilers make of the same graphs for later sessions: of two minutes it leaves twenty seconds."""
    import torch

    torch.compiler.reset()
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(COMPILED))


@pytest.fixture(scope="session")
def loaded(tiny_model: Path) -> Any:
    """The tiny model in memory; copy it before changing anything."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


# Rows of very different lengths, so that a mean of means would differ.
UNEVEN = [chat(f"question {n}", "word " * (3 * n + 1)) for n in range(8)]


@dataclass
class Run:
    """A training, finished or failed, and what it said."""

    folder: Path
    said: list[events.Event]

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.said if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.all(events.Step)]

    @property
    def warned(self) -> str:
        return "\n".join(event.message for event in self.all(events.Warned))

    @property
    def failed(self) -> Any:
        (failed,) = self.all(events.Failed)
        return failed


def went_on(train: Callable[..., Run], rows: Sequence[Any], *, step: int, **options: Any) -> Path:
    """Train twice, the second time from a checkpoint of the first: both must end alike, bit for bit. Give the checkpoint."""
    from backprop.edges import rundir

    whole = train(rows, **options, save_steps=step, keep_checkpoints=9)
    assert not whole.all(events.Failed), whole.failed
    adapter, kept = whole.folder / "lora" / "adapter_model.safetensors", whole.folder.parent / "kept"
    expected = rundir.sha256_of(adapter)
    (whole.folder / "checkpoints" / f"step-{step:06d}").rename(kept)
    again = train(rows, **options, resume=str(kept))
    assert [event.step for event in again.all(events.Resumed)] == [step]
    assert again.losses == whole.losses[step:]
    assert rundir.sha256_of(adapter) == expected
    return kept


def plant_in_training(patch: pytest.MonkeyPatch, planted: Callable[[Any, Any], Any]) -> None:
    """Let ``planted`` take the place of a pass's loss while the model trains; evaluations are left as they are."""
    from backprop.engine import objectives

    real = objectives.sum_of_losses
    patch.setattr(objectives, "sum_of_losses", lambda model, one: (planted if model.training else real)(model, one))


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, write: Callable[..., Path]) -> Callable[..., Run]:
    """Train in this process, quietly; what goes wrong is the last that the run said."""

    def train(rows: Sequence[Any] = UNEVEN, model: Path = tiny_model, **options: Any) -> Run:
        run = Run(tmp_path / "run", [])
        trainer = Trainer(str(model), say=run.said.append, output=run.folder)
        defaults = {
            "steps": 3,
            "batch_size": 8,
            "lora_r": 4,
            "learning_rate": 1e-2,
            "overwrite": True,
            "resume": "never",
        }
        try:
            trainer.train(write(list(rows)), **{**defaults, **options})
        except BackpropError as error:
            run.said.append(events.Failed(code=error.code, message=error.message, hint=error.hint or ""))
        return run

    return train
