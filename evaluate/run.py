"""Student -> numbers. ``knn_eval`` reads top to bottom: load, open, embed, search and vote, write ``results.json``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hdcache.backbones import Backbone, load_backbone
from hdcache.datasets import Dataset, open_dataset
from hdcache.errors import UsageError
from hdcache.evaluate.embed import FRACTION, Features, check_layer, check_pool, embed
from hdcache.evaluate.knn import KnnResult, faiss_version, knn_classify
from hdcache.evaluate.vote import KS, TEMPERATURE, check_settings, refuse_unlabelled
from hdcache.teachers import choose_device

SCHEMA = 1

Progress = Callable[[str, int, int], None]
"""Called with (``"train"`` or ``"test"``, images done, images in all)."""


def knn_eval(
    model: str | Path | Backbone,
    train: str,
    test: str | None = None,
    *,
    layer: str | None = None,
    pool: str | None = None,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    img_size: int | None = None,
    device: str = "auto",
    crop: float = FRACTION,
    batch_size: int = 64,
    threads: int | None = None,
    leave_one_out: bool = False,
    compat_dino: bool = False,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Weighted k-NN accuracy of a frozen backbone on ``test`` against the bank ``train``, as a JSON-able dict.

    Without ``test`` (or with ``leave_one_out``) each image of ``train`` is classified by all the others. With
    ``output`` the result is written there too, atomically. Accuracies are percent, with Wilson's 95 % interval.
    See :func:`hdcache.evaluate.embed.embed` for ``layer`` and ``pool``. ``crop`` is the share of the shorter side that
    the centre crop keeps: 0.875 as is usual for photographs, 1 for images that are cropped already.

    Raises :class:`UsageError` for settings that cannot be meant, data without labels among them, and
    :class:`InputNotFound` for what is not there or cannot be read.
    """
    alone = test is None or leave_one_out
    if alone and test not in (None, train):
        raise UsageError(f"leave-one-out compares {train} with itself, but test is {test}; leave one of the two out")
    check_settings(ks, temperature)
    if not 0 < crop <= 1:
        raise UsageError(f"crop {crop} must lie above 0 and be at most 1: the share of the shorter side to keep")
    device = str(choose_device(device))

    begin = time.perf_counter()
    backbone = (
        load_backbone(str(model), img_size=img_size) if isinstance(model, str | Path) else _as_given(model, img_size)
    )
    check_layer(backbone.model, layer or backbone.last_trained)
    check_pool(backbone.model, pool)

    bank_set = open_dataset(train)
    query_set = bank_set if alone or test is None else open_dataset(test, classes=bank_set.card.classes)
    for dataset in (bank_set, query_set):
        refuse_unlabelled(np.asarray(dataset.labels), dataset.card.spec)

    def features(dataset: Dataset, role: str) -> Features:
        report = None if progress is None else lambda done, total: progress(role, done, total)
        settings: dict[str, Any] = {
            "layer": layer,
            "pool": pool,
            "device": device,
            "batch_size": batch_size,
            "fraction": crop,
        }
        return embed(backbone, dataset, threads=threads, progress=report, **settings)

    loaded = time.perf_counter()
    bank = features(bank_set, "train")
    queries = bank if query_set is bank_set else features(query_set, "test")

    embedded = time.perf_counter()
    found = knn_classify(
        bank.features,
        bank.labels,
        queries.features,
        queries.labels,
        ks,
        temperature,
        leave_one_out_ids=bank.ids if alone else None,
        train_ids=bank.ids,
        test_ids=queries.ids,
        classes=range(len(query_set.card.classes)),
        compat_dino=compat_dino,
        names=(bank_set.card.spec, query_set.card.spec),
    )

    done = time.perf_counter()
    result = {
        "schema": SCHEMA,
        "task": "knn",
        "model": _model_facts(backbone, bank),
        "train": _data_facts(bank_set, bank),
        "test": None if alone else _data_facts(query_set, queries),
        "leave_one_out": alone,
        "temperature": temperature,
        "compat_dino": compat_dino,
        "fraction": crop,
        "knn": _accuracies(found),
        "chance": _chance(bank, queries),
        "notes": [*_overlap(bank_set, query_set, alone), *found.notes],
        "seconds": {"load": loaded - begin, "embed": embedded - loaded, "search": done - embedded},
        "device": device,
        "versions": _versions(),
    }
    if output is not None:
        write_json(Path(output), result)
    return result


