"""One forward of a timm ViT that yields the named inner tensors and stops at the last one asked for.

Legend: B images, P prefix tokens (class, registers), N patch tokens, T = P + N, D width, H heads, K head width.

===================  =======================================================================  ==================
name                 what it is                                                               value
===================  =======================================================================  ==================
``blockN.out``       residual stream after block N (1-based)                                  Tokens, D
``blockN.attn_in``   what the block's QKV reads: norm1 of its input                           Tokens, D
``blockN.qkv``       queries, keys, values side by side, before any Q/K norm                  Tokens, 3 H K
``blockN.attn_out``  attention's branch, scaled (layer scale), before it is added                  Tokens, D
``blockN.mid``       residual stream between attention and MLP                                Tokens, D
``blockN.mlp_out``   the MLP's branch, scaled, before it is added                             Tokens, D
``blockN.rel.XY``    token relations, XY in qk, vv, qq, kk; ``@H`` splits into H heads        [B, H, T, T]
``final``            after the last norm                                                      Tokens, D
``pooled``           what timm's head pools                                                   [B, D]
``logits``           the classifier's output                                                  [B, classes]
===================  =======================================================================  ==================

Student and teacher go through the same code, with and without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hdcache.errors import UsageError
from hdcache.relations import relation, split_part
from hdcache.tap_names import BRANCHES, READS_ATTENTION
from hdcache.tap_names import TapName as TapName
from hdcache.tap_names import parse_tap as parse_tap

if TYPE_CHECKING:
    # Seconds to load, and not needed to read a store or to list recipes.
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block


@dataclass(frozen=True)
class Tokens:
    """Token features with prefix and patch tokens apart."""

    prefix: Tensor
    """[B, P, D]: class token first, then registers; P may be 0."""
    patches: Tensor
    """[B, N, D] in row-major order of the patch grid."""

    def sequence(self) -> Tensor:
        """[B, P + N, D] as the network itself has it."""
        return torch.cat([self.prefix, self.patches], dim=1) if self.prefix.shape[1] else self.patches


@dataclass(frozen=True, eq=False)
class Coded:
    """Token features that are one affine map away; a linear layer that follows can be joined with it."""

    prefix: Tensor
    """[B, P, D], as they are."""
    blocks: Iterable[Tensor]
    """[b, N, K] each: patch tokens before the map, all rows in order, at least one block; made anew for each loop."""
    inverse: Tensor
    """[K, D], the same tensor for every batch."""
    mean: Tensor
    """[D]."""

    def tokens(self) -> Tokens:
        """The features themselves."""
        return Tokens(self.prefix, self.mapped([(self.inverse.T, self.mean)])[0])

    def mapped(self, layers: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Codes through linear layers, each a weight [E, K] and a bias [E]: [B, N, E] each, not differentiable."""
        found: list[Tensor] = []
        start = 0
        with torch.no_grad():
            for codes in self.blocks:
                found = found or [codes.new_empty(len(self.prefix), codes.shape[1], len(bias)) for _, bias in layers]
                for whole, (weight, bias) in zip(found, layers, strict=True):
                    here = whole[start : start + len(codes)].flatten(0, 1)
                    torch.addmm(bias, codes.flatten(0, 1), weight.T, out=here)
                start += len(codes)
        return found


Drop = Callable[[int, Tokens], Tensor | None]
"""Called after block N (1-based) with its output: int64 [B, K] ascending positions of the patch tokens to go on with,
or None to keep all."""


