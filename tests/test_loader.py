from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hdcache import loader as loader_module
from hdcache.backbones import normalize
from hdcache.batch import Batch
from hdcache.datasets import Dataset, open_dataset
from hdcache.errors import InputNotFound, StoreCorrupt, StoreMismatch, UsageError
from hdcache.extract.run import extract
from hdcache.geometry import read_geometry
from hdcache.ledgers import teacher_ledger
from hdcache.loader import Loader
from hdcache.options import Options
from hdcache.order import rank_slice
from hdcache.photometric import Photometric
from hdcache.runs import Runs
from hdcache.samples import open_views
from hdcache.schema import Manifest, Preprocessing, ViewSpec
from hdcache.stages import STAGES
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.target_sources import open_targets
from hdcache.teachers import reload_teacher
from hdcache.views import fresh_view, render

pytestmark = pytest.mark.timeout(120)

COUNT, BAD = 45, (3, 17, 40)
SHOWN = Preprocessing(size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
WANTED = {"t": ["final", "block3.rel.qk"]}


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Iterator[Path]:
    """A folder of 45 pictures of which 3 are broken, and a store of two views of it; no test may change either."""
    root = tmp_path_factory.mktemp("holed")
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 5, 6, 3), dtype=np.uint8)
    for number, picture in enumerate(noise):
        path = root / "data" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((60, 50)).save(path)
        if number in BAD:
            path.write_bytes(path.read_bytes()[:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDCACHE_CACHE", str(root / "cache"))
        common = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8, "rows_per_shard": 16}
        taps = ["block3.attn_in", "final"]
        extract(str(root / "data"), store=root / "s", teachers=[f"t={tiny}"], taps=taps, num_views=2, **common)
        yield root


def open_data(root: Path) -> Dataset:
    return open_dataset(str(root / "data"), classes=("a", "b"), cache=root / "cache")


def make(root: Path, wanted: dict[str, list[str]] | None = None, **more: Any) -> Loader:
    """A loader over the stored views, with small buffers so that an epoch has several."""
    views = {"num_views": more.pop("num_views", None)}
    options = Options(**({"batch_size": 8, "preprocessing": SHOWN, "buffer_rows": 16} | more))
    store = Store.open(root / "s")
    stored, _ = open_targets(store, WANTED if wanted is None else wanted, device=options.device)
    return Loader(open_data(root), options, views=store.card.views, store=store, stored=stored, **views)


def without_store(root: Path, views: ViewSpec | None = None, num_views: int | None = None, **more: Any) -> Loader:
    options = Options(**({"batch_size": 8, "preprocessing": SHOWN, "buffer_rows": 16} | more))
    return Loader(open_data(root), options, views=views or ViewSpec(), num_views=num_views)


def good_ids() -> set[str]:
    return {f"{'ab'[number % 2]}/{number:02d}.png" for number in range(COUNT) if number not in BAD}


def tensors(batch: Batch) -> list[Tensor]:
    """All that a training step sees, in one list."""
    values = [value for found in batch.targets.values() for value in found.values()]
    return [batch.images, *batch.more, batch.labels, *(v if isinstance(v, Tensor) else v.sequence() for v in values)]


def same(one: Batch, other: Batch) -> bool:
    facts = [(batch.ids, batch.epoch, batch.view, batch.index) for batch in (one, other)]
    return facts[0] == facts[1] and all(map(torch.equal, tensors(one), tensors(other)))


def ids_of(batches: Any) -> list[list[str]]:
    return [batch.ids for batch in batches]


def flat(batches: Any) -> list[str]:
    return list(itertools.chain.from_iterable(ids_of(batches)))


def view_of(root: Path, sample_id: str, view: int, size: int) -> np.ndarray:
    """The recorded view of a sample, cut and resized by hand: uint8 [3, size, size]."""
    store = Store.open(root / "s")
    geometry, _ = read_geometry(store, view)
    (row,) = np.flatnonzero(geometry[:, 0] == store.ids.index(sample_id))
    _, left, top, width, height, flip, *_ = (int(number) for number in geometry[row])
    image = Image.open(root / "data" / sample_id).convert("RGB")
    return np.asarray(render(image, (left, top, width, height), bool(flip), size)).transpose(2, 0, 1).copy()


# Which rows, and in which order


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 42])
def test_every_usable_row_comes_exactly_once(holed: Path, batch_size: int, drop_last: bool) -> None:
    """Whatever the batch size; with ``drop_last`` all but the rows that do not fill a batch. Broken rows never come."""
    loader = make(holed, batch_size=batch_size, drop_last=drop_last)
    found = ids_of(loader.epoch(0))
    assert len(found) == len(loader) == loader.batches_per_epoch(0)
    seen = Counter(itertools.chain(*found))
    assert set(seen.values()) == {1}
    assert seen.keys() <= good_ids()
    assert len(seen) == (42 - 42 % batch_size if drop_last else 42)
    assert [len(ids) for ids in found[:-1]] == [batch_size] * (len(found) - 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [8, 5])
