"""The processes that train together: who this one is and which device it takes."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hdcache.distill.ranks import Ranks, join_ranks, leave_ranks, rank_device, stop_asked


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


def test_each_rank_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert rank_device(torch.device("cuda"), Ranks(3, 4)) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert rank_device(torch.device("cuda", 2), Ranks()) == torch.device("cuda", 2)
    assert rank_device(torch.device("cpu"), Ranks(1, 2)) == torch.device("cpu")


def test_ranks_agree_on_stopping_at_log_steps_only(signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: asked.append(float(flag)))
    two = Ranks(0, 2)
    assert not stop_asked(Ranks(), 1, 10)
    assert not stop_asked(two, 10, 10)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_asked(Ranks(), 1, 10)
    assert not stop_asked(two, 11, 10)
    assert stop_asked(two, 20, 10)
    assert asked == [0.0, 1.0]
