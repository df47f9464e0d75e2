"""k-NN accuracy of a student while it trains, layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from torch import nn

from hdcache.backbones import Backbone
from hdcache.datasets import Dataset
from hdcache.errors import UsageError
from hdcache.evaluate.embed import FRACTION, Features, check_pool, embed_layers
from hdcache.evaluate.run import chosen_layers, classify, open_labelled
from hdcache.evaluate.vote import TEMPERATURE, check_settings
from hdcache.options import Trained
from hdcache.schema import Preprocessing

NEIGHBOURS = 20
"""As in SDSSL (Jang et al. 2021, released code pl_train_moco.py)."""


def knn_monitor(
    train: str,
    test: str | None = None,
    *,
    layers: str | Sequence[str] | None = None,
    pool: str | None = None,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    crop: float = FRACTION,
    stride: int | None = None,
    batch_size: int = 64,
    threads: int | None = None,
) -> Callable[[nn.Module, Preprocessing, Trained], dict[str, float]]:
    """What ``distill`` calls with (student, its input, how it trains): layer -> top-1.

    The data sets are opened here, once; the student is scored as :func:`hdcache.evaluate.run.knn_eval` scores a
    written one, in percent, on the device where it is, in evaluation mode, and comes back in the mode it had. No random number is
    drawn. ``layers`` is one, several, ``all``, or None for the last trained one. Without ``test`` each image of
    ``train`` is classified by the others. A ``k`` above the size of the bank is lowered to it. ``stride`` is that of the
    clips that a student of clips is shown; None: the one it is trained with. Samples that cannot be read are left out, and
    counted on stderr when they are first met.

    Raises
    ------
    UsageError
        here for settings that cannot be meant and data without labels; when called, for a layer that the student lacks.
    InputNotFound
        for data that is not there.
    """
    check_settings([k], temperature)
    if not 0 < crop <= 1:
        raise UsageError(f"crop {crop} must lie above 0 and be at most 1: the share of the shorter side to keep")
    sets = open_labelled(train, test)

    told: set[str] = set()

    def tell(found: Features, dataset: Dataset) -> None:
        if found.failed and dataset.card.spec not in told:
            told.add(dataset.card.spec)
            name, reason = next(iter(found.failed.items()))
            sys.stderr.write(
                f"k-NN while training: {len(found.failed)} of {len(dataset.ids)} samples of {dataset.card.spec} cannot be "
                f"read and are left out; the first: {name}: {reason}\n"
            )

    def measure(student: nn.Module, preprocessing: Preprocessing, trained: Trained) -> dict[str, float]:
        chosen = chosen_layers(student, layers)
        check_pool(student, pool)
        # Only what embedding reads; a student in training has no name and no fixed weights yet.
        backbone = Backbone(student, "the student", {}, preprocessing, "", "", "", trained.last_trained, trained.pool)
        device = str(next(student.parameters()).device)

        shown = stride if stride is not None or preprocessing.frames is None else trained.stride

        def features(which: int) -> tuple[Features, ...]:
            return embed_layers(
                backbone, sets[which], chosen, pool=pool, device=device, batch_size=batch_size, threads=threads,
                fraction=crop, stride=shown,
            )  # fmt: skip

        banks = features(0)
        asked = banks if sets[1] is sets[0] else features(1)
        tell(banks[0], sets[0])
        tell(asked[0], sets[1])
        return {
            bank.layer: next(iter(classify(bank, queries, sets, [k], temperature).per_k.values())).top1
            for bank, queries in zip(banks, asked, strict=True)
        }

    return measure
