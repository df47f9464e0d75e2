"""The command line: parse, call one room's function, print. Nothing heavy is imported before a command runs.

stdout carries the result (text, or JSON with ``--json``), stderr logs and progress. Exit codes: 0 done, 1 unexpected,
2 usage, 3 input or store not found, 4 failures above ``--max-failures``, 5 store mismatch, locked or corrupt,
6 out of space, 75 stopped with progress saved, 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from hdcache.cli_check import gc, repair, verify
from hdcache.cli_distill import chain, distill
from hdcache.cli_extract import extract, plan
from hdcache.cli_options import output, prepare, print_result
from hdcache.cli_recipes import recipes
from hdcache.cli_share import catalog, export_store, pull, push, serve

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


@cli.command("knn-eval")
@click.argument("model")
@click.option("--train", required=True, help="Labelled data set: the bank of neighbours.")
@click.option("--test", help="Labelled data set to classify.  [default: leave-one-out on --train]")
@click.option(
    "--layer",
    multiple=True,
    help="final, blockN.out, or all: one table for every layer. Repeat for several.  [default: the last layer that training reached]",
)
@click.option(
    "--pool", type=click.Choice(["cls", "mean", "cls+mean"]), help="Token pooling.  [default: cls where it was trained]"
)
@click.option(
    "--k", "ks", multiple=True, type=int, default=(10, 20, 100, 200), show_default=True,
    help="Neighbours; repeat for several.",
)  # fmt: skip
@click.option("--temperature", default=0.07, show_default=True, help="Of the vote's weights exp(similarity / T).")
@click.option("--img-size", type=int, help="Input in pixels, when not the model's own.")
@click.option(
    "--crop",
    default=0.875,
    show_default=True,
    help="Share of the shorter side that the centre crop keeps; 1: all of it.",
)
@click.option("--stride", type=int, help="Of the clips that a video network is shown.  [default: as it was trained]")
@click.option("--leave-one-out", is_flag=True, help="Classify each image of --train by all the others.")
@click.option("--compat-dino", is_flag=True, help="Top-5 as DINO's script counts it (credits classes without a vote).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
@click.option("--batch-size", default=64, show_default=True, help="Images per forward pass.")
@click.option("--threads", type=click.IntRange(min=1), help="Decoding threads.  [default: the cores]")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the result to this JSON file.")
@output
def knn_eval(as_json: bool, quiet: bool, verbose: int, **settings: Any) -> None:
    """Weighted k-NN accuracy of MODEL's frozen features (a student folder or any model spec)."""
    prepare(quiet, verbose)
    from hdcache.evaluate.run import format_table
    from hdcache.evaluate.run import knn_eval as run
    from hdcache.progress import Progress

    bars: dict[str, Progress] = {}

    def advance(role: str, done: int, total: int) -> None:
        bar = bars.setdefault(role, Progress(f"embed {role}", total, "samples", quiet=quiet))
        bar.advance(done - bar.done)
        if done == total:
            bar.__exit__(None, None, None)

    result = run(progress=advance, **settings)
    print_result(result, format_table(result), as_json)


@cli.command()
@click.argument("store")
@output
def info(as_json: bool, quiet: bool, verbose: int, store: str) -> None:
    """What STORE holds: data set, views, teachers, taps, measured errors, bytes."""
    prepare(quiet, verbose)
    from hdcache.info import describe_store, format_store
    from hdcache.sharing.streaming import open_store

    facts = describe_store(open_store(store))
    print_result(facts, format_store(facts), as_json)


for command in (extract, plan, distill, chain, verify, repair, gc, recipes, push, pull, export_store, catalog, serve):
    cli.add_command(command)


@cli.command()
@output
def doctor(as_json: bool, quiet: bool, verbose: int) -> None:
    """Check this installation: versions, device, reader, codecs, cores, memory and disk."""
    prepare(quiet, verbose)
    from hdcache.doctor import examine, format_findings

    findings = examine()
    print_result(findings, format_findings(findings), as_json)
    if not findings["good"]:
        sys.exit(1)


@cli.command()
@click.option(
    "--out", default="hdcache-quickstart", show_default=True, help="Folder for data, store, students and results."
)
@output
def quickstart(as_json: bool, quiet: bool, verbose: int, out: str) -> None:
    """The whole way on real images in a few minutes: train two small teachers, extract, distill, score."""
    prepare(quiet, verbose)
    from hdcache.quickstart import format_result, run_quickstart

    result = run_quickstart(Path(out), quiet=quiet)
    print_result(result, format_result(result), as_json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every error that hdcache raises on purpose becomes one line and its exit code."""
    from hdcache.errors import HdcacheError, printable

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
        click.echo(f"hdcache: {printable(' '.join(text.split()))}", err=True)
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
