"""The processes that train together, as torchrun starts them: who this one is, and what they agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass

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


def stop_asked(ranks: Ranks, step: int, every: int) -> bool:
    """Whether any rank was asked to stop; several ranks agree on it at log steps only, to stay in step."""
    if ranks.world == 1:
        return stopping.requested()
    # A scheduler kills half a minute after it asks; ten steps are seldom longer, and a reduction each step would stall.
    if step % min(every, 10):
        return False
    flag = torch.tensor(float(stopping.requested()))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
