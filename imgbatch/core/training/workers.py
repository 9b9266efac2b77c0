"""The processes that train one network together, seen from one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_ROWS_AT_ONCE = 16_384
"""Rows that workers add up on the device: 128 MiB of 2,048 features."""


@dataclass(frozen=True)
class Worker:
    """This process's place among the workers; alone where torch.distributed is not initialised."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    loader_processes: int = 0
    """Processes that augment images for this worker; 0: it does so itself."""
    fit_threads: int | None = None
    """Threads that fitting a head on the CPU takes; none: those of everything else."""

    @classmethod
    def current(cls, device: torch.device, *, loader_processes: int = 0, fit_threads: int | None = None) -> Worker:
        """The place that torch.distributed has given this process."""
        alone = cls(device, loader_processes=loader_processes, fit_threads=fit_threads)
        if not distributed.is_initialized():
            return alone
        return replace(alone, rank=distributed.get_rank(), world_size=distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place; every worker must call it."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.world_size > 1:
            distributed.barrier()

    def gather_rows(self, mine: Tensor, num_rows: int) -> Tensor:
        """Rows that the workers computed in turn (this one: rank, rank + world_size, ...), put together by all.

        Args:
            mine: on the CPU, as what is returned: only a part at a time is on the device.
        """
        if self.world_size == 1:
            return mine
        everything = torch.zeros((num_rows, *mine.shape[1:]), dtype=mine.dtype)
        everything[self.rank :: self.world_size] = mine
        for part in everything.split(_ROWS_AT_ONCE):
            part.copy_(self.sum(part.to(self.device)))
        return everything

    def hear_first(self, value: T) -> T:
        """The first worker's plain value; every worker must call it."""
        values = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def agree_on(self, tensors: Iterable[Tensor]) -> None:
        """The first worker's values become everyone's, in place; every worker must call it."""
        if self.world_size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def agree_on_statistics(self, network: nn.Module) -> None:
        """The first worker's statistics of batch norms become everyone's; every worker must call it.

        DistributedDataParallel copies them before a step's forward pass, which then moves them on each worker apart.
        """
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        self.agree_on(buffer for norm in norms for buffer in norm.buffers())

    def share(self, network: nn.Module, *, has_statistics: bool) -> nn.Module:
        """The network, its gradients averaged over the workers at every backward pass.

        Args:
            has_statistics: batch norms are training; the first worker's statistics are everyone's.
        """
        if self.world_size == 1:
            return network
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=device_ids, broadcast_buffers=has_statistics)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """With the threads for fitting a head."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(self.fit_threads or num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)

    @contextmanager
    def accumulating(self, network: nn.Module, *, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last pass of a step only."""
        context: Any = nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()
        with context:
            yield
