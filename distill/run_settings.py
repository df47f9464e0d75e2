"""What a run reads and how it goes, beside its recipes: checked before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hdcache.datasets import Dataset, open_dataset, store_dataset
from hdcache.distill.learner import Monitor
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.schema import MaskSpec, ViewSpec
from hdcache.store import Store


@dataclass(frozen=True)
class RunSettings:
    """The parameters of :func:`hdcache.distill.run.distill` that all students of a run share."""

    store: str | Path | None = None
    data: str | None = None
    online: bool = False
    teachers: Sequence[str] = ()
    teacher_mask: str | MaskSpec | None = None
    teacher_mask_seed: int = 0
    views: str | ViewSpec | None = None
    num_views: int | None = None
    device: str = "auto"
    threads: int | None = None
    quiet: bool = True
    monitor: Monitor | None = None
    monitor_every: int = 1
    cache_size: str | int | None = None

    def check(self, folders: Sequence[Path]) -> None:
        """Refuse what cannot be meant, :class:`UsageError`; ``folders`` are those of the students."""
        if self.views is not None and self.store is not None:
            raise UsageError("--views is for runs without a store; with --store its own are used: leave --views out")
        if self.cache_size is not None and "://" not in str(self.store):
            raise UsageError("--cache-size is for a --store at a URL; leave it out")
        if self.monitor_every < 1:
            raise UsageError(f"monitor_every {self.monitor_every} must be at least 1 epoch")
        for setting, value in (("num_views", self.num_views), ("threads", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{setting} {value} must be at least 1")
        if self.teachers and not self.online:
            raise UsageError("--teacher names teachers to run in the loop; add --online, or drop it to read the store")
        for folder in folders:
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"{folder} is a file; give --out a folder")
        masked = self.teacher_mask is not None or self.teacher_mask_seed
        if masked and (self.store is not None or not self.online):
            raise UsageError(
                "--teacher-mask concerns teachers that run in the loop without a store (--online --teacher NAME=SPEC); "
                "those of a store keep the masks they were extracted with: leave it out"
            )


def open_data(store: Store | None, data: str | None) -> Dataset:
    """The data set of a store: the one that ``data`` names, the samples that the store keeps itself, or where it was."""
    if store is None:
        if data is None:
            raise UsageError(
                "nothing to train on; give --store STORE, or --data DATA for an objective without a teacher"
            )
        return open_dataset(data)
    try:
        dataset = store_dataset(store, data)
    except InputNotFound as error:
        raise InputNotFound(f"{error}; if the data set has moved, say where with --data") from None
    if dataset.card.fingerprint != store.card.dataset.fingerprint:
        raise StoreMismatch(
            f"{dataset.card.spec} is not the data set that {store.path} was made from ({dataset.card.count} samples, fingerprint "
            f"{dataset.card.fingerprint[:12]}..., expected {store.card.dataset.count}, {store.card.dataset.fingerprint[:12]}...)"
        )
    return dataset
