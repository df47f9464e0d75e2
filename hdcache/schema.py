"""The records that live on disk, one for each thing that a store speaks of."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, FailFast, Field, field_validator, model_validator

from hdcache.records import MAX_VALUES, CheckedRecord, Facts, GrownRecord, Record, canonical_json, check_key
from hdcache.stored_objects import Objects as Objects
from hdcache.stored_objects import Reasons
from hdcache.stored_objects import StoredObject as StoredObject

FORMAT = 1
MAX_CHANNELS = 1 << 22
"""More than any network is wide or any classifier has classes: a few stored ones of each row become that many when it is read."""


class DatasetCard(GrownRecord):
    """What a data set is, wherever it lies."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"shorter_side"})

    spec: str = ""
    """Where it is (``folder:/data/train``). Not part of any identity, and kept apart on disk: data may move."""
    kind: Literal["folder", "tar", "hf", "torchvision", "npz", "video"]
    fingerprint: str
    """sha256 over the sorted (id, label name, digest of arrays) of every sample."""
    count: int = Field(ge=1, le=MAX_VALUES)
    classes: Annotated[tuple[str, ...], FailFast()] = ()
    """Class names; ``label`` arrays index into them, -1 where a sample has none."""
    shorter_side: int | None = Field(default=None, ge=16, le=8192)
    """Larger images were shrunk to it, once and before any network saw them (:mod:`hdcache.shrinking`); None: none were."""

    @property
    def noun(self) -> str:
        """What messages call its samples."""
        return "videos" if self.kind == "video" else "images"


class ViewSpec(GrownRecord):
    """How the geometry of a view is drawn from (seed, sample id, view). Sizes belong to each network, not here."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"frames", "stride"})

    kind: Literal["random-resized-crop", "multi-scale-crop", "center-crop", "resize"] = "random-resized-crop"
    scale: tuple[float, float] = (0.2, 1.0)
    """random-resized-crop: range of the box's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random-resized-crop: range of width / height, drawn log-uniformly."""
    fraction: float = Field(default=0.875, gt=0, le=1)
    """center-crop: side of the square as a share of the image's shorter side (224 / 256 by default)."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    frames: int | None = Field(default=None, ge=1, le=4096)
    """Frames of a clip, drawn from a video; None: samples are still images."""
    stride: int = Field(default=1, ge=1, le=4096)
    """Frames of the video from one frame of the clip to the next."""
    seed: int = 0

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale {self.scale} must satisfy 0 < low <= high <= 1")
        low, high = self.ratio
        if not 0.001 <= low <= high <= 1000:
            raise ValueError(f"ratio {self.ratio} must satisfy 0.001 <= low <= high <= 1000")
        return self


class Preprocessing(GrownRecord):
    """From the pixels of a view to the input of one network."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"frames"})

    size: int = Field(ge=1, le=8192)
    """Side of the square input, pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    """Pillow's filter, always antialiased (``nearest`` has none)."""
    frames: int | None = Field(default=None, ge=1, le=4096)
    """Frames of a clip; None: the network takes still images."""


class MaskSpec(Record):
    """Which patch tokens a network sees: a function of (seed, sample id, view) (AMD; He et al. 2021)."""

    kind: Literal["random", "tube"]
    """random: any tokens; tube: the same cells of the patch grid in every temporal slot of a clip."""
    ratio: float = Field(gt=0, lt=1)
    """Share of the tokens (tube: of the cells) that stay hidden, rounded down to whole ones."""
    seed: int = Field(default=0, ge=0)


class TeacherCard(GrownRecord):
    """A frozen network: all that decides its outputs."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"slots", "qk_norm", "classes", "mask"})
    UNTOLD: ClassVar[frozenset[str]] = frozenset({"qk_norm", "classes"})
    """Facts that follow from architecture, arguments and weights, and that a record may lack (:meth:`told_by`)."""

    architecture: str
    """timm's name."""
    arguments: Facts = Field(default_factory=dict)
    """Keyword arguments of ``timm.create_model`` beyond the name (``img_size``, ``num_heads`` ...)."""
    weights: str
    """sha256 over the names, shapes and fp32 bytes of the backbone's parameters and buffers."""
    preprocessing: Preprocessing
    patch_size: int
    grid: tuple[int, int]
    """Rows and columns of patch tokens."""
    slots: int = Field(default=1, ge=1)
    """Temporal slots of patch tokens: frames of a clip over the tubelet's length; 1 for still images."""
    prefix_tokens: int
    """Class and register tokens in front of the patch tokens."""
    class_token: bool
    width: int
    depth: int
    heads: int
    qk_norm: bool = False
    """Whether attention normalises queries and keys per head."""
    classes: int = Field(default=0, ge=0)
    """Outputs of its classifier; 0: it was loaded without one (only the tap logits needs it)."""
    mask: MaskSpec | None = None
    """Which tokens it is run on; None: all of them."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic of the forward pass (bf16: autocast)."""

    @property
    def tokens(self) -> int:
        """Patch tokens of a whole input, seen or not."""
        return self.slots * self.grid[0] * self.grid[1]

    def told_by(self, live: TeacherCard) -> TeacherCard:
        """This card of a record, with what the record may lack filled in from the network that was loaded for it."""
        lacking = [name for name in self.UNTOLD if getattr(self, name) == type(self).model_fields[name].default]
        return self.model_copy(update={name: getattr(live, name) for name in lacking})


