"""How a model's layers run in training: computed again on the way back, so that they keep less, and compiled."""

import functools
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from backprop.edges.places import cache_dir

# Layers are of a few kinds, and each is compiled for masks of several shapes, recomputed and not: seven for the padded rows of
# a Gemma 3, twice. Torch stops at eight.
MOST_KINDS = 32
# Dropout draws the numbers that it would draw uncompiled.
AS_UNCOMPILED: dict[str, Any] = {"fallback_random": True}


def layers_of(model: Any) -> list[Any]:
    """Give the layers of the language model that transformers can compute again, in order; not those of a part that sees."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [
        module for module in (base.get_decoder() or base).modules() if isinstance(module, GradientCheckpointingLayer)
    ]


def recompute(model: Any, count: int, offloaded: bool = False, *, compiled: "Compiled | None" = None) -> None:
    """Let the first ``count`` layers compute their activations again on the way back; or all, where none can be told apart.

    The first, since theirs are needed last: by then the others have let go of theirs.

    Args:
        offloaded: Let their inputs wait in main memory.
        compiled: What computes them again within compiled code, where no more is computed than is needed; not where random
            numbers are drawn, which would not be the same again.
    """
    if compiled is not None:
        within = 0 if compiled.around or _draws(model) else count
        compiled.recompute(within, offloaded=offloaded)
        count -= within
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not model.supports_gradient_checkpointing:
        return
    if not count:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = layers_of(model)
    for module in model.modules() if layers else ():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = module in layers[:count]
            if offloaded:
                given: Any = module  # whose function is not a weight
                given._gradient_checkpointing_func = _from_main_memory(given._gradient_checkpointing_func)


def _from_main_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let what a layer begins with wait in main memory until it is needed again."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    def run(*arguments: Any, **named: Any) -> Any:
        hidden = next(filter(torch.is_tensor, (*arguments, *named.values())), None)
        if hidden is None:  # a layer that is given all by name
            return function(*arguments, **named)
        known = hidden.data_ptr(), hidden.shape  # not itself: it would be held for as long as what leaves it

        def leave(saved: Any) -> Any:
            return _to_main_memory(saved) if (saved.data_ptr(), saved.shape) == known else saved

        with saved_tensors_hooks(leave, lambda left: left if torch.is_tensor(left) else _to_gpu(left)):
            return function(*arguments, **named)

    return run


@functools.cache
def _on_its_way(device: Any) -> Any:
    """Give the stream on which copies leave a GPU while it computes."""
    import torch

    return torch.cuda.Stream(device)


def _to_main_memory(tensor: Any) -> tuple[Any, Any, Any]:
    import torch

    stream = _on_its_way(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        try:
            waiting = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise torch.OutOfMemoryError(f"main memory: {error}") from error
        waiting.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)
    return waiting, tensor.device, stream.record_event()


def _to_gpu(saved: tuple[Any, Any, Any]) -> Any:
    import torch

    waiting, device, copied = saved
    torch.cuda.current_stream(device).wait_event(copied)
    return waiting.to(device, non_blocking=True)


def forget_step(model: Any) -> None:
    """Drop what a step that is done again in another way has left: gradients, and memory that is kept for others."""
    from backprop.engine import adapters

    model.zero_grad(set_to_none=True)
    adapters.forget(model)
    give_back_memory()


def give_back_memory(*, main: bool = False) -> None:
    """Let others have what torch keeps of a GPU for later; and of main memory, if that is not wanted soon."""
    import torch

    torch.cuda.empty_cache()
    if main and torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):  # since torch 2.13
        torch.accelerator.empty_host_cache()


class Compiled:
    """The layers of a model and its loss, compiled for rows of any length, where training asks for it; evaluation runs them
    as they are.

    Compiled code is kept in the cache folder: another run of the same kind finds it.
    """

    def __init__(self, model: Any) -> None:
        from backprop.engine import linear_cross_entropy

        self._layers = [(layer, layer.forward) for layer in layers_of(model)]
        self._within = 0
        self.around = not self._layers
        """Whether layers that are computed again are so around their code: what is compiled in pieces would keep what each begins with."""
        self._forward = [as_compiled(forward) for _, forward in self._layers]
        loss = linear_cross_entropy.losses_and_gradient
        self._loss = loss, _for_one_vocabulary(as_compiled(loss))

    def recompute(self, count: int, *, offloaded: bool) -> None:
        """Let the first ``count`` layers keep nothing but what they begin with."""
        self._within = count
        for number, (_, forward) in enumerate(self._layers):
            again = number < count
            compiled = as_compiled(forward, _keeping_little if again else None)
            self._forward[number] = _from_main_memory(compiled) if again and offloaded else compiled

    def recompute_around(self) -> bool:
        """Recompute no more within compiled code, from the next `recompute` on; false if none did."""
        self.around = True
        return self._within > 0

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Let the model run compiled, for the length of the block."""
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        from backprop.engine import linear_cross_entropy

        for (layer, _), compiled in zip(self._layers, self._forward, strict=True):
            layer.forward = compiled
        plain, linear_cross_entropy.losses_and_gradient = self._loss
        try:
            # Layers of more kinds than torch compiles would run as they are without a word; and scales that never change would
            # be handed over as tensors of the CPU, for which each start would find out anew what this CPU knows.
            with config.patch(fail_on_recompile_limit_hit=True, recompile_limit=MOST_KINDS, specialize_float=True):
                yield
        except RuntimeError as error:
            # Said of code that was compiled in pieces before, and is to be one graph.
            if "found no compiled frames" in str(error):
                raise TorchDynamoException(str(error)) from error
            raise
        finally:
            for layer, _ in self._layers:
                del layer.forward
            linear_cross_entropy.losses_and_gradient = plain


def as_compiled(function: Callable[..., Any], backend: Any = None) -> Any:
    """Give compiled code for tensors of any length, which is kept in the cache folder."""
    import torch

    keep_compiled_code()
    if backend is None:
        return torch.compile(function, dynamic=True, options=AS_UNCOMPILED)
    return torch.compile(function, dynamic=True, backend=backend, fullgraph=True)


def _for_one_vocabulary(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Let compiled code know how many words there are: told of it with each call, it would divide by that for every logit."""

    def known(logits: Any, targets: Any, *, wanted: bool) -> Any:
        from torch._dynamo import mark_static

        mark_static(logits, 1)
        return loss(logits, targets, wanted=wanted)

    return known


def _keeping_little(graph: Any, inputs: Any) -> Any:
    """Compile for the way back to begin with what the way forward began with."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=0.0):
        return compile_fx(graph, inputs, config_patches=AS_UNCOMPILED)


def _draws(model: Any) -> bool:
    """Say whether a layer draws random numbers."""
    import torch

    def named(settings: Any) -> bool:
        if isinstance(settings, dict):
            return any(
                named(value) or (isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name))
                for name, value in settings.items()
            )
        return isinstance(settings, list) and any(map(named, settings))

    dropped = (module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    return any(dropped) or named(model.config.to_dict())


def why_not_compiled(error: Exception) -> str:
    """Say what such a failure means, in a line."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    if isinstance(error, FailOnRecompileLimitHit):
        return "they are of more kinds than torch compiles"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def failures_of_compiling() -> tuple[type[Exception], ...]:
    """Give what is raised where layers cannot be compiled."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return (TorchDynamoException, FailOnRecompileLimitHit)


def keep_compiled_code() -> None:
    """Let compilers keep what they make in the cache folder, unless the user has said where."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing transformers sets this one, to a folder that the next start of the machine empties.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(cache_dir() / folder))
