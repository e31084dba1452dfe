"""Events: what a run says, as data. A sink decides how it looks.

Kinds and keys are only ever added; `schema` is the contract with those who read them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

EVENT_VERSION = 1

JSON = str | int | float | bool | None | Sequence["JSON"] | Mapping[str, "JSON"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """A command began its work."""

    command: str
    output: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMade:
    """Everything decided before training, each with its reason."""

    choices: Mapping[str, JSON]
    reasons: Mapping[str, str]
    memory: Mapping[str, int] = field(default_factory=dict[str, int])
    """What each phase is estimated to need of a GPU at its fullest, in bytes; empty without one."""
    to_try: Sequence[str] = ()
    """Ways through the model that may be tried on it before the first step; a single one only where memory is short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRead:
    """What the data held, after rendering."""

    rows: int
    eval_rows: int
    examples: int
    tokens: int
    trained_tokens: int
    tokens_cut: int
    examples_dropped: int
    shapes: Mapping[str, int]
    longest: int
    ledger: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """Duplicates, overlap with the evaluation data, languages, and `lengths`: rows by length as [low, below, count]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """The first examples of a dry run: as text, with what is trained on between » and «, and as its parts.

    Each part is a text and whether it is trained on.
    """

    text: str
    examples: Sequence[Sequence[tuple[str, bool]]] = ()
    names: Sequence[str] = ()
    """Of each: its number, and of a preference which side it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step. `loss` is the mean over its trained tokens, in nats, or over its preferences.

    Padding counts in no figure. `accuracy` is the share of its preferences that are on their right side.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    memory_bytes: int
    accuracy: float | None = None
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Eval:
    """Mean loss over the trained tokens of a held-out set, in nats; perplexity is its exponential.

    Of preferences: the mean loss of the objective, the share that are on their right side, and by how much on average,
    in nats; such a loss has no perplexity.
    """

    step: int
    loss: float
    part: str = "eval"
    run: int = 1
    accuracy: float | None = None
    margin: float | None = None
    exact_match: float | None = None
    """Of a part of a multi-run with short answers: the share that is given word for word."""
    perplexity: float | None = field(init=False)

    def __post_init__(self) -> None:
        # JSON knows no infinity.
        perplexity = math.exp(min(self.loss, 700.0)) if self.accuracy is None else None
        object.__setattr__(self, "perplexity", perplexity)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMerged:
    """One run of a multi-run was trained and merged."""

    run: int
    num_runs: int
    mode: str
    exponent: float | None = None
    """p of the merge weight i^-p that "auto" chose; None with other modes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """How the merged adapter, read back from the disk, does on each part so far: scores from 0 to 1, larger is better.

    A score is exact match where answers are short and any was exact at first, else the inverse perplexity.
    """

    run: int
    parts: Sequence[str]
    scores: Sequence[float]
    """Of each part."""
    average_performance: float
    learning_accuracy: float
    backward_transfer: float
    forgetting: float
    general_loss: float | None = None
    """On the rows of `--general-eval`, in nats."""
    general_loss_before: float | None = None
    """Of the base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proved:
    """Something that a run proved of itself, or could not."""

    name: str
    ok: bool
    found: str
    seconds: float = 0.0
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Gated:
    """A gate that the caller set, and whether it was met."""

    gate: str
    """As given, e.g. `eval_loss<1.2`."""
    ok: bool
    found: str
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What the model answered before training and after it."""

    prompt: str
    before: str
    after: str
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpointed:
    """A checkpoint is on the disk, complete."""

    step: int
    path: str
    seconds: float
    """That it took."""
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """An interrupted run goes on after `step` steps."""

    step: int
    path: str
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledBack:
    """Training diverged, and goes on after `step` steps with rates of `rate_share` of the planned ones."""

    step: int
    rate_share: float
    reason: str
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeated:
    """How a run compares with the one that it did again: `equal`, `close` or `different`."""

    kind: str
    found: str
    path: str
    largest: float
    """Largest difference of the losses of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Warned:
    """Something the user can act on, that does not stop the run."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Paused:
    """Training waits between two steps for a GPU to cool; that it goes on is a `phase`."""

    reason: str
    temperature_c: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryMended:
    """What each phase needs of a GPU at its fullest, in bytes, as mended by what a step was measured to take."""

    phases: Mapping[str, int]
    estimated: Mapping[str, int]
    """Before, from shapes alone."""
    how: str
    """What was measured."""
    run: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a run has spent since its last event of this kind: the sum of all is that of the whole run."""

    seconds: float
    energy_wh: float | None = None
    """Of its GPUs, from their own counters; None if there are none that tell."""
    hottest_c: int | None = None
    paused_seconds: float = 0.0
    """Of `seconds`, those in which it waited for a GPU to cool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A phase began that may take a while."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file was exported and answered when asked."""

    path: str
    format: str
    quantization: str
    size_bytes: int
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A type that may fit `--budget` was made, and held to the 16-bit file: divergences in nats."""

    quantization: str
    size_bytes: int | None = None
    """None if it was refused, as the three figures below then are."""
    mean_kl: float | None = None
    p99_kl: float | None = None
    top1: float | None = None
    """Share of positions with the same likeliest token."""
    refused: str = ""
    """Why there is no file to choose: llama.cpp did not make it, or it predicts nothing; empty else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """An Ollama server holds a model under `name`, and it answered when asked."""

    name: str
    server: str
    """Its address."""
    size_bytes: int
    replaced: bool
    """Whether another model had that name before."""
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One finding of doctor."""

    name: str
    ok: bool
    found: str
    needed: str = ""
    mend: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFinished:
    """The command did all it was asked to."""

    command: str
    output: str
    seconds: float
    result: Mapping[str, JSON] = field(default_factory=dict[str, JSON])


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The command ended early: `code` is its exit code."""

    code: int
    message: str
    hint: str