def format_table(result: dict[str, Any]) -> str:
    """A result of :func:`knn_eval` as aligned plain text: what was measured, one line for each k, chance, remarks."""
    model, data = result["model"], result["train"]
    against = (
        "leave-one-out" if result["leave_one_out"] else f"{result['test']['embedded']} of {result['test']['spec']}"
    )
    origin = "the last trained one" if model["layer_is_default"] else "as asked"
    rows = [["k", "top-1 %", "95 % interval", "top-5 %", "95 % interval"]]
    for entry in result["knn"]:
        cells = [str(entry["k"])]
        for name in ("top1", "top5"):
            low, high = entry[f"{name}_interval"]
            cells += [f"{entry[name]:.2f}", f"{low:.2f} - {high:.2f}"]
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    chance = result["chance"]
    lines = [
        f"model    {model['source']} ({model['architecture']}), {model['preprocessing']['size']} px",
        f"feature  {model['layer']} ({origin}), pool {model['pool']}",
        f"bank     {data['embedded']} of {data['spec']}, {data['classes']} classes",
        f"queries  {against}, T {result['temperature']}{', top-5 as in DINO' if result['compat_dino'] else ''}",
        "",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        "",
        f"chance   {chance['uniform']:.2f} % by guessing, "
        f"{chance['majority']:.2f} % by always saying the bank's largest class",
    ]
    lines += [
        f"failed   {len(facts['failed'])} images in {facts['spec']} unreadable, first {next(iter(facts['failed']))}"
        for facts in (data, result["test"])
        if facts and facts["failed"]
    ]
    return "\n".join([*lines, *(f"note     {note}" for note in result["notes"])])


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _as_given(backbone: Backbone, img_size: int | None) -> Backbone:
    if img_size not in (None, backbone.preprocessing.size):
        raise UsageError(
            f"img_size {img_size}: the loaded backbone takes {backbone.preprocessing.size} pixels; "
            f"load it with load_backbone(..., img_size={img_size})"
        )
    return backbone


def _model_facts(backbone: Backbone, features: Features) -> dict[str, Any]:
    return {
        "source": backbone.source,
        "architecture": backbone.architecture,
        "arguments": backbone.arguments,
        "weights": backbone.weights,
        "licence": backbone.licence,
        "preprocessing": backbone.preprocessing.model_dump(mode="json"),
        "layer": features.layer,
        "layer_is_default": features.layer_is_default,
        "last_trained": backbone.last_trained,
        "pool": features.pool,
        "width": features.features.shape[1],
    }


def _data_facts(dataset: Dataset, features: Features) -> dict[str, Any]:
    return {
        "spec": dataset.card.spec,
        "fingerprint": dataset.card.fingerprint,
        "count": len(dataset.ids),
        "embedded": len(features.ids),
        "classes": len(np.unique(features.labels)),
        "failed": features.failed,
    }


def _accuracies(found: KnnResult) -> list[dict[str, Any]]:
    names = ("k", "top1", "top5", "top1_interval", "top5_interval")
    return [{name: getattr(one, name) for name in names} for one in found.per_k.values()]


def _chance(bank: Features, queries: Features) -> dict[str, float]:
    """Percent right by guessing one of the bank's classes, and by always answering its most frequent one."""
    counts = np.bincount(bank.labels)
    return {
        "uniform": 100 / int((counts > 0).sum()),
        "majority": 100 * float((queries.labels == counts.argmax()).mean()),
    }


def _overlap(bank: Dataset, queries: Dataset, alone: bool) -> list[str]:
    if alone or bank.card.fingerprint != queries.card.fingerprint:
        return []
    return ["test is the same data as train, so every image finds itself; use leave-one-out for an honest number"]


def _versions() -> dict[str, str]:
    import timm
    import torch

    try:
        own = version("hdcache")
    except PackageNotFoundError:
        own = "unknown"
    return {"hdcache": own, "torch": torch.__version__, "timm": timm.__version__, "faiss": faiss_version()}
