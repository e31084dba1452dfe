"""From rows to all that is known before weights are loaded: data judged and encoded, the model found, the plan made."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from backprop.config import TrainConfig
from backprop.console import colour_spans
from backprop.core.data.formats import Conversation, Judged, Row, judge, parse_columns
from backprop.core.data.inspect import histogram, inspect
from backprop.core.data.render import Encoded, Example, cut, encode_all
from backprop.core.data.split import hold_out
from backprop.core.data.template import adapt
from backprop.core.plan import DataShape, Plan, choose_max_length, choose_model, make_plan
from backprop.edges import device, files, hub
from backprop.errors import DataError, ModelError
from backprop.events import DataRead, Examples, Phase, PlanMade, Proved, Sink, Warned

if TYPE_CHECKING:
    from backprop.engine.load import HfTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All that is known before weights are loaded."""

    model: hub.ModelSource
    tokenizer: "HfTokenizer"
    train: Encoded
    held_out: tuple[Example, ...]
    plan: Plan


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
