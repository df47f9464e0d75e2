"""The same rows in the layouts that others use, each read by its own library in a shuffled epoch; for benchmarks/loader.py.

A layout is a class: ``write`` makes its files once, ``batches`` yields one shuffled epoch of float16 [B, T, D] tensors,
``close`` ends what it keeps open between epochs. Libraries are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

Rows = NDArray[np.float16]
"""[R, T, D], possibly a memory map."""


def missing(*packages: str) -> str:
    """The first of these packages that is not installed; empty where all are."""
    return next((name for name in packages if importlib.util.find_spec(name) is None), "")


class Layout(ABC):
    """One way to keep the rows; ``workers`` are processes that read beside the consumer's."""

    name = ""
    needs: tuple[str, ...] = ()
    workers = (0, 1, 2)

    def __init__(self, folder: Path, rows: int, shape: tuple[int, int], batch: int, workers: int, buffer: int) -> None:
        self.folder, self.rows, self.shape = folder, rows, shape
        self.batch, self.workers_used, self.buffer = batch, workers, buffer
        self._loader: Any = None

    @abstractmethod
    def write(self, rows: Rows) -> None:
        """Make the files."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[Tensor]:
        """One epoch, in another order each time."""

    def close(self) -> None:
        """End worker processes and close files."""
        self._loader = None

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


class LoaderLayout(Layout):
    """A layout that comes with a loader, or is read by torch's."""

    @abstractmethod
    def open(self) -> Any:
        """An iterable over the batches of an epoch, kept until :meth:`close`."""

    def batches(self, epoch: int) -> Iterator[Tensor]:
        self._loader = self.open() if self._loader is None else self._loader
        return iter(self._loader)

    def _loaded(self, dataset: Any, **more: Any) -> Any:
        kept = self.workers_used > 0
        return DataLoader(dataset, num_workers=self.workers_used, persistent_workers=kept, drop_last=False, **more)


class WebDatasetLayout(LoaderLayout):
    """tar archives of 1,000 safetensors, Theia's layout; a shuffle buffer within the archives."""

    name, needs = "WebDataset tar + safetensors", ("webdataset",)

    def write(self, rows: Rows) -> None:
        for start in range(0, len(rows), 1000):
            with tarfile.open(self.folder / f"{start // 1000:06d}.tar", "w") as archive:
                for number in range(start, min(len(rows), start + 1000)):
                    data = save_safetensors({"embedding": torch.from_numpy(np.array(rows[number]))})
                    entry = tarfile.TarInfo(f"{number:08d}.safetensors")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))

    def open(self) -> Any:
        import webdataset

        archives = [str(path) for path in sorted(self.folder.glob("*.tar"))]
        data = webdataset.WebDataset(archives, shardshuffle=len(archives), empty_check=False).shuffle(self.buffer)
        data = data.map(lambda sample: load_safetensors(sample["safetensors"])["embedding"])
        return self._loaded(data.batched(self.batch, collation_fn=torch.stack), batch_size=None)


class Mosaic(LoaderLayout):
    """MosaicML streaming's MDS, a fixed-shape ndarray a sample."""

    name, needs = "MosaicML streaming", ("streaming",)
    compression: str | None = None

    def write(self, rows: Rows) -> None:
        from streaming import MDSWriter

        columns = {"x": f"ndarray:float16:{self.shape[0]},{self.shape[1]}"}
        with MDSWriter(out=str(self.folder), columns=columns, compression=self.compression, exist_ok=True) as writer:
            for row in rows:
                writer.write({"x": np.array(row)})

    def open(self) -> Any:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        data = StreamingDataset(
            local=str(self.folder), shuffle=True, batch_size=self.batch, keep_zip=self.compression is not None
        )
        return self._loaded(data, batch_size=self.batch, collate_fn=_stack_x)


class MosaicZstd(Mosaic):
    """The same with zstd: decompressed to files of its own when a shard is first read, and read from those."""

    name, compression = "MosaicML streaming, zstd", "zstd"


class LitData(LoaderLayout):
    """litdata's chunks of 64 MB."""

    name, needs = "litdata", ("litdata",)

    def write(self, rows: Rows) -> None:
        from litdata.streaming import Cache

        cache = Cache(str(self.folder), chunk_bytes="64MB")
        for number, row in enumerate(rows):
            cache[number] = torch.from_numpy(np.array(row))
        cache.done()
        cache.merge()

    def open(self) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset

        data = StreamingDataset(str(self.folder), shuffle=True)
        kept = self.workers_used > 0
        return StreamingDataLoader(
            data, batch_size=self.batch, num_workers=self.workers_used, persistent_workers=kept, drop_last=False
        )


class Hdf5(Layout):
    """h5py, a sorted fancy index for each random batch."""

    name, needs, workers = "HDF5, contiguous", ("h5py",), (0,)
    chunks: tuple[int, int, int] | None = None

    def write(self, rows: Rows) -> None:
        import h5py

        with h5py.File(self.folder / "rows.h5", "w") as file:
            chunks = None if self.chunks is None else (1, *self.shape)
            made = file.create_dataset("x", (len(rows), *self.shape), "f2", chunks=chunks)
            for start in range(0, len(rows), 64):
                made[start : start + 64] = rows[start : start + 64]

    def batches(self, epoch: int) -> Iterator[Tensor]:
        import h5py

        with h5py.File(self.folder / "rows.h5") as file:
            for rows in _shuffled(self.rows, self.batch, epoch):
                yield torch.from_numpy(file["x"][np.sort(rows)])


class Hdf5Chunked(Hdf5):
    """The same, one chunk a row."""

    name, chunks = "HDF5, one chunk a row", (1, 0, 0)


class OnePt(LoaderLayout):
    """One .pt file a sample, torchdistill's layout."""

    name = "one .pt a sample"

    def write(self, rows: Rows) -> None:
        for number, row in enumerate(rows):
            torch.save(torch.from_numpy(np.array(row)), self.folder / f"{number:08d}.pt")

    def open(self) -> Any:
        data = _PtFiles(self.folder, self.rows)
        return self._loaded(data, batch_size=self.batch, sampler=RandomSampler(data))


class MemoryMap(Layout):
    """One file of raw fp16, random rows of a memory map: with all of it in RAM, as fast as a copy."""

    name, workers = "np.memmap fp16 (all in RAM)", (0,)

    def write(self, rows: Rows) -> None:
        np.save(self.folder / "rows.npy", rows)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        held = np.load(self.folder / "rows.npy", mmap_mode="r")
        for rows in _shuffled(self.rows, self.batch, epoch):
            yield torch.from_numpy(held[rows])


class _PtFiles(Dataset[Tensor]):
    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Tensor:
        found: Tensor = torch.load(self.folder / f"{index:08d}.pt", weights_only=True)
        return found


def _stack_x(samples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(sample["x"])) for sample in samples])


def _shuffled(rows: int, batch: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    order = np.random.default_rng(epoch).permutation(rows)
    return (order[start : start + batch] for start in range(0, rows, batch))


LAYOUTS: list[type[Layout]] = [
    WebDatasetLayout, Mosaic, MosaicZstd, LitData, Hdf5, Hdf5Chunked, OnePt, MemoryMap
]  # fmt: skip
