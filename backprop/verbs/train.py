"""`backprop train`: from rows to an adapter."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from backprop.config import TrainConfig
from backprop.core.data.formats import Conversation, Judged, Row, judge
from backprop.core.data.render import Encoded, Example, cut, encode_all
from backprop.core.data.split import hold_out
from backprop.core.plan import DataShape, Plan, choose_max_length, choose_model, make_plan
from backprop.edges import device, files, hub, rundir
from backprop.errors import PackageError
from backprop.events import JSON, DataRead, Examples, Phase, PlanMade, Sink, Warned
from backprop.verbs.session import running

if TYPE_CHECKING:
    from backprop.engine.load import HfTokenizer
    from backprop.engine.loop import Fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All that is known before weights are loaded."""

    model: hub.ModelSource
    tokenizer: "HfTokenizer"
    train: Encoded
    held_out: tuple[Example, ...]
    plan: Plan


def train(config: TrainConfig, *, say: Sink) -> Path:
    """Fine-tune one adapter.

    Returns:
        The run directory; the adapter is in its `lora/`. With `dry_run`, nothing is written.

    Raises:
        BackpropError: Of the kind that names what the user can mend.
    """
    check_packages(config)
    judged, held_out = read_data(config)
    fingerprint = fingerprint_of([*judged.conversations, *held_out])
    with running(config, command="train", fingerprint=fingerprint, say=say) as session:
        prepared = prepare(config, judged, held_out, say=session.say)
        if config.dry_run:
            session.say(Examples(text=show_examples(prepared)))
            session.finish({"dry_run": True})
            return config.output
        session.claim(model=prepared.model, plan=prepared.plan, question=first_question(judged.conversations))
        _, fit = train_one(config, prepared, output=config.output, say=session.say)
        session.finish(measures(fit))
    return config.output


def measures(fit: "Fit") -> dict[str, JSON]:
    """Give what a run measured, for its manifest."""
    return {
        "steps": len(fit.losses),
        "final_loss": fit.losses[-1],
        "eval_loss_before": fit.eval_loss_before,
        "eval_loss": fit.eval_loss,
        "tokens": fit.tokens,
        "tokens_per_second": fit.tokens / fit.seconds,
    }


# The packages that an option needs beyond the core, by the extra that brings them.
NEEDED = {"qlora": ("bitsandbytes", "standard"), "tensorboard": ("tensorboard", "monitoring")}


def check_packages(config: TrainConfig) -> None:
    """Refuse options whose package is not installed, before any work.

    Raises:
        PackageError: Naming the package and the command that brings it.
    """
    for option in (config.method, config.report_to):
        package, extra = NEEDED.get(option, ("json", ""))
        if importlib.util.find_spec(package) is None:
            raise PackageError(f"`{option}` needs the package `{package}`", hint=f"pip install 'backprop[{extra}]'")


def read_data(config: TrainConfig) -> tuple[Judged, tuple[Conversation, ...]]:
    """Read and judge what to train on and what to hold out, before anything heavy is imported."""
    judged = judge(row for source in config.data for row in rows_of(source, offline=config.offline))
    if config.eval_data:
        held_out = judge(
            row for source in config.eval_data for row in rows_of(source, offline=config.offline)
        ).conversations
        return judged, held_out
    kept, held_out = hold_out(judged.conversations, fraction=config.eval_fraction)
    return Judged(conversations=kept, shapes=judged.shapes, warnings=judged.warnings), held_out


def rows_of(source: str, *, offline: bool) -> Iterator[Row]:
    """Read the rows of a local file or folder, or of a hub data set."""
    return files.read_rows(source) if files.is_local(source) else hub.stream_rows(source, offline=offline)


