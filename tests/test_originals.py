"""What a store says of where its data was may name anything: only that very data set is opened, and nothing without a bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdcache.datasets import open_dataset
from hdcache.errors import HdcacheError, InputNotFound, StoreMismatch, UnreadableImage
from hdcache.schema import StoreCard, ViewSpec
from hdcache.sharing import originals
from hdcache.sharing.originals import open_originals
from hdcache.store import Store

Make = Callable[..., Store]


@pytest.fixture
def store_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A store of a data set, which says that it lies at another place."""
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path / "cache"))

    def make(spec: str, said: str | None = None) -> Store:
        found = open_dataset(spec)
        path = tmp_path / "made"
        if not path.exists():
            card = StoreCard(dataset=found.card, views=ViewSpec(seed=0), rows_per_shard=8, rows_per_chunk=4)
            Store.create(path, card, found.ids, found.labels)
        about = {"data": spec if said is None else said, "source": "", "written_with": {}}
        (path / "about.json").write_text(json.dumps(about))
        return Store.open(path)

    return make


def packed(path: Path, folder: Path, suffix: str = "") -> Path:
    import tarfile

    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.add(file, f"{file.parent.name}/{file.stem}{suffix}.png")
    return path


@pytest.mark.parametrize("kind", ["folder", "npz", "tar", "pattern"])
def test_the_data_set_itself_is_opened(
    kind: str, store_of: Make, make_folder: Callable[..., Path], make_npz: Callable[..., str], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "d")
    (folder / "a" / "up").symlink_to(folder)  # leads back; listings skip it
    packed(tmp_path / "s-0.tar", folder)
    spec = {
        "folder": f"folder:{folder}",
        "npz": make_npz(tmp_path / "x.npz"),
        "tar": f"tar:{tmp_path}/s-{{0..0}}.tar",
        "pattern": f"tar:{tmp_path}/s-*.tar",
    }[kind]
    found = open_originals(store_of(spec))
    assert found.ids == open_dataset(spec).ids
    assert isinstance(found.read(found.ids[0]), bytes | np.ndarray)


HOSTILE = [
    ("npz:/dev/zero", "is no file"), ("tar:/dev/zero", "is no file"), ("folder:/dev/zero", "is no folder"), ("store:/dev/zero", "is no folder"),
    ("npz:PIPE", "is no file"), ("tar:PIPE", "is no file"), ("video:PIPE", "is no folder"), ("tar:FOLDER/pip*", "is no file"),
    ("tar:/**/*.tar", "are not searched"), ("tar:/*/*.tar", "are not searched"), ("tar:/x-{0..999999}-{0..999999}.tar", "more than 100,000 tars"),
    ("npz:/nowhere.npz", "no such file"), ("folder:/nowhere", "no such folder"), ("store:FOLDER", "no such store|not a store|no store"),
    ("hf:a/b?split=train", "may need the network"), ("npz:/a\0b", "is no place"), ("npz:" + "a" * 5000, "is no place"), ("", "does not say"),
    ("/dev/zero", "neither"), ("what:ever", "unknown kind"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "message"), HOSTILE)
