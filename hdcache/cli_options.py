"""What the commands share: their options, how a result is printed, how ``FIELD=VALUE`` is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from hdcache.errors import HdcacheError, printable

Command = Callable[..., Any]
ENGINE_OPTIONS = ("engine", "workers", "scheduler", "worker_resource", "worker_timeout")
"""Parameters of :func:`extraction` that say who extracts, and change nothing of what is stored."""


def output(command: Command) -> Command:
    """How much a command says, and in which form."""
    for option in (
        click.option("-v", "--verbose", count=True, help="More log lines; twice for debugging."),
        click.option("-q", "--quiet", is_flag=True, help="No progress, no log lines."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    ):
        command = option(command)
    return command


def extraction(command: Command) -> Command:
    """How teachers are run and what they gave is stored."""
    for option in reversed(
        (
            click.option("--views", help="How views are drawn: mae, supervised, gentle, center, resize; of videos videomae, videomae-ssv2, clip-center.  [default: mae, videomae]"),
            click.option("--num-views", default=1, show_default=True, help="Views per sample."),
            click.option("--view-seed", default=0, show_default=True, help="Seed of the views of a new store."),
            click.option("--fidelity", type=float, help="Relative RMSE to allow (klt encoding).  [default: 0.1, or that of a teacher in the store]"),
            click.option("--encoding", help="klt, int8, fp16, bf16, fp32; relations: sqrt8, fp16, fp32; logits: topk."),
            click.option("--precision", default="auto", show_default=True, help="Teacher arithmetic: auto, bf16, fp32."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
            click.option("--batch", default=32, show_default=True, help="Images per forward pass."),
            click.option("--threads", type=click.IntRange(min=1), help="Decoding threads of a process.  [default: its share of the cores]"),
            click.option("--rows-per-shard", default=256, show_default=True, help="Rows written, and lost, as one."),
            click.option("--max-failures", type=int, help="Stop when more images than this cannot be read.  [default: never]"),
            click.option("--engine", help="Who extracts: inline (this process), local (--workers), dask (--scheduler); the store is the same.  [default: what is given of them, else inline]"),
            click.option("--workers", type=int, metavar="N", help="Processes to start on this machine.  [default for --engine local: one for each CUDA device]"),
            click.option("--scheduler", metavar="ADDRESS", help="Of the Dask workers to use: tcp://HOST:PORT, tls://HOST:PORT, or the scheduler's file; see docs/scaling.md."),
            click.option("--worker-resource", multiple=True, metavar="NAME=AMOUNT", help="What a task takes of its Dask worker, e.g. GPU=1. Repeat for several."),
            click.option("--worker-timeout", type=float, metavar="SECONDS", help="How long to wait for a first Dask worker, or for another when all are gone.  [default: 60]"),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def teachers_of_data(command: Command) -> Command:
    """Which teachers see which data, and what is stored of them."""
    for option in reversed(
        (
            click.argument("data", required=False),
            click.option("--store", required=True, help="Folder of the store; made when it does not exist."),
            click.option(
                "--teacher", "teachers", multiple=True, required=True, metavar="[NAME=]MODEL",
                help="timm name, timm:NAME?checkpoint=FILE, random:NAME?seed=0, or a student folder. Repeat for several.",
            ),
            click.option(
                "--tap", "taps", multiple=True,
                help="Inner tensor to store, e.g. block9.attn_in, final, block12.rel.qk. Default: attn_in of TinyMIM's target block, and final.",
            ),
            click.option("--top-k", type=int, help="Classes of logits to keep, as soft labels.  [default: all; topk: 10]"),
            click.option("--budget", help="Bytes that the rows may need, e.g. 100GB: chooses the fidelity of each klt tap."),
            click.option(
                "--pixels", metavar="source|PX",
                help="Keep the images in the store too, which then needs DATA no more: source as they are, 256 those with a larger shorter side shrunk to it, once, before any teacher.",
            ),
            click.option("--img-size", type=int, help="Teacher input in pixels, when not its own."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def teacher_mask(command: Command) -> Command:
    """Which patch tokens teachers are run on."""
    for option in (
        click.option("--teacher-mask-seed", default=0, show_default=True, help="Seed of --teacher-mask."),
        click.option(
            "--teacher-mask",
            metavar="[KIND:]RATIO",
            help="Share of the patch tokens to hide from teachers: 0.75, random:0.75, tube:0.75.  [default: none]",
        ),
    ):
        command = option(command)
    return command


def prepare(quiet: bool, verbose: int) -> None:
    """Logging, and signals that stop at a safe point."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    # At the level of debugging they print what they receive, credentials included.
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(max(level, logging.INFO))
    from hdcache import stopping

    stopping.install()


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def print_result(result: Any, text: str, as_json: bool) -> None:
    """``result`` as JSON, or ``text``, on stdout."""
    click.echo(json.dumps(result, indent=1, allow_nan=False) if as_json else printable(text))


@contextmanager
def reported(result: dict[str, Any], lines: list[str], as_json: bool) -> Iterator[None]:
    """What was found before an error ended a command is printed still; as JSON with the error, so that there is always some to read."""
    try:
        yield
    except HdcacheError as error:
        if as_json or lines:
            text = str(error.args[-1]) if error.args else type(error).__name__
            found = result | {"good": False, "error": text, "exit_code": error.exit_code}
            print_result(found, "\n".join(lines), as_json)
        raise


def folder(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The name of a store's folder; an empty one would be the current folder."""
    if value == "":
        raise click.UsageError(
            f"{parameter.opts[0] if parameter.opts[0].startswith('-') else 'STORE'} is empty; name the folder of a store"
        )
    return value


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """``FIELD=VALUE`` texts by field."""
    found = {}
    for value in values:
        key, sign, rest = value.partition("=")
        if not sign or not key:
            raise click.UsageError(f"{option} takes FIELD=VALUE, got {value!r}")
        found[key] = rest
    return found


def numbered_pairs(values: Sequence[str], option: str, what: str) -> dict[int, dict[str, str]]:
    """``NUMBER:FIELD=VALUE`` texts by number (from 1) and field; ``what`` is the number's name in messages."""
    found: dict[int, dict[str, str]] = {}
    for value in values:
        number, sign, rest = value.partition(":")
        if not sign or not number.isascii() or not number.isdigit():
            raise click.UsageError(f"{option} takes {what}:FIELD=VALUE, such as 2:objective.heads=12, got {value!r}")
        found.setdefault(int(number), {}).update(pairs([rest], option))
    return found
