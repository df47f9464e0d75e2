"""Does a paper's main claim hold in miniature? Students of equal size, data and epochs, several seeds, one table.

    python benchmarks/claims.py tinymim --train emoji/train --test emoji/test --probe-labels emoji-categories \\
        --teacher 'timm:vit_small_patch14_dinov2?checkpoint=FILE&img_size=112' --out DIR

METHOD is tinymim, hybrid, amd, video (folders of ``moving_digits.py``) or sdssl. The masked autoencoder that teaches is trained here by the recipe ``mae``
on the same images (once per --out; all methods share it). Every student is scored layer by layer: k-NN (k = 1) of --test
against --train, and a linear probe on --probe-labels, the same images in folders of coarser classes. Prints mean and
standard deviation over seeds and writes DIR/METHOD.json; the same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claim_scores import Scorer

from hdcache.distill.run import distill
from hdcache.extract.run import extract
from hdcache.views import parse_views

LARGE = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 6}
# As many heads as the masked autoencoder: relations are compared head by head.
STUDENT = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 6}
SMALLEST = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 6}
# Class tokens are compared over layers: four times fewer patches make it four times faster.
COARSE = STUDENT | {"patch_size": 16}
VIEWS = {"video": "videomae?stride=1", "sdssl": "mae"}
Scores = dict[str, list[dict[str, Any]]]
"""Variant -> one score per seed: measure -> layer -> value."""


@dataclass(frozen=True)
class Variant:
    """One line of a claim's table: how a student is trained."""

    name: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    store: str | None = None
    """Whose views it sees, and whose targets it reads where its recipe does ({seed}: one store a seed); None: fresh views."""
    student: dict[str, Any] = field(default_factory=lambda: STUDENT)
    pool: str = "cls+mean"
    """Tokens that scores read."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``distill``."""

    def folder(self) -> str:
        """The variant's name as a folder's."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


class Bench:
    """Folders, teachers, stores and runs of one call."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings, self.out = settings, settings.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.views = VIEWS.get(settings.method, "gentle")
        clips = settings.method == "video"
        self.scorer = Scorer(
            settings.train,
            settings.test,
            settings.probe_labels,
            parse_views("clip-center?stride=1&fraction=1" if clips else "resize"),
            settings.method == "hybrid",
        )
        self.seconds: dict[str, float] = {}

    def mae_teacher(self) -> str:
        """Folder of the masked autoencoder that teaches."""
        if self.settings.mae_teacher:
            return str(self.settings.mae_teacher)
        changes = {
            "student.arguments": LARGE, "epochs": self.settings.teacher_epochs, "warmup_epochs": min(5, self.settings.teacher_epochs - 1), "amp": "off",
            "objective.decoder_width": 96, "objective.decoder_depth": 2, "objective.decoder_heads": 4,
        }  # fmt: skip
        self.train("mae-large", "mae-tiny", changes, None)
        return str(self.out / "mae-large")

    def store(self, name: str, teachers: Sequence[str], taps: Sequence[str], **options: Any) -> str:
        """Path of a store with these teachers' taps."""
        path, took = self.out / f"{name}.hdc", self.out / f"{name}.seconds.json"
        # Over all sessions: one that only looks whether all is there takes no time worth counting.
        seconds = json.loads(took.read_text()) if took.exists() else 0.0
        began, written = time.monotonic(), 0
        for teacher in teachers:
            done = extract(
                self.settings.train, store=path, teachers=[teacher], taps=taps, views=self.views,
                num_views=self.settings.num_views, quiet=False, **options,
            )  # fmt: skip
            written += sum(one["rows_written"] for one in done.teachers.values())
        if written:
            took.write_text(json.dumps(seconds + time.monotonic() - began))
        self.seconds[f"extract {name}"] = round(json.loads(took.read_text()) if took.exists() else 0.0, 1)
        return str(path)

    def train(
        self, folder: str, recipe: str, changes: dict[str, Any], store: str | None, **options: Any
    ) -> dict[str, Any]:
        """One run; finished ones are left as they are."""
        data = {"store": store} if store else {"data": self.settings.train, "views": self.views}
        done = distill(recipe, out=self.out / folder, overrides=changes, quiet=False, **data, **options)
        self.seconds[folder] = round(float(done["seconds"]), 1)
        return done

    def compare(self, variants: Sequence[Variant], stores: dict[str, str]) -> Scores:
        """Train and score every variant with every seed: variant -> one score per seed."""
        scores: Scores = {variant.name: [] for variant in variants}
        for seed in range(self.settings.seeds):
            for variant in variants:
                changes = {
                    "student.arguments": variant.student, "epochs": self.settings.epochs, "amp": "off", "seed": seed,
                    "warmup_epochs": min(2, self.settings.epochs - 1),
                } | variant.changes  # fmt: skip
                folder = f"{self.settings.method}-{variant.folder()}-{seed}"
                store = stores[variant.store.format(seed=seed)] if variant.store else None
                done = self.train(folder, variant.recipe, changes, store, **variant.options)
                # The momentum copy where the method evaluates it.
                scores[variant.name].append(self.scorer.score(done.get("preferred", done["out"]), variant.pool))
        return scores


