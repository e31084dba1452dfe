"""llama.cpp: its converters, quantizer and inference, all of one release.

The bindings (package `llama-cpp-python`) bring quantizer and inference. The converter is Python in the source release
of the same version, unpacked beside them by `python -m backprop.edges.llama_cpp_build`.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from backprop.core.data.formats import Message
from backprop.core.data.render import strftime_now
from backprop.core.fidelity import Reply, have_parted
from backprop.edges import process, stopping, threads
from backprop.edges.places import LLAMA_CPP_VERSION, llama_cpp_home, llama_library, llama_programs
from backprop.errors import DiskError, ExportError, ToolError

BUILD_HINT = "python -m backprop.edges.llama_cpp_build"
CONVERTED = ("f32", "f16", "bf16")
"""Types that the converter writes; all others are quantized from f16."""
HINT = "\nhint: "
"""What stands before a hint in the last words of a converter that knows better."""
DRAFTED = 16
"""Tokens of an expected answer that are looked at together: their number costs little where weights are read from memory."""
# Large models take hours where all is quantized on the way: 4 million weights a second on a core to iq3_s. Windows waits no
# longer than 49 days.
CONVERTING_MOST_S = 7 * 24 * 3600


def bindings() -> Any:
    """Import the bindings, over the library that was compiled for them if there is one.

    Raises:
        ToolError: If they are missing or of another release than the converter.
    """
    own = llama_library("llama").is_file()
    if own:
        os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(llama_programs()))
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ToolError(f"export needs llama.cpp's bindings: {error}", hint=BUILD_HINT) from error
    if llama_cpp.__version__ != LLAMA_CPP_VERSION:
        raise ToolError(
            f"llama-cpp-python is {llama_cpp.__version__}, and the converter is of {LLAMA_CPP_VERSION}", hint=BUILD_HINT
        )
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # else each backend that is loaded is told
    # Its template is held to what was rendered in training, on that day.
    llama_cpp.llama_chat_format.Jinja2ChatFormatter.strftime_now = staticmethod(strftime_now)
    if own:
        _load_backends()
    return llama_cpp


def _load_backends() -> None:
    """Let a build that has its backends in files of their own choose those that fit this machine."""
    ggml = ctypes.CDLL(str(llama_library("ggml")))
    if not ggml.ggml_backend_reg_count():
        ggml.ggml_backend_load_all_from_path(str(llama_programs()).encode())


def converter() -> Path:
    """Find the converter script.

    Raises:
        ToolError: If it is missing.
    """
    script = llama_cpp_home() / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ToolError(f"llama.cpp's converter is not in `{llama_cpp_home()}`", hint=BUILD_HINT)
    return script


def convert(folder: Path, gguf: Path, *, kind: str, through: Sequence[str] = ()) -> None:
    """Turn a Hugging Face checkpoint into GGUF; as `converting`, and wait for it."""
    with converting(folder, gguf, kind=kind, through=through) as finish:
        finish()


@contextlib.contextmanager
def converting(folder: Path, gguf: Path, *, kind: str, through: Sequence[str] = ()) -> Generator[Callable[[], None]]:
    """Turn a Hugging Face checkpoint into GGUF beside the block, which is given what waits for it; its model card goes into the metadata.

    Args:
        kind: One of `CONVERTED`.
        through: Arguments of Python before the converter's own: a program that runs it.

    Raises:
        ExportError: If the converter does not know the model, with its own last words.
    """
    script = converter()
    argv = [sys.executable, *through, str(script), str(folder), "--outfile", str(gguf), "--outtype", kind]
    with process.running(argv, env=_environment(script), timeout_s=CONVERTING_MOST_S) as finish:

        def wait() -> None:
            try:
                finish()
            except ToolError as error:
                told, _, hint = error.message.partition(HINT)
                raise ExportError(
                    f"llama.cpp cannot convert this model: {told}", hint=hint or "see `--format safetensors`"
                ) from error

        yield wait


def convert_adapter(folder: Path, base: Path, gguf: Path, *, kind: str) -> None:
    """Turn a PEFT adapter into GGUF; its model card goes into the metadata.

    Args:
        base: Folder of the base model's configuration and tokenizer.
        kind: f32, f16, bf16 or q8_0.

    Raises:
        ExportError: If the converter does not know the adapter, with its own last words.
    """
    script = converter().with_name("convert_lora_to_gguf.py")
    try:
        argv = [
            sys.executable,
            str(script),
            str(folder),
            "--base",
            str(base),
            "--outfile",
            str(gguf),
            "--outtype",
            kind,
        ]
        process.run(argv, env=_environment(script))
    except ToolError as error:
        raise ExportError(
            f"llama.cpp cannot convert this adapter: {error.message}", hint="leave out `--format lora-gguf`"
        ) from error


def _environment(script: Path) -> dict[str, str]:
    """Give a converter its own gguf package: the one on the index, of the same version number, is another."""
    paths = (str(script.parent / "gguf-py"), os.environ.get("PYTHONPATH"))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def ftype_of(quantization: str) -> int:
    """Give llama.cpp's number of a file's type."""
    return int(getattr(bindings(), f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}"))


def quantize(source: Path, target: Path, *, quantization: str) -> None:
    """Quantize a GGUF file of 16 or 32 bits.

    Raises:
        ExportError: If llama.cpp refuses.
    """
    llama_cpp = bindings()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = ftype_of(quantization)
    parameters.nthread = threads.cpus()
    with _quiet():
        code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    if code != 0 and shutil.disk_usage(target.parent).free < source.stat().st_size:
        raise DiskError(f"`{target}` cannot be written: the disk is nearly full", hint="make room, or `--output`")
    if code != 0 or not target.is_file():
        raise ExportError(f"llama.cpp did not quantize to {quantization}: code {code}", hint="run `backprop doctor`")


TINY_MODEL = """
import sys, gguf, numpy
writer = gguf.GGUFWriter(sys.argv[1], "llama")
for add, value in ((writer.add_block_count, 1), (writer.add_context_length, 8), (writer.add_embedding_length, 256),
                   (writer.add_feed_forward_length, 256), (writer.add_head_count, 4), (writer.add_layer_norm_rms_eps, 1e-5)):
    add(value)
