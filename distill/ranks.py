"""The processes that train together, as torchrun starts them: who this one is, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from hdcache import stopping


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together (torchrun's environment)."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


def join_ranks() -> Ranks:
    """Join the processes that torchrun started; a lone process joins nothing."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    # Each device has its own: a run on CPUs of a machine with GPUs must not wait for NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend)
    return Ranks(torch.distributed.get_rank(), world)


def leave_ranks(ranks: Ranks) -> None:
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


def rank_device(device: torch.device, ranks: Ranks) -> torch.device:
    """Each rank of a machine takes its own GPU."""
    if device.type == "cuda" and ranks.world > 1:
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(local)
        return local
    return device


def agree(ranks: Ranks, step: int, every: int, *, save: bool) -> tuple[bool, bool]:
    """Whether to stop, and whether to save: True where any rank was asked to, or finds that it is time to.

    Several ranks agree at log steps only: their clocks differ, and each must come to a save at the same step.
    """
    asked = stopping.requested()
    if ranks.world == 1:
        return asked, save
    # A scheduler kills half a minute after it asks; ten steps are seldom longer, and a reduction each step would stall.
    if step % min(every, 10):
        return False, False
    flags = torch.tensor([float(asked), float(save)])
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags[0]), bool(flags[1])


@contextmanager
def first_alone(ranks: Ranks) -> Iterator[None]:
    """What the first process does inside may take long; the others wait for it at the end, however long it takes."""
    if ranks.world == 1:
        yield
        return
    # The processes' own groups give up after minutes. All come here at the same step, so making one does not wait.
    patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    yield
    torch.distributed.barrier(patient)  # type: ignore[arg-type]  # every process is a member of it
    torch.distributed.destroy_process_group(patient)
