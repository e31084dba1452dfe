"""From rows to all that is known before weights are loaded: data judged and encoded, the model found, the plan made."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from backprop.config import TrainConfig
from backprop.core import duration
from backprop.core.choice import Choice
from backprop.core.data.formats import Conversation, Message, Row, parse_columns
from backprop.core.data.inspect import Ledger, histogram, inspect
from backprop.core.data.judge import Judged, judge
from backprop.core.data.render import TODAY, Encoded, Example, cut, encode_all, with_mismatched
from backprop.core.data.split import hold_out
from backprop.core.data.template import Adapter, Forgeries, adapt
from backprop.core.fitting import choose_method
from backprop.core.hardware import Hardware
from backprop.core.memory import ModelShape
from backprop.core.plan import (
    DataShape,
    Plan,
    choose_max_length,
    choose_model,
    disk_bytes,
    spill_bytes,
    with_known,
)
from backprop.core.probes import choose
from backprop.edges import device, files, hub, spill
from backprop.errors import DataError, ModelError, UsageError
from backprop.events import DataRead, Phase, PlanMade, Proved, Sink, Warned

if TYPE_CHECKING:
    from backprop.engine.load import HfTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All that is known before weights are loaded."""

    model: hub.ModelSource
    tokenizer: "HfTokenizer"
    train: Encoded
    held_out: Sequence[Example]
    gate_rows: Sequence[Example] = ()
    """Of old tasks, which must not get worse."""
    own: Sequence[Example]
    """Of those that are trained on, those of no earlier part."""
    plan: Plan
    config: TrainConfig
    """With what the plan has chosen where nothing was given, and the rest hangs on."""
    train_sha256: str
    """Of the tokens and masks that are trained on."""
    hardware: Hardware
    disk_bytes: int
    """What the run will write, at most."""
    seconds: float
    """What its steps will take, roughly."""


def judge_rows(rows: Iterable[Row], config: TrainConfig) -> Judged:
    """Turn rows into conversations, on the disk where they are many."""
    columns = parse_columns(config.column)
    return judge(rows, columns, objective=config.objective, keep=spill.conversations())


def read_data(config: TrainConfig, *, most: int | None = None) -> tuple[Judged, Sequence[Conversation]]:
    """Read and judge what to train on and what to hold out, before anything heavy is imported.

    Args:
        most: Rows of `--data` to read; None for all.
    """
    judged = judge_rows(islice(_rows(config.data, config), most), config)
    if config.eval_data:
        evaluation = judge_rows(_rows(config.eval_data, config), config)
        notes = tuple(f"evaluation data: {warning}" for warning in evaluation.warnings)
        both = judged.characters + evaluation.characters
        return replace(judged, warnings=(*judged.warnings, *notes), characters=both), evaluation.conversations
    kept, held_out = hold_out(judged.conversations, fraction=config.eval_fraction)
    check_held_out(config, held_out)
    return replace(judged, conversations=kept), held_out


def check_held_out(config: TrainConfig, held_out: Sequence[Conversation]) -> None:
    """Refuse options that need held-out rows where there are none.

    Raises:
        UsageError: Naming the option.
    """
    asked = {
        "--early-stopping": config.early_stopping,
        "--eval-steps": config.eval_steps,
        "--eval-fraction": config.eval_fraction,
    }
    wanted = next((flag for flag, value in asked.items() if value), None)
    if wanted and not held_out:
        raise UsageError(
            f"`{wanted}` needs held-out rows, and there are none", hint="add `--eval-data held-out.jsonl`, or more rows"
        )


def _rows(sources: Sequence[str], config: TrainConfig) -> Iterator[Row]:
    for source in sources:
        yield from rows_of(source, offline=config.offline)


def rows_of(source: str, *, offline: bool) -> Iterator[Row]:
    """Read the rows of a local file or folder, or of a hub data set."""
    return files.read_rows(source) if files.is_local(source) else hub.stream_rows(source, offline=offline)


NOTHING: Mapping[str, Choice[Any]] = MappingProxyType({})


