"""The commands by which stores travel and are found: ``push``, ``pull``, ``export-store``, ``catalog``, ``serve``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from hdcache.cli_options import Command, output, prepare, print_result


@click.command("export-store")
@click.argument("store")
@click.argument("out")
@click.option(
    "--format", "layout", required=True, metavar="safetensors|webdataset",
    help="Shards of arrays [rows, tokens, channels], or tars of one safetensors object a sample and tap.",
)  # fmt: skip
@click.option("--teacher", "teachers", multiple=True, help="Teacher to export; repeat for several.  [default: all]")
@click.option(
    "--tap", "taps", multiple=True, help="Stored tap, as it is; repeat for several.  [default: all, where no --target is given]"
)  # fmt: skip
@click.option(
    "--target", "targets", multiple=True, help="What follows from a tap, e.g. block9.qkv, block9.rel.qk@12; repeat for several."
)  # fmt: skip
@click.option("--view", default=0, show_default=True, help="Number of the view.")
@click.option("--dtype", default="fp16", show_default=True, help="fp16, bf16 or fp32.")
@click.option("--images", is_flag=True, help="The view's pixels too, as the teachers saw them: uint8, in tars as PNG.")
@click.option("--data", help="Data set for --images, when the store does not keep it or it has moved.")
@click.option("--rows-per-shard", type=int, help="Rows of a file.  [default: 1024, or what 256 MiB hold]")
@click.option("--threads", type=click.IntRange(min=1), help="Decoding threads.  [default: the cores]")
@click.option("--dry-run", is_flag=True, help="Say how many bytes that will be, and write nothing.")
@output
def export_store(
    as_json: bool, quiet: bool, verbose: int, store: str, out: str, teachers: Sequence[str], taps: Sequence[str],
    targets: Sequence[str], **settings: Any,
) -> None:  # fmt: skip
    """Write the decoded rows of STORE to the folder OUT, for those who read another layout.

    The same command again goes on, and checks the shards that are there.
    """
    prepare(quiet, verbose)
    from hdcache.sharing.export import export_store as run
    from hdcache.sharing.export import format_export

    found = run(store, out, teachers=teachers, taps=taps, targets=targets, quiet=quiet, **settings)
    print_result(found, format_export(found), as_json)


def _copying(command: Command) -> Command:
    """What of a store is copied, and how."""
    for option in reversed(
        (
            click.option("--teacher", "names", multiple=True, metavar="NAME", help="Only this teacher. Repeat for several.  [default: all]"),
            click.option("--tap", "taps", multiple=True, help="Only this tap of them, and what masks and records it needs. Repeat for several.  [default: all]"),
            click.option("--view", "numbers", multiple=True, type=int, help="Only this view of them. Repeat for several.  [default: all]"),
            click.option("--no-pixels", is_flag=True, help="Leave the samples behind that the store keeps itself."),
            click.option("--dry-run", is_flag=True, help="Only say how many bytes and objects that would be."),
            click.option("--parallel", default=8, show_default=True, help="Objects that travel at a time."),
            click.option("--endpoint-url", metavar="URL", help="Of an object store that is not the provider's own (MinIO, Ceph ...).  [default: AWS_ENDPOINT_URL]"),
            click.option("--anonymous", is_flag=True, help="Send no credentials."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("store")
@click.argument("url")
@_copying
@click.option(
    "--read-back", is_flag=True, help="Read everything back that was written, also where the other side proved it."
)
@output
def push(as_json: bool, quiet: bool, verbose: int, store: str, url: str, **settings: Any) -> None:
    """Copy STORE, or a part of it, to URL: another folder, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH.

    What is there already is proven, never overwritten; the same command again goes on. Credentials are those of the
    environment and the usual files.
    """
    prepare(quiet, verbose)
    _copy("push", store, url, as_json, quiet, **settings)


@click.command()
@click.argument("url")
@click.argument("store")
@_copying
@output
def pull(as_json: bool, quiet: bool, verbose: int, url: str, store: str, **settings: Any) -> None:
    """Copy the store at URL, or a part of it, to the folder STORE; URL as for push, or http(s)://HOST/PATH.

    Everything is held to its sha256 before it gets its name. More teachers, taps and views are added by the same command with others.
    """
    prepare(quiet, verbose)
    _copy("pull", url, store, as_json, quiet, **settings)


def _copy(
    command: str, source: str, target: str, as_json: bool, quiet: bool, names: Sequence[str], taps: Sequence[str], numbers: Sequence[int],
    no_pixels: bool, endpoint_url: str | None, anonymous: bool, dry_run: bool, **how: Any,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from hdcache.errors import UsageError
    from hdcache.sharing.folder import Folder
    from hdcache.sharing.places import open_place
    from hdcache.sharing.selection import Wanted
    from hdcache.sharing.transfer import copy_store, format_copied

    places = [open_place(where, endpoint_url=endpoint_url, anonymous=anonymous) for where in (source, target)]
    if not isinstance(places[command == "pull"], Folder):
        raise UsageError(
            f"hdcache {command}: STORE is a folder, {(source, target)[command == 'pull']!r} is none; copy by way of one"
        )
    wanted = Wanted(tuple(names), tuple(taps), tuple(numbers), pixels=not no_pixels)
    found = copy_store(places[0], places[1], wanted, dry_run=dry_run, quiet=quiet, **how)
    print_result(asdict(found) | {"dry_run": dry_run}, format_copied(found, dry_run=dry_run), as_json)


@click.command()
@click.argument("where", metavar="ROOT_OR_URL")
@click.option(
    "--teacher", default="", metavar="TEXT", help="Only stores with a teacher whose name or model holds TEXT."
)
@click.option("--tap", default="", metavar="TEXT", help="Only stores in which that teacher has a tap that holds TEXT.")
@click.option("--search", default="", metavar="TEXT", help="Only stores in which every word of TEXT is found anywhere.")
@click.option(
    "--endpoint-url",
    metavar="URL",
    help="Of an object store that is not the provider's own.  [default: AWS_ENDPOINT_URL]",
)
@click.option("--anonymous", is_flag=True, help="Send no credentials.")
@output
def catalog(
    as_json: bool, quiet: bool, verbose: int, where: str, teacher: str, tap: str, search: str, **settings: Any
) -> None:
    """List the stores in and below ROOT, a bucket (s3://BUCKET/PATH ...) or a server ('hdcache serve').

    One that cannot be read is listed with its fault. Links are not followed.
    """
    prepare(quiet, verbose)
    from hdcache.sharing.catalogue_entries import CatalogueRecord, select
    from hdcache.sharing.catalogue_text import format_catalogue
    from hdcache.sharing.catalogue_urls import read_catalogue

    found = select(read_catalogue(where, **settings), teacher=teacher, tap=tap, search=search)
    text = format_catalogue(where, found, filtered=bool(teacher or tap or search))
    print_result(CatalogueRecord(stores=tuple(found)).model_dump(mode="json"), text, as_json)


@click.command()
@click.argument("root")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all of this machine's."
)
@click.option("--port", default=8008, show_default=True, help="0: any that is free.")
@click.option(
    "--originals", is_flag=True,
    help="Show images from where a store says its data set lies, when it keeps none: for stores that you trust.",
)  # fmt: skip
@output
def serve(as_json: bool, quiet: bool, verbose: int, root: str, host: str, port: int, originals: bool) -> None:
    """Serve the stores in and below ROOT over HTTP, read-only: pages to look at, files for 'hdcache pull'.

    Only this machine reaches it unless --host says otherwise. Ctrl-C ends it.
    """
    prepare(quiet, verbose)
    from hdcache import stopping
    from hdcache.sharing.catalogue import Catalogue
    from hdcache.sharing.server import make_server

    server = make_server(Catalogue(root), host, port, originals=originals)
    if not server.local:
        click.echo(
            f"hdcache: WARNING: whoever reaches {server.url} may read every store in and below {root}, and the images in them; "
            "nobody is asked for a password. Leave --host out to serve this machine alone.",
            err=True,
        )
    print_result(
        {"url": server.url, "root": str(server.site.catalogue.root)}, f"{server.url}/  (Ctrl-C ends it)", as_json
    )
    server.run(stopping.requested)
