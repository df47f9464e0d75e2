"""Recipes of Hybrid Distill (Shi et al., ICLR 2024, arXiv 2306.15876), each value with its source.

No code was released and most of the paper's body could not be confirmed: "not known" below means that we could not
read it, and what stands there is ours. PCAE is Li et al. (ICLR 2023), whose released code has the same stages.
"""

from __future__ import annotations

from hdcache.distill.entry import RUN, SCALED_LR, TINY, TINY_RUN, TINY_STUDENT, Entry, derive
from hdcache.distill.hybrid import Hybrid
from hdcache.distill.settings import Recipe, StudentSpec
from hdcache.photometric import Photometric

LIKE_TINYMIM = "not known; ours: as TinyMIM (released README), whose students and teachers are alike"
DEFAULT_BLOCK = "not known which; ours: three quarters of the depth, where TinyMIM finds relations of a large MAE best"
_SOURCES = {
    **RUN,
    **SCALED_LR,
    "objective.kind": "paper, abstract",
    "objective.use": "paper, abstract: relations and features together",
    "objective.relation_teacher": "paper, abstract: a masked-image-modelling teacher; reviews: MAE. The name is ours",
    "objective.feature_teacher": "paper, abstract: a supervised or contrastive one; reviews: DeiT or CLIP. The name is ours",
    "objective.relation_blocks": f"paper, abstract: intermediate blocks; {DEFAULT_BLOCK}",
    "objective.student_blocks": DEFAULT_BLOCK,
    "objective.relations": "not confirmed: the query-key product, as recalled",
    "objective.scores": "not known; ours: scaled by each network's head width, before any softmax",
    "objective.heads": "not known; ours: null: the loss cuts both into the relation teacher's own; the student's attention "
    "keeps its heads (TinyMIM's adaptive block never runs its attention)",
    "objective.relation_tokens": "not known; ours: all, as TinyMIM's released code",
    "objective.combine": "not known; ours: the mean, so that the weight means the same for any number of blocks",
    "objective.relation_beta": "not confirmed: smooth L1, as recalled; ours: beta 1, PyTorch's default",
    "objective.feature": "paper, abstract: final features; ours: after the last norm",
    "objective.feature_norm": "not known; ours: whitened per token, as TinyMIM's Eq. 7",
    "objective.feature_tokens": "not known; ours: all, so that the class token takes part",
    "objective.feature_beta": "not confirmed: smooth L1, as recalled; ours: beta 1, PyTorch's default",
    "objective.keep_ratio": "not known; ours: 0.5, as PCAE's released main_pretrain.py",
    "objective.stages": "not confirmed: blocks of index 0, L/3, 2L/3, as recalled and as PCAE's released models_mae.py",
    "objective.scorer": "not confirmed: the teacher's side, as recalled",
    "objective.scorer_target": "not known; ours: the feature teacher's features",
    "weights": "review of the submission: alpha = beta = 1",
    "student.architecture": "paper: ViT-B and ViT-L, 224 px",
    "student.arguments": "paper: a plain ViT",
    "student.drop_path": LIKE_TINYMIM,
    "student.drop_path_schedule": LIKE_TINYMIM,
    "student.drop_path_last_block": LIKE_TINYMIM,
    "student.init": LIKE_TINYMIM,
    "student.sincos_positions": LIKE_TINYMIM,
    "jitter": LIKE_TINYMIM,
    "epochs": "paper, experiments: 300 on ImageNet-1K; 100 for ablations",
    "batch_size": LIKE_TINYMIM,
    "base_lr": LIKE_TINYMIM,
    "min_lr": LIKE_TINYMIM,
    "warmup_epochs": LIKE_TINYMIM,
    "betas": "paper: AdamW; its betas are not known; ours: as TinyMIM",
    "weight_decay": LIKE_TINYMIM,
    "clip_grad": LIKE_TINYMIM,
    "amp": "ours: bf16 where the device has it; the paper's precision is not known",
}
MAE_LINE = (
    "  hdcache extract DATA --store S --teacher mae=MODEL --tap blockN.attn_in      (N: three quarters of its depth)"
)
CLIP_LINE = "  hdcache extract DATA --store S --teacher clip=MODEL --tap final"
EXTRACT = f"""Store both teachers on the same views, under these names:
{MAE_LINE}
{CLIP_LINE}
Both need the student's patch grid: CLIP-L/14 has it at 196 px (--img-size 196). A supervised teacher instead:
  --set objective.feature_teacher=deit
Best with as many heads in the student as in the MAE teacher: student.arguments.num_heads=16 for ViT-B from MAE-L."""
ABLATIONS = (
    EXTRACT
    + """
Ablations (100 epochs: hybrid-b-100): objective.keep_ratio=null; objective.scorer=student or random; objective.scores=softmax;
'objective.relations=["qk","vv"]'. docs/methods/hybrid.md lists every point that the paper leaves open for us."""
)

