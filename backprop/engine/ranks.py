"""One optimizer step over several processes: each computes a share of its passes, and their gradients are added up.

The main process is rank 0 and holds everything: examples, optimizer, checkpoints, signals. The others (`worker`) are given
the weights anew in each step and keep nothing. What is to be done is said over a socket to each, which also tells at once
when its process has died; weights and gradients go through torch.distributed, only when every rank is known to be there.
"""

import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from backprop.config import TrainConfig
from backprop.core.data.pack import balanced
from backprop.core.hardware import Hardware
from backprop.core.plan import Plan
from backprop.edges import process
from backprop.engine import layers
from backprop.engine.batches import computing
from backprop.engine.objectives import Objective, Part, Pass, Totals, is_mismatched, moved_of
from backprop.errors import BackpropError, HardwareError, ToolError

WORKER = (sys.executable, "-m", "backprop.engine.worker")
"""The program of a further rank; it takes the number of its socket."""
# Weights and gradients are sent in parts of this size: few enough calls, and no second copy of a whole model.
BUCKET_BYTES = 64 * 2**20
# All ranks have come when an exchange begins: it takes seconds at most.
EXCHANGE_MOST = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker must know to load the model that rank 0 trains."""

    path: str
    config: TrainConfig
    plan: Plan
    rank: int
    store: str
    """A file through which the ranks find each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank computes of a step."""

    objective: Objective
    passes: Mapping[int, Pass]
    """By their number in the step."""
    seed: int
    """Of the step; what is random in a pass depends on it and the pass's number alone."""
    totals: Totals | None
    """None if it is only to be found how far the model has moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What came of a share."""

    values: Mapping[int, Any]
    """Of each pass, a `Part`; or how far the model has moved."""
    with_gradient: Sequence[int]
    """Numbers of the trained weights that have a gradient."""
    not_compiled: str = ""
    """Why this rank's layers could not be compiled, though the plan says so."""


class Rank:
    """What one process does of a step.

    Args:
        group: The process group of all ranks; None if there is no other.
        finish: Waits for an exchange under way.
    """

    def __init__(self, model: Any, plan: Plan, group: Any, finish: Callable[[Any], object]) -> None:
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.device = next(model.parameters()).device
        self._recomputed, self._not_compiled, self._compile = (-1, False), "", plan.compiles_layers
        self._model, self._dtype, self._group, self._finish = model, plan.dtype.value, group, finish
        self._compiled = layers.Compiled(model) if self._compile else None
        self.recompute(plan.recompute.value, plan.offload.value)

    def recompute(self, count: int, offloaded: bool = False) -> bool:
        """Let so many layers compute their activations again on the way back, some from main memory; false if they do."""
        count = min(count, len(layers.layers_of(self._model)) or count)
        before, self._recomputed = self._recomputed, (count, offloaded and self.device.type == "cuda")
        if self._recomputed != before:
            layers.recompute(self._model, *self._recomputed, compiled=self._compiled)
        return self._recomputed != before

    def keep_16_bits(self, numbers: Sequence[int] | None) -> None:
        """Compute the way back as the way forward, in some layers of the decoder or in all."""
        from backprop.engine import fp8

        fp8.undo(self._model, numbers)
        # If that failed, it may have been for what is undone.
        self._compiled, self._not_compiled = layers.Compiled(self._model) if self._compile else None, ""
        layers.recompute(self._model, *self._recomputed, compiled=self._compiled)

    def take_base(self) -> None:
        """Let every rank have the frozen weights of rank 0 under its adapters, which PiSSA has changed."""
        self._broadcast([weight for name, weight in self._model.named_parameters() if ".base_layer." in name])

    def take_weights(self, dtypes: Sequence[Any]) -> None:
        """Let every rank have the trained weights of rank 0, in the precision that they have there."""
        for weight, dtype in zip(self.trained, dtypes, strict=True):
            weight.data = weight.data.to(dtype)
        self._broadcast(self.trained)

    def compute(self, share: Share) -> Found | None:
        """Run the passes of a share, forward and, if its totals are known, backward; None if the memory was full."""
        while self._compiled is not None:
            try:
                with self._compiled.in_use():
                    return self._compute(share)
            except layers.failures_of_compiling() as error:
                if not self._compiled.recompute_around():
                    self._compiled, self._not_compiled = None, layers.why_not_compiled(error)
            layers.recompute(self._model, *self._recomputed, compiled=self._compiled)
            layers.forget_step(self._model)
        return self._compute(share)

    def _compute(self, share: Share) -> Found | None:
        import torch

        values: dict[int, Any] = {}
        try:
            for number, one in share.passes.items():
                torch.manual_seed(share.seed + number)
                if share.totals is None:
                    with torch.no_grad(), computing(self._model, self._dtype):
                        values[number] = moved_of(self._model, one, self.device)
                    continue
                with computing(self._model, self._dtype):
                    part = share.objective.part(self._model, one, share.totals, self.device)
                part.loss.backward()
                values[number] = Part(part.loss.detach(), part.margins)
                del part  # whose graph holds two copies of what goes through the layers
        except torch.OutOfMemoryError:
            return None
        having = [number for number, weight in enumerate(self.trained) if weight.grad is not None]
        return Found(values=values, with_gradient=having, not_compiled=self._not_compiled)

    def add_up(self, numbers: Sequence[int]) -> None:
        """Sum the gradients of these weights over all ranks, into those of rank 0; the others forget theirs."""
        import torch

        for number in numbers:
            weight = self.trained[number]
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for flat, gradients in _in_buckets([self.trained[number].grad for number in numbers]):
            self._finish(self._group.reduce(flat, 0))
            _spread(flat, gradients)

    def forget(self) -> None:
        """Drop the gradients of a step that is done again in another way, and the memory that it left."""
        layers.forget_step(self._model)

    def _broadcast(self, tensors: Sequence[Any]) -> None:
        for flat, parts in _in_buckets([tensor.data for tensor in tensors]):
            self._finish(self._group.broadcast(flat, 0))
            _spread(flat, parts)