def test_ranks_share_the_same_global_batches(holed: Path, batch_size: int, world: int, threads: int) -> None:
    """Ranks together see exactly the batches of one process, each a contiguous part, with equal values."""
    whole = list(make(holed, batch_size=batch_size, threads=2).epoch(1))
    parts = [
        list(make(holed, batch_size=batch_size, rank=rank, world=world, threads=threads).epoch(1))
        for rank in range(world)
    ]
    assert [len(part) for part in parts] == [len(whole)] * world
    for index, batch in enumerate(whole):
        shares = [part[index] for part in parts]
        assert flat(shares) == batch.ids
        for rank, share in enumerate(shares):
            assert share.ids == batch.ids[rank_slice(len(batch.ids), rank, world)]
        for joined, value in zip(zip(*map(tensors, shares), strict=True), tensors(batch), strict=True):
            torch.testing.assert_close(torch.cat(joined), value, rtol=1e-5, atol=1e-6)


def test_a_last_batch_smaller_than_the_world_leaves_some_ranks_an_empty_one(holed: Path) -> None:
    """42 rows in eights leave 2 for 4 ranks; an empty share has every tensor, with no rows."""
    live = reload_teacher(Store.open(holed / "s").teacher("t"))
    for online in (False, True):
        last = []
        for rank in range(4):
            loader = make(holed, rank=rank, world=4)
            if online:
                store = Store.open(holed / "s")
                _, running = open_targets(store, WANTED, live={"t": live})
                loader = Loader(
                    open_data(holed), loader.options, views=store.card.views, store=store, live=running, teachers=["t"]
                )
            *_, batch = loader.epoch(0)
            last.append(batch)
        assert sorted(len(batch.ids) for batch in last) == [0, 0, 1, 1]
        for batch in last:
            assert [len(value) for value in tensors(batch)] == [len(batch.ids)] * 4
            assert batch.images.shape[1:] == (3, 24, 24)
            assert batch.targets["t"]["final"].patches.shape[1:] == (16, 48)  # type: ignore[union-attr]
        assert all(len(b.ids) == 2 for b in list(make(holed, rank=3, world=4, drop_last=True).epoch(0)))


def test_order_is_a_function_of_seed_and_epoch(holed: Path) -> None:
    orders = {(seed, epoch): make(holed, seed=seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)}
    assert orders == {
        (seed, epoch): make(holed, seed=seed, threads=1, rank=1, world=2).order(epoch).tolist()
        for seed, epoch in orders
    }
    assert len({tuple(order) for order in orders.values()}) == 6


def test_iterating_again_is_the_next_epoch(holed: Path) -> None:
    """A ``for`` over the loader takes epochs 0, 1, 2 in turn, and views go round."""
    loader, twin = make(holed, batch_size=21), make(holed, batch_size=21)
    for epoch in range(3):
        found = list(loader)
        assert [(batch.epoch, batch.view, batch.index) for batch in found] == [(epoch, epoch % 2, i) for i in (0, 1)]
        assert all(map(same, found, twin.epoch(epoch)))


@pytest.mark.parametrize("jitter", [None, Photometric(brightness=0.3, contrast=0.3, saturation=0.3)])
def test_resuming_from_any_batch_equals_not_stopping(holed: Path, jitter: Photometric | None) -> None:
    """Images, ids, labels and targets to the bit, from every batch of an epoch and from its end."""
    whole = list(make(holed, augment=(jitter,)).epoch(2))
    for start in range(len(whole) + 1):
        rest = list(make(holed, augment=(jitter,), threads=1).epoch(2, start))
        assert len(rest) == len(whole) - start
        assert all(map(same, rest, whole[start:]))


