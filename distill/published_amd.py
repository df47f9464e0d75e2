"""Recipes of AMD (Zhao et al., CVPR 2024, arXiv 2311.03149), each value with its source.

"Released code" is github.com/MCG-NJU/AMD at 8d2ec6f, which has video only. For images the README gives epochs, input
size and results; what else stands there is ours.
"""

from __future__ import annotations

from hdcache.distill.amd import AMD
from hdcache.distill.entry import RUN, TINY, TINY_INPUT, TINY_RUN, TINY_STUDENT, Entry, derive
from hdcache.distill.published_baselines import CLIP_SIZE, CLIPS, TINY_CLIPS
from hdcache.distill.settings import Recipe, StudentSpec

SCRIPTS = "released code, scripts/pretrain"
MODEL = "released code, models/modeling_pretrain.py"
_VIDEO_SOURCES = {
    **RUN,
    "objective.kind": "paper, abstract",
    "objective.teacher": "ours: the only teacher of the store that was run with teacher_mask_ratio",
    "objective.teacher_mask_ratio": f"{SCRIPTS}: 0.75",
    "objective.student_mask_ratio": f"{SCRIPTS}: 0.90",
    "objective.mask": "null: tubes (released code, dataset/masking_generator.py)",
    "objective.use": f"{SCRIPTS}: all three",
    "objective.teacher_blocks": f"null: the middle and the last ({SCRIPTS}: 12 and 24)",
    "objective.student_blocks": f"null: the middle and the last ({SCRIPTS}: 6 and 12)",
    "objective.align": f"{SCRIPTS}: l2",
    "objective.generator_depth": f"{MODEL}: 2",
    "objective.generator_heads": f"null: width / 64 ({MODEL}: 16 for ViT-L)",
    "objective.train_mask_tokens": f"{MODEL}: they lie in a plain list and are never trained",
    "objective.decoder_width": f"null: half the student's ({MODEL}: 384 for B, 192 for S)",
    "objective.decoder_depth": f"{MODEL}: 4",
    "objective.decoder_heads": f"null: width / 64 ({MODEL}: 6 for B, 3 for S)",
    "objective.norm_pix": "released code, engine_for_pretraining_amd.py",
    "objective.norm_kind": "null: over each colour channel (released code, engine_for_pretraining_amd.py)",
    "weights": "released code, run_amd_pretrain.py: recfac, dirfac and genfac 1",
    "student.architecture": MODEL,
    "student.arguments": f"{SCRIPTS}: 16 frames; {MODEL}: tubelets of 2",
    "student.drop_path": f"{SCRIPTS}: 0",
    "student.drop_path_schedule": "no effect without drop path",
    "student.drop_path_last_block": "no effect without drop path",
    "student.init": f"{MODEL}: Xavier-uniform; the student starts at random",
    "student.sincos_positions": f"{MODEL}: fixed, on the flattened index",
    "jitter": "null: released code, datasets.py: multi-scale crops alone, no flip, no jitter",
    "epochs": f"{SCRIPTS}: 200 loops of 4 repeated views; here 800 passes of one view each",
    "batch_size": f"{SCRIPTS}: 512 videos x 4 repeated views; here 2048 clips of as many videos",
    "lr": f"{SCRIPTS}: 1.2e-3 x 512 / 256, the repeated views not counted",
    "base_lr": "null: lr is given",
    "min_lr": f"{SCRIPTS}: 1e-5 x 512 / 256",
    "warmup_epochs": f"{SCRIPTS}: 10 loops of 4 views",
    "betas": f"{SCRIPTS}: 0.9, 0.95",
    "weight_decay": "released code, run_amd_pretrain.py: 0.05 constant, none on 1-D parameters",
    "clip_grad": f"{SCRIPTS}: 0.02",
    "amp": "ours: bf16 where the device has it; the released code uses fp16 with loss scaling",
}
_VIDEO_NOTES = """The same settings for Kinetics-400 (240,436 videos) and Something-Something V2 (168,913):
  K400  teacher VideoMAE ViT-L, 1600 epochs of K400; --views videomae (16 frames, stride 4)
  SSV2  teacher VideoMAE ViT-L, 2400 epochs of SSV2; --views videomae-ssv2 (16 frames, stride 2)
The teacher runs on its visible tokens only: --teacher-mask tube:0.75 --tap block12.out --tap block24.out when it is stored.
Repeated augmentation (four crops and masks of one clip in a step) has no counterpart here: a step has the same number
of clips, from four times as many videos. Clips are those that the store holds; the student's mask is fresh in every epoch."""

