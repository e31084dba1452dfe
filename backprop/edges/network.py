"""What libraries may send of their own accord: nothing about us, ever; and with `--offline`, nothing at all."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

SILENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""By these, libraries that we or our extras use leave out what they would report home."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# Who keeps what it read of the variables when it was imported.
KEEPERS = ("huggingface_hub.constants", "datasets.config")


@contextmanager
def limited(*, offline: bool) -> Generator[None]:
    """Let no library send anything about us from here on, nor, in the block and with ``offline``, ask the model hub.

    A library that was imported before, as in a notebook, is told.
    """
    os.environ.update(SILENT)
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(OFFLINE if offline else {})
    _tell_imported()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        _tell_imported()


def _tell_imported() -> None:
    said = {"HF_HUB_OFFLINE": _is_set("HF_HUB_OFFLINE"), "HF_HUB_DISABLE_TELEMETRY": True}
    for keeper in KEEPERS:
        kept = vars(sys.modules[keeper]) if keeper in sys.modules else {}
        kept.update({name: value for name, value in said.items() if name in kept})


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
