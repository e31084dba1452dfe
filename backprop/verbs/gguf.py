"""GGUF files of an adapter: merged, converted, quantized, and each held to the model that was trained."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from backprop.config import ExportConfig
from backprop.edges import llama_cpp, rundir
from backprop.errors import ExportError
from backprop.events import Exported, Phase, Sink
from backprop.verbs.records import record
from backprop.verbs.source import Adapter

REJECTED = ".rejected"
"""What the name of a file ends with that is not the model that was trained."""


def export_gguf(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> None:
    from backprop.engine import loop, merge
    from backprop.engine.reference import refer
    from backprop.verbs.verify import Verifier, forget

    loop.quieten()
    for old in adapter.output.glob(f"*{REJECTED}"):
        if old.name.startswith(f"{adapter.name}-"):
            old.unlink()
    with TemporaryDirectory(prefix=f"{rundir.MARK}export-", dir=adapter.output) as scratch:
        checkpoint = Path(scratch) / "merged"
        say(Phase(name="merging the adapter"))
        model, tokenizer = merge.load_adapted(adapter.base, adapter.folder, trust_remote_code=config.trust_remote_code)
        verifier: Verifier | None = None
        if config.verify:
            say(Phase(name="asking the trained model what its copies will be asked"))
            reference = refer(model, tokenizer, adapter.probes)
            verifier = Verifier(reference, adapter.output, adapter_sha256=adapter.sha256, say=say)
        else:
            forget(adapter.output, targets)
        merge.write_merged(model, tokenizer, checkpoint)
        del model
        say(Phase(name="converting to GGUF"))
        # Quantizing starts from 16 bits or more; a file that is wanted as it is serves as the source too.
        source = Path(scratch) / "f16.gguf"
        llama_cpp.convert(checkpoint, source, kind="f16")
        if verifier:
            verifier.check_source(source, adapter.output / f"{adapter.name}-f16.gguf{REJECTED}")
        for kind, target in targets.items():
            say(Phase(name=f"writing {kind}"))
            with rundir.whole(target) as beside:
                if kind == "f16":
                    beside.hardlink_to(source)
                elif kind in llama_cpp.CONVERTED:
                    llama_cpp.convert(checkpoint, beside, kind=kind)
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
