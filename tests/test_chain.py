"""Stage after stage: who teaches whom, going on after a stop, and every misfit named before the first stage."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hdcache
from hdcache import chain, cli
from hdcache.backbones import load_backbone
from hdcache.chain import distill_chain, format_chain
from hdcache.distill.recipes import get_recipe
from hdcache.errors import HdcacheError, InputNotFound, Interrupted, StoreMismatch, UsageError
from hdcache.store import Store

Tree = Callable[[Path], dict[str, bytes]]
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
QUICK: dict[str, Any] = {"student.arguments": STUDENT, "epochs": 1, "warmup_epochs": 0, "batch_size": 8}
NARROW = {"student.arguments": STUDENT | {"embed_dim": 24}, "objective.heads": 6}
NAMES = ["1-tinymim-tiny", "2-tinymim-tiny", "3-tinymim-tiny"]


def distilled(data: str, tiny: str, root: Path, **changes: Any) -> dict[str, Any]:
    """Three stages of one epoch, the second student narrower and read with 6 heads; settings may be changed."""
    settings: dict[str, Any] = {
        "store": root / "store", "out": root / "runs", "teacher": f"mae={tiny}", "recipes": ["tinymim-tiny"] * 3,
        "overrides": QUICK, "stage_overrides": {2: NARROW}, "num_views": 2,
        "device": "cpu", "precision": "fp32", "batch": 8, "threads": 2, "rows_per_shard": 8,
    }  # fmt: skip
    return distill_chain(data, **settings | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path_factory.mktemp("chain") / "data.npz", 24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: str, tiny: str) -> tuple[Path, dict[str, Any]]:
    """A chain that was never stopped, which no test may change: its folder and its result."""
    root = tmp_path_factory.mktemp("finished")
    return root, distilled(data, tiny, root)


@pytest.fixture
def run(tmp_path: Path, data: str, tiny: str) -> Callable[..., dict[str, Any]]:
    return partial(distilled, data, tiny, tmp_path / "a")


# What it does


def test_each_student_teaches_the_next(finished: tuple[Path, dict[str, Any]]) -> None:
    root, result = finished
    store, runs = Store.open(root / "store"), root / "runs"
    assert store.teachers() == [*NAMES[:2], "mae"], "the last student teaches nobody"
    assert [stage["teacher"] for stage in result["stages"]] == ["mae", *NAMES[:2]]
    assert [stage["out"] for stage in result["stages"]] == [str(runs / name) for name in NAMES]
    for name in NAMES[:2]:
        record = store.teacher(name)
        assert record.card.weights == load_backbone(str(runs / name)).weights
        assert record.source == str(runs / name)
        assert store.views(name) == [0, 1]
    assert store.teacher(NAMES[1]).card.width == 24
    assert {tuple(store.teacher(name).taps) for name in store.teachers()} == {("block3.attn_in",)}
    trained = json.loads((runs / NAMES[1] / "run.json").read_text())
    assert trained["targets"] == {NAMES[0]: ["block3.rel.qk@6", "block3.rel.vv@6"]}, "the heads that stage 2 asked for"
    assert json.loads((runs / NAMES[2] / "run.json").read_text())["targets"] == {
        NAMES[1]: ["block3.rel.qk", "block3.rel.vv"]
    }
    assert json.loads((runs / "chain.json").read_text()) == json.loads(json.dumps(result))


def test_the_same_call_again_changes_nothing(run: Callable[..., dict[str, Any]], tmp_path: Path, tree: Tree) -> None:
    first = run()
    before = tree(tmp_path / "a")
    again = run()
    after = tree(tmp_path / "a")
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path for path in changed if "tensorboard" not in path} == {"runs/chain.json"}
    assert [stage["rows_written"] for stage in again["stages"]] == [0, 0, 0]
    for key in ("loss", "steps", "taps", "bytes", "seconds_distill"):
        assert [stage[key] for stage in again["stages"]] == [stage[key] for stage in first["stages"]]


@pytest.mark.parametrize(("step", "number"), [("extract", 2), ("distill", 2), ("extract", 3)])
def test_a_chain_that_was_stopped_goes_on_to_the_same_students(
    run: Callable[..., dict[str, Any]],
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    number: int,
) -> None:
    """Wherever it was stopped: the students are those of a chain that never was, to the bit."""
    real, calls = getattr(chain, step), []

    def stopped(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise Interrupted("stopped")
        return real(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(chain, step, stopped)
        with pytest.raises(Interrupted):
            run()
    assert not (tmp_path / "a/runs/chain.json").exists()
    assert not (tmp_path / "a/runs" / NAMES[number - 1] / "run.json").exists()
    assert len(run()["stages"]) == 3
    for name in NAMES:
        files = [root / "runs" / name / "student.safetensors" for root in (finished[0], tmp_path / "a")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_one_recipe_is_plain_distillation(run: Callable[..., dict[str, Any]], tmp_path: Path, data: str) -> None:
    """A chain of one stage equals extract and distill by hand."""
    run(recipes=["tinymim-tiny"], stage_overrides={})
    changes = QUICK | {"objective.teacher": "mae"}
    hdcache.distill_student(
        "tinymim-tiny", out=tmp_path / "hand", store=tmp_path / "a/store", overrides=changes, device="cpu"
    )
    students = [load_file(tmp_path / where / "student.safetensors") for where in (f"a/runs/{NAMES[0]}", "hand")]
    assert students[0].keys() == students[1].keys()
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())


def test_stages_store_what_their_own_recipe_reads(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Branch features from the first teacher, then relations: each in its own encoding, one tap each."""
    feature = {"objective.strategy": "feature", "objective.feature": "mlp_out", "objective.teacher_block": 2}
    run(recipes=["tinymim-tiny"] * 2, stage_overrides={1: feature, 2: {"objective.softmax": False}})
    store = Store.open(tmp_path / "a/store")
    assert tuple(store.teacher("mae").taps) == ("block2.mlp_out",)
    assert store.teacher("mae").taps["block2.mlp_out"].encoding == "klt"
    assert tuple(store.teacher(NAMES[0]).taps) == ("block3.attn_in",)
    second = json.loads((tmp_path / "a/runs" / NAMES[1] / "run.json").read_text())
    assert second["targets"] == {NAMES[0]: ["block3.qkv"]}


