"""The exported file is the model that was trained: proved for every file, or the file is rejected."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.config import ExportConfig
from backprop.core import fidelity
from backprop.core.data.formats import Message
from backprop.core.placement import Placement, needed_bytes, place
from backprop.edges import device, llama_cpp, rundir
from backprop.engine.proofs import timed
from backprop.errors import ExportError, RejectedError
from backprop.events import Phase, Proved, Sink, Warned
from backprop.verbs.source import Adapter

if TYPE_CHECKING:
    from backprop.engine.four_bit import Rounding
    from backprop.engine.load import HfTokenizer
    from backprop.engine.reference import Checkpoint, Reference

Prover = Callable[[Callable[[], Proved]], None]

RECORD = "verification.json"
REJECTED = ".rejected"
"""What the name of a file ends with that is not the model that was trained."""
CONTEXT = 512
"""Tokens: the longest text whose logits are compared, or a question and its answer."""


class Verifier:
    """Holds files to the trained model, and writes down what it found.

    Args:
        output: Where `verification.json` goes.
        adapter_sha256: Of the adapter; proofs of another are forgotten.
    """

    def __init__(self, reference: "Reference", output: Path, *, adapter_sha256: str, say: Sink) -> None:
        self._reference, self._output, self._adapter, self._say = reference, output, adapter_sha256, say
        self._of_source: list[Any] = []
        trained, rounded = reference.trained, reference.rounded
        self._noise = fidelity.likeness(trained, rounded) if trained else None

    def check_source(self, gguf: Path, rejected: Path) -> None:
        """Hold the 16-bit file, from which all others are made, to the trained model.

        Raises:
            RejectedError: If it is another; the file is then at ``rejected``.
        """
        self._say(Phase(name="verifying the 16-bit file"))
        with llama_cpp.loaded(gguf, context=CONTEXT, all_logits=True) as model:
            proofs, self._of_source = self._prove_copy("f16", model)
        self._reference = replace(self._reference, trained=[], base=[], rounded=[])  # other files are held to this one
        self._settle("f16", proofs, gguf, rejected)

    def check_checkpoint(self, folder: Path, model: "Checkpoint", rejected: Path) -> None:
        """Hold a checkpoint, loaded as ``model``, to the trained one.

        Raises:
            RejectedError: If it is another; the folder is then at ``rejected``.
        """
        self._say(Phase(name="verifying the checkpoint"))
        proofs, _ = self._prove_copy("bf16", model)
        self._settle("safetensors", proofs, folder, rejected)

    def _prove_copy(self, kind: str, model: "llama_cpp.Loaded | Checkpoint") -> tuple[list[Proved], list[Any]]:
        """Hold all that a copy does to what the trained model did; give its logits too."""
        known, proofs = self._reference, list[Proved]()
        prove = self._prover(proofs)
        prove(
            lambda: fidelity.prove_equal(
                "the vocabulary is whole", ["the number of tokens"], [known.vocabulary], [model.vocabulary]
            )
        )
        if not proofs[-1].ok:
            return proofs, []
        self._prove_words(model, prove)
        found = [model.logits(ids) for ids in known.sequences]
        self._prove_weights(kind, found, prove)
        prove(lambda: self._prove_replies(kind, model))
        return proofs, found

    def _prove_weights(self, kind: str, found: Sequence[Any], prove: Prover) -> None:
        """Prove that logits are those of the trained model, with the adapter in them once."""
        known = self._reference
        prove(lambda: fidelity.prove_likeness(kind, "the trained model", known.trained, found, noise=self._noise))
        prove(lambda: fidelity.prove_adapter(known.base, known.trained, found))

    def _prove_words(self, model: "llama_cpp.Loaded | Checkpoint", prove: Prover) -> None:
        """Prove tokenizer, template and end token."""
        from backprop.engine.reference import REFUSED

        known = self._reference
        prove(lambda: self._prove_tokens(model))
        prove(
            lambda: fidelity.prove_equal(
                "prompts are rendered the same",
                [_last_of(messages) for messages, _ in known.prompts],
                known.rendered,
                [model.render(messages, asks=asks) or REFUSED for messages, asks in known.prompts],
            )
        )
        prove(lambda: fidelity.prove_equal("texts end with the same token", ["the end"], [known.eos], [model.eos]))

    def _prove_tokens(self, model: "llama_cpp.Loaded | Checkpoint") -> Proved:
        known = self._reference
        proof = fidelity.prove_equal(
            "texts have the same tokens",
            [*known.texts, *known.hard],
            [*known.ids, *known.plain_ids],
            [*map(model.tokenize, known.texts), *(model.tokenize(one, plain=True) for one in known.hard)],
        )
        if not known.taken_out:
            return proof
        words = " ".join(f"`{word}`" for word in known.taken_out)
        return replace(proof, found=f"{proof.found}; without {words}, an end to llama.cpp in any file")

    def check(self, kind: str, gguf: Path, rejected: Path) -> None:
        """Hold a file to the 16-bit one.

        Raises:
            RejectedError: If it is another; the file is then at ``rejected``.
        """
        if kind == "f16":
            return
        self._say(Phase(name=f"verifying {kind}"))
        known, proofs = self._reference, list[Proved]()
        prove = self._prover(proofs)
        with llama_cpp.loaded(gguf, context=CONTEXT, all_logits=True) as model:
            found = [model.logits(ids) for ids in known.sequences]
            # f32 differs from f16 by the rounding itself.
            noise = self._noise if kind in llama_cpp.CONVERTED else None
            prove(lambda: fidelity.prove_likeness(kind, "the 16-bit file", self._of_source, found, noise=noise))
            prove(lambda: self._prove_replies(kind, model))
        self._settle(kind, proofs, gguf, rejected)

    def measure(self, gguf: Path) -> fidelity.Likeness:
        """Say how near a file is to the 16-bit one, which `check_source` has looked at."""
        with llama_cpp.loaded(gguf, context=CONTEXT, all_logits=True) as model:
            return fidelity.likeness(self._of_source, [model.logits(ids) for ids in self._reference.sequences])

    def check_adapter(self, kind: str, base: Path, gguf: Path, rejected: Path) -> None:
        """Hold an adapter alone, applied to the 16-bit file of its base model, to the trained model.

        Raises:
            RejectedError: If it is another; the adapter is then at ``rejected``.
        """
        self._say(Phase(name=f"verifying {kind}"))
        known, proofs = self._reference, list[Proved]()
        prove = self._prover(proofs)
        with llama_cpp.loaded(base, context=CONTEXT, all_logits=True, adapter=gguf) as model:
            found = [model.logits(ids) for ids in known.sequences]
            self._prove_weights(kind, found, prove)
            prove(lambda: self._prove_replies(kind, model))
        self._settle(kind, proofs, gguf, rejected)

    def _prover(self, proofs: list[Proved]) -> Prover:
        """Give a function that times a proof, tells it and adds it to ``proofs``."""

        def prove(proof: Callable[[], Proved]) -> None:
            proofs.append(timed(proof))
            self._say(proofs[-1])

        return prove

    def _prove_replies(self, kind: str, model: "llama_cpp.Loaded | Checkpoint") -> Proved:
        from backprop.engine.reference import ANSWER_TOKENS

        known = self._reference
        # The first answer is computed a token at a time, as for anyone who asks.
        likely = [replace(one, tokens=one.tokens if number else ()) for number, one in enumerate(known.replies)]
        found = [
            model.reply(messages, max_tokens=ANSWER_TOKENS, expected=one)
            for messages, one in zip(known.questions, likely, strict=True)
        ]
        return fidelity.prove_replies(kind, [_last_of(one) for one in known.questions], known.replies, found)

    def _settle(self, kind: str, proofs: Sequence[Proved], copy: Path, rejected: Path) -> None:
        before = _read(self._output)
        known = before["proofs"] if before.get("adapter") == self._adapter else {}
        made = {**known, kind: [asdict(proof) for proof in proofs]}
        _write(self._output, {"adapter": self._adapter, "proofs": made})
        failed = next((proof for proof in proofs if not proof.ok), None)
        if failed is not None:
            os.replace(copy, rejected)
            raise RejectedError(
                f"not proved: {failed.name}: {failed.found}",
                hint=f"it is kept as `{rejected}`; if you mean it, add `--no-verify`",
            )


def verifier_for(
    adapter: Adapter,
    tokenizer: "HfTokenizer",
    kinds: Iterable[str],
    config: ExportConfig,
    say: Sink,
    *,
    rounding: "Rounding | None" = None,
) -> Verifier | None:
    """Ask the trained model, and forget it, before anything else needs its memory; nothing with `--no-verify`.

    Args:
        tokenizer: The adapter's.
        rounding: Of the base model's weights.

    Raises:
        ExportError: If the adapter does not belong to its base model, or there is no room for that.
    """
    if not config.verify:
        forget(adapter.output, kinds)
        return None
    from backprop.engine.merge import load_adapted
    from backprop.engine.reference import refer

    refuse_foreign(adapter, config)
    trust = config.trust_remote_code
    where = room_for(Path(adapter.base))
    say(Phase(name=f"asking the trained model what its copies will be asked: {where.dtype} on {where.device}"))
    model = load_adapted(
        adapter.base,
        adapter.folder,
        dtype=where.dtype,
        device=where.device,
        rounding=rounding,
        trust_remote_code=trust,
    )
    reference = refer(model, tokenizer, adapter.probes)
    if reference.cut:
        words = " ".join(f"`{word}`" for word in reference.taken_out)
        told = f"{reference.cut} of the conversations that files are asked hold it: leave it out of your rows"
        say(Warned(message=f"llama.cpp and Ollama end an answer at {words}, whatever a file says; {told}"))
    return Verifier(reference, adapter.output, adapter_sha256=adapter.sha256, say=say)


def refuse_foreign(adapter: Adapter, config: ExportConfig) -> None:
    """See that the adapter belongs to its base model, without reading weights of that.

    Raises:
        ExportError: If it does not, or changes nothing.
    """
    from backprop.engine.streamed import Merger, shapes_in, words_brought

    if words_brought(shapes_in(Path(adapter.base)), adapter.folder):
        return  # it is seen when the base is loaded, and its vocabulary made as large
    Merger(Path(adapter.base), adapter.folder, trust_remote_code=config.trust_remote_code)


def room_for(folder: Path) -> Placement:
    """Find a place for the model in a folder, to be asked.

    Raises:
        ExportError: If there is none.
    """
    from backprop.engine.streamed import size_of

    num_weights, stored = size_of(folder)
    gpus, memory = [gpu.memory_free_bytes for gpu in device.probe().gpus], device.memory_free_bytes()
    found = place(num_weights, stored=stored, gpu_free_bytes=gpus, memory_free_bytes=memory)
    if found is None:
        need = needed_bytes(num_weights, stored)
        raise ExportError(
            f"the model that files are held to needs {need / 2**30:.1f} GiB, and {memory / 2**30:.1f} GiB are free",
            hint="free memory, or export to GGUF with `--no-verify`",
        )
    return found


def forget(output: Path, kinds: Iterable[str]) -> None:
    """Drop the proofs of files that are about to be made without any."""
    record = _read(output)
    if record:
        kept = {kind: proofs for kind, proofs in record["proofs"].items() if kind not in set(kinds)}
        _write(output, {**record, "proofs": kept})


def _read(output: Path) -> dict[str, Any]:
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("proofs"), dict) else {}


def _write(output: Path, record: dict[str, Any]) -> None:
    rundir.write_text(output / RECORD, json.dumps(record, indent=2) + "\n")


def _last_of(messages: Sequence[Message]) -> str:
    return str(messages[-1]["content"]) if messages else ""
