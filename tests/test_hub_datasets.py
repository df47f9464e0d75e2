"""Hugging Face and torchvision data sets: ids, labels, sources, and each way a spec or its data can be wrong."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdcache.datasets import open_dataset
from hdcache.errors import InputNotFound, UnreadableImage, UsageError


def png(value: int = 0, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def library(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    module.disable_progress_bars()
    return module


def hugging(library: Any, **extra: list[Any]) -> Any:
    features = library.Features(
        {"pic": library.Image(), "label": library.ClassLabel(names=["z", "a", "m"]), "key": library.Value("string")}
    )
    rows = {"pic": [{"bytes": png(i, 4 + i), "path": None} for i in range(3)], "label": [2, -1, 0], "key": [*"cab"]}
    return library.Dataset.from_dict({**rows, **extra}, features=features)


def test_hf_saved_dataset(library: Any, tmp_path: Path) -> None:
    library.DatasetDict({"train": hugging(library)}).save_to_disk(str(tmp_path / "d"))
    data = open_dataset(f"hf:{tmp_path}/d?split=train")
    assert data.ids == tuple(f"train/{row:09d}" for row in range(3))
    assert data.card.classes == ("z", "a", "m")
    assert data.labels.tolist() == [2, -1, 0]
    assert [data.read(name) for name in data.ids] == [png(i, 4 + i) for i in range(3)]
    keyed = open_dataset(f"hf:{tmp_path}/d?id=key&image=pic&label=")
    assert keyed.ids == ("a", "b", "c")
    assert keyed.labels.tolist() == [-1] * 3
    assert keyed.read("c") == png(0, 4)
    for options, message in (
        ("split=test", "no split 'test'; choose from: train"),
        ("image=pik", "no column 'pik'; did you mean 'pic'"),
        ("label=foo", "no column 'foo'"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset(f"hf:{tmp_path}/d?{options}")
    with pytest.raises(InputNotFound, match="datasets cannot load"):
        open_dataset(f"hf:{tmp_path}/nothing")


def test_hf_parquet_agrees_with_the_saved_dataset(library: Any, tmp_path: Path) -> None:
    hugging(library).to_parquet(str(tmp_path / "p" / "train.parquet"))
    hugging(library).save_to_disk(str(tmp_path / "d"))
    parquet = open_dataset(f"hf:{tmp_path}/p?split=train")
    assert parquet.read("train/000000001") == png(1, 5)
    assert parquet.card.fingerprint == open_dataset(f"hf:{tmp_path}/d?split=train").card.fingerprint
    assert parquet.card.fingerprint == open_dataset(f"hf:{tmp_path}/p/train.parquet").card.fingerprint


def test_hf_faults(library: Any, tmp_path: Path) -> None:
    missing = [{"bytes": png(), "path": None}, None, None]
    hugging(library, pic=missing, key=["a", None, "b"]).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UsageError, match="row 1 has no value in the id column 'key'"):
        open_dataset(f"hf:{tmp_path}/d?id=key")
    data = open_dataset(f"hf:{tmp_path}/d")
    with pytest.raises(UnreadableImage, match="row 1 holds no image"):
        data.read(data.ids[1])


def test_hf_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'hdcache\[hf\]'"):
        open_dataset("hf:owner/name")


def test_torchvision_fake_data() -> None:
    pytest.importorskip("torchvision")
    spec = "torchvision:FakeData?size=5&image_size=3,6,8&num_classes=3"
    data = open_dataset(spec)
    assert data.ids == tuple(f"FakeData/all/{row:07d}" for row in range(5))
    assert data.labels.max() < 3
    assert set(data.card.classes) <= {"0", "1", "2"}
    with ThreadPoolExecutor(4) as pool:
        first, second = (list(pool.map(data.read, data.ids)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, np.ndarray)
        assert one.shape == (6, 8, 3)
        np.testing.assert_array_equal(one, other)
    assert open_dataset(data.card.spec).card == data.card
    assert open_dataset(spec.replace("size=5", "size=4")).card.fingerprint != data.card.fingerprint


def test_torchvision_class_folder_and_faults(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    for number, name in enumerate(("cat/1.png", "ant/2.png")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png(number))
    data = open_dataset(f"torchvision:ImageFolder?root={tmp_path}")
    assert data.card.classes == ("ant", "cat")
    assert data.labels.tolist() == [0, 1]
    for spec, message in (
        ("CIFAR11", "no data set 'CIFAR11'; did you mean 'CIFAR10"),
        ("CIFAR10?rot=/x", "unknown option 'rot' for CIFAR10; did you mean 'root'"),
        ("CIFAR10", "CIFAR10 needs the option root"),
        ("CIFAR10?root=/x&train=maybe", "train=maybe is not a boolean"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset(f"torchvision:{spec}")
    with pytest.raises(InputNotFound, match=r"not found or corrupted.*download=true"):
        open_dataset(f"torchvision:CIFAR10?root={tmp_path}&train=1")