def num_blocks(model: nn.Module) -> int:
    """Depth of a supported ViT; :class:`UsageError` names what is not supported."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise UsageError(
            f"{type(model).__name__} is not a plain timm VisionTransformer; "
            "windowed, hybrid and rotary (EVA, DINOv3) networks cannot be tapped yet"
        )
    return len(model.blocks)


def attention_of(model: nn.Module, block: int) -> Attention:
    """The attention of a 1-based block, if its queries, keys and values can be read as timm's plain ones are.

    Raises
    ------
    UsageError
        saying which kind of attention or block cannot be read.
    """
    from timm.layers.attention import Attention

    layer = _plain_block(model, block)
    if type(layer.attn) is not Attention:
        raise UsageError(
            f"block{block} has {type(layer.attn).__name__}, whose queries and keys need not be those of plain attention "
            f"(rotary, windowed, differential); tap block{block}.out instead"
        )
    return layer.attn


def check_readable(model: nn.Module, tap: TapName) -> None:
    """:class:`UsageError` where the inside of a block that ``tap`` names cannot be read."""
    if tap.what in READS_ATTENTION:
        attention_of(model, tap.block)
    elif tap.what in BRANCHES:
        _plain_block(model, tap.block)


def _plain_block(model: nn.Module, block: int) -> Block:
    from timm.models.vision_transformer import Block

    num_blocks(model)
    layer: nn.Module = model.blocks[block - 1]  # type: ignore[index, assignment]  # nn.Module's attributes are untyped
    if type(layer) is not Block:  # a subclass may do something else
        raise UsageError(
            f"block{block} is a {type(layer).__name__}: its attention need not read norm1 of the block's input, nor its "
            f"branches be added one after the other; tap block{block}.out instead"
        )
    return layer


def forward_taps(
    model: nn.Module, images: Tensor, names: Sequence[str], keep: Tensor | None = None, drop: Drop | None = None
) -> dict[str, Tokens | Tensor]:
    """Run ``model`` on ``images`` and return the named taps; nothing after the last of them is computed.

    Parameters
    ----------
    images
        float [B, 3, H, W], or [B, 3, F, H, W] for a network of clips, normalised for ``model``.
    names
        tap names, see the table above.
    keep
        int64 [B, M], ascending indices of the patch tokens to run on (masked encoders); all when None.
    drop
        which patch tokens to go on with after each block; a block's own taps still hold those it ran on.

    Raises
    ------
    UsageError
        for an unknown name, a block that does not exist, or an attention that cannot be read.
    """
    depth = num_blocks(model)
    wanted = [parse_tap(name, depth) for name in names]
    for tap in wanted:
        if tap.block:
            check_readable(model, tap)
        if tap.what == "logits" and not getattr(model, "num_classes", 0):
            raise UsageError("tap 'logits': the network has no classifier (num_classes is 0)")
    last = max((depth if tap.block == 0 else tap.block for tap in wanted), default=0)
    after = [tap for tap in wanted if tap.block == 0]
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]  # nn.Module's attributes are untyped
    found: dict[str, Tokens | Tensor] = {}

    x_BTD = embed_tokens(model, images, keep)
    for number in range(1, last + 1):
        inside = [tap for tap in wanted if tap.block == number]
        reads = [tap for tap in inside if tap.what in READS_ATTENTION]
        if reads:
            found.update(_attention_taps(model, number, x_BTD, reads, prefix))
        branches = [tap for tap in inside if tap.what in BRANCHES]
        # The block itself is needed for its own output, for a later block, and for what follows the last block.
        goes_on = number < last or bool(after) or any(tap.what == "out" for tap in inside)
        if branches:
            x_BTD = _branch_taps(_plain_block(model, number), x_BTD, branches, prefix, goes_on, found)
        elif goes_on:
            x_BTD = model.blocks[number - 1](x_BTD)  # type: ignore[index, operator]  # nn.Module's attributes are untyped
        for tap in inside:
            if tap.what == "out":
                found[tap.name] = _tokens(x_BTD, prefix)
        if drop is not None and (number < last or after):
            kept = drop(number, _tokens(x_BTD, prefix))
            x_BTD = x_BTD if kept is None else gather_patches(x_BTD, kept, prefix)
    if after:
        x_BTD = model.norm(x_BTD)  # type: ignore[operator]  # nn.Module's attributes are untyped
    for tap in after:
        if tap.what == "final":
            found["final"] = _tokens(x_BTD, prefix)
        else:
            found[tap.name] = model.forward_head(x_BTD, pre_logits=tap.what == "pooled")  # type: ignore[operator]  # nn.Module's attributes are untyped
    return {name: found[name] for name in names}


def embed_tokens(model: nn.Module, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Patch embedding, prefix tokens, positions: the input of block 1, [B, P + N, D] (or P + M with ``keep``)."""
    x = model.patch_embed(images)  # type: ignore[operator]  # nn.Module's attributes are untyped
    x = model._pos_embed(x)  # type: ignore[operator]  # nn.Module's attributes are untyped
    if keep is not None:
        x = gather_patches(x, keep, int(model.num_prefix_tokens))  # type: ignore[arg-type]  # nn.Module's attributes are untyped
    x = model.patch_drop(x)  # type: ignore[operator]  # nn.Module's attributes are untyped
    return model.norm_pre(x)  # type: ignore[operator, no-any-return]  # nn.Module's attributes are untyped


