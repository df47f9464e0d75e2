"""How the views of a run are drawn: those of the store, those that are asked for, or those that the loss prefers."""

from __future__ import annotations

from hdcache.datasets import Dataset
from hdcache.distill.settings import Recipe
from hdcache.errors import UsageError
from hdcache.schema import ViewSpec
from hdcache.store import Store
from hdcache.views import PRESETS, default_views, parse_views, vary


def choose_views(
    recipe: Recipe, store: Store | None, dataset: Dataset, asked: str | ViewSpec | None
) -> tuple[ViewSpec, str]:
    """How views are drawn, and what the first line calls them; refused where the loss needs views that differ."""
    name: str
    if store is not None:
        spec, name = store.card.views, name_of(store.card.views)
    elif isinstance(asked, ViewSpec):
        spec, name = asked, name_of(asked)
    else:
        # An objective's own views are of still images.
        own = recipe.objective.default_views() if dataset.card.kind != "video" else None
        name = asked or own or default_views(dataset.card)
        spec = parse_views(name, recipe.order_seed())
    check_varied(recipe, spec, "give --views" if store is None else "extract to a new store with --views")
    return spec, name


def name_of(spec: ViewSpec) -> str:
    """The first preset that draws views as ``spec`` does, whatever the seed; the kind of those that none draws."""
    return next((name for name, found in PRESETS.items() if found == spec.model_copy(update={"seed": 0})), spec.kind)


def check_varied(recipe: Recipe, spec: ViewSpec, fix: str) -> None:
    """:class:`UsageError` where the loss needs views that differ, but those of ``spec`` never do; ``fix`` leads the advice.

    Views of one geometry still differ where each has colours of its own.
    """
    coloured = any(found is not None for found in recipe.augmentations())
    if recipe.objective.fresh_views() and not coloured and not vary(spec):
        raise UsageError(
            f"recipe {recipe.name!r} draws new views of each sample in every epoch, but these ({spec.kind}, flip {spec.flip:g}, "
            f"jitter null) are always the same; {fix} supervised, mae or gentle (videomae for clips), or set jitter"
        )
