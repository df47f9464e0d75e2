"""Data sets: every spec, stable ids, labels, fingerprints, cached listings, and each way an input can be wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import string
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hdcache import listings
from hdcache.datasets import decode, digest, open_dataset, store_dataset
from hdcache.errors import InputNotFound, UnreadableImage, UsageError
from hdcache.schema import DatasetCard, StoreCard, ViewSpec
from hdcache.store import Store


def png(value: int = 0, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDCACHE_CACHE", str(tmp_path_factory.mktemp("cache")))


def fill(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, 4 + number))
    return root


def age(root: Path, seconds: float = 100) -> None:
    """Make every directory and file old enough for its listing to be remembered."""
    for path in [root, *root.rglob("*")]:
        info = path.stat()
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns - int(seconds * 1e9)))


def pack(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# ---------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foldr:/x", "unknown kind of data set 'foldr'; did you mean 'folder'"),
        ("s3://bucket/x.tar", "unknown kind of data set 's3'; choose from: folder"),
        ("folder:", "names no data set; write folder:PATH"),
        ("folder:/x?size=3", "unknown option 'size'; folder: takes none"),
        ("npz:/x.npz?image=a", "unknown option 'image'; did you mean 'images'"),
        ("npz:/x.npz?images", "option 'images' has no value; write images=VALUE"),
        ("npz:/x.npz?images=a&images=b", "option 'images' is given twice"),
        ("hf:a/b?splt=train", "unknown option 'splt'; did you mean 'split'"),
    ],
)
def test_specs_that_cannot_be_meant(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(spec)


@pytest.mark.parametrize("spec", ["{}/none", "folder:{}/none", "{}/none.tar", "tar:{}/none.tar", "npz:{}/none.npz"])
def test_missing_paths(spec: str, tmp_path: Path) -> None:
    with pytest.raises(InputNotFound, match=r"none.*check the path"):
        open_dataset(spec.format(tmp_path))


def test_a_file_that_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(png())
    with pytest.raises(UsageError, match=r"neither \.tar nor \.npz"):
        open_dataset(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize("name", ["plain", "a b", "50%41", "what?x=1", "a:b", "ünï", "x{1,2}y", "p+q&r=s"])
def test_card_spec_is_absolute_and_opens_the_same_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / name, "a/1.png")
    pack(tmp_path / name / "s.tar", [("k.png", png())])
    monkeypatch.chdir(tmp_path)
    for plain in (name, f"{name}/s.tar"):
        data = open_dataset(plain)
        assert str(tmp_path) in data.card.spec
        monkeypatch.chdir("/")
        assert open_dataset(data.card.spec).card == data.card
        monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------- folders


def test_folder_ids_labels_and_bytes(tmp_path: Path) -> None:
    names = ["10/b.PNG", "2/sub/x.jpeg", "10/a.webp", "é/z.png"]
    fill(tmp_path, *names, ".hidden/no.png", "10/.no.png", "10/notes.txt")
    data = open_dataset(f"folder:{tmp_path}")
    assert data.ids == ("10/a.webp", "10/b.PNG", "2/sub/x.jpeg", "é/z.png")
    assert data.card.classes == ("10", "2", "é")
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert data.labels.dtype == np.int64
    assert not data.labels.flags.writeable
    assert data.card.count == 4
    for name in names:
        source = data.read(name)
        assert source == (tmp_path / name).read_bytes()
        assert decode(source).mode == "RGB"
        assert len(digest(source)) == 32


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    data = open_dataset(str(fill(tmp_path, "b.png", "a.png")))
    assert data.ids == ("a.png", "b.png")
    assert data.labels.tolist() == [-1, -1]
    assert data.card.classes == ()


def test_folder_faults(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFound, match=r"no images \(\.jpg \.jpeg"):
        open_dataset(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"both in the root \(x\.png\) and in class directories \(a/1\.png\)"):
        open_dataset(str(fill(tmp_path / "mixed", "x.png", "a/1.png")))
    with pytest.raises(InputNotFound, match="no such directory"):
        open_dataset(f"folder:{tmp_path / 'mixed' / 'x.png'}")


def test_names_that_normalise_alike_are_refused_and_one_alone_is_found(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é")
    fill(tmp_path, f"{decomposed}/{decomposed}.png")
    data = open_dataset(str(tmp_path))
    assert data.ids == ("é/é.png",)
    assert data.card.classes == ("é",)
    assert data.read("é/é.png") == png(0)
    fill(tmp_path, "é/é.png")
    with pytest.raises(UsageError, match="two samples have the id") as caught:
        open_dataset(str(tmp_path))
    assert f"{decomposed}/{decomposed}.png" in str(caught.value)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(png())
    with pytest.raises(UsageError, match="not valid UTF-8"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("bad", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a/2.png", "", "a", "later.png"])
def test_only_listed_ids_are_read(bad: str, tmp_path: Path) -> None:
    fill(tmp_path, "secret.png", "root/a/1.png")
    data = open_dataset(str(tmp_path / "root"))
    (tmp_path / "root" / "later.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputNotFound, match="no sample"):
        data.read(bad)


def test_symlinks_are_followed_without_loops(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere/1.png", "root/a/2.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = open_dataset(str(tmp_path / "root"))
    assert data.ids == ("a/2.png", "a/gone.png", "linked/1.png")
    assert data.read("linked/1.png") == png(0)
    with pytest.raises(UnreadableImage, match=r"a/gone\.png: cannot be read: No such file"):
        data.read("a/gone.png")


def test_forced_classes_keep_their_numbers_and_unseen_ones_follow(tmp_path: Path) -> None:
    root = fill(tmp_path, "cat/1.png", "eel/1.png", "dog/1.png")
    data = open_dataset(str(root), classes=["dog", "ant", "cat"])
    assert data.card.classes == ("dog", "ant", "cat", "eel")
    assert data.labels.tolist() == [2, 0, 3]
    assert data.card.fingerprint == open_dataset(str(root)).card.fingerprint
    with pytest.raises(UsageError, match="names a class twice"):
        open_dataset(str(root), classes=["a", "a"])


def test_listing_order_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path, *(f"{c}/{i}.png" for c in "ba" for i in range(5)))
    forward = open_dataset(str(root))
    scan = listings._scan
    monkeypatch.setattr(listings, "_scan", lambda path, suffixes: scan(path, suffixes)[::-1])
    backward = open_dataset(str(root))
    assert (forward.ids, forward.card, forward.labels.tolist()) == (
        backward.ids,
        backward.card,
        backward.labels.tolist(),
    )


def test_fingerprint_follows_the_data_and_not_its_place(tmp_path: Path) -> None:
    root = fill(tmp_path / "one", "a/1.png", "b/2.png")
    first = open_dataset(str(root)).card.fingerprint
    shutil.copytree(root, tmp_path / "two")
    assert open_dataset(str(tmp_path / "two")).card.fingerprint == first
    (tmp_path / "two/b/2.png").write_bytes(png(1, 9))
    assert open_dataset(str(tmp_path / "two")).card.fingerprint == first, "a file may be mended"
    (tmp_path / "two/b/2.png").rename(tmp_path / "two/b/3.png")
    renamed = open_dataset(str(tmp_path / "two")).card.fingerprint
    (root / "b").rename(root / "c")
    assert len({first, renamed, open_dataset(str(root)).card.fingerprint}) == 3


# ------------------------------------------------------------------------------------- cached listings


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    scan = listings._scan

    def spy(path: str, suffixes: tuple[str, ...]) -> Any:
        seen.append(path)
        return scan(path, suffixes)

    monkeypatch.setattr(listings, "_scan", spy)
    return seen


def test_only_changed_directories_are_read_again(tmp_path: Path, scans: list[str]) -> None:
    root = fill(tmp_path / "d", "a/1.png", "b/1.png")
    age(root)
    first = open_dataset(str(root), cache=tmp_path / "c")
    assert len(scans) == 3
    assert open_dataset(str(root), cache=tmp_path / "c").card == first.card
    assert len(scans) == 3
    fill(root, "a/2.png")
    assert open_dataset(str(root), cache=tmp_path / "c").ids == ("a/1.png", "a/2.png", "b/1.png")
    assert [Path(path).name for path in scans[3:]] == ["a"]
    shutil.rmtree(root / "b")
    assert open_dataset(str(root), cache=tmp_path / "c").ids == ("a/1.png", "a/2.png")


def test_a_directory_changed_just_now_is_not_remembered(tmp_path: Path, scans: list[str]) -> None:
    root = fill(tmp_path / "d", "a/1.png")
    open_dataset(str(root), cache=tmp_path / "c")
    stamp = (root / "a").stat().st_mtime_ns
    fill(root, "a/2.png")
    os.utime(root / "a", ns=(stamp, stamp))
    assert open_dataset(str(root), cache=tmp_path / "c").ids == ("a/1.png", "a/2.png")
    assert len(scans) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"": [1]}', b'{"": ["x", []]}', b"\xff", b"with sizes"])
def test_a_corrupt_listing_is_ignored_and_replaced(content: bytes, tmp_path: Path, scans: list[str]) -> None:
    root = fill(tmp_path / "d", "a/1.png")
    age(root)
    open_dataset(str(root), cache=tmp_path / "c")
    (stored,) = (tmp_path / "c" / "listings").iterdir()
    good = stored.read_bytes()
    if content == b"with sizes":  # as listings were before sizes were left out, yet of the same mtimes
        old = {k: (mtime, [(name, 99, deep) for name, deep in names]) for k, (mtime, names) in json.loads(good).items()}
        content = json.dumps(old).encode()
    stored.write_bytes(content)
    assert open_dataset(str(root), cache=tmp_path / "c").ids == ("a/1.png",)
    assert stored.read_bytes() == good
    assert json.loads(good)[""][1] == [["a", True]]


def test_listing_asks_no_file_for_more_than_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system each question is a round trip, and there may be millions of files."""
    root = fill(tmp_path / "d", "a/1.png", "a/2.png", "b/1.png")
    (root / "b/2.png").symlink_to(root / "a/1.png")
    (root / "b/3.png").symlink_to(root / "gone.png")
    os.mkfifo(root / "b/4.png")
    scandir = os.scandir

    class Entry:
        """What a directory says of its entries; anything else would ask the file."""

        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path = entry.name, entry.path
            self.is_dir, self.is_file, self.is_symlink = entry.is_dir, entry.is_file, entry.is_symlink

    @contextmanager
    def spy(path: str) -> Iterator[list[Entry]]:
        with scandir(path) as found:
            yield [Entry(entry) for entry in found]

    monkeypatch.setattr(os, "scandir", spy)
    asked: list[str] = []
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: (asked.append(os.path.basename(path)), exists(path))[1])
    names = listings.walk(str(root), tmp_path / "c")
    assert sorted(names) == ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"]
    assert set(asked) == {"3.png"}, "only a link may dangle"


