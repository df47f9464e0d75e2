"""The whole way in a few minutes on two cores: real images, two teachers, one store, two students, one table.

The images are the 1,797 handwritten digits that come with scikit-learn. Nothing is downloaded, so the teachers are
trained here: one with labels, one as a masked autoencoder. Every step prints the command that does it; with other
names the same commands work for an image folder and ``vit_large_patch16_224.mae``.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hdcache import draws
from hdcache.errors import UsageError
from hdcache.info import describe_store
from hdcache.progress import duration, size
from hdcache.store import Store

TRAIN_COUNT = 1297
TEACHER_EPOCHS, STUDENT_EPOCHS, VIEWS = 12, 20, 4
CROPS = "gentle?flip=0"
NEIGHBOURS = 20


def run_quickstart(out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Train two teachers, extract both, distill, score; returns what :func:`format_result` prints.

    The same call again goes on where it was stopped.

    Raises
    ------
    UsageError
        when scikit-learn is not installed.
    """
    from hdcache.distill.run import distill
    from hdcache.evaluate.run import knn_eval
    from hdcache.extract.run import extract

    began = time.perf_counter()
    train, test = write_digits(out)
    store = str(out / "digits.hdc")
    steps: list[dict[str, Any]] = []

    def step(title: str, command: str, work: Callable[[], Any]) -> Any:
        if not quiet:
            sys.stderr.write(f"\n{title}\n  $ {command}\n")
        started = time.perf_counter()
        found = work()
        steps.append({"title": title, "command": command, "seconds": round(time.perf_counter() - started, 2)})
        return found

    def train_run(title: str, recipe: str, name: str, changes: dict[str, Any], **options: Any) -> dict[str, Any]:
        flags = {key.replace("_", "-"): value for key, value in options.items()}
        command = command_line(
            "distill", recipe, out=str(out / name), **flags, **{f"set {k}": v for k, v in changes.items()}
        )
        found = step(title, command, lambda: distill(recipe, out=out / name, overrides=changes, quiet=quiet, **options))
        return dict(found)

    for kind, title in (
        ("supervised", "A teacher with labels"),
        ("mae", "A teacher without labels: a masked autoencoder"),
    ):
        changes = {"epochs": TEACHER_EPOCHS, "warmup_epochs": 2}
        train_run(title, f"{kind}-tiny", f"teacher-{kind}", changes, data=train, views=CROPS)
    teachers = [f"{kind}={out / f'teacher-{kind}'}" for kind in ("supervised", "mae")]
    command = command_line("extract", train, store=store, teacher=teachers, views=CROPS, **{"num-views": VIEWS})
    summary = step(
        "Run both teachers once", command,
        lambda: extract(train, store=store, teachers=teachers, views=CROPS, num_views=VIEWS, quiet=quiet),
    )  # fmt: skip

    relation = {"objective.teacher": "supervised", "epochs": STUDENT_EPOCHS}
    train_run("The student, untrained", "tinymim-tiny", "student-untrained", relation | {"epochs": 0}, store=store)
    cached = train_run(
        "Token relations (TinyMIM) from the store", "tinymim-tiny", "student-relations", relation, store=store
    )
    feature = relation | {"objective.strategy": "feature", "objective.feature": "final"}
    train_run("Features from the store", "tinymim-tiny", "student-features", feature, store=store)
    short = relation | {"epochs": 2, "warmup_epochs": 1}
    online = train_run(
        "Two epochs with the teacher in the loop, to compare",
        "tinymim-tiny",
        "student-online",
        short,
        store=store,
        online=True,
    )

    scores = {}
    for name in ("teacher-supervised", "teacher-mae", "student-untrained", "student-relations", "student-features"):
        command = command_line("knn-eval", str(out / name), train=train, test=test, k=NEIGHBOURS)
        score = partial(knn_eval, str(out / name), train, test, ks=(NEIGHBOURS,))
        scores[name] = step(f"Score {name}", command, score)
    result = {
        "out": str(out), "seconds": round(time.perf_counter() - began, 1), "steps": steps,
        "knn": {name: score["knn"][0] for name, score in scores.items()},
        "layers": {name: score["model"]["layer"] for name, score in scores.items()},
        "chance": next(iter(scores.values()))["chance"],
        "extract": summary.json(), "store": describe_store(Store.open(store)),
        "samples_per_second": {"cached": cached["samples_per_second"], "online": online["samples_per_second"]},
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(result, indent=1))
    return result


