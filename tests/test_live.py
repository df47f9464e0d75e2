"""Which teachers a run may learn from, and which of them run in the loop."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hdcache.cli import cli
from hdcache.distill import amd
from hdcache.distill.hybrid import Hybrid
from hdcache.distill.live import (
    choose_teachers,
    commands_of,
    named_teachers,
    stored_teachers,
    teacher_cards,
    teacher_fields,
    union,
)
from hdcache.distill.logits import Logits
from hdcache.distill.objective import Objective
from hdcache.distill.recipes import get_recipe
from hdcache.distill.run import distill
from hdcache.distill.settings import Recipe
from hdcache.distill.teacher_fit import Misfit
from hdcache.distill.tinymim import TinyMIM
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.extract.run import extract
from hdcache.schema import MaskSpec
from hdcache.store import Store

CPU = torch.device("cpu")
AMD: dict[str, Any] = {
    "objective.teacher_mask_ratio": 0.5, "objective.student_mask_ratio": 0.75, "objective.teacher_blocks": [3],
    "objective.student_blocks": [3], "objective.decoder_width": 16, "objective.decoder_heads": 2,
    "student.arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3},
    "epochs": 1, "batch_size": 8, "warmup_epochs": 0, "log_every": 1,
}  # fmt: skip


def test_a_store_alone_runs_nothing(tiny_store: Path, small_recipe: Callable[..., Recipe]) -> None:
    cards, (wanted,), live = choose_teachers([small_recipe()], Store.open(tiny_store), [], CPU, online=False)
    assert list(cards) == ["t"]
    assert wanted == {"t": ("block3.rel.qk", "block3.rel.vv")}
    assert live == {}


def test_a_store_s_teachers_run_from_where_they_came_or_from_where_they_are_said_to_be(
    tiny_store: Path, tiny: str, small_recipe: Callable[..., Recipe]
) -> None:
    store = Store.open(tiny_store)
    for specs in ([], [f"t={tiny}"]):
        cards, (wanted,), live = choose_teachers([small_recipe()], store, specs, CPU, online=True)
        assert list(live) == ["t"]
        assert live["t"].card == cards["t"] == store.teacher("t").card
        assert live["t"].batch == 8, "that of extraction"
    with pytest.raises(UsageError, match=r"^--teacher u=\.\.\.: this run reads t of "):
        choose_teachers([small_recipe()], store, [f"u={tiny}"], CPU, online=True)
    with pytest.raises(StoreMismatch, match="is not the network that the store was made with"):
        stored_teachers(store, wanted, [f"t={tiny}&seed=1"], CPU)
    with pytest.raises(UsageError, match="this run reads no teacher of"):
        stored_teachers(store, {}, [f"t={tiny}"], CPU)


def test_without_a_store_teachers_are_those_that_are_named(tiny: str, small_recipe: Callable[..., Recipe]) -> None:
    cards, (wanted,), live = choose_teachers([small_recipe()], None, [f"a={tiny}"], CPU, online=True)
    assert cards == teacher_cards(None, live)
    assert (list(live), list(wanted)) == (["a"], ["a"])
    assert live["a"].card.classes == 0
    with pytest.raises(UsageError, match="--online without a store needs the teachers: --teacher NAME=SPEC"):
        choose_teachers([small_recipe()], None, [], CPU, online=True)


def test_students_that_train_together_share_their_teachers(
    tiny: str, tiny_store: Path, small_recipe: Callable[..., Recipe]
) -> None:
    """One network for all that read it; one that reads none beside them is no reason to refuse."""
    recipes = [small_recipe(), small_recipe(objective__strategy="feature"), small_recipe("supervised-tiny")]
    specs = [f"t={tiny}"]
    for store in (None, Store.open(tiny_store)):
        _, wanted, live = choose_teachers(recipes, store, specs, CPU, online=True)
        assert wanted == [{"t": ("block3.rel.qk", "block3.rel.vv")}, {"t": ("block3.out",)}, {}]
        assert list(live) == ["t"]
    assert union(wanted) == {"t": ("block3.rel.qk", "block3.rel.vv", "block3.out")}
    assert union([{}, {"a": ("x", "y"), "b": ("z",)}, {"a": ("y", "w")}]) == {"a": ("x", "y", "w"), "b": ("z",)}


def test_a_teacher_with_its_classifier_is_another_one(tiny: str, small_recipe: Callable[..., Recipe]) -> None:
    """Weights that are drawn, and the card, are not those of the teacher without one."""
    features, logits = small_recipe(objective__teacher="t"), small_recipe("logits-tiny", objective__teacher="t")
    spec = f"{tiny}&num_classes=3"
    message = "^recipe 'logits-tiny' reads the classifier of teacher 't', without which 'tinymim-tiny' reads it; name it twice "
    with pytest.raises(UsageError, match=message):
        choose_teachers([features, logits], None, [f"t={spec}"], CPU, online=True)
    other = small_recipe("logits-tiny", objective__teacher="t-2")
    specs = [f"t={spec}", f"t-2={spec}"]
    _, _, live = choose_teachers([features, other, other], None, specs, CPU, online=True)
    assert {name: teacher.card.classes for name, teacher in live.items()} == {"t": 0, "t-2": 3}


def test_targets_that_nobody_can_give_are_refused(small_recipe: Callable[..., Recipe]) -> None:
    class Wanting(TinyMIM):
        def wants(self, cards: Any) -> dict[str, tuple[str, ...]]:
            return {"t": ("final",)}

    recipe = small_recipe().model_copy(update={"objective": Wanting()})
    message = "^recipe 'tinymim-tiny' reads teacher targets; give --store STORE, or --online with --teacher NAME=SPEC$"
    with pytest.raises(UsageError, match=message):
        choose_teachers([recipe], None, [], CPU, online=False)


def test_a_classifier_is_loaded_where_a_target_needs_it(tiny: str) -> None:
    spec = f"a={tiny}&num_classes=5"
    assert named_teachers([spec], CPU)["a"].card.classes == 0
    assert named_teachers([spec], CPU, {"a": ["logits"]})["a"].card.classes == 5
    assert named_teachers([spec], CPU, {"a": ["final"], "b": ["logits"]})["a"].card.classes == 0


@pytest.mark.parametrize("name", ["mae-tiny", "supervised-tiny", "sdssl-mocov3-tiny"])
def test_teachers_that_nobody_reads_are_refused(name: str, tiny: str, tiny_store: Path) -> None:
    for store in (None, Store.open(tiny_store)):
        message = f"^recipe '{name}' reads no teacher, so none can run in the loop; leave --online and --teacher out$"
        with pytest.raises(UsageError, match=message):
            choose_teachers([get_recipe(name)], store, [f"a={tiny}"], CPU, online=True)
        assert choose_teachers([get_recipe(name)], store, [], CPU, online=False)[1:] == ([{}], {})


# The commands in messages


def completed(store: Store | None, message: str, **known: Any) -> str:
    with pytest.raises(UsageError) as caught, commands_of(store):
        raise Misfit(message, **known) if known else UsageError(message)
    return str(caught.value)


def test_commands_name_the_store_and_the_models_that_it_knows(tiny_store: Path, tiny: str) -> None:
    store, command = Store.open(tiny_store), "add it: hdcache extract --store STORE --teacher {}=MODEL --tap final"
    begin = f"add it: hdcache extract --store {tiny_store} --num-views 2 --teacher"
    assert completed(store, command.format("sup")) == f"{begin} sup=MODEL --tap final"
    assert completed(store, command.format("t-75"), of="t") == f"{begin} 't-75={tiny}' --tap final"
    assert completed(store, command.format("u-2"), of="u") == f"{begin} u-2=MODEL --tap final"
    assert completed(None, command.format("t-2"), of="t") == command.format("t-2")
    assert completed(None, command.format("t-2"), of="t", live="leave it out") == "leave it out"
    assert completed(store, command.format("t-2"), live="leave it out") == f"{begin} t-2=MODEL --tap final"
    missing = "no teacher 'u'; choose from: t; or "
    assert completed(None, missing + command.format("u")) == f"{missing}give --teacher u=MODEL too"
    remark = "no teacher 'u'; or add it (N: its last): "
    assert completed(None, remark + command.format("u").removeprefix("add it: ")) == (
        "no teacher 'u'; or give --teacher u=MODEL too"
    )
    set_t = "set objective.teacher=t and add it: hdcache extract --store STORE --teacher t=MODEL --tap final"
    assert completed(store, f"teacher 't' is no good; {set_t}") == (
        f"teacher 't' is no good; set objective.teacher=t-2 and {begin} t-2=MODEL --tap final"
    ), "a name that is taken was proposed"
    sized = "hdcache extract --store STORE --teacher t-2=MODEL --img-size 48 --tap final"
    assert completed(store, sized, of="t").endswith(f"'t-2={tiny}' --img-size 48 --tap final")


def test_a_hyphen_does_not_make_it_the_network_before_it(
    tiny_store: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    """A name that the user gave may be any network's; only the loss knows whether it asks for a known one again."""
    for recipe, asked in (
        (small_recipe("hybrid-tiny", objective__relation_teacher="t", objective__feature_teacher="t-clip"), "t-clip"),
        (small_recipe(objective__teacher="t-2"), "t-2"),
    ):
        with pytest.raises(UsageError, match=rf"no teacher '{asked}'; .* --teacher {asked}=MODEL( |$)"):
            distill(recipe, out=tmp_path / "a", store=tiny_store, device="cpu")


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        (TinyMIM(), ["teacher"]),
        (TinyMIM(teacher="t"), ["teacher"]),
        (Hybrid(relation_teacher="t", feature_teacher="u"), ["relation_teacher"]),
        (Hybrid(relation_teacher="u", feature_teacher="t"), ["feature_teacher"]),
        (Hybrid(relation_teacher="t", feature_teacher="t"), ["relation_teacher", "feature_teacher"]),
        (Hybrid(use=("feature",), relation_teacher="t", feature_teacher="t"), ["feature_teacher"]),
        (Hybrid(use=("relation",)), ["relation_teacher"]),
    ],
)
def test_the_settings_that_name_a_teacher(objective: Objective, fields: list[str], tiny: str) -> None:
    card = named_teachers([f"t={tiny}"], CPU)["t"].card
    cards = {"t": card} | ({"u": card} if "u" in str(objective.model_dump().values()) else {})
    assert teacher_fields(objective, cards, "t") == tuple(f"objective.{field}" for field in fields)