def prepare(
    config: TrainConfig,
    judged: Judged,
    held_out: Sequence[Conversation],
    *,
    gate_rows: Sequence[Conversation] = (),
    rate_share: float = 1.0,
    known: Mapping[str, Choice[Any]] = NOTHING,
    weights: bool = True,
    say: Sink,
) -> Prepared:
    """Choose the model (``weights``: with its own), render the data, and make the plan, with a share of its rate and what is ``known``."""
    for warning in judged.warnings:
        say(Warned(message=warning))
    say(Phase(name="looking at the data"))
    ledger = inspect(judged.conversations, held_out)
    for warning in ledger.warnings():
        say(Warned(message=warning))
    hardware = device.use_one_gpu(device.probe())
    chosen = choose_model(config.model, replace(hardware, gpus=hardware.gpus[:1]))
    say(Phase(name=f"finding the model {chosen.value}"))
    source = hub.find_model(chosen.value, offline=config.offline, weights=weights, code=config.trust_remote_code)
    rows = len(judged.conversations) + len(held_out)
    spill.check_room(spill_bytes(config, rows=rows, characters=judged.characters))
    say(Phase(name="rendering the data"))
    from backprop.engine import load, loop, race

    loop.quieten()
    tokenizer = load.load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)
    _say_template(tokenizer, chosen.value, say)
    shape = load.load_shape(source.path, trust_remote_code=config.trust_remote_code)
    whole, held = _encode(config, judged, held_out, tokenizer, say)
    max_length = choose_max_length(config, max(whole.longest, held.longest), shape)
    train = cut(whole, max_length.value, keep=spill.examples())
    check_supervision(config, whole, train, most=shape.max_positions, say=say)
    held_examples = _cut_held_out(held, max_length.value, say, what="evaluation data")
    if config.objective == "kto":
        train, held_examples = _rated(train, held_examples, max_length.value, say)
    longest = config.max_length or min(shape.max_positions, max(max_length.value, MEASURED_TOKENS))
    gate_examples = _old_tasks(config, gate_rows, tokenizer, longest, say)
    sizes = DataShape(num_examples=len(train.examples), num_tokens=train.tokens)
    plan, seconds = _planned(config, hardware, shape, sizes, chosen, max_length, known)
    config = _as_planned(replace(config, method=plan.method.value), plan)
    plan = race.with_known(config, _slowed(plan, rate_share))
    say(_data_read(judged, held_out, train, ledger))
    say(_plan_made(plan))
    return Prepared(
        model=source,
        tokenizer=tokenizer,
        train=train,
        held_out=held_examples,
        gate_rows=gate_examples,
        own=_own(judged, train),
        plan=plan,
        config=config,
        train_sha256=digest(train.examples),
        hardware=hardware,
        disk_bytes=disk_bytes(config, shape, sizes),
        seconds=seconds / plan.gpus.value,
    )


def _planned(
    config: TrainConfig,
    hardware: Hardware,
    shape: ModelShape,
    data: DataShape,
    model: Choice[str],
    length: Choice[int],
    known: Mapping[str, Choice[Any]],
) -> tuple[Plan, float]:
    in_bits = find_spec("bitsandbytes") is not None
    method = choose_method(config, hardware, shape, length=length.value, four_bit=in_bits)
    config = replace(config, method=method.value)
    plan, seconds = duration.plan_and_seconds(
        *(config, hardware, shape, data),
        model=model,
        max_length=length,
        eight_bit=in_bits,
        unsloth=find_spec("unsloth") is not None,
    )
    return with_known(_as_planned(config, plan), replace(plan, method=method), known), seconds


def _as_planned(config: TrainConfig, plan: Plan) -> TrainConfig:
    return replace(config, optimizer=plan.optimizer.value, dequantize=plan.dequantize.value)


def _slowed(plan: Plan, share: float) -> Plan:
    peak = plan.learning_rate.value
    slowed = Choice(share * peak, f"{share:.3g} of {peak:g}")
    return plan if share == 1 else replace(plan, learning_rate=slowed)


def _own(judged: Judged, train: Encoded) -> Sequence[Example]:
    """Leave out at least all that is replayed, which comes last: which examples were dropped is not known any more."""
    if not judged.replayed:
        return train.examples
    return train.examples[: max(1, len(judged.conversations) - judged.replayed - train.dropped)]


