"""The command line: parse, call one room's function, print. Nothing heavy is imported before a command runs.

stdout carries the result (text, or JSON with ``--json``), stderr logs and progress. Exit codes: 0 done, 1 unexpected,
2 usage, 3 input or store not found, 4 failures above ``--max-failures``, 5 store mismatch, locked or corrupt,
6 out of space, 75 stopped with progress saved, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

EXIT_CODES = (
    "Exit codes: 0 done, 2 usage, 3 input or store not found, 4 failures above --max-failures, "
    "5 store mismatch, locked or corrupt, 6 out of space, 75 stopped with progress saved, 130 Ctrl-C."
)


class _Commands(click.Group):
    """A group that accepts ``knn_eval`` for ``knn-eval`` and names the nearest command."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name.replace("_", "-"))


@click.group(cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hdcache")
def cli() -> None:
    """Run vision teachers once, keep what they know, distill any number of students from it."""


def _output(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("-v", "--verbose", count=True, help="More log lines; twice for debugging."),
        click.option("-q", "--quiet", is_flag=True, help="No progress, no log lines."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    ):
        command = option(command)
    return command


def _prepare(quiet: bool, verbose: int) -> None:
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    from hdcache import stopping

    stopping.install()


def _print(result: Any, text: str, as_json: bool) -> None:
    click.echo(json.dumps(result, indent=1, allow_nan=False) if as_json else text)


def _pairs(values: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for value in values:
        key, sign, rest = value.partition("=")
        if not sign or not key:
            raise click.UsageError(f"{option} takes FIELD=VALUE, got {value!r}")
        pairs[key] = rest
    return pairs


@cli.command()
@click.argument("data", required=False)
@click.option("--store", required=True, help="Folder of the store; made when it does not exist.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    required=True,
    metavar="[NAME=]MODEL",
    help="timm name, timm:NAME?checkpoint=FILE, random:NAME?seed=0, or a student folder. Repeat for several.",
)
@click.option(
    "--tap",
    "taps",
    multiple=True,
    help="Inner tensor to store, e.g. block9.attn_in, final, block12.rel.qk. Default: attn_in of TinyMIM's target block, and final.",
)
@click.option("--views", help="How views are drawn: mae, tinymim, supervised, gentle, center, resize.  [default: mae]")
@click.option("--num-views", default=1, show_default=True, help="Views per sample.")
@click.option("--view-seed", default=0, show_default=True, help="Seed of the views of a new store.")
@click.option("--fidelity", type=float, help="Relative RMSE to allow (klt encoding).  [default: 0.05]")
@click.option("--encoding", help="klt, int8, fp16, bf16, fp32; relations: sqrt8, fp16, fp32.")
@click.option("--img-size", type=int, help="Teacher input in pixels, when not its own.")
@click.option("--precision", default="auto", show_default=True, help="Teacher arithmetic: auto, bf16, fp32.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--batch", default=32, show_default=True, help="Images per forward pass.")
@click.option("--threads", type=int, help="Decoding threads.  [default: the cores]")
@click.option("--rows-per-shard", default=256, show_default=True, help="Rows written, and lost, as one.")
@click.option("--max-failures", type=int, help="Stop when more images than this cannot be read.  [default: never]")
@_output
def extract(as_json: bool, quiet: bool, verbose: int, data: str | None, **settings: Any) -> None:
    """Run teachers over DATA once and store what they computed.

    DATA: a folder of class folders, tars (shard-{000..099}.tar), an .npz, hf:OWNER/NAME?split=train,
    torchvision:CIFAR10?root=DIR. It may be left out for a store that exists. The same command again goes on.
    """
    _prepare(quiet, verbose)
    from hdcache.extract.run import extract as run
    from hdcache.extract.run import format_summary

    summary = run(data, **settings, quiet=quiet)
    _print(summary.json(), format_summary(summary), as_json)


@cli.command()
@click.argument("recipe")
@click.option("--out", required=True, help="Folder of the run; the same command again goes on there.")
@click.option("--store", help="Store with the teachers' targets.")
@click.option("--data", help="Data set, when there is no store or the data has moved.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a recipe field, e.g. --set student.drop_path=0.2. Repeat for several.",
)
@click.option(
    "--online", is_flag=True, help="Run the teachers in the loop instead of reading the store (the baseline)."
)
@click.option("--teacher", "teachers", multiple=True, metavar="NAME=MODEL", help="Teacher for --online.")
@click.option("--views", help="Without a store: mae, tinymim, supervised, gentle, center, resize.")
@click.option("--num-views", type=int, help="Views to go through, one per epoch.  [default: all that are stored]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
@click.option("--threads", type=int, help="Decoding threads.  [default: the cores]")
@_output
def distill(as_json: bool, quiet: bool, verbose: int, recipe: str, changes: Sequence[str], **settings: Any) -> None:
    """Train a student by RECIPE: a name of 'hdcache recipes', or a JSON or YAML file."""
    _prepare(quiet, verbose)
    from hdcache.distill.run import distill as run
    from hdcache.distill.run import format_run

    result = run(recipe, overrides=_pairs(changes, "--set"), quiet=quiet, **settings)
    # Under torchrun every process comes here; one speaks for all.
    if os.environ.get("RANK", "0") == "0":
        _print(result, format_run(result), as_json)


@cli.command("knn-eval")
@click.argument("model")
@click.option("--train", required=True, help="Labelled data set: the bank of neighbours.")
@click.option("--test", help="Labelled data set to classify.  [default: leave-one-out on --train]")
@click.option("--layer", help="final or blockN.out.  [default: the last layer that training reached]")
@click.option(
    "--pool", type=click.Choice(["cls", "mean", "cls+mean"]), help="Token pooling.  [default: cls where there is one]"
)
@click.option(
    "--k",
    "ks",
    multiple=True,
    type=int,
    default=(10, 20, 100, 200),
    show_default=True,
    help="Neighbours; repeat for several.",
)
@click.option("--temperature", default=0.07, show_default=True, help="Of the vote's weights exp(similarity / T).")
@click.option("--img-size", type=int, help="Input in pixels, when not the model's own.")
@click.option(
    "--crop",
    default=0.875,
    show_default=True,
    help="Share of the shorter side that the centre crop keeps; 1: all of it.",
)
@click.option("--leave-one-out", is_flag=True, help="Classify each image of --train by all the others.")
@click.option("--compat-dino", is_flag=True, help="Top-5 as DINO's script counts it (credits classes without a vote).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
@click.option("--batch-size", default=64, show_default=True, help="Images per forward pass.")
@click.option("--threads", type=int, help="Decoding threads.  [default: the cores]")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the result to this JSON file.")
@_output
def knn_eval(as_json: bool, quiet: bool, verbose: int, **settings: Any) -> None:
    """Weighted k-NN accuracy of MODEL's frozen features (a student folder or any model spec)."""
    _prepare(quiet, verbose)
    from hdcache.evaluate.run import format_table
    from hdcache.evaluate.run import knn_eval as run
    from hdcache.progress import Progress

    bars: dict[str, Progress] = {}

    def advance(role: str, done: int, total: int) -> None:
        bar = bars.setdefault(role, Progress(f"embed {role}", total, "images", quiet=quiet))
        bar.advance(done - bar.done)
        if done == total:
            bar.__exit__(None, None, None)

    result = run(progress=advance, **settings)
    _print(result, format_table(result), as_json)


@cli.command()
@click.argument("store")
@_output
def info(as_json: bool, quiet: bool, verbose: int, store: str) -> None:
    """What STORE holds: data set, views, teachers, taps, measured errors, bytes."""
    _prepare(quiet, verbose)
    from hdcache.info import describe_store, format_store
    from hdcache.store import Store

    facts = describe_store(Store.open(store))
    _print(facts, format_store(facts), as_json)


@cli.command()
@click.argument("store")
@click.option("--quick", is_flag=True, help="Sizes only, no checksums.")
@_output
def verify(as_json: bool, quiet: bool, verbose: int, store: str, quick: bool) -> None:
    """Check every object of STORE against its manifest; exit 5 and the list of damaged objects otherwise."""
    _prepare(quiet, verbose)
    from dataclasses import asdict

    from hdcache.errors import StoreCorrupt
    from hdcache.integrity import listed_bytes
    from hdcache.integrity import verify as run
    from hdcache.progress import Progress, size
    from hdcache.store import Store

    opened = Store.open(store)
    with Progress("verify", listed_bytes(opened), "bytes", quiet=quiet) as bar:
        found = run(opened, quick=quick, progress=bar.advance)
    lines = [
        f"{found.objects:,} objects, {size(found.bytes)}: {'all good' if found.good else f'{len(found.faults)} damaged'}"
    ]
    lines += [f"not sealed yet: {key}" for key in found.unsealed]
    lines += [f"not part of the store: {key}" for key in found.unlisted]
    _print(asdict(found) | {"good": found.good}, "\n".join([*lines, *found.faults]), as_json)
    if not found.good:
        raise StoreCorrupt(
            f"{store}: {len(found.faults)} damaged objects, listed above; copy the store again, or extract to a new one"
        )


@cli.group()
def recipes() -> None:
    """Published settings, ready to run."""


@recipes.command("list")
@_output
def recipes_list(as_json: bool, quiet: bool, verbose: int) -> None:
    """Names and one line each."""
    _prepare(quiet, verbose)
    from hdcache.distill.recipes import RECIPES

    lines = {name: (make.__doc__ or "").splitlines()[0] for name, make in RECIPES.items()}
    _print(lines, "\n".join(f"{name:<22}{line}" for name, line in lines.items()), as_json)


@recipes.command("show")
@click.argument("name")
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field first.")
@_output
def recipes_show(as_json: bool, quiet: bool, verbose: int, name: str, changes: Sequence[str]) -> None:
    """Every field of recipe NAME with its value, meaning and source; --json gives a file that 'distill' takes."""
    _prepare(quiet, verbose)
    from hdcache.distill.recipes import RECIPES, get_recipe, show

    recipe = get_recipe(name, _pairs(changes, "--set"))
    about = (RECIPES[name].__doc__ or "").strip()
    rows = "\n".join(f"{path:<32}{value:<24}{meaning}" for path, value, meaning in show(recipe))
    _print(recipe.model_dump(mode="json"), f"{about}\n\n{rows}", as_json)


@cli.command()
@_output
def doctor(as_json: bool, quiet: bool, verbose: int) -> None:
    """Check this installation: versions, device, reader, codecs, cores, memory and disk."""
    _prepare(quiet, verbose)
    from hdcache.doctor import examine, format_findings

    findings = examine()
    _print(findings, format_findings(findings), as_json)
    if not findings["good"]:
        sys.exit(1)


@cli.command()
@click.option(
    "--out", default="hdcache-quickstart", show_default=True, help="Folder for data, store, students and results."
)
@_output
def quickstart(as_json: bool, quiet: bool, verbose: int, out: str) -> None:
    """The whole way on real images in a few minutes: train two small teachers, extract, distill, score."""
    _prepare(quiet, verbose)
    from hdcache.quickstart import format_result, run_quickstart

    result = run_quickstart(Path(out), quiet=quiet)
    _print(result, format_result(result), as_json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every error that hdcache raises on purpose becomes one line and its exit code."""
    from hdcache.errors import HdcacheError

    # OpenMP's threads spin while they wait for each other. Beside decoding threads, or on a busy machine, that costs
    # most of a CPU's speed; it must be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("hdcache: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except HdcacheError as error:
        # An OSError subclass prints its number first; the message alone is for people.
        text = str(error.args[-1]) if error.args else type(error).__name__
        click.echo(f"hdcache: {' '.join(text.split())}", err=True)
        sys.exit(error.exit_code)
    except PermissionError as error:
        click.echo(f"hdcache: {error.filename}: permission denied; choose a folder that you may write", err=True)
        sys.exit(3)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "free space and run the same command again"
            if full
            else "check the disk or mount, then run the same command again"
        )
        click.echo(f"hdcache: {error.filename or 'input or output'}: {error.strerror or error}; {advice}", err=True)
        sys.exit(6 if full else 3)
