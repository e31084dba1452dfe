"""`backprop train`: from rows to an adapter."""

import importlib.util
from pathlib import Path

from backprop.config import TrainConfig
from backprop.errors import PackageError
from backprop.events import Sink
from backprop.verbs.adapter import measures, train_one
from backprop.verbs.prepare import fingerprint_of, first_question, prepare, read_data, show_examples
from backprop.verbs.rehearsal import rehearse
from backprop.verbs.session import running


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
        if session.done:
            session.end_again()
            return config.output
        prepared = prepare(config, judged, held_out, say=session.say)
        if config.dry_run:
            session.say(show_examples(prepared))
        if config.rehearse:
            rehearse(config, prepared, say=session.say)
        if config.dry_run:
            session.finish({"dry_run": True})
            return config.output
        session.claim(model=prepared.model, plan=prepared.plan, question=first_question(judged.conversations))
        _, fit = train_one(config, prepared, output=config.output, say=session.say)
        session.finish(measures(fit, config.output))
    return config.output


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
