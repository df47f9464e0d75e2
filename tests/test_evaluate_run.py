"""k-NN evaluation from a model spec and two data sets to results.json and the printed table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdcache.backbones import load_backbone
from hdcache.errors import InputNotFound, UsageError
from hdcache.evaluate.run import format_table, knn_eval, write_json
from hdcache.student_files import save_student

OPTIONS = "img_size=16&patch_size=8&embed_dim=12&depth=2&num_heads=2"
TINY = f"random:vit_tiny_patch16_224?{OPTIONS}&seed=1"
COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


def paint(folder: Path, per_class: int, seed: int, colours: dict[str, tuple[int, int, int]] = COLOURS) -> str:
    """A folder of noisy one-coloured images: even an untrained network tells the classes apart."""
    draws = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            noisy = np.array(colour) + draws.integers(-15, 16, (20, 20, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def train(tmp_path: Path) -> str:
    return paint(tmp_path / "train", 8, seed=0)


@pytest.fixture
def queries(tmp_path: Path) -> str:
    return paint(tmp_path / "test", 3, seed=1)


def test_the_crop_is_a_setting(train: str) -> None:
    """Another crop gives another result record; a crop that cannot be meant is refused; paths may be Path objects."""
    assert knn_eval(TINY, train, ks=(1,), crop=1.0)["fraction"] == 1.0
    for crop in (0.0, 1.5):
        with pytest.raises(UsageError, match=f"crop {crop} must lie above 0 and be at most 1"):
            knn_eval(TINY, train, ks=(1,), crop=crop)
    with pytest.raises(InputNotFound, match="no/run"):
        knn_eval(Path("no/run"), train, ks=(1,))


def test_the_whole_story(train: str, queries: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    output = tmp_path / "deep" / "results.json"
    result = knn_eval(
        TINY, train, queries, ks=(1, 5, 100), output=output, progress=lambda *report: seen.append(report), batch_size=16
    )
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert [entry["k"] for entry in result["knn"]] == [1, 5, 24]
    assert all(entry["top1"] == 100.0 for entry in result["knn"])
    assert result["knn"][0]["top1_interval"] == pytest.approx((70.08, 100.0), abs=0.01)
    assert result["schema"] == 1
    assert result["model"]["layer"] == "final"
    assert result["model"]["layer_is_default"] is True
    assert result["model"]["pool"] == "cls"
    assert len(result["model"]["weights"]) == 64
    assert result["model"]["preprocessing"]["size"] == 16
    assert result["train"]["count"] == result["train"]["embedded"] == 24
    assert result["test"]["count"] == 9
    assert len(result["test"]["fingerprint"]) == 64
    assert result["chance"] == pytest.approx({"uniform": 100 / 3, "majority": 100 / 3})
    assert set(result["versions"]) == {"hdcache", "torch", "timm", "faiss"}
    assert any("lowered to 24" in note for note in result["notes"])
    assert seen == [("train", 0, 24), ("train", 16, 24), ("train", 24, 24), ("test", 0, 9), ("test", 9, 9)]


def test_without_test_every_image_is_left_out_once(train: str) -> None:
    result = knn_eval(TINY, train, ks=[1])
    assert result["leave_one_out"] is True
    assert result["test"] is None
    assert result["knn"][0]["top1"] == 100.0
    again = knn_eval(TINY, train, train, ks=[1], leave_one_out=True)
    assert again["knn"] == result["knn"]
    assert again["leave_one_out"] is True


def test_leave_one_out_is_by_id_although_all_images_are_equal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "same" / name).mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "same" / "a" / "0.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "same" / "b" / "0.png")
    # Finding oneself would be 100 %; each finds only the image of the other class.
    assert knn_eval(TINY, str(tmp_path / "same"), ks=[1])["knn"][0]["top1"] == 0.0


def test_testing_on_the_training_set_is_said(train: str) -> None:
    result = knn_eval(TINY, train, train, ks=[1])
    assert any("every image finds itself" in note for note in result["notes"])


def test_leave_one_out_against_another_set_is_refused(train: str, queries: str) -> None:
    with pytest.raises(UsageError, match=r"leave-one-out compares .* with itself"):
        knn_eval(TINY, train, queries, leave_one_out=True)


def test_classes_of_the_test_set_alone_count_as_wrong(train: str, tmp_path: Path) -> None:
    queries = paint(tmp_path / "more", 2, 3, {"red": COLOURS["red"], "black": (0, 0, 0)})
    result = knn_eval(TINY, train, queries, ks=[3])
    assert result["knn"][0]["top1"] == 50.0
    assert any("2 samples count as wrong" in note for note in result["notes"])


def test_failed_images_are_listed(train: str, queries: str) -> None:
    (Path(queries) / "red" / "1.png").write_bytes(b"broken")
    result = knn_eval(TINY, train, queries, ks=[3])
    assert result["test"]["embedded"] == 8
    (failed,) = result["test"]["failed"]
    assert failed.endswith("1.png")
    assert f"failed   1 sample of folder:{queries} unreadable, first red/1.png" in format_table(result)


def test_images_without_labels_are_refused_before_any_is_embedded(tmp_path: Path, queries: str) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (20, 20)).save(flat / "0.png")
    with pytest.raises(UsageError, match=r"flat: expected a label for every sample, found 1 of 1 without one"):
        knn_eval(TINY, str(flat), queries, progress=lambda *_: pytest.fail("embedded"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": [0]}, "k: expected one or more positive integers"),
        ({"temperature": 0}, "temperature: expected a positive number"),
        ({"pool": "max"}, "pool 'max'"),
        ({"layer": "block3.out"}, "block3"),
    ],
)
def test_bad_settings_are_refused_before_the_data_is_opened(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        knn_eval(TINY, "no/such/folder", **settings)


def test_missing_data_is_not_found() -> None:
    with pytest.raises(InputNotFound, match="no/such/folder"):
        knn_eval(TINY, "no/such/folder")


def test_a_student_is_evaluated_at_its_last_trained_layer(train: str, tmp_path: Path) -> None:
    backbone = load_backbone(TINY)
    folder = tmp_path / "run"
    save_student(
        folder, backbone.model, backbone.architecture, backbone.arguments, backbone.preprocessing, "block1.out", {}
    )
    result = knn_eval(str(folder), train, ks=[1])
    assert (result["model"]["layer"], result["model"]["layer_is_default"]) == ("block1.out", True)
    assert "block1.out (the last trained one)" in format_table(result)
    asked = knn_eval(str(folder), train, ks=[1], layer="final", pool="mean")
    assert (asked["model"]["layer"], asked["model"]["layer_is_default"]) == ("final", False)
    assert "final (as asked), pool mean" in format_table(asked)


def test_all_layers_are_scored_as_each_alone(train: str, queries: str) -> None:
    seen: list[tuple[str, int, int]] = []
    result = knn_eval(TINY, train, queries, layer="all", ks=(1, 3), progress=lambda *report: seen.append(report))
    assert [report for report in seen if report[1]] == [("train", 24, 24), ("test", 9, 9)], "one pass over the images"
    assert list(result["layers"]) == ["block1.out", "block2.out", "final"]
    for layer, found in result["layers"].items():
        alone = knn_eval(TINY, train, queries, layer=layer, ks=(1, 3))
        assert found == alone["knn"] == alone["layers"][layer]
        assert list(alone["layers"]) == [layer]
    assert (result["model"]["layer"], result["knn"]) == ("final", result["layers"]["final"])
    some = knn_eval(TINY, train, layer=["block2.out", "block1.out", "block2.out"], ks=[1])
    assert list(some["layers"]) == ["block2.out", "block1.out"]
    assert (some["model"]["layer"], some["leave_one_out"]) == ("block1.out", True)
    assert knn_eval(TINY, train, layer=["all", "final"], ks=[1])["layers"].keys() == result["layers"].keys()
    with pytest.raises(UsageError, match="block3"):
        knn_eval(TINY, train, layer=["final", "block3.out"])


def test_the_layer_that_was_trained_last_stands_for_all(train: str) -> None:
    backbone = dataclasses.replace(load_backbone(TINY), last_trained="block1.out")
    result = knn_eval(backbone, train, layer="all", ks=[1])
    assert (result["model"]["layer"], result["model"]["layer_is_default"]) == ("block1.out", False)
    assert result["knn"] == result["layers"]["block1.out"]


def test_the_averaged_student_is_a_model_of_its_own(train: str, tmp_path: Path) -> None:
    backbone = load_backbone(TINY)
    facts = (backbone.architecture, backbone.arguments, backbone.preprocessing, "block2.out", {"recipe": "r"})
    save_student(tmp_path / "run" / "ema", backbone.model, *facts)
    result = knn_eval(tmp_path / "run" / "ema", train, ks=[1])
    assert result["knn"] == knn_eval(TINY, train, layer="block2.out", ks=[1])["knn"]


def test_a_table_of_layers_has_a_line_for_each(train: str, queries: str) -> None:
    result = knn_eval(TINY, train, queries, layer="all", ks=(1, 3))
    result["layers"]["block2.out"][1]["top1"] = 61.234
    lines = format_table(result).splitlines()
    assert "feature  3 layers, pool cls" in lines
    start = next(number for number, line in enumerate(lines) if "top-1 % k=1" in line)
    assert lines[start].split("  ")[-1].strip() == "top-1 % k=3"
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["block1.out", "block2.out", "final"]
    assert lines[start + 2].split() == ["block2.out", "100.00", "61.23"]
    assert len({len(line) for line in lines[start : start + 4]}) == 1


def test_a_loaded_backbone_is_taken_as_it_is(train: str) -> None:
    backbone = load_backbone(TINY)
    assert knn_eval(backbone, train, ks=[1])["knn"] == knn_eval(TINY, train, ks=[1])["knn"]
    with pytest.raises(UsageError, match=r"img_size 32: the loaded backbone takes 16 pixels; load it with"):
        knn_eval(backbone, train, img_size=32)
    assert knn_eval(TINY, train, ks=[1], img_size=32)["model"]["preprocessing"]["size"] == 32


def test_table_is_aligned_and_complete(train: str, queries: str) -> None:
    text = format_table(knn_eval(TINY, train, queries, ks=(1, 24), compat_dino=True))
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "top-1 %" in line)
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["1", "24"]
    assert len({len(line) for line in lines[start : start + 3]}) == 1
    assert "100.00" in lines[start + 1]
    assert "70.09 - 100.00" in lines[start + 1]
    assert "top-5 as in DINO" in text
    assert "33.33 % by guessing" in text


def test_results_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