def tinymim(bench: Bench) -> Scores:
    """Relations against features against the class token; sequential against direct for the smallest student."""
    mae = bench.mae_teacher()
    stores = {"mae": bench.store("tinymim", [f"mae={mae}"], ["block8.attn_in", "block8.out", "final"])}
    scores = bench.compare(
        [
            untrained(),
            Variant("relation", "tinymim-tiny", store="mae"),
            Variant("feature", "tinymim-feature-tiny", store="mae"),
            Variant("class-token", "tinymim-class-token-tiny", store="mae"),
            Variant("mae, no teacher", "mae-tiny", store="mae"),
            Variant("smallest, direct", "tinymim-tiny", store="mae", student=SMALLEST),
        ],
        stores,
    )
    # Each seed's middle student is the next teacher.
    for seed in range(bench.settings.seeds):
        middle = bench.out / f"tinymim-relation-{seed}"
        stores[f"middle-{seed}"] = bench.store(f"tinymim-middle-{seed}", [f"middle={middle}"], ["block6.attn_in"])
    sequential = Variant("smallest, sequential", "tinymim-tiny", store="middle-{seed}", student=SMALLEST)
    return scores | bench.compare([sequential], stores)


def hybrid(bench: Bench) -> Scores:
    """Both teachers against each alone."""
    mae = bench.mae_teacher()
    if not bench.settings.teacher:
        raise SystemExit("hybrid needs --teacher: the supervised or contrastive one")
    path = bench.store("hybrid", [f"mae={mae}"], ["block6.attn_in"])
    bench.store("hybrid", [f"supervised={bench.settings.teacher}"], ["final"])
    # The student's own class token meets that of DINOv2; relations are those of patches and class token.
    base = {"objective.relation_blocks": [6], "objective.student_blocks": [4]}
    # The same tokens are dropped in all: the halves differ from both in what they learn alone.
    alone = base | {"objective.scorer_target": "feature", "objective.feature_teacher": "supervised"}
    return bench.compare(
        [
            untrained(),
            Variant("both", "hybrid-tiny", base, "hybrid"),
            Variant("both, all tokens", "hybrid-tiny", base | {"objective.keep_ratio": None}, "hybrid"),
            Variant("relations alone (MAE)", "hybrid-relation-tiny", alone, "hybrid"),
            Variant(
                "relations alone, last block",
                "hybrid-relation-tiny",
                alone | {"objective.student_blocks": [6]},
                "hybrid",
            ),
            Variant("features alone (DINOv2)", "hybrid-feature-tiny", base, "hybrid"),
        ],
        {"hybrid": path},
    )


def amd(bench: Bench) -> Scores:
    """AMD against MAE; asymmetric against symmetric masks."""
    mae = bench.mae_teacher()
    stores = {
        f"{ratio:g}": bench.store(
            f"amd-{ratio:g}", [f"mae={mae}"], ["block4.out", "block8.out"], teacher_mask=f"random:{ratio:g}"
        )
        for ratio in (0.5, 0.75)
    }
    decoder = {"objective.decoder_width": 48, "objective.decoder_depth": 2, "objective.decoder_heads": 3}
    return bench.compare(
        [
            untrained("mean"),
            Variant("asymmetric (0.5 / 0.75)", "amd-image-tiny", decoder, "0.5", pool="mean"),
            Variant("symmetric (0.75 / 0.75)", "amd-image-symmetric-tiny", decoder, "0.75", pool="mean"),
            Variant("mae, no teacher", "mae-tiny", decoder, "0.5", pool="mean"),
        ],
        stores,
    )


def video(bench: Bench) -> Scores:
    """AMD of clips against a masked autoencoder of clips; the teacher is such an autoencoder, larger."""
    clips = {"img_size": 64, "patch_size": 16, "frames": 16, "tubelet": 2}
    decoder = {"objective.decoder_width": 48, "objective.decoder_depth": 2, "objective.decoder_heads": 3}
    large = {
        "student.arguments": clips | {"embed_dim": 192, "depth": 8, "num_heads": 6},
        "objective.decoder_width": 96,
        "objective.decoder_heads": 4,
    }
    large |= {
        "objective.mask_ratio": 0.75,
        "epochs": bench.settings.teacher_epochs,
        "warmup_epochs": min(5, bench.settings.teacher_epochs - 1),
        "amp": "off",
    }
    bench.train("videomae-large", "videomae-tiny", large, None)
    teacher = f"videomae={bench.out / 'videomae-large'}"
    taps = ["block4.out", "block8.out"]
    stores = {"0.75": bench.store("video", [teacher], taps, teacher_mask="tube:0.75")}
    student = clips | {"embed_dim": 96, "depth": 6, "num_heads": 3}
    return bench.compare(
        [
            Variant("untrained", "videomae-tiny", {"epochs": 0, "warmup_epochs": 0}, None, student, "mean"),
            Variant(
                "asymmetric (0.75 / 0.875)",
                "amd-video-tiny",
                decoder | {"objective.student_mask_ratio": 0.875},
                "0.75",
                student,
                "mean",
            ),
            Variant(
                "mae, no teacher",
                "videomae-tiny",
                decoder | {"objective.mask_ratio": 0.875},
                "0.75",
                student,
                "mean",
            ),
        ],
        stores,
    )


