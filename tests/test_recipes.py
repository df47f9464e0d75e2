"""Published recipes: every value has a source, every recipe can be built, every small one trains."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from torch import nn

from hdcache.backbones import create_vit
from hdcache.distill import published_amd, published_baselines, published_hybrid, published_sdssl, published_tinymim
from hdcache.distill.amd import AMD
from hdcache.distill.changes import nested_changes
from hdcache.distill.entry import fields
from hdcache.distill.hybrid import Hybrid
from hdcache.distill.recipes import (
    RECIPES,
    format_list,
    format_recipe,
    get_recipe,
    list_recipes,
    recipe_from_file,
    show,
)
from hdcache.distill.run import distill
from hdcache.distill.sdssl import SDSSL
from hdcache.distill.settings import Recipe
from hdcache.distill.tinymim import TinyMIM
from hdcache.errors import InputNotFound, UsageError
from hdcache.records import Record
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard

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
    assert Recipe.model_validate_json(recipe.canonical()) == recipe
    assert RECIPES[name].about
    assert RECIPES[name].teacher
    assert set(recipe.loss_weights()) == set(recipe.objective.parts()) != set()
    assert set(recipe.objective.factors(0, 10)) <= set(recipe.objective.parts())


def test_no_recipe_hides_another_of_its_name() -> None:
    modules = (published_tinymim, published_hybrid, published_amd, published_sdssl, published_baselines)
    names = [entry.recipe.name for module in modules for entry in module.ENTRIES]
    assert sorted(names) == sorted(RECIPES)


def known_paths(record: Record) -> Iterator[str]:
    """Every field that ``record`` has or could have, groups included, its own kind of objective only."""

    def of(model: type[Record], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            own = type(record.objective) if isinstance(record, Recipe) and prefix + name == "objective" else None
            annotations = [own] if own else [field.annotation, *get_args(field.annotation)]
            for inner in annotations:
                if isinstance(inner, type) and issubclass(inner, Record) and (own or name != "objective"):
                    yield from of(inner, f"{prefix}{name}.")

    yield from of(type(record), "")


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_has_a_source_and_every_source_a_field(name: str) -> None:
    """A group speaks for its fields only where it is one thing (jitter); a new field anywhere else needs its own."""
    entry = RECIPES[name]
    paths = [path for path, _, _ in fields(entry.recipe)]
    missing = [path for path in paths if path not in entry.sources and "jitter" not in path]
    assert not missing, f"{name}: no source for {missing}"
    assert all(entry.source(path).strip() for path in paths)
    unknown = set(entry.sources) - set(known_paths(entry.recipe))
    assert not unknown, f"{name}: sources of fields that do not exist: {sorted(unknown)}"


@pytest.mark.parametrize("name", RECIPES)
def test_sources_agree_with_values(name: str) -> None:
    """What is said to be null or unused is so; lr and base_lr point at each other."""
    entry = RECIPES[name]
    for path, value, _ in fields(entry.recipe):
        if entry.source(path).startswith("null"):
            assert value is None, (path, value)
    drop = entry.recipe.student.drop_path
    for path in ("student.drop_path_schedule", "student.drop_path_last_block"):
        assert ("no effect" in entry.source(path)) == (drop == 0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_a_recipe_can_be_set(name: str) -> None:
    rows = show(name)
    assert get_recipe(name, {path: value for path, value, _, _ in rows}) == RECIPES[name].recipe
    assert all(meaning for _, _, _, meaning in rows)


def meta_student(recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        if "frames" in recipe.student.arguments:
            return create_vit(recipe.student.architecture, recipe.student.arguments | {"num_classes": 0})
        return timm.create_model(recipe.student.architecture, num_classes=0, **recipe.student.arguments)


def fake_cards(recipe: Recipe) -> dict[str, TeacherCard]:
    """Cards of narrow teachers that fit the recipe: its grid, its names, its mask, with a classifier where it is read."""
    objective, arguments = recipe.objective, recipe.student.arguments
    small = "embed_dim" in arguments
    frames = arguments.get("frames")
    side = 8 if small else 14
    mask = None
    if isinstance(objective, AMD):
        mask = MaskSpec(kind="tube" if frames else "random", ratio=objective.teacher_mask_ratio)
    base = card(64, 4 if small else 24, 2).model_copy(
        update={
            "grid": (side, side),
            "slots": frames // 2 if frames else 1,
            "prefix_tokens": 0 if frames else 1,
            "class_token": not frames,
            "classes": 5 if objective.kind == "logits" else 0,
            "mask": mask,
            "preprocessing": Preprocessing(size=32 if small else 224, frames=frames),
        }
    )
    names = [objective.relation_teacher, objective.feature_teacher] if isinstance(objective, Hybrid) else ["t"]
    return {str(name): base for name in names}


# Full-size heads hold up to 150 million weights; their widths do not matter to what fits.
NARROW = {
    "sdssl": {"hidden": 8, "hidden_intermediate": 8, "hidden_predictor": 8, "projection_dim": 8},
    "amd": {"decoder_width": 64, "decoder_depth": 1, "generator_depth": 1},
    "mae": {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2},
}


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("tinymim-")])
def test_student_and_heads_can_be_built(name: str) -> None:
    kind = RECIPES[name].recipe.objective.kind
    narrow = {f"objective.{key}": value for key, value in NARROW.get(kind, {}).items()}
    unused = {path for path in narrow if RECIPES[name].source(path).startswith("not used")}
    recipe = get_recipe(name, {path: value for path, value in narrow.items() if path not in unused})
    cards, student = fake_cards(recipe), meta_student(recipe)
    wanted = recipe.objective.wants(cards)
    assert bool(wanted) == (not RECIPES[name].teacher.startswith("none"))
    heads = recipe.objective.build(student, cards, 5, torch.Generator().manual_seed(0))
    assert isinstance(heads, nn.Module)
    assert recipe.objective.last_trained(len(student.blocks))  # type: ignore[arg-type]  # nn.Module's attributes are untyped


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


def mp4s(folder: Path, count: int) -> None:
    """Small videos of moving noise, 18 frames each."""
    av = pytest.importorskip("av")
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
            for time in range(18):
                frame = av.VideoFrame.from_ndarray(np.roll(noise, time, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory, make_npz: Callable[..., str]) -> Callable[[bool], str]:
    """Specs of eight labelled pictures, or videos."""
    root = tmp_path_factory.mktemp("recipes")
    made: dict[bool, str] = {}

    def data(video: bool) -> str:
        if video not in made and video:
            mp4s(root / "videos", 8)
            made[video] = f"video:{root / 'videos'}"
        elif video not in made:
            made[video] = make_npz(root / "data.npz", 8, classes=5)
        return made[video]

    return data


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-tiny")])
def test_small_recipes_train(
    name: str, small_data: Callable[[bool], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on random pictures or clips, from random teachers of the size that the recipe is meant for."""
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))
    recipe = get_recipe(name, {"epochs": 1, "warmup_epochs": 0, "batch_size": 4, "log_every": 1})
    frames = recipe.student.arguments.get("frames")
    cards = fake_cards(recipe)
    settings: dict[str, Any] = {"views": f"videomae?frames={frames}&stride=2" if frames else "supervised"}
    if recipe.objective.wants(cards):
        spec = "random:vit_tiny_patch16_224?img_size=32&patch_size=4&embed_dim=96&depth=4&num_heads=3&num_classes=5"
        spec += f"&frames={frames}&tubelet=2" if frames else ""
        settings |= {"online": True, "teachers": [f"{teacher}={spec}" for teacher in cards]}
    if isinstance(recipe.objective, AMD):
        settings["teacher_mask"] = str(recipe.objective.teacher_mask_ratio)
    done = distill(recipe, out=tmp_path / "run", data=small_data(bool(frames)), device="cpu", threads=1, **settings)
    assert done["steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == 2
    assert all(set(recipe.objective.parts()) <= set(line) for line in logged)
    assert (tmp_path / "run/student.safetensors").is_file()


def test_values_of_the_other_papers() -> None:
    """What methods' own releases or texts give, by hand."""
    hybrid = [get_recipe(name) for name in ("hybrid-b", "hybrid-l", "hybrid-l-in21k")]
    assert [recipe.epochs for recipe in hybrid] == [300, 300, 40]
    assert all(recipe.loss_weights() == {"relation": 1, "feature": 1} for recipe in hybrid)
    for name, width in (("amd-video-b", 768), ("amd-video-s", 384)):
        amd = get_recipe(name)
        assert isinstance(amd.objective, AMD)
        assert (amd.objective.teacher_mask_ratio, amd.objective.student_mask_ratio) == (0.75, 0.9)
        assert (amd.peak_lr(), amd.min_lr, amd.clip_grad, amd.betas) == (2.4e-3, 2e-5, 0.02, (0.9, 0.95))
        # 200 loops of 4 views; 512 videos x 4 views.
        assert (amd.epochs, amd.batch_size, amd.warmup_epochs) == (800, 2048, 40)
        assert amd.loss_weights() == {"pixels": 1, "direct": 1, "generation": 1}
        assert meta_student(amd).embed_dim == width
        assert meta_student(amd).patch_embed.num_patches == 1568  # type: ignore[union-attr]  # untyped
    for name, lr in (("mocov3", 1.5e-4), ("byol", 1.5e-4), ("simclr", 1.3e-4)):
        for suffix in ("", "-baseline"):
            sdssl = get_recipe(f"sdssl-{name}{suffix}")
            assert isinstance(sdssl.objective, SDSSL)
            assert (sdssl.objective.framework, sdssl.objective.intermediate) == (name, not suffix)
            assert (sdssl.base_lr, sdssl.weight_decay, sdssl.betas) == (lr, 0.1, (0.9, 0.999))
            assert (sdssl.epochs, sdssl.warmup_epochs, sdssl.amp) == (300, 40, "off")
            assert sdssl.student.freeze_patch_embed
            first, second = sdssl.augmentations()
            assert first is not None
            assert second is not None
            assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    mae = get_recipe("mae-l")
    assert (mae.epochs, mae.batch_size, mae.warmup_epochs, mae.peak_lr()) == (800, 4096, 40, pytest.approx(2.4e-3))
    assert get_recipe("supervised-s").peak_lr() == 1e-3


def test_baselines_have_the_budget_of_what_they_are_compared_with() -> None:
    """The same student, data passes, batch and optimizer; only the loss differs."""
    pairs = [
        ("hybrid-b", "hybrid-b-relation"),
        ("hybrid-b", "hybrid-b-feature"),
        ("amd-video-b", "amd-video-b-symmetric"),
        ("amd-image-b", "amd-image-b-symmetric"),
        *((f"sdssl-{name}", f"sdssl-{name}-baseline") for name in ("simclr", "byol", "mocov3")),
        *((f"sdssl-{name}-tiny", f"sdssl-{name}-baseline-tiny") for name in ("simclr", "byol", "mocov3")),
        ("tinymim-b", "tinymim-feature"),
        ("tinymim-b", "tinymim-class-token"),
        ("supervised-s", "logits-s"),
        *itertools.pairwise(("tinymim-tiny", "tinymim-feature-tiny", "hybrid-tiny", "hybrid-relation-tiny")),
        ("amd-image-tiny", "amd-image-symmetric-tiny"),
        ("amd-video-tiny", "amd-video-symmetric-tiny"),
    ]
    for first, second in pairs:
        one, other = (get_recipe(name).model_dump(exclude={"name", "objective"}) for name in (first, second))
        assert one == other, (first, second)


def test_the_ablations_schedule_differs_in_epochs_alone() -> None:
    full, short = (get_recipe(name).model_dump(exclude={"name"}) for name in ("hybrid-b", "hybrid-b-100"))
    assert (full.pop("epochs"), short.pop("epochs")) == (300, 100)
    assert full == short


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("sdssl-")])
def test_only_recipes_with_a_momentum_copy_speak_of_one(name: str) -> None:
    objective = RECIPES[name].recipe.objective
    assert isinstance(objective, SDSSL)
    has_copy = objective.formulation == "online" and objective.framework != "simclr"
    for path in ("ema", "ema_end"):
        assert ("keeps its own momentum copy" in RECIPES[name].source(path)) == has_copy


