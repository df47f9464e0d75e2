"""What a recipe holds: every setting of a training run, with its unit and where its default comes from.

"A7" and the like are sections of docs/methods; where nothing is cited, the default is ours.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from hdcache.distill.amd import AMD
from hdcache.distill.hybrid import Hybrid
from hdcache.distill.logits import Logits
from hdcache.distill.mae import MAE
from hdcache.distill.schedules import scaled_lr
from hdcache.distill.sdssl import SDSSL
from hdcache.distill.supervised import Supervised
from hdcache.distill.tinymim import TinyMIM
from hdcache.photometric import Photometric
from hdcache.records import GrownRecord, Record

AnyObjective = Annotated[TinyMIM | AMD | Hybrid | Logits | Supervised | MAE | SDSSL, Field(discriminator="kind")]


FREE_FIELDS = {"log_every", "save_every_epochs", "save_every_minutes"}
"""What of a recipe a run may change when it goes on."""


class StudentSpec(Record):
    """The network that is trained, and how it starts."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    architecture: str
    """timm's name of a plain VisionTransformer, without pretrained tag."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of timm.create_model: num_heads, img_size and patch_size (pixels), embed_dim, depth ...;
    frames (and tubelet, default 2) make it a network of clips."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Probability of skipping a block's branch for one sample (stochastic depth; TinyMIM A7: 0.1)."""
    drop_path_schedule: Literal["constant", "linear"] = "linear"
    """constant: the same in all blocks (TinyMIM A7); linear: from 0 in the first to drop_path in the last (timm)."""
    drop_path_last_block: bool = True
    """Whether the last block drops paths at all (TinyMIM A7: no)."""
    init: Literal["mae", "timm"] = "mae"
    """Initial weights: mae: Xavier-uniform linears, class token normal std 0.02 (TinyMIM A7); timm: timm's default."""
    sincos_positions: bool = True
    """true: fixed sine-cosine position embedding, 2-D for images (TinyMIM A7), 1-D for clips (AMD); false: learnt."""
    freeze_patch_embed: bool = False
    """Whether the patch projection keeps its random initial weights (MoCo v3; SDSSL B1: true)."""


class Recipe(GrownRecord):
    """Everything that decides a training run, given a store."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    ADDED: ClassVar[frozenset[str]] = frozenset({"data_seed"})

    name: str = Field(min_length=1)
    """What the run is called in reports."""
    objective: AnyObjective
    """The loss and its settings; kind is one of tinymim, amd, hybrid, sdssl, logits, supervised, mae."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Factor of each part of the loss; 1 where none is given (TinyMIM A3: 1 : 1)."""
    student: StudentSpec
    """The network that is trained."""
    jitter: Photometric | None = None
    """Photometric augmentation of the student's images (of its first view, where it has two); null: none."""
    second_jitter: Photometric | None = None
    """Photometric augmentation of the second view; null: as the first."""
    epochs: int = Field(ge=0)
    """Passes over the data (TinyMIM A7: 300, ablations 100); 0 writes the untrained student."""
    batch_size: int = Field(ge=1)
    """Images per optimizer step over all processes and accumulated pieces (TinyMIM A7: 4096)."""
    base_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate per 256 images of batch_size (TinyMIM A7: 1.5e-4); either this or lr."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate itself; either this or base_lr."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine (TinyMIM A7: 0)."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up from 0 (TinyMIM A7: 15)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of its two moments (TinyMIM A7)."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's weight decay, 0 for norms and biases (TinyMIM A7: 0.05)."""
    weight_decay_end: float | None = Field(default=None, ge=0)
    """Weight decay at the end of a cosine over the run; null: constant."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest L2 norm of the whole gradient; null: no clipping (TinyMIM A7)."""
    accumulate: int = Field(default=1, ge=1)
    """Pieces that a step's batch is cut into when it does not fit; a divisor of batch_size."""
    amp: Literal["auto", "bf16", "off"] = "auto"
    """Mixed precision: auto: bf16 where the device computes in it natively, else off (TinyMIM A7: fp16, scaled)."""
    ema: float | None = Field(default=None, ge=0, lt=1)
    """Momentum per step of an averaged copy of the student; null: no copy."""
    ema_end: float | None = Field(default=None, ge=0, le=1)
    """Momentum at the end of a cosine over the run; null: constant."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights, sample order, jitter, drop path and masks."""
    data_seed: int | None = Field(default=None, ge=0)
    """Decides what a student is shown in place of seed (sample order, jitter, without a store also crops), so that students
    of several seeds can train together; what differs between them is then initial weights, drop path and masks. null: seed."""
    buffer_rows: int = Field(default=1024, ge=1)
    """Rows in the shuffle buffer."""
    log_every: int = Field(default=50, ge=1)
    """Optimizer steps between two log lines."""
    save_every_epochs: int = Field(default=1, ge=1)
    """Epochs between two saved states; each comes with a student that can be used."""
    save_every_minutes: float = Field(default=30.0, gt=0)
    """Minutes after which a state is saved within an epoch too."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        if (self.lr is None) == (self.base_lr is None):
            given = "neither is set" if self.lr is None else "both are set"
            faults.append(f"exactly one of lr and base_lr must be given, but {given}; set the other one to null")
        elif self.min_lr > self.peak_lr():
            faults.append(f"min_lr {self.min_lr} is above the peak learning rate {self.peak_lr()}")
        if self.epochs and self.warmup_epochs >= self.epochs:
            faults.append(f"warmup_epochs {self.warmup_epochs} must be smaller than epochs {self.epochs}")
        if self.batch_size % self.accumulate:
            faults.append(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        if not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"betas {list(self.betas)} must lie in [0, 1)")
        if self.ema is None and self.ema_end is not None:
            faults.append("ema_end is set, but ema is null; set both or neither")
        if self.accumulate > 1 and self.objective.compares_rows():
            faults.append(
                f"accumulate {self.accumulate} would cut batches whose rows objective {self.objective.kind!r} compares; set it to 1"
            )
        if self.batch_size < 2 and self.objective.compares_rows():
            faults.append(f"batch_size 1 leaves objective {self.objective.kind!r} nothing to compare; set 2 or more")
        if self.second_jitter is not None and self.objective.fresh_views() < 2:
            faults.append(f"second_jitter is set, but objective {self.objective.kind!r} has one view; set it to null")
        parts = self.objective.parts()
        unknown = sorted(set(self.weights) - set(parts))
        if unknown:
            faults.append(f"weights names {', '.join(unknown)}, but the parts of this loss are {', '.join(parts)}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def augmentations(self) -> tuple[Photometric | None, ...]:
        """Photometric augmentation of each of the student's views."""
        more = self.jitter if self.second_jitter is None else self.second_jitter
        return (self.jitter, *[more] * (self.objective.fresh_views() - 1))

    def order_seed(self) -> int:
        """What decides the order of samples and their jitter."""
        return self.seed if self.data_seed is None else self.data_seed

    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        if self.lr is not None:
            return self.lr
        return scaled_lr(self.base_lr or 0.0, self.batch_size)

    def loss_weights(self) -> dict[str, float]:
        """The factor of every part of the loss."""
        return {part: self.weights.get(part, 1.0) for part in self.objective.parts()}
