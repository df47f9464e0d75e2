"""``hdcache distill`` and ``hdcache chain``: students from a store, and students of students."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from hdcache.cli_options import extraction, numbered_pairs, output, pairs, prepare, print_result, teacher_mask
from hdcache.resources import keep_freed_memory


@click.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option(
    "--out", required=True,
    help="Folder of the run; of several students, of their folders, each named as its recipe. The same command again goes on there.",
)  # fmt: skip
@click.option("--store", help="Store with the teachers' targets: a folder, or s3://, gs://, az://, http(s)://.")
@click.option(
    "--cache-size", metavar="BYTES", help="Of a --store at a URL: what its objects may take on this machine, e.g. 50GB.  "
    "[default: 100GB, or half of the free disk]",
)  # fmt: skip
@click.option("--data", help="Data set, when there is no store or the data has moved.")
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE",
    help="Change a field of all recipes, e.g. --set student.drop_path=0.2. Repeat for several.",
)  # fmt: skip
@click.option(
    "--set-recipe", "single", multiple=True, metavar="N:FIELD=VALUE",
    help="Change a field of one of several recipes, from 1, e.g. --set-recipe 2:objective.teacher=dino.",
)  # fmt: skip
@click.option(
    "--sweep", "sweeps", multiple=True, metavar="FIELD=A,B,C",
    help="Train each recipe with each of these values, e.g. --sweep lr=1e-3,3e-4. Repeat for all combinations.",
)  # fmt: skip
@click.option(
    "--online", is_flag=True, help="Run the teachers in the loop instead of reading the store (the baseline)."
)
@click.option("--teacher", "teachers", multiple=True, metavar="NAME=MODEL", help="Teacher for --online.")
@teacher_mask
@click.option(
    "--views",
    help="Without a store: mae, supervised, gentle, center, resize; of videos videomae, videomae-ssv2, clip-center.  "
    "[default: supervised for sdssl, else mae, videomae]",
)
@click.option("--num-views", type=int, help="Views to go through, one per epoch.  [default: all that are stored]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
@click.option("--threads", type=click.IntRange(min=1), help="Decoding threads.  [default: the cores]")
@click.option("--knn-train", help="Labelled data set: measure the student's k-NN accuracy on the way (metrics.jsonl).")
@click.option("--knn-test", help="Labelled data set to classify.  [default: leave-one-out on --knn-train]")
@click.option("--knn-every", type=int, metavar="EPOCHS", help="Epochs from one measurement to the next.  [default: 1]")
@click.option(
    "--knn-layers", multiple=True, help="final, blockN.out or all; repeat for several.  [default: the last trained one]"
)
@click.option(
    "--knn-stride", type=int, help="Of the clips that a video student is shown.  [default: that of its training]"
)
@output
def distill(
    as_json: bool, quiet: bool, verbose: int, recipes: Sequence[str], changes: Sequence[str], single: Sequence[str],
    sweeps: Sequence[str], knn_train: str | None, knn_test: str | None, knn_every: int | None, knn_layers: Sequence[str],
    knn_stride: int | None, **settings: Any,
) -> None:  # fmt: skip
    """Train a student by RECIPE: a name of 'hdcache recipes', or a JSON or YAML file.

    Several recipes, or a --sweep, train their students from the same batches, read once.
    """
    prepare(quiet, verbose)
    keep_freed_memory()
    from hdcache.distill.run import distill as run
    from hdcache.distill.run import distill_several
    from hdcache.distill.run_report import format_run

    if knn_train is not None:
        from hdcache.evaluate.monitor import knn_monitor

        threads = settings["threads"]
        settings["monitor"] = knn_monitor(knn_train, knn_test, layers=knn_layers, stride=knn_stride, threads=threads)
        settings["monitor_every"] = 1 if knn_every is None else knn_every
    elif (knn_test, knn_every, knn_layers, knn_stride) != (None, None, (), None):
        raise click.UsageError("--knn-test, -every, -layers and -stride say how to measure; add --knn-train DATA")
    settings |= {"overrides": pairs(changes, "--set"), "quiet": quiet}
    chosen = numbered_pairs(single, "--set-recipe", "N")
    several = len(recipes) > 1 or bool(sweeps)
    if chosen and not several:
        raise click.UsageError("--set-recipe changes one of several recipes; with one alone use --set FIELD=VALUE")
    if several:
        found = distill_several(recipes, recipe_overrides=chosen, sweep=pairs(sweeps, "--sweep"), **settings)
    else:
        found = [run(recipes[0], **settings)]
    # Under torchrun every process comes here; one speaks for all.
    if os.environ.get("RANK", "0") == "0":
        print_result(found if several else found[0], "\n".join(map(format_run, found)), as_json)


@click.command()
@click.argument("data", required=False)
@click.option("--store", required=True, help="Folder of the store; made when it does not exist.")
@click.option("--out", required=True, help="Folder of the runs, one folder each.")
@click.option("--teacher", required=True, metavar="[NAME=]MODEL", help="The first stage's teacher.")
@click.option(
    "--recipe", "stages", multiple=True, required=True, help="Once for each stage, in order: a name or a file."
)
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a recipe field in all stages.")
@click.option(
    "--set-stage", "single", multiple=True, metavar="STAGE:FIELD=VALUE",
    help="Change a field in one stage, from 1, e.g. --set-stage 2:objective.heads=16.",
)  # fmt: skip
@extraction
@output
def chain(
    as_json: bool, quiet: bool, verbose: int, data: str | None, stages: Sequence[str], changes: Sequence[str],
    single: Sequence[str], **settings: Any,
) -> None:  # fmt: skip
    """Distill one student after the other from DATA, each finished one being the next one's teacher.

    Every stage extracts what its recipe reads, then trains. The same command again goes on.
    """
    prepare(quiet, verbose)
    keep_freed_memory()
    from hdcache.chain import distill_chain, format_chain

    result = distill_chain(
        data, recipes=stages, overrides=pairs(changes, "--set"), stage_overrides=numbered_pairs(single, "--set-stage", "STAGE"),
        quiet=quiet, **settings,
    )  # fmt: skip
    print_result(result, format_chain(result), as_json)
