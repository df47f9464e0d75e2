"""``hdcache recipes``: the published settings."""

from __future__ import annotations

from collections.abc import Sequence

import click

from hdcache.cli_options import output, pairs, prepare, print_result


@click.group(invoke_without_command=True)
@output
@click.pass_context
def recipes(context: click.Context, as_json: bool, quiet: bool, verbose: int) -> None:
    """Published settings, ready to run; without a further word, their list."""
    if context.invoked_subcommand is None:
        context.invoke(recipes_list, as_json=as_json, quiet=quiet, verbose=verbose)


@recipes.command("list")
@output
def recipes_list(as_json: bool, quiet: bool, verbose: int) -> None:
    """One line each: name, method, student, what it is for, teacher."""
    prepare(quiet, verbose)
    from hdcache.distill.recipes import format_list, list_recipes

    print_result(list_recipes(), format_list(), as_json)


@recipes.command("show")
@click.argument("name")
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field first.")
@output
def recipes_show(as_json: bool, quiet: bool, verbose: int, name: str, changes: Sequence[str]) -> None:
    """Every field of recipe NAME with its value, source and meaning; --json gives a file that 'distill' takes."""
    prepare(quiet, verbose)
    from hdcache.distill.recipes import format_recipe, get_recipe

    chosen = pairs(changes, "--set")
    print_result(get_recipe(name, chosen).model_dump(mode="json"), format_recipe(name, chosen), as_json)
