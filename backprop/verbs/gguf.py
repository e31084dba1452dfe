"""GGUF files of an adapter: merged, converted, quantized, and each held to the model that was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import get_args

from backprop.config import ExportConfig, Quantization
from backprop.edges import llama_cpp, llama_tools, rundir
from backprop.engine import streamed
from backprop.engine.four_bit import Rounding
from backprop.engine.load import HfTokenizer
from backprop.errors import RejectedError, UsageError
from backprop.events import Phase, Sink, Warned
from backprop.verbs import bases, budget, importance
from backprop.verbs.card import write_card
from backprop.verbs.records import answered, record, refuse_others, remember_choice
from backprop.verbs.source import Adapter
from backprop.verbs.verify import REJECTED, Verifier, room_for, verifier_for


def export_gguf(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> Mapping[str, Path]:
    """Write the files that are missing; with `--budget`, the one that it chooses. Give them.

    Raises:
        UsageError: If the file that `--budget` chooses is another's, or none fits.
        RejectedError: If a file is not the model that was trained; with `--budget`, if none is.
        ExportError: If a step fails.
    """
    from backprop.engine import loop

    loop.quieten()
    forget_rejected(adapter)
    with rundir.scratch(adapter.output) as scratch:
        if config.verify:
            room_for(Path(adapter.base))
        rounding = bases.nearest_base(adapter, config, say)
        say(Phase(name="merging and converting to GGUF"))
        inputs = lay_out(adapter, scratch, config, say, rounding=rounding)
        # Quantizing starts from 16 bits or more; a file that is wanted as it is serves as the source too.
        source = scratch / "f16.gguf"
        with llama_cpp.converting(inputs.folder, source, kind="f16", through=inputs.through) as finish:
            verifier = verifier_for(adapter, targets, config, say, rounding=rounding)
            finish()
        if verifier:
            verifier.check_source(source, adapter.output / f"{adapter.name}-f16.gguf{REJECTED}")
        by_imatrix = any(importance.matters(kind, config) for kind in targets or budget.to_make(config, source))
        imatrix = importance.find(adapter, config, inputs.tokenizer, source, say) if by_imatrix else None
        made = {"f16": source}
        base = bases.name_of(rounding, adapter, config)
        maker = Maker(adapter, config, inputs, made, imatrix, verifier, base, scratch, say)
        if config.budget and verifier and not targets:
            ranked, nearest = budget.rank(config, source, verifier, imatrix, say)
            made[ranked[0]] = nearest
            return _write_nearest(ranked, maker)
        for kind, target in targets.items():
            maker.write(kind, target)
            if config.budget:
                remember_choice(adapter, config, kind)
    return targets


def _write_nearest(ranked: Sequence[str], maker: "Maker") -> Mapping[str, Path]:
    """Write the file of the first type that is proved, of those that `budget.rank` named, and remember the choice.

    Raises:
        UsageError: If a file of that name was made otherwise.
        RejectedError: If none is proved.
    """
    adapter, config = maker.adapter, maker.config
    for kind, following in zip_longest(ranked, ranked[1:]):
        target = target_of(kind, adapter, config)
        done = {} if config.overwrite else refuse_others(adapter, {kind: target}, config)
        for exported in done.values():
            maker.say(exported)
        try:
            if not done:
                maker.write(kind, target)
        except RejectedError as error:
            if following is None:
                tried = f"of the types tried for `--budget` none is left ({', '.join(ranked)}); of the last: "
                raise RejectedError(f"{tried if len(ranked) > 1 else ''}{error.message}", hint=error.hint) from error
            maker.say(Warned(message=f"{kind} is not taken: {error.message}; the next nearest is {following}"))
            continue
        remember_choice(adapter, config, kind)
        return {kind: target}
    raise AssertionError("no type was ranked")


@dataclass(frozen=True)
class Maker:
    """Writes one file after the other."""

    adapter: Adapter
    config: ExportConfig
    inputs: "Inputs"
    made: Mapping[str, Path]
    """Files that are there already, by their type: the 16-bit one at least."""
    imatrix: Path | None
    verifier: Verifier | None
    base: str | None
    scratch: Path
    say: Sink

    def write(self, kind: str, target: Path) -> None:
        """Make a file, hold it to the trained model, ask it, and only then give it its name."""
        adapter, config = self.adapter, self.config
        self.say(Phase(name=f"writing {kind}"))
        with rundir.whole(target) as beside:
            gguf = self.scratch / f"whole-{kind}.gguf" if config.split_size else beside
            self._make(kind, gguf)
            if self.verifier:
                self.verifier.check(kind, gguf, adapter.output / f"{adapter.name}-{kind}.gguf{REJECTED}")
            if config.split_size:
                whole, gguf = gguf, llama_tools.split(gguf, beside, name=target.name, size=config.split_size)
                whole.unlink()
            (reply,) = llama_cpp.ask(gguf, [[{"role": "user", "content": adapter.question}]])
            told = answered(adapter, reply.text, target, beside, format="gguf", quantization=kind)
            record(adapter, target, beside, told, config, base=self.base)
        self.say(told)

    def _make(self, kind: str, gguf: Path) -> None:
        if kind in self.made:
            gguf.hardlink_to(self.made[kind])
        elif kind in llama_cpp.CONVERTED:
            llama_cpp.convert(self.inputs.folder, gguf, kind=kind, through=self.inputs.through)
        else:
            by = self.imatrix if importance.matters(kind, self.config) else None
            budget.quantize(kind, self.made["f16"], gguf, imatrix=by)


def refuse_early(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig) -> None:
    """See that files can be split at `--split-size`, before any work.

    Args:
        targets: By their types; none where `--budget` is to choose yet.

    Raises:
        UsageError: If one matrix alone takes more.
        ToolError: If llama.cpp's program is missing.
    """
    if config.split_size is None:
        return
    llama_tools.tool("gguf-split")
    known = {kind: llama_tools.LEAST_BITS.get(kind, llama_tools.FEWEST_BITS) for kind in targets}
    kind, bits = max(known.items(), key=lambda one: one[1], default=("any", llama_tools.FEWEST_BITS))
    least = int(streamed.words_in(Path(adapter.base)) * bits / 8)
    if llama_tools.bytes_of_split(config.split_size) < least:
        raise UsageError(
            f"`--split-size {config.split_size}` is too small: one matrix of {kind} takes {least / 10**6:,.1f}M or more, "
            "and is never split",
            hint=f"choose `--split-size {-(-least // 10**6)}M` or more",
        )


def target_of(kind: str, adapter: Adapter, config: ExportConfig) -> Path:
    """Name the file of a type, or the folder if it is to be split."""
    return adapter.output / f"{adapter.name}-{kind}{'' if config.split_size else '.gguf'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What the converter is given."""

    folder: Path
    tokenizer: HfTokenizer
    through: tuple[str, ...] = ()
    """The program that merges what it reads; empty if the folder is to be read as it is."""