_VIDEO_B = Entry(
    Recipe(
        name="amd-video-b",
        objective=AMD(teacher_mask_ratio=0.75, student_mask_ratio=0.9),
        student=StudentSpec(architecture="vit_base_patch16_224", arguments=dict(CLIPS)),
        epochs=800, batch_size=2048, lr=2.4e-3, min_lr=2e-5, warmup_epochs=40, betas=(0.9, 0.95), weight_decay=0.05,
        clip_grad=0.02,
    ),
    method="AMD",
    teacher="VideoMAE ViT-L of the same data, masked",
    about="asymmetric masked distillation of clips; K400 82.2 %, SSV2 73.3 % in the paper",
    sources=_VIDEO_SOURCES,
    notes=_VIDEO_NOTES,
)  # fmt: skip
_VIDEO_S = derive(
    _VIDEO_B,
    "amd-video-s",
    "the same for ViT-S; K400 80.1 %, SSV2 70.2 % in the paper",
    {"student.architecture": "vit_small_patch16_224"},
)

SYMMETRIC = {
    "objective.student_mask_ratio": "ours: that of the student's own recipe for both, so that it costs the student the same",
    "objective.teacher_mask_ratio": "ours: equal to the student's: symmetric masks",
    "objective.use": "ours: nothing is left to generate where both see the same",
}
_SYMMETRIC_NOTES = "The baseline with symmetric masks: teacher and student see the same tokens; store the teacher with --teacher-mask of that ratio."
_VIDEO_SYMMETRIC = derive(
    _VIDEO_B,
    "amd-video-b-symmetric",
    "baseline: symmetric masks, direct alignment and pixels",
    {"objective.teacher_mask_ratio": 0.9, "objective.use": ["pixels", "direct"]},
    notes=_SYMMETRIC_NOTES,
    sources=SYMMETRIC,
)

NOT_FOUND = "not found in the paper's release; ours: as MAE (appendix A.1)"
AS_VIDEO = "not found in the paper's release; ours: as on video"
_IMAGE_SOURCES = {
    "objective.teacher_mask_ratio": "not found in the paper's release; ours: 0.5, twice what the student sees",
    "objective.student_mask_ratio": "not found in the paper's release; ours: 0.75, as MAE; the video ratios do not carry over",
    "objective.mask": "null: any patches; not found in the paper's release; ours: as MAE",
    "objective.norm_kind": "null: over all values of a patch; not found in the paper's release; ours: as MAE",
    "student.architecture": "released README: ViT-S and ViT-B, 224 px",
    "student.arguments": "released README: 224 px",
    "student.init": NOT_FOUND,
    "student.sincos_positions": NOT_FOUND,
    "jitter": "null: not found in the paper's release; ours: as MAE",
    "epochs": "released README: 800",
    "lr": "null: base_lr times batch_size / 256",
    "clip_grad": "not found in the paper's release; ours: none, as MAE",
    "weights": AS_VIDEO,
} | dict.fromkeys(("batch_size", "base_lr", "min_lr", "warmup_epochs", "betas", "weight_decay"), NOT_FOUND) | {
    f"objective.{key}": AS_VIDEO
    for key in (
        "use", "teacher_blocks", "student_blocks", "align", "generator_depth", "generator_heads", "train_mask_tokens",
        "decoder_width", "decoder_depth", "decoder_heads", "norm_pix",
    )
} | {"student.drop_path": AS_VIDEO}  # fmt: skip
_IMAGE_B = derive(
    _VIDEO_B,
    "amd-image-b",
    "asymmetric masked distillation of images; ImageNet-1K 84.6 % in the paper",
    {
        "objective.teacher_mask_ratio": 0.5,
        "objective.student_mask_ratio": 0.75,
        "student.arguments": {},
        "batch_size": 4096,
        "lr": None,
        "base_lr": 1.5e-4,
        "min_lr": 0.0,
        "clip_grad": None,
    },
    teacher="MAE ViT-L, masked; which one the paper used was not found",
    notes="Teacher, mask ratios, layers, decoder and optimizer of the paper's image models were not found: a run of this "
    "recipe is not a reproduction.\nStore the teacher with --teacher-mask random:0.5 --tap block12.out --tap block24.out.",
    sources=_IMAGE_SOURCES,
)
_IMAGE_S = derive(
    _IMAGE_B,
    "amd-image-s",
    "the same for ViT-S; ImageNet-1K 82.1 % in the paper",
    {"student.architecture": "vit_small_patch16_224"},
)
_IMAGE_SYMMETRIC = derive(
    _IMAGE_B,
    "amd-image-b-symmetric",
    "baseline: symmetric masks, direct alignment and pixels",
    {"objective.teacher_mask_ratio": 0.75, "objective.use": ["pixels", "direct"]},
    notes=_SYMMETRIC_NOTES,
    sources=SYMMETRIC,
)