_B = Entry(
    Recipe(
        name="hybrid-b",
        objective=Hybrid(relation_teacher="mae", feature_teacher="clip"),
        student=StudentSpec(
            architecture="vit_base_patch16_224", drop_path=0.1, drop_path_schedule="constant",
            drop_path_last_block=False, init="mae", sincos_positions=True,
        ),
        jitter=Photometric(),
        epochs=300, batch_size=4096, base_lr=1.5e-4, min_lr=0.0, warmup_epochs=15, betas=(0.9, 0.95), weight_decay=0.05,
    ),
    method="Hybrid Distill",
    teacher="MAE (mae) and CLIP or DeiT (clip); sizes not known",
    about="relations of a masked autoencoder and final features of CLIP; 300 epochs of ImageNet-1K",
    sources=_SOURCES,
    notes=ABLATIONS,
)  # fmt: skip
_B_100 = derive(
    _B,
    "hybrid-b-100",
    "hybrid-b for the 100 epochs of the paper's ablations",
    {"epochs": 100},
    sources={
        "epochs": "paper, experiments: 100 for ablations",
        "warmup_epochs": "not known; ours: as hybrid-b, so that only the epochs differ",
    },
)
_L = derive(
    _B,
    "hybrid-l",
    "the same for ViT-L; 300 epochs of ImageNet-1K (87.6 % with CLIP, a review says)",
    {"student.architecture": "vit_large_patch16_224"},
)
_L_21K = derive(
    _L,
    "hybrid-l-in21k",
    "the same for ViT-L; 40 epochs of ImageNet-21K",
    {"epochs": 40, "warmup_epochs": 2},
    sources={
        "epochs": "paper, experiments: 40 on ImageNet-21K",
        "warmup_epochs": "not known; ours: a twentieth of the run, as TinyMIM's 15 of 300",
    },
)
RELATION_ALONE = {
    "objective.use": "ours: one half, the single-teacher baseline",
    "objective.scorer_target": "null: the input of the relation block's attention, since features are not read",
}
FEATURE_ALONE = {"objective.use": "ours: one half, the single-teacher baseline"}
_HALVES = [
    derive(
        _B,
        "hybrid-b-relation",
        "baseline: the masked autoencoder's half of hybrid-b alone",
        {"objective.use": ["relation"]},
        teacher="MAE (mae)",
        notes=MAE_LINE + "\nobjective.scorer_target=feature drops the same tokens as hybrid-b; it then needs clip too.",
        sources=RELATION_ALONE,
    ),
    derive(
        _B,
        "hybrid-b-feature",
        "baseline: CLIP's half of hybrid-b alone",
        {"objective.use": ["feature"]},
        teacher="CLIP or DeiT (clip)",
        notes=CLIP_LINE,
        sources=FEATURE_ALONE,
    ),
]
_TINY = derive(
    _B,
    "hybrid-tiny",
    "both halves, small images on a CPU",
    {
        "objective.feature_teacher": "supervised",
        "student": StudentSpec(architecture="vit_tiny_patch16_224", arguments=dict(TINY_STUDENT)),
        **TINY_RUN,
    },
    teacher="mae-tiny (mae) and supervised-tiny (supervised)",
    notes="hdcache extract DATA --store S --teacher mae=FOLDER --tap block3.attn_in --tap final; the same for supervised.",
    sources=TINY | {"jitter": "as hybrid-b"},
)
_TINY_HALVES = [
    derive(
        _TINY,
        "hybrid-relation-tiny",
        "baseline: relations alone, small images on a CPU",
        {"objective.use": ["relation"]},
        teacher="mae-tiny (mae)",
        sources=RELATION_ALONE,
    ),
    derive(
        _TINY,
        "hybrid-feature-tiny",
        "baseline: features alone, small images on a CPU",
        {"objective.use": ["feature"]},
        teacher="supervised-tiny (supervised)",
        sources=FEATURE_ALONE,
    ),
]

ENTRIES = [_B, _B_100, _L, _L_21K, *_HALVES, _TINY, *_TINY_HALVES]
