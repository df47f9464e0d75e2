"""Recipes of TinyMIM (Ren et al., CVPR 2023, arXiv 2301.01296), each value with its source.

"Released code" is github.com/OliverRensu/TinyMIM at d084705; tables and equations are the paper's.
"""

from __future__ import annotations

from hdcache.distill.entry import RUN, SCALED_LR, TINY, TINY_RUN, TINY_STUDENT, Entry, derive
from hdcache.distill.settings import Recipe, StudentSpec
from hdcache.distill.tinymim import TinyMIM
from hdcache.photometric import Photometric

UNUSED = "null: not a setting of this strategy"
PAPER = {
    **RUN,
    **SCALED_LR,
    "objective.kind": "released code, models_tinymim.py",
    "objective.teacher": "ours: the only teacher of the store",
    "objective.strategy": "paper, section 3.1.2: relations are the method (Tab. 8)",
    "objective.teacher_block": "null: the last of up to 12 blocks, 18 of 24 (released code, models_teacher.py; Tab. 10)",
    "objective.student_block": "null: the last (released code, models_tinymim.py, where 12 is written out)",
    "objective.relations": "paper, Tab. 7: Q-K and V-V are best (84.6); Eq. 9",
    "objective.heads": "null: the teacher's own 16 (paper, section 3.2; released code, models_tinymim.py)",
    "objective.tokens": "released code, models_teacher.py: the class token is in the relations",
    "objective.softmax": "paper, Eq. 4; Tab. 7: 84.6 with softmax, 84.4 without",
    "objective.feature": UNUSED,
    "objective.beta": "not used by this strategy",
    "objective.temperature": "not used by this strategy",
    "objective.masked_input": "paper, Tab. 12: raw images are best (84.6 against 83.9 masked)",
    "objective.reconstruction": "paper, Tab. 12: none is best (84.6 against 84.0)",
    "weights": "paper, Eq. 9: 1 : 1; released code, engine_pretrain.py",
    "student.architecture": "released code, models_tinymim.py",
    "student.arguments": "released code, models_tinymim.py",
    "student.drop_path": "paper, Tab. 13: 0.1 for the student, 0 for the teacher",
    "student.drop_path_schedule": "released code, models_tinymim.py: the same in blocks 1 to 11",
    "student.drop_path_last_block": "released code, models_tinymim.py: none in block 12",
    "student.init": "released code, models_tinymim.py: as MAE",
    "student.sincos_positions": "released code, models_tinymim.py: fixed",
    "jitter": "released code, main_pretrain.py: ColorJitter(0.4, 0.4, 0.4), always on, no hue",
    "jitter.grayscale": "not part of the method",
    "jitter.blur": "not part of the method",
    "jitter.blur_sigma": "no effect without blur",
    "jitter.solarize": "not part of the method",
    "epochs": "paper, section 4.2: 300, ablations 100",
    "batch_size": "released README: 32 GPUs x 128",
    "base_lr": "released README: 1.5e-4 per 256 images",
    "min_lr": "released code, main_pretrain.py: 0",
    "warmup_epochs": "released README: 15",
    "betas": "released code, main_pretrain.py",
    "weight_decay": "released README: 0.05, 0 for norms and biases",
    "clip_grad": "released code, engine_pretrain.py: no clipping is passed",
    "amp": "ours: bf16 where the device has it; the released code uses fp16 with loss scaling",
}
ABLATIONS = """The paper's ablations (100 epochs: --set epochs=100) as --set lines:
  Tab. 7   'objective.relations=["qq","kk","vv"]'; objective.softmax=false
  Tab. 10  objective.teacher_block=12, 15, 21 or 24
  Tab. 12  objective.masked_input=0.75; with 'objective.reconstruction={"kind":"mae"}' too
  Tab. 13  student.drop_path=0, 0.2 or 0.3
  The reconstruction of Tab. 12 predicts jittered pixels; MAE has neither jitter nor drop path: jitter=null student.drop_path=0
Crops are those that the store holds (--num-views), not fresh ones in every epoch."""
FINE_TUNING = "Fine-tuning has no recipe here: docs/methods/tinymim.md has the published values (A9)."
DIRECTLY = "Directly from MAE-L, whose width 12 heads do not divide: --set objective.heads=null takes its own 16."

_B = Entry(
    Recipe(
        name="tinymim-b",
        objective=TinyMIM(),
        student=StudentSpec(
            architecture="vit_base_patch16_224", drop_path=0.1, drop_path_schedule="constant",
            drop_path_last_block=False, init="mae", sincos_positions=True,
        ),
        jitter=Photometric(brightness=0.4, contrast=0.4, saturation=0.4),
        epochs=300, batch_size=4096, base_lr=1.5e-4, min_lr=0.0, warmup_epochs=15, betas=(0.9, 0.95), weight_decay=0.05,
        clip_grad=None, amp="auto",
    ),
    method="TinyMIM",
    teacher="MAE ViT-L",
    about="relations of a masked autoencoder's block 18; 85.0 % in the paper",
    sources=PAPER,
    notes=ABLATIONS + "\n" + FINE_TUNING,
)  # fmt: skip