@pytest.mark.parametrize("name", ["tinymim-s", "tinymim-t"])
def test_smaller_students_can_learn_from_the_large_teacher_directly(name: str) -> None:
    """12 heads do not divide an MAE-L; its own 16 divide both widths. The notes give the change."""
    large = {"mae": card(1024, 24, 16)}
    with pytest.raises(UsageError, match="12 heads do not divide the width 1024"):
        get_recipe(name).objective.build(meta_student(get_recipe(name)), large, 0, torch.Generator())
    direct = get_recipe(name, {"objective.heads": "null"})
    heads = direct.objective.build(meta_student(direct), large, 0, torch.Generator())
    assert heads.cut == 16
    assert "objective.heads=null" in RECIPES[name].notes


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
    assert get_recipe("tinymim-b") == RECIPES["tinymim-b"].recipe


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
        ("zzz", {}, "unknown recipe 'zzz'; choose from: amd-image-b, "),
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


def test_show_gives_value_source_and_meaning_of_every_field() -> None:
    rows = {path: (value, source, meaning) for path, value, source, meaning in show("tinymim-t")}
    assert rows["student.arguments"][0] == '{"num_heads": 6}'
    assert rows["jitter.brightness"][0] == "0.4"
    assert rows["base_lr"] == (
        "0.00015",
        "released README: 1.5e-4 per 256 images",
        "Peak learning rate per 256 images of batch_size (TinyMIM A7: 1.5e-4); either this or lr.",
    )
    assert "would not fit" in rows["objective.heads"][1]


