"""The folder of a finished run: what hdcache and timm make of it, with a classifier and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hdcache.backbones import create_vit, load_backbone, weights_digest
from hdcache.errors import InputNotFound, UsageError
from hdcache.schema import Preprocessing
from hdcache.student_files import save_student
from hdcache.taps import Tokens, forward_taps

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vit(seed: int = 0, **arguments: Any) -> Any:
    return create_vit(ARCHITECTURE, SMALL | {"num_classes": 0} | arguments, seed=seed).eval()


def pictures(side: int = 16) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def features(model: Any, side: int = 16) -> Tensor:
    with torch.no_grad():
        return model.forward_features(pictures(side))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "arguments", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2, "qk_norm": True}]
)
def test_a_student_comes_back_through_us_and_through_timm(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The file holds exactly timm's keys; both ways of loading give the same features."""
    model = create_vit(ARCHITECTURE, SMALL | {"num_classes": 5} | arguments, seed=4).eval()
    shown = Preprocessing(size=16, mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    made = SMALL | {"num_classes": 5} | arguments
    save_student(tmp_path / "run", model, ARCHITECTURE, made, shown, "block1.out", {"recipe": "r"})
    found = load_backbone(str(tmp_path / "run"))
    assert (found.preprocessing, found.last_trained, found.architecture) == (shown, "block1.out", ARCHITECTURE)
    assert found.pool_trained == "cls", "of a folder that does not say"
    torch.testing.assert_close(features(found.model), features(model), rtol=1e-6, atol=1e-6)
    twin = timm.create_model(
        ARCHITECTURE, num_classes=0, checkpoint_path=str(tmp_path / "run/student.safetensors"), **(SMALL | arguments)
    )
    torch.testing.assert_close(features(twin.eval()), features(model), rtol=1e-6, atol=1e-6)
    assert load_file(tmp_path / "run/student.safetensors").keys() == twin.state_dict().keys()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "student.safetensors"]


def test_a_student_can_be_read_at_another_size(tmp_path: Path) -> None:
    save_student(tmp_path / "run", vit(4), ARCHITECTURE, SMALL, Preprocessing(size=16), "final", {})
    found = load_backbone(str(tmp_path / "run"), img_size=24)
    twin = vit(4)
    twin.set_input_size(img_size=(24, 24))
    assert (found.preprocessing.size, found.arguments["img_size"]) == (24, 24)
    torch.testing.assert_close(features(found.model, 24), features(twin, 24))


@pytest.mark.parametrize("config", ["{}", "[]", "nonsense", '{"architecture": "x", "model_args": {}, "hdcache": {}}'])
def test_a_folder_with_another_config_is_no_student(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputNotFound, match=r"config.json: not a student that hdcache wrote"):
        load_backbone(str(tmp_path))


def test_a_student_without_its_weights_is_not_found(tmp_path: Path) -> None:
    save_student(tmp_path, vit(), ARCHITECTURE, SMALL, Preprocessing(size=16), "final", {})
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(InputNotFound, match=r"student\.safetensors: no such checkpoint"):
        load_backbone(str(tmp_path))


def test_a_student_of_clips_comes_back_through_us(tmp_path: Path) -> None:
    """config.json names frames and tubelet, also where the default was meant; timm alone refuses both."""
    made = SMALL | {"frames": 4}
    model = vit(4, frames=4)
    shown = Preprocessing(size=16, frames=4, interpolation="bilinear")
    save_student(tmp_path / "run", model, ARCHITECTURE, made, shown, "final", {})
    found = load_backbone(str(tmp_path / "run"))
    clip = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.model(clip), model(clip))
    assert (found.preprocessing, found.weights) == (shown, weights_digest(model))
    arguments = json.loads((tmp_path / "run/config.json").read_text())["model_args"]
    assert arguments == made | {"tubelet": 2}
    with pytest.raises(TypeError, match="frames"):
        timm.create_model(ARCHITECTURE, num_classes=0, **arguments)


def test_a_student_of_clips_keeps_its_size(tmp_path: Path) -> None:
    """Its positions count tokens: on another grid the same number would be another place."""
    save_student(
        tmp_path / "run", vit(4, frames=4), ARCHITECTURE, SMALL | {"frames": 4}, Preprocessing(size=16), "final", {}
    )
    with pytest.raises(UsageError, match=r"wrong shape: pos_embed \(1, 32, 24\) for \(1, 72, 24\)"):
        load_backbone(str(tmp_path / "run"), img_size=24)


def test_a_student_says_how_it_is_pooled(tmp_path: Path) -> None:
    model = create_vit(ARCHITECTURE, SMALL)
    save_student(tmp_path, model, ARCHITECTURE, SMALL, Preprocessing(size=16), "final", {"pool_trained": "mean"})
    assert load_backbone(str(tmp_path)).pool_trained == "mean"


