"""Which engine is meant, and settings that do not belong together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hdcache import chain, cli
from hdcache.cli_options import ENGINE_OPTIONS
from hdcache.errors import UsageError
from hdcache.extract.engine_choice import open_engine, parse_engine
from hdcache.extract.engines import WORKER_TIMEOUT, EngineRequest, Inline

TCP = "tcp://node1:8786"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), EngineRequest("inline")),
        (("inline", None, None), EngineRequest("inline")),
        ((None, 3, None), EngineRequest("local", 3)),
        (("local", 3, None), EngineRequest("local", 3)),
        ((None, None, TCP), EngineRequest("dask", None, TCP)),
        (("dask", None, "tls://10.0.0.1:8786"), EngineRequest("dask", None, "tls://10.0.0.1:8786")),
        ((None, None, TCP, "GPU=1", 5.0), EngineRequest("dask", None, TCP, {"GPU": 1.0}, 5.0)),
        ((None, None, TCP, ("GPU=0.5", "MEMORY=1e9")), EngineRequest("dask", None, TCP, {"GPU": 0.5, "MEMORY": 1e9})),
    ],
)
def test_what_is_meant(given: tuple[Any, ...], expected: EngineRequest) -> None:
    assert parse_engine(*given) == expected
    assert expected.timeout == (given[4] if len(given) > 4 else WORKER_TIMEOUT)


def test_a_scheduler_may_be_named_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    with pytest.raises(UsageError, match=r"scheduler '.*scheduler\.json' must be tcp://HOST:PORT"):
        parse_engine(None, None, str(path))
    path.write_text("{}")
    assert parse_engine(None, None, str(path)).scheduler == str(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("lokal", None, None), r"unknown engine 'lokal'; did you mean 'local'\?"),
        (("inline", 2, None), r"--workers says how many processes to start here, which --engine inline does not do; leave it out, or say --engine local"),
        (("dask", 2, TCP), r"--workers .* --engine dask does not do"),
        (("local", 2, TCP), r"--scheduler says whose workers to use, which --engine local does not do"),
        ((None, 2, None, "GPU=1"), r"--worker-resource .* --engine local does not do.*--engine dask"),
        ((None, None, None, (), 5.0), r"--worker-timeout .* --engine inline does not do"),
        ((None, 0, None), r"workers 0 must be at least 1"),
        (("dask", None, None), r"--engine dask needs the address of a scheduler: --scheduler tcp://HOST:PORT"),
        ((None, None, "node1"), r"scheduler 'node1' must be tcp://HOST:PORT"),
        ((None, None, TCP, (), 0.0), r"worker_timeout 0.0 must be more than 0 seconds"),
        ((None, None, TCP, "GPU"), r"worker_resource 'GPU' must be NAME=AMOUNT with an amount above 0, such as GPU=1"),
        ((None, None, TCP, "GPU=-1"), r"worker_resource 'GPU=-1'"),
        ((None, None, TCP, "GPU=nan"), r"worker_resource 'GPU=nan'"),
        ((None, None, TCP, "=1"), r"worker_resource '=1'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_belong_together(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_engine(*given)


def test_inline_is_this_process() -> None:
    with open_engine(EngineRequest(), torch.device("cpu")) as engine:
        assert isinstance(engine, Inline)
        assert engine.report() is None


def test_the_number_of_processes_is_the_users_choice_on_a_cpu() -> None:
    with (
        pytest.raises(UsageError, match="--engine local needs the number of processes: --workers N"),
        open_engine(EngineRequest("local"), torch.device("cpu")),
    ):
        pass


def test_on_cuda_there_is_one_process_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with open_engine(EngineRequest("local"), torch.device("cuda")) as engine:
        assert getattr(engine, "asked", None) == EngineRequest("local", 3)


def test_a_script_that_its_own_workers_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with (
        pytest.raises(UsageError, match="put the script's own work under: if __name__ == '__main__':"),
        open_engine(EngineRequest("local", 2), torch.device("cpu")),
    ):
        pass


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_a_plan_is_for_one_process_and_says_so(
    tmp_path: Path,
    tiny: str,
    make_npz: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)
    common = [
        "plan",
        make_npz(tmp_path / "d.npz"),
        "--store",
        tmp_path / "s",
        "--teacher",
        f"t={tiny}",
        "--device",
        "cpu",
    ]
    assert called(*common, "--workers", 2) == 0
    planned, said = capsys.readouterr()
    assert "t: 40 rows" in planned
    assert said.startswith("hdcache: planned for one process on this machine; N workers need at least 1/N of the hours")
    assert called(*common, "--workers", 2, "--engine", "inline") == 2
    assert "hdcache: --workers says how many processes to start here" in capsys.readouterr().err


def test_a_chain_hands_its_engine_on(
    tmp_path: Path, tiny: str, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def extract(*_: object, **settings: Any) -> None:
        given.update(settings)
        raise UsageError("enough")

    monkeypatch.setattr("hdcache.stopping.install", lambda: None)
    monkeypatch.setattr(chain, "extract", extract)
    size = 'student.arguments={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}'
    command = [
        "chain",
        make_npz(tmp_path / "d.npz"),
        "--store",
        tmp_path / "s",
        "--out",
        tmp_path / "r",
        "--teacher",
        f"t={tiny}",
    ]
    options = [
        "--recipe",
        "tinymim-tiny",
        "--set",
        size,
        "--set",
        "batch_size=8",
        "--scheduler",
        TCP,
        "--worker-resource",
        "GPU=1",
    ]
    assert called(*command, *options) == 2
    assert {name: given[name] for name in ENGINE_OPTIONS} == {
        "engine": None, "workers": None, "scheduler": TCP, "worker_resource": ("GPU=1",), "worker_timeout": None
    }  # fmt: skip
