"""Recipes of SDSSL (Jang et al., arXiv 2111.12958), each value with its source.

"Released code" is github.com/hagiss/SDSSL, branch master at bbd34fa; of the paper only the abstract could be read.
"""

from __future__ import annotations

from typing import Any

from hdcache.distill.entry import RUN, SCALED_LR, TINY, TINY_RUN, TINY_STUDENT, Entry, derive
from hdcache.distill.sdssl import SDSSL
from hdcache.distill.settings import Recipe, StudentSpec
from hdcache.photometric import Photometric

CONFIGS = "released code, SD_*.json"
NOT_CACHED = "null: online, no teacher"
_SOURCES = {
    **RUN,
    **SCALED_LR,
    "objective.kind": "paper, abstract",
    "objective.framework": "paper, abstract: SimCLR, BYOL and MoCo v3",
    "objective.formulation": "released code, pl_train_*.py: the target is the network itself or its momentum copy",
    "objective.intermediate": "released code, pl_train_*.py: layers 1 to 11 learn too",
    "objective.tau": "released code, pl_train_moco.py and pl_train_simclr.py: 0.2",
    "objective.alpha": f"null: 1.0 for mocov3, 0.8 for byol and simclr ({CONFIGS})",
    "objective.momentum": f"{CONFIGS}: 0.996",
    "objective.momentum_end": "released code, utils.py: 1, by half a cosine",
    "objective.projection_dim": f"{CONFIGS}: 256",
    "objective.hidden": "released code, byol_pytorch.py: 4096",
    "objective.hidden_intermediate": "released code, byol_pytorch.py: 2048",
    "objective.hidden_predictor": "released code, byol_pytorch.py: 4096",
    "objective.teacher": NOT_CACHED,
    "objective.target": "not used online",
    "weights": "released code, pl_train_*.py: out 1, mid alpha(t), det the sum over layers",
    "student.architecture": f"{CONFIGS}: ViT-B/16",
    "student.arguments": "released code, vision_transformer.py",
    "student.drop_path": "released code, vision_transformer.py: none in pre-training",
    "student.drop_path_schedule": "no effect without drop path",
    "student.drop_path_last_block": "no effect without drop path",
    "student.init": "ours: Xavier-uniform as MAE; the released vision_transformer.py takes Q, K and V apart for it, as MoCo v3",
    "student.sincos_positions": "released code, vision_transformer.py: fixed",
    "student.freeze_patch_embed": "released code, vision_transformer.py: random and frozen, as MoCo v3",
    "jitter": "released code, utils.py: view 1: ColorJitter(0.4, 0.4, 0.2, 0.1) p 0.8, grey 0.2, blur p 1.0",
    "second_jitter": "released code, utils.py: view 2: as view 1, but blur p 0.1, solarize p 0.2",
    "epochs": f"{CONFIGS}: 300",
    "batch_size": f"{CONFIGS}: 128 per GPU; the number of GPUs was not found; ours: 8",
    "base_lr": f"{CONFIGS}: 1.5e-4 per 256 images",
    "min_lr": "released code, pl_train_*.py: 0",
    "warmup_epochs": f"{CONFIGS}: 40",
    "betas": "released code, pl_train_*.py: AdamW's default",
    "weight_decay": f"{CONFIGS}: 0.1, 0 for biases and 1-D parameters",
    "clip_grad": "released code, pl_train_*.py: none",
    "amp": "released code, pl_train_*.py: fp32",
    "ema": "null: the objective keeps its own momentum copy",
    "ema_end": "null: the objective keeps its own momentum copy",
}
_ONLINE = """Needs no store: --data DATA (without --views: supervised, crops of 0.08 to 1 of the area; both views are fresh in
every step, and views without chance are refused). Evaluate with knn-eval --k 20; its crop is not the released one.
Not built: STL-10 at 96 px (no settings released); student.arguments.img_size=96 is near it."""
_NO_DET = "\nWithout the detached predictor loss (a released ablation): weights.det=0."
_NO_S32 = """
Not built: the released ablations' ViT-S/32 with weight 0.6: the first 100 epochs of a 300-epoch schedule, which cannot be
cut here, and one crop for a whole batch. Near it: student.architecture=vit_small_patch32_224 objective.alpha=0.6 (6 heads
as in the branch moco_abl; master's vit_small has 12: student.arguments.num_heads=12)."""
_COLOURS: dict[str, Any] = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "probability": 0.8,
    "grayscale": 0.2,
}