def test_frames_and_tubelet_that_are_null_make_a_network_of_still_images(tmp_path: Path) -> None:
    """As --set student.arguments.frames=null student.arguments.tubelet=null leaves them in a recipe."""
    unset = SMALL | {"frames": None, "tubelet": None}
    model = create_vit(ARCHITECTURE, unset)
    assert not hasattr(model.patch_embed, "frames")
    save_student(tmp_path, model, ARCHITECTURE, unset, Preprocessing(size=16), "final", {})
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert {"frames", "tubelet"}.isdisjoint(arguments), "timm would not know them"
    assert load_backbone(str(tmp_path)).preprocessing.frames is None


# Classifiers


def classifier(classes: int = 5) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Linear(24, classes)


def pooled(model: nn.Module, pool: str, images: Tensor) -> Tensor:
    """What training read."""
    with torch.no_grad():
        tokens = forward_taps(model, images, ["final"])["final"]
    assert isinstance(tokens, Tokens)
    return tokens.prefix[:, 0] if pool == "cls" else tokens.patches.mean(1)


@pytest.mark.parametrize(
    ("arguments", "pool", "pooling"),
    [
        ({}, "cls", {}),
        ({"reg_tokens": 2}, "cls", {}),
        ({}, "mean", {"global_pool": "avg", "fc_norm": False}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "mean", {}),
        ({"class_token": False, "global_pool": "avg"}, "mean", {"fc_norm": False, "final_norm": False}),
        ({"global_pool": "avg", "fc_norm": False}, "cls", {"global_pool": "token"}),
        ({"global_pool": "avg"}, "cls", {"global_pool": "token", "fc_norm": False, "final_norm": False}),
        ({"global_pool": "map"}, "cls", {"global_pool": "token", "fc_norm": False}),
        ({"pool_include_prefix": True}, "mean", {"global_pool": "avg", "pool_include_prefix": False}),
    ],
)
def test_a_classifier_reads_what_it_was_trained_on(
    tmp_path: Path, arguments: dict[str, Any], pool: str, pooling: dict[str, Any]
) -> None:
    """Through us and through timm, also where timm's own head would pool or norm otherwise."""
    model, head = vit(4, **arguments), classifier()
    for norm in (model.norm, model.fc_norm):
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(8))
    facts = {"pool_trained": pool}
    save_student(
        tmp_path, model, ARCHITECTURE, SMALL | arguments, Preprocessing(size=16), "final", facts, classifier=head
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"] == SMALL | arguments | ({"fc_norm": False} if pooling else {}) | pooling
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 5
    expected = head(pooled(model, pool, pictures())).detach()
    checkpoint = str(tmp_path / "student.safetensors")
    twin = timm.create_model(ARCHITECTURE, num_classes=5, checkpoint_path=checkpoint, **config["model_args"]).eval()
    assert load_file(checkpoint).keys() == twin.state_dict().keys()
    own = load_backbone(str(tmp_path), classifier=True)
    with torch.no_grad():
        torch.testing.assert_close(twin(pictures()), expected, rtol=1e-5, atol=1e-5)
        logits = forward_taps(own.model, pictures(), ["logits"])["logits"]
    assert isinstance(logits, Tensor)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert own.arguments["num_classes"] == 5


def test_a_classifier_changes_nothing_for_whoever_does_not_ask_for_it(tmp_path: Path) -> None:
    """The same network, digest and features; only the files differ."""
    model = vit(4)
    for name, head in (("with", classifier()), ("without", None)):
        save_student(tmp_path / name, model, ARCHITECTURE, SMALL, Preprocessing(size=16), "final", {}, classifier=head)
    found, other = (load_backbone(str(tmp_path / name)) for name in ("with", "without"))
    assert found.weights == other.weights == weights_digest(model)
    assert found.arguments == other.arguments
    assert found.model.num_classes == 0
    assert load_backbone(str(tmp_path / "without"), classifier=True).model.num_classes == 0
    whole, plain = (load_file(tmp_path / name / "student.safetensors") for name in ("with", "without"))
    assert whole.keys() - plain.keys() == {"head.weight", "head.bias"}


def test_a_folder_of_before_there_were_classifiers_is_read(tmp_path: Path) -> None:
    """It says that it has no classes, or nothing of them."""
    save_student(tmp_path, vit(4), ARCHITECTURE, SMALL, Preprocessing(size=16), "final", {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 0
    (tmp_path / "config.json").write_text(json.dumps({key: v for key, v in config.items() if key != "num_classes"}))
    for asked in (False, True):
        assert load_backbone(str(tmp_path), classifier=asked).weights == weights_digest(vit(4))


def test_clips_are_classified(tmp_path: Path) -> None:
    model, head = vit(4, frames=4), classifier()
    shown = Preprocessing(size=16, frames=4, interpolation="bilinear")
    facts = {"pool_trained": "mean"}
    save_student(tmp_path, model, ARCHITECTURE, SMALL | {"frames": 4}, shown, "final", facts, classifier=head)
    clips = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = load_backbone(str(tmp_path), classifier=True)
    with torch.no_grad():
        torch.testing.assert_close(found.model(clips), head(pooled(model, "mean", clips)))
