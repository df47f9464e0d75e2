"""``hdcache verify``, ``repair`` and ``gc``: whether a store is what it says, and how it becomes that again."""

from __future__ import annotations

from typing import Any

import click

from hdcache.cli_options import output, prepare, print_result


@click.command()
@click.argument("store")
@click.option("--quick", is_flag=True, help="Sizes only, no checksums.")
@click.option(
    "--live",
    type=int,
    metavar="N",
    help="Also run the teachers again on N stored rows of each and compare what is stored.",
)
@click.option(
    "--replay",
    type=int,
    metavar="N",
    help="Also open the images of N stored rows again: the same files, the same pixels?",
)
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME[=MODEL]",
    help="--live, --replay: this teacher alone; MODEL where its weights are now. Repeat for several.  [default: all]",
)  # fmt: skip
@click.option(
    "--min-cosine", type=float, help="--live: smallest cosine to allow.  [default: by the birth certificates]"
)
@click.option("--data", help="--live, --replay: the data set, if it has moved and the store does not keep its images.")
@click.option("--device", default="auto", show_default=True, help="--live: auto, cpu, cuda, cuda:1, mps.")
@click.option("--threads", type=int, help="--live, --replay: decoding threads.  [default: the cores]")
@click.option("--seed", default=0, show_default=True, help="--live, --replay: which rows are drawn.")
@output
@click.pass_context
def verify(
    context: click.Context, /, as_json: bool, quiet: bool, verbose: int, store: str, quick: bool, live: int | None,
    replay: int | None, min_cosine: float | None, device: str, **drawn: Any,
) -> None:  # fmt: skip
    """Check every object of STORE against its manifest; exit 5 and the list of damaged objects otherwise.

    With --live or --replay sizes are checked first, and checksums of what is read alone.
    """
    prepare(quiet, verbose)
    from dataclasses import asdict

    from hdcache.errors import StoreCorrupt
    from hdcache.integrity import verify as run
    from hdcache.progress import Progress, size
    from hdcache.store import Store

    _check_options(context, live, replay)
    opened = Store.open(store)
    with Progress("verify", 0, "bytes", quiet=quiet) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        found = run(opened, quick=quick or live is not None or replay is not None, progress=advance)
    lines = [
        f"{found.objects:,} objects, {size(found.bytes)}: {'all good' if found.good else f'{len(found.faults)} damaged'}"
    ]
    lines += [f"not sealed yet: {key}" for key in found.unsealed]
    lines += [f"not part of the store: {key}" for key in found.unlisted]
    lines += found.faults
    result = asdict(found) | {"good": found.good}
    checks: list[dict[str, Any]] = []
    if replay is not None and found.good:
        from hdcache.extract.replay import format_replay
        from hdcache.extract.replay import replay as again

        checks.append(again(opened, replay, **drawn, quiet=quiet))
        result["replay"] = checks[-1]
        lines += format_replay(checks[-1])
    if live is not None and found.good:
        from hdcache.extract.audit import audit, format_audit

        checks.append(audit(opened, live, min_cosine=min_cosine, device=device, **drawn, quiet=quiet))
        result["live"] = checks[-1]
        lines += format_audit(checks[-1])
    faults = [fault for check in checks for fault in check["faults"]]
    result["good"] = found.good and not faults
    print_result(result, "\n".join(lines), as_json)
    if not found.good:
        raise StoreCorrupt(
            f"{store}: {len(found.faults)} damaged objects, listed above; 'hdcache repair {store}' makes them again, or takes them "
            "from a good copy (--from COPY)"
        )
    if faults:
        more = f" (and {len(faults) - 1} more, listed above)" if len(faults) > 1 else ""
        raise StoreCorrupt(f"{store}: {faults[0]}{more}")


def _check_options(context: click.Context, live: int | None, replay: int | None) -> None:
    """Options that say how rows are checked belong to a check of rows."""
    from click.core import ParameterSource

    both, alone = ("teachers", "data", "threads", "seed"), ("min_cosine", "device")
    for names, given, belongs in (
        (alone, live is not None, "--live N"),
        (both, live is not None or replay is not None, "--live N or --replay N"),
    ):
        for name in names:
            if not given and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                option = "--" + name.removesuffix("s" if name == "teachers" else "").replace("_", "-")
                raise click.UsageError(f"{option} says how rows are checked; add {belongs}")


@click.command()
@click.argument("store")
@click.option(
    "--from", "copy", metavar="COPY", help="Take what is damaged from this folder, another copy of the same store."
)
@click.option("--data", help="The data set, if it has moved and the store does not keep its images.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="NAME=MODEL",
    help="Where the weights of a teacher are now. Repeat for several.",
)
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps: the one that extracted."
)
@click.option("--threads", type=int, help="Decoding threads.  [default: the cores]")
@click.option("--quick", is_flag=True, help="Look for damage by sizes only, no checksums.")
@click.option("--dry-run", is_flag=True, help="Only say what is damaged, and how it would be mended.")
@click.option(
    "--reseal", is_flag=True, help="Take rows that come out with other bytes, and give their views another seal."
)
@output
def repair(as_json: bool, quiet: bool, verbose: int, store: str, **settings: Any) -> None:
    """Make again what is damaged in STORE, and nothing else, or take it from a good copy.

    Whatever is replaced is replaced by bytes of the recorded sha256, so that every seal stays as it was. Exit 5 if something is left.
    """
    prepare(quiet, verbose)
    from hdcache.errors import UsageError
    from hdcache.extract.repair import check_repaired, format_repair
    from hdcache.extract.repair import repair as run
    from hdcache.resources import keep_freed_memory

    for text in settings["teachers"]:
        if "=" not in text:
            raise UsageError(f"--teacher {text}: say where its weights are: --teacher {text}=MODEL")
    keep_freed_memory()
    result = run(store, **settings, quiet=quiet)
    print_result(result, format_repair(result), as_json)
    check_repaired(result)


@click.command()
@click.argument("store")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--unlisted", is_flag=True, help="Remove files too that no record lists.")
@output
def gc(as_json: bool, quiet: bool, verbose: int, store: str, dry_run: bool, unlisted: bool) -> None:
    """Remove what killed processes left in STORE: unfinished files, which nothing reads. Exit 5 while somebody writes it."""
    prepare(quiet, verbose)
    from dataclasses import asdict

    from hdcache.errors import StoreLocked
    from hdcache.leftovers import collect, format_leftovers
    from hdcache.store import Store

    found = collect(Store.open(store), unlisted=unlisted, dry_run=dry_run)
    print_result(asdict(found) | {"bytes": found.bytes}, format_leftovers(found), as_json)
    if found.busy:
        raise StoreLocked(found.busy[0])
