"""Processes that train one network together, started by ``torchrun``, one a device.

A process that was started alone is a group of one, for which nothing here communicates.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tinyserve.errors import UsageError


@dataclass(frozen=True, slots=True)
class Workers:
    """This process's place in its group."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's part of every batch of ``batch_size``, a multiple of :attr:`count`."""
        each = batch_size // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; each must call it with its own summand."""
        if self.count == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The body runs in the first process, and when that is done in all the others at once."""
        if not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.first and self.count > 1:
                dist.barrier()


ALONE = Workers()

_OTHERS_WAIT = timedelta(hours=6)
"""While the first decodes the images, or asks a teacher about them."""


@contextmanager
def joined(device: torch.device) -> Iterator[Workers]:
    """The group that ``torchrun`` started this process in, left again at the end.

    On GPUs each process takes the one of its local rank.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if device.type == "cuda":
        # Not whether there is one for this process: then some would stop and the others wait.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > torch.cuda.device_count():
            raise UsageError(
                f"more processes than GPUs, {here} and {torch.cuda.device_count()}: "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_OTHERS_WAIT)
    except ValueError as error:
        raise UsageError(
            f"WORLD_SIZE is {count}, but torchrun did not start this: {error}"
        ) from error
    try:
        yield Workers(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
