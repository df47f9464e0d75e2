"""The answers that the papers' published code gives for the inputs in tests/data/golden (or ``$HDCACHE_GOLDEN``).

Every setting is read from the files' metadata and tensor shapes, so files with other shapes can be put beside them.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hdcache.backbones import create_vit
from hdcache.checkpoints import load_strictly, whole_qkv_bias
from hdcache.distill.amd import AMD, at
from hdcache.distill.amd_heads import AMDHeads, Split
from hdcache.distill.contrast import contrasted_parts, cosine_distance, predicted_parts, scaled_info_nce
from hdcache.distill.redundancy import lowest, lowest_ascending, redundancy
from hdcache.distill.tinymim import TinyMIM
from hdcache.evaluate.attention import attention_distance, attention_nmi
from hdcache.evaluate.knn import knn_classify
from hdcache.relations import KINDS, relation, split_heads
from hdcache.schema import MaskSpec, Preprocessing, TeacherCard
from hdcache.taps import Tokens, forward_taps, parse_tap

GOLDEN = Path(os.environ.get("HDCACHE_GOLDEN") or Path(__file__).parent / "data" / "golden")
TINYMIM = sorted(GOLDEN.glob("tinymim*.safetensors"))
REDUNDANCY = sorted(GOLDEN.glob("redundancy*.safetensors"))
TOLERANCE = 1e-5


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def build(tensors: dict[str, Tensor], whose: str, facts: dict[str, Any], metadata: dict[str, str]) -> nn.Module:
    """The ViT whose weights are stored under ``whose``, loaded strictly."""
    state = {name.removeprefix(f"{whose}."): t for name, t in tensors.items() if name.startswith(f"{whose}.")}
    arguments = {
        "img_size": int(metadata["img_size"]),
        "patch_size": int(metadata["patch"]),
        "embed_dim": facts["width"],
        "depth": facts["depth"],
        "num_heads": facts["heads"],
        "num_classes": 0,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / facts["width"],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "norm_layer": partial(nn.LayerNorm, eps=float(metadata["layer_norm_eps"])),
    }
    model = create_vit("vit_tiny_patch16_224", arguments)
    model.load_state_dict(state, strict=True)
    return model.eval()


def card_of(model: Any, facts: dict[str, Any], metadata: dict[str, str]) -> TeacherCard:
    return TeacherCard(
        architecture="vit_tiny_patch16_224",
        weights="golden",
        preprocessing=Preprocessing(size=int(metadata["img_size"])),
        patch_size=int(metadata["patch"]),
        grid=model.patch_embed.grid_size,
        prefix_tokens=model.num_prefix_tokens,
        class_token=model.has_class_token,
        width=facts["width"],
        depth=facts["depth"],
        heads=facts["heads"],
        precision="fp32",
    )


class Golden:
    """One file with its two networks, the objective that its settings describe, and one step of it."""

    def __init__(self, path: Path) -> None:
        metadata, self.tensors = read(path)
        teacher_facts, self.student_facts = json.loads(metadata["teacher"]), json.loads(metadata["student"])
        teacher = build(self.tensors, "teacher", teacher_facts, metadata)
        self.student = build(self.tensors, "student", self.student_facts, metadata)
        cards = {"teacher": card_of(teacher, teacher_facts, metadata)}
        heads = self.student_facts["last_block_heads"]
        objective = TinyMIM(
            teacher_block=teacher_facts["target_block_1based"], heads=None if heads == teacher_facts["heads"] else heads
        )
        modules = objective.build(self.student, cards, 0, torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.targets = forward_taps(teacher, self.tensors["image.teacher"], objective.wants(cards)["teacher"])
        batch: Any = SimpleNamespace(images=self.tensors["image.student"], targets={"teacher": self.targets})
        self.taps = objective.forward(self.student, batch, modules, seed=0)
        self.losses = objective.loss(batch, self.taps, modules)

    def target(self, kind: str) -> Any:
        return next(value for name, value in self.targets.items() if f".rel.{kind}" in name)


@pytest.fixture(scope="module", params=TINYMIM, ids=[path.stem for path in TINYMIM])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_tinymim_file_is_there() -> None:
    assert TINYMIM, f"no tinymim*.safetensors in {GOLDEN}"


@pytest.mark.parametrize("kind", ["qk", "vv"])
def test_tinymim_teacher_relations(golden: Golden, kind: str) -> None:
    expected = golden.tensors[f"expected.teacher_{kind}"]
    torch.testing.assert_close(golden.target(kind), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["qk", "vv"])
def test_tinymim_student_relations(golden: Golden, kind: str) -> None:
    (tap,) = golden.taps.values()
    assert isinstance(tap, Tokens)
    qkv = split_heads(tap.sequence(), golden.student_facts["last_block_heads"])
    rows, columns = KINDS[kind]
    expected = golden.tensors[f"expected.student_{kind}"]
    torch.testing.assert_close(relation(qkv[rows], qkv[columns]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["qk", "vv"])
def test_tinymim_loss(golden: Golden, kind: str) -> None:
    expected = golden.tensors[f"expected.loss_{kind}"]
    # A divergence is a small difference of float32 numbers of order 1; below 1e-4 both sides are rounding noise.
    torch.testing.assert_close(golden.losses[kind], expected, rtol=TOLERANCE, atol=1e-8)


def test_tinymim_gradient(golden: Golden) -> None:
    weight = golden.student.get_parameter("blocks.0.attn.qkv.weight")
    (gradient,) = torch.autograd.grad(golden.losses["qk"] + golden.losses["vv"], weight, retain_graph=True)
    expected = golden.tensors["expected.grad_student_blocks0_qkv_weight"]
    # The gradient is of the order of its largest entry, not of 1.
    torch.testing.assert_close(gradient, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_redundancy_file_is_there() -> None:
    assert REDUNDANCY, f"no redundancy*.safetensors in {GOLDEN}"


@pytest.mark.parametrize("path", REDUNDANCY, ids=lambda path: path.stem)
def test_redundancy_golden(path: Path) -> None:
    metadata, tensors = read(path)
    scores, ratio = redundancy(tensors["tokens"]), float(metadata["keep_ratio"])
    torch.testing.assert_close(scores, tensors["expected.score"], rtol=0, atol=TOLERANCE)
    assert torch.equal(lowest(scores, ratio), tensors["expected.keep"])
    assert torch.equal(lowest_ascending(scores, ratio), tensors["expected.keep"].sort(dim=1).values)


def test_sdssl_file_is_there() -> None:
    assert list(GOLDEN.glob("sdssl*.safetensors")), f"no sdssl*.safetensors in {GOLDEN}"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("sdssl*.safetensors")), ids=lambda path: path.stem)
def test_sdssl_losses(path: Path) -> None:
    metadata, tensors = read(path)
    tau, alpha, layers = float(metadata["tau"]), float(metadata["alpha"]), int(metadata["layers"])
    projections = torch.chunk(tensors["simclr_proj"], 2, dim=1)
    pairs = [(tensors[f"{kind}_1"], tensors[f"{kind}_2"]) for kind in ("pred", "pred_detached", "target")]
    assert {len(view) for view in (*projections, *pairs[0], *pairs[1])} == {layers}
    losses = {
        "moco": predicted_parts(partial(scaled_info_nce, tau=tau), *pairs),
        "byol": predicted_parts(cosine_distance, *pairs),
        "simclr": contrasted_parts((projections[0], projections[1]), tau),
    }
    found = {}
    for framework, parts in losses.items():
        parts[f"det_times_{layers}"] = layers * parts.get("det", torch.zeros(()))
        parts["total"] = parts["out"] + alpha * parts["mid"] + parts[f"det_times_{layers}"]
        found |= {f"expected.{framework}.{part}": value for part, value in parts.items()}
    expected = {name: value for name, value in tensors.items() if name.startswith("expected.")}
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=TOLERANCE, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


KNN = sorted(GOLDEN.glob("knn*.safetensors"))


def test_knn_file_is_there() -> None:
    assert KNN, f"no knn*.safetensors in {GOLDEN}"


@pytest.mark.parametrize("path", KNN, ids=lambda path: path.stem)
def test_knn_golden(path: Path) -> None:
    with safe_open(path, "np") as file:
        settings = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    expected = {name: float(value) for name, value in arrays.items() if name.startswith("expected.")}
    ks = sorted({int(match[1]) for name in expected if (match := re.search(r"\.k(\d+)$", name))})
    assert ks
    result = knn_classify(
        arrays["train_features"],
        arrays["train_labels"],
        arrays["test_features"],
        arrays["test_labels"],
        ks,
        float(settings["T"]),
        classes=range(int(settings["num_classes"])),
        compat_dino=True,
    )
    for k, accuracy in result.per_k.items():
        assert accuracy.top1 == pytest.approx(expected.pop(f"expected.top1.k{k}"), abs=1e-4)
        assert accuracy.top5 == pytest.approx(expected.pop(f"expected.top5_dino.k{k}"), abs=1e-4)
    assert not expected


ATTENTION = sorted(GOLDEN.glob("attention_metrics*.safetensors"))


def test_attention_metrics_file_is_there() -> None:
    assert ATTENTION, f"no attention_metrics*.safetensors in {GOLDEN}"


@pytest.mark.parametrize("path", ATTENTION, ids=lambda path: path.stem)
def test_attention_metrics(path: Path) -> None:
    metadata, tensors = read(path)
    rows, columns = (int(side) for side in metadata["grid"].split("x"))
    prefix, attention = int(metadata["prefix_tokens"]), tensors["attention"]
    distance = attention_distance(attention, (rows, columns), int(metadata["patch"]), prefix)
    # The expected values are float32 means of pixels.
    torch.testing.assert_close(distance.float(), tensors["expected.attention_distance"], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(
        attention_nmi(attention, prefix).float(), tensors["expected.nmi"], rtol=0, atol=TOLERANCE
    )


# AMD


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def indices(chosen: Tensor) -> Tensor:
    """Ascending indices int64 [B, M] of the True entries of bool [B, N], as many in every row."""
    return chosen.nonzero()[:, 1].reshape(len(chosen), -1)


class GoldenAMD:
    """The file's tensors, and what our code makes of them."""

    def __init__(self, path: Path) -> None:
        metadata, self.tensors = read(path)
        tubelet, patch, across = (int(part) for part in metadata["tubelet"].split("x"))
        assert patch == across
        self.clip = self.tensors["clip"].float()
        common = {
            "img_size": int(metadata["img_size"]),
            "patch_size": patch,
            "frames": int(metadata["frames"]),
            "tubelet": tubelet,
            "num_classes": 0,
            "norm_layer": partial(nn.LayerNorm, eps=float(metadata["layer_norm_eps"])),
        }
        teacher_facts, student_facts, decoder = (json.loads(metadata[key]) for key in ("teacher", "student", "decoder"))
        teacher = self._network(common, teacher_facts, under(self.tensors, "teacher."))
        # The released student's own keys, with its projections beside its blocks.
        student = under(self.tensors, "student.")
        own = {name: value for name, value in student.items() if not name.startswith("generator_mask_tokens.")}
        self.student = self._network(common, student_facts, own)
        ratios = {whose: float(metadata[f"mask_ratio_{whose}"]) for whose in ("teacher", "student")}
        embed: Any = teacher.patch_embed
        card = TeacherCard(
            architecture="vit_tiny_patch16_224",
            weights="golden",
            preprocessing=Preprocessing(size=common["img_size"], frames=common["frames"]),
            patch_size=patch,
            grid=embed.grid_size,
            slots=embed.slots,
            prefix_tokens=0,
            class_token=False,
            width=teacher_facts["width"],
            depth=teacher_facts["depth"],
            heads=teacher_facts["heads"],
            mask=MaskSpec(kind="tube", ratio=ratios["teacher"]),
            precision="fp32",
        )
        self.objective = AMD(
            teacher_mask_ratio=ratios["teacher"],
            student_mask_ratio=ratios["student"],
            mask="tube",
            teacher_blocks=tuple(teacher_facts["layers_1based"]),
            student_blocks=tuple(student_facts["layers_1based"]),
            generator_depth=int(metadata["generator_depth"]),
            decoder_width=decoder["width"],
            decoder_depth=decoder["depth"],
            decoder_heads=decoder["heads"],
        )
        self.heads = self.objective.build(self.student, {"teacher": card}, 0, torch.Generator().manual_seed(0))
        self._load_heads(self.heads, student)
        self.visible = indices(~self.tensors["mask.teacher"])
        seen, unseen = indices(~self.tensors["mask.student"]), indices(self.tensors["mask.teacher_only"])
        self.split = Split(torch.searchsorted(self.visible, seen), torch.searchsorted(self.visible, unseen))
        with torch.no_grad():
            self.targets = forward_taps(teacher, self.clip, self.heads.targets, keep=self.visible)
        batch: Any = SimpleNamespace(images=self.clip, targets={"teacher": self.targets})
        self.taps = self.objective.run(self.student, self.clip, self.visible, self.split, self.heads)
        self.losses = self.objective.loss(batch, self.taps, self.heads)

    def _network(self, common: dict[str, Any], facts: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
        """A network of clips with released weights; the golden teacher has no last norm, its class never calls one."""
        mlp = state.get("encoder.blocks.0.mlp.fc1.weight", state.get("blocks.0.mlp.fc1.weight"))
        assert mlp is not None
        own = {"embed_dim": facts["width"], "depth": facts["depth"], "num_heads": facts["heads"]}
        own |= {"mlp_ratio": mlp.shape[0] / facts["width"]}
        own |= {"final_norm": any(name.removeprefix("encoder.") == "norm.weight" for name in state)}
        model = create_vit("vit_tiny_patch16_224", common | own)
        load_strictly(model, state, "golden")
        return model.eval()

    def _load_heads(self, heads: AMDHeads, state: dict[str, Tensor]) -> None:
        """The released names of projections, generators and decoder as ours; nothing may be missing or left over."""
        found: dict[str, Tensor] = {}
        for index in range(len(heads.targets)):
            found[f"project.{index}.weight"] = state.pop(f"encoder.projection_heads.{index}.weight")
            found[f"generators.{index}.mask_token"] = state.pop(f"generator_mask_tokens.{index}")
            # The released generators own a norm that they never call.
            blocks = whole_qkv_bias(under(state, f"generators.{index}.blocks."))
            found |= {f"generators.{index}.blocks.{name}": value for name, value in blocks.items()}
        found["decoder.embed.weight"] = state.pop("encoder_to_decoder.weight")
        found["decoder.mask_token"] = state.pop("mask_token")
        for name, value in whole_qkv_bias(under(state, "decoder.")).items():
            found[f"decoder.{name.replace('head.', 'predict.')}"] = value
        heads.load_state_dict(found, strict=True)


AMD_VIDEO = sorted(GOLDEN.glob("amd_video*.safetensors"))


@pytest.fixture(scope="module", params=AMD_VIDEO, ids=[path.stem for path in AMD_VIDEO])
def golden_amd(request: pytest.FixtureRequest) -> GoldenAMD:
    return GoldenAMD(request.param)


def test_amd_file_is_there() -> None:
    assert AMD_VIDEO, f"no amd_video*.safetensors in {GOLDEN}"


def test_amd_teacher_tokens(golden_amd: GoldenAMD) -> None:
    found = golden_amd
    for part, positions in (("visible", found.split.seen), ("only", found.split.unseen)):
        for name, tokens in found.targets.items():
            assert isinstance(tokens, Tokens)
            block = parse_tap(name).block
            expected = found.tensors[f"expected.teacher_{part}.{block}"]
            torch.testing.assert_close(at(tokens.patches, positions), expected, rtol=0, atol=TOLERANCE)


def test_amd_projected_student_tokens(golden_amd: GoldenAMD) -> None:
    for index, name in enumerate(golden_amd.heads.taps):
        expected = golden_amd.tensors[f"expected.student_direct.{parse_tap(name).block}"]
        torch.testing.assert_close(golden_amd.taps[f"direct.{index}"], expected, rtol=0, atol=TOLERANCE)


def test_amd_pixel_targets(golden_amd: GoldenAMD) -> None:
    decoder, expected = golden_amd.heads.decoder, golden_amd.tensors["expected.pixel_target_masked"]
    assert decoder is not None
    masked = indices(golden_amd.tensors["mask.student"])[:, : expected.shape[1]]
    found = at(decoder.targets(golden_amd.clip), masked)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("part", "name"), [("pixels", "rec"), ("direct", "dir"), ("generation", "gen")])
