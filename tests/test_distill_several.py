"""Students that train from the same batches: each is that of its own run, to the bit, whatever happens to the others."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from hdcache import stopping
from hdcache.distill import learner as module
from hdcache.distill.learner import Learner
from hdcache.distill.log import LossNotFinite
from hdcache.distill.run import distill, distill_several
from hdcache.distill.run_report import format_run
from hdcache.distill.settings import Recipe
from hdcache.errors import Interrupted, StoreMismatch, UsageError
from hdcache.target_sources import StoredTargets
from hdcache.teachers import Teacher

Make = Callable[..., Recipe]
CPU: dict[str, Any] = {"device": "cpu", "threads": 2}
TIMES = {"samples_per_second", "wait_share"}


def monitor(student: nn.Module, *_: object) -> dict[str, float]:
    return {"final": float(sum(value.detach().double().sum() for value in student.parameters()))}


def left(folder: Path) -> dict[str, Any]:
    """All that a run leaves but for times: weights, configuration, log, and the saved state with its metadata."""
    found: dict[str, Any] = {
        name: (folder / name).read_bytes()
        for name in ("student.safetensors", "config.json", "recipe.json", "ema/student.safetensors", "ema/config.json")
        if (folder / name).exists()
    }
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["log"] = [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]
    with safe_open(folder / "state.safetensors", "pt") as file:
        found["about"] = json.loads(file.metadata()["about"])
        found["position"] = {
            k: v for k, v in json.loads(file.metadata()["position"]).items() if k not in ("seconds", "beside")
        }
        found |= {f"state/{key}": file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118  # not a dict
    return found


def check_same(alone: Path, together: Path) -> None:
    one, other = left(alone), left(together)
    assert [key for key in {*one, *other} if one.get(key) != other.get(key)] == []


@pytest.fixture(scope="module")
def called(small_recipe: Make) -> Make:
    """A small recipe under a name of its own."""

    def make(name: str, preset: str = "tinymim-tiny", **changes: Any) -> Recipe:
        return small_recipe(preset, **changes).model_copy(update={"name": name})

    return make


@pytest.fixture(scope="module")
def several(called: Make) -> list[Recipe]:
    """Four students of unlike objectives, lengths and logs; one reads no target."""
    common = {"accumulate": 2, "save_every_epochs": 2}
    return [
        called("relations", epochs=3, ema=0.9, clip_grad=1.0, log_every=3, **common),
        called("features", objective__strategy="feature", epochs=2, log_every=50, **common),
        called("labels", "supervised-tiny", epochs=4, save_every_epochs=1, accumulate=2, amp="bf16"),
        called("hybrid", "hybrid-feature-tiny", objective__feature_teacher="t", lr=3e-3, **common),
    ]


def own_runs(recipes: list[Recipe], out: Path, **where: Any) -> Path:
    for recipe in recipes:
        distill(recipe, out=out / recipe.name, **CPU, **where)
    return out


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, several: list[Recipe]) -> Path:
    """The own runs of ``several``, undisturbed, from the store."""
    return own_runs(several, tmp_path_factory.mktemp("own"), store=tiny_store)


# The same students


def test_every_student_is_that_of_its_own_run(tiny_store: Path, tmp_path: Path, several: list[Recipe]) -> None:
    own_runs(several, tmp_path / "own", store=tiny_store, monitor=monitor, monitor_every=2)
    found = distill_several(several, out=tmp_path / "all", store=tiny_store, monitor=monitor, monitor_every=2, **CPU)
    for recipe, result in zip(several, found, strict=True):
        check_same(tmp_path / "own" / recipe.name, tmp_path / "all" / recipe.name)
        alone = json.loads((tmp_path / "own" / recipe.name / "run.json").read_text())
        written = json.loads((tmp_path / "all" / recipe.name / "run.json").read_text())
        assert written == json.loads(json.dumps(result))
        assert result.keys() - alone.keys() == {"beside"}
        assert result["beside"] == [other.name for other in several if other.name != recipe.name]
        same = ("steps", "loss", "recipe", "targets", "online", "last_trained", "epochs", "resumed_at")
        assert {key: result[key] for key in same} == {key: alone[key] for key in same}
        assert "3 others, " in format_run(result)
    assert [result["steps"] for result in found] == [12, 8, 16, 8]


def test_a_batch_is_read_once_for_all(
    tiny_store: Path, tmp_path: Path, several: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[Any, ...]] = []
    read = StoredTargets.read
    monkeypatch.setattr(StoredTargets, "read", lambda self, *run: (reads.append(run[:3]), read(self, *run))[1])
    distill_several(several[:2], out=tmp_path / "all", store=tiny_store, **CPU)
    together = sorted(reads)
    reads.clear()
    distill(several[0], out=tmp_path / "one", store=tiny_store, **CPU)
    assert together == sorted(reads)
    assert len(reads) == 6, "two runs of rows in each of three epochs"


def test_teachers_in_the_loop_run_once_for_all(
    tiny_store: Path, tmp_path: Path, several: list[Recipe], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = [recipe for recipe in several if recipe.name != "labels"]
    own_runs(online, tmp_path / "own", store=tiny_store, online=True)
    calls: list[int] = []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, *given: (calls.append(1), forward(self, *given))[1])
    distill_several(several, out=tmp_path / "all", store=tiny_store, online=True, **CPU)
    for recipe in online:
        check_same(tmp_path / "own" / recipe.name, tmp_path / "all" / recipe.name)
    check_same(own / "labels", tmp_path / "all" / "labels")
    assert len(calls) == 3 * 4 * 2, "pieces of the batches of the longest run that has a teacher"


def test_nothing_is_read_for_those_that_have_ended(
    tiny_store: Path, tmp_path: Path, called: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of a teacher that only they read, nor of a tap; the others are the students of their own runs."""
    long = called("long", "supervised-tiny", epochs=5)
    middle = called("middle", objective__strategy="feature", epochs=3)
    short = called("short", epochs=1, warmup_epochs=0)
    own_runs([long, middle], tmp_path / "own", store=tiny_store)
    reads: list[list[str]] = []
    read = StoredTargets.read
    monkeypatch.setattr(
        StoredTargets, "read", lambda self, *run: (reads.append(list(self.derivation.taps)), read(self, *run))[1]
    )
    distill_several([long, middle, short], out=tmp_path / "all", store=tiny_store, **CPU)
    together, alone = ["block3.attn_in", "block3.out"], ["block3.out"]
    assert reads == [together] * 2 + [alone] * 4, "two runs of rows in each epoch"
    for recipe in (long, middle):
        check_same(tmp_path / "own" / recipe.name, tmp_path / "all" / recipe.name)