def lay_out(
    adapter: Adapter,
    room: Path,
    config: ExportConfig,
    say: Sink,
    *,
    merged: bool = True,
    rounding: Rounding | None = None,
) -> Inputs:
    """Let the converter merge the weights one by one, or merge them for it where they are stored in another way.

    Args:
        merged: Whether the adapter is to be in them; else they are those of the base.
        rounding: Of the base's weights, before the adapter is added.
    """
    from backprop.engine import merge, pieces

    base, trust = Path(adapter.base), config.trust_remote_code
    tokenizer = merge.adapted_tokenizer(adapter.folder, trust_remote_code=trust)
    folder = room / "merged"
    why_not = streamed.why_not(base, adapter.folder, rounding) if merged else ""
    if why_not:
        say(Phase(name=f"merging the adapter in memory: {why_not}"))
        merge.merge(adapter.base, adapter.folder, folder, rounding=rounding, trust_remote_code=trust)
    else:
        streamed.lay_out(base, tokenizer, folder)
        streamed.link_weights(base, folder)
    pieces.tell_converter(tokenizer, folder, base=adapter.base)
    write_card(adapter, folder, name=pieces.model_name(tokenizer, adapter.name, base=adapter.base))
    options = room / "merge.json"
    streamed.write_options(options, base, adapter.folder, rounding=rounding, trust_remote_code=trust)
    streams = ("-m", streamed.__name__, str(options))
    return Inputs(folder=folder, tokenizer=tokenizer, through=streams if merged and not why_not else ())


def forget_rejected(adapter: Adapter) -> None:
    """Remove the files that earlier exports of this run rejected."""
    for old in adapter.output.glob(f"*.gguf{REJECTED}"):
        kind = old.name.removeprefix(f"{adapter.name}-").removesuffix(f".gguf{REJECTED}").removeprefix("lora-")
        if kind in get_args(Quantization):
            old.unlink()