def gather_patches(x_BTD: Tensor, positions: Tensor, prefix: int) -> Tensor:
    """The prefix tokens and the patch tokens at ``positions`` int64 [B, M]: [B, P + M, D]."""
    index = (positions + prefix).unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1])
    kept = x_BTD.gather(1, index)
    return torch.cat([x_BTD[:, :prefix], kept], dim=1) if prefix else kept


def _tokens(x_BTD: Tensor, prefix: int) -> Tokens:
    return Tokens(x_BTD[:, :prefix], x_BTD[:, prefix:])


def _attention_taps(
    model: nn.Module, number: int, x_BTD: Tensor, taps: Sequence[TapName], prefix: int
) -> Mapping[str, Tokens | Tensor]:
    attention = attention_of(model, number)
    attn_in = model.blocks[number - 1].norm1(x_BTD)  # type: ignore[index, union-attr]
    found: dict[str, Tokens | Tensor] = {}
    qkv = attention.qkv(attn_in) if any(tap.what != "attn_in" for tap in taps) else None
    for tap in taps:
        if tap.what == "attn_in":
            found[tap.name] = _tokens(attn_in, prefix)
        elif tap.what == "qkv":
            assert qkv is not None  # noqa: S101  # programmer invariant
            found[tap.name] = _tokens(qkv, prefix)
        else:
            assert qkv is not None  # noqa: S101
            found[tap.name] = relation_of_qkv(attention, qkv, tap.kind, tap.heads)
    return found


def _branch_taps(
    layer: Block, x_BTD: Tensor, taps: Sequence[TapName], prefix: int, goes_on: bool, found: dict[str, Tokens | Tensor]
) -> Tensor:
    """timm's ``Block.forward`` one addition at a time, no further than needed: puts ``taps`` into ``found``."""
    values = {"attn_out": layer.ls1(layer.attn(layer.norm1(x_BTD)))}
    x_BTD = values["mid"] = x_BTD + layer.drop_path1(values["attn_out"])
    if goes_on or any(tap.what == "mlp_out" for tap in taps):
        values["mlp_out"] = layer.ls2(layer.mlp(layer.norm2(x_BTD)))
    if goes_on:
        x_BTD = x_BTD + layer.drop_path2(values["mlp_out"])
    found.update({tap.name: _tokens(values[tap.what], prefix) for tap in taps})
    return x_BTD


def relation_of_qkv(attention: nn.Module, qkv_BTE: Tensor, kind: str, heads: int | None = None) -> Tensor:
    """Softmaxed token relation [B, H, T, T] of a block's ``qkv`` output [B, T, 3 H K].

    With the block's own head count, Q and K pass its Q/K norm as in its own attention. Another head count
    (``heads``) cannot: the norms are sized for the block's heads, and such a block is refused. Values have no norm.
    """
    q, k, v = qkv_BTE.chunk(3, dim=-1)
    return relation_of_parts(attention, {"q": q, "k": k, "v": v}, kind, heads)


def relation_of_parts(attention: nn.Module, parts: Mapping[str, Tensor], kind: str, heads: int | None = None) -> Tensor:
    """As :func:`relation_of_qkv`, of those of Q, K and V, each [B, T, H K], that ``kind`` relates."""
    own = int(attention.num_heads)  # type: ignore[arg-type]  # nn.Module's attributes are untyped
    normed = kind != "vv" and not (
        isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    )
    if normed and heads not in (None, own):
        raise UsageError(f"relations with {heads} heads: the block normalises Q and K for its own {own} heads")
    found = {letter: split_part(parts[letter], heads or own) for letter in set(kind)}
    if normed:
        norms = {"q": attention.q_norm, "k": attention.k_norm}
        found = {letter: norms[letter](value) for letter, value in found.items()}  # type: ignore[operator]  # nn.Module's attributes are untyped
    return relation(found[kind[0]], found[kind[1]])