def _rated(train: Encoded, held_out: Sequence[Example], longest: int, say: Sink) -> tuple[Encoded, Sequence[Example]]:
    _say_ratings(train.examples, say)
    rated = train.examples
    with_another = with_mismatched(rated, rated, longest, keep=spill.examples())
    return replace(train, examples=with_another), with_mismatched(held_out, rated, longest, keep=spill.examples())


def _old_tasks(
    config: TrainConfig, rows: Sequence[Conversation], tokenizer: "HfTokenizer", longest: int, say: Sink
) -> Sequence[Example]:
    suited = map(Adapter(tokenizer).adapted, rows)
    encoded = encode_all(suited, tokenizer, loss_on=config.loss_on, keep=spill.examples())
    return _cut_held_out(encoded, longest, say, what="old tasks")


def _encode(
    config: TrainConfig,
    judged: Judged,
    held_out: Sequence[Conversation],
    tokenizer: "HfTokenizer",
    say: Sink,
) -> tuple[Encoded, Encoded]:
    """Give what is trained on and what is held out as tokens and masks, and tell what had to be adapted."""
    encoded: list[Encoded] = []
    forgeries = Forgeries(tokenizer)
    for part, whose in ((judged.conversations, ""), (held_out, "evaluation data: ")):
        adapter = Adapter(tokenizer)
        suited = (forgeries.seen(adapter.adapted(conversation)) for conversation in part)
        encoded.append(encode_all(suited, tokenizer, loss_on=config.loss_on, keep=spill.examples()))
        for note in adapter.notes:
            say(Warned(message=f"{whose}{note}"))
    if forgeries.count:
        told = f"{forgeries.count} rows hold control tokens of the model in their text, first: {forgeries.first}"
        say(Warned(message=told))
    whole, held = encoded
    return whole, held


def _plan_made(plan: Plan) -> PlanMade:
    choices = plan.choices()
    return PlanMade(
        choices={name: choice.value for name, choice in choices.items()},
        reasons={name: choice.reason for name, choice in choices.items()},
        memory=asdict(plan.memory) if plan.memory else {},
        to_try=[one.told for one in plan.to_try],
    )


def _data_read(judged: Judged, held_out: Sequence[Conversation], train: Encoded, ledger: Ledger) -> DataRead:
    return DataRead(
        rows=len(judged.conversations),
        eval_rows=len(held_out),
        examples=len(train.examples),
        tokens=train.tokens,
        trained_tokens=train.trained_tokens,
        tokens_cut=train.tokens_cut,
        examples_dropped=train.dropped,
        shapes=judged.shapes,
        longest=train.longest,
        ledger={
            **ledger.to_json(),
            "lengths": lengths_of(train),
            "examples_dropped": train.dropped,
            "tokens_cut": train.tokens_cut,
        },
    )


def _say_template(tokenizer: "HfTokenizer", name: str, say: Sink) -> None:
    if tokenizer.template_added:
        say(
            Warned(
                message=f"`{name}` is a base model without a chat template: `User:` and `Assistant:` with its "
                "end-of-text token are used, and saved with the adapter"
            )
        )
    if "strftime_now" in str(tokenizer.inner.chat_template):
        say(
            Phase(
                name=f"the chat template writes the date: in training always {TODAY:%d %b %Y}, so that a run can go on tomorrow"
            )
        )


def _say_ratings(examples: Sequence[Example], say: Sink) -> None:
    wanted = sum(example.desirable for example in examples)
    if wanted in (0, len(examples)):
        kind = "wanted" if wanted else "unwanted"
        say(Warned(message=f"all {len(examples)} answers are {kind}: nothing is learnt of what tells them apart"))


def lengths_of(train: Encoded) -> list[list[int]]:
    """Count the examples by their number of tokens."""
    return [[bucket.low, bucket.high, bucket.count] for bucket in histogram(train.lengths)]


# Rows of old tasks may be longer than those that are trained on: without a gradient, so many take little memory.
MEASURED_TOKENS = 2048
# More tokens lost than this is a fault of the settings, unless it is wanted.
MOST_CUT = 0.05


