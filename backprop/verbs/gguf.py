"""GGUF files of an adapter: merged, converted, quantized, and each held to the model that was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.config import ExportConfig
from backprop.edges import llama_cpp, rundir
from backprop.errors import ExportError
from backprop.events import Exported, Phase, Sink
from backprop.verbs.records import record
from backprop.verbs.source import Adapter
from backprop.verbs.verify import REJECTED, forget, verifier_for


def export_gguf(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> None:
    """Write the files that are missing.

    Raises:
        ExportError: If a step fails, or a file is not the model that was trained.
    """
    from backprop.engine import loop
    from backprop.engine.streamed import Merger

    loop.quieten()
    for old in adapter.output.glob(f"*{REJECTED}"):
        if old.name.startswith(f"{adapter.name}-"):
            old.unlink()
    with TemporaryDirectory(prefix=f"{rundir.MARK}export-", dir=adapter.output) as scratch:
        say(Phase(name="merging and converting to GGUF"))
        inputs = _lay_out(adapter, Path(scratch) / "merged", config, say)
        # Quantizing starts from 16 bits or more; a file that is wanted as it is serves as the source too.
        source = Path(scratch) / "f16.gguf"
        with llama_cpp.converting(inputs.folder, source, kind="f16", through=inputs.through) as finish:
            Merger(
                Path(adapter.base), adapter.folder, trust_remote_code=config.trust_remote_code
            )  # or refuse the adapter
            verifier = verifier_for(adapter, config, say) if config.verify else None
            if verifier is None:
                forget(adapter.output, targets)
            finish()
        if verifier:
            verifier.check_source(source, adapter.output / f"{adapter.name}-f16.gguf{REJECTED}")
        for kind, target in targets.items():
            say(Phase(name=f"writing {kind}"))
            with rundir.whole(target) as beside:
                if kind == "f16":
                    beside.hardlink_to(source)
                elif kind in llama_cpp.CONVERTED:
                    llama_cpp.convert(inputs.folder, beside, kind=kind, through=inputs.through)
                else:
                    llama_cpp.quantize(source, beside, quantization=kind)
                if verifier:
                    verifier.check(kind, beside, target.with_name(target.name + REJECTED))
                answer = llama_cpp.ask(beside, [[{"role": "user", "content": adapter.question}]])[0]
                if not answer.text:
                    raise ExportError(
                        f"the {kind} file gave no answer to {adapter.question!r}",
                        hint="ask another `--question`, or train longer",
                    )
                told = Exported(
                    path=str(target),
                    format="gguf",
                    quantization=kind,
                    size_bytes=beside.stat().st_size,
                    question=adapter.question,
                    answer=answer.text,
                )
                record(adapter, target, beside, told, verified=config.verify)
            say(told)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """What the converter is given."""

    folder: Path
    through: tuple[str, ...]
    """The program that merges what it reads; empty if the folder is merged already."""


def _lay_out(adapter: Adapter, folder: Path, config: ExportConfig, say: Sink) -> _Inputs:
    """Let the converter merge the weights one by one, or merge them for it where they are stored in another way."""
    from backprop.engine import merge, streamed

    base, trust = Path(adapter.base), config.trust_remote_code
    why_not = streamed.why_not(base, adapter.folder)
    if why_not:
        say(Phase(name=f"merging the adapter in memory: {why_not}"))
        merge.merge(adapter.base, adapter.folder, folder, trust_remote_code=trust)
        return _Inputs(folder=folder, through=())
    tokenizer = merge.adapted_tokenizer(adapter.folder, trust_remote_code=trust)
    streamed.lay_out(base, tokenizer, folder)
    streamed.link_weights(base, folder)
    program = ("-m", streamed.__name__, adapter.base, str(adapter.folder), "trust" if trust else "")
    return _Inputs(folder=folder, through=program)
