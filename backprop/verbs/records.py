"""What earlier exports wrote down beside their files, so that the same command need not do it again."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backprop.config import ExportConfig
from backprop.edges import rundir
from backprop.errors import RejectedError, UsageError
from backprop.events import Exported
from backprop.verbs import bases, importance
from backprop.verbs.source import Adapter

# Beside the exported files: from which adapter each came, its hash, and what it answered.
RECORDS = "exports.json"


def _records(adapter: Adapter) -> dict[str, Any]:
    """Read what earlier calls wrote down; nothing where that cannot be read."""
    try:
        found = json.loads((adapter.output / RECORDS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_others(
    adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, *, all_written: bool = True
) -> dict[str, Exported]:
    """Refuse to write over files, and give those that an earlier call made of this very adapter, whole.

    One that was never verified is made again if it is to be.

    Args:
        all_written: Whether all of ``targets`` will be; else those that were made of this adapter by other options may stay.

    Raises:
        UsageError: If a file is there that is not one of them.
    """
    records = _records(adapter)
    done: dict[str, Exported] = {}
    for kind, target in targets.items():
        if not target.exists():
            continue
        known = records.get(target.name) or {}
        same = known.get("question") == adapter.question and known.get("options", {}) == _options(config, kind)
        ours = known.get("adapter") == adapter.sha256 and known.get("sha256") == _hash_of(target)
        if ours and not same and not all_written:
            continue
        if not (ours and same):
            raise UsageError(f"`{target}` is there already", hint="add `--overwrite`, or choose another `--output`")
        if (known.get("verified") or not config.verify) and not _nearer_base_unknown(adapter, config, known):
            done[kind] = Exported(**known["told"])
    return done


def record(
    adapter: Adapter, target: Path, beside: Path, told: Exported, config: ExportConfig, *, base: str | None = None
) -> None:
    """Write down what is about to stand at ``target``: the same command need not do it again.

    Args:
        base: Which of the bases of a training on 4-bit weights it was merged into, as `bases.name_of` tells.
    """
    records = _records(adapter)
    records[target.name] = {
        "adapter": adapter.sha256,
        "question": adapter.question,
        "sha256": _hash_of(beside),
        "verified": config.verify,
        "base": base,
        "options": _options(config, told.quantization),
        "told": asdict(told),
    }
    rundir.write_text(adapter.output / RECORDS, json.dumps(records, indent=2) + "\n")


def _nearer_base_unknown(adapter: Adapter, config: ExportConfig, known: Mapping[str, Any]) -> bool:
    """Say whether a file was merged into a base without measuring which is nearer, and that could be measured now."""
    unmeasured = config.format != "lora-gguf" and adapter.four_bit_dtype is not None and known.get("base") is None
    return unmeasured and bases.measurable(config)


def remember_choice(adapter: Adapter, config: ExportConfig, kind: str) -> None:
    """Write down what `--budget` chose: the same command need not try again."""
    records = _records(adapter)
    records[_CHOICE] = {**_choice(adapter, config), "kind": kind}
    rundir.write_text(adapter.output / RECORDS, json.dumps(records, indent=2) + "\n")


def known_choice(adapter: Adapter, config: ExportConfig) -> str | None:
    """Give what `--budget` chose for this very adapter before; None if it did not, or is to choose again."""
    found = _records(adapter).get(_CHOICE) or {}
    same = found == {**_choice(adapter, config), "kind": found.get("kind")}
    return found["kind"] if same and not config.overwrite else None


_CHOICE = "--budget"


def _choice(adapter: Adapter, config: ExportConfig) -> dict[str, Any]:
    return {"adapter": adapter.sha256, "budget": config.budget, "imatrix": importance.identity(config)}


def _options(config: ExportConfig, kind: str) -> dict[str, str]:
    """Give the options that decide what is in a file of this type."""
    options = {
        "imatrix": importance.identity(config) if importance.matters(kind, config) else None,
        "split_size": config.split_size,
    }
    return {name: value for name, value in options.items() if value is not None}


def _hash_of(target: Path) -> str:
    files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
    return " ".join(rundir.sha256_of(path) for path in files)


def answered(
    adapter: Adapter, answer: str, target: Path, written: Path, rejected: Path, *, format: str, quantization: str
) -> Exported:
    """Say what is about to stand at ``target``, now that it answers.

    Args:
        written: The file, or the folder, as it is before it gets its name.
        rejected: Where a file is kept that answers nothing.

    Raises:
        RejectedError: If the answer is empty.
    """
    if not answer:
        hint = "ask another `--question`, or train longer"
        if written.is_file():
            written.replace(rejected)
            hint += f"; the file is kept as `{rejected}`"
        raise RejectedError(f"the {quantization} file gave no answer to {adapter.question!r}", hint=hint)
    files = [path for path in written.rglob("*") if path.is_file()] if written.is_dir() else [written]
    return Exported(
        path=str(target),
        format=format,
        quantization=quantization,
        size_bytes=sum(path.stat().st_size for path in files),
        question=adapter.question,
        answer=answer,
    )
