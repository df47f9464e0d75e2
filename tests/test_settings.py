from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from hdcache.distill.amd import AMD
from hdcache.distill.hybrid import Hybrid
from hdcache.distill.logits import Logits
from hdcache.distill.mae import MAE
from hdcache.distill.objective import Objective
from hdcache.distill.sdssl import SDSSL
from hdcache.distill.settings import Recipe, StudentSpec
from hdcache.distill.supervised import Supervised
from hdcache.distill.tinymim import TinyMIM
from hdcache.photometric import Photometric

OBJECTIVES: list[type[Objective]] = [TinyMIM, AMD, Hybrid, Logits, SDSSL, Supervised, MAE]
MINIMAL: dict[str, Any] = {
    "name": "mine",
    "objective": {"kind": "tinymim"},
    "student": {"architecture": "vit_tiny_patch16_224"},
    "epochs": 10,
    "batch_size": 64,
    "lr": 1e-3,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": None}, "exactly one of lr and base_lr must be given, but neither is set"),
        ({"base_lr": 1e-4}, "but both are set; set the other one to null"),
        ({"min_lr": 0.1}, "min_lr 0.1 is above the peak learning rate 0.001"),
        ({"warmup_epochs": 10}, "warmup_epochs 10.0 must be smaller than epochs 10"),
        ({"accumulate": 3}, "accumulate 3 does not divide batch_size 64"),
        ({"betas": [0.9, 1.0]}, r"betas \[0.9, 1.0\] must lie in \[0, 1\)"),
        ({"ema_end": 1.0}, "ema_end is set, but ema is null; set both or neither"),
        ({"weights": {"qk": 2, "kk": 1}}, "weights names kk, but the parts of this loss are qk, vv"),
        ({"accumulate": 3, "warmup_epochs": 11}, "warmup_epochs 11.0 .*; accumulate 3"),
        (
            {"accumulate": 2, "objective": {"kind": "sdssl"}},
            "accumulate 2 would cut batches whose rows objective 'sdssl' compares; set it to 1",
        ),
        (
            {"batch_size": 1, "objective": {"kind": "sdssl"}},
            "batch_size 1 leaves objective 'sdssl' nothing to compare; set 2 or more",
        ),
        ({"second_jitter": {}}, "second_jitter is set, but objective 'tinymim' has one view; set it to null"),
        ({"name": ""}, "at least 1 character"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(MINIMAL | changes)


def test_weights_are_one_unless_given() -> None:
    recipe = Recipe.model_validate(MINIMAL | {"weights": {"vv": 0.5}})
    assert recipe.loss_weights() == {"qk": 1.0, "vv": 0.5}


def test_every_student_view_has_an_augmentation() -> None:
    """The second view's own where there is one, else the first view's; a student of one view has one."""
    two, weak = {"objective": {"kind": "sdssl"}, "jitter": {}}, {"brightness": 0.1}
    assert Recipe.model_validate(MINIMAL).augmentations() == (None,)
    assert Recipe.model_validate(MINIMAL | {"jitter": weak}).augmentations() == (Photometric(brightness=0.1),)
    assert Recipe.model_validate(MINIMAL | two).augmentations() == (Photometric(), Photometric())
    found = Recipe.model_validate(MINIMAL | two | {"second_jitter": weak}).augmentations()
    assert found == (Photometric(), Photometric(brightness=0.1))


def test_the_order_has_the_seed_of_the_run_or_one_of_its_own() -> None:
    """Recipes of before, which have none, are spelled as they were."""
    plain = Recipe.model_validate(MINIMAL | {"seed": 3})
    assert plain.order_seed() == 3
    assert "data_seed" not in plain.model_dump(mode="json")
    own = Recipe.model_validate(MINIMAL | {"seed": 3, "data_seed": 0})
    assert own.order_seed() == own.model_dump(mode="json")["data_seed"] == 0
    assert Recipe.model_validate(own.model_dump(mode="json")) == own


def test_learning_rate_is_absolute_or_per_256_images() -> None:
    assert Recipe.model_validate(MINIMAL).peak_lr() == 1e-3
    scaled = Recipe.model_validate(MINIMAL | {"lr": None, "base_lr": 1e-3, "batch_size": 1024})
    assert scaled.peak_lr() == pytest.approx(4e-3)


def test_objective_is_chosen_by_its_kind() -> None:
    for expected in OBJECTIVES:
        needed = {"teacher_mask_ratio": 0.5, "student_mask_ratio": 0.75} if expected is AMD else {}
        objective = {"kind": expected.model_fields["kind"].default} | needed
        assert type(Recipe.model_validate(MINIMAL | {"objective": objective}).objective) is expected


def test_digest_is_that_of_the_settings() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    assert Recipe.model_validate_json(recipe.canonical()) == recipe
    assert Recipe.model_validate_json(recipe.canonical()).digest() == recipe.digest()
    assert Recipe.model_validate(MINIMAL | {"seed": 1}).digest() != recipe.digest()


@pytest.mark.parametrize("record", [Recipe, StudentSpec, Photometric, *OBJECTIVES])
def test_every_field_says_what_it_means(record: type[BaseModel]) -> None:
    assert [name for name, field in record.model_fields.items() if not field.description] == []
    assert record.model_config.get("frozen")
    assert record.model_config.get("extra") == "forbid"