def test_an_unwritable_cache_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the cache should be")
    assert open_dataset(str(fill(tmp_path / "d", "1.png")), cache=tmp_path / "c").ids == ("1.png",)


def test_tar_index_is_remembered_until_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "s.tar", [("a.png", png())])
    age(tmp_path)
    calls: list[int] = []
    samples = listings._samples
    monkeypatch.setattr(listings, "_samples", lambda *args: (calls.append(1), samples(*args))[1])
    first = open_dataset(str(path))
    assert open_dataset(str(path)).card == first.card
    assert len(calls) == 1
    pack(path, [("b.png", png())])
    with pytest.raises(UnreadableImage, match="changed after it was listed"):
        first.read("s.tar/a")
    assert open_dataset(str(path)).ids == ("s.tar/b",)
    assert len(calls) == 2


# ----------------------------------------------------------------------------------------------- tars


def test_tar_members_are_read_at_random(tmp_path: Path) -> None:
    expected: dict[str, bytes] = {}
    for shard in range(3):
        members = []
        for number in range(6):
            data = png(10 * shard + number, 3 + number)
            members += [(f"./d/{number}.x.png", data), (f"./d/{number}.cls", str(11 - number).encode())]
            expected[f"s-{shard:03d}.tar/d/{number}"] = data
        pack(tmp_path / f"s-{shard:03d}.tar", members)
    data = open_dataset(f"wds:{tmp_path}/s-{{000..002}}.tar")
    assert data.ids == tuple(sorted(expected))
    assert data.card.kind == "tar"
    assert data.card.classes == ("6", "7", "8", "9", "10", "11")
    assert data.labels.tolist() == [5, 4, 3, 2, 1, 0] * 3
    order = np.random.default_rng(0).permutation(sorted(expected) * 3).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(data.read, order)) == [expected[name] for name in order]
    assert open_dataset(f"{tmp_path}/s-*.tar").card.fingerprint == data.card.fingerprint
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    assert open_dataset(f"tar:{moved}/s-{{000,001,002}}.tar").card.fingerprint == data.card.fingerprint