def sdssl(bench: Bench) -> Scores:
    """Every layer with and without intermediate self-distillation, three frameworks; the two cached formulations."""
    if not bench.settings.teacher:
        raise SystemExit("sdssl needs --teacher for its cached formulations")
    stores = {"pooled": bench.store("sdssl", [f"supervised={bench.settings.teacher}"], ["pooled"])}
    # Momentum 0.996 would keep the copy near its initial weights for most of so short a run.
    short = {"batch_size": 128}
    online = short | {"objective.momentum": 0.98}
    variants = [untrained("cls", COARSE)]
    variants += [
        Variant(
            f"{name}{suffix}", f"sdssl-{name}{suffix}-tiny", short if name == "simclr" else online, None, COARSE, "cls"
        )
        for name in ("simclr", "byol", "mocov3")
        for suffix in ("-baseline", "")
    ]
    variants += [
        Variant(name, f"sdssl-{name}-tiny", short, "pooled", COARSE, "cls")
        for name in ("cached-final", "cached-anchor")
    ]
    return bench.compare(variants, stores)


def untrained(pool: str = "cls+mean", student: dict[str, Any] | None = None) -> Variant:
    """The student as it starts: what a line of the table has to beat."""
    return Variant("untrained", "mae-tiny", {"epochs": 0, "warmup_epochs": 0}, None, student or STUDENT, pool)


CLAIMS: dict[str, Callable[[Bench], Scores]] = {
    "tinymim": tinymim, "hybrid": hybrid, "amd": amd, "video": video, "sdssl": sdssl,
}  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over seeds."""
    digits = 3 if max(values) < 1 else 2
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(scores: Scores) -> str:
    """Markdown: one line a variant, each percentage at the layer whose mean over seeds is best."""
    measures = ("k-NN", "linear probe")
    lines = [f"| student | {' | '.join(measures)} |", f"|---|{'---|' * len(measures)}"]
    for name, runs in scores.items():
        cells = []
        for measure in measures:
            means = {layer: statistics.mean(run[measure][layer] for run in runs) for layer in runs[0][measure]}
            best = max(means, key=lambda layer: means[layer])
            cells.append(f"{spread([run[measure][best] for run in runs])} % ({best})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_tables(scores: Scores) -> str:
    """Markdown: for each measure one line a variant, one column a layer."""
    texts = []
    for measure in next(iter(scores.values()))[0]:
        layers = list(dict.fromkeys(layer for runs in scores.values() for layer in runs[0][measure]))
        lines = [f"| {measure} | {' | '.join(layers)} |", f"|---|{'---|' * len(layers)}"]
        for name, runs in scores.items():
            cells = [
                spread([run[measure][layer] for run in runs]) if layer in runs[0][measure] else "" for layer in layers
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def main(methods: dict[str, Callable[[Bench], Scores]], about: str | None = __doc__) -> None:
    """Parse the command line, run one of ``methods``, print its table."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(methods))
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--probe-labels", type=Path, help="folder with train/CLASS/FILE and test/CLASS/FILE")
    parser.add_argument("--teacher", help="supervised or contrastive teacher (hybrid, sdssl)")
    parser.add_argument("--mae-teacher", type=Path, help="a finished run of 'mae' to use instead of training one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--teacher-epochs", type=int, default=100)
    parser.add_argument("--num-views", type=int, default=4)
    settings = parser.parse_args()
    bench = Bench(settings)
    began = time.monotonic()
    scores = methods[settings.method](bench)
    result = {
        "settings": {key: str(value) for key, value in vars(settings).items()},
        "scores": scores, "seconds": bench.seconds, "seconds_of_this_call": round(time.monotonic() - began, 1),
    }  # fmt: skip
    (bench.out / f"{settings.method}.json").write_text(json.dumps(result, indent=1))
    print(f"{table(scores)}\n\n{layer_tables(scores)}")
    runs = sum(bench.seconds.values()) / 60
    print(f"\n{settings.seeds} seeds, {settings.epochs} epochs, {runs:.0f} minutes of extraction and training")


if __name__ == "__main__":
    main(CLAIMS)
