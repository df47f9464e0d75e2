"""``hdcache verify``, ``repair`` and ``gc``: whether a store is what it says, and how it becomes that again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from hdcache.cli_options import folder, output, prepare, print_result, reported


@click.command()
@click.argument("store", callback=folder)
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
@click.option("--threads", type=click.IntRange(min=1), help="--live, --replay: decoding threads.  [default: the cores]")
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
    from hdcache.errors import StoreCorrupt
    from hdcache.progress import counted
    from hdcache.store import Store

    _check_options(context, live, replay)
    result: dict[str, Any] = {}
    lines: list[str] = []
    with reported(result, lines, as_json):
        opened = Store.open(store)
        drawn |= _check_rows(opened, live, replay, min_cosine, device, drawn)
        good = _check_objects(opened, quick or live is not None or replay is not None, quiet, result, lines)
        checks: list[dict[str, Any]] = []
        for option, rows in (("replay", replay), ("live", live)):
            if rows is None:
                continue
            if not good:
                result[option] = None
                lines.append(f"--{option}: not run; mend what is damaged first")
            elif option == "replay":
                from hdcache.extract.replay import format_replay
                from hdcache.extract.replay import replay as again

                checks.append(again(opened, rows, **drawn, quiet=quiet))
                lines += format_replay(checks[-1])
                result[option] = checks[-1]
            else:
                from hdcache.extract.audit import audit, format_audit

                checks.append(audit(opened, rows, min_cosine=min_cosine, device=device, **drawn, quiet=quiet))
                lines += format_audit(checks[-1])
                result[option] = checks[-1]
    faults = [fault for check in checks for fault in check["faults"]]
    result["good"] = good and not faults
    print_result(result, "\n".join(lines), as_json)
    if not good:
        raise StoreCorrupt(
            f"{store}: {counted(len(result['faults']), 'damaged objects')}, listed above; 'hdcache repair {store}' makes them again, or "
            "takes them from a good copy (--from COPY)"
        )
    if faults:
        more = f" (and {len(faults) - 1} more, listed above)" if len(faults) > 1 else ""
        raise StoreCorrupt(f"{store}: {faults[0]}{more}")


def _check_rows(
    store: Any, live: int | None, replay: int | None, min_cosine: float | None, device: str, drawn: Mapping[str, Any]
) -> dict[str, Any]:
    """Refuse what cannot be meant before any object is looked at; the images, opened once, if they are there to be opened."""
    if live is None and replay is None:
        return {}
    from hdcache.extract.checked_rows import check_asked

    if live is not None:
        from hdcache.extract.audit import check_audit

        check_audit(store, live, min_cosine, device)
    rows = min(number for number in (live, replay) if number is not None)
    found = check_asked(store, rows, drawn["teachers"], drawn["data"], drawn["threads"])
    return {"data": drawn["data"] if found is None else found}


def _check_objects(store: Any, quick: bool, quiet: bool, result: dict[str, Any], lines: list[str]) -> bool:
    """Compare every object with what the store lists, and say what was found; whether all is good."""
    from dataclasses import asdict

    from hdcache.integrity import verify
    from hdcache.progress import Progress, size

    with Progress("verify", 0, "bytes", quiet=quiet) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        found = verify(store, quick=quick, progress=advance)
    lines.append(
        f"{found.objects:,} objects, {size(found.bytes)}: {'all good' if found.good else f'{len(found.faults)} damaged'}"
    )
    lines += [f"not sealed yet: {key}" for key in found.unsealed]
    lines += [f"not part of the store: {key}" for key in found.unlisted]
    lines += found.faults
    result |= asdict(found) | {"good": found.good}
    return found.good


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
@click.argument("store", callback=folder)
@click.option(
    "--from",
    "copy",
    metavar="COPY",
    callback=folder,
    help="Take what is damaged from this folder, another copy of the same store.",
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
@click.option("--threads", type=click.IntRange(min=1), help="Decoding threads.  [default: the cores]")
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
    from hdcache.extract.repair import check_repaired, format_repair
    from hdcache.extract.repair import repair as run
    from hdcache.resources import keep_freed_memory

    keep_freed_memory()
    with reported({}, [], as_json):
        result = run(store, **settings, quiet=quiet)
    print_result(result, format_repair(result), as_json)
    check_repaired(result)


@click.command()
@click.argument("store", callback=folder)
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