def test_a_teacher_that_was_chosen_among_others_is_named_by_its_setting(tiny: str) -> None:
    """Null stands for the one teacher that fits."""
    card = named_teachers([f"t={tiny}"], CPU)["t"].card
    cards = {"t": card, "u": card.model_copy(update={"mask": MaskSpec(kind="random", ratio=0.5), "classes": 5})}
    masked = amd.AMD(teacher_mask_ratio=0.5, student_mask_ratio=0.75)
    classes = {"t": card, "u": card.model_copy(update={"classes": 5})}
    for objective, among in ((masked, cards), (Logits(), classes)):
        assert list(objective.wants(among)) == ["u"]
        assert teacher_fields(objective, among, "u") == ("objective.teacher",)


def test_both_settings_of_a_teacher_that_lacks_a_tap_work_as_they_are_printed(
    tiny_store: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    """One network for both halves: the command is run, the settings are set, and the student is trained."""
    store = shutil.copytree(tiny_store, tmp_path / "store")
    named = {"objective.relation_teacher": "t", "objective.feature_teacher": "t"}
    recipe = small_recipe("hybrid-tiny", **{field.replace(".", "__"): name for field, name in named.items()})
    changes = {"objective.relation_blocks": [1], "objective.student_blocks": [2], "epochs": 1, "warmup_epochs": 0}
    settings: dict[str, Any] = {"out": tmp_path / "a", "store": store, "device": "cpu"}
    with pytest.raises(
        InputNotFound, match=r"which cannot give block1\.qkv; set objective\.relation_teacher=t-2 and "
    ) as caught:
        distill(recipe, overrides=changes, **settings)
    advised, _, command = str(caught.value).partition(", and store it under that name too: hdcache ")
    assert CliRunner().invoke(cli, [*shlex.split(command), "--device", "cpu"]).exit_code == 0
    told = dict(word.split("=") for word in advised.rpartition("; set ")[2].split(" and "))
    assert told == dict.fromkeys(named, "t-2")
    assert list(distill(recipe, overrides=changes | told, **settings)["targets"]) == ["t-2"]


def test_a_first_view_alone_needs_no_option(tmp_path: Path, tiny: str, make_npz: Callable[..., str]) -> None:
    data = make_npz(tmp_path / "d.npz", 8)
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], taps=["final"], device="cpu", quiet=True)
    message = "add it: hdcache extract --store STORE --teacher u=MODEL --tap final"
    expected = message.replace("STORE", f"{tmp_path}/s")
    assert completed(Store.open(tmp_path / "s"), message) == expected


