"""What a run must prove of itself, on the loaded model: packing, 4-bit weights, what moved, what was learnt, that it stops.

Each proof measures and says what it found; the caller decides what a failed one means.
"""

import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from backprop.core.data.render import Example
from backprop.engine.attention import UnknownAttentionError, within_documents
from backprop.engine.batches import computing, inputs_on, packed, padded
from backprop.engine.cross_entropy import sum_of_losses
from backprop.engine.load import HfTokenizer
from backprop.events import Proved

# Tokens of each of the two documents of the packing proof: enough for attention to mix, few enough to cost nothing.
PROOF_TOKENS = 12
# How far rounding moves the logits of a well-conditioned model, as a share of their norm; and what is no rounding.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.02}
MOST_ROUNDING = {"float32": 0.01, "bfloat16": 0.5}


def timed(prove: Callable[[], Proved]) -> Proved:
    """Add the time that a proof took, in seconds."""
    started = time.monotonic()
    proof = prove()
    return replace(proof, seconds=round(proof.seconds + time.monotonic() - started, 3))


def prove_isolation(model: Any, *, dtype: str = "float32") -> Proved:
    """Two documents in a row: changing the first must not move the logits of the second, nor may being packed.

    Logits of a packed document may differ from those of the document alone by rounding only. How far a model carries
    rounding is its own affair (a deep random one in bfloat16: 6 %), so it is measured: by how much padding moves them.

    Args:
        dtype: What training computes in: kernels differ with it.
    """
    import torch

    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, vocabulary, (3, PROOF_TOKENS), generator=generator).tolist()
    first, other, second = (Example(tuple(ids), (True,) * PROOF_TOKENS) for ids in draw)
    longer = Example(first.ids + other.ids, first.mask + other.mask)
    name = "packed documents are isolated"
    try:
        with within_documents(model), computing(model, dtype):
            kept, moved = (_logits(model, packed([one, second]))[0, PROOF_TOKENS:] for one in (first, other))
    except (UnknownAttentionError, TypeError) as error:
        return Proved(name=name, ok=False, found=f"this architecture cannot attend within documents: {error}")
    with computing(model, dtype):
        alone = _logits(model, padded([second]))[0]
        beside = _logits(model, padded([second, longer]))[0, :PROOF_TOKENS]
    leak = float((kept - moved).abs().max() / alone.std())
    packing, padding = (float((one - alone).norm() / alone.norm()) for one in (kept, beside))
    allowed = min(max(ROUNDING[dtype], 4 * padding), MOST_ROUNDING[dtype])
    return Proved(
        name=name,
        ok=leak <= 1e-6 and packing <= allowed,
        found=f"changing the first document moves the second's logits by {leak:.1g} of their spread; "
        f"being packed moves them by {packing:.1g}, being padded by {padding:.1g}",
    )


def _logits(model: Any, one: Mapping[str, Any]) -> Any:
    import torch

    device = model.get_input_embeddings().weight.device
    inputs = {name: value for name, value in inputs_on(one, device).items() if name != "labels"}
    was_training = bool(model.training)
    model.eval()
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.float()
    model.train(was_training)
    return logits


# Largest relative error that rounding in bfloat16 may make in a sum over a layer's width.
LAYER_TOLERANCE = 2e-2


