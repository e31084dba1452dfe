"""`backprop train`: from rows to an adapter."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from backprop.config import TrainConfig
from backprop.console import colour_spans
from backprop.core.data.formats import Conversation, Judged, Row, judge, parse_columns
from backprop.core.data.inspect import histogram, inspect
from backprop.core.data.render import Encoded, Example, cut, encode_all
from backprop.core.data.split import hold_out
from backprop.core.data.template import adapt
from backprop.core.plan import DataShape, Plan, choose_max_length, choose_model, make_plan
from backprop.edges import device, files, hub, rundir
from backprop.errors import DataError, ModelError, PackageError, TrainingError, UsageError
from backprop.events import JSON, DataRead, Examples, Phase, PlanMade, Proved, Sink, Warned
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
    if config.early_stopping and not held_out:
        raise UsageError(
            "`--early-stopping` needs held-out rows, and there are none",
            hint="add `--eval-fraction 0.1`, or `--eval-data held-out.jsonl`",
        )
    fingerprint = fingerprint_of([*judged.conversations, *held_out])
    with running(config, command="train", fingerprint=fingerprint, say=say) as session:
        prepared = prepare(config, judged, held_out, say=session.say)
        if config.dry_run:
            session.say(show_examples(prepared))
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
    columns = parse_columns(config.column)
    judged = judge(_rows(config.data, config), columns)
    if config.eval_data:
        return judged, judge(_rows(config.eval_data, config), columns).conversations
    kept, held_out = hold_out(judged.conversations, fraction=config.eval_fraction)
    return replace(judged, conversations=kept), held_out


def _rows(sources: Sequence[str], config: TrainConfig) -> Iterator[Row]:
    for source in sources:
        yield from rows_of(source, offline=config.offline)


def rows_of(source: str, *, offline: bool) -> Iterator[Row]:
    """Read the rows of a local file or folder, or of a hub data set."""
    return files.read_rows(source) if files.is_local(source) else hub.stream_rows(source, offline=offline)


def prepare(config: TrainConfig, judged: Judged, held_out: Sequence[Conversation], *, say: Sink) -> Prepared:
    """Choose the model, render the data with its template, and make the plan."""
    for warning in judged.warnings:
        say(Warned(message=warning))
    say(Phase(name="looking at the data"))
    ledger = inspect(judged.conversations, held_out)
    for warning in ledger.warnings():
        say(Warned(message=warning))
    hardware = device.use_one_gpu(device.probe())
    chosen = choose_model(config.model, hardware)
    say(Phase(name=f"finding the model {chosen.value}"))
    source = hub.find_model(chosen.value, offline=config.offline)
    say(Phase(name="rendering the data"))
    from backprop.engine import load, loop

    loop.quieten()
    tokenizer = load.load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)
    _say_template(tokenizer, chosen.value, say)
    shape = load.load_shape(source.path, trust_remote_code=config.trust_remote_code)
    suited, suited_held_out = (adapt(part, tokenizer) for part in (judged.conversations, held_out))
    for note in suited.notes:
        say(Warned(message=note))
    whole = encode_all(suited.conversations, tokenizer, loss_on=config.loss_on)
    max_length = choose_max_length(config, whole.longest, shape)
    train = cut(whole, max_length.value)
    check_supervision(config, whole, train, say=say)
    held = encode_all(suited_held_out.conversations, tokenizer, loss_on=config.loss_on)
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
        ledger={**ledger.to_json(), "lengths": lengths_of(train)},
    )
    say(data)
    choices = plan.choices()
    say(
        PlanMade(
            choices={name: choice.value for name, choice in choices.items()},
            reasons={name: choice.reason for name, choice in choices.items()},
        )
    )
    return Prepared(model=source, tokenizer=tokenizer, train=train, held_out=held_examples, plan=plan)


def _say_template(tokenizer: "HfTokenizer", name: str, say: Sink) -> None:
    if tokenizer.template_added:
        say(
            Warned(
                message=f"`{name}` is a base model without a chat template: `User:` and `Assistant:` with its "
                "end-of-text token are used, and saved with the adapter"
            )
        )


def lengths_of(train: Encoded) -> list[list[int]]:
    """Count the examples by their number of tokens."""
    return [
        [bucket.low, bucket.high, bucket.count]
        for bucket in histogram([len(example.ids) for example in train.examples])
    ]


# More tokens lost than this is a fault of the settings, unless it is wanted.
MOST_CUT = 0.05


def check_supervision(config: TrainConfig, whole: Encoded, train: Encoded, *, say: Sink) -> None:
    """Prove from the masks that what should be trained is.

    Raises:
        DataError: If more than 5 % of the tokens are cut and this was not allowed.
        ModelError: If the template ends answers without a token that stops them.
    """
    per_example = sorted(example.num_trained for example in train.examples)
    middle = per_example[len(per_example) // 2]
    say(
        Proved(
            name="every example is trained on",
            ok=True,
            found=f"{per_example[0]} to {per_example[-1]} trained tokens in each of {len(per_example)} examples, "
            f"half of them {middle} or more; {train.dropped} dropped, which had none left",
        )
    )
    share = train.tokens_cut / whole.tokens
    cut_off = Proved(
        name="nothing is cut without notice",
        ok=share <= MOST_CUT or config.allow_truncation,
        found=f"{train.tokens_cut} tokens ({share:.1%}) are beyond --max-length and cut, "
        f"{train.trained_tokens_cut} of them would be trained; {train.dropped} examples dropped",
    )
    say(cut_off)
    if not cut_off.ok:
        raise DataError(
            f"too much is cut: {cut_off.found}",
            hint=f"give `--max-length {whole.longest}`, or leave it out; if you mean it, add `--allow-truncation`",
        )
    if train.tokens_cut:
        say(Warned(message=f"{cut_off.found}: raise `--max-length`"))
    if train.rewritten:
        say(
            Warned(
                message=f"this model's template rewrites earlier turns in {train.rewritten} conversations: "
                "each answer there is an example of its own"
            )
        )
    answers = sum(example.answers for example in whole.examples)
    ends = Proved(
        name="the end of each answer is trained",
        ok=not whole.unended or config.skip_proofs,
        found=f"{answers - whole.unended} of {answers} answers end with a trained token that stops them",
    )
    if answers:
        say(ends)
    if not ends.ok:
        raise ModelError(
            f"this model's chat template does not end answers with a special token: {ends.found}",
            hint="choose a chat model, or put a `chat_template.jinja` that ends turns into a copy of the folder",
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
    if result.failed:
        proof = result.failed[0]
        raise TrainingError(
            f"not proved: {proof.name}: {proof.found}",
            hint=f"the adapter is in {output / 'lora'}; look at the samples in report.html, lower `--learning-rate` or "
            "`--epochs`; if you mean it, add `--skip-proofs`",
        )
    return model, result


def first_question(conversations: Sequence[Conversation]) -> str:
    """Give the first user turn; empty if there is none."""
    turns = (turn for conversation in conversations for turn in conversation.messages)
    return next((turn["content"] for turn in turns if turn["role"] == "user"), "")


def fingerprint_of(conversations: Sequence[Conversation]) -> str:
    """Hash what is trained on and held out, whatever files it came from."""
    digest = hashlib.sha256()
    for conversation in conversations:
        content = [conversation.messages, conversation.text, *([conversation.tools] if conversation.tools else [])]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()


def show_examples(prepared: Prepared, *, count: int = 3) -> Examples:
    """Write the first examples as text, and say which parts of it are trained on."""
    shown = [_spans(example, prepared.tokenizer) for example in prepared.train.examples[:count]]
    texts = [
        f"--- example {number}: {example.num_trained} of {len(example.ids)} tokens trained\n"
        f"{colour_spans(spans, colour=False)}"
        for number, (example, spans) in enumerate(zip(prepared.train.examples, shown, strict=False), start=1)
    ]
    return Examples(text="\n".join(texts), examples=shown)


def _spans(example: Example, tokenizer: "HfTokenizer") -> list[tuple[str, bool]]:
    whole: Any = tokenizer.inner
    tokens = zip(example.ids, example.mask, strict=True)
    groups = [(trained, [token for token, _ in group]) for trained, group in groupby(tokens, key=lambda pair: pair[1])]
    return [(str(whole.decode(ids, skip_special_tokens=False)), trained) for trained, ids in groups]
