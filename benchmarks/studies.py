"""How coarse may a store be, and how many views are enough? Judged by the students that are trained from it.

    python benchmarks/studies.py fidelity --train emoji/train --test emoji/test --probe-labels emoji-categories \\
        --teacher 'timm:vit_small_patch14_dinov2?checkpoint=FILE&img_size=112' --out DIR

``fidelity``: students of a relation and of a feature objective from stores of fp16 and of klt at 5, 10, 20 and 40 %
relative RMSE. ``views``: from 1, 2, 4 and 8 stored views, and from fresh crops with the teacher in the loop. As in
``claims.py`` students are equal in all but that, every layer is scored, the same command goes on where it was stopped;
then one table of what each costs: bytes a row or in all, seconds of extraction and of a run.
"""

from __future__ import annotations

from typing import Any

from claims import STUDENT, Bench, Scores, Variant, main, untrained

from hdcache.store import Store

ENCODINGS: dict[str, dict[str, Any]] = {
    "fp16": {"encoding": "fp16"},
    "klt 5 %": {"fidelity": 0.05},
    "klt 10 %": {"fidelity": 0.1},
    "klt 20 %": {"fidelity": 0.2},
    "klt 40 %": {"fidelity": 0.4},
}
VIEWS = (1, 2, 4, 8)
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "relation": ("tinymim-tiny", {}),
    "feature": ("tinymim-feature-tiny", {"objective.feature": "final"}),
}
TAPS = ("block12.attn_in", "final")


def run_seconds(bench: Bench, name: str) -> float:
    """Mean over the seeds of what a variant's training took."""
    folder = f"{bench.settings.method}-{Variant(name, '').folder()}"
    seeds = range(bench.settings.seeds)
    return sum(bench.seconds[f"{folder}-{seed}"] for seed in seeds) / len(seeds)


def fidelity(bench: Bench) -> Scores:
    """Each objective from each encoding."""
    stores = {
        name: bench.store(
            f"fidelity-{name.split(' ')[-2] if ' ' in name else name}",
            [f"teacher={bench.settings.teacher}"],
            TAPS,
            **options,
        )
        for name, options in ENCODINGS.items()
    }
    variants = [
        Variant(f"{objective}, {name}", recipe, changes, name)
        for objective, (recipe, changes) in OBJECTIVES.items()
        for name in ENCODINGS
    ]
    scores = bench.compare([untrained(), *variants], stores)
    print("\n| store | bytes a row | of which block12.attn_in | final |\n|---|---|---|---|")
    for name, path in stores.items():
        taps = Store.open(path).teacher("teacher").taps
        each = [taps[tap].bytes_per_row for tap in TAPS]
        print(f"| {name} | {sum(each):,.0f} | {each[0]:,.0f} | {each[1]:,.0f} |")
    print("\n| student | seconds a run |\n|---|---|")
    for variant in variants:
        print(f"| {variant.name} | {run_seconds(bench, variant.name):.0f} |")
    print()
    return scores


def views(bench: Bench) -> Scores:
    """The relation objective from so many stored views, in equal epochs, and from a new crop in every epoch."""
    bench.settings.num_views = max(VIEWS)
    teacher = f"teacher={bench.settings.teacher}"
    stores = {"views": bench.store("views", [teacher], TAPS[:1])}
    recipe, changes = OBJECTIVES["relation"]
    online = {"online": True, "teachers": [teacher]}
    variants = [Variant(f"{count} stored", recipe, changes, "views", options={"num_views": count}) for count in VIEWS]
    variants.append(Variant("fresh crops, online", recipe, changes, None, STUDENT, options=online))
    scores = bench.compare([untrained(), *variants], stores)
    store = Store.open(stores["views"])
    row = store.teacher("teacher").taps[TAPS[0]].bytes_per_row
    extracting = bench.seconds["extract views"]
    print(f"\nThe store holds {TAPS[0]}: {row:,.0f} bytes a row and view.")
    print("\n| | bytes of targets | seconds to extract | seconds a run | of both |\n|---|---|---|---|---|")
    for variant, count in zip(variants, (*VIEWS, 0), strict=True):
        once, run = extracting * count / max(VIEWS), run_seconds(bench, variant.name)
        print(
            f"| {variant.name} | {row * count * store.card.dataset.count:,.0f} | {once:,.0f} | {run:,.0f} | {once + run:,.0f} |"
        )
    print()
    return scores


if __name__ == "__main__":
    main({"fidelity": fidelity, "views": views}, __doc__)
