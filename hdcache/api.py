"""A store in your own training loop: open it, ask for targets, iterate.

>>> store = hdcache.open_store("train.hdc")                              # doctest: +SKIP
>>> for batch in store.loader({"dino": ["final"]}, batch_size=64, size=112):
...     loss = my_loss(student(batch.images), batch.targets["dino"]["final"].patches)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hdcache.datasets import store_dataset
from hdcache.errors import InputNotFound, StoreMismatch, UsageError
from hdcache.index import check_records
from hdcache.integrity import Verification, verify
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.photometric import Photometric
from hdcache.reader import TeacherReader
from hdcache.resources import available_cores
from hdcache.schema import Preprocessing
from hdcache.sharing.streaming import open_store as open_url_or_folder
from hdcache.store import Store
from hdcache.target_sources import open_targets


class OpenedStore:
    """A store, ready to be looked into and to be trained from."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def path(self) -> Path:
        """Where the store lies."""
        return self.store.path

    @property
    def ids(self) -> tuple[str, ...]:
        """Sample ids, sorted."""
        return self.store.ids

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; labels index into them."""
        return self.store.card.dataset.classes

    def __len__(self) -> int:
        return self.store.card.dataset.count

    def teachers(self) -> list[str]:
        """Names of the teachers in the store; :class:`StoreCorrupt` where the record of one is lost."""
        check_records(self.store)
        return self.store.teachers()

    def teacher(self, name: str) -> TeacherReader:
        """Record, encoders, weights and rows of one teacher."""
        return TeacherReader(self.store, name)

    def loader(
        self,
        targets: Mapping[str, Sequence[str]],
        *,
        batch_size: int,
        size: int,
        data: str | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        jitter: tuple[float, float, float] | None = None,
        num_views: int | None = None,
        drop_last: bool = False,
        buffer_rows: int = 1024,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Loader:
        """Shuffled batches of images with their teachers' targets; iterating again yields the next epoch.

        Parameters
        ----------
        targets
            teacher name -> target names (:mod:`hdcache.targets`), for example
            ``{"dino": ["final", "block9.rel.qk"]}``.
        batch_size
            rows of a global batch, shared by ``world`` processes.
        size
            side of the student's square input, pixels.
        data
            where the data set is now, if it has moved since extraction; left out, samples that the store keeps are read.
        jitter
            half ranges of brightness, contrast and saturation, fresh in every epoch.

        Returns
        -------
        Loader
            of :class:`~hdcache.loader.Batch`: images float32 [B, 3, size, size], ids, labels int64 [B], targets.
        """
        card = self.store.card.dataset
        try:
            dataset = store_dataset(self.store, data)
        except InputNotFound as error:
            raise error if data else InputNotFound(f"{error}; if the data set has moved, give data=SPEC") from None
        if dataset.card.fingerprint != card.fingerprint:
            raise StoreMismatch(
                f"{dataset.card.spec} is not the data set that {self.path} was made from: its samples, labels or sizes "
                "differ; give data=SPEC of the original"
            )
        where = torch.device(device)
        light, contrast, colour = jitter or (0.0, 0.0, 0.0)
        options = Options(
            batch_size=batch_size,
            preprocessing=Preprocessing(size=size, mean=mean, std=std, frames=self.store.card.views.frames),
            seed=seed,
            buffer_rows=buffer_rows,
            augment=(None if jitter is None else Photometric(brightness=light, contrast=contrast, saturation=colour),),
            drop_last=drop_last,
            rank=rank,
            world=world,
            threads=available_cores() if threads is None else threads,
            device=where,
            dtype=dtype,
        )
        stored, _ = open_targets(self.store, targets, device=where, dtype=dtype)
        return Loader(
            dataset, options, views=self.store.card.views, store=self.store, stored=stored, num_views=num_views
        )

    def info(self) -> dict[str, Any]:
        """What ``hdcache info --json`` prints."""
        from hdcache.info import describe_store

        return describe_store(self.store)

    def verify(self, *, quick: bool = False) -> Verification:
        """Check every object against the manifests: sizes (``quick``), and sha256 otherwise."""
        if not self.store.files.on_disk:
            raise UsageError(
                f"{self.store.files.where}: its objects are proven as they are read; to verify all of them, get the store: "
                f"hdcache pull {self.store.files.where} FOLDER"
            )
        return verify(self.store, quick=quick)


def open_store(path: str | Path, *, cache_size: str | int | None = None) -> OpenedStore:
    """Open a store in a folder, or at a URL through a cache of ``cache_size`` bytes (``50GB``) on this machine.

    Raises
    ------
    InputNotFound
        when there is none at ``path``.
    StoreMismatch
        when it was written in a newer format.
    """
    return OpenedStore(open_url_or_folder(path, cache_size=cache_size))
