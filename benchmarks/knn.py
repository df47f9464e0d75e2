"""Weighted k-NN accuracy of frozen features: hdcache beside DINO's function, scikit-learn and FAISS's bare search.

    python benchmarks/knn.py --out DIR              # bank of 50,000, 10,000 queries, 384 channels
    python benchmarks/knn.py --out DIR --quick      # 5,000 and 1,000

Features are drawn around the centres of --classes classes. Each contender is a process of its own, so that its memory is
its own, and they run in turn; the best time of each counts. A time is from raw features to predictions: for k = 200 alone,
and for k = 10, 20, 100 and 200 (where a contender searches again for each k, so does its time). FAISS searches rows that
are normalised already and does not vote: it is the limit. Prints one table and writes DIR/knn.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from resident import resident

KS, TEMPERATURE, DIMENSIONS = (10, 20, 100, 200), 0.07, 384
Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Predict = Callable[[Sequence[int]], list[Labels]]
"""Predicted classes [Q] for each of some k."""


def draw(folder: Path, bank: int, queries: int, classes: int) -> None:
    """Features of a bank and of queries around common centres, and their classes."""
    from hdcache import draws

    centres = normal(classes, "centres")
    for name, count in (("bank", bank), ("queries", queries)):
        labels = (draws.uniform(count, "knn", name, "labels") * classes).astype(np.int64)
        np.save(folder / f"{name}.npy", centres[labels] * np.float32(0.25) + normal(count, name))
        np.save(folder / f"{name}-labels.npy", labels)


def normal(count: int, purpose: str) -> Features:
    """Standard normal numbers [count, D], by Box and Muller's rule."""
    from hdcache import draws

    first, second = draws.uniform(2 * count * DIMENSIONS, "knn", purpose).reshape(2, count, DIMENSIONS)
    return (np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)).astype(np.float32)


def ours(bank: Features, labels: Labels, queries: Features, truth: Labels) -> Predict:
    """``hdcache knn-eval``."""
    from hdcache.evaluate.knn import faiss_version, knn_classify

    faiss_version()  # loads it, as the others' libraries are loaded before their time begins

    def predict(ks: Sequence[int]) -> list[Labels]:
        found = knn_classify(bank, labels, queries, truth, ks=ks)
        return [found.per_k[k].predictions.astype(np.int64) for k in ks]

    return predict


