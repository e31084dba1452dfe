"""What is exported: an adapter on disk, its base model, and what is known of how it was trained."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backprop.config import ExportConfig
from backprop.core.data.formats import Message
from backprop.core.probes import MOST_ASKED, by_itself
from backprop.edges import hub, model_files, rundir
from backprop.errors import ExportError, UsageError
from backprop.events import Sink
from backprop.verbs import models

DEFAULT_QUESTION = "Hello! Who are you?"
LONGEST_QUESTION = 2_000
"""Characters: llama.cpp gets room for a token of each of their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter on disk and the base model it was trained on."""

    folder: Path
    base: str
    """The folder of its base model, in 16 or 32 bits."""
    base_as_found: str
    """Where that was found; another folder if its weights were packed."""
    base_name: str
    """As it was asked for: a preset, a hub id, or a folder."""
    data_sha256: str | None
    """Of the data that it was trained on; None if that is not known."""
    output: Path
    name: str
    question: str
    probes: list[list[Message]]
    """Conversations to prove a copy with."""
    run: Path | None
    """The run directory it stands in; None for an adapter by itself."""
    sha256: str
    """Of its weights."""
    four_bit_dtype: str | None = None
    """The type that a training on weights of 4 bits computed in; None for any other training."""
    four_bit_by_card: bool = False
    """Whether its card says that it was trained on weights of 4 bits, while its run is not known."""


def find_adapter(source: Path, config: ExportConfig, *, say: Sink) -> Adapter:
    """Find the adapter in a run directory or PEFT folder, and its base model.

    Raises:
        UsageError: If there is none.
        ModelError: If its base model cannot be found.
    """
    # Unlike a path's own method, `isfile` is false where the name is too long to be one.
    folder = source if os.path.isfile(source / "adapter_config.json") else source / "lora"
    run = folder.parent
    if not os.path.isfile(folder / "adapter_config.json"):
        raise UsageError(
            f"`{source}` holds no adapter", hint="give a run directory, or a folder with adapter_config.json"
        )
    manifest = rundir.read_manifest(run) or {}
    if manifest and manifest.get("status") != "finished":
        why = (manifest.get("error") or {}).get("message", "")
        raise UsageError(
            f"the run in `{run}` is not finished: {manifest.get('status')}{': ' if why else ''}{why}",
            hint="mend that and run its command again; what only a proof stopped finishes with `--skip-proofs`"
            if manifest.get("status") == "failed"
            else "run its command again, to the end",
        )
    model_files.check_adapter(folder)
    base = _base_of_run(manifest, folder) if manifest.get("model") else _base_of(folder)
    if config.trust_remote_code:
        _refuse_code_of_its_choice(base, folder)
    model = hub.find_model(base, offline=config.offline, code=config.trust_remote_code)
    known = (manifest.get("model") or {}).get("sha256")
    if known not in (None, model.sha256):
        raise ExportError(
            f"`{model.path}` is not the model that the run in `{run}` was trained on: its files differ",
            hint="bring back the one that it was trained on, or train again",
        )
    output = config.output or (run if manifest else folder) / "export"
    _check_question(config.question)
    known_question = str(manifest.get("question") or "")
    question = config.question or (known_question if len(known_question) <= MOST_ASKED else "") or DEFAULT_QUESTION
    name = (run if manifest else folder).resolve().name
    return Adapter(
        folder=folder,
        base=models.weights_of(model, say=say),
        base_as_found=model.path,
        base_name=str(manifest["model"]["name"]) if manifest.get("model") else base,
        data_sha256=(manifest.get("identity") or {}).get("data_sha256"),
        output=output,
        name=name,
        question=question,
        probes=list(manifest.get("probes") or ()) or by_itself(),
        run=run if manifest else None,
        sha256=_adapter_hash(folder),
        four_bit_dtype=_four_bit_dtype(manifest),
        four_bit_by_card=not manifest
        and not model_files.is_packed(Path(model.path))
        and _is_of_four_bits(folder / "README.md"),
    )


def _check_question(question: str | None) -> None:
    if question is not None and not question.strip():
        raise UsageError("`--question` is blank", hint="ask something, or leave it out")
    if question is not None and len(question) > LONGEST_QUESTION:
        told = f"`--question` has {len(question):,} characters"
        raise UsageError(told, hint=f"ask one of up to {LONGEST_QUESTION:,}, or leave it out")


def _refuse_code_of_its_choice(base: str, folder: Path) -> None:
    """Let no adapter, nor the run that it stands in, which may be a stranger's, choose whose code runs.

    Raises:
        UsageError: If its base is a repository of the hub, or lies in its own folder.
    """
    local = os.path.isdir(base)
    own = local and Path(base).resolve().is_relative_to(folder.resolve())
    if own or (not local and "/" in base):
        raise UsageError(
            f"`{folder}` itself chooses the code that `--trust-remote-code` would run: `{base}`",
            hint="read that code, bring it here (`hf download NAME --revision COMMIT --local-dir FOLDER`), and write FOLDER "
            "into base_model_name_or_path of adapter_config.json",
        )


def _four_bit_dtype(manifest: Mapping[str, Any]) -> str | None:
    if (manifest.get("config") or {}).get("method") != "qlora":
        return None
    return str(((manifest.get("plan") or {}).get("dtype") or {}).get("value", "bfloat16"))


def _is_of_four_bits(card: Path) -> bool:
    """Say whether an adapter's card, as `engine.load.save_adapter` and PEFT write it, tells of a training on weights of 4 bits."""
    try:
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return "- load_in_4bit: True" in lines


def _adapter_hash(folder: Path) -> str:
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UsageError(f"`{weights}` is missing", hint="give a run directory, or a whole adapter")
    return rundir.sha256_of(weights)


def _base_of_run(manifest: Mapping[str, Any], folder: Path) -> str:
    """Give the folder that was trained on while it is there; else its name, which may be found again."""
    model = manifest["model"]
    if os.path.isdir(model["path"]):
        return str(model["path"])
    named = _base_of(folder)
    return named if "@" in named else str(model["name"])


def _base_of(folder: Path) -> str:
    """Give the base model that an adapter names; one of the hub with the revision that it was trained on, if that is told."""
    settings = model_files.read_object(folder / "adapter_config.json")
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str):
        raise UsageError(f"`{folder}/adapter_config.json` names no base model", hint="give the run it came from")
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.isdir(name)
    return f"{name}@{revision}" if of_hub and revision else name