for name in ("token_embd", "output", "blk.0.attn_q", "blk.0.ffn_down"):
    writer.add_tensor(name + ".weight", numpy.ones((256, 256), numpy.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


def quantize_tiny(folder: Path) -> int:
    """Write a model of four matrices to ``folder``, quantize it, and give the size of the result in bytes.

    Raises:
        ToolError: If the converter's own GGUF package is missing or broken.
        ExportError: If the quantizer does not work.
    """
    source, target = write_tiny(folder), folder / "tiny-q4_k_m.gguf"
    quantize(source, target, quantization="q4_k_m")
    return target.stat().st_size


def write_tiny(folder: Path) -> Path:
    """Write a model of four matrices to ``folder``.

    Raises:
        ToolError: If the converter's own GGUF package is missing or broken.
    """
    source = folder / "tiny.gguf"
    env = {**os.environ, "PYTHONPATH": str(converter().parent / "gguf-py")}
    process.run([sys.executable, "-c", TINY_MODEL, str(source)], env=env, timeout_s=60)
    return source


class _Draft:
    """What an answer is likely to go on with, as long as it has been right."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._prompt: int | None = None

    def __call__(self, input_ids: Any, /, **_: Any) -> Any:
        import numpy as np

        if self._prompt is None:  # asked once the first token of the answer is there
            self._prompt = len(input_ids) - 1
        answered = input_ids[self._prompt :]
        right = self._tokens[: len(answered)] == answered.tolist()
        return np.array(self._tokens[len(answered) :][:DRAFTED] if right else [], dtype=np.intc)


class Loaded:
    """A GGUF in memory, as any program that is built on llama.cpp sees it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def reply(self, messages: Sequence[Message], *, max_tokens: int = 64, expected: Reply | None = None) -> Reply:
        """Answer a conversation greedily, with the chat template in the file.

        Args:
            expected: An answer that this one is to be held to: no further than where they part, and faster before that.

        Raises:
            ExportError: If the template refuses these turns, or they are too long.
        """
        from jinja2 import TemplateError

        text, ended = "", None
        try:
            with _quiet(), self._drafting(() if expected is None else expected.tokens):
                pieces = self._model.create_chat_completion(
                    messages=list(messages), temperature=0.0, repeat_penalty=1.0, max_tokens=max_tokens, stream=True
                )
                for piece in pieces:
                    choice = piece["choices"][0]
                    text += choice["delta"].get("content") or ""
                    ended = choice["finish_reason"]
                    if expected is not None and have_parted(expected, text.strip()):
                        break
        except (TemplateError, ValueError) as error:
            raise ExportError(f"llama.cpp cannot be asked this: {error}", hint="ask another `--question`") from error
        return Reply(text=text.strip(), stopped=ended == "stop")

    @contextlib.contextmanager
    def _drafting(self, tokens: Sequence[int]) -> Generator[None]:
        """Let llama.cpp look at several likely tokens at once, of which it takes those that it would have taken one by one."""
        inner = self._model
        goes_back = not (inner._is_recurrent or inner._is_hybrid)  # forgets a token that it has seen
        inner.draft_model = _Draft(tokens) if tokens and inner._logits_all and goes_back else None
        try:
            yield
        finally:
            inner.draft_model = None

    def tokenize(self, text: str, *, plain: bool = False) -> list[int]:
        """Tokenise a text as it is; or a plain one, with the tokens that the file adds."""
        if not text and not plain:
            return []
        with _quiet():
            return [int(token) for token in self._model.tokenize(text.encode(), add_bos=plain, special=True)]

    @property
    def eos(self) -> int:
        """The token that ends a text, as the file has it."""
        return int(self._model.token_eos())

    @property
    def vocabulary(self) -> int:
        """How many tokens the file has; another one's number makes llama.cpp fail."""
        return int(self._model.n_vocab())

    def render(self, messages: Sequence[Message], *, asks: bool) -> str | None:
        """Apply the chat template in the file; None if it refuses these turns.

        Raises:
            ExportError: If the file has none.
        """
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self._model.metadata.get("tokenizer.chat_template")
        if template is None:
            raise ExportError("the file has no chat template", hint="please report it")
        inner = self._model._model
        eos, bos = (
            inner.token_get_text(token) if token >= 0 else "" for token in (inner.token_eos(), inner.token_bos())
        )
        formatter: Any = Jinja2ChatFormatter
        try:
            made = formatter(template, eos_token=eos, bos_token=bos, add_generation_prompt=asks)
            return str(made(messages=list(messages)).prompt)
        except (TemplateError, ValueError, TypeError, AttributeError, KeyError, IndexError):
            return None

    def logits(self, ids: Sequence[int]) -> Any:
        """Give the logits of a text, of shape (T, V), float32."""
        with _quiet():
            self._model.reset()
            self._model.eval(list(ids))
        return self._model.scores[: len(ids)].copy()


@contextlib.contextmanager
def loaded(
    gguf: Path, *, context: int = 1024, all_logits: bool = False, adapter: Path | None = None
) -> Generator[Loaded]:
    """Load a GGUF for the length of the block.

    Args:
        adapter: A GGUF of `convert_adapter`, to apply to it.
        context: Tokens that a conversation may have.
        all_logits: Keep those of every position, for `Loaded.logits`.

    Raises:
        ExportError: If llama.cpp cannot load the file.
    """
    llama_cpp = bindings()
    number = threads.cpus()
    with _quiet():
        try:
            model = llama_cpp.Llama(
                str(gguf),
                n_ctx=context,
                logits_all=all_logits,
                lora_path=None if adapter is None else str(adapter),
                n_threads=number,
                n_threads_batch=number,
                # No GPU, also where there is one: its kernels round by more than the proof allows.
                split_mode=llama_cpp.LLAMA_SPLIT_MODE_NONE,
                main_gpu=-1,
                verbose=False,
                seed=0,
            )
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            raise ExportError(f"llama.cpp cannot load `{gguf}`: {error}", hint="export it again") from error
    if "chat_template.default" in model._chat_handlers:  # else a well-known template is replaced by one that is like it
        model.chat_format = "chat_template.default"
    try:
        yield Loaded(model)
    finally:
        with _quiet():
            model.close()


def ask(gguf: Path, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 64) -> list[Reply]:
    """Load a GGUF and answer each conversation greedily, with the chat template in the file.

    Raises:
        ExportError: If llama.cpp cannot load the file.
    """
    most_bytes = max(sum(len(str(one["content"]).encode()) for one in turns) for turns in conversations)
    with loaded(gguf, context=1024 + most_bytes) as model:
        return [model.reply(messages, max_tokens=max_tokens) for messages in conversations]


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Send what the library prints from C to nowhere; stdout carries results only."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def be_heard(*_: object) -> None:
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)

    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with stopping.ends_with(be_heard):
            yield
    finally:
        be_heard()
        for descriptor in (*saved, nowhere):
            os.close(descriptor)
