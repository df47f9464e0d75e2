"""What meets failing calls in benchmarks/failing_calls.py: every way of writing, checking, reading and moving a small store."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from failing_system import FailingSystem

from hdcache import cli, draws
from hdcache.datasets import open_dataset
from hdcache.errors import TooManyFailures
from hdcache.extract.packing import pack
from hdcache.extract.writer import Row, ViewWriter
from hdcache.geometry import read_geometry
from hdcache.index import write_index
from hdcache.ledgers import Ledger
from hdcache.packed import pixels_ledger
from hdcache.schema import StoreCard, ViewSpec
from hdcache.sharing.folder import Folder
from hdcache.sharing.selection import Wanted
from hdcache.sharing.streaming import open_store
from hdcache.sharing.transfer import copy_store
from hdcache.store import Store
from hdcache.stored_rows import StoredRows
from hdcache.views import row_order
from small_store import IDS, ROWS, SHARD, make_tap, store_card, write_record, write_sealed
from travelling import FaultyServer, web_server, write_travelling

IMAGES, SIDE = 12, 16
TEACHER = "random:vit_tiny_patch16_224?img_size=16&patch_size=8&depth=1&embed_dim=24&num_heads=3"
EXTRACT = (
    "--tap=final",
    "--tap=block1.attn_in",
    "--num-views=1",
    "--rows-per-shard=8",
    "--batch=8",
    "--precision=fp32",
)
WORK = ("--device=cpu", "--threads=1")


class FailingServer(FaultyServer):
    """A web server whose N-th answer is a fault, or all from that one on."""

    kind, at, lasting = "", 0, False
    count = 0
    failed = ""

    @contextmanager
    def failing(self, root: Path, kind: str = "", at: int = 0, *, lasting: bool = False) -> Iterator[FailingServer]:
        """Fail while this lasts."""
        self.kind, self.at, self.lasting, self.count, self.failed = kind, at, lasting, 0, ""
        self.faults.clear()
        yield self
        self.at = 0

    def fault(self, key: str, ranged: str | None) -> str:
        with self._lock:
            if left := self.faults.pop(key, None):
                return left[0]
            self.count += 1
            if not self.at or not (self.count == self.at or (self.lasting and self.count > self.at)):
                return ""
            self.failed = self.failed or f"GET {key}"
            if self.kind == "norange":
                self.faults[key] = ["cutnorange" if self.lasting else "norange"]
                return "cut"
            return self.kind


@dataclass(frozen=True)
class Operation:
    """A command of ``hdcache``, or something of its inside that is run as one."""

    name: str
    arguments: Callable[[Path], list[str]]
    """The command line, given the folder of a run; the store that it works on is ``s`` there."""
    prepare: Callable[[Path], None]
    """Makes what is there before."""
    good: bool = True
    """Whether what is there before is good, so that what is there after a fault must be. Otherwise what was good in it must be."""
    answers: bool = False
    """Whether what it prints is the point of it, as JSON: then it must be the same after a fault, or an error."""
    web: FailingServer | None = None
    """The server that fails; None: the file system does, for all that is in the folder of a run."""

    def failing(self, root: Path, kind: str = "", at: int | None = None, *, lasting: bool = False) -> Any:
        """What fails, while it is entered."""
        if self.web is not None:
            return self.web.failing(root, kind, at or 0, lasting=lasting)
        return FailingSystem(f"{root}/", kind, at, lasting=lasting)


def _command(name: str, work: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """Makes ``hdcache NAME FOLDER`` of a function, so that its errors go the way of all errors."""

    @click.command(name)
    @click.argument("folder")
    def called(folder: str) -> None:
        work(Path(folder))

    cli.cli.add_command(called)
    return lambda root: [name, str(root)]


def _create(root: Path) -> None:
    if (root / "s/zarr.json").is_file():
        store = Store.open(root / "s")
    else:
        store = Store.create(root / "s", store_card(), IDS, np.arange(ROWS, dtype=np.int64) % 2)
    with store.lock("t"):
        if "t" not in store.teachers():
            write_record(store, "t", [make_tap("block1.attn_in", "klt"), make_tap("final", "fp32")])


def _write(root: Path, view: int = 1, failed: tuple[int, ...] = ()) -> None:
    """What an extraction does once the teacher has computed: rows of a view, shard by shard, and the seals."""
    store = Store.open(root / "s")
    with store.lock("t"):
        record = store.teacher("t")
        cards = {tap: SimpleNamespace(card=card) for tap, card in record.taps.items()}
        writer = ViewWriter(store, record, cards, view)  # type: ignore[arg-type]
        if writer.todo() or not writer.sealed():
            writer.open()
            for shard in writer.todo():
                _write_shard(writer, shard, failed)
            writer.seal()
        write_index(store)


def _write_shard(writer: ViewWriter, shard: int, failed: tuple[int, ...]) -> None:
    order = row_order(ROWS, writer.store.card.views.seed, writer.view)[shard * SHARD : (shard + 1) * SHARD]
    pixels = np.zeros((3, 4, 4), np.uint8)
    rows = [Row(int(sample), pixels, (0, 1, 2, 3), True, (9, 8), bytes([int(sample)] * 32)) for sample in order]
    lost = {row: "torn" for row in failed if row // SHARD == shard}
    for row, reason in lost.items():
        rows[row % SHARD] = Row(rows[row % SHARD].sample, None, reason=reason)
    parts: dict[str, dict[str, Any]] = {
        tap: {name: np.full((len(rows), *array.shape), 1 + shard, array.dtype) for name, array in card.arrays.items()}
        for tap, card in writer.record.taps.items()
    }
    writer.write(shard, rows, parts, lost, 0)


def _read_all(store: Store) -> list[bytes]:
    """Every stored row, by both ways of reading, ids, labels and geometry."""
    rows = StoredRows(store, "t")
    found = ["\n".join(store.ids).encode(), store.labels.tobytes()]
    for tap, card in rows.record.taps.items():
        for name, value in rows.rows(0, tap, 0, ROWS).items():
            into = [np.empty(card.arrays[name].shape, card.arrays[name].dtype) for _ in range(ROWS)]
            rows.copy_rows(0, f"{tap}/{name}", 0, ROWS, into)
            if value.tobytes() != np.stack(into).tobytes():
                raise RuntimeError(f"{tap}/{name}: two ways of reading differ")
            found.append(value.tobytes())
    return found + [part.tobytes() for part in read_geometry(store, 0)]


def _compare(read: Callable[[], Store], wanted: list[bytes]) -> None:
    if _read_all(read()) != wanted:
        raise RuntimeError("what was read is not what is stored")


def _pack(root: Path) -> None:
    store = Store.open(root / "s")
    pack(store, open_dataset(f"folder:{root / 'images'}"), threads=2)
    if failed := pixels_ledger(store).manifest().failed:
        # As `hdcache extract --max-failures 0` says it: an image that cannot be read is a failed row, which the same command mends.
        raise TooManyFailures(next(iter(failed.values())))


def _make_stores(folder: Path) -> None:
    """Stores to begin with, some with the images beside them.

    ``sealed``: small, one view; ``torn``: a second view, two of whose rows have failed; ``both``: a larger one; ``kept``: samples alone;
    ``extracted``: by a teacher that can run again.
    """
    folder.mkdir(parents=True)
    write_sealed(folder / "sealed")
    write_index(Store.open(folder / "sealed"))
    shutil.copytree(folder / "sealed", folder / "torn/s")
    _write(folder / "torn", failed=(3, 9))
    write_travelling(folder / "both")
    pictures = (draws.uniform(IMAGES * SIDE * SIDE * 3, "failing calls") * 256).astype(np.uint8)
    for number, picture in enumerate(pictures.reshape(IMAGES, SIDE, SIDE, 3)):
        path = folder / "kept/images" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    data = open_dataset(f"folder:{folder / 'kept/images'}")
    card = StoreCard(dataset=data.card, views=ViewSpec(seed=3), rows_per_shard=8, rows_per_chunk=8)
    shutil.copytree(folder / "kept/images", folder / "extracted/images")
    Store.create(folder / "kept/s", card, data.ids, data.labels)
    made = [
        "extract",
        f"folder:{folder / 'extracted/images'}",
        f"--store={folder / 'extracted/s'}",
        f"--teacher=t={TEACHER}",
    ]
    with (
        suppress(SystemExit),
        redirect_stdout(io.StringIO()),
    ):  # how a command ends that succeeds, too: what it wrote is looked at below
        cli.main([*made, *EXTRACT, *WORK, "--quiet", "--pixels=source"])
    if not Ledger(folder / "extracted/s", "teachers/t/views/0").sealed:
        raise RuntimeError("the store to repair cannot be made")


def _copied(stores: Path, name: str, *more: Callable[[Path], None]) -> Callable[[Path], None]:
    """A run starts from a copy of a store, to which something may be done."""

    def prepare(root: Path) -> None:
        if (stores / name / "s").is_dir():
            shutil.copytree(stores / name, root, dirs_exist_ok=True)
        elif name:
            shutil.copytree(stores / name, root / "s")
        for change in more:
            change(root)

    return prepare


def _damage(root: Path) -> None:
    (root / "s/teachers/t/views/0/final/values/c.1.0.0").unlink()
    (root / "s/views/0/geometry/c.0.0").write_bytes(b"x")
    (root / "s/samples/label/c.0").write_bytes(b"")


def _damage_all(root: Path) -> None:
    """Rows, constants, geometry, a kept sample, labels, metadata, a receipt, a seal, the index."""
    for key in (
        "teachers/t/views/0/final/codes/c.1.0.0",
        "teachers/t/encodings/final/mean/c.0",
        "views/0/geometry/c.0.0",
    ):
        path = root / "s" / key
        path.write_bytes(bytes(path.stat().st_size))
    for key in ("samples/pixels/bytes/1/c.0", "samples/label/c.0", "index.json", "croissant.json"):
        (root / "s" / key).write_bytes(b"")
    for key in (
        "teachers/t/views/0/receipts/0.json",
        "teachers/t/views/0/final/codes/zarr.json",
        "views/0/manifest.json",
    ):
        (root / "s" / key).unlink()


def _leave(root: Path) -> None:
    (root / "s/views/0/.c.0.0.7-1.partial").write_bytes(b"x")
    (root / "s/teachers/t/.zarr.json.7-1.partial").write_bytes(b"x")


def make_operations(stores: Path, stack: ExitStack) -> list[Operation]:
    """All of them; the web servers end with ``stack``."""
    _make_stores(stores)
    sealed, whole = stores / "sealed", str(stores / "both")
    wanted = _read_all(Store.open(sealed))
    read = _command("failing-read", lambda root: _compare(lambda: Store.open(root / "s"), wanted))
    server, source = (stack.enter_context(web_server(stores / name, FailingServer)) for name in ("both", "sealed"))
    stream = _command(
        "failing-stream", lambda root: _compare(lambda: open_store(source.url, cache=root / "cache"), wanted)
    )

    def path(*words: str) -> Callable[[Path], list[str]]:
        return lambda root: [word.format(root / "s", root / "images") for word in (*words, "--quiet")]

    start = partial(_copied, stores)
    return [
        Operation("create a store", _command("failing-create", _create), start("")),
        Operation("write and seal a view", _command("failing-write", _write), start("sealed")),
        Operation("write failed rows again", _command("failing-again", _write), start("torn")),
        Operation("keep samples", _command("failing-pack", _pack), start("kept")),
        Operation("verify", path("verify", "{}", "--json"), start("sealed"), answers=True),
        Operation("verify --quick", path("verify", "--quick", "{}", "--json"), start("sealed"), answers=True),
        Operation("info", path("info", "{}", "--json"), start("sealed"), answers=True),
        Operation("read all rows", read, start("sealed")),
        Operation("push to a folder", path("push", str(sealed), "{}"), start("")),
        Operation("pull a tap more", path("pull", whole, "{}"), start("", partial(_pull_a_tap, whole))),
        Operation("repair --from COPY", path("repair", "{}", f"--from={sealed}"), start("sealed", _damage), good=False),
        Operation(
            "repair", path("repair", "{0}", "--data=folder:{1}", *WORK), start("extracted", _damage_all), good=False
        ),
        Operation("gc", path("gc", "{}"), start("sealed", _leave)),
        Operation("pull from a web server", path("pull", server.url, "{}"), start(""), web=server),
        Operation("read through a cache", stream, start("sealed"), web=source),
        Operation("a cache on a failing disk", stream, start("sealed")),
    ]


def _pull_a_tap(whole: str, root: Path) -> None:
    copy_store(Folder(Path(whole)), Folder(root / "s"), Wanted(teachers=("u",), taps=("final",)), quiet=True)
