"""The model card of what is exported: llama.cpp's converter writes what it says into the GGUF's own metadata."""

import json
from pathlib import Path
from typing import Any

from backprop.presets import PRESETS
from backprop.verbs.source import Adapter

CARD = "README.md"
MOST_CHARACTERS = 200
# Of a stranger's card, what is read to find its licence.
HEAD_CHARACTERS = 100_000


def write_card(adapter: Adapter, folder: Path, *, name: str) -> None:
    """Write a card of the ``name``, the base model, its licence and the hash of the training data into ``folder``."""
    facts: dict[str, Any] = {
        "model_name": _plain(name),
        "base_model": [_base(adapter.base_name, Path(adapter.base_as_found))],
    }
    licence = licence_of(Path(adapter.base))
    if licence is not None:
        facts["license"] = licence
    if adapter.data_sha256 is not None:
        facts["datasets"] = [{"name": "training data", "version": f"sha256:{adapter.data_sha256}"}]
    # JSON is YAML, and quotes whatever a name may hold.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    (folder / CARD).write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8")


def licence_of(model: Path) -> str | None:
    """Give the licence that a model's card names; None if it has no card, or that names none."""
    import yaml

    try:
        with (model / CARD).open(encoding="utf-8") as card:
            text = card.read(HEAD_CHARACTERS)
        found = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (
        FileNotFoundError,
        IndexError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ):  # a value may be a day that never was
        return None
    licence = found.get("license") if isinstance(found, dict) else None
    return _plain(licence) if isinstance(licence, str) else None


def _base(name: str, folder: Path) -> dict[str, str]:
    """Describe the base model: by its place on the hub, or by the name of its folder."""
    known = PRESETS[name].hub_id if name in PRESETS else name
    is_path = Path(known).is_absolute() or known.startswith((".", "~")) or folder.parts[-2:] == Path(known).parts
    if is_path or known.count("/") != 1:
        return {"name": _plain(Path(known).name)}
    hub_id = known.partition("@")[0]
    owner, _, model = hub_id.partition("/")
    return {
        "name": _plain(model),
        "organization": _plain(owner),
        "repo_url": f"https://huggingface.co/{_plain(hub_id)}",
    }


def _plain(text: str) -> str:
    """Leave out what cannot be printed: line ends, control characters, halves of surrogate pairs."""
    return "".join(character if character.isprintable() else " " for character in text)[:MOST_CHARACTERS]
