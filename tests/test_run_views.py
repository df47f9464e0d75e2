"""Which views a run draws, and those that a loss of two views cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hdcache.datasets import Dataset, open_dataset
from hdcache.distill.recipes import get_recipe
from hdcache.distill.run import distill
from hdcache.distill.run_report import format_run
from hdcache.distill.run_views import choose_views, name_of
from hdcache.errors import UsageError
from hdcache.schema import ViewSpec
from hdcache.store import Store
from hdcache.views import PRESETS, parse_views

SSL = "sdssl-simclr-tiny"
PLAIN: dict[str, Any] = {"jitter": None, "second_jitter": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str]) -> str:
    return make_npz(tmp_path_factory.mktemp("views") / "data.npz", 16)


@pytest.fixture(scope="module")
def pictures(data: str) -> Dataset:
    return open_dataset(data)


@pytest.mark.parametrize(
    ("recipe", "asked", "name", "scale"),
    [
        (SSL, None, "supervised", (0.08, 1.0)),
        ("mae-tiny", None, "mae", (0.2, 1.0)),
        ("tinymim-tiny", None, "mae", (0.2, 1.0)),
        (SSL, "gentle", "gentle", (0.6, 1.0)),
        (SSL, ViewSpec(scale=(0.5, 1.0)), "random-resized-crop", (0.5, 1.0)),
    ],
)
def test_views_without_a_store(
    pictures: Dataset, recipe: str, asked: Any, name: str, scale: tuple[float, float]
) -> None:
    spec, called = choose_views(get_recipe(recipe, {"seed": 3}), None, pictures, asked)
    assert (called, spec.scale) == (name, scale)
    assert spec.seed == (0 if isinstance(asked, ViewSpec) else 3)


def test_clips_have_views_of_clips(pictures: Dataset) -> None:
    clips: Any = SimpleNamespace(card=pictures.card.model_copy(update={"kind": "video"}))
    for recipe in (SSL, "mae-tiny"):
        assert choose_views(get_recipe(recipe), None, clips, None)[1] == "videomae"


def test_a_store_has_views_of_its_own(pictures: Dataset, tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    assert choose_views(get_recipe(SSL), store, pictures, None) == (store.card.views, name_of(store.card.views))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tinymim"])
def test_a_preset_has_one_name_with_and_without_a_store(pictures: Dataset, name: str) -> None:
    """A store keeps how its views are drawn, not what they were called; TinyMIM's are MAE's."""
    for seed in (0, 5):
        store: Any = SimpleNamespace(card=SimpleNamespace(views=parse_views(name, seed)))
        assert choose_views(get_recipe("mae-tiny"), store, pictures, None)[1] == name
    assert name_of(parse_views("tinymim")) == "mae"
    assert name_of(parse_views("gentle?scale=0.5,1")) == "random-resized-crop"


@pytest.mark.parametrize("asked", ["center", "resize", "center?flip=1", ViewSpec(kind="resize", flip=0)])
def test_views_that_are_always_the_same_are_refused(pictures: Dataset, asked: Any) -> None:
    message = (
        rf"^recipe '{SSL}' draws new views of each sample in every epoch, but these \((center-crop|resize), flip [01], jitter null\) "
        r"are always the same; give --views supervised, mae or gentle \(videomae for clips\), or set jitter$"
    )
    with pytest.raises(UsageError, match=message):
        choose_views(get_recipe(SSL, PLAIN), None, pictures, asked)
    choose_views(get_recipe("mae-tiny", PLAIN), None, pictures, asked)
    choose_views(get_recipe(SSL, PLAIN), None, pictures, "center?flip=0.5")


@pytest.mark.parametrize("colours", ["jitter", "second_jitter"])
def test_views_of_one_geometry_may_differ_by_their_colours(pictures: Dataset, colours: str) -> None:
    """Each view and epoch has its own; one coloured view of two is enough."""
    changes: dict[str, Any] = PLAIN | {colours: {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}}
    assert choose_views(get_recipe(SSL, changes), None, pictures, "center")[1] == "center"
    assert choose_views(get_recipe(SSL), None, pictures, "resize")[1] == "resize"


def test_a_store_whose_views_never_differ_is_refused(pictures: Dataset, tiny_store: Path) -> None:
    store: Any = SimpleNamespace(card=SimpleNamespace(views=ViewSpec(kind="center-crop", flip=0)))
    with pytest.raises(UsageError, match="always the same; extract to a new store with --views supervised"):
        choose_views(get_recipe("sdssl-cached-final-tiny", PLAIN), store, pictures, None)
    assert choose_views(get_recipe("tinymim-tiny"), store, pictures, None)[1] == "center"


# What a run says of its views


def small(name: str, **changes: Any) -> dict[str, Any]:
    student = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    sizes = {f"objective.{key}": 8 for key in ("projection_dim", "hidden", "hidden_intermediate", "hidden_predictor")}
    fixed = {"student.arguments": student, "epochs": 1, "batch_size": 8, "warmup_epochs": 0}
    return {"recipe": get_recipe(name, fixed | (sizes if name.startswith("sdssl") else {})), "device": "cpu"} | changes


def test_the_first_and_the_last_line_of_a_run_that_teaches_itself(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its views by name, and the momentum copy as what to score; --num-views has nothing to choose from."""
    settings = small("sdssl-byol-tiny", data=data)
    with pytest.raises(UsageError, match=r"^--num-views 2: recipe 'sdssl-byol-tiny' draws new views .*; leave it out$"):
        distill(**settings, out=tmp_path / "a", num_views=2)
    result = distill(**settings, out=tmp_path / "a", quiet=False)
    assert "16 images, 2 new views (supervised) in each epoch, 2 steps" in capsys.readouterr().err
    assert json.loads((tmp_path / "a/run.json").read_text())["preferred"] == str(tmp_path / "a/ema")
    assert format_run(result).endswith(f"score it: hdcache knn-eval {tmp_path}/a/ema --train DATA --test DATA")
    assert distill(**settings, out=tmp_path / "a")["preferred"] == result["preferred"]


@pytest.mark.parametrize(
    ("stored", "number", "line"),
    [
        (False, 2, "2 views (mae)"),
        (False, None, "a new view (mae) in each epoch"),
        (False, 1, "1 view (mae)"),
        (True, 1, "1 stored view ("),
    ],
)
def test_only_a_store_has_stored_views(
    data: str,
    tiny_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stored: bool,
    number: Any,
    line: str,
) -> None:
    where = {"store": tiny_store} if stored else {"data": data}
    result = distill(**small("supervised-tiny", **where), out=tmp_path / "a", num_views=number, quiet=False)
    said = capsys.readouterr().err
    assert f"images, {line}" in said
    assert " in 1 epoch, peak" in said
    text = format_run(result)
    assert "no teacher" in text
    assert "targets from the store" not in text
    assert text.endswith(f"knn-eval {tmp_path}/a --train DATA --test DATA")