_SIZES = {
    "objective.decoder_width": "ours: sized for a CPU",
    "objective.decoder_depth": "ours: sized for a CPU",
    "objective.generator_depth": "ours: sized for a CPU",
}
_SMALL = {"objective.decoder_width": 48, "objective.decoder_depth": 2, "objective.generator_depth": 1}
_IMAGE_TINY = derive(
    _IMAGE_B,
    "amd-image-tiny",
    "asymmetric masks, small images on a CPU",
    {"student": StudentSpec(architecture="vit_tiny_patch16_224", arguments=dict(TINY_STUDENT)), **_SMALL, **TINY_RUN},
    teacher="mae-tiny, masked",
    notes="Store the teacher with --teacher-mask random:0.5 --tap block2.out --tap block4.out.",
    sources=TINY | _SIZES,
)
_VIDEO_TINY = derive(
    _VIDEO_B,
    "amd-video-tiny",
    "asymmetric masks, small clips on a CPU",
    {
        "student": StudentSpec(
            architecture="vit_tiny_patch16_224",
            arguments=TINY_CLIPS | {key: value for key, value in TINY_STUDENT.items() if key not in TINY_INPUT},
        ),
        **_SMALL,
        **TINY_RUN,
    },
    teacher="videomae-tiny, masked",
    notes="Views: --views 'videomae?frames=8&stride=2'. Store the teacher with --teacher-mask tube:0.75 --tap block2.out "
    "--tap block4.out.",
    sources=TINY | _SIZES | {"student.architecture": CLIP_SIZE, "student.arguments": CLIP_SIZE},
)
_TINY_SYMMETRIC = [
    derive(
        _IMAGE_TINY,
        "amd-image-symmetric-tiny",
        "baseline: symmetric masks, small images on a CPU",
        {"objective.teacher_mask_ratio": 0.75, "objective.use": ["pixels", "direct"]},
        notes=_SYMMETRIC_NOTES,
        sources=SYMMETRIC,
    ),
    derive(
        _VIDEO_TINY,
        "amd-video-symmetric-tiny",
        "baseline: symmetric masks, small clips on a CPU",
        {"objective.teacher_mask_ratio": 0.9, "objective.use": ["pixels", "direct"]},
        notes=_SYMMETRIC_NOTES,
        sources=SYMMETRIC,
    ),
]

ENTRIES = [
    _VIDEO_B,
    _VIDEO_S,
    _IMAGE_B,
    _IMAGE_S,
    _VIDEO_SYMMETRIC,
    _IMAGE_SYMMETRIC,
    _IMAGE_TINY,
    _VIDEO_TINY,
    *_TINY_SYMMETRIC,
]
