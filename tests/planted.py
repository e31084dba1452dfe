"""Faults in a merge, planted where the converter reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backprop.engine import streamed
from backprop.verbs import gguf


def weights_changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def merge_there(folder: Path, merger: streamed.Merger) -> None:
    """Put merged weights in the place of the link to the base model's."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    merged = {name: merger.merge(name, one) if merger.changes(name) else one for name, one in weights.items()}
    (folder / "model.safetensors").unlink()
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], None]) -> None:
    """Let the converter read a folder whose weights are merged already, and a fault in it."""
    write_options, write_card = streamed.write_options, gguf.write_card
    mergers: list[streamed.Merger] = []

    def merged_already(path: Path, base: Path, adapter: Path, **told: Any) -> None:
        mergers.append(streamed.Merger(base, adapter, rounding=told["rounding"]))
        write_options(path, base, None, **told)

    def faulty(adapter: Any, folder: Path, *, name: str) -> None:
        write_card(adapter, folder, name=name)
        merge_there(folder, mergers[0])
        fault(folder)

    monkeypatch.setattr(streamed, "write_options", merged_already)
    monkeypatch.setattr(gguf, "write_card", faulty)
