"""Recipes of what the methods are compared with, and of teachers to train oneself, each value with its source.

MAE: He et al. 2021 (arXiv 2111.06377), released code github.com/facebookresearch/mae. VideoMAE: Tong et al. 2022
(arXiv 2203.12602), released code github.com/MCG-NJU/VideoMAE. DeiT: Touvron et al. 2021 (arXiv 2012.12877), released
code github.com/facebookresearch/deit. TinyViT: Wu et al. 2022 (arXiv 2207.10666).
"""

from __future__ import annotations

from hdcache.distill.entry import (
    RUN,
    SCALED_LR,
    TINY,
    TINY_INPUT,
    TINY_RUN,
    TINY_STUDENT,
    TINY_TEACHER,
    Entry,
    derive,
)
from hdcache.distill.logits import Logits
from hdcache.distill.mae import MAE
from hdcache.distill.settings import Recipe, StudentSpec
from hdcache.distill.supervised import Supervised
from hdcache.photometric import Photometric

NO_JITTER = "null: MAE, appendix A.1: random crops and flips alone"
_MAE_SOURCES = {
    **RUN,
    **SCALED_LR,
    "objective.kind": "MAE, appendix A.1",
    "objective.mask_ratio": "MAE, section 3 and Fig. 5: 0.75",
    "objective.mask": "null: any patches of an image (MAE, section 3)",
    "objective.decoder_width": "MAE, Tab. 1b: 512",
    "objective.decoder_depth": "MAE, Tab. 1a: 8",
    "objective.decoder_heads": "MAE, released models_mae.py: 16",
    "objective.norm_pix": "MAE, Tab. 1d; released PRETRAIN.md: --norm_pix_loss",
    "objective.norm_kind": "null: over all values of a patch (MAE, released models_mae.py)",
    "weights": "one part",
    "student.architecture": "MAE, released models_mae.py",
    "student.arguments": "MAE, released models_mae.py",
    "student.drop_path": "MAE, released models_mae.py: none in pre-training",
    "student.drop_path_schedule": "no effect without drop path",
    "student.drop_path_last_block": "no effect without drop path",
    "student.init": "MAE, appendix A.1: Xavier-uniform",
    "student.sincos_positions": "MAE, appendix A.1: fixed sine-cosine",
    "jitter": NO_JITTER,
    "epochs": "MAE, section 4: 800 in ablations, 1600 in the main results",
    "batch_size": "MAE, appendix A.1: 4096",
    "base_lr": "MAE, appendix A.1: 1.5e-4",
    "min_lr": "MAE, released main_pretrain.py: 0",
    "warmup_epochs": "MAE, appendix A.1: 40",
    "betas": "MAE, appendix A.1: 0.9, 0.95",
    "weight_decay": "MAE, appendix A.1: 0.05",
    "clip_grad": "MAE, released main_pretrain.py: none",
    "amp": "ours: bf16 where the device has it; the released code uses fp16 with loss scaling",
}
_MAE_L = Entry(
    Recipe(
        name="mae-l", objective=MAE(), student=StudentSpec(architecture="vit_large_patch16_224"),
        epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40, betas=(0.9, 0.95), weight_decay=0.05,
    ),
    method="MAE",
    teacher="none",
    about="train a masked autoencoder: a teacher, or the baseline of AMD on images",
    sources=_MAE_SOURCES,
    notes="Published weights need no training: --teacher mae=vit_large_patch16_224.mae.",
)  # fmt: skip
_MAE_B = derive(
    _MAE_L,
    "mae-b",
    "train a masked autoencoder: a teacher, or the baseline of AMD on images",
    {"student.architecture": "vit_base_patch16_224"},
    notes="Published weights need no training: --teacher mae=vit_base_patch16_224.mae.",
)
_MAE_TINY = derive(
    _MAE_L,
    "mae-tiny",
    "a small masked autoencoder on a CPU: teacher or baseline",
    {
        "objective": MAE(decoder_width=64, decoder_depth=2, decoder_heads=4),
        "student": StudentSpec(architecture="vit_tiny_patch16_224", arguments=dict(TINY_TEACHER)),
        **TINY_RUN,
    },
    notes="",
    sources=TINY
    | {f"objective.decoder_{part}": "ours: sized for a CPU" for part in ("width", "depth", "heads")}
    | {"jitter": NO_JITTER},
)