_SMALLER = {"student.arguments": "none: released code, models_tinymim.py"}

_S = derive(
    _B,
    "tinymim-s",
    "second stage of the sequence L, B, S, T; 83.0 % in the paper",
    {"student.architecture": "vit_small_patch16_224", "objective.heads": 12},
    teacher="TinyMIM-B",
    notes="\n".join(
        (
            "The B teacher's block 12 was trained with 16 heads; objective.heads=16 reads it so.",
            DIRECTLY,
            ABLATIONS,
            FINE_TUNING,
        )
    ),
    sources=_SMALLER
    | {
        "student.architecture": "paper, Tab. 3",
        "objective.heads": "released code, models_teacher.py: B is read with 12, though trained with 16; the paper is silent",
    },
)
_T = derive(
    _S,
    "tinymim-t",
    "third stage of the sequence L, B, S, T; 75.8 % in the paper",
    {"student.architecture": "vit_tiny_patch16_224", "student.arguments": {"num_heads": 6}},
    teacher="TinyMIM-S",
    notes="\n".join(
        (
            "objective.heads=6 reads the S teacher with its own heads.",
            DIRECTLY,
            ABLATIONS,
            FINE_TUNING,
            "TinyMIM*-T (distillation token, 1,000 epochs of fine-tuning) is not built: its recipe was not found.",
        )
    ),
    sources={
        "student.arguments": "released code, models_tinymim.py: 6 heads in blocks 1 to 11 (fine-tuning then uses 3, issue 4)",
        "objective.heads": "released code, models_tinymim.py: 12 in the student's block 12; its S teacher has 6, which "
        "would not fit, so the student's count is taken for both",
    },
)
_RELATION_FIELDS = {
    "objective.relations": "not used by this strategy",
    "objective.heads": UNUSED,
    "objective.softmax": "not used by this strategy",
    "objective.teacher_block": "null: the last",
    "objective.student_block": "ours: after the last norm; the paper says 'the output of the student'",
    "weights": "one part",
}
_FEATURE = derive(
    _B,
    "tinymim-feature",
    "feature distillation, the paper's comparison (Tab. 8: 83.8 against 85.0)",
    {"objective.strategy": "feature"},
    notes="Other features of Tab. 6: objective.feature=qkv, attn_out, mid or mlp_out. Store what is read: the extract "
    "command that is missing is printed.",
    sources=_RELATION_FIELDS
    | {
        "objective.strategy": "paper, Eq. 7 and 8",
        "objective.feature": "null: the last block's output (paper, Tab. 6: 83.7; qkv 84.3 is best there)",
        "objective.tokens": "ours: all take part; the paper does not say",
        "objective.beta": "paper, Eq. 8: 2",
    },
)
_CLASS_TOKEN = derive(
    _B,
    "tinymim-class-token",
    "class-token distillation, the paper's comparison (Tab. 8: 82.6 against 85.0)",
    {"objective.strategy": "class-token"},
    notes="With reconstruction (Tab. 5: 82.1 against 80.6): objective.masked_input=0.75 and "
    '\'objective.reconstruction={"kind":"mae"}\'.',
    sources=_RELATION_FIELDS
    | {
        "objective.strategy": "paper, Eq. 6",
        "objective.feature": "ours: after the last norm; the paper does not say",
        "objective.tokens": "not used by this strategy",
        "objective.temperature": "ours: 1; the paper does not say how channels become a distribution",
    },
)


def _tiny(entry: Entry, about: str) -> Entry:
    """``entry`` sized for a CPU."""
    student = StudentSpec(architecture="vit_tiny_patch16_224", arguments=dict(TINY_STUDENT))
    heads = {"objective.heads": "null: the teacher's own"} if "objective.heads" in entry.sources else {}
    return derive(
        entry,
        entry.recipe.name.removesuffix("-b") + "-tiny",
        about,
        {"student": student, **TINY_RUN},
        teacher="any with 8 x 8 patches, such as mae-tiny",
        sources=TINY | heads | {"jitter": "as tinymim-b"},
    )


ENTRIES = [
    _B,
    _S,
    _T,
    _FEATURE,
    _CLASS_TOKEN,
    _tiny(_B, "relations, small images on a CPU"),
    _tiny(_FEATURE, "features, small images on a CPU"),
    _tiny(_CLASS_TOKEN, "class token, small images on a CPU"),
]
