"""Scores of a frozen student, layer by layer, for ``claims.py``: images are decoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize as unit

from hdcache.backbones import Backbone, load_backbone, normalize
from hdcache.datasets import Dataset, open_dataset
from hdcache.evaluate.attention import attention_profile
from hdcache.evaluate.knn import knn_classify
from hdcache.evaluate.probe import probe
from hdcache.resources import available_cores
from hdcache.samples import open_sample
from hdcache.schema import Preprocessing, ViewSpec
from hdcache.taps import Tokens, forward_taps, num_blocks

BATCH = 256


class Scorer:
    """k-NN by the data set's own classes; a linear probe by the classes of another folder of the same files."""

    def __init__(self, train: str, test: str, probe_labels: Path | None, views: ViewSpec, nmi: bool) -> None:
        self.sets = {"train": open_dataset(train)}
        self.sets["test"] = open_dataset(test, classes=self.sets["train"].card.classes)
        self.views, self.nmi = views, nmi
        self.pixels: dict[tuple[str, Preprocessing], Tensor] = {}
        self.labels = {which: np.asarray(found.labels) for which, found in self.sets.items()}
        self.coarse = coarse_labels(self.sets, probe_labels) if probe_labels else self.labels

    def score(self, model: str | Path, pool: str) -> dict[str, dict[str, float]]:
        """Measure -> layer -> value: percent, NMI from 0 to 1, pixels."""
        backbone = load_backbone(str(model))
        bank, queries = (self.features(backbone, which, pool) for which in ("train", "test"))
        found: dict[str, dict[str, float]] = {"k-NN": {}, "linear probe": {}}
        for layer in bank:
            knn = knn_classify(bank[layer], self.labels["train"], queries[layer], self.labels["test"], [1])
            found["k-NN"][layer] = knn.per_k[1].top1
            linear = probe(bank[layer], self.coarse["train"], queries[layer], self.coarse["test"])
            found["linear probe"][layer] = linear.top1
        if self.nmi:
            profile = attention_profile(backbone, self.sets["test"])
            found["NMI"] = {f"block{row['block']}": row["nmi"] for row in profile.rows()}
            found["attention distance"] = {f"block{row['block']}": row["distance"] for row in profile.rows()}
        return found

    @torch.inference_mode()
    def features(self, backbone: Backbone, which: str, pool: str) -> dict[str, NDArray[np.float32]]:
        """Every block's output and the final features, each passed through the last norm: layer -> [N, D]."""
        model: Any = backbone.model
        depth = num_blocks(model)
        names = [*(f"block{number}.out" for number in range(1, depth)), "final"]
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for part in self.images(which, backbone.preprocessing).split(BATCH):
            taps = forward_taps(model, normalize(part, backbone.preprocessing), names)
            for name, tokens in taps.items():
                assert isinstance(tokens, Tokens)
                rows[name].append(pooled(tokens if name == "final" else normed(model, tokens), pool))
        return {name: torch.cat(found).numpy() for name, found in rows.items()}

    def images(self, which: str, wanted: Preprocessing) -> Tensor:
        """All images of a split at a network's input size, uint8."""
        key = which, wanted.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
        if key not in self.pixels:
            data = self.sets[which]
            with ThreadPoolExecutor(available_cores()) as pool:
                found = pool.map(lambda name: open_sample(data, name, self.views, 0).pixels(wanted), data.ids)
                self.pixels[key] = torch.from_numpy(np.stack(list(found)))
        return self.pixels[key]


def normed(model: Any, tokens: Tokens) -> Tokens:
    """Tokens of an inner block as the network's last norm leaves them (as ``hdcache knn-eval`` reads them)."""
    return replace(tokens, prefix=model.norm(tokens.prefix), patches=model.norm(tokens.patches))


def pooled(tokens: Tokens, pool: str) -> Tensor:
    """``cls``, ``mean``, or both side by side, each of length 1: [B, D] or [B, 2 D]."""
    mean = tokens.patches.mean(dim=1)
    if pool == "mean":
        return mean
    token = tokens.prefix[:, 0]
    return token if pool == "cls" else torch.cat([unit(token, dim=1), unit(mean, dim=1)], dim=1)


def coarse_labels(sets: dict[str, Dataset], folder: Path) -> dict[str, NDArray[np.int64]]:
    """Labels of the same files, told by their names, in ``folder``/train and ``folder``/test."""
    classes: Sequence[str] | None = None
    found = {}
    for which, data in sets.items():
        other = open_dataset(str(folder / which), classes=classes)
        classes = other.card.classes
        by_file = {name.rsplit("/", 1)[-1]: int(label) for name, label in zip(other.ids, other.labels, strict=True)}
        found[which] = np.array([by_file[name.rsplit("/", 1)[-1]] for name in data.ids], np.int64)
    return found
