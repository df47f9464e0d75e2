"""The loop: cached equals live, resumed equals undisturbed, several processes equal one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hdcache import stopping
from hdcache.distill import learner
from hdcache.distill.learner import Learner, add_gradients
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.errors import HdcacheError, Interrupted
from hdcache.options import Trained
from hdcache.schema import Preprocessing

Make = Callable[..., Recipe]
Python = Callable[..., "subprocess.Popen[str]"]
Together = Callable[..., list[str]]
CPU = torch.device("cpu")


def run(recipe: Recipe, out: Path, store: Path | None, **settings: Any) -> dict[str, Any]:
    return distill(recipe, out=out, store=store, device="cpu", threads=2, **settings)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(folder)]


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def test_training_that_is_left_early_ends_the_loaders_threads(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not when the error that ended it is forgotten."""
    seen: list[list[str]] = []

    def at_work() -> list[str]:
        return [
            name for name in (thread.name for thread in threading.enumerate()) if name.startswith(("decode", "read"))
        ]

    def fail(*_: Any) -> None:
        seen.append(at_work())
        raise HdcacheError("enough")

    monkeypatch.setattr(Learner, "step", fail)
    with pytest.raises(HdcacheError, match="enough") as caught:
        run(small_recipe(), tmp_path / "a", tiny_store)
    assert seen[0], "no thread was at work, so that this shows nothing"
    assert not at_work()
    assert caught.value.__traceback__ is not None


# Cached equals live


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"objective__strategy": "feature"},
        {"objective__strategy": "class-token", "objective__feature": "final"},
        {"objective__relations": ["qq", "kk"], "objective__tokens": "patches", "objective__heads": 6},
    ],
    ids=["relation", "feature", "class-token", "other-relations"],
)
def test_cached_equals_live_to_the_bit(
    objective: dict[str, Any], tiny_store: Path, tmp_path: Path, small_recipe: Make
) -> None:
    recipe = small_recipe(epochs=5, **objective)
    assert recipe.jitter is not None
    run(recipe, tmp_path / "cached", tiny_store)
    run(recipe, tmp_path / "live", tiny_store, online=True)
    assert len(losses(tmp_path / "cached")) == 20
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")
    assert losses(tmp_path / "cached")[0] != losses(tmp_path / "cached")[-1]


def test_live_without_a_store_equals_live_with_one(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, tiny: str
) -> None:
    recipe = small_recipe(jitter=None, student__drop_path=0)
    run(recipe, tmp_path / "with", tiny_store, online=True, num_views=1)
    data = f"npz:{tiny_store.parent}/data.npz"
    run(recipe, tmp_path / "without", None, data=data, num_views=1, online=True, teachers=[f"t={tiny}"])
    for (_, one), (_, other) in zip(losses(tmp_path / "with"), losses(tmp_path / "without"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# Resumed equals undisturbed


KILLED = """
import json, os, signal, sys
from hdcache.distill.learner import Learner
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
recipe, out, store, last = sys.argv[1:]
step, left = Learner.step, [int(last)]
def counted(*rest):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*rest)
Learner.step = counted
distill(Recipe.model_validate_json(recipe), out=out, store=store, device="cpu", threads=2)
"""


def test_killed_in_an_epoch_and_resumed_equals_undisturbed(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, python: Python
) -> None:
    recipe = small_recipe(epochs=4, log_every=3, ema=0.9)
    whole = run(recipe, tmp_path / "whole", tiny_store)
    process = python(KILLED, recipe.model_dump_json(), tmp_path / "a", tiny_store, 11)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "a" / "run.json").exists(), "killed before the end"
    rest = run(recipe, tmp_path / "a", tiny_store)
    assert rest["resumed_at"] == 8
    assert rest["steps"] == whole["steps"] == 16
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "a")] == [1, 3, 6, 9, 12, 15, 16]
    for name in (".", "ema"):
        assert weights(tmp_path / "a" / name) == weights(tmp_path / "whole" / name)
    assert rest["loss"] == whole["loss"]


