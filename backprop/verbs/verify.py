"""The exported file is the model that was trained: proved for every file, or the file is rejected."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.core import fidelity
from backprop.core.data.formats import Message
from backprop.core.probes import HARD_STRINGS
from backprop.edges import llama_cpp, rundir
from backprop.engine.proofs import timed
from backprop.errors import ExportError
from backprop.events import Phase, Proved, Sink

if TYPE_CHECKING:
    from backprop.engine.reference import Reference

RECORD = "verification.json"
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

    def check_source(self, gguf: Path, rejected: Path) -> None:
        """Hold the 16-bit file, from which all others are made, to the trained model.

        Raises:
            ExportError: If it is another; the file is then at ``rejected``.
        """
        from backprop.engine.reference import REFUSED

        known = self._reference
        self._say(Phase(name="verifying the 16-bit file"))
        proofs: list[Proved] = []
        prove = self._prover(proofs)
        with llama_cpp.loaded(gguf, context=CONTEXT, all_logits=True) as model:
            prove(
                lambda: fidelity.prove_equal(
                    "texts have the same tokens",
                    [*known.texts, *HARD_STRINGS],
                    [*known.ids, *known.plain_ids],
                    [*map(model.tokenize, known.texts), *(model.tokenize(one, plain=True) for one in HARD_STRINGS)],
                )
            )
            prove(
                lambda: fidelity.prove_equal(
                    "prompts are rendered the same",
                    [_last_of(messages) for messages, _ in known.prompts],
                    known.rendered,
                    [model.render(messages, asks=asks) or REFUSED for messages, asks in known.prompts],
                )
            )
            prove(lambda: fidelity.prove_equal("texts end with the same token", ["the end"], [known.eos], [model.eos]))
            self._of_source = [model.logits(ids) for ids in known.sequences]
            prove(lambda: fidelity.prove_likeness("f16", "the trained model", known.trained, self._of_source))
            prove(lambda: fidelity.prove_adapter(known.base, known.trained, self._of_source))
            prove(lambda: self._prove_replies("f16", model))
        self._settle("f16", proofs, gguf, rejected)

    def check(self, kind: str, gguf: Path, rejected: Path) -> None:
        """Hold a file to the 16-bit one.

        Raises:
            ExportError: If it is another; the file is then at ``rejected``.
        """
        if kind == "f16":
            return
        self._say(Phase(name=f"verifying {kind}"))
        known, proofs = self._reference, list[Proved]()
        prove = self._prover(proofs)
        with llama_cpp.loaded(gguf, context=CONTEXT, all_logits=True) as model:
            found = [model.logits(ids) for ids in known.sequences]
            prove(lambda: fidelity.prove_likeness(kind, "the 16-bit file", self._of_source, found))
            prove(lambda: self._prove_replies(kind, model))
        self._settle(kind, proofs, gguf, rejected)

    def _prover(self, proofs: list[Proved]) -> Callable[[Callable[[], Proved]], None]:
        """Give a function that times a proof, tells it and adds it to ``proofs``."""

        def prove(proof: Callable[[], Proved]) -> None:
            proofs.append(timed(proof))
            self._say(proofs[-1])

        return prove

    def _prove_replies(self, kind: str, model: llama_cpp.Loaded) -> Proved:
        from backprop.engine.reference import ANSWER_TOKENS

        known = self._reference
        found = [model.reply(messages, max_tokens=ANSWER_TOKENS) for messages in known.questions]
        return fidelity.prove_replies(kind, [_last_of(one) for one in known.questions], known.replies, found)

    def _settle(self, kind: str, proofs: Sequence[Proved], gguf: Path, rejected: Path) -> None:
        before = _read(self._output)
        known = before["proofs"] if before.get("adapter") == self._adapter else {}
        made = {**known, kind: [asdict(proof) for proof in proofs]}
        _write(self._output, {"adapter": self._adapter, "proofs": made})
        failed = next((proof for proof in proofs if not proof.ok), None)
        if failed is not None:
            os.replace(gguf, rejected)
            raise ExportError(
                f"not proved: {failed.name}: {failed.found}",
                hint=f"the file is kept as `{rejected}`; if you mean it, add `--no-verify`",
            )


def forget(output: Path, kinds: Iterable[str]) -> None:
    """Drop the proofs of files that are about to be made without any."""
    record = _read(output)
    if record:
        kept = {kind: proofs for kind, proofs in record["proofs"].items() if kind not in set(kinds)}
        _write(output, {**record, "proofs": kept})


def _read(output: Path) -> dict[str, Any]:
    try:
        record = json.loads((output / RECORD).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("proofs"), dict) else {}


def _write(output: Path, record: dict[str, Any]) -> None:
    rundir.write_text(output / RECORD, json.dumps(record, indent=2) + "\n")


def _last_of(messages: Sequence[Message]) -> str:
    return str(messages[-1]["content"]) if messages else ""