def test_tar_labels_from_json_and_strings(tmp_path: Path) -> None:
    members = [("a.json", b'{"label": "dog"}'), ("a.png", png()), ("b.png", png()), ("b.cls", b" cat\n")]
    members += [("c.png", png()), ("c.json", b'{"caption": "no label"}'), ("d.png", png()), ("d.cls", b"-1")]
    data = open_dataset(str(pack(tmp_path / "s.tar", members)))
    assert data.card.classes == ("cat", "dog")
    assert data.labels.tolist() == [1, 0, -1, -1]


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("a.cls", b"", r"s\.tar:a\.cls: label '' is neither"),
        ("a.cls", b"\xff\xfe", r"s\.tar:a\.cls: not a readable label"),
        ("a.json", b"{", r"s\.tar:a\.json: not a readable label"),
        ("a.json", b'{"label": [1]}', r"s\.tar:a\.json: label '\[1\]' is neither"),
        ("a.cls", b"x" * (1 << 21), r"s\.tar:a\.cls: 2097152 bytes are too many"),
    ],
)
def test_bad_tar_labels_name_the_member(member: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(str(pack(tmp_path / "s.tar", [("a.png", png()), (member, content)])))


def test_missing_empty_and_repeated_tars(tmp_path: Path) -> None:
    for name in ("x/s-0.tar", "y/s-0.tar"):
        pack(tmp_path / name, [("k.png", png())])
    with pytest.raises(InputNotFound, match=r"2 of 3 tar files are missing, the first is .*s-1\.tar"):
        open_dataset(f"{tmp_path}/x/s-{{0..2}}.tar")
    with pytest.raises(InputNotFound, match="1 of 1 tar files are missing"):
        open_dataset(f"{tmp_path}/x/t*.tar")
    with pytest.raises(UsageError, match=r"x/s-0\.tar:k\.png and .*y/s-0\.tar:k\.png"):
        open_dataset(f"{tmp_path}/{{x,y}}/s-0.tar")
    with pytest.raises(UsageError, match="two members are named k"):
        open_dataset(str(pack(tmp_path / "twice.tar", [("k.png", png()), ("k.png", png(1))])))
    with pytest.raises(InputNotFound, match=r"no images \(.*\) in 1 tar files"):
        open_dataset(str(pack(tmp_path / "none.tar", [("a.txt", b"x")])))


def test_damaged_and_compressed_tars(tmp_path: Path) -> None:
    whole = pack(tmp_path / "s.tar", [(f"{i}.png", png(i, 30)) for i in range(3)]).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as archive:
        second, last = (archive.getmember(f"{i}.png") for i in (1, 2))
    bad = {
        "text": b"not a tar" * 200,
        "empty": b"",
        "cut": whole[: last.offset_data + 100],
        "header": whole[: second.offset] + b"\x55" * 512 + whole[second.offset + 512 :],
    }
    for name, data in bad.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(InputNotFound, match=rf"{name}\.tar is not a whole tar file"):
            open_dataset(str(tmp_path / f"{name}.tar"))
    for name in ("s.tar.gz", "renamed.tar"):
        (tmp_path / name).write_bytes(gzip.compress(whole))
        with pytest.raises(UsageError, match=r"compressed \(gzip\).*decompress it"):
            open_dataset(str(tmp_path / name))


def test_images_that_share_a_key_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack(tmp_path / "s.tar", [("a.jpg", png()), ("a.mask.png", png(1)), (".b.png", png())])
    data = open_dataset(str(path))
    assert data.ids == ("s.tar/a",)
    assert data.read("s.tar/a") == png()
    assert "1 images share a key with another; only the first is used (a.mask.png)" in caplog.text


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 4))
def test_numeric_braces_count_like_a_shell(first: int, last: int, width: int) -> None:
    found = list(listings.expand_braces(f"a{{{first:0{width}d}..{last:0{width}d}}}b"))
    step = 1 if last >= first else -1
    assert [int(name[1:-1]) for name in found] == list(range(first, last + step, step))
    texts = [f"{bound:0{width}d}" for bound in (first, last)]
    padded = any(text[0] == "0" and len(text) > 1 for text in texts)
    assert {len(name) for name in found if padded} <= {2 + max(map(len, texts))}
    assert padded or found == [f"a{int(name[1:-1])}b" for name in found]


