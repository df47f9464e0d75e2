from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from hdcache.distill.recipes import RECIPES, get_recipe, recipe_from_file, show
from hdcache.distill.settings import Recipe
from hdcache.distill.tinymim import TinyMIM
from hdcache.errors import InputNotFound, UsageError
from hdcache.schema import Preprocessing, TeacherCard

# Recipe -> width, depth and heads of the teacher that the paper pairs it with (A8).
TEACHERS = {
    "tinymim-b": (1024, 24, 16),
    "tinymim-s": (768, 12, 12),
    "tinymim-t": (384, 12, 6),
    "tinymim-feature": (1024, 24, 16),
    "tinymim-class-token": (1024, 24, 16),
}


def card(width: int, depth: int, heads: int) -> TeacherCard:
    return TeacherCard(
        architecture="x",
        weights="0",
        preprocessing=Preprocessing(size=224),
        patch_size=16,
        grid=(14, 14),
        prefix_tokens=1,
        class_token=True,
        width=width,
        depth=depth,
        heads=heads,
        precision="fp32",
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_complete_named_and_stable(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert recipe == RECIPES[name]()
    assert Recipe.model_validate_json(recipe.canonical()) == recipe
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", TEACHERS)
def test_paper_recipes_have_the_paper_s_values(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.peak_lr() == pytest.approx(2.4e-3)
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs, recipe.min_lr) == (300, 4096, 15, 0)
    assert (recipe.betas, recipe.weight_decay, recipe.weight_decay_end) == ((0.9, 0.95), 0.05, None)
    assert recipe.clip_grad is None
    assert recipe.jitter is not None
    assert (recipe.jitter.brightness, recipe.jitter.contrast, recipe.jitter.saturation) == (0.4, 0.4, 0.4)
    student = recipe.student
    assert (student.drop_path, student.drop_path_schedule, student.drop_path_last_block) == (0.1, "constant", False)
    assert (student.init, student.sincos_positions) == ("mae", True)


@pytest.mark.parametrize("name", TEACHERS)
def test_paper_students_fit_their_teachers(name: str) -> None:
    recipe, teacher = get_recipe(name), card(*TEACHERS[name])
    with torch.device("meta"):
        student = timm.create_model(recipe.student.architecture, num_classes=0, **recipe.student.arguments)
    heads = recipe.objective.build(student, {"mae": teacher}, 0, torch.Generator())
    assert recipe.objective.wants({"mae": teacher})["mae"]
    if name == "tinymim-b":
        assert heads.targets == ("block18.rel.qk", "block18.rel.vv")
        assert heads.tap == "block12.qkv"


def test_head_layouts_are_those_of_the_released_factories() -> None:
    found = {}
    for name in ("tinymim-b", "tinymim-s", "tinymim-t"):
        recipe = get_recipe(name)
        assert isinstance(recipe.objective, TinyMIM)
        with torch.device("meta"):
            student = timm.create_model(recipe.student.architecture, num_classes=0, **recipe.student.arguments)
        last = recipe.objective.heads or TEACHERS[name][2]
        found[name] = (student.embed_dim, student.blocks[0].attn.num_heads, last)
    assert found == {"tinymim-b": (768, 12, 16), "tinymim-s": (384, 6, 12), "tinymim-t": (192, 6, 12)}


def test_tiny_student_fits_the_tiny_teachers() -> None:
    student, objective = get_recipe("tinymim-tiny").student, get_recipe("tinymim-tiny").objective
    for name in ("supervised-tiny", "mae-tiny"):
        arguments = get_recipe(name).student.arguments
        assert arguments["img_size"] == student.arguments["img_size"]
        side = arguments["img_size"] // arguments["patch_size"]
        small = card(arguments["embed_dim"], arguments["depth"], arguments["num_heads"])
        teacher = small.model_copy(update={"grid": (side, side)})
        with torch.device("meta"):
            model = timm.create_model(student.architecture, num_classes=0, **student.arguments)
        objective.build(model, {name: teacher}, 0, torch.Generator())


def test_overrides_reach_every_depth() -> None:
    changes = {
        "epochs": "2",
        "base_lr": "1e-4",
        "amp": "off",
        "jitter": "null",
        "student.arguments.img_size": "64",
        "student.drop_path": "0",
        "objective.relations": '["vv"]',
        "objective.heads": "8",
        "weights.vv": 2,
        "warmup_epochs": "1",
    }
    recipe = get_recipe("tinymim-b", changes)
    assert isinstance(recipe.objective, TinyMIM)
    assert (recipe.epochs, recipe.base_lr, recipe.amp, recipe.jitter) == (2, 1e-4, "off", None)
    assert recipe.student.arguments == {"img_size": 64}
    assert recipe.student.drop_path == 0
    assert (recipe.objective.relations, recipe.objective.heads) == (("vv",), 8)
    assert recipe.loss_weights() == {"vv": 2}
    assert get_recipe("tinymim-b") == RECIPES["tinymim-b"]()


def test_a_setting_that_is_null_can_be_opened() -> None:
    recipe = get_recipe("mae-tiny", {"jitter.contrast": "0.1"})
    assert recipe.jitter is not None
    assert (recipe.jitter.brightness, recipe.jitter.contrast) == (0.4, 0.1)


def test_another_objective_can_be_put_in() -> None:
    recipe = get_recipe("tinymim-s", {"objective.kind": "supervised", "objective.pool": "mean"})
    assert recipe.objective.model_dump() == {"kind": "supervised", "pool": "mean", "label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tinymim-x", {}, "unknown recipe 'tinymim-x'; did you mean 'tinymim-"),
        ("zzz", {}, "unknown recipe 'zzz'; choose from: mae-tiny, "),
        (
            "tinymim-b",
            {"studnet.drop_path": "1"},
            "recipe 'tinymim-b': unknown field 'studnet'; did you mean 'student'",
        ),
        ("tinymim-b", {"student.drop_pth": "1"}, "unknown field 'student.drop_pth'; did you mean 'drop_path'"),
        ("tinymim-b", {"epochs": "many"}, r"epochs: Input should be a valid integer.* \(found 'many'\)"),
        ("tinymim-b", {"lr": "1e-3"}, "exactly one of lr and base_lr must be given, but both are set"),
        ("tinymim-b", {"name": "[1"}, r"--set name=\[1: not a YAML or JSON value"),
    ],
)
def test_what_cannot_be_meant_is_named(name: str, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_recipe(name, overrides)


YAML = """
base: tinymim-b          # all that is not below
name: mine
base_lr: 1e-4
amp: off
student: {arguments: {img_size: 64}}
objective:
  relations: [qk]
"""


def test_file_in_yaml_changes_its_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    recipe = recipe_from_file(path, {"objective.heads": "8"})
    expected = get_recipe(
        "tinymim-b",
        {
            "name": "mine",
            "base_lr": "1e-4",
            "amp": "off",
            "student.arguments.img_size": 64,
            "objective.relations": "[qk]",
            "objective.heads": 8,
        },
    )
    assert recipe == expected


def test_file_in_json_holds_a_whole_recipe(tmp_path: Path) -> None:
    path, recipe = tmp_path / "mine.json", get_recipe("mae-tiny")
    path.write_text(json.dumps(recipe.model_dump(mode="json"), indent="\t"))
    assert recipe_from_file(path) == recipe
    assert recipe_from_file(path).digest() == recipe.digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: tinymim-q\n", "unknown recipe 'tinymim-q'"),
        ("base: tinymim-b\nepoch: 3\n", "mine.yaml: unknown field 'epoch'; did you mean 'epochs'"),
        ("name: mine\n", "mine.yaml: objective is missing; student is missing"),
        ("- 1\n", "mine.yaml: expected a mapping of recipe fields, found list"),
        ("", "mine.yaml: expected a mapping of recipe fields, found NoneType"),
        ("a: [\n", "mine.yaml: not a YAML or JSON value"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        recipe_from_file(path)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match=r"none.yaml: recipe file cannot be read \(.*No such file"):
        recipe_from_file(tmp_path / "none.yaml")


def test_show_gives_a_row_for_every_field() -> None:
    rows = {path: (value, about) for path, value, about in show(get_recipe("tinymim-t"))}
    assert rows["objective.heads"][0] == "12"
    assert rows["student.arguments"][0] == '{"num_heads": 6}'
    assert rows["jitter.brightness"][0] == "0.4"
    assert rows["base_lr"] == (
        "0.00015",
        "Peak learning rate per 256 images of batch_size (TinyMIM A7: 1.5e-4); either this or lr.",
    )
    assert all(about for _, about in rows.values())
    for path, (value, _) in rows.items():
        get_recipe("tinymim-t", {path: value})