def prove_quantized_layer(model: Any, *, compiled: bool = False) -> Proved:
    """Hold one 4-bit layer's output and gradient, as compiled code if layers are, against the same layer dequantized."""
    import torch
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]

    from backprop.engine import layers

    name = "a 4-bit layer computes what its weights say"
    layer: Any = next((one for one in model.modules() if isinstance(one, Linear4bit)), None)
    if layer is None:
        return Proved(name=name, ok=False, found="no layer is held in 4 bits")

    weight: Any = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x_TI = torch.randn(16, weight.shape[1], generator=generator, device=weight.device)
    dtype = layer.weight.quant_state.dtype
    mine: Any = x_TI.to(dtype, copy=True).requires_grad_()
    theirs: Any = mine.detach().to(torch.float32, copy=True).requires_grad_()
    upstream = torch.randn(16, weight.shape[0], generator=generator, device=weight.device)

    def there_and_back(forward: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        output = forward(x).float()
        (gradient,) = torch.autograd.grad((output * upstream).sum(), x)
        return output.detach(), gradient.float()

    found = [there_and_back(layer, mine)]
    if compiled:
        with suppress(*layers.failures_of_compiling()):  # then it is not in training either
            found.append(there_and_back(layers.as_compiled(layer.forward), mine))
    expected = there_and_back(lambda x: torch.nn.functional.linear(x, weight, _float(layer.bias)), theirs)
    errors = [
        max(float((one - exact).norm() / exact.norm()) for one in made)
        for *made, exact in zip(*found, expected, strict=True)
    ]
    return Proved(
        name=name,
        ok=all(error <= LAYER_TOLERANCE for error in errors),
        found=f"output off by {errors[0]:.1g}, gradient by {errors[1]:.1g}, at most {LAYER_TOLERANCE:g} allowed",
    )


def _float(bias: Any) -> Any:
    return None if bias is None else bias.float()


class Movement:
    """The first step must move every adapter matrix that has a gradient, each B among them, and nothing else."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._trained = {name: _checksum(value) for name, value in self._parameters(trained=True)}
        self._frozen = {name: _checksum(value) for name, value in self._parameters(trained=False)}
        self._without_gradient: set[str] = set()

    def _parameters(self, *, trained: bool) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in self._model.named_parameters() if value.requires_grad == trained]

    def see_gradients(self) -> None:
        """Note which matrices this step gives a gradient; before the optimizer uses it up."""
        self._without_gradient = {
            name for name, value in self._parameters(trained=True) if value.grad is None or not bool(value.grad.any())
        }

    def prove(self) -> Proved:
        """Compare with the state before the step."""
        parameters = self._parameters(trained=True)
        still = {name for name, value in parameters if self._trained[name] == _checksum(value)}
        held = {name for name, _ in self._parameters(trained=False) if "lora_" in name}
        # A pair starts with one matrix at zero, which leaves the other without a gradient; a pair without any at all is
        # of a layer that this step did not need, as an expert that no token was sent to. If most are, something is wrong.
        idle = {name for name in still & self._without_gradient if _partner(name) in still | {""}}
        stuck = sorted(held | (still - self._without_gradient) | (idle if 2 * len(idle) > len(parameters) else set()))
        changed = sorted(
            name for name, value in self._parameters(trained=False) if _checksum(value) != self._frozen[name]
        )
        found = f"{len(parameters) - len(still)} of {len(parameters)} trained matrices moved"
        if stuck:
            found += f"; {len(stuck)} that should have did not, first: {stuck[0]}"
        if changed:
            found += f"; {len(changed)} frozen weights changed, first: {changed[0]}"
        else:
            found += f", and none of {len(self._frozen)} frozen weights"
        return Proved(name="the adapter moves, and nothing else", ok=not stuck and not changed, found=found)


def _partner(name: str) -> str:
    """Give the name of the other matrix of a pair; empty for what stands alone."""
    for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if one in name:
            return name.replace(one, other)
        if other in name:
            return name.replace(other, one)
    return ""


# Elements that are summed at once: their copy as 64-bit integers takes 32 MiB.
CHUNK = 4 * 2**20


def _checksum(weight: Any) -> int:
    """Sum the bits, a part at a time: a change of any one weight shows."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    parts = weight.detach().reshape(-1).view(bits).split(CHUNK)
    return int(torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()) if parts else 0


# A loss may rise by this share without the run having made the model worse: held-out sets are small.
ROOM_FOR_NOISE = 0.05
# That of preferences is the same number for all before training; what rounding alone changes is less than this.
ROOM_OF_PREFERENCES = 0.005
# Below this, tokens are nine parts in ten certain: a second run on known rows has nothing left to get better at.
KNOWN = 0.1


def prove_order(seen: Sequence[int], planned: Sequence[int]) -> Proved:
    """Every example must have been trained on as often as an undisturbed run would, across all interruptions."""
    wrong = [number for number, (one, other) in enumerate(zip(seen, planned, strict=True)) if one != other]
    found = f"{sum(seen)} examples in all, each {min(seen)} to {max(seen)} times"
    if wrong:
        found += f"; {len(wrong)} not as often as planned, first: number {wrong[0]}, {seen[wrong[0]]} times instead of "
        found += f"{planned[wrong[0]]}"
    return Proved(name="every example is seen as often as planned", ok=not wrong, found=found)


def prove_learnt(before: float, after: float, *, held_out: bool, preferences: bool = False) -> Proved:
    """Compare the loss before and after; of preferences it begins where nothing is known, and must not rise."""
    rows = "held-out rows" if held_out else "rows of the training data"
    room = after <= before * (1 + ROOM_FOR_NOISE)
    return Proved(
        name="the model got better",
        ok=math.isfinite(after)
        and (after <= before * (1 + ROOM_OF_PREFERENCES) if preferences else room or after < KNOWN),
        found=f"loss {before:.3f} before and {after:.3f} after, on {rows}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the model wrote when asked."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    stopped: int
    """How many answers ended by themselves."""
    end_loss: float
    """Mean negative log-likelihood of the token that ends the wanted answers, in nats."""


MOST_ASKED = 3
MOST_NEW_TOKENS = 256


def askable(examples: Sequence[Example]) -> list[Example]:
    """Choose the examples with a prompt whose answers are shortest; none if all is text to be continued."""
    asked = (one for one in examples if one.answers and one.answers == one.ended and one.desirable)
    return heapq.nsmallest(MOST_ASKED, asked, key=lambda example: example.num_trained)


def ask(model: Any, tokenizer: HfTokenizer, examples: Sequence[Example]) -> Asked:
    """Let the model answer the last question of each example, greedily, and see whether it stops."""
    import torch

    splits = [_last_answer(example) for example in examples]
    prompts = [example.ids[:start] for example, (start, _) in zip(examples, splits, strict=True)]
    longest = max(end - start for start, end in splits)
    width = max(len(prompt) for prompt in prompts)
    device = model.get_input_embeddings().weight.device
    gaps = [width - len(prompt) for prompt in prompts]
    rows = torch.tensor([[0] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * gap + [1] * len(p) for gap, p in zip(gaps, prompts, strict=True)], device=device)
    ends = _end_tokens(model, tokenizer, examples, splits)
    was_training = bool(model.training)
    model.eval()
    with torch.no_grad():
        written = model.generate(
            input_ids=rows,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=min(MOST_NEW_TOKENS, 2 * longest + 8),
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.inner.pad_token_id,
        )[:, width:].tolist()
    end_loss = _end_loss(model, examples, splits)
    model.train(was_training)
    whole: Any = tokenizer.inner
    return Asked(
        questions=tuple(example.question for example in examples),
        answers=tuple(whole.decode(_until(row, ends), skip_special_tokens=True).strip() for row in written),
        stopped=sum(any(token in ends for token in row) for row in written),
        end_loss=end_loss,
    )


def _last_answer(example: Example) -> tuple[int, int]:
    """Give the first and one past the last trained token of the last answer."""
    end = max(index for index, on in enumerate(example.mask) if on) + 1
    start = end
    while example.mask[start - 1]:
        start -= 1
    return start, end


def _end_tokens(
    model: Any, tokenizer: HfTokenizer, examples: Sequence[Example], splits: Sequence[tuple[int, int]]
) -> set[int]:
    """Collect what ends an answer: for the model, for its tokenizer, and in these examples."""
    configured: Any = model.generation_config.eos_token_id
    whole: Any = tokenizer.inner
    known = [*configured] if isinstance(configured, list) else [configured]
    written = [example.ids[end - 1] for example, (_, end) in zip(examples, splits, strict=True)]
    return {end for end in (*known, whole.eos_token_id, *written) if end is not None}


def _until(row: Sequence[int], ends: set[int]) -> list[int]:
    return list(row[: next((index for index, token in enumerate(row) if token in ends), len(row))])


def _end_loss(model: Any, examples: Sequence[Example], splits: Sequence[tuple[int, int]]) -> float:
    import torch

    device = model.get_input_embeddings().weight.device
    total = 0.0
    with torch.no_grad():
        for example, (_, end) in zip(examples, splits, strict=True):
            only_end = Example(example.ids[:end], (False,) * (end - 1) + (True,))
            total += float(sum_of_losses(model, inputs_on(padded([only_end]), device)))
    return total / len(examples)


# A change of the end's loss that is more than noise, in nats.
CLEARLY = 0.1
# An end that is this likely, one in ten, will come; a model that is not asked greedily ends there soon.
LIKELY = math.log(10)


# Below this loss, in nats per token, a model knows its answers, and should know their end.
LEARNT = 1.0


def prove_stopping(before: Asked, after: Asked, *, loss: float) -> Proved | None:
    """An answer must end by itself, or be likely to. None if training was too short to tell.

    Args:
        loss: The mean over the trained tokens of the last step: where ends are not among them, it is low without them.
    """
    asked = len(after.answers)
    likely = after.end_loss < LIKELY
    unlikelier = after.end_loss > before.end_loss + CLEARLY
    if not (after.stopped or likely or unlikelier or loss < LEARNT):
        return None
    return Proved(
        name="answers stop by themselves",
        ok=after.stopped > 0 or likely,
        found=f"{after.stopped} of {asked} answers ended; their end token has probability "
        f"{math.exp(-after.end_loss):.2g}, {math.exp(-before.end_loss):.2g} before",
    )