CLIPS = {"frames": 16, "tubelet": 2}
_VIDEOMAE = derive(
    _MAE_L,
    "videomae-b",
    "VideoMAE-style masked autoencoder of clips: a teacher, or the baseline of AMD on video",
    {
        "objective": MAE(mask_ratio=0.9, mask="tube", decoder_width=384, decoder_depth=4, decoder_heads=6),
        "student": StudentSpec(architecture="vit_base_patch16_224", arguments=dict(CLIPS)),
        "batch_size": 2048,
        "min_lr": 8e-5,
    },
    notes="Views: --views videomae (16 frames, stride 4: Kinetics-400) or videomae-ssv2 (stride 2). 800 epochs is the "
    "setting that AMD compares with (SSV2 69.6 %); the best of the model zoo is 2400.",
    sources={
        "objective.kind": "VideoMAE, released modeling_pretrain.py",
        "objective.mask_ratio": "VideoMAE, released scripts: --mask_ratio 0.9",
        "objective.mask": "VideoMAE, released scripts: --mask_type tube",
        "objective.decoder_width": "VideoMAE, released modeling_pretrain.py: 384",
        "objective.decoder_depth": "VideoMAE, released scripts: --decoder_depth 4",
        "objective.decoder_heads": "VideoMAE, released modeling_pretrain.py: 6",
        "objective.norm_pix": "VideoMAE, released run_mae_pretraining.py: normlize_target",
        "objective.norm_kind": "null: over each colour channel (VideoMAE, released engine_for_pretraining.py)",
        "student.architecture": "VideoMAE, released modeling_pretrain.py",
        "student.arguments": "VideoMAE, released scripts: 16 frames, tubelets of 2",
        "student.drop_path": "VideoMAE, released run_mae_pretraining.py: 0",
        "student.init": "VideoMAE, released modeling_pretrain.py: Xavier-uniform",
        "student.sincos_positions": "VideoMAE, released modeling_pretrain.py: fixed",
        "jitter": "null: VideoMAE, released datasets.py: multi-scale crops alone",
        "epochs": "VideoMAE, released scripts: 800",
        "batch_size": "VideoMAE, released scripts: 64 GPUs x 32",
        "base_lr": "VideoMAE, released run_mae_pretraining.py: 1.5e-4 per 256 clips",
        "min_lr": "VideoMAE, released run_mae_pretraining.py: 1e-5 x 2048 / 256",
        "warmup_epochs": "VideoMAE, released scripts: 40",
        "betas": "VideoMAE, released scripts: 0.9, 0.95",
        "weight_decay": "VideoMAE, released run_mae_pretraining.py: 0.05",
        "clip_grad": "VideoMAE, released run_mae_pretraining.py: none",
    },
)
TINY_CLIPS = {"img_size": 32, "patch_size": 4, "frames": 8, "tubelet": 2}
CLIP_SIZE = "ours: sized for a CPU, 8 frames of 32 pixels: 4 slots of 8 x 8 tokens"
_VIDEOMAE_TINY = derive(
    _VIDEOMAE,
    "videomae-tiny",
    "a small masked autoencoder of clips on a CPU: teacher or baseline",
    {
        "objective": MAE(mask_ratio=0.9, mask="tube", decoder_width=48, decoder_depth=2, decoder_heads=3),
        "student": StudentSpec(
            architecture="vit_tiny_patch16_224",
            arguments=TINY_CLIPS | {key: value for key, value in TINY_TEACHER.items() if key not in TINY_INPUT},
        ),
        **TINY_RUN,
    },
    notes="Views: --views 'videomae?frames=8&stride=2'.",
    sources=TINY
    | {f"objective.decoder_{part}": "ours: sized for a CPU" for part in ("width", "depth", "heads")}
    | {"student.architecture": CLIP_SIZE, "student.arguments": CLIP_SIZE, "jitter": "as videomae-b"},
)