def dino(bank: Features, labels: Labels, queries: Features, truth: Labels) -> Predict:
    """DINO's protocol as its ``eval_knn.py`` goes about it: 100 pieces of the queries, one-hot votes, a search for each k."""
    import torch
    from torch.nn.functional import normalize

    classes = int(labels.max()) + 1
    rows_D, targets = torch.from_numpy(bank), torch.from_numpy(labels)
    pieces = torch.from_numpy(queries)
    # One memory for all pieces of a k, as there.
    one_hot = torch.zeros(0)

    def one(k: int, rows_DN: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        similarity, index = (piece @ rows_DN).topk(k, largest=True, sorted=True)
        votes = one_hot.resize_(len(piece) * k, classes).zero_().scatter_(1, targets[index].view(-1, 1), 1)
        weights = (similarity / TEMPERATURE).exp()
        scores = (votes.view(len(piece), k, classes) * weights[:, :, None]).sum(1)
        return scores.sort(1, descending=True).indices[:, 0]

    def predict(ks: Sequence[int]) -> list[Labels]:
        rows_DN, asked = normalize(rows_D, dim=1).t(), normalize(pieces, dim=1)
        size = max(1, len(asked) // 100)
        return [torch.cat([one(k, rows_DN, piece) for piece in asked.split(size)]).numpy() for k in ks]

    return predict


def scikit(bank: Features, labels: Labels, queries: Features, truth: Labels) -> Predict:
    """scikit-learn's classifier by brute force, with the same weights."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    def weights(distances: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        return np.exp((1 - np.square(distances) / 2) / TEMPERATURE)

    def predict(ks: Sequence[int]) -> list[Labels]:
        rows, asked = normalize(bank), normalize(queries)
        found = []
        for k in ks:
            model = KNeighborsClassifier(k, weights=weights, algorithm="brute", n_jobs=-1)
            found.append(model.fit(rows, labels).predict(asked))
        return found

    return predict


def lightly(bank: Features, labels: Labels, queries: Features, truth: Labels) -> Predict:
    """lightly's function, in batches of 256 queries."""
    import torch
    from lightly.utils.benchmarking.knn import knn_predict
    from torch.nn.functional import normalize

    def predict(ks: Sequence[int]) -> list[Labels]:
        rows, asked = normalize(torch.from_numpy(bank), dim=1).t(), normalize(torch.from_numpy(queries), dim=1)
        targets, classes = torch.from_numpy(labels), int(labels.max()) + 1
        return [
            torch.cat([knn_predict(piece, rows, targets, classes, k, TEMPERATURE)[:, 0] for piece in asked.split(256)]).numpy()
            for k in ks
        ]  # fmt: skip

    return predict


def faiss(bank: Features, labels: Labels, queries: Features, truth: Labels) -> Predict:
    """FAISS's search alone: no normalisation, no vote, nothing predicted."""
    import faiss as library

    for rows in (bank, queries):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = library.IndexFlatIP(DIMENSIONS)
    index.add(bank)

    def predict(ks: Sequence[int]) -> list[Labels]:
        index.search(queries, max(ks))
        return []

    return predict


CONTENDERS: dict[str, tuple[Callable[..., Predict], str]] = {
    "hdcache": (ours, "hdcache"),
    "DINO's function": (dino, "torch"),
    "lightly": (lightly, "lightly"),
    "scikit-learn, brute": (scikit, "sklearn"),
    "FAISS, search alone": (faiss, "faiss"),
}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}


def contend(name: str, folder: Path) -> dict[str, Any]:
    """Times and peak memory of one contender in this process; predictions go to a file."""
    names = ("bank", "bank-labels", "queries", "queries-labels")
    predict = CONTENDERS[name][0](*(np.load(folder / f"{part}.npy") for part in names))
    begun = resident()
    taken, predicted = {}, []
    for ks in (KS[-1:], KS):
        started, processor = time.perf_counter(), time.process_time()
        predicted = predict(ks)
        taken[f"seconds_{len(ks)}"] = time.perf_counter() - started
        taken[f"cpu_{len(ks)}"] = time.process_time() - processor
    if predicted:
        np.save(folder / f"predicted-{list(CONTENDERS).index(name)}.npy", np.stack(predicted))
    return taken | {"begun": begun, "peak": resident("VmHWM")}


def measure(settings: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every contender that is installed, in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, (_, need) in CONTENDERS.items() if find_spec(need)}
    for _ in range(settings.repeats):
        for name, runs in found.items():
            command = [sys.executable, __file__, "--contender", name, "--out", str(settings.out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {runs[-1]}", file=sys.stderr, flush=True)
    return found


def report(settings: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The best time and the largest memory of each contender, and whether it predicts what ours does."""
    truth = np.load(settings.out / "queries-labels.npy")
    lines: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        keys = [f"{what}_{number}" for what in ("seconds", "cpu") for number in (1, len(KS))]
        line: dict[str, Any] = {key: min(run[key] for run in found) for key in keys}
        line["peak"] = max(run["peak"] for run in found)
        line["growth"] = max(run["peak"] - run["begun"] for run in found)
        file = settings.out / f"predicted-{list(CONTENDERS).index(name)}.npy"
        if file.exists():
            predicted, same = np.load(file), np.load(settings.out / "predicted-0.npy")
            line["top1"] = {k: 100 * float((row == truth).mean()) for k, row in zip(KS, predicted, strict=True)}
            line["agrees"] = 100 * float((predicted == same).mean())
        lines[name] = line
    return lines


def table(lines: dict[str, dict[str, Any]]) -> str:
    """Markdown; times with their ratio to FAISS's bare search."""
    limit, last = lines["FAISS, search alone"], f"seconds_{len(KS)}"
    rows = ["| | k = 200, s | all four k, s | peak, MB | above its start, MB | top-1 at 200 | same prediction |", "|---" * 7 + "|"]  # fmt: skip
    for name, line in lines.items():
        cells = [f"{line[key]:.2f} ({line[key] / limit[key]:.2f})" for key in ("seconds_1", last)]
        cells += [f"{line['peak'] / 1e6:.0f}", f"{line['growth'] / 1e6:.0f}"]
        cells += [f"{line['top1'][KS[-1]]:.2f} %", f"{line['agrees']:.2f} %"] if "top1" in line else ["", ""]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    found = {}
    for need in {need for _, need in CONTENDERS.values()}:
        try:
            found[need] = version(DISTRIBUTIONS.get(need, need))
        except PackageNotFoundError:
            found[need] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bank", type=int)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a bank of 5,000 and 1,000 queries, once")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.contender:
        print(json.dumps(contend(settings.contender, settings.out)))
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    if any(settings.out.iterdir()):
        parser.error(f"{settings.out} is not empty; give --out a new folder")
    draw(
        settings.out,
        settings.bank or (5_000 if settings.quick else 50_000),
        settings.queries or (1_000 if settings.quick else 10_000),
        settings.classes,
    )
    runs = measure(settings)
    lines = report(settings, runs)
    about = {key: str(value) for key, value in vars(settings).items()}
    (settings.out / "knn.json").write_text(
        json.dumps({"settings": about, "versions": versions(), "runs": runs, "lines": lines}, indent=1)
    )
    print(table(lines))


if __name__ == "__main__":
    main()