Event = (
    RunStarted
    | PlanMade
    | DataRead
    | Examples
    | Step
    | Eval
    | RunMerged
    | Forgetting
    | Proved
    | Gated
    | Sampled
    | Checkpointed
    | Resumed
    | RolledBack
    | Repeated
    | Warned
    | Paused
    | MemoryMended
    | Spent
    | Phase
    | Tried
    | Exported
    | Registered
    | Checked
    | RunFinished
    | Failed
)

KINDS: dict[type, str] = {
    RunStarted: "run_started",
    PlanMade: "plan",
    DataRead: "data",
    Examples: "examples",
    Step: "step",
    Eval: "eval",
    RunMerged: "merged",
    Forgetting: "forgetting",
    Proved: "proof",
    Gated: "gate",
    Sampled: "sample",
    Checkpointed: "checkpoint",
    Resumed: "resumed",
    RolledBack: "rolled_back",
    Repeated: "repeated",
    Warned: "warning",
    Paused: "paused",
    MemoryMended: "memory",
    Spent: "spent",
    Phase: "phase",
    Tried: "tried",
    Exported: "exported",
    Registered: "registered",
    Checked: "check",
    RunFinished: "run_finished",
    Failed: "error",
}

Sink = Callable[[Event], None]


def to_json(event: Event) -> dict[str, JSON]:
    """Give the event as a JSON object with its version, time (UTC) and kind."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"v": EVENT_VERSION, "t": now, "event": KINDS[type(event)], **dataclasses.asdict(event)}


def from_json(line: Mapping[str, Any]) -> "Event | None":
    """Give the event that `to_json` wrote; None for one of a kind that this version does not know."""
    kind = next((cls for cls, name in KINDS.items() if name == line.get("event")), None)
    if kind is None:
        return None
    names = [one.name for one in dataclasses.fields(kind) if one.init and one.name in line]
    try:
        return cast(Event, kind(**{name: line[name] for name in names}))
    except TypeError:
        return None


def tee(*sinks: Sink) -> Sink:
    """Give every event to each of ``sinks`` in turn."""

    def say(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return say
