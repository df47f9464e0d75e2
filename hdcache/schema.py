"""The records that live on disk: frozen, closed, and with one canonical spelling.

Everything here can be read without torch or zarr. A record that comes from a store is untrusted: unknown
fields, wrong types and unsafe names are refused while parsing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hdcache.errors import StoreCorrupt, UsageError

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
KEY = re.compile(r"[A-Za-z0-9._@/-]{1,512}")
# A row beyond this is no feature; it bounds what a hostile record can make a reader allocate.
MAX_VALUES = 1 << 32


class Record(BaseModel):
    """A frozen record; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical(self) -> bytes:
        """The one JSON spelling of this record: sorted keys, no spaces, UTF-8."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """sha256 of :meth:`canonical`, hexadecimal."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @classmethod
    def parse(cls, data: object, where: str | Path) -> Self:
        """Validate ``data`` read from ``where``; :class:`StoreCorrupt` names the first wrong field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise StoreCorrupt(f"{where}: {first_fault(error)}") from None


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def first_fault(error: ValidationError) -> str:
    """One line for the first fault that pydantic found: field, reason, value."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"]) or "record"
    where = (where if where.isprintable() else ascii(where))[:160]  # keys of a hostile record may hold anything
    value = repr(fault.get("input"))
    return f"{where}: {fault['msg']} (found {value[:80]})"


def check_name(name: str, what: str) -> str:
    """``name`` if it may be a folder of a store; :class:`UsageError` otherwise."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{what} {name!r} may hold only letters, digits, '.', '_', '-', and start with a letter or digit"
        )
    return name


def check_key(key: str) -> str:
    """``key`` if it is a safe relative object key (no absolute path, ``..`` or empty segment)."""
    if not KEY.fullmatch(key) or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"unsafe object key {key!r}")
    return key


class DatasetCard(Record):
    """What a data set is, wherever it lies."""

    spec: str = ""
    """Where it is (``folder:/data/train``). Not part of any identity, and kept apart on disk: data may move."""
    kind: Literal["folder", "tar", "hf", "torchvision", "npz"]
    fingerprint: str
    """sha256 over the sorted (id, label name, digest of arrays) of every sample."""
    count: int = Field(ge=1, le=MAX_VALUES)
    classes: tuple[str, ...] = ()
    """Class names; ``label`` arrays index into them, -1 where a sample has none."""


class ViewSpec(Record):
    """How the geometry of a view is drawn from (seed, sample id, view). Sizes belong to each network, not here."""

    kind: Literal["random-resized-crop", "center-crop", "resize"] = "random-resized-crop"
    scale: tuple[float, float] = (0.2, 1.0)
    """random-resized-crop: range of the box's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random-resized-crop: range of width / height, drawn log-uniformly."""
    fraction: float = Field(default=0.875, gt=0, le=1)
    """center-crop: side of the square as a share of the image's shorter side (224 / 256 by default)."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
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


class Preprocessing(Record):
    """From the pixels of a view to the input of one network."""

    size: int = Field(ge=1, le=8192)
    """Side of the square input, pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    """Pillow's filter, always antialiased (``nearest`` has none)."""


def _spellable(value: dict[str, Any]) -> dict[str, Any]:
    canonical_json(value)  # raises ValueError for NaN, infinities and lone surrogates
    return value


Facts = Annotated[dict[str, Any], AfterValidator(_spellable)]
"""Free JSON: whatever a library calls its settings."""


class TeacherCard(Record):
    """A frozen network: all that decides its outputs."""

    architecture: str
    """timm's name."""
    arguments: Facts = {}
    """Keyword arguments of ``timm.create_model`` beyond the name (``img_size``, ``num_heads`` ...)."""
    weights: str
    """sha256 over the names, shapes and fp32 bytes of the backbone's parameters and buffers."""
    preprocessing: Preprocessing
    patch_size: int
    grid: tuple[int, int]
    """Rows and columns of patch tokens."""
    prefix_tokens: int
    """Class and register tokens in front of the patch tokens."""
    class_token: bool
    width: int
    depth: int
    heads: int
    precision: Literal["fp32", "bf16"]
    """Arithmetic of the forward pass (bf16: autocast)."""


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


class Certificate(Record):
    """What storing a tap cost, measured on held-out rows when it was written (its birth certificate)."""

    calibration_rows: int
    heldout_rows: int
    relative_rmse: float
    """RMSE over the standard deviation of the centred patch tokens."""
    cosine_mean: float
    cosine_min: float
    bits_per_value: float
    """Compressed bits per stored patch value on the held-out rows."""
    kl_qk: float | None = None
    """``attn_in`` taps: mean KL of the rebuilt Q-K relations from the exact ones, nats per row."""
    kl_vv: float | None = None
    kl: float | None = None
    """Relation taps: mean KL of the stored matrix from the exact one, nats per row."""
    saturated: int = 0
    """Held-out values that fell outside the integer range."""