ITEM_BYTES = {"float32": 4, "float16": 2, "uint16": 2, "int8": 1, "int16": 2, "uint8": 1, "int32": 4, "int64": 8}


class ArrayCard(Record):
    """One array of a tap or an encoding: shape and dtype of one row (or of the whole, for constants)."""

    shape: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: Literal["float32", "float16", "uint16", "int8", "int16", "uint8", "int32", "int64"]

    @field_validator("shape")
    @classmethod
    def _bounded(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(value) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        return value


class Certificate(GrownRecord):
    """What storing a tap cost, measured on held-out rows when it was written (its birth certificate)."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"bound_bits"})

    calibration_rows: int
    heldout_rows: int
    relative_rmse: float
    """RMSE over the standard deviation of the centred patch tokens (topk: of the probabilities)."""
    cosine_mean: float
    cosine_min: float
    bits_per_value: float
    """Compressed bits per stored patch value on the held-out rows."""
    kl_qk: float | None = None
    """``attn_in`` taps: mean KL of the rebuilt Q-K relations from the exact ones, nats per row."""
    kl_vv: float | None = None
    kl: float | None = None
    """Relation taps and soft labels: mean KL of what is stored from the exact distribution, nats per row."""
    saturated: int = 0
    """Held-out values that fell outside the integer range."""
    bound_bits: float | None = None
    """klt: bits per value below which no code of single Gaussian tokens has this error (reverse water-filling over the
    calibration rows' components). A code that uses what neighbouring tokens share may lie below it."""


class TapCard(GrownRecord):
    """One stored tap: its encoding, shapes and birth certificate."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"grid", "dead_zone", "block_bytes", "typesize", "code_precision"})

    tap: str
    encoding: Literal["fp32", "fp16", "bf16", "int8", "klt", "sqrt8", "topk"]
    fidelity: float | None = None
    """Relative RMSE that was asked for (klt)."""
    tokens: int
    channels: int = Field(ge=1, le=MAX_CHANNELS)
    prefix_tokens: int
    arrays: dict[str, ArrayCard]
    """Per-row arrays, in ``views/K/TAP/``."""
    constants: dict[str, ArrayCard] = Field(default_factory=dict)
    """Arrays shared by all rows, in ``encodings/TAP/``."""
    grid: tuple[int, ...] | None = None
    """klt: codes are those of an orthonormal DCT-II over a token grid of these sides; None: of the tokens themselves."""
    dead_zone: float = Field(default=0.0, ge=0, lt=0.5)
    """klt: how much later than half a step a value was rounded up, in steps."""
    block_bytes: int = Field(default=0, ge=0, le=1 << 30)
    """Size of the codec's blocks; 0: its own choice."""
    typesize: Literal[0, 2] = 0
    """klt: 2 where the codec takes ``codes`` two bytes at a time; 0: one at a time."""
    code_precision: Literal["fp32", "bf16"] = "fp32"
    """klt: precision of the products that made the codes."""
    certificate: Certificate

    @model_validator(mode="after")
    def _fits_encoding(self) -> Self:
        rows = {name: card.shape for name, card in self.arrays.items() if name != "prefix"}
        constants = {"klt": {"basis", "mean", "step"}, "int8": {"scale", "offset"}}.get(self.encoding, set())
        if self.encoding == "klt" and "gain" in self.constants:
            constants.add("gain")
        if self.encoding in ("klt", "int8"):
            names = {"codes", "wide"} if self.encoding == "klt" else {"codes"}
            good = bool(rows) and rows.keys() <= names and all(shape[1:] == (self.tokens,) for shape in rows.values())
            good = good and (
                self.grid is None or (min(self.grid, default=0) > 0 and math.prod(self.grid) == self.tokens)
            )
        elif self.encoding == "topk":
            kept = rows.get("values", ())
            good = rows == {"values": kept, "classes": kept} and len(kept) == 1 and kept[0] <= self.channels
        else:
            good = rows.keys() == {"values"} and (not self.tokens or rows["values"] == (self.tokens, self.channels))
        prefix = self.arrays["prefix"].shape if "prefix" in self.arrays else (0, self.channels)
        if not good or self.constants.keys() != constants or prefix != (self.prefix_tokens, self.channels):
            raise ValueError(f"arrays and constants are not those of a {self.encoding} tap")
        return self

    @property
    def bytes_per_row(self) -> float:
        """Bytes on disk of one row: its values at the measured rate, and its prefix tokens, which no codec shrinks."""
        prefix = self.arrays.get("prefix")
        raw = math.prod(prefix.shape) * ITEM_BYTES[prefix.dtype] if prefix else 0
        return math.prod(self.row) * self.certificate.bits_per_value / 8 + raw

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of a decoded row; of a token tap, of its patch tokens."""
        if self.tokens:
            return self.tokens, self.channels
        return (self.channels,) if self.encoding == "topk" else self.arrays["values"].shape


class TapRequest(GrownRecord):
    """A tap as asked for: the part of a tap's identity that exists before calibration."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"top_k", "row_budget"})

    tap: str
    encoding: Literal["fp32", "fp16", "bf16", "int8", "klt", "sqrt8", "topk"]
    fidelity: float | None = None
    top_k: int | None = Field(default=None, ge=1)
    """Classes to keep of each row of logits (topk)."""
    row_budget: int | None = Field(default=None, ge=0)
    """klt: bytes that a row of all the teacher's taps together may need, in place of a fidelity."""


class StoreCard(Record):
    """The root of a store: what never changes once it exists."""

    format: int = FORMAT
    dataset: DatasetCard
    views: ViewSpec
    rows_per_shard: int = Field(default=256, ge=1, le=1_000_000)
    rows_per_chunk: int = Field(default=8, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _whole_chunks(self) -> Self:
        if self.rows_per_shard % self.rows_per_chunk:
            raise ValueError(
                f"rows_per_shard {self.rows_per_shard} is not a multiple of rows_per_chunk {self.rows_per_chunk}"
            )
        return self


class TeacherRecord(Record):
    """A teacher inside a store, written before its first row and never changed."""

    name: str
    card: TeacherCard
    taps: dict[str, TapCard]
    requests: Annotated[tuple[TapRequest, ...], FailFast()]
    dataset: str
    """Fingerprint of the data set."""
    views: ViewSpec
    weights: dict[Annotated[str, AfterValidator(check_key)], ArrayCard] = Field(default_factory=dict)
    """Frozen pieces that derive targets (``block9/qkv_weight`` ...), in ``weights/``."""
    attention: Facts = Field(default_factory=dict)
    """Per tapped block: heads, and the kind and epsilon of its Q/K norm, if any."""
    objects: Objects = Field(default_factory=dict)
    """Files of the constants and weights, relative to the teacher's folder."""
    batch: int = Field(ge=1)
    """Images per forward pass; a rerun and ``--online`` use the same, so that results agree to the bit."""
    source: str = ""
    """Where the weights came from; not part of the identity."""
    licence: str = "unknown"

    def identity(self) -> dict[str, Any]:
        """All that changes stored values, and nothing that does not."""
        dump = self.model_dump(mode="json", include={"card", "requests", "dataset", "views"})
        return dict(dump)

    def identity_digest(self) -> str:
        """sha256 of :meth:`identity`."""
        return hashlib.sha256(canonical_json(self.identity())).hexdigest()


class Receipt(CheckedRecord):
    """Proof that one shard is complete; written after its objects are durable."""

    shard: int = Field(ge=0)
    rows: tuple[int, int]
    objects: Objects
    """Relative to the folder that holds ``receipts/``."""
    failed: Reasons = Field(default_factory=dict)
    """Row -> reason, for rows whose image could not be read or whose features were not finite."""
    saturated: int = 0
    """Values clipped to their integer range while encoding."""


class Manifest(CheckedRecord):
    """The seal of one (teacher, view): every object with size and sha256."""

    format: int = FORMAT
    teacher: str
    identity: str
    """sha256 of the teacher's identity."""
    view: int = Field(ge=0)
    rows: int
    objects: Objects
    """Relative to the store's root: the view's arrays, the teacher's constants and metadata."""
    failed: Reasons = Field(default_factory=dict)
    saturated: int = 0