def test_without_a_store_no_message_speaks_of_one(
    tiny: str, tmp_path: Path, make_npz: Callable[..., str], small_recipe: Callable[..., Recipe]
) -> None:
    settings: dict[str, Any] = {"data": make_npz(tmp_path / "d.npz", 16), "online": True, "device": "cpu"}
    student = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    for recipe, more, message in (
        (small_recipe(student__arguments=student), {}, r"; set student\.arguments\.img_size=32$"),
        (small_recipe(), {"teacher_mask": "0.5"}, r"every token is compared; leave --teacher-mask out$"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            distill(recipe, out=tmp_path / "a", teachers=[f"t={tiny}"], **settings, **more)
        assert "STORE" not in str(caught.value)
    two = [f"t={tiny}&num_classes=5", f"u={tiny}&num_classes=5"]
    with pytest.raises(
        UsageError, match=r"needs exactly one teacher, but there are 2 \(t, u\); set objective.teacher=NAME$"
    ):
        distill(get_recipe("logits-tiny"), out=tmp_path / "a", teachers=two, **settings)


def test_a_teacher_that_the_store_lacks_is_named_with_the_command(
    tiny_store: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    recipe = small_recipe("hybrid-tiny", objective__relation_teacher="t", objective__keep_ratio=None)
    message = (
        r"^objective.feature_teacher: no teacher 'supervised'; choose from: t; or add it: hdcache extract --store \S+/store "
        r"--num-views 2 --teacher supervised=MODEL --tap final$"
    )
    with pytest.raises(UsageError, match=message):
        distill(recipe, out=tmp_path / "a", store=tiny_store, device="cpu")
    student = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    message = rf"set objective.teacher=t-2 and add it: hdcache extract --store {tiny_store} --num-views 2 --teacher 't-2=random:\S+' --img-size 64 "
    with pytest.raises(UsageError, match=message):
        distill(small_recipe(student__arguments=student), out=tmp_path / "a", store=tiny_store, device="cpu")
    assert not (tmp_path / "a").exists()


# Masked teachers in the loop


def test_a_mask_is_for_teachers_without_a_store(tiny: str) -> None:
    recipe = get_recipe("amd-image-tiny", AMD)
    cards, (wanted,), live = choose_teachers(
        [recipe], None, [f"a={tiny}"], CPU, online=True, mask="random:0.5", mask_seed=4
    )
    assert cards["a"].mask == live["a"].card.mask == MaskSpec(kind="random", ratio=0.5, seed=4)
    assert wanted == {"a": ("block3.out",)}


@pytest.mark.parametrize("where", [{"online": True}, {}])
def test_a_mask_beside_a_store_is_refused(
    where: dict[str, Any], tiny_store: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]
) -> None:
    message = (
        r"^--teacher-mask concerns teachers that run in the loop without a store .*; those of a store keep the masks"
    )
    for settings in ({"teacher_mask": "0.5"}, {"teacher_mask_seed": 2}):
        with pytest.raises(UsageError, match=message):
            distill(small_recipe(), out=tmp_path / "a", store=tiny_store, device="cpu", **where, **settings)
    assert not (tmp_path / "a").exists()


def test_training_with_a_masked_live_teacher(tmp_path: Path, tiny: str, make_npz: Callable[..., str]) -> None:
    """AMD without a store; a resumed run must have the same mask."""
    data = make_npz(tmp_path / "d.npz", 16)
    settings: dict[str, Any] = {"out": tmp_path / "a", "data": data, "online": True, "teachers": [f"t={tiny}"]}
    recipe = get_recipe("amd-image-tiny", AMD)
    result = distill(recipe, **settings, teacher_mask="random:0.5", device="cpu", threads=2)
    assert (result["steps"], result["targets"], result["store"]) == (2, {"t": ["block3.out"]}, None)
    assert result["loss"] > 0
    with pytest.raises(StoreMismatch, match=r"teachers\.t\.mask\.seed"):
        distill(recipe, **settings, teacher_mask="random:0.5", teacher_mask_seed=1, device="cpu", threads=2)
    with pytest.raises(UsageError, match=r"random masks \(t with no mask\); give --teacher-mask random:0\.5$"):
        distill(recipe, **settings | {"out": tmp_path / "b"}, device="cpu", threads=2)
    assert not (tmp_path / "b").exists()