_SUPERVISED = Entry(
    Recipe(
        name="supervised-s",
        objective=Supervised(pool="class-token", label_smoothing=0.1),
        student=StudentSpec(architecture="vit_small_patch16_224", drop_path=0.1, init="timm", sincos_positions=False),
        jitter=Photometric(), epochs=300, batch_size=1024, lr=1e-3, min_lr=1e-5, warmup_epochs=5, betas=(0.9, 0.999),
        weight_decay=0.05,
    ),
    method="supervised",
    teacher="none",
    about="from scratch with labels, DeiT-like: the line that distillation has to beat",
    sources={
        **RUN,
        "objective.kind": "DeiT, released main.py",
        "objective.pool": "DeiT, section 3: the class token",
        "objective.label_smoothing": "DeiT, released main.py: 0.1",
        "weights": "one part",
        "student.architecture": "DeiT, Tab. 1",
        "student.arguments": "DeiT, Tab. 1",
        "student.drop_path": "DeiT, released main.py: 0.1",
        "student.drop_path_schedule": "DeiT, released models (timm): rising from 0 to the last block",
        "student.drop_path_last_block": "DeiT, released models (timm)",
        "student.init": "DeiT, section 6: truncated normal (timm's)",
        "student.sincos_positions": "DeiT, released models (timm): learnt",
        "jitter": "ours: in place of RandAugment (DeiT, released main.py), which we do not have",
        "epochs": "DeiT, released main.py: 300",
        "batch_size": "DeiT, section 6: 1024",
        "lr": "DeiT, released main.py: 5e-4 x 1024 / 512",
        "base_lr": "null: lr is given",
        "min_lr": "DeiT, released main.py: 1e-5",
        "warmup_epochs": "DeiT, released main.py: 5 (from 1e-6 there, from 0 here)",
        "betas": "DeiT, released main.py: AdamW's default",
        "weight_decay": "DeiT, released main.py: 0.05",
        "clip_grad": "DeiT, released main.py: none",
        "amp": "ours: bf16 where the device has it; the released code uses fp16 with loss scaling",
    },
    notes="Without DeiT's mixup, CutMix, RandAugment, random erasing and repeated augmentation: do not expect DeiT's 79.9 %.\n"
    "ViT-T and ViT-B: student.architecture=vit_tiny_patch16_224 or vit_base_patch16_224. Views: --views supervised.",
)  # fmt: skip
_SUPERVISED_TINY = derive(
    _SUPERVISED,
    "supervised-tiny",
    "a small labelled network on a CPU: teacher (of soft labels too) or baseline",
    {
        "student": StudentSpec(architecture="vit_tiny_patch16_224", arguments=dict(TINY_TEACHER)),
        "betas": (0.9, 0.95),
        **TINY_RUN,
    },
    notes="",
    sources=TINY
    | {
        "student.init": "ours: as the other small networks",
        "student.sincos_positions": "ours: as the other small networks",
        "betas": "ours: as the other small networks",
    },
)

_OURS_LOGITS = "ours: as supervised-s, so that both have the same budget"
_LOGITS = derive(
    _SUPERVISED,
    "logits-s",
    "soft labels, the classic distillation (Hinton et al. 2015): the baseline for every teacher with a classifier",
    {"objective": Logits()},
    method="logits",
    teacher="any with a classifier, stored with --tap logits --top-k 10",
    notes='Hard labels too: objective.hard_labels=true, weights as \'weights={"soft_labels":0.5,"cross_entropy":0.5}\'.',
    sources={
        "objective.kind": "Hinton et al. 2015, section 2",
        "objective.teacher": "ours: the only teacher of the store with a classifier",
        "objective.temperature": "TinyViT, section 3.1: soft labels as they are; Hinton et al. tune it",
        "objective.pool": "ours: as supervised-s",
        "objective.hard_labels": "TinyViT, section 3.1: pre-training needs no ground truth",
        "objective.label_smoothing": "no effect without hard labels",
        "student.architecture": _OURS_LOGITS,
        "student.arguments": _OURS_LOGITS,
        "epochs": _OURS_LOGITS,
        "batch_size": _OURS_LOGITS,
        "lr": _OURS_LOGITS,
        "min_lr": _OURS_LOGITS,
        "warmup_epochs": _OURS_LOGITS,
        "betas": _OURS_LOGITS,
        "weight_decay": _OURS_LOGITS,
        "clip_grad": _OURS_LOGITS,
        "jitter": "ours: as supervised-s; the teacher saw the same crop without it",
    }
    | {f"student.{part}": _OURS_LOGITS for part in ("drop_path", "drop_path_schedule", "drop_path_last_block")}
    | {f"student.{part}": _OURS_LOGITS for part in ("init", "sincos_positions")},
)
_LOGITS_TINY = derive(
    _LOGITS,
    "logits-tiny",
    "soft labels, small images on a CPU",
    {
        "student": StudentSpec(architecture="vit_tiny_patch16_224", arguments=dict(TINY_STUDENT)),
        "betas": (0.9, 0.95),
        **TINY_RUN,
    },
    teacher="supervised-tiny or any with a classifier, stored with --tap logits --top-k 10",
    sources=TINY
    | {
        "student.init": "ours: as the other small networks",
        "student.sincos_positions": "ours: as the other small networks",
        "betas": "ours: as the other small networks",
    },
)

ENTRIES = [
    _MAE_B,
    _MAE_L,
    _VIDEOMAE,
    _SUPERVISED,
    _LOGITS,
    _MAE_TINY,
    _VIDEOMAE_TINY,
    _SUPERVISED_TINY,
    _LOGITS_TINY,
]
