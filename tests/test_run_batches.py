"""What students must agree on to train together: each difference is refused with its values and a way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdcache.distill.run import distill, distill_several
from hdcache.distill.settings import Recipe
from hdcache.errors import InputNotFound, UsageError
from hdcache.extract.run import extract

Make = Callable[..., Recipe]
CPU: dict[str, Any] = {"device": "cpu", "threads": 2}
EXTRACT: dict[str, Any] = {"precision": "fp32", "device": "cpu", "batch": 8, "rows_per_shard": 8, "threads": 2}
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8}, "batch_size is 16 in the first and 8 in the second; add --set batch_size=16, or train them apart$"),
        ({"buffer_rows": 64}, "buffer_rows is 1024 in the first and 64 in the second; add --set buffer_rows=1024, or"),
        ({"accumulate": 2}, "accumulate is 1 in the first and 2 in the second; add --set accumulate=1, or"),
        ({"seed": 4}, "seed, which orders the samples, is 0 in the first and 4 in the second; add --set data_seed=0, or"),
        ({"data_seed": 4}, "seed, which orders the samples, is 0 in the first and 4 in the second; add --set data_seed=0, or"),
        ({"jitter": None}, r"jitter is \{\"brightness\": 0.4, .*\} in the first and null in the second; add --set 'jitter=\{\"bri"),
        (
            {"student.arguments": STUDENT | {"img_size": 48}},
            r"the student's input is \{\"size\": 32, .* in the second; add --set student.arguments.img_size=32, or train",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_recipes_with_other_batches_are_refused(
    changes: dict[str, Any], message: str, tiny_store: Path, tmp_path: Path, small_recipe: Make
) -> None:
    recipes = [small_recipe(), small_recipe("supervised-tiny").model_copy(update={"name": "b"})]
    start = "^recipes 'tinymim-tiny' and 'b' cannot be trained together: "
    with pytest.raises(UsageError, match=start + message):
        distill_several(recipes, out=tmp_path / "a", store=tiny_store, recipe_overrides={2: changes}, **CPU)
    assert not (tmp_path / "a").exists()


def test_the_way_out_is_one(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    """What the messages say to add makes the students trainable together."""
    recipes = [small_recipe("mae-tiny", jitter=None, seed=1), small_recipe("supervised-tiny", batch_size=8)]
    changes: dict[str, str] = {}
    for _ in range(3):
        with pytest.raises(UsageError, match="; add --set ") as caught:
            distill_several(recipes, out=tmp_path / "a", store=tiny_store, overrides=changes, **CPU)
        field, _, value = (
            str(caught.value).partition("; add --set ")[2].partition(", or train")[0].strip("'").partition("=")
        )
        changes[field] = value
    assert changes == {"batch_size": "16", "jitter": "null", "data_seed": "1"}
    found = distill_several(recipes, out=tmp_path / "a", store=tiny_store, overrides=changes, **CPU)
    assert [result["steps"] for result in found] == [8, 8]


def test_views_that_are_drawn_otherwise_are_refused(tiny_store: Path, tmp_path: Path, small_recipe: Make) -> None:
    """An objective with new views in each epoch, beside one that sees those of the teachers."""
    recipes = [small_recipe("supervised-tiny"), small_recipe("sdssl-simclr-tiny")]
    message = "the number of new views that the objective draws in each epoch is 0 in the first and 2 in the second; train them apart$"
    for where in ({"store": tiny_store}, {"data": f"npz:{tiny_store.parent}/data.npz"}):
        with pytest.raises(UsageError, match=message):
            distill_several(recipes, out=tmp_path / "a", **where, **CPU)
    cached = small_recipe("sdssl-cached-final-tiny", objective__target="final")
    message = r"the list of stored views that are complete in its teachers is \[0, 1\] in the first and \[\] in the second; train"
    with pytest.raises(UsageError, match=message):
        distill_several([cached, recipes[1]], out=tmp_path / "a", store=tiny_store, **CPU)


def test_teachers_with_other_views_or_rows(
    tmp_path: Path, tiny: str, small_recipe: Make, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "d", 34)
    settings = EXTRACT | {"store": tmp_path / "s"}
    extract(str(root), teachers=[f"t={tiny}"], num_views=2, **settings)
    extract(str(root), teachers=[f"u={tiny}&seed=1"], num_views=1, **settings)
    recipes = [small_recipe(objective__teacher=name).model_copy(update={"name": name}) for name in "tu"]
    message = r"complete in its teachers is \[0, 1\] in the first and \[0\] in the second; add --num-views 1, or train them apart$"
    with pytest.raises(UsageError, match=message):
        distill_several(recipes, out=tmp_path / "a", store=tmp_path / "s", **CPU)
    found = distill_several(recipes, out=tmp_path / "a", store=tmp_path / "s", num_views=1, **CPU)
    assert [list(result["targets"]) for result in found] == [["t"], ["u"]]
    from hdcache.loader import Loader

    rows = Loader.rows
    monkeypatch.setattr(
        Loader, "rows", lambda self, view: rows(self, view)[1 if [r.name for r in self.readers] == ["u"] else 0 :]
    )
    message = "the number of usable rows of view 0 is 34 in the first and 33 in the second; train them apart$"
    with pytest.raises(UsageError, match=message):
        distill_several(recipes, out=tmp_path / "b", store=tmp_path / "s", num_views=1, **CPU)


def test_targets_are_decoded_to_one_type(
    tmp_path: Path, tiny: str, small_recipe: Make, make_npz: Callable[..., str]
) -> None:
    """Of each teacher; where rows are stored in float32 a student may compute in bfloat16 beside one that does not."""
    data = make_npz(tmp_path / "data.npz", 32)
    settings = EXTRACT | {"store": tmp_path / "s", "taps": ["block3.attn_in"]}
    extract(data, teachers=[f"t={tiny}"], encoding="fp16", **settings)
    extract(data, teachers=[f"u={tiny}&seed=1"], encoding="fp32", **settings)

    def pair(one: str, other: str) -> list[Recipe]:
        return [
            small_recipe(objective__teacher=name, amp=amp, epochs=1, warmup_epochs=0).model_copy(update={"name": amp})
            for name, amp in ((one, "off"), (other, "bf16"))
        ]

    message = (
        r"^recipes 'off' and 'bf16' cannot be trained together: targets of teacher 't' are decoded to torch\.float32 for the "
        r"first and torch\.bfloat16 for the second; give them one amp \(--set amp=off, or bf16\), or train them apart$"
    )
    with pytest.raises(UsageError, match=message):
        distill_several(pair("t", "t"), out=tmp_path / "a", store=tmp_path / "s", **CPU)
    for one, other in (("t", "u"), ("u", "t"), ("u", "u")):
        for recipe in (recipes := pair(one, other)):
            distill(recipe, out=tmp_path / "own" / recipe.name, store=tmp_path / "s", **CPU)
        distill_several(recipes, out=tmp_path / "all", store=tmp_path / "s", **CPU)
        for name in ("off", "bf16"):
            files = [tmp_path / where / name / "student.safetensors" for where in ("own", "all")]
            assert files[0].read_bytes() == files[1].read_bytes()
        for where in ("own", "all"):
            shutil.rmtree(tmp_path / where)


def test_missing_targets_of_all_students_are_named_at_once(
    tmp_path: Path, tiny: str, small_recipe: Make, make_npz: Callable[..., str]
) -> None:
    extract(
        make_npz(tmp_path / "data.npz", 32), store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], **EXTRACT
    )
    hybrid = small_recipe("hybrid-tiny", objective__relation_teacher="t", objective__feature_teacher="t")
    with pytest.raises(
        InputNotFound, match=r"set objective\.teacher=t-2 and objective\.relation_teacher=t-2 .*--tap block3.attn_in"
    ) as caught:
        distill_several([small_recipe(), hybrid], out=tmp_path / "a", store=tmp_path / "s", **CPU)
    assert "objective.feature_teacher=t-2" in str(caught.value)
    data = make_npz(tmp_path / "one.npz", 32, classes=1)
    with pytest.raises(UsageError, match=r"^recipe 'supervised-tiny': .*needs labels of at least 2 classes"):
        distill_several(
            ["supervised-tiny", "mae-tiny"], out=tmp_path / "a", data=data, overrides={"jitter": None}, **CPU
        )
    assert not (tmp_path / "a").exists()


def test_unreadable_images_take_no_part_in_any(
    tmp_path: Path, make_folder: Callable[..., Path], small_recipe: Make
) -> None:
    root = make_folder(tmp_path / "d", 24)
    (root / "a/02.png").write_bytes(b"")
    recipes = [small_recipe("supervised-tiny", jitter=None), small_recipe("mae-tiny")]
    found = distill_several(recipes, out=tmp_path / "a", data=str(root), **CPU)
    assert all(list(result["dropped"]) == ["a/02.png"] for result in found)
    assert np.isfinite([result["loss"] for result in found]).all()