def test_other_braces() -> None:
    expand: Callable[[str], list[str]] = lambda pattern: list(listings.expand_braces(pattern))  # noqa: E731
    assert expand("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand("x{a,{b,c}}") == ["xa", "xb", "xa", "xc"]
    assert expand("{x}{}{1..}") == ["{x}{}{1..}"]
    with pytest.raises(UsageError, match="more than a million files"):
        expand("{0..99999999}")


KEY = st.text(string.ascii_letters + "é-_ 日", min_size=1, max_size=8)


@settings(max_examples=25)
@given(names=st.lists(KEY, min_size=1, max_size=5, unique_by=lambda name: unicodedata.normalize("NFC", name)))
def test_tar_keys_survive(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = pack(tmp_path_factory.mktemp("t") / "s.tar", [(f"d/{name}.png", name.encode()) for name in reversed(names)])
    data = open_dataset(str(path))
    assert data.ids == tuple(sorted(f"s.tar/d/{name}" for name in names))
    assert list(data.ids) == sorted(data.ids, key=str.encode)
    for name in names:
        assert data.read(f"s.tar/d/{name}") == name.encode()


# ------------------------------------------------------------------------------------------------ npz


def arrays(count: int = 3, *tail: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 5, *tail), dtype=np.uint8)


@pytest.mark.parametrize("tail", [(), (1,), (3,), (4,)])
def test_npz_arrays(tail: tuple[int, ...], tmp_path: Path) -> None:
    images = arrays(3, *tail)
    np.savez(tmp_path / "a.npz", x=images, y=np.array([[10], [2], [10]]))
    data = open_dataset(str(tmp_path / "a.npz"))
    assert data.ids == ("0000000", "0000001", "0000002")
    assert data.card.classes == ("2", "10")
    assert data.labels.tolist() == [1, 0, 1]
    for row, name in enumerate(data.ids):
        np.testing.assert_array_equal(data.read(name), images[row])
        assert decode(data.read(name)).size == (5, 4)
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    assert open_dataset(f"npz:{tmp_path}/b.npz").card.fingerprint == data.card.fingerprint
    np.savez(tmp_path / "b.npz", x=images[::-1], y=np.array([10, 2, 10]))
    assert open_dataset(f"npz:{tmp_path}/b.npz").card.fingerprint != data.card.fingerprint


def test_npz_options_string_labels_and_ids(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", p=arrays(), q=np.array(["b", "a", "b"]), ids=np.array(["z", "y", "x"]))
    data = open_dataset(f"npz:{tmp_path}/a.npz?images=p&labels=q")
    assert data.ids == ("x", "y", "z")
    assert data.card.classes == ("a", "b")
    assert data.labels.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(data.read("z"), arrays()[0])
    assert open_dataset(data.card.spec).card == data.card


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        ({"foo": arrays()}, "", UsageError, r"no array named images, x, X, data .*from: foo"),
        ({"x": arrays()}, "?labels=lables", UsageError, "no array 'lables' for labels"),
        ({"x": arrays().astype(np.float32)}, "", UsageError, r"float32 \[3, 4, 5\]; expected uint8"),
        ({"x": arrays(3, 2)}, "", UsageError, r"uint8 \[3, 4, 5, 2\]; expected"),
        ({"x": arrays(0)}, "", InputNotFound, "no images in"),
        ({"x": arrays(), "y": np.arange(2)}, "", UsageError, r"labels are int64 \[2\]; expected 3 integers"),
        ({"x": arrays(), "y": np.ones(3)}, "", UsageError, r"labels are float64 \[3\]"),
        ({"x": arrays(), "ids": np.array(["a", "b", "a"])}, "", UsageError, "id 'a': row 0 and row 2"),
        ({"x": arrays(), "ids": np.array(["a", "", "b"])}, "", UsageError, "row 1 has an empty id; give every sample"),
        ({"x": np.array([None, {}], dtype=object)}, "", InputNotFound, "without pickled objects"),
    ],
)
def test_bad_npz(content: dict[str, Any], options: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(error, match=message):
        open_dataset(f"npz:{tmp_path}/a.npz{options}")


def test_files_that_only_look_like_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 rubbish")
    with pytest.raises(InputNotFound, match="a zip of arrays"):
        open_dataset(str(tmp_path / "a.npz"))
    with open(tmp_path / "b.npz", "wb") as file:
        np.save(file, arrays())
    with pytest.raises(InputNotFound, match=r"is not an \.npz"):
        open_dataset(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", x=arrays(200))
    data = bytearray((tmp_path / "c.npz").read_bytes())
    data[1000:1100] = bytes(100)
    (tmp_path / "c.npz").write_bytes(data)
    with pytest.raises(InputNotFound, match=r"not a readable \.npz .*CRC"):
        open_dataset(str(tmp_path / "c.npz"))


def test_listing_and_decoding_need_no_torch() -> None:
    code = "import sys, hdcache.datasets; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Where a store says that its data was


def store_at(path: Path, data: str) -> Store:
    card = DatasetCard(spec=data, kind="folder", fingerprint="0" * 64, count=1, classes=("a",))
    return Store.create(path, StoreCard(dataset=card, views=ViewSpec()), ["a"], np.zeros(1, np.int64))


@pytest.mark.parametrize("option", ["download=true", "download=1", "download=%54RUE", "train=false&download=true"])
def test_a_store_says_where_its_data_is_and_downloads_nothing(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = pytest.importorskip("torchvision.datasets")
    made: list[dict[str, Any]] = []

    class Hostile:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            made.append({"root": root, "train": train, "download": download, "said": caplog.text})
            raise RuntimeError("not found")

    monkeypatch.setattr(library, "CIFAR10", Hostile)
    spec = f"torchvision:CIFAR10?root={tmp_path}/x&{option}"
    store = store_at(tmp_path / "s", spec)
    with pytest.raises(InputNotFound, match="not found"):
        store_dataset(store)
    assert (made[0]["root"], made[0]["train"], made[0]["download"]) == (f"{tmp_path}/x", "train=" not in option, False)
    assert f"{tmp_path}/s: its data is read from 'torchvision:CIFAR10?root={tmp_path}/x" in made[0]["said"]
    with pytest.raises(InputNotFound, match="not found"):
        store_dataset(store, spec)
    assert made[1]["download"], "who names it may fetch it"


def test_a_store_that_does_not_say_where_its_data_is(tmp_path: Path) -> None:
    """It is not the folder that the command happens to run in."""
    fill(tmp_path / "d", "a.png")
    store = store_at(tmp_path / "s", str(tmp_path / "d"))
    assert store_dataset(store).ids == ("a.png",)
    (store.path / "about.json").unlink()
    with pytest.raises(InputNotFound, match=r"about\.json: does not say where the data of this store is"):
        store_dataset(Store.open(store.path))
