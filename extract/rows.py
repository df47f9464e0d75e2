"""Which samples a shard's rows are of, and what becomes of each of them before any network sees it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hdcache.datasets import Dataset
from hdcache.errors import StoreMismatch, UnreadableImage
from hdcache.extract.writer import Row, is_recorded
from hdcache.geometry import read_shard_geometry
from hdcache.samples import Recorded, open_sample
from hdcache.schema import Preprocessing
from hdcache.store import Store
from hdcache.views import row_order


@lru_cache(maxsize=2)
def order_of(count: int, seed: int, view: int) -> NDArray[np.int64]:
    """The view's order, kept: a million rows take a tenth of a second to sort, and every shard asks for it."""
    order = row_order(count, seed, view)
    order.setflags(write=False)
    return order


def shard_rows(store: Store, view: int, shard: int) -> list[tuple[int, Recorded | None]]:
    """Sample index of each row of a shard, and its recorded geometry where a teacher has been here before.

    Raises
    ------
    StoreMismatch
        when the recorded rows are in another order than the store's seed gives.
    """
    size = store.card.rows_per_shard
    order = order_of(store.card.dataset.count, store.card.views.seed, view)[shard * size : (shard + 1) * size]
    rows: list[tuple[int, Recorded | None]] = [(int(sample), None) for sample in order]
    known = read_shard_geometry(store, view, shard)
    for i, (numbers, digest) in enumerate(zip(*known, strict=True) if known is not None else ()):
        if int(numbers[0]) != rows[i][0]:
            raise StoreMismatch(
                f"{store.path}/views/{view}: row {i} of shard {shard} names another sample than the store's seed gives; "
                "run 'hdcache verify', or extract to a new store"
            )
        if is_recorded(numbers):
            rows[i] = (rows[i][0], (numbers, digest.tobytes()))
    return rows


def decode_row(
    store: Store,
    dataset: Dataset,
    preprocessing: Preprocessing,
    view: int,
    sample: int,
    recorded: Recorded | None = None,
) -> Row:
    """Open one sample and render its view for one network; a failure becomes the row's reason."""
    try:
        opened = open_sample(dataset, store.ids[sample], store.card.views, view, recorded)
    except (UnreadableImage, StoreMismatch) as error:
        return Row(sample, None, reason=str(error), gone=_by_the_system(error))
    return Row(
        sample,
        opened.pixels(preprocessing),
        opened.box,
        opened.flip,
        opened.image.size,
        opened.digest,
        frames=opened.frames,
    )


def _by_the_system(error: BaseException | None) -> bool:
    """Whether an error goes back to the operating system (no such file, stale mount) and not to the bytes read."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__cause__ or error.__context__
    return False