def test_show_says_what_is_not_the_recipe_s_any_more() -> None:
    changes = {"epochs": "7", "warmup_epochs": "1", "objective.kind": "supervised"}
    rows = {path: source for path, _, source, _ in show("tinymim-b", changes)}
    assert rows["epochs"] == "yours; the recipe has 300"
    assert rows["objective.kind"] == 'yours; the recipe has "tinymim"'
    assert rows["objective.label_smoothing"] == "yours, or the default of what you chose"
    assert rows["batch_size"] == "released README: 32 GPUs x 128"


def test_the_page_of_a_recipe_names_its_teacher_notes_and_sources() -> None:
    page = format_recipe("amd-video-b", {"epochs": "100"})
    assert "teacher VideoMAE ViT-L of the same data, masked" in page
    assert "Repeated augmentation" in page
    assert "released code, scripts/pretrain: 0.02" in page
    assert "yours; the recipe has 800" in page
    with pytest.raises(UsageError, match="unknown recipe 'amd-vide-b'; did you mean 'amd-video-b'"):
        format_recipe("amd-vide-b")


def test_the_list_has_one_line_for_each_recipe() -> None:
    listed = list_recipes()
    assert listed.keys() == RECIPES.keys()
    assert json.loads(json.dumps(listed["hybrid-tiny"])) == {
        "method": "Hybrid Distill",
        "student": "4 blocks of 48, 32 px",
        "teacher": "mae-tiny (mae) and supervised-tiny (supervised)",
        "about": "both halves, small images on a CPU",
    }
    lines = format_list().splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert "Hybrid Distill  4 blocks of 48, 32 px" in next(line for line in lines if line.startswith("hybrid-tiny"))


def test_ablations_of_the_notes_are_settings() -> None:
    """Every --set line that the notes of TinyMIM and Hybrid Distill name can be set."""
    for change in (
        {"objective.relations": '["qq","kk","vv"]'},
        {"objective.softmax": "false"},
        {"objective.masked_input": "0.75"},
        {"objective.masked_input": "0.75", "objective.reconstruction": '{"kind":"mae"}'},
    ):
        assert get_recipe("tinymim-b", change).objective != RECIPES["tinymim-b"].recipe.objective
    for change in (
        {"objective.keep_ratio": "null"},
        {"objective.scorer": "random"},
        {"objective.scores": "softmax"},
        {"objective.relations": '["qk","vv"]'},
        {"objective.feature_teacher": "deit"},
    ):
        assert get_recipe("hybrid-b", change).objective != RECIPES["hybrid-b"].recipe.objective
    hard = {"objective.hard_labels": "true", "weights": '{"soft_labels":0.5,"cross_entropy":0.5}'}
    assert get_recipe("logits-s", hard).loss_weights() == {"soft_labels": 0.5, "cross_entropy": 0.5}
    assert nested_changes(hard)["weights"] == {"soft_labels": 0.5, "cross_entropy": 0.5}
