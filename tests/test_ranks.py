"""The processes that train together: who this one is and which device it takes."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest
import torch

from hdcache.distill.ranks import Ranks, agree, first_alone, join_ranks, leave_ranks, rank_device


def test_a_lone_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join_ranks()
    assert ranks == Ranks(0, 1)
    assert ranks.first
    assert not torch.distributed.is_initialized()
    leave_ranks(ranks)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_ranks() == Ranks(0, 1)


def test_a_group_is_joined_and_left(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    made: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", made.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: made.append("left"))
    ranks = join_ranks()
    assert ranks == Ranks(1, 2)
    assert not ranks.first
    leave_ranks(ranks)
    assert made == ["gloo", "left"]


def test_others_wait_for_the_first_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of their own with a timeout of days is made before the work, joined after it, and given up."""
    told: list[str] = []

    def new_group(backend: str, timeout: timedelta) -> str:
        told.append(f"group for {timeout.days} days")
        return "patient"

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: told.append(f"barrier {group}"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda group: told.append(f"gave up {group}"))
    with first_alone(Ranks(0, 2)):
        told.append("work")
    assert told == ["group for 7 days", "work", "barrier patient", "gave up patient"]
    with first_alone(Ranks()):
        told.clear()
    assert told == []


def test_each_rank_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert rank_device(torch.device("cuda"), Ranks(3, 4)) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert rank_device(torch.device("cuda", 2), Ranks()) == torch.device("cuda", 2)
    assert rank_device(torch.device("cpu"), Ranks(1, 2)) == torch.device("cpu")


def test_ranks_agree_on_stopping_at_log_steps_only(signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[float]] = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flags, op: asked.append(flags.tolist()))
    two = Ranks(0, 2)
    assert agree(Ranks(), 1, 10, save=False) == (False, False)
    assert agree(two, 10, 10, save=False) == (False, False)
    # Clocks differ: a save that one rank finds due happens at an agreed step, and nowhere else.
    assert agree(two, 11, 10, save=True) == (False, False)
    assert agree(two, 20, 10, save=True) == (False, True)
    os.kill(os.getpid(), signal.SIGTERM)
    assert agree(Ranks(), 1, 10, save=True) == (True, True)
    assert agree(two, 11, 10, save=False) == (False, False)
    assert agree(two, 20, 10, save=False) == (True, False)
    assert asked == [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