def write_digits(out: Path) -> tuple[str, str]:
    """The digits as two ``.npz`` files of uint8 images [N, 8, 8] with labels, split by a fixed permutation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the quickstart takes its images from scikit-learn: pip install 'hdcache[quickstart]'"
        ) from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = draws.permutation(len(images), "quickstart")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, chosen in (("train", order[:TRAIN_COUNT]), ("test", order[TRAIN_COUNT:])):
        path = out / f"digits-{name}.npz"
        if not path.is_file():
            np.savez(path, images=images[chosen], labels=digits.target[chosen])
        paths.append(str(path))
    return paths[0], paths[1]


def command_line(verb: str, *arguments: str, **options: Any) -> str:
    """The shell command for a call: ``set x`` becomes ``--set x=...``, lists repeat, True is a bare flag."""
    words = ["hdcache", verb, *arguments]
    for key, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            if key.startswith("set "):
                words += ["--set", f"{key[4:]}={item}"]
            else:
                words += [f"--{key}"] if item is True else [f"--{key}", str(item)]
    return shlex.join(words)


def format_result(result: dict[str, Any]) -> str:
    """The one table, what was saved, and where to go on."""
    about = {
        "teacher-supervised": "trained with labels", "teacher-mae": "trained without labels",
        "student-untrained": "as it starts", "student-relations": "token relations of the supervised teacher",
        "student-features": "features of the supervised teacher",
    }  # fmt: skip
    lines = ["", f"{'model':<22}{'learnt from':<44}{'layer':<12}{'k-NN top-1':>12}{'95 % interval':>17}"]
    for name, score in result["knn"].items():
        low, high = score["top1_interval"]
        lines.append(
            f"{name:<22}{about[name]:<44}{result['layers'][name]:<12}{score['top1']:>10.1f} %{low:>9.1f} to {high:.1f}"
        )
    teacher = result["store"]["teachers"]["supervised"]
    lines += [
        "",
        f"1,297 digits as the bank, 500 to classify, k = {NEIGHBOURS}; the students saw no label and no teacher, only the store.",
        "",
    ]
    for tap, facts in teacher["taps"].items():
        line = f"{tap}: {size(facts['bytes'])} for {result['extract']['teachers']['supervised']['rows']:,} rows, {facts['smaller_than_fp16']:g} times smaller than fp16"
        if facts.get("smaller_than_relation_matrices_fp16"):
            line += f", {facts['smaller_than_relation_matrices_fp16']:g} times smaller than fp16 relation matrices"
        lines.append(f"{line} (error {100 * facts['certificate']['relative_rmse']:.1f} %)")
    rates = result["samples_per_second"]
    lines += [
        f"training: {rates['cached']:,.0f} samples/s from the store, {rates['online']:,.0f} with this tiny teacher in the loop "
        f"({rates['cached'] / rates['online']:.2f} times); a real teacher costs far more",
        f"all of it took {duration(result['seconds'])}; everything is in {result['out']}", "",
        "The same with your images and a published teacher (weights come from the hub):",
        "  hdcache extract /data/train --store train.hdc --teacher mae=vit_large_patch16_224.mae --num-views 4",
        "  hdcache distill tinymim-b --store train.hdc --out runs/tinymim-b",
        "  hdcache knn-eval runs/tinymim-b --train /data/train --test /data/val",
    ]  # fmt: skip
    return "\n".join(lines)
