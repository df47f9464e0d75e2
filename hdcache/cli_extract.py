"""``hdcache extract`` and ``hdcache plan``: teachers run once, and what that will cost."""

from __future__ import annotations

from typing import Any

import click

from hdcache.cli_options import (
    ENGINE_OPTIONS,
    extraction,
    output,
    prepare,
    print_result,
    teacher_mask,
    teachers_of_data,
)
from hdcache.resources import keep_freed_memory


@click.command()
@teachers_of_data
@teacher_mask
@extraction
@click.option("--dry-run", is_flag=True, help="Only say what it will cost: 'hdcache plan'.")
@output
@click.pass_context
def extract(
    context: click.Context,
    /,
    as_json: bool,
    quiet: bool,
    verbose: int,
    data: str | None,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Run teachers over DATA once and store what they computed.

    DATA: a folder of class folders, video:DIR where they hold videos, tars (shard-{000..099}.tar), an .npz,
    hf:OWNER/NAME?split=train, torchvision:CIFAR10?root=DIR. It may be left out for a store that exists. The same
    command again goes on.
    """
    if dry_run:
        context.invoke(plan, data=data, as_json=as_json, quiet=quiet, verbose=verbose, **settings)
        return
    prepare(quiet, verbose)
    keep_freed_memory()
    from hdcache.extract.run import extract as run
    from hdcache.extract.summary import format_summary

    summary = run(data, **settings, quiet=quiet)
    print_result(summary.json(), format_summary(summary), as_json)


@click.command()
@teachers_of_data
@teacher_mask
@extraction
@output
def plan(as_json: bool, quiet: bool, verbose: int, data: str | None, **settings: Any) -> None:
    """What 'hdcache extract' with these arguments will cost: bytes, objects, hours, and whether a store pays at all.

    Some hundred rows are extracted to a scratch folder beside the store, which is deleted again. Exit 6 if it will not fit.
    """
    prepare(quiet, verbose)
    keep_freed_memory()
    from hdcache.extract.engine_choice import parse_engine
    from hdcache.extract.plan import check_room, format_plan
    from hdcache.extract.plan import plan as run

    spread = parse_engine(**{name: settings.pop(name) for name in ENGINE_OPTIONS})
    if spread.engine != "inline" and not quiet:
        click.echo(
            "hdcache: planned for one process on this machine; N workers need at least 1/N of the hours", err=True
        )
    found = run(data, **settings, quiet=quiet)
    print_result(found.json(), format_plan(found), as_json)
    check_room(found)