@pytest.mark.parametrize("start", [-1, 7])
def test_a_start_outside_the_epoch_is_refused(holed: Path, start: int) -> None:
    with pytest.raises(UsageError, match=f"cannot start at batch {start}: epoch 0 has 6"):
        next(make(holed).epoch(0, start))


# What a batch holds


@pytest.mark.parametrize("view", [0, 1])
def test_images_are_the_stored_view_normalised_for_the_student(holed: Path, view: int) -> None:
    for batch in make(holed).epoch(view):
        pixels = torch.from_numpy(np.stack([view_of(holed, name, view, 24) for name in batch.ids]))
        assert torch.equal(batch.images, normalize(pixels, SHOWN))
        assert batch.labels.tolist() == ["ab".index(name[0]) for name in batch.ids]
        assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("view", [0, 1])
def test_targets_belong_to_the_image_they_come_with(holed: Path, view: int) -> None:
    """They equal a live forward of that very image under that very view, past the holes that broken images left."""
    teacher = reload_teacher(Store.open(holed / "s").teacher("t"))
    for batch in make(holed).epoch(view):
        pixels = torch.from_numpy(np.stack([view_of(holed, name, view, 32) for name in batch.ids]))
        live = teacher.forward(pixels, ["final", "block3.rel.qk"])
        final, relation = batch.targets["t"]["final"], batch.targets["t"]["block3.rel.qk"]
        assert isinstance(final, Tokens)
        assert isinstance(live["final"], Tokens)
        assert torch.equal(final.sequence(), live["final"].sequence())
        torch.testing.assert_close(relation, live["block3.rel.qk"], rtol=1e-5, atol=1e-6)


def test_online_targets_equal_stored_ones_to_the_bit(holed: Path) -> None:
    """The teacher in the loop gives the batches that the store gives."""
    store = Store.open(holed / "s")
    _, live = open_targets(store, WANTED, live={"t": reload_teacher(store.teacher("t"))})
    cached = make(holed, augment=(Photometric(brightness=0.2, contrast=0.2, saturation=0.2),))
    online = Loader(open_data(holed), cached.options, views=store.card.views, store=store, live=live, teachers=["t"])
    for epoch in (0, 1):
        assert all(itertools.starmap(same, zip(cached.epoch(epoch), online.epoch(epoch), strict=True)))


def test_jitter_is_fresh_in_every_epoch_and_equal_in_every_run(holed: Path) -> None:
    """With one view the geometry repeats, so that epochs differ by their jitter alone; ids decide it, not batches."""

    def images(epoch: int, **more: Any) -> dict[str, Tensor]:
        loader = make(holed, num_views=1, **({"augment": (Photometric(),)} | more))
        batches = list(loader.epoch(epoch))
        return dict(zip(flat(batches), torch.cat([batch.images for batch in batches]), strict=True))

    first, second, plain = images(0), images(1), images(0, augment=(None,))
    other_batches, other_seed = images(0, batch_size=5), images(0, seed=1)
    for name, image in first.items():
        assert not torch.equal(image, second[name])
        assert not torch.equal(image, plain[name])
        assert not torch.equal(image, other_seed[name])
        torch.testing.assert_close(image, other_batches[name], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(plain[name], image) for name, image in images(1, augment=(None,)).items())


def test_fresh_views_are_the_student_s_alone(holed: Path) -> None:
    """Two views of its own in each epoch, beside the targets of the stored one; the same from any batch on."""
    fresh = {"fresh": 2, "augment": (Photometric(), None)}
    plain, loader = make(holed, num_views=1), make(holed, num_views=1, **fresh)
    seen: list[Tensor] = []
    for epoch in (0, 1):
        pairs = list(zip(loader.epoch(epoch), plain.epoch(epoch), strict=True))
        for mine, stored in pairs:
            assert mine.ids == stored.ids
            assert [image.shape for image in (mine.images, *mine.more)] == [stored.images.shape] * 2
            assert all(map(torch.equal, tensors(mine)[3:], tensors(stored)[2:])), "targets are of the stored view"
            views = [stored.images, mine.images, *mine.more]
            for one, other in itertools.combinations(views, 2):
                assert not (one == other).flatten(1).all(dim=1).any()
            seen.append(mine.more[0])
        assert all(map(same, list(loader.epoch(epoch))[2:], make(holed, num_views=1, **fresh).epoch(epoch, 2)))
    assert not torch.equal(*(torch.cat(seen[half]).sort(0)[0] for half in (slice(0, 6), slice(6, 12))))