def test_a_record_is_written_when_its_student_ends(
    tiny_store: Path, tmp_path: Path, called: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the last one does: what a kill leaves of the one that had ended is whole, and stays as it is."""
    recipes = [called("short", epochs=1, warmup_epochs=0), called("long", epochs=3)]
    step = Learner.step

    def stopped(self: Learner, piece: Any, waited: float) -> bool:
        if piece.epoch == 1:
            raise KeyboardInterrupt
        return step(self, piece, waited)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            distill_several(recipes, out=tmp_path / "all", store=tiny_store, **CPU)
    written = json.loads((tmp_path / "all" / "short" / "run.json").read_text())
    assert written["samples_per_second"] > 0
    assert written["resumed_at"] == 0
    assert not (tmp_path / "all" / "long" / "run.json").exists()
    found = distill_several(recipes, out=tmp_path / "all", store=tiny_store, **CPU)
    assert found[0] == written
    assert found[1]["beside"] == ["short"], "of the session before"
    assert found[1]["resumed_at"] == 4


def test_a_record_that_was_lost_claims_no_rate(tiny_store: Path, tmp_path: Path, called: Make) -> None:
    recipe = called("a", epochs=1, warmup_epochs=0)
    first = distill(recipe, out=tmp_path / "a", store=tiny_store, **CPU)
    (tmp_path / "a" / "run.json").unlink()
    again = distill(recipe, out=tmp_path / "a", store=tiny_store, **CPU)
    assert (again["samples_per_second"], again["wait_share"]) == (None, None)
    assert {key: again[key] for key in ("steps", "loss")} == {key: first[key] for key in ("steps", "loss")}
    assert "no step in this session; last loss" in format_run(again)


def test_teachers_in_the_loop_without_a_store(tiny_store: Path, tmp_path: Path, called: Make, tiny: str) -> None:
    """Each student's state names the teachers that it reads, as its own run would."""
    where = {"data": f"npz:{tiny_store.parent}/data.npz", "num_views": 1}
    recipes = [
        called("a", objective__teacher="t"),
        called("b", objective__teacher="u", objective__strategy="feature"),
        called("c", "logits-tiny", objective__teacher="v"),
    ]
    taught = {"t": f"t={tiny}", "u": f"u={tiny}&seed=1", "v": f"v={tiny}&num_classes=3"}
    for recipe, name in zip(recipes, "tuv", strict=True):
        distill(recipe, out=tmp_path / "own" / recipe.name, online=True, teachers=[taught[name]], **where, **CPU)
    distill_several(recipes, out=tmp_path / "all", online=True, teachers=list(taught.values()), **where, **CPU)
    for recipe in recipes:
        check_same(tmp_path / "own" / recipe.name, tmp_path / "all" / recipe.name)


@pytest.mark.parametrize("stored", [True, False])
def test_students_with_new_views_in_each_epoch(
    stored: bool, tiny_store: Path, tmp_path: Path, small_recipe: Make
) -> None:
    small = {"objective__hidden": 16, "objective__hidden_intermediate": 8, "objective__hidden_predictor": 8}
    names = (
        ["sdssl-cached-final-tiny", "sdssl-cached-anchor-tiny"]
        if stored
        else ["sdssl-mocov3-tiny", "sdssl-simclr-tiny"]
    )
    changes = {"objective__target": "final"} if stored else {"objective__projection_dim": 8}
    recipes = [small_recipe(name, epochs=3 - number, **changes, **small) for number, name in enumerate(names)]
    where: dict[str, Any] = {"store": tiny_store} if stored else {"data": f"npz:{tiny_store.parent}/data.npz"}
    own_runs(recipes, tmp_path / "own", **where)
    distill_several(recipes, out=tmp_path / "all", **where, **CPU)
    for name in names:
        check_same(tmp_path / "own" / name, tmp_path / "all" / name)


def test_students_of_several_seeds_see_one_order(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    """Their initial weights and dropped paths differ; with a data seed of their own they are those of their own runs."""
    recipe = small_recipe()
    with pytest.raises(
        UsageError, match="seed, which orders the samples, is 0 in the first and 1 in the second; add --set"
    ):
        distill_several([recipe], out=tmp_path / "all", sweep={"seed": "0,1"}, store=tiny_store, **CPU)
    found = distill_several(
        [recipe], out=tmp_path / "all", overrides={"data_seed": "0"}, sweep={"seed": "0,1"}, store=tiny_store, **CPU
    )
    assert [result["recipe"] for result in found] == ["tinymim-tiny-seed-0", "tinymim-tiny-seed-1"]
    assert found[0]["loss"] != found[1]["loss"]
    distill(recipe, out=tmp_path / "plain", store=tiny_store, **CPU)
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("plain", "all/tinymim-tiny-seed-0")]
    assert weights[0] == weights[1], "a data seed equal to the seed changes nothing"


# Stopped, killed, gone on with

KILLED = """
import json, os, signal, sys
from hdcache.distill import learner
from hdcache.distill.run import distill_several
from hdcache.distill.settings import Recipe
recipes, out, store, last = sys.argv[1:]
save, saves = learner.save_state, []
def counted(*given):
    save(*given)
    saves.append(1)
    if len(saves) == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
learner.save_state = counted
plans = [Recipe.model_validate(recipe) for recipe in json.loads(recipes)]
distill_several(plans, out=out, store=store, device="cpu", threads=2)
"""


def dumped(recipes: list[Recipe]) -> str:
    return json.dumps([recipe.model_dump(mode="json") for recipe in recipes])


def test_killed_between_the_saves_of_two_students(
    tiny_store: Path, tmp_path: Path, several: list[Recipe], own: Path, python: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those behind catch up while the ones ahead wait; no student takes a step twice."""
    # Saves: labels after epoch 1; then relations, features and, before it is labels' turn, the end.
    process = python(KILLED, dumped(several), tmp_path / "all", tiny_store, 3)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    taken: dict[str, list[tuple[int, int]]] = {}
    step = Learner.step

    def noted(self: Learner, piece: Any, waited: float) -> bool:
        if piece.piece == 0:
            taken.setdefault(self.recipe.name, []).append((piece.epoch, piece.index))
        return step(self, piece, waited)

    monkeypatch.setattr(Learner, "step", noted)
    found = distill_several(several, out=tmp_path / "all", store=tiny_store, **CPU)
    assert [result["resumed_at"] for result in found] == [8, 8, 4, 0]
    assert {name: len(steps) for name, steps in taken.items()} == {"relations": 4, "labels": 12, "hybrid": 8}
    assert all(len({*steps}) == len(steps) for steps in taken.values())
    for recipe in several:
        check_same(own / recipe.name, tmp_path / "all" / recipe.name)


def test_stopped_by_a_signal_all_are_saved_where_they_are(
    tiny_store: Path, tmp_path: Path, several: list[Recipe], own: Path, signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, step = [], Learner.step

    def signalled(*given: Any) -> bool:
        taken.append(1)
        if len(taken) == 4 * 2 * 2 + 3:  # the second piece of the third batch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    monkeypatch.setattr(Learner, "step", signalled)
    message = r"epoch 0, step 3 saved in .*/all for relations, features, labels, hybrid; run the same command again"
    with pytest.raises(Interrupted, match=message):
        distill_several(several, out=tmp_path / "all", store=tiny_store, **CPU)
    stopping._received.clear()
    found = distill_several(several, out=tmp_path / "all", store=tiny_store, **CPU)
    assert [result["resumed_at"] for result in found] == [3, 3, 3, 3]
    for recipe in several:
        check_same(own / recipe.name, tmp_path / "all" / recipe.name)


def test_a_run_goes_on_beside_others_and_alone(
    tiny_store: Path, tmp_path: Path, several: list[Recipe], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished ones are left as they are, and nothing is read for them."""
    out, step = tmp_path / "all", Learner.step

    def stopped(self: Learner, piece: Any, waited: float) -> bool:
        if (piece.epoch, self.recipe.name) == (3, "labels"):
            raise KeyboardInterrupt
        return step(self, piece, waited)

    distill(several[1], out=out / "features", store=tiny_store, **CPU)
    before = (out / "features" / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            distill_several(several[:3], out=out, store=tiny_store, **CPU)
    reads: list[int] = []
    monkeypatch.setattr(StoredTargets, "read", lambda *_: reads.append(1))
    found = distill_several(several[:3], out=out, store=tiny_store, **CPU)
    monkeypatch.undo()
    assert [result["resumed_at"] for result in found] == [0, 0, 12]
    assert found[2]["beside"] == ["relations"], "of the session before; the others had ended by then"
    assert not reads, "what the finished students read is not read"
    assert (out / "features" / "run.json").read_bytes() == before
    assert distill_several(several, out=out, store=tiny_store, **CPU)[:3] == found
    for recipe in several:
        check_same(own / recipe.name, out / recipe.name)
    assert distill(several[3], out=out / "hybrid", store=tiny_store, **CPU)["steps"] == 8


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crashes=st.lists(st.integers(1, 30), max_size=3), every=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_any_number_of_crashes_leaves_the_same_students(
    crashes: list[int], every: tuple[int, int], tiny_store: Path, called: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each after any number of steps and saves of either student."""
    out = tmp_path_factory.mktemp("crashes")
    first = called("a", "supervised-tiny", epochs=3, save_every_epochs=every[0], log_every=3)
    recipes = [first, called("b", epochs=2, save_every_epochs=every[1], ema=0.5)]
    own_runs(recipes, out / "own", store=tiny_store)
    for crash in crashes:
        events: list[int] = []

        def count(*given: Any, work: Any, events: list[int] = events, last: int = crash) -> Any:
            if len(events) == last:
                raise KeyboardInterrupt
            events.append(1)
            return work(*given)

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Learner, "step", partialmethod(count, work=Learner.step))
            patch.setattr(module, "save_state", partial(count, work=module.save_state))
            distill_several(recipes, out=out / "all", store=tiny_store, **CPU)
    distill_several(recipes, out=out / "all", store=tiny_store, **CPU)
    for recipe in recipes:
        check_same(out / "own" / recipe.name, out / "all" / recipe.name)


def test_a_folder_of_another_recipe_is_refused_before_anything_is_written(
    tiny_store: Path, tmp_path: Path, several: list[Recipe]
) -> None:
    distill(several[1], out=tmp_path / "all" / "features", store=tiny_store, **CPU)
    with pytest.raises(StoreMismatch, match=r"recipe\.lr: it has 0\.001, asked was 0\.5"):
        distill_several(several[:2], out=tmp_path / "all", store=tiny_store, overrides={"lr": 0.5}, **CPU)
    assert not [
        path
        for path in (tmp_path / "all" / "relations").iterdir()
        if path.suffix != ".lock" and ".lock" not in path.name
    ]
    with pytest.raises(
        UsageError, match="/features holds a run of one student; give several a folder for all of theirs"
    ):
        distill_several(several[:2], out=tmp_path / "all" / "features", store=tiny_store, **CPU)


# Several processes

RANKS = """
import json, sys
import torch
from hdcache.distill import run
from hdcache.distill.settings import Recipe
run.leave_ranks = lambda ranks: None
recipes, out, store = sys.argv[1:]
plans = [Recipe.model_validate(recipe) for recipe in json.loads(recipes)]
where = {"store": store, "device": "cpu", "threads": 1}
run.distill_several(plans, out=f"{out}/all", **where)
for plan in plans:
    run.distill(plan, out=f"{out}/own/{plan.name}", **where)
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_several_as_they_train_one(
    tiny_store: Path, tmp_path: Path, several: list[Recipe], together: Callable[..., list[str]]
) -> None:
    together(RANKS, dumped(several[:3]), tmp_path, tiny_store)
    for recipe in several[:3]:
        check_same(tmp_path / "own" / recipe.name, tmp_path / "all" / recipe.name)


# One that fails


def test_one_whose_loss_is_not_finite_ends_alone(
    tiny_store: Path, tmp_path: Path, called: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [called(name, lr=lr, log_every=4) for name, lr in (("a", 1e-3), ("b", 2e-3), ("c", 3e-3))]
    own_runs(recipes, tmp_path / "own", store=tiny_store)
    add, steps = module.add_gradients, []

    def broken(step: Any, piece: Any, *rest: Any) -> None:
        add(step, piece, *rest)
        steps.append(1)
        if len(steps) == 3 * 5 + 2:  # the sixth step of b
            rest[-1]["loss"] *= math.nan

    with monkeypatch.context() as patch:
        patch.setattr(module, "add_gradients", broken)
        message = r"^1 of 3 students have not finished; the others have: b: the loss is nan at step 8; the last saved state is"
        with pytest.raises(LossNotFinite, match=message) as caught:
            distill_several(recipes, out=tmp_path / "all", store=tiny_store, **CPU)
    assert caught.value.exit_code == 1
    for name in "ac":
        check_same(tmp_path / "own" / name, tmp_path / "all" / name)
        assert (tmp_path / "all" / name / "run.json").exists()
    assert not (tmp_path / "all" / "b" / "run.json").exists()
    found = distill_several(recipes, out=tmp_path / "all", store=tiny_store, **CPU)
    assert [result["resumed_at"] for result in found] == [0, 4, 0]
    check_same(tmp_path / "own" / "b", tmp_path / "all" / "b")


def test_all_that_fail_are_named(tiny_store: Path, tmp_path: Path, called: Make) -> None:
    recipes = [called(name, lr=1e30, warmup_epochs=0) for name in "ab"]
    with pytest.raises(
        LossNotFinite, match=r"^2 of 2 students have not finished: a: the loss is nan.*; b: the loss is nan"
    ):
        distill_several(recipes, out=tmp_path / "all", store=tiny_store, **CPU)
    assert list((tmp_path / "all").rglob("run.json")) == []


# Time


def test_who_waits_for_others_is_not_training(
    tiny_store: Path, tmp_path: Path, called: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that was ahead has the seconds of its own steps."""
    recipes = [called(name) for name in "ab"]
    step = Learner.step

    def half(self: Learner, piece: Any, waited: float) -> bool:
        if piece.epoch == 1:
            raise KeyboardInterrupt
        return step(self, piece, waited)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", half)
        with pytest.raises(KeyboardInterrupt):
            distill(recipes[0], out=tmp_path / "all" / "a", store=tiny_store, **CPU)
    slow = 0.2

    def slowed(self: Learner, piece: Any, waited: float) -> bool:
        if self.recipe.name == "b" and piece.epoch == 0:
            time.sleep(slow)
        return step(self, piece, waited)

    monkeypatch.setattr(Learner, "step", slowed)
    found = distill_several(recipes, out=tmp_path / "all", store=tiny_store, **CPU)
    assert [result["resumed_at"] for result in found] == [4, 0]
    session = [64 * (2 - number) / found[1 - number]["samples_per_second"] for number in (0, 1)]
    assert session[0] - session[1] > 3 * slow