def test_what_is_no_data_set_is_refused_at_once(
    said: str, message: str, store_of: Make, make_npz: Callable[..., str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = said.replace("PIPE", str(tmp_path / "pipe")).replace("FOLDER", str(tmp_path))
    store = store_of(make_npz(tmp_path / "x.npz"), said)
    before = time.monotonic()
    with pytest.raises(HdcacheError, match=message):
        open_originals(store)
    assert time.monotonic() - before < 5


def test_the_root_of_the_disk_is_not_walked(
    store_of: Make, make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few entries too many it is another data set."""
    monkeypatch.setattr(originals, "SLACK", 10)
    store = store_of(f"folder:{make_folder(tmp_path / 'd')}", "folder:/")
    monkeypatch.setattr(originals, "store_dataset", lambda store: pytest.fail("listed"))
    with pytest.raises(StoreMismatch, match=r"'folder:/' now is not the data set .*far more than 20 samples"):
        open_originals(store)


def test_another_count_is_seen_before_anything_is_listed_or_loaded(
    store_of: Make,
    make_folder: Callable[..., Path],
    make_npz: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(originals, "store_dataset", lambda store: pytest.fail("listed"))
    spec = f"folder:{make_folder(tmp_path / 'd')}"
    for said, count in (
        (f"folder:{make_folder(tmp_path / 'e', 12)}", 12),
        (make_npz(tmp_path / "x.npz", 30), 30),
    ):
        with pytest.raises(StoreMismatch, match=f"not the data set .* it has {count} samples, the store 20"):
            open_originals(store_of(spec, said))


def test_equal_counts_of_other_samples_are_refused(
    store_of: Make, make_folder: Callable[..., Path], make_npz: Callable[..., str], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "d")
    spec = f"folder:{folder}"
    said = [make_npz(tmp_path / "x.npz", 20), f"tar:{packed(tmp_path / 's.tar', folder, 'x')}"]
    for other in said:
        with pytest.raises(StoreMismatch, match="their fingerprints differ"):
            open_originals(store_of(spec, other))
    (folder / "a" / "00.png").rename(folder / "a" / "99.png")
    with pytest.raises(StoreMismatch, match="their fingerprints differ"):
        open_originals(store_of(spec))


def test_a_store_of_other_samples_is_refused(
    store_of: Make, make_folder: Callable[..., Path], sealed_store: Path, tmp_path: Path
) -> None:
    said = f"store:{sealed_store}"
    with pytest.raises(StoreMismatch, match="it has 20 samples, the store 12"):
        open_originals(store_of(f"folder:{make_folder(tmp_path / 'd', 12)}", said))


def bomb(path: Path, count: int, declared: int) -> Path:
    """An .npz of zeros whose header says ``declared`` rows."""
    import io

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (declared, 64, 64, 3)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as file:
        file.write(head.getvalue())
        for _ in range(count):
            file.write(bytes(64 * 64 * 3))
    return path


def test_arrays_that_would_fill_the_memory_are_not_loaded(
    store_of: Make, make_npz: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_npz(tmp_path / "x.npz", 40)
    with pytest.raises(InputNotFound, match=r"images.npy is not as long as it says"):
        open_originals(store_of(spec, f"npz:{bomb(tmp_path / 'lies.npz', 4, 10**9)}"))
    monkeypatch.setattr(originals, "NPZ_BYTES", 1 << 18)
    with pytest.raises(InputNotFound, match="GiB of arrays are not loaded to be looked at"):
        open_originals(store_of(spec, f"npz:{bomb(tmp_path / 'large.npz', 40, 40)}"))
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(InputNotFound, match=r"not a readable .npz"):
        open_originals(store_of(spec, f"npz:{tmp_path}/text.npz"))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_file_that_became_something_else_is_not_read(
    kind: str, store_of: Make, make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "d")
    path = packed(tmp_path / "s.tar", folder) if kind == "tar" else folder / "a" / "00.png"
    found = open_originals(store_of(f"tar:{path}" if kind == "tar" else f"folder:{folder}"))
    monkeypatch.setattr(originals, "SAMPLE_BYTES", 10)
    with pytest.raises(UnreadableImage, match=r"a sample of .* bytes is not opened"):
        found.read(found.ids[0])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnreadableImage, match="not a file"):
        found.read(found.ids[0])


def test_a_look_says_so_on_the_page(sealed_store: Path) -> None:
    """In a process of its own, so that one that hangs or eats memory fails here."""
    pytest.importorskip("torch")
    about = {"data": "npz:/dev/zero", "source": "", "written_with": {}}
    (sealed_store / "about.json").write_text(json.dumps(about))
    code = (
        "import json, resource, sys, threading, urllib.request\n"
        "from hdcache.sharing.catalogue import Catalogue\n"
        "from hdcache.sharing.server import make_server\n"
        "server = make_server(Catalogue(sys.argv[1]), '127.0.0.1', 0, originals=True)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "def ask(path): return urllib.request.urlopen(server.url + path, timeout=60).read().decode()\n"
        "ask('/look/row/?view=0&row=0&teacher=t&tap=final')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.loads(ask('/look/image/?view=0&row=0'))['why'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(sealed_store)], capture_output=True, text=True, timeout=120, check=True
    )
    why, grown = done.stdout.splitlines()
    assert why == "'npz:/dev/zero': /dev/zero is no file; it is not opened"
    assert int(grown) < 50_000, "KiB"


def test_other_kinds_have_a_check_of_their_own() -> None:
    kinds: Any = set(originals.LOCAL)
    assert set(originals._CHECKS) == kinds