def test_a_fresh_view_is_drawn_for_the_epoch_and_the_sample(holed: Path) -> None:
    """Without augmentation it is the view of that number, cut and resized by hand."""
    dataset, spec = open_data(holed), Store.open(holed / "s").card.views
    for batch in make(holed, num_views=1, fresh=1).epoch(3):
        opened = [open_views(dataset, name, spec, 0, None, [fresh_view(3, 0, 1)])[1] for name in batch.ids]
        pixels = torch.from_numpy(np.stack([view.pixels(SHOWN) for view in opened]))
        assert torch.equal(batch.images, normalize(pixels, SHOWN))
        assert batch.more == ()


def test_targets_come_alone_where_no_images_are_wanted(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows, order, labels and targets are those of a loader that opens images; none is opened."""
    with_images = list(make(holed).epoch(1))
    monkeypatch.setattr("hdcache.rendering.open_views", None)
    alone = list(make(holed, images=False, pieces=2).epoch(1))
    assert [name for batch in alone for name in batch.ids] == flat(with_images)
    assert all(batch.images.shape == (len(batch.ids), 0) and batch.more == () for batch in alone)
    joined = [torch.cat(values) for values in zip(*(tensors(batch)[1:] for batch in alone), strict=True)]
    expected = [torch.cat(values) for values in zip(*(tensors(batch)[1:] for batch in with_images), strict=True)]
    for value, other in zip(joined, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_what_needs_images_is_refused_without_them(holed: Path) -> None:
    store = Store.open(holed / "s")
    _, live = open_targets(store, WANTED, live={"t": reload_teacher(store.teacher("t"))})
    options = Options(batch_size=8, preprocessing=SHOWN, images=False)
    with pytest.raises(UsageError, match=r"images=False is for stored targets: fresh views and teachers in the loop"):
        Loader(open_data(holed), options, views=store.card.views, store=store, live=live, teachers=["t"])
    with pytest.raises(UsageError, match="images=False is for stored targets"):
        make(holed, images=False, fresh=1)


def test_host_batches_are_what_is_stored(holed: Path) -> None:
    """The same rows as of the finished batches, with the arrays as the reader gives them."""
    loader = make(holed)
    reader = loader.stored[0].reader
    rows = loader.order(0)
    taken = 0
    for ready, batch in zip(loader.host_batches(0), loader.epoch(0), strict=True):
        assert ready.ids == batch.ids
        for place in range(len(ready.ids)):
            row = int(rows[taken + place])
            stored = reader.rows(0, "final", row, row + 1)
            for name, value in stored.items():
                assert np.array_equal(ready.arrays["t"][f"final/{name}"][place].numpy(), value[0])
        taken += len(ready.ids)
    assert taken == 42


def test_batches_that_are_kept_stay_as_they_were(holed: Path) -> None:
    """Memory is used again, but not while a batch that was given out refers to it."""
    loader = make(holed)
    kept = list(loader.epoch(0))
    copies = [[value.clone() for value in tensors(batch)] for batch in kept]
    for _ in loader.epoch(1):
        pass
    assert all(all(map(torch.equal, tensors(batch), copy)) for batch, copy in zip(kept, copies, strict=True))


def test_time_is_told_by_stage(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(holed)
    assert loader.stages == dict.fromkeys(STAGES, 0.0)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)
        return open_views(*arguments)

    monkeypatch.setattr("hdcache.rendering.open_views", slow)
    list(loader.epoch(0))
    assert all(seconds > 0 for seconds in loader.stages.values())
    assert loader.stages["images"] >= 42 * 0.005


def test_without_targets_a_store_still_gives_its_views(holed: Path) -> None:
    """A baseline sees the pixels, rows and order of a student that reads targets: nothing else may set them apart."""
    plain, reading = make(holed, {}), make(holed)
    assert plain.views == reading.views == [0, 1]
    for epoch in range(3):
        for mine, theirs in zip(plain.epoch(epoch), reading.epoch(epoch), strict=True):
            assert mine.ids == theirs.ids
            assert torch.equal(mine.images, theirs.images)
            assert mine.targets == {}
    assert make(holed, {}, fresh=1).views == []


def test_teachers_that_are_not_read_change_nothing(copy: Path, tiny: str) -> None:
    """One with fewer views and failed rows of its own, added later: the same views, rows, order and pixels."""
    before = {view: ids_of(make(copy, {}).epoch(view)) for view in (0, 1)}
    common = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8, "taps": ["final"]}
    extract(str(copy / "data"), store=copy / "s", teachers=[f"other={tiny}"], **common)
    path = copy / "s/teachers/other/views/0/manifest.json"
    seal = Manifest.parse(json.loads(path.read_text()), path)
    path.write_bytes(seal.model_copy(update={"failed": seal.failed | {0: "not finite", 1: "not finite"}}).canonical())
    plain = make(copy, {})
    assert plain.views == [0, 1]
    assert {view: ids_of(plain.epoch(view)) for view in (0, 1)} == before
    assert all(map(same, plain.epoch(1), make(copy, {}, threads=1).epoch(1)))


def test_all_views_that_are_recorded_can_be_used_without_targets(copy: Path, tiny: str) -> None:
    """Even where no teacher has them all: geometry belongs to the store."""
    common = {"encoding": "fp32", "precision": "fp32", "device": "cpu", "batch": 8, "taps": ["final"]}
    extract(str(copy / "data"), store=copy / "s", teachers=[f"other={tiny}"], num_views=4, **common)
    assert make(copy, {}).views == [0, 1, 2, 3]
    loader = make(copy, {}, num_views=3)
    assert loader.views == [0, 1, 2]
    assert set(flat(loader.epoch(2))) == good_ids()
    shutil.rmtree(copy / "s/teachers/other")
    assert make(copy, {}, num_views=3).views == [0, 1, 2]
    with pytest.raises(
        InputNotFound, match=r"5 views asked for, complete are \[0, 1, 2, 3\]; finish with .* --num-views 5"
    ):
        make(copy, {}, num_views=5)


def test_a_store_without_a_recorded_view_says_so(copy: Path) -> None:
    for view in (0, 1):
        (copy / f"s/views/{view}/manifest.json").unlink()
    with pytest.raises(
        StoreCorrupt, match=r"s/views/0/manifest\.json: missing, though it was there when index\.json was written"
    ):
        make(copy, {})
    (copy / "s/index.json").unlink()
    with pytest.raises(InputNotFound, match="1 views asked for, complete are none; finish with 'hdcache extract"):
        make(copy, {})


def test_a_teacher_may_decide_the_rows_without_giving_targets(holed: Path) -> None:
    """``teachers`` leaves out the rows that they lack, and replays the recorded views."""
    store = Store.open(holed / "s")
    loader = Loader(
        open_data(holed), make(holed).options, views=store.card.views, store=store, teachers=["t"], num_views=1
    )
    batches = list(loader.epoch(0))
    assert set(flat(batches)) == good_ids()
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, make(holed, num_views=1).epoch(0), strict=True))


# The data set changed


@pytest.fixture
def copy(holed: Path, tmp_path: Path) -> Path:
    """A copy of the data and store that a test may damage."""
    shutil.copytree(holed / "data", tmp_path / "data")
    shutil.copytree(holed / "s", tmp_path / "s")
    return tmp_path


@pytest.mark.parametrize("size", [(60, 50), (30, 30)])
def test_an_image_that_was_replaced_is_refused(copy: Path, size: tuple[int, int]) -> None:
    loader = make(copy)
    Image.new("RGB", size, "red").save(copy / "data/a/08.png")
    with pytest.raises(StoreMismatch, match=r"a/08.png: the image changed since its view was recorded .* restore it"):
        list(loader.epoch(0))
    assert_no_threads()


@pytest.mark.parametrize("content", [None, b"\x89PNG nonsense"])
def test_an_image_that_is_gone_or_broken_is_refused(copy: Path, content: bytes | None) -> None:
    loader = make(copy)
    path = copy / "data/a/08.png"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StoreMismatch, match=r"a/08.png: .*; it could be read when the store was made"):
        list(loader.epoch(0))
    assert_no_threads()


# Threads and memory


def assert_no_threads() -> None:
    """No thread of a loader is left, at once or within a moment."""
    for _ in range(100):
        left = [t.name for t in threading.enumerate() if t.name.startswith(("decode", "read", "collate"))]
        if not left:
            return
        time.sleep(0.02)
    raise AssertionError(f"threads left behind: {left}")


@pytest.mark.parametrize("after", [1, 3])
def test_a_loop_that_is_left_early_leaves_no_thread_behind(holed: Path, after: int) -> None:
    for number, _batch in enumerate(make(holed, threads=3, prefetch=4), 1):
        if number == after:
            break
    del _batch
    assert_no_threads()


def test_an_iterator_that_is_never_used_starts_no_thread(holed: Path) -> None:
    iterator = iter(make(holed))
    assert_no_threads()
    del iterator


def test_an_error_of_the_consumer_ends_the_threads(holed: Path) -> None:
    def work() -> None:
        for _ in make(holed):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()
    assert_no_threads()


def test_leaving_early_does_not_wait_for_the_whole_epoch(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not begun is cancelled: only the decoding under way is waited for."""
    opened = []

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        opened.append(arguments[1])
        return open_views(*arguments)

    monkeypatch.setattr("hdcache.rendering.open_views", slow)
    iterator = make(holed, threads=2, prefetch=6).epoch(0)
    next(iterator)
    began = time.monotonic()
    iterator.close()
    assert time.monotonic() - began < 1
    assert len(opened) < 42
    assert_no_threads()


def test_a_failing_read_reaches_the_consumer_and_ends_the_threads(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("the disk is gone")

    loader = make(holed)
    monkeypatch.setattr(loader.stored[0], "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader.epoch(0))
    assert_no_threads()


def test_runs_in_memory_are_bounded_by_the_buffer(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are forgotten after their last use: never more at a time than two buffers touch, none at the end."""
    monkeypatch.setattr("hdcache.runs.RUN_ROWS", 2)
    monkeypatch.setattr(loader_module, "RUN_ROWS", 2)
    held, rows, last = [], [], []
    gather = Runs.gather

    def watch(self: Runs, *arguments: Any) -> Any:
        held.append(len(self._futures))
        rows.append(4 * len(self._buffers))
        last[:] = [self]
        return gather(self, *arguments)

    monkeypatch.setattr(Runs, "gather", watch)
    store = Store.open(tiny_store)
    stored, _ = open_targets(store, {"t": ["final"]})
    options = Options(batch_size=4, preprocessing=SHOWN, buffer_rows=8, prefetch=1)
    dataset = open_dataset(store.card.dataset.spec)
    assert len(list(Loader(dataset, options, views=store.card.views, store=store, stored=stored).epoch(0))) == 16
    assert max(held) <= 2 * 8 // 2 + 4 < 32
    assert max(rows) <= 2 * 8 + 4
    assert not last[0]._futures
    assert not last[0]._buffers


@pytest.mark.parametrize("batch", [4, 6, 10, 42])
def test_what_is_held_is_what_was_counted_on(holed: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With failed rows, batches that are no whole runs and runs at the end of a buffer, within the bytes that were agreed."""
    monkeypatch.setattr("hdcache.runs.RUN_ROWS", 3)
    monkeypatch.setattr(loader_module, "RUN_ROWS", 3)
    loader = make(holed, batch_size=batch, buffer_rows=12, prefetch=1)
    row = sum(target.reader.bytes_per_row(target.derivation.taps) for target in loader.stored)
    gather, held = Runs.gather, []

    def watch(self: Runs, *arguments: Any) -> Any:
        held.append(row * sum(len(next(iter(next(iter(b.arrays.values())).values()))) for b in self._buffers.values()))
        return gather(self, *arguments)

    monkeypatch.setattr(Runs, "gather", watch)
    list(loader.epoch(0))
    assert max(held) <= loader._memory.limit


def test_an_iterator_that_nobody_finished_ends_with_the_interpreter(
    tiny_store: Path, python: Callable[..., subprocess.Popen[str]]
) -> None:
    """Silently, as at a notebook's end."""
    code = """
import sys
import hdcache
store = hdcache.open_store(sys.argv[1])
batches = iter(store.loader({"t": ["final"]}, batch_size=4, size=32))
print(len(next(batches).ids))
"""
    process = python(code, tiny_store)
    assert process.communicate(timeout=120)[0] == "4\n"
    assert process.returncode == 0


def test_a_loader_goes_on_from_another(holed: Path) -> None:
    """Of the same batches, with less to read: what the first has counted and dropped is not forgotten."""
    one, other = make(holed), make(holed)
    list(one.epoch(0))
    one.leave_out({"x": "gone"})
    before, waited = one.stages, one.waited
    assert waited >= before["finish"] > 0
    other.go_on_from(one)
    assert (other.stages, other.waited) == (before, waited)
    assert other.left_out == other.dropped == {"x": "gone"}
    list(other.epoch(1))
    assert other.waited > waited


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu(holed: Path) -> None:
    """Pinned memory and a stream of its own: while the GPU is busy, no batch sees what another is made of."""
    plain, other = make(holed), make(holed, device=torch.device("cuda"))
    for epoch in range(2):
        expected, found = list(plain.epoch(epoch)), []
        for batch in other.epoch(epoch):
            torch.cuda._sleep(50_000_000)
            found.append(batch)
        assert ids_of(found) == ids_of(expected)
        for one, two in zip(expected, found, strict=True):
            for mine, theirs in zip(tensors(one), tensors(two), strict=True):
                torch.testing.assert_close(theirs.cpu(), mine, rtol=1e-4, atol=1e-4)


def test_waiting_is_counted(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(holed, batch_size=42, threads=1)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)
        return open_views(*arguments)

    monkeypatch.setattr("hdcache.rendering.open_views", slow)
    list(loader.epoch(0))
    assert loader.waited > 0.15


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 3, "world": 4}, "batch size 3 is smaller than the 4 processes that share it"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"threads": 0}, "threads 0 must be at least 1"),
        ({"prefetch": 0}, "prefetch 0 must be at least 1"),
        ({"buffer_rows": 0}, "buffer_rows 0 must be at least 1"),
        ({"rank": 2, "world": 2}, "rank 2 must lie between 0 and 1: the processes are 2"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**({"batch_size": 8, "preprocessing": SHOWN} | fields))


def test_a_buffer_that_does_not_fit_is_refused(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that cannot be held even alone is refused with what to lower; the order is never changed silently."""
    monkeypatch.setenv("HDCACHE_BUFFER_BYTES", "1e6")
    with pytest.raises(UsageError, match=r"shuffle buffer of 1000 rows need more than the 0\.0 GB .*lower buffer_rows"):
        make(holed, buffer_rows=1000)


def test_less_memory_prefetches_less_and_yields_the_same(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The byte budget limits how many batches wait, never which rows they hold."""
    wide = make(holed, buffer_rows=16, prefetch=3)
    monkeypatch.setenv("HDCACHE_BUFFER_BYTES", "5e5")
    tight = make(holed, buffer_rows=16, prefetch=3)
    assert tight._prefetch < wide._prefetch == 3
    assert [batch.ids for batch in tight.epoch(1)] == [batch.ids for batch in wide.epoch(1)]


def test_pieces_of_a_batch_are_the_batch(holed: Path) -> None:
    """Batches in pieces hold the same rows, images and targets in the same order, and their shares add up to one."""
    whole, cut = list(make(holed, batch_size=8).epoch(0)), list(make(holed, batch_size=8, pieces=3).epoch(0))
    for batch in whole:
        parts = [part for part in cut if part.index == batch.index]
        assert [part.piece for part in parts] == list(range(parts[0].pieces))
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert [name for part in parts for name in part.ids] == batch.ids
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        for teacher, targets in batch.targets.items():
            for name, value in targets.items():
                if isinstance(value, torch.Tensor):
                    found = torch.cat([part.targets[teacher][name] for part in parts])
                    torch.testing.assert_close(found, value)


def test_too_few_rows_for_one_batch_are_refused(holed: Path) -> None:
    loader = make(holed, batch_size=43, drop_last=True)
    with pytest.raises(UsageError, match="42 usable rows do not fill one batch of 43; choose a smaller batch_size"):
        len(loader)


def test_views_that_are_not_complete_are_refused(copy: Path) -> None:
    with pytest.raises(
        InputNotFound, match=r"3 views asked for, complete in every teacher are \[0, 1\] \(sealed: t: \[0"
    ):
        make(copy, num_views=3)
    with pytest.raises(UsageError, match="num_views 0 must be at least 1"):
        make(copy, num_views=0)
    teacher_ledger(Store.open(copy / "s"), "t", 0).unseal()
    assert make(copy).views == [1]
    teacher_ledger(Store.open(copy / "s"), "t", 1).unseal()
    with pytest.raises(
        InputNotFound, match=r"complete in every teacher are none \(sealed: t: none\); finish with 'hdc"
    ):
        make(copy)


def test_a_view_without_a_usable_row_is_refused(holed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(holed)
    manifest = loader.readers[0].manifest(0).model_copy(update={"failed": dict.fromkeys(range(COUNT), "x")})
    loader.readers[0]._manifests[0] = manifest
    with pytest.raises(InputNotFound, match="no row of view 0 is usable: every one failed in extraction"):
        loader.rows(0)


# Without a store


def test_without_a_store_unreadable_images_are_dropped_and_recorded(holed: Path) -> None:
    """Every readable image comes once; the others are listed with their reasons, and nobody takes their place."""
    loader = without_store(holed)
    batches = list(loader.epoch(0))
    assert Counter(flat(batches)) == Counter(good_ids())
    assert sorted(len(batch.ids) for batch in batches) != [8] * 6
    assert loader.dropped.keys() == {f"{'ab'[number % 2]}/{number:02d}.png" for number in BAD}
    assert all(name in reason for name, reason in loader.dropped.items())
    assert all(len(value) == len(batch.ids) for batch in batches for value in tensors(batch))


def test_without_a_store_views_are_drawn_as_extraction_draws_them(holed: Path) -> None:
    """The same view spec gives the views, the order and the images that a store records."""
    spec = Store.open(holed / "s").card.views
    for number in (0, 1):
        drawn = {
            name: image
            for batch in without_store(holed, spec, 2).epoch(number)
            for name, image in zip(batch.ids, batch.images, strict=True)
        }
        for batch in make(holed).epoch(number):
            assert all(torch.equal(drawn[name], image) for name, image in zip(batch.ids, batch.images, strict=True))


def test_what_is_left_out_takes_no_row_as_in_a_store(holed: Path) -> None:
    """The same batches as from a store of the same views, in which these rows failed; they are asked for by nobody."""
    spec = Store.open(holed / "s").card.views
    bad = {f"{'ab'[number % 2]}/{number:02d}.png": "broken" for number in BAD}
    loader = without_store(holed, spec, 2)
    loader.leave_out(bad)
    for number in (0, 1):
        assert ids_of(loader.epoch(number)) == ids_of(make(holed, {}).epoch(number))
    assert loader.dropped == loader.left_out == bad


def test_a_batch_without_a_readable_image_is_an_error(copy: Path) -> None:
    """A data set that went away is not a run that quietly trains on nothing."""
    loader = without_store(copy)
    shutil.rmtree(copy / "data")
    with pytest.raises(
        InputNotFound, match=r"none of the images of a whole batch could be read; the first: [ab]/\d\d.png: "
    ):
        list(loader.epoch(0))
    assert_no_threads()


@settings(max_examples=25)
@given(
    batch_size=st.integers(1, 50),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
    buffer_rows=st.integers(1, 60),
    drop_last=st.booleans(),
)
def test_the_shares_of_any_world_make_up_the_epoch(
    holed: Path, batch_size: int, world: int, epoch: int, buffer_rows: int, drop_last: bool
) -> None:
    """For any sizes: the ranks' rows, put together, are the usable rows, each once."""
    if batch_size < world or (drop_last and batch_size > 42):
        return
    loader = make(holed, batch_size=batch_size, buffer_rows=buffer_rows, drop_last=drop_last)
    order, count = loader.order(epoch), loader.batches_per_epoch(epoch)
    assert np.array_equal(np.sort(order), loader.rows(epoch % 2))
    rows = [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]
    shared = [row for batch in rows for rank in range(world) for row in batch[rank_slice(len(batch), rank, world)]]
    assert shared == order[: count * batch_size].tolist()