def _in_buckets(tensors: Sequence[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Give neighbours of one precision as one flat copy, and themselves."""
    import torch

    bucket: list[Any] = []
    for tensor in [*tensors, None]:
        size = sum(one.nbytes for one in bucket)
        if bucket and (tensor is None or tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield torch.cat([one.reshape(-1) for one in bucket]), bucket
            bucket = []
        bucket.append(tensor)


def _spread(flat: Any, tensors: Sequence[Any]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def join(job_store: str, rank: int, num_ranks: int, device: str) -> Any:
    """Meet the other ranks, and give the process group.

    It is not torch's default one: trainers that saw one would believe that they are to share the work.
    """
    import torch
    from torch._C._distributed_c10d import FileStore, ProcessGroup, ProcessGroupGloo

    # Both listen on a port of their own for each other; no other machine is to reach it.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    # Else a thread of torch ends the process when another has died; here rank 0 tells of it.
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
    store = FileStore(job_store, num_ranks)
    backend: Any
    if device == "cuda":
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = EXCHANGE_MOST
        backend, kind = ProcessGroupNCCL(store, rank, num_ranks, options), ProcessGroup.BackendType.NCCL
        backend._set_sequence_number_for_group()
        backend.eager_connect_single_device(torch.device("cuda", 0))
    else:
        backend, kind = ProcessGroupGloo(store, rank, num_ranks, EXCHANGE_MOST), ProcessGroup.BackendType.GLOO
    group = ProcessGroup(store, rank, num_ranks)
    group._set_default_backend(kind)
    group._register_backend(torch.device(device), kind, backend)
    return group


def tell(connection: Connection, what: Any) -> None:
    """Send an object; as plain bytes, since torch would have tensors shared between processes."""
    connection.send_bytes(pickle.dumps(what))


def hear(connection: Connection) -> Any:
    """Wait for the next object.

    Raises:
        EOFError: If the other process has ended.
    """
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - from our own process, over a socket without a name # nosec B301 # nosemgrep


@dataclass(frozen=True, slots=True)
class Worker:
    """A further rank, as rank 0 sees it."""

    connection: Connection
    end: Callable[[], str]
    """Waits for the end of a process that has closed its connection, and raises what it said."""
    gpu: str


class Ranks:
    """All ranks of a training, from rank 0: it computes a share itself, and the whole step where there is no other.

    Args:
        store: A file through which the ranks find each other.
    """

    def __init__(self, plan: Plan, *, pissa: bool = False, store: str = "", workers: Sequence[Worker] = ()) -> None:
        self._plan, self._pissa, self._store, self._workers = plan, pissa, store, workers
        self.not_compiled = ""
        """Why some rank's layers could not be compiled, though the plan says so."""
        self._group: Any = None
        self._rank: Rank | None = None

    def step(self, model: Any, objective: Objective, passes: Sequence[Pass], *, seed: int) -> list[Part] | None:
        """Leave the gradients of a step in ``model``, and give its parts in order; None if some rank's memory was full.

        Then no rank has kept a gradient.

        Raises:
            HardwareError: If the process of another rank has ended.
        """
        self.meet(model)
        rank = self._rank
        assert rank is not None
        if self._workers:
            self._all(rank, "take_weights", [weight.dtype for weight in rank.trained])
        mismatched = {number: one for number, one in enumerate(passes) if is_mismatched(one)}
        others = {number: one for number, one in enumerate(passes) if number not in mismatched}
        moved = self._share_out(rank, objective, mismatched, seed, None) if mismatched else ({}, [])
        parts = moved and self._share_out(
            rank,
            objective,
            others,
            seed,
            objective.totals(passes, [moved[0][number].to(rank.device) for number in mismatched]),
        )
        if parts is None:
            self.forget()
            return None
        if self._workers:
            self._all(rank, "add_up", parts[1])
        return [Part(parts[0][number].loss.to(rank.device), parts[0][number].margins) for number in others]

    def _share_out(
        self, rank: Rank, objective: Objective, passes: Mapping[int, Pass], seed: int, totals: Totals | None
    ) -> tuple[dict[int, Any], list[int]] | None:
        """Let each rank compute some of the passes; give what was found, and which weights have a gradient somewhere."""
        numbers = list(passes)
        rows = balanced([passes[number]["input_ids"].numel() for number in numbers], 1 + len(self._workers))
        shares = [
            Share(objective=objective, passes={numbers[n]: passes[numbers[n]] for n in row}, seed=seed, totals=totals)
            for row in rows
        ]
        for worker, share in zip(self._workers, shares[1:], strict=True):
            self._tell(worker, "compute", share)
        try:
            own = rank.compute(shares[0])
        except Exception:
            list(map(self._hear, self._workers))  # else these would be taken for answers to the next share
            raise
        found = [own, *map(self._hear, self._workers)]
        whole = [one for one in found if one is not None]
        if len(whole) < len(found):
            return None
        self.not_compiled = next((one.not_compiled for one in whole if one.not_compiled), "")
        values = {number: value for one in whole for number, value in one.values.items()}
        return values, sorted({number for one in whole for number in one.with_gradient})

    def recompute(self, count: int, offloaded: bool = False) -> bool:
        """Let so many layers compute their activations again on the way back, on every rank; false if they do already."""
        assert self._rank is not None
        return self._all(self._rank, "recompute", count, offloaded)

    def keep_16_bits(self, numbers: Sequence[int] | None = None) -> None:
        """Let every rank compute the way back as the way forward, in some layers of the decoder or in all."""
        assert self._rank is not None
        self._all(self._rank, "keep_16_bits", numbers)

    def forget(self) -> None:
        """Let every rank drop its gradients, and memory that it keeps for others."""
        assert self._rank is not None
        self._all(self._rank, "forget")

    def meet(self, model: Any) -> None:
        """Wait until every rank has loaded the model and can exchange weights with the others, if that is not so yet.

        Raises:
            BackpropError: What kept another rank from loading it.
        """
        if self._rank is not None:
            return
        for worker in self._workers:
            self._hear(worker)  # it has loaded the model
        if self._workers:
            joined: Future[Any] = Future()
            threading.Thread(target=self._join, args=(joined,), daemon=True).start()
            for worker in self._workers:
                self._tell(worker, "join")
            while not joined.done():
                self._check()
                time.sleep(0.01)
            self._group = joined.result()
        self._rank = Rank(model, self._plan, self._group, self._finish)
        if self._workers and self._pissa:
            self._all(self._rank, "take_base")

    def _join(self, joined: "Future[Any]") -> None:
        """In a thread, since it waits in C code for those that may never come."""
        try:
            joined.set_result(join(self._store, 0, 1 + len(self._workers), self._plan.device.value))
        except RuntimeError as error:
            joined.set_exception(error)

    def _all(self, rank: Rank, name: str, *arguments: Any) -> Any:
        for worker in self._workers:
            self._tell(worker, name, *arguments)
        return getattr(rank, name)(*arguments)

    def _tell(self, worker: Worker, name: str, *arguments: Any) -> None:
        try:
            tell(worker.connection, (name, arguments))
        except OSError:
            self._hear(worker)

    def _hear(self, worker: Worker) -> Any:
        try:
            heard = hear(worker.connection)
        except (EOFError, OSError):
            try:
                worker.end()
                said = "without a word"
            except ToolError as error:
                said = error.message
            raise HardwareError(
                f"the process for {worker.gpu} ended: {said}",
                hint="look at `nvidia-smi`, `dmesg` and the free main memory; the same command goes on from the last "
                "checkpoint, and with one GPU if `CUDA_VISIBLE_DEVICES` names one",
            ) from None
        if isinstance(heard, BackpropError):
            raise heard
        return heard

    def _check(self) -> None:
        """Raise what a worker has to say in the midst of an exchange: that it has ended."""
        for worker in self._workers:
            if worker.connection.poll():
                self._hear(worker)

    def _finish(self, work: Any) -> None:
        """Wait for an exchange as long as all take part."""
        while not work.is_completed():
            self._check()
            time.sleep(0.0002)
        try:
            work.wait()
        except RuntimeError as error:
            for worker in self._workers:
                if worker.connection.poll(5):  # one that has ended says so
                    self._hear(worker)
            told = str(error).splitlines()[0]
            raise HardwareError(
                f"the GPUs cannot reach each other: {told}", hint="look at `nvidia-smi topo -m`"
            ) from error

    def close(self) -> None:
        """Leave the group without waiting for anyone."""
        if self._group is not None and self._plan.device.value == "cuda":
            self._group.abort()
        self._group = self._rank = None


@contextmanager
def started(path: str, config: TrainConfig, plan: Plan, hardware: Hardware) -> Generator[Ranks]:
    """Start a process for each further GPU of the plan, which begins to load the model in ``path``.

    They end with the block, or with this process, however that ends.
    """
    with ExitStack() as stack:
        workers: list[Worker] = []
        store = ""
        if plan.gpus.value > 1:
            # In memory and without a name: nothing is left of it.
            descriptor = os.memfd_create("backprop-ranks")
            stack.callback(os.close, descriptor)
            store = f"/proc/{os.getpid()}/fd/{descriptor}"
        for rank in range(1, plan.gpus.value):
            on_gpu = plan.device.value == "cuda"
            visible = {"CUDA_VISIBLE_DEVICES": hardware.gpus[rank].uuid} if on_gpu else {}
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **visible}
            ours, theirs = socket.socketpair()
            with theirs:
                end = stack.enter_context(
                    process.running(
                        [*WORKER, str(theirs.fileno())], env=environment, timeout_s=10, inherited=(theirs.fileno(),)
                    )
                )
            connection = stack.enter_context(Connection(ours.detach()))
            tell(connection, Job(path=path, config=config, plan=plan, rank=rank, store=store))
            workers.append(Worker(connection, end, f"GPU {rank + 1} of {plan.gpus.value}"))
        ranks = Ranks(plan, pissa=config.pissa, store=store, workers=workers)
        stack.callback(ranks.close)
        yield ranks