def check_supervision(config: TrainConfig, whole: Encoded, train: Encoded, *, most: int, say: Sink) -> None:
    """Prove from the masks that what should be trained is.

    Args:
        most: Positions of the model: no length beyond them can be chosen.

    Raises:
        DataError: If more than 5 % of the tokens or examples are lost to the length, and this was not allowed.
        ModelError: If the template ends answers without a token that stops them.
    """
    per_example = sorted(train.trained)
    lost = (train.dropped - train.alike) / len(whole.examples)
    parts = "sides of preferences" if config.objective in ("dpo", "orpo") else "examples"
    trained = Proved(
        name="every example is trained on",
        ok=lost <= MOST_CUT or config.allow_truncation,
        found=f"{per_example[0]} to {per_example[-1]} trained tokens in each of {len(per_example)} {parts}, half of "
        f"them {per_example[len(per_example) // 2]} or more; {train.dropped - train.alike} dropped, which had none",
    )
    share = train.tokens_cut / whole.tokens
    cut_off = Proved(
        name="nothing is cut without notice",
        ok=share <= MOST_CUT or config.allow_truncation,
        found=f"{train.tokens_cut} tokens ({share:.1%}) are beyond --max-length and cut, "
        f"{train.trained_tokens_cut} of them would be trained; {train.dropped - train.alike} examples dropped",
    )
    longer = f"give `--max-length {whole.longest}`" if whole.longest <= most else "split the longest rows"
    for proof in (trained, cut_off):
        say(proof)
        if not proof.ok:
            raise DataError(
                f"too much is cut: {proof.found}", hint=f"{longer}; if you mean it, add `--allow-truncation`"
            )
    if train.alike:
        told = f"{train.alike} preferences are left out: this model's template makes their sides alike"
        say(Warned(message=told))
    if train.tokens_cut or train.dropped > train.alike:
        say(Warned(message=f"{cut_off.found}: {longer}"))
    if train.rewritten:
        say(
            Warned(
                message=f"this model's template rewrites earlier turns in {train.rewritten} conversations: "
                "each answer there is an example of its own"
            )
        )
    _prove_ends(config, whole, train, say)


def _prove_ends(config: TrainConfig, whole: Encoded, train: Encoded, say: Sink) -> None:
    answers = whole.answers
    if not answers:
        return
    ends = Proved(
        name="the end of each answer is trained",
        ok=not whole.unended,
        found=f"{answers - whole.unended} of {answers} answers end with a trained token that stops them; "
        f"{whole.ended - train.ended} of these ends are cut",
    )
    say(ends)
    if not ends.ok and not config.skip_proofs:
        raise ModelError(
            f"this model's chat template does not end answers with a special token: {ends.found}",
            hint="choose a chat model, or put a `chat_template.jinja` that ends turns into a copy of the folder",
        )


def _cut_held_out(held: Encoded, max_length: int, say: Sink, *, what: str) -> Sequence[Example]:
    """Cut the held-out examples, and say what that takes from them.

    Raises:
        DataError: If none has a trained token left.
    """
    if not held.examples:
        return ()
    try:
        short = cut(held, max_length, keep=spill.examples())
    except DataError as error:
        raise DataError(f"{what}: {error.message}", hint=error.hint) from error
    if short.tokens_cut or short.dropped:
        say(
            Warned(
                message=f"{what}: {short.tokens_cut} tokens are beyond {max_length} and cut, and "
                f"{short.dropped} examples dropped: its loss is that of what is left"
            )
        )
    return short.examples


def probes_of(
    held_out: Sequence[Iterable[Conversation]], trained_on: Sequence[Iterable[Conversation]], tokenizer: "HfTokenizer"
) -> list[list[Message]]:
    """Choose what an exported file will be asked, of the rows of each part, in turns that the chat template takes."""
    return [list(one.messages) for one in adapt(choose(held_out, trained_on), tokenizer).conversations]


def fingerprint_of(conversations: Iterable[Conversation]) -> str:
    """Hash what is trained on and held out, whatever files it came from."""
    digest = hashlib.sha256()
    for conversation in conversations:
        content = [conversation.messages, conversation.text, *([conversation.tools] if conversation.tools else [])]
        content += [conversation.rejected] if conversation.rejected else []
        content += [] if conversation.desirable is None else [conversation.desirable]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()


def digest(examples: Sequence[Example]) -> str:
    """Hash the tokens and masks that are trained on."""
    found = hashlib.sha256()
    for example in examples:
        for side in example.sides:
            found.update(repr((side.ids, side.mask)).encode())
        found.update(b"" if example.desirable else b"unwanted")
    return found.hexdigest()
