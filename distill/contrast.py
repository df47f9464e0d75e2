"""The losses of SDSSL's three frameworks (Jang et al., arXiv 2111.12958) as functions of projections.

They follow the released code: ``pl_train_moco.py`` (NCE), ``pl_train_byol.py`` (cosine distance) and
``pl_train_simclr.py`` (NT-Xent). Inputs need not be normalised; arithmetic is float32. Keys are gathered over all
processes, so that the mean over ranks is the loss of the global batch.

Legend: L layers, the last one last; B images of this process, each there once; K channels of a projection; G images
of all processes. ``first`` and ``second`` are the two views.

Negatives are the other images of the global batch. A global batch holds each image at most once (an epoch is a
permutation), so no negative shows the image of its query.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from hdcache.distill.collective import gather_rows

Distance = Callable[[Tensor, Tensor], Tensor]
"""(predictions [L, B, K], targets [B, K]) -> the mean over L B rows."""


def unit(x: Tensor) -> Tensor:
    """``x`` in float32 with L2 norm 1 along its last dimension."""
    return normalize(x.float(), dim=-1)


def similarities(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of ``queries`` [L, B, K] with normalised ``keys`` [G, K], in float32 whatever the mixed precision."""
    with torch.autocast(keys.device.type, enabled=False):
        return unit(queries) @ keys.T


def info_nce(predictions: Tensor, targets: Tensor, tau: float) -> Tensor:
    """Cross-entropy of finding each image among the targets of all images, by cosine / ``tau``.

    ``predictions`` [L, B, K] and ``targets`` [B, K], which get no gradient. The mean is over L B rows.
    """
    keys, start = gather_rows(unit(targets.detach()))
    places = torch.arange(start, start + predictions.shape[1], device=keys.device)
    logits = similarities(predictions, keys) / tau
    return cross_entropy(logits.flatten(0, 1), places.repeat(len(predictions)))


def scaled_info_nce(predictions: Tensor, targets: Tensor, tau: float) -> Tensor:
    """MoCo v3's loss: 2 tau :func:`info_nce` (Chen, Xie, He 2021, Alg. 1)."""
    return 2 * tau * info_nce(predictions, targets, tau)


def cosine_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL's loss, 2 - 2 cosine, as a mean over L B rows; ``targets`` [B, K] get no gradient (Grill et al. 2020, Eq. 2)."""
    return (2 - 2 * (unit(predictions) * unit(targets.detach())).sum(-1)).mean()


def nt_xent(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], tau: float) -> Tensor:
    """SimCLR's loss: each query finds the other view of its image among the keys of both views of all images.

    ``queries`` are [L, B, K] and ``keys`` [B, K] of the first and the second view. The key of the query's own image
    and view is left out. Gradient reaches both; detach keys that are to be targets. The mean is over 2 L B rows.
    """
    gathered, starts = zip(*(gather_rows(unit(view)) for view in keys), strict=True)
    every = torch.cat(gathered)
    total, rows = len(gathered[0]), queries[0].shape[1]
    own = torch.arange(starts[0], starts[0] + rows, device=every.device)
    losses = []
    for view, other in ((0, 1), (1, 0)):
        logits = similarities(queries[view], every) / tau
        same = torch.zeros(rows, 2 * total, dtype=torch.bool, device=every.device)
        same[torch.arange(rows, device=every.device), own + view * total] = True
        logits = logits.masked_fill(same, -torch.inf)
        losses.append(cross_entropy(logits.flatten(0, 1), (own + other * total).repeat(len(logits))))
    return (losses[0] + losses[1]) / 2


def predicted_parts(
    distance: Distance,
    predictions: tuple[Tensor, Tensor],
    detached: tuple[Tensor, Tensor] | None,
    targets: tuple[Tensor, Tensor],
    middle_targets: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Losses with predictors (MoCo v3, BYOL), each summed over the two pairings of views.

    Parameters
    ----------
    distance
        :func:`scaled_info_nce` with its tau, or :func:`cosine_distance`.
    predictions
        [L, B, K] of the first and of the second view.
    detached
        the predictors' outputs for detached projections, [L, B, K]; None: no ``det``.
    targets
        [B, K] that go with ``predictions``: each from another view of the same image.
    middle_targets
        those of layers 1 to L - 1, where they differ.

    Returns
    -------
    dict
        ``out``: of the last layer. ``mid``: mean over layers 1 to L - 1, where there are any. ``det``: mean over
        layers 1 to L, where ``detached`` is given.
    """
    middle = targets if middle_targets is None else middle_targets
    parts = {"out": _summed(distance, [p[-1:] for p in predictions], targets)}
    if len(predictions[0]) > 1:
        parts["mid"] = _summed(distance, [p[:-1] for p in predictions], middle)
    if detached is not None:
        depth = len(detached[0])
        last = _summed(distance, [p[-1:] for p in detached], targets)
        rest = _summed(distance, [p[:-1] for p in detached], middle) if depth > 1 else last
        parts["det"] = (last + (depth - 1) * rest) / depth
    return parts


def contrasted_parts(projections: tuple[Tensor, Tensor], tau: float) -> dict[str, Tensor]:
    """SimCLR's losses of projections [L, B, K] of the first and the second view.

    ``out``: NT-Xent of the last layer. ``mid``, where L > 1: the mean over layers 1 to L - 1 of the same loss with
    those layers as queries and the detached last layer as keys.
    """
    last = projections[0][-1], projections[1][-1]
    parts = {"out": nt_xent((last[0].unsqueeze(0), last[1].unsqueeze(0)), last, tau)}
    if len(projections[0]) > 1:
        lower = projections[0][:-1], projections[1][:-1]
        parts["mid"] = nt_xent(lower, (last[0].detach(), last[1].detach()), tau)
    return parts


def _summed(distance: Distance, predictions: list[Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    first, second = (distance(p, z) for p, z in zip(predictions, targets, strict=True))
    return first + second