_MOCO = Entry(
    Recipe(
        name="sdssl-mocov3",
        objective=SDSSL(framework="mocov3"),
        student=StudentSpec(architecture="vit_base_patch16_224", freeze_patch_embed=True),
        jitter=Photometric(**_COLOURS, blur=1.0),
        second_jitter=Photometric(**_COLOURS, blur=0.1, solarize=0.2),
        epochs=300, batch_size=1024, base_lr=1.5e-4, min_lr=0.0, warmup_epochs=40, betas=(0.9, 0.999), weight_decay=0.1,
        amp="off",
    ),
    method="SDSSL",
    teacher="none: it teaches itself",
    about="MoCo v3 with intermediate self-distillation, as released",
    sources=_SOURCES,
    notes=_ONLINE + _NO_DET + _NO_S32,
)  # fmt: skip
_BYOL = derive(
    _MOCO,
    "sdssl-byol",
    "BYOL with intermediate self-distillation, as released",
    {"objective.framework": "byol"},
    notes=_ONLINE + _NO_DET,
    sources={"objective.tau": "not used by BYOL"},
)
_MOMENTUM = {f"objective.{key}": "not used by SimCLR" for key in ("momentum", "momentum_end", "hidden_predictor")}
_NO_COPY = "null: SimCLR has no momentum copy; the student itself is evaluated (released code, pl_train_simclr.py)"
_SIMCLR = derive(
    _MOCO,
    "sdssl-simclr",
    "SimCLR with intermediate self-distillation, as released",
    {"objective.framework": "simclr", "base_lr": 1.3e-4},
    notes=_ONLINE,
    sources=_MOMENTUM
    | {
        "ema": _NO_COPY,
        "ema_end": _NO_COPY,
        "base_lr": f"{CONFIGS}: 1.3e-4 per 256 images",
        "weights": "released code, pl_train_simclr.py: out 1, mid alpha(t)",
    },
)
_ALONE = {
    "objective.intermediate": "released code, baseline_*.json: weight 0 for the intermediate layers",
    "objective.alpha": "null: nothing has this weight",
    "objective.hidden_intermediate": "not used without intermediate layers",
    "weights": "one part",
}


def _baseline(entry: Entry, name: str) -> Entry:
    """The framework of ``entry`` by itself."""
    about = entry.about.replace(" with intermediate self-distillation, as released", " by itself")
    return derive(entry, name, f"baseline: {about}", {"objective.intermediate": False}, notes=_ONLINE, sources=_ALONE)


_OURS = "ours, not the paper's: "
_CACHED_SOURCES = {
    "objective.framework": f"{_OURS}MoCo v3's contrast and predictors; simclr and byol can be chosen",
    "objective.teacher": "ours: the only teacher of the store",
    "objective.target": "ours: the vector that the teacher's own head pools, one a row",
    "objective.projection_dim": "not used: projections have the teacher's width",
    "objective.momentum": "not used: the target is frozen",
    "objective.momentum_end": "not used: the target is frozen",
    "ema": "not part of the method: no averaged student",
    "ema_end": "not part of the method: no averaged student",
}
_CACHED_NOTES = """Not SDSSL, and its results are not results of SDSSL: the target is a frozen teacher's stored vector and does not move
with the student. hdcache extract DATA --store S --teacher NAME=MODEL --tap pooled --num-views 10"""
_CACHED = [
    derive(
        _MOCO,
        "sdssl-cached-final",
        "not the paper's: every layer learns from a frozen teacher's stored vector",
        {"objective.formulation": "cached_final"},
        teacher="any, stored with --tap pooled",
        notes=_CACHED_NOTES,
        sources=_CACHED_SOURCES
        | {"objective.formulation": f"{_OURS}the target of all layers is stored, so no teacher runs"},
    ),
    derive(
        _MOCO,
        "sdssl-cached-anchor",
        "not the paper's: the last layer learns from a frozen teacher, the others from the student's last",
        {"objective.formulation": "cached_anchor"},
        teacher="any, stored with --tap pooled",
        notes=_CACHED_NOTES,
        sources=_CACHED_SOURCES
        | {"objective.formulation": f"{_OURS}the closest to the paper that a stored target allows"},
    ),
]

_PAPER = [_MOCO, _BYOL, _SIMCLR]
_BASELINES = [_baseline(entry, f"{entry.recipe.name}-baseline") for entry in _PAPER]
_TINY_SOURCES = TINY | {
    "student.freeze_patch_embed": "as sdssl-mocov3",
    "student.drop_path": "as sdssl-mocov3",
    "jitter.blur_sigma": "ours: the released 0.1 to 2 at 224 px, in proportion",
    "second_jitter.blur_sigma": "ours: the released 0.1 to 2 at 224 px, in proportion",
} | {f"objective.{key}": "ours: sized for a CPU" for key in ("projection_dim", "hidden", "hidden_intermediate", "hidden_predictor")}  # fmt: skip


def _tiny(entry: Entry) -> Entry:
    """``entry`` sized for a CPU, with six blocks: its claim is about layers."""
    arguments = TINY_STUDENT | {"depth": 6}
    changes = {
        "student": StudentSpec(
            architecture="vit_tiny_patch16_224", arguments=arguments, freeze_patch_embed=True
        ),
        "objective.projection_dim": 64, "objective.hidden": 256, "objective.hidden_intermediate": 128,
        "objective.hidden_predictor": 256, "jitter.blur_sigma": (0.01, 0.3), "second_jitter.blur_sigma": (0.01, 0.3),
    }  # fmt: skip
    # What a recipe does not use, its full-size entry says already.
    unused = {path: source for path, source in entry.sources.items() if source.startswith("not used")}
    teacher = "any with a class token, such as supervised-tiny" if "cached" in entry.recipe.name else entry.teacher
    name, about = f"{entry.recipe.name}-tiny", f"{entry.about.removesuffix(', as released')}; small images on a CPU"
    read = {path: value for path, value in changes.items() if path not in unused}
    return derive(entry, name, about, read | TINY_RUN, teacher=teacher, sources=_TINY_SOURCES | unused)


ENTRIES = [*_PAPER, *_BASELINES, *_CACHED, *(_tiny(entry) for entry in (*_PAPER, *_BASELINES, *_CACHED))]