def prepare(config: TrainConfig, judged: Judged, held_out: Sequence[Conversation], *, say: Sink) -> Prepared:
    """Choose the model, render the data with its template, and make the plan."""
    for warning in judged.warnings:
        say(Warned(message=warning))
    hardware = device.use_one_gpu(device.probe())
    chosen = choose_model(config.model, hardware)
    say(Phase(name=f"finding the model {chosen.value}"))
    source = hub.find_model(chosen.value, offline=config.offline)
    say(Phase(name="rendering the data"))
    from backprop.engine import load, loop

    loop.quieten()
    tokenizer = load.load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)
    shape = load.load_shape(source.path, trust_remote_code=config.trust_remote_code)
    whole = encode_all(judged.conversations, tokenizer, loss_on=config.loss_on)
    max_length = choose_max_length(config, whole.longest, shape)
    train = cut(whole, max_length.value)
    held = encode_all(held_out, tokenizer, loss_on=config.loss_on)
    held_examples = cut(held, max_length.value).examples if held.examples else ()
    sizes = DataShape(num_examples=len(train.examples))
    plan = make_plan(config, hardware, shape, sizes, model=chosen, max_length=max_length)
    data = DataRead(
        rows=len(judged.conversations),
        eval_rows=len(held_out),
        examples=len(train.examples),
        tokens=train.tokens,
        trained_tokens=train.trained_tokens,
        tokens_cut=train.tokens_cut,
        examples_dropped=train.dropped,
        shapes=judged.shapes,
        longest=train.longest,
    )
    _say_losses(data, train, plan, say)
    say(data)
    choices = plan.choices()
    say(
        PlanMade(
            choices={name: choice.value for name, choice in choices.items()},
            reasons={name: choice.reason for name, choice in choices.items()},
        )
    )
    return Prepared(model=source, tokenizer=tokenizer, train=train, held_out=held_examples, plan=plan)


def _say_losses(data: DataRead, train: Encoded, plan: Plan, say: Sink) -> None:
    if data.tokens_cut:
        share = data.tokens_cut / (data.tokens_cut + data.tokens)
        say(
            Warned(
                message=f"{data.tokens_cut} tokens ({share:.1%}) are beyond {plan.max_length.value} and were cut, and "
                f"{data.examples_dropped} examples dropped: raise `--max-length`"
            )
        )
    if train.rewritten:
        say(
            Warned(
                message=f"this model's template rewrites earlier turns in {train.rewritten} conversations: "
                "each answer there is an example of its own"
            )
        )


def train_one(
    config: TrainConfig,
    prepared: Prepared,
    *,
    output: Path,
    say: Sink,
    start: Mapping[str, Any] | None = None,
    run: int = 1,
) -> tuple[Any, "Fit"]:
    """Load the model, train a fresh adapter (or one that starts from ``start``), and write `lora/` in ``output``."""
    say(Phase(name="loading the model"))
    from backprop.engine import load, loop

    plan = prepared.plan
    base = load.load_base(
        prepared.model.path,
        dtype=plan.dtype.value,
        device=plan.device.value,
        four_bit=config.method == "qlora",
        trust_remote_code=config.trust_remote_code,
    )
    model = load.add_adapter(base, config, plan)
    if start is not None:
        load.set_adapter_state(model, start)
    say(Phase(name="training"))
    with TemporaryDirectory(prefix="backprop-") as scratch:
        result = loop.fit(
            model,
            prepared.tokenizer,
            prepared.train.examples,
            config=config,
            plan=plan,
            say=say,
            held_out=prepared.held_out,
            scratch=Path(scratch),
            curves=output / "tensorboard" if config.report_to == "tensorboard" else None,
            run=run,
        )
    with rundir.whole(output / "lora") as folder:
        load.save_adapter(model, prepared.tokenizer, folder)
    return model, result


def first_question(conversations: Sequence[Conversation]) -> str:
    """Give the first user turn; empty if there is none."""
    turns = (turn for conversation in conversations for turn in conversation.messages)
    return next((turn["content"] for turn in turns if turn["role"] == "user"), "")


def fingerprint_of(conversations: Sequence[Conversation]) -> str:
    """Hash what is trained on and held out, whatever files it came from."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(json.dumps([conversation.messages, conversation.text], ensure_ascii=False).encode())
    return digest.hexdigest()


def show_examples(prepared: Prepared, *, count: int = 3) -> str:
    """Write the first examples as text, with what is trained on between » and «."""
    shown: list[str] = []
    for number, example in enumerate(prepared.train.examples[:count], start=1):
        spans: list[str] = []
        position = 0
        while position < len(example.ids):
            end = position
            while end < len(example.ids) and example.mask[end] == example.mask[position]:
                end += 1
            whole: Any = prepared.tokenizer.inner
            text = whole.decode(list(example.ids[position:end]), skip_special_tokens=False)
            spans.append(f"»{text}«" if example.mask[position] else text)
            position = end
        shown.append(
            f"--- example {number}: {example.num_trained} of {len(example.ids)} tokens trained\n{''.join(spans)}"
        )
    return "\n".join(shown)