class TapCard(Record):
    """One stored tap: its encoding, shapes and birth certificate."""

    tap: str
    encoding: Literal["fp32", "fp16", "bf16", "int8", "klt", "sqrt8"]
    fidelity: float | None = None
    """Relative RMSE that was asked for (klt)."""
    tokens: int
    channels: int
    prefix_tokens: int
    arrays: dict[str, ArrayCard]
    """Per-row arrays, in ``views/K/TAP/``."""
    constants: dict[str, ArrayCard] = {}
    """Arrays shared by all rows, in ``encodings/TAP/``."""
    certificate: Certificate

    @model_validator(mode="after")
    def _fits_encoding(self) -> Self:
        rows = {name: card.shape for name, card in self.arrays.items() if name != "prefix"}
        constants = {"klt": {"basis", "mean", "step"}, "int8": {"scale", "offset"}}.get(self.encoding, set())
        if self.encoding in ("klt", "int8"):
            names = {"codes", "wide"} if self.encoding == "klt" else {"codes"}
            good = bool(rows) and rows.keys() <= names and all(shape[1:] == (self.tokens,) for shape in rows.values())
        else:
            good = rows.keys() == {"values"} and (not self.tokens or rows["values"] == (self.tokens, self.channels))
        prefix = self.arrays["prefix"].shape if "prefix" in self.arrays else (0, self.channels)
        if not good or self.constants.keys() != constants or prefix != (self.prefix_tokens, self.channels):
            raise ValueError(f"arrays and constants are not those of a {self.encoding} tap")
        return self


class About(Record):
    """What may change without changing a store: where things came from. ``about.json``, which no seal covers."""

    data: str = ""
    """Spec of the data set when the store was made."""
    source: str = ""
    """Where a teacher's weights came from."""
    written_with: dict[str, str] = {}
    """Versions of what wrote it (hdcache, zarr, pillow ...)."""


class TapRequest(Record):
    """A tap as asked for: the part of a tap's identity that exists before calibration."""

    tap: str
    encoding: Literal["fp32", "fp16", "bf16", "int8", "klt", "sqrt8"]
    fidelity: float | None = None


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


class StoredObject(Record):
    """Size in bytes and sha256 of one file of the store."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


Objects = dict[Annotated[str, AfterValidator(check_key)], StoredObject]
"""Files by a key that cannot leave the folder it is relative to."""


class TeacherRecord(Record):
    """A teacher inside a store, written before its first row and never changed."""

    name: str
    card: TeacherCard
    taps: dict[str, TapCard]
    requests: tuple[TapRequest, ...]
    dataset: str
    """Fingerprint of the data set."""
    views: ViewSpec
    weights: dict[Annotated[str, AfterValidator(check_key)], ArrayCard] = {}
    """Frozen pieces that derive targets (``block9/qkv_weight`` ...), in ``weights/``."""
    attention: Facts = {}
    """Per tapped block: heads, and the kind and epsilon of its Q/K norm, if any."""
    objects: Objects = {}
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


class Receipt(Record):
    """Proof that one shard is complete; written after its objects are durable."""

    shard: int = Field(ge=0)
    rows: tuple[int, int]
    objects: Objects
    """Relative to the folder that holds ``receipts/``."""
    failed: dict[int, str] = {}
    """Row -> reason, for rows whose image could not be read or whose features were not finite."""
    saturated: int = 0
    """Values clipped to their integer range while encoding."""


class Manifest(Record):
    """The seal of one (teacher, view): every object with size and sha256."""

    format: int = FORMAT
    teacher: str
    identity: str
    """sha256 of the teacher's identity."""
    view: int = Field(ge=0)
    rows: int
    objects: Objects
    """Relative to the store's root: the view's arrays, the teacher's constants and metadata."""
    failed: dict[int, str] = {}
    saturated: int = 0


def differences(asked: Any, found: Any, path: str = "") -> list[str]:
    """Lines ``path: found -> asked`` for every leaf in which two JSON values differ."""
    if isinstance(asked, dict) and isinstance(found, dict):
        lines = []
        for key in sorted({*asked, *found}):
            lines += differences(asked.get(key), found.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if isinstance(asked, list) and isinstance(found, list) and len(asked) == len(found):
        return [
            line
            for i, (a, f) in enumerate(zip(asked, found, strict=True))
            for line in differences(a, f, f"{path}[{i}]")
        ]
    return [] if asked == found else [f"{path}: the store has {found!r}, asked was {asked!r}"]
