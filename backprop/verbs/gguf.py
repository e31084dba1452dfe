"""GGUF files of an adapter: merged, converted, quantized, and each held to the model that was trained."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import get_args

from backprop.config import ExportConfig, Quantization
from backprop.edges import llama_cpp, llama_quants, llama_tools, rundir
from backprop.engine import streamed
from backprop.engine.four_bit import Rounding
from backprop.engine.load import HfTokenizer
from backprop.errors import ExportError, RejectedError, UsageError
from backprop.events import Phase, Sink, Warned
from backprop.verbs import bases, budget, importance
from backprop.verbs.card import write_card
from backprop.verbs.records import answered, record, refuse_others, remember_choice
from backprop.verbs.source import Adapter
from backprop.verbs.verify import REJECTED, Verifier, refuse_foreign, room_for, verifier_for


def export_gguf(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> Mapping[str, Path]:
    """Write the files that are missing; with `--budget`, the one that it chooses. Give them.

    Raises:
        UsageError: If the file that `--budget` chooses is another's, or none fits.
        RejectedError: If a file is not the model that was trained; with `--budget`, if none is.
        ExportError: If a step fails.
    """
    from backprop.engine import loop

    forget_rejected(adapter)
    with rundir.scratch(adapter.output) as scratch:
        if config.verify:
            room_for(Path(adapter.base))
        rounding = bases.nearest_base(adapter, config, say)
        beside = {kind: scratch / f"{kind}.gguf" for kind in quantized_beside(targets, config)}
        say(Phase(name=f"merging and converting to GGUF{', quantizing on the way' if beside else ''}"))
        through = program(
            adapter, scratch, config, rounding=rounding, quantized=beside, keep=keeps_source(targets, config)
        )
        # Others are made from 16 bits or more; a file that is wanted as it is serves as the source too.
        source = scratch / "f16.gguf"
        # It is started before there is anything to read, and before this process imports what it needs to lay that out.
        with llama_cpp.converting(scratch / MERGED, source, kind="f16", through=through) as finish:
            loop.quieten(data=False)
            inputs = lay_out(adapter, scratch, config, say, rounding=rounding)
            verifier = verifier_for(adapter, inputs.tokenizer, targets, config, say, rounding=rounding)
            _wait(finish, adapter, config)
        if verifier:
            verifier.check_source(source, adapter.output / f"{adapter.name}-f16.gguf{REJECTED}")
        if targets and set(targets) <= set(beside):
            source.unlink()  # nothing else is made from it
        by_imatrix = any(importance.matters(kind, config) for kind in targets or budget.to_make(config, source))
        imatrix = importance.find(adapter, config, inputs.tokenizer, source, say) if by_imatrix else None
        made = {"f16": source, **beside}
        base = bases.name_of(rounding, adapter, config)
        maker = Maker(adapter, config, inputs, through, made, imatrix, verifier, base, scratch, say)
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


MERGED = "merged"
"""The folder that the converter reads, in the scratch of an export."""
ANSWER_TOKENS = 32
"""Of the answer that a file is asked for: enough to read; each takes a twentieth of a second on two CPUs."""


@dataclass(frozen=True)
class Maker:
    """Writes one file after the other."""

    adapter: Adapter
    config: ExportConfig
    inputs: "Inputs"
    through: tuple[str, ...]
    """The program that runs the converter."""
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
            rejected = adapter.output / f"{adapter.name}-{kind}.gguf{REJECTED}"
            self._make(kind, gguf)
            if self.verifier:
                self.verifier.check(kind, gguf, rejected)
            if config.split_size:
                whole, gguf = gguf, llama_tools.split(gguf, beside, name=target.name, size=config.split_size)
                whole.unlink()
            (reply,) = llama_cpp.ask(gguf, [[{"role": "user", "content": adapter.question}]], max_tokens=ANSWER_TOKENS)
            told = answered(adapter, reply.text, target, beside, rejected, format="gguf", quantization=kind)
            record(adapter, target, beside, told, config, base=self.base)
        self.say(told)

    def _make(self, kind: str, gguf: Path) -> None:
        if kind == "f16":
            gguf.hardlink_to(self.made[kind])
        elif kind in self.made:
            self.made[kind].replace(gguf)
        elif kind in llama_cpp.CONVERTED:
            llama_cpp.convert(self.inputs.folder, gguf, kind=kind, through=self.through)
        else:
            by = self.imatrix if importance.matters(kind, self.config) else None
            budget.quantize(kind, self.made["f16"], gguf, imatrix=by)


def quantized_beside(kinds: Iterable[str], config: ExportConfig) -> Sequence[str]:
    """Name the types that are quantized while the weights are converted."""
    if llama_quants.kernels_path() is None:
        return ()
    return [kind for kind in kinds if kind not in llama_cpp.CONVERTED and not importance.matters(kind, config)]


def keeps_source(kinds: Collection[str], config: ExportConfig) -> bool:
    """Say whether the 16-bit file is needed: to be proved, or for other files to be made from."""
    return config.verify or len(quantized_beside(kinds, config)) < len(kinds) or not kinds


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


def program(
    adapter: Adapter,
    room: Path,
    config: ExportConfig,
    *,
    rounding: Rounding | None = None,
    quantized: Mapping[str, Path] | None = None,
    keep: bool = True,
) -> tuple[str, ...]:
    """Give the program that runs the converter: it merges what it reads, and quantizes beside.

    Args:
        rounding: Of the base's weights, before the adapter is added.
        quantized: Files to make beside the one of 16 bits, by their types.
        keep: Whether to make that one too.
    """
    base = Path(adapter.base)
    options = room / "merge.json"
    streamed.write_options(
        options,
        base,
        None if streamed.why_not(base, adapter.folder, rounding) else adapter.folder,
        rounding=rounding,
        trust_remote_code=config.trust_remote_code,
        quantized=quantized,
        keep=keep,
    )
    return ("-m", streamed.__name__, str(options))


def lay_out(
    adapter: Adapter,
    room: Path,
    config: ExportConfig,
    say: Sink,
    *,
    merged: bool = True,
    rounding: Rounding | None = None,
) -> "Inputs":
    """Lay out in ``room``, for the program to merge the weights one by one; or merge them for it where they are stored in another way.

    Args:
        merged: Whether the adapter is to be in them; else they are those of the base.
        rounding: Of the base's weights, before the adapter is added.
    """
    from backprop.engine import merge, pieces

    base, trust = Path(adapter.base), config.trust_remote_code
    tokenizer = merge.adapted_tokenizer(adapter.folder, trust_remote_code=trust)
    folder = room / f"{MERGED}.part"
    why_not = streamed.why_not(base, adapter.folder, rounding) if merged else ""
    if why_not:
        say(Phase(name=f"merging the adapter in memory: {why_not}"))
        merge.merge(adapter.base, adapter.folder, tokenizer, folder, rounding=rounding, trust_remote_code=trust)
    else:
        streamed.lay_out(base, tokenizer, folder)
        streamed.link_weights(base, folder)
    pieces.tell_converter(tokenizer, folder, base=adapter.base)
    write_card(adapter, folder, name=pieces.model_name(tokenizer, adapter.name, base=adapter.base))
    return Inputs(folder=folder.rename(room / MERGED), tokenizer=tokenizer)


def _wait(finish: Callable[[], None], adapter: Adapter, config: ExportConfig) -> None:
    try:
        finish()
    except ExportError:
        refuse_foreign(adapter, config)  # in its own words, if that is why
        raise


def forget_rejected(adapter: Adapter) -> None:
    """Remove the files that earlier exports of this run rejected."""
    for old in adapter.output.glob(f"*.gguf{REJECTED}"):
        kind = old.name.removeprefix(f"{adapter.name}-").removesuffix(f".gguf{REJECTED}").removeprefix("lora-")
        if kind in get_args(Quantization):
            old.unlink()
