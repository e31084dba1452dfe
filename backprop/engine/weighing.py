"""What a model says of answers before training: weighed once, kept on the disk as it goes, and put beside them."""

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backprop.core.data.render import Example
from backprop.core.data.sequences import Lazy
from backprop.edges import checkpoints, stopping
from backprop.engine.batches import PassSize
from backprop.engine.objectives import with_references
from backprop.events import JSON, Phase, Sink

if TYPE_CHECKING:
    import torch

REFERENCES = "references.safetensors"
# Examples that share passes. Whatever was saved, the next ones share them with the same others, to the same bits.
WEIGHED_AT_ONCE = 64
TELL_EVERY_S, SAVE_EVERY_S = 10.0, 60.0


class Weighing:
    """Finds how likely a model finds the sides of examples, and goes on where it was stopped.

    Args:
        needed: Numbers of the examples that are to be weighed.
        folder: Where what was found is kept.
        run: What must be the same for it to go on.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        needed: Sequence[int],
        size: PassSize,
        *,
        folder: Path,
        run: Mapping[str, JSON],
        say: Sink,
    ) -> None:
        import torch

        self._model, self._examples, self._needed, self._size = model, examples, needed, size
        self._folder, self._run, self._say = folder, run, say
        self._found = torch.full((len(examples), len(examples[0].sides)), torch.nan)
        self._done = self._saved = 0

    def go_on(self, kept: checkpoints.Checkpoint) -> None:
        """Take what was found before."""
        from safetensors.torch import load_file

        self._found = load_file(kept.folder / REFERENCES)["references"]
        self._done = self._saved = int(kept.state["weighed"])

    def finish(self) -> "torch.Tensor":
        """Weigh the rest, and give all: of shape (N, sides), NaN where none is needed."""
        self._tell()
        told_at = saved_at = time.monotonic()
        while self._done < len(self._needed):
            self._weigh(self._needed[self._done : self._done + WEIGHED_AT_ONCE])
            now = time.monotonic()
            if now - told_at >= TELL_EVERY_S:
                self._tell()
                told_at = now
            if now - saved_at >= SAVE_EVERY_S:
                self.save()
                saved_at = now
        self.save()
        return self._found

    def _weigh(self, numbers: Sequence[int]) -> None:
        import torch

        weighed = with_references(self._model, [self._examples[number] for number in numbers], self._size)
        with stopping.held():
            self._found[torch.tensor(numbers)] = torch.tensor([example.references for example in weighed])
            self._done += len(numbers)

    def save(self) -> None:
        """Keep what was found, if there is more of it than is kept. Safe in any thread."""
        with stopping.held():
            if self._done > self._saved:
                checkpoints.put(self._folder, {**self._run, "weighed": self._done}, self._fill)
                self._saved = self._done

    def _fill(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({"references": self._found}, folder / REFERENCES)

    def _tell(self) -> None:
        self._say(Phase(name=f"weighing the answers before training: {self._done} of {len(self._needed)}"))


class Both(Lazy[Example]):
    """The examples that are trained on, then those that are held out."""

    def __init__(self, trained: Sequence[Example], held_out: Sequence[Example]) -> None:
        self._trained, self._held_out = trained, held_out

    def __len__(self) -> int:
        return len(self._trained) + len(self._held_out)

    def _item(self, number: int) -> Example:
        beyond = number - len(self._trained)
        return self._trained[number] if beyond < 0 else self._held_out[beyond]


def needed_of(times_seen: Sequence[int], num_held_out: int, *, first: int) -> Sequence[int]:
    """Give the numbers of the examples that are trained on, of the ``first`` ones, and of all that are held out."""
    seen = (number for number, times in enumerate(times_seen) if times or number < first)
    return array("I", chain(seen, range(len(times_seen), len(times_seen) + num_held_out)))


class Weighed(Lazy[Example]):
    """Examples with what was found of them."""

    def __init__(self, examples: Sequence[Example], references: "torch.Tensor") -> None:
        self._examples, self._references = examples, references

    def __len__(self) -> int:
        return len(self._examples)

    def _item(self, number: int) -> Example:
        return replace(self._examples[number], references=tuple(self._references[number].tolist()))