def test_amd_losses(golden_amd: GoldenAMD, part: str, name: str) -> None:
    expected = golden_amd.tensors[f"expected.loss_{name}"]
    torch.testing.assert_close(golden_amd.losses[part], expected, rtol=TOLERANCE, atol=0)


def test_amd_gradient(golden_amd: GoldenAMD) -> None:
    weight = golden_amd.student.get_parameter("blocks.0.attn.qkv.weight")
    total = torch.stack(list(golden_amd.losses.values())).sum()
    (gradient,) = torch.autograd.grad(total, weight, retain_graph=True)
    expected = golden_amd.tensors["expected.grad_encoder_block0_qkv"]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_amd_answers_are_all_checked(golden_amd: GoldenAMD) -> None:
    """A file with an answer that no test here knows would look green without it."""
    known = r"expected\.(loss_(rec|dir|gen)|teacher_(visible|only)\.\d+|student_direct\.\d+|pixel_target_masked|grad_encoder_block0_qkv)"
    answers = [name for name in golden_amd.tensors if name.startswith("expected.")]
    assert answers
    assert not [name for name in answers if not re.fullmatch(known, name)]
    blocks = {parse_tap(name).block for name in golden_amd.targets}
    assert {int(name.rsplit(".", 1)[1]) for name in answers if ".teacher_" in name} == blocks