def test_stopped_in_an_epoch_and_resumed_equals_undisturbed(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(epochs=3, log_every=5)
    run(recipe, tmp_path / "whole", tiny_store)
    for stop_after in (2, 1, 4):
        taken = []

        def signalled(
            *rest: Any, taken: list[int] = taken, stop_after: int = stop_after, step: Any = Learner.step
        ) -> Any:
            taken.append(1)
            if len(taken) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*rest)

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "step", signalled)
            with pytest.raises(
                Interrupted, match=r"stopped by SIGTERM with epoch \d, step \d saved in .*; run the same"
            ) as caught:
                run(recipe, tmp_path / "a", tiny_store)
        assert caught.value.exit_code == 75
        stopping._received.clear()
    rest = run(recipe, tmp_path / "a", tiny_store)
    assert rest["resumed_at"] == 7
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    first = run(small_recipe(), tmp_path / "a", tiny_store)
    before, log = weights(tmp_path / "a"), lines(tmp_path / "a")
    again = run(small_recipe(), tmp_path / "a", tiny_store)
    assert weights(tmp_path / "a") == before
    assert lines(tmp_path / "a") == log
    assert again == first, "its record too"


def test_states_are_saved_as_often_as_asked(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(learner, "save_state", lambda folder, position, *_: saved.append(position.epoch))
    run(small_recipe(epochs=5, save_every_epochs=2), tmp_path / "a", tiny_store)
    assert saved == [2, 4, 5]


# Several processes


RANK = """
import sys
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
recipe, out, store = sys.argv[1:]
distill(Recipe.model_validate_json(recipe), out=out, store=store, device="cpu", threads=1)
"""


def test_two_processes_train_as_one(tiny_store: Path, tmp_path: Path, small_recipe: Make, together: Together) -> None:
    recipe = small_recipe(epochs=3, log_every=2, ema=0.9, clip_grad=1.0, accumulate=2)
    run(recipe, tmp_path / "one", tiny_store)
    together(RANK, recipe.model_dump_json(), tmp_path / "two", tiny_store)
    for (step, one), (other_step, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert step == other_step
        assert two == pytest.approx(one, rel=1e-5)
    for name in (".", "ema"):
        first, second = (load_file(tmp_path / run / name / "student.safetensors") for run in ("one", "two"))
        for key, value in first.items():
            gap = (value - second[key]).abs()
            if key.endswith("qkv.bias"):
                # A shift of all keys changes no softmax: the gradient of K's bias is rounding noise, which AdamW scales up.
                gap[24:48] = 0
            assert float(gap.max()) < 1e-5, key


STOPPED = """
import os, signal, sys
from hdcache import stopping
from hdcache.distill.learner import Learner
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.errors import HdcacheError
stopping.install()
recipe, out, store = sys.argv[1:]
step, taken = Learner.step, []
def counted(*rest):
    taken.append(1)
    if len(taken) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*rest)
Learner.step = counted
try:
    distill(Recipe.model_validate_json(recipe), out=out, store=store, device="cpu", threads=1)
except HdcacheError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_a_signal_to_one_process_stops_all(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, together: Together
) -> None:
    recipe = small_recipe(log_every=2)
    ended = together(STOPPED, recipe.model_dump_json(), tmp_path / "a", tiny_store, code=75)
    assert "stopped by a signal to another process with epoch 0, step 4 saved in" in ended[0]
    assert "stopped by SIGTERM with epoch 0, step 4 saved in" in ended[1]


# The log


def test_learning_rate_and_weight_decay_are_logged_as_scheduled(
    tiny_store: Path, tmp_path: Path, small_recipe: Make
) -> None:
    run(small_recipe(epochs=3, weight_decay_end=0.5, lr=0.001), tmp_path / "a", tiny_store)
    log = lines(tmp_path / "a")
    assert [line["step"] for line in log] == list(range(1, 13))
    assert [line["lr"] for line in log][:5] == pytest.approx([0, 0.00025, 0.0005, 0.00075, 0.001])
    assert log[-1]["lr"] < 0.0001
    assert log[0]["weight_decay"] == pytest.approx(0.05)
    assert 0.05 < log[6]["weight_decay"] < log[-1]["weight_decay"] < 0.5
    assert [line["epoch"] for line in log] == [0] * 4 + [1] * 4 + [2] * 4
    for line in log:
        assert line["loss"] == pytest.approx(line["qk"] + line["vv"], rel=1e-5)
        assert line["samples_per_second"] > 0
        assert 0 <= line["wait_share"] <= 1


def test_log_lines_hold_the_mean_of_their_interval(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    run(small_recipe(log_every=1), tmp_path / "each", tiny_store)
    run(small_recipe(log_every=3), tmp_path / "some", tiny_store)
    each = dict(losses(tmp_path / "each"))
    expected = [(1, each[1]), (3, (each[2] + each[3]) / 2), (6, (each[4] + each[5] + each[6]) / 3)]
    expected.append((8, (each[7] + each[8]) / 2))
    assert [step for step, _ in losses(tmp_path / "some")] == [1, 3, 6, max(each)]
    for (_, got), (_, wanted) in zip(losses(tmp_path / "some"), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)


def test_tensorboard_is_written(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    run(small_recipe(), tmp_path / "a", tiny_store)
    (events,) = (tmp_path / "a" / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"train/loss" in content
    assert b"train/lr" in content


def test_without_tensorboard_training_goes_on(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard.writer", None)
    run(small_recipe(epochs=1, warmup_epochs=0), tmp_path / "a", tiny_store)
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def broken(*rest: Any) -> None:
        add_gradients(*rest)
        taken.append(1)
        if len(taken) == 6:
            rest[-1]["loss"] *= math.nan

    monkeypatch.setattr(learner, "add_gradients", broken)
    with pytest.raises(
        HdcacheError, match=r"the loss is nan at step 8; the last saved state is kept: lower the learning"
    ):
        run(small_recipe(log_every=50), tmp_path / "a", tiny_store)
    monkeypatch.undo()
    assert run(small_recipe(log_every=50), tmp_path / "a", tiny_store)["resumed_at"] == 4
    run(small_recipe(log_every=50), tmp_path / "b", tiny_store)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_learning_rate_that_is_far_too_high(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    with pytest.raises(HdcacheError, match=r"the loss is nan at step \d; .*in a new --out folder"):
        run(small_recipe(lr=1e30, warmup_epochs=0), tmp_path / "a", tiny_store)
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path / "a"))


# Measurements on the way


class Recorder:
    """A monitor that notes what it is given; its answer is a function of the weights."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.weights: list[bytes] = []

    def __call__(self, student: nn.Module, preprocessing: Preprocessing, trained: Trained) -> dict[str, float]:
        assert (preprocessing.size, trained) == (32, Trained("block2.out", "cls", 1))
        weight: torch.Tensor = student.get_parameter("blocks.0.attn.qkv.weight")
        self.weights.append(weight.detach().numpy().tobytes())
        return {"block2.out": float(weight.detach().double().sum()), "block1.out": 50.0}


def measured(folder: Path) -> list[tuple[int, int, dict[str, float]]]:
    return [(line["epoch"], line["step"], line["knn"]) for line in lines(folder) if "knn" in line]


def test_measurements_are_logged_and_change_nothing(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    """Before the first step, after every second epoch and after the last; losses and weights as without."""
    recipe = small_recipe(epochs=5)
    monitor = Recorder()
    plain = run(recipe, tmp_path / "plain", tiny_store)
    result = run(recipe, tmp_path / "a", tiny_store, monitor=monitor, monitor_every=2)
    found = measured(tmp_path / "a")
    assert [(epoch, step) for epoch, step, _ in found] == [(0, 0), (2, 8), (4, 16), (5, 20)]
    assert all(list(knn) == ["block2.out", "block1.out"] for _, _, knn in found)
    assert len(set(monitor.weights)) == 4
    assert [line for line in lines(tmp_path / "a") if "loss" in line and line["step"] == 20]
    assert [(e["step"], e["loss"]) for e in lines(tmp_path / "a") if "loss" in e] == losses(tmp_path / "plain")
    assert weights(tmp_path / "a") == weights(tmp_path / "plain")
    assert result["loss"] == plain["loss"]
    events = next((tmp_path / "a" / "tensorboard").glob("events.out.tfevents.*")).read_bytes()
    assert b"knn/block1.out" in events


def test_the_averaged_student_is_measured_where_there_is_one(
    tiny_store: Path, tmp_path: Path, small_recipe: Make
) -> None:
    monitor = Recorder()
    run(small_recipe(ema=0.9), tmp_path / "a", tiny_store, monitor=monitor)
    for name, same in (("a/ema", True), ("a", False)):
        written = load_file(tmp_path / name / "student.safetensors")["blocks.0.attn.qkv.weight"]
        assert (written.numpy().tobytes() == monitor.weights[-1]) is same


def test_a_resumed_run_measures_what_is_missing_and_nothing_twice(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in an epoch, at the last step of one, and inside a measurement (its state is safe by then)."""
    recipe = small_recipe(epochs=4)
    run(recipe, tmp_path / "whole", tiny_store, monitor=Recorder())
    for stop_after in (2, 2):  # step 2; then step 4, the last of its epoch
        taken: list[int] = []

        def signalled(
            *rest: Any, taken: list[int] = taken, stop_after: int = stop_after, step: Any = Learner.step
        ) -> Any:
            taken.append(1)
            if len(taken) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*rest)

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "step", signalled)
            with pytest.raises(Interrupted):
                run(recipe, tmp_path / "a", tiny_store, monitor=Recorder())
        stopping._received.clear()
    assert [step for _, step, _ in measured(tmp_path / "a")] == [0]

    class Broken(Recorder):
        def __call__(self, *given: Any) -> dict[str, float]:
            if len(self.weights) == 1:
                raise KeyboardInterrupt
            return super().__call__(*given)

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "a", tiny_store, monitor=Broken())
    assert [step for _, step, _ in measured(tmp_path / "a")] == [0, 4]
    rest = run(recipe, tmp_path / "a", tiny_store, monitor=Recorder())
    assert rest["resumed_at"] == 8
    assert measured(tmp_path / "a") == measured(tmp_path / "whole")
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    silent = Recorder()
    run(recipe, tmp_path / "a", tiny_store, monitor=silent)
    assert not silent.weights, "a finished run that was measured is left as it is"
    run(recipe, tmp_path / "plain", tiny_store)
    before = (tmp_path / "plain" / "run.json").read_bytes()
    run(recipe, tmp_path / "plain", tiny_store, monitor=Recorder())
    assert measured(tmp_path / "plain") == measured(tmp_path / "whole")[-1:], "one that was not, at its end"
    assert (tmp_path / "plain" / "run.json").read_bytes() == before


def test_measuring_time_is_not_training_time(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    def slow(*_: object) -> dict[str, float]:
        time.sleep(1)
        return {"final": 1.0}

    began = time.monotonic()
    result = run(small_recipe(), tmp_path / "a", tiny_store, monitor=slow)
    busy = time.monotonic() - began - 3  # three measurements
    assert result["seconds"] < busy
    assert all(line["samples_per_second"] > 16 / busy for line in lines(tmp_path / "a") if "loss" in line)


MONITORED = """
import os, sys
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
recipe, out, store = sys.argv[1:]
def monitor(student, preprocessing, trained):
    print("measured by rank", os.environ["RANK"], flush=True)
    return {"final": float(next(student.parameters()).detach().sum())}
distill(Recipe.model_validate_json(recipe), out=out, store=store, device="cpu", threads=1, monitor=monitor)
"""


def test_one_of_several_processes_measures(
    tiny_store: Path, tmp_path: Path, small_recipe: Make, together: Together
) -> None:
    recipe = small_recipe()
    ended = together(MONITORED, recipe.model_dump_json(), tmp_path / "two", tiny_store)
    assert [output.count("measured by rank") for output in ended] == [3, 0], ended
    assert [(epoch, step) for epoch, step, _ in measured(tmp_path / "two")] == [(0, 0), (1, 4), (2, 8)]