# What cannot be meant


FEATURE = {"objective.strategy": "feature"}
REFUSED: dict[str, tuple[Mapping[str, Any], type[HdcacheError], str]] = {
    "recipe": ({"recipes": ["tinymim-tiny"] * 2 + ["tinymim-tinny"]}, UsageError, r"stage 3 \(tinymim-tinny\): unknown recipe"),
    "field": ({"stage_overrides": {3: {"epoch": 2}}}, UsageError, r"stage 3 \(tinymim-tiny\): .*did you mean 'epochs'"),
    "stage": ({"stage_overrides": {4: {}}}, UsageError, "--set-stage 4: the chain has stages 1 to 3"),
    "none": ({"recipes": []}, UsageError, "needs at least one recipe; say --recipe NAME once for each stage"),
    "heads": (
        {"stage_overrides": {3: {"objective.heads": 5}}},
        UsageError,
        r"stage 3 \(tinymim-tiny\): 5 heads do not divide the width 48 of teacher '2-tinymim-tiny'; set objective.heads=null for ",
    ),
    "student heads": (
        {"stage_overrides": {3: {"student.arguments": STUDENT | {"embed_dim": 64, "num_heads": 4}}}},
        UsageError,
        "stage 3 .*3 heads do not divide the width 64 of the student",
    ),
    "grid": (
        {"stage_overrides": {2: {"student.arguments": STUDENT | {"img_size": 64}}}},
        UsageError,
        r"stage 2 .*student has 8x8 .* and teacher '1-tinymim-tiny' 4x4 .*set student\.arguments\.img_size=32",
    ),
    "block": (
        {"stage_overrides": {2: {"student.arguments": STUDENT | {"depth": 2}}, 3: {"objective.teacher_block": 3}}},
        UsageError,
        "stage 3 .*teacher_block is 3, but teacher '2-tinymim-tiny' has 2 blocks",
    ),
    "untrained": (
        {"stage_overrides": {2: FEATURE}},
        UsageError,
        r"stage 2 .*reads block3\.out of teacher '1-tinymim-tiny', whose training ended at block2\.out; choose a block",
    ),
    "untrained block": (
        {"stage_overrides": {1: FEATURE | {"objective.student_block": 2}}},
        UsageError,
        r"stage 2 .*reads block3\.attn_in of teacher '1-tinymim-tiny', whose training ended at block2\.out",
    ),
    "untrained pooled": (
        {"recipes": ["tinymim-tiny", "sdssl-cached-final-tiny"], "stage_overrides": {}},
        UsageError,
        r"stage 2 .*reads pooled of teacher '1-tinymim-tiny', whose training ended at block2\.out; let the stage before train "
        r"its whole student, with objective\.strategy=feature for instance$",
    ),
    "views without chance": (
        {
            "recipes": ["sdssl-cached-final-tiny"],
            "stage_overrides": {1: {"jitter": None, "second_jitter": None}},
            "views": "center",
        },
        UsageError,
        r"recipe 'sdssl-cached-final-tiny' draws new views .* these \(center-crop, flip 0, jitter null\) are always the same; with another "
        "--store give --views supervised",
    ),
    "no teacher read": ({"recipes": ["tinymim-tiny", "mae-tiny"], "stage_overrides": {}}, UsageError, "stage 2 .*: a chain cannot use objective 'mae', which has no single teacher to read; run the stages one by one$"),
    "a masked teacher": ({"recipes": ["amd-image-tiny"], "stage_overrides": {}}, UsageError, r"stage 1 \(amd-image-tiny\): a chain cannot use objective 'amd', which needs a teacher that is run under a mask; run the stages one by one$"),
    "a classifier": ({"recipes": ["tinymim-tiny", "logits-tiny"], "stage_overrides": {}}, UsageError, "stage 2 .*objective 'logits', which needs the classifier of its teacher; run the stages one by one$"),
    "an online loss": ({"recipes": ["sdssl-mocov3-tiny"], "stage_overrides": {}}, UsageError, "stage 1 .*objective 'sdssl', which learns from no teacher in this recipe; run the stages one by one$"),
    "another grid": ({"stage_overrides": {1: {"objective.strategy": "feature", "student.arguments.img_size": 64}}}, UsageError, r"stage 1 .* tokens are compared one by one, .*; set student.arguments.img_size=32$"),
    "other teacher": (
        {"stage_overrides": {2: {"objective.teacher": "mae"}}},
        UsageError,
        "stage 2 .*objective.teacher is 'mae', but this stage's teacher is '1-tinymim-tiny'; set it to null",
    ),
    "batch": ({"stage_overrides": {3: {"batch_size": 25}}}, UsageError, r"stage 3 .*batch_size 25 is more than the 24 images"),
    "encoding": ({"encoding": "klt8"}, UsageError, "unknown encoding 'klt8'; did you mean 'klt'"),
    "views": ({"num_views": 0}, UsageError, "num_views 0 must be at least 1"),
    "name": ({"teacher": "2-tinymim-tiny=random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3&embed_dim=48&num_heads=3"}, UsageError, "stage 2 .*the first teacher has this stage's name"),
    "model": ({"teacher": "mae=vit_tinny_patch16_224"}, UsageError, "did you mean 'vit_tiny_patch16_224'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_stage_that_cannot_work_is_refused_before_any_work(
    run: Callable[..., dict[str, Any]], tmp_path: Path, case: str
) -> None:
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(**changes)
    assert not (tmp_path / "a").exists(), "neither a store nor a run was begun"


def test_a_chain_has_one_process(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UsageError, match=r"a chain runs in one process, but there are 4; .*torchrun -m hdcache distill"
    ):
        run()


def test_without_data_the_store_must_exist(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(InputNotFound, match="no store there"):
        distill_chain(store=tmp_path / "s", out=tmp_path / "r", teacher=tiny, recipes=["tinymim-tiny"])


def test_runs_and_teachers_of_another_chain_are_refused_first(
    run: Callable[..., dict[str, Any]], tmp_path: Path, tree: Tree
) -> None:
    """A later stage's folder that holds another run, or a stored teacher that is yet to be trained, stops the first."""
    run(recipes=["tinymim-tiny"] * 2)
    before = tree(tmp_path / "a")
    other = {2: NARROW | {"weight_decay": 0.1}}
    with pytest.raises(
        StoreMismatch, match=r"stage 2 .* holds a run of other settings \(weight_decay: the run there has"
    ):
        run(recipes=["tinymim-tiny"] * 2, stage_overrides=other)
    with pytest.raises(
        StoreMismatch, match=r"stage 2 .*already holds a teacher '1-tinymim-tiny', but .* another chain's"
    ):
        run(out=tmp_path / "new")
    (tmp_path / "a/runs" / NAMES[2]).touch()
    with pytest.raises(UsageError, match=r"stage 3 .*3-tinymim-tiny is a file; give --out another folder"):
        run()
    (tmp_path / "a/runs" / NAMES[2]).unlink()
    assert tree(tmp_path / "a") == before
    assert not (tmp_path / "new").exists()
    # What a run may change when it goes on is no other run.
    assert len(run(stage_overrides={2: NARROW | {"log_every": 1}})["stages"]) == 3


@pytest.mark.parametrize("done", [True, False])
def test_another_number_of_views_is_refused_before_anything_is_stored(
    run: Callable[..., dict[str, Any]], tmp_path: Path, tree: Tree, done: bool
) -> None:
    run(recipes=["tinymim-tiny"], stage_overrides={})
    if not done:
        (tmp_path / "a/runs" / NAMES[0] / "run.json").unlink()
    before = tree(tmp_path / "a")
    for views in (1, 3):
        message = (
            rf"stage 1 .*1-tinymim-tiny holds a run of 2 views, asked was --num-views {views}; give another --out and"
        )
        with pytest.raises(StoreMismatch, match=message):
            run(recipes=["tinymim-tiny"], stage_overrides={}, num_views=views)
    assert tree(tmp_path / "a") == before


def test_a_small_student_straight_from_a_teacher_of_other_heads(tmp_path: Path) -> None:
    """16 heads in a width of 64 that 12 does not divide: the field is named, and null does what the message says."""
    spec = "random:vit_large_patch16_224?embed_dim=64&depth=2"
    large = chain.load_teacher(spec, name="mae", precision="fp32")
    message = (
        r"^stage 1 \(tinymim-s\): 12 heads do not divide the width 64 of teacher 'mae'; set objective.heads=null for"
    )
    with pytest.raises(UsageError, match=message):
        chain.plan_stages(tmp_path, large, spec, ["tinymim-s"], {}, {})
    stages = chain.plan_stages(tmp_path, large, spec, ["tinymim-s"], {}, {1: {"objective.heads": None}})
    assert stages[0].taps == ("block2.attn_in",)


# The table and the command


def test_the_table_has_a_line_for_each_stage(finished: tuple[Path, dict[str, Any]]) -> None:
    result = copy.deepcopy(finished[1])
    lines = format_chain(result).splitlines()
    assert len(lines) == 5
    assert all(word in lines[2] for word in ("2 tinymim-tiny", "1-tinymim-tiny", "block3.attn_in", "3 ", "KB"))
    assert lines[-1] == f"score it: hdcache knn-eval {result['stages'][-1]['out']} --train DATA --test DATA"
    result["stages"][-1]["preferred"] = "runs/3/ema"
    assert format_chain(result).endswith("score it: hdcache knn-eval runs/3/ema --train DATA --test DATA")
    result["stages"][0] |= {"failed": {"x": "why"}, "loss": None}
    assert "1 sample failed in extraction (see --json)" in format_chain(result)


def test_the_command_is_the_function(
    data: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hdcache chain`` with fields for all stages and for one, and JSON on stdout; a bad --set-stage is a usage error."""
    monkeypatch.setattr("hdcache.stopping.install", lambda: None)
    words = ["chain", data, "--store", str(tmp_path / "s"), "--out", str(tmp_path / "r"), "--teacher", f"mae={tiny}"]
    words += ["--recipe", "tinymim-tiny"] * 2 + ["--device", "cpu", "--rows-per-shard", "8", "--json", "-q"]
    words += [word for key, value in QUICK.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    def called(*more: str) -> int:
        with pytest.raises(SystemExit) as left:
            cli.main([*words, *more])
        return int(left.value.code or 0)

    assert called("--set-stage", "two:epochs=1") == 2
    assert (
        "--set-stage takes STAGE:FIELD=VALUE, such as 2:objective.heads=12, got 'two:epochs=1'"
        in capsys.readouterr().err
    )
    assert called("--set-stage", "2:objective.heads=6", "--set-stage", "2:seed=3") == 0
    result = json.loads(capsys.readouterr().out)
    assert [stage["steps"] for stage in result["stages"]] == [3, 3]
    recipe = json.loads((tmp_path / "r/2-tinymim-tiny/recipe.json").read_text())
    assert (recipe["seed"], recipe["objective"]["heads"], recipe["objective"]["teacher"]) == (3, 6, "1-tinymim-tiny")


def test_the_paper_s_chain_fits(tmp_path: Path) -> None:
    """MAE-L (here a narrow one) -> B -> S -> T with the published recipes: blocks 18, 12, 12; heads 16, 12, 12."""
    spec = "random:vit_large_patch16_224?embed_dim=192"
    large = chain.load_teacher(spec, name="mae", precision="fp32")
    stages = chain.plan_stages(tmp_path, large, spec, ["tinymim-b", "tinymim-s", "tinymim-t"], {}, {})
    assert [stage.taps for stage in stages] == [("block18.attn_in",), ("block12.attn_in",), ("block12.attn_in",)]
    assert [stage.teacher for stage in stages] == ["mae", "1-tinymim-b", "2-tinymim-s"]
    assert [stage.recipe.objective.heads for stage in stages] == [None, 12, 12]  # type: ignore[union-attr]
    assert stages[2].recipe == get_recipe("tinymim-t", {"objective.teacher": "2-tinymim-s"})
