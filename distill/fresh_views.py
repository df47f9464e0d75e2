"""How the views of a run are drawn: those of the store, those that are asked for, or those that the loss prefers."""

from __future__ import annotations

from hdcache.datasets import Dataset
from hdcache.distill.settings import Recipe
from hdcache.errors import UsageError
from hdcache.schema import ViewSpec
from hdcache.store import Store
from hdcache.views import default_views, parse_views, vary


def choose_views(
    recipe: Recipe, store: Store | None, dataset: Dataset, asked: str | ViewSpec | None
) -> tuple[ViewSpec, str]:
    """How views are drawn, and what the first line calls them; refused where the loss needs views that differ."""
    name: str
    if store is not None:
        spec, name = store.card.views, store.card.views.kind
    elif isinstance(asked, ViewSpec):
        spec, name = asked, asked.kind
    else:
        # An objective's own views are of still images.
        own = recipe.objective.default_views() if dataset.card.kind != "video" else None
        name = asked or own or default_views(dataset.card)
        spec = parse_views(name, recipe.seed)
    check_varied(recipe, spec, "give --views" if store is None else "extract to a new store with --views")
    return spec, name


def check_varied(recipe: Recipe, spec: ViewSpec, fix: str) -> None:
    """:class:`UsageError` where the loss needs views that differ, but those of ``spec`` never do; ``fix`` leads the advice."""
    if recipe.objective.fresh_views() and not vary(spec):
        raise UsageError(
            f"recipe {recipe.name!r} draws new views of each sample in every epoch, but these ({spec.kind}, flip {spec.flip:g}) "
            f"are always the same; {fix} supervised, mae or gentle (videomae for clips)"
        )
