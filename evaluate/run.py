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
from torch import nn

from hdcache.backbones import Backbone, load_backbone
from hdcache.datasets import Dataset, open_dataset
from hdcache.errors import UsageError
from hdcache.evaluate.embed import FRACTION, Features, all_layers, centre_view, check_layer, check_pool, embed_layers
from hdcache.evaluate.knn import KnnResult, faiss_version, knn_classify
from hdcache.evaluate.vote import KS, TEMPERATURE, check_settings, refuse_unlabelled
from hdcache.progress import counted
from hdcache.teachers import choose_device

SCHEMA = 1

Progress = Callable[[str, int, int], None]
"""Called with (``"train"`` or ``"test"``, images done, images in all)."""


def knn_eval(
    model: str | Path | Backbone,
    train: str,
    test: str | None = None,
    *,
    layer: str | Sequence[str] | None = None,
    pool: str | None = None,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    img_size: int | None = None,
    device: str = "auto",
    crop: float = FRACTION,
    stride: int | None = None,
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
    ``layer`` is one layer, several, or ``all``; all are read in one pass over the images, and ``layers`` of the result
    holds the accuracies of each. What it holds for one layer alone is that of the deepest that training reached, where
    it is among several, else of the last that was asked for.
    See :func:`hdcache.evaluate.embed.embed_layers` for layers and ``pool``. ``crop`` is the share of the shorter side that
    the centre crop keeps: 0.875 as is usual for photographs, 1 for images that are cropped already. ``stride`` is that of
    the clips that a network of clips is shown.

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
    layers = chosen_layers(backbone.model, layer)
    check_layer(backbone.model, backbone.last_trained)
    check_pool(backbone.model, pool)
    bank_set, query_set = open_labelled(train, None if alone else test)

    def features(dataset: Dataset, role: str) -> tuple[Features, ...]:
        report = None if progress is None else lambda done, total: progress(role, done, total)
        settings: dict[str, Any] = {"pool": pool, "device": device, "batch_size": batch_size, "fraction": crop}
        settings["stride"] = stride
        return embed_layers(backbone, dataset, layers, threads=threads, progress=report, **settings)

    loaded = time.perf_counter()
    banks = features(bank_set, "train")
    asked = banks if query_set is bank_set else features(query_set, "test")

    embedded = time.perf_counter()
    pairs = list(zip(banks, asked, strict=True))
    scored = {
        bank.layer: classify(bank, queries, (bank_set, query_set), ks, temperature, compat_dino)
        for bank, queries in pairs
    }
    bank, queries = next((pair for pair in pairs if pair[0].layer == backbone.last_trained), pairs[-1])
    notes = dict.fromkeys(note for found in scored.values() for note in found.notes)

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
        "stride": centre_view(backbone, crop, stride).stride if backbone.preprocessing.frames else None,
        "knn": _accuracies(scored[bank.layer]),
        "layers": {layer: _accuracies(found) for layer, found in scored.items()},
        "chance": _chance(bank, queries),
        "notes": [*_overlap(bank_set, query_set, alone), *notes],
        "seconds": {"load": loaded - begin, "embed": embedded - loaded, "search": done - embedded},
        "device": device,
        "versions": _versions(),
    }
    if output is not None:
        write_json(Path(output), result)
    return result


def chosen_layers(model: nn.Module, asked: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The layers that ``asked`` names (one, several or ``all``), each once; None where it names none.

    Raises :class:`UsageError` for a layer that the model does not have.
    """
    named = (asked,) if isinstance(asked, str) else tuple(asked or ())
    layers = all_layers(model) if "all" in named else tuple(dict.fromkeys(named))
    for layer in layers:
        check_layer(model, layer)
    return layers or None


def open_labelled(train: str, test: str | None) -> tuple[Dataset, Dataset]:
    """The bank and the queries, with one list of classes; without ``test`` they are the same object.

    Raises :class:`UsageError` where a sample has no label.
    """
    bank = open_dataset(train)
    queries = bank if test is None else open_dataset(test, classes=bank.card.classes)
    for dataset in (bank, queries):
        refuse_unlabelled(np.asarray(dataset.labels), dataset.card.spec)
    return bank, queries


def classify(
    bank: Features,
    queries: Features,
    sets: tuple[Dataset, Dataset],
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    compat_dino: bool = False,
) -> KnnResult:
    """The vote of ``bank`` on ``queries``, features of ``sets``; leave-one-out where both are the same object."""
    return knn_classify(
        bank.features,
        bank.labels,
        queries.features,
        queries.labels,
        ks,
        temperature,
        leave_one_out_ids=bank.ids if queries is bank else None,
        train_ids=bank.ids,
        test_ids=queries.ids,
        classes=range(len(sets[1].card.classes)),
        compat_dino=compat_dino,
        names=(sets[0].card.spec, sets[1].card.spec),
    )


def format_table(result: dict[str, Any]) -> str:
    """A result of :func:`knn_eval` as aligned plain text: what was measured, the accuracies, chance, remarks.

    One line for each k with both intervals; of several layers one line for each layer, top-1 alone.
    """
    model, data = result["model"], result["train"]
    against = (
        "leave-one-out" if result["leave_one_out"] else f"{result['test']['embedded']} of {result['test']['spec']}"
    )
    origin = "the last trained one" if model["layer_is_default"] else "as asked"
    several = len(result["layers"]) > 1
    read = f"{len(result['layers'])} layers" if several else f"{model['layer']} ({origin})"
    rows = _rows_of_layers(result) if several else _rows_of_ks(result)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    chance = result["chance"]
    lines = [
        f"model    {model['source']} ({model['architecture']}), {model['preprocessing']['size']} px",
        f"feature  {read}, pool {model['pool']}",
        f"bank     {data['embedded']} of {data['spec']}, {data['classes']} classes",
        f"queries  {against}, T {result['temperature']}{', top-5 as in DINO' if result['compat_dino'] else ''}",
        "",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        "",
        f"chance   {chance['uniform']:.2f} % by guessing, "
        f"{chance['majority']:.2f} % by always saying the bank's largest class",
    ]
    lines += [
        f"failed   {counted(len(facts['failed']), 'samples')} of {facts['spec']} unreadable, first {next(iter(facts['failed']))}"
        for facts in (data, result["test"])
        if facts and facts["failed"]
    ]
    return "\n".join([*lines, *(f"note     {note}" for note in result["notes"])])


def _rows_of_ks(result: dict[str, Any]) -> list[list[str]]:
    rows = [["k", "top-1 %", "95 % interval", "top-5 %", "95 % interval"]]
    for entry in result["knn"]:
        cells = [str(entry["k"])]
        for name in ("top1", "top5"):
            low, high = entry[f"{name}_interval"]
            cells += [f"{entry[name]:.2f}", f"{low:.2f} - {high:.2f}"]
        rows.append(cells)
    return rows


def _rows_of_layers(result: dict[str, Any]) -> list[list[str]]:
    rows = [["layer", *(f"top-1 % k={entry['k']}" for entry in result["knn"])]]
    return rows + [[layer, *(f"{entry['top1']:.2f}" for entry in found)] for layer, found in result["layers"].items()]


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
