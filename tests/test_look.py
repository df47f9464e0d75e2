"""What a look inside a store shows: the values that are stored, hidden tokens left out, and why there is no picture."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdcache.errors import HdcacheError, InputNotFound, StoreCorrupt, UsageError
from hdcache.reader import TeacherReader
from hdcache.schema import Preprocessing
from hdcache.sharing import originals as module
from hdcache.sharing.look import Look
from hdcache.store import Store
from hdcache.views import render


@pytest.fixture(scope="module")
def look(kept_store: Path) -> Look:
    return Look(Store.open(kept_store), originals=False)


def picture(address: str) -> np.ndarray:
    """The pixels of a picture that a page shows."""
    with Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))) as image:
        return np.array(image)


def good_row(look: Look, teacher: str = "all") -> int:
    return next(row for row in range(21) if not look.row(teacher, "final", 0, row)["failed"])


def test_a_row_says_what_it_is_and_maps_its_tokens(look: Look) -> None:
    row = good_row(look)
    facts = look.row("all", "final", 0, row)
    store = look.store
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["row"], facts["rows"], facts["grid"], facts["slots"]) == (row, 21, [4, 4], 1)
    assert facts["sample"] in store.ids
    assert facts["label"] == facts["sample"].split("/")[0]
    assert facts["visible"] is None
    found = picture(facts["map"])
    assert found.shape == (4, 4, 4)
    assert (found[..., 3] == 255).all()
    assert len(np.unique(found[..., :3].reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize("kind", ["qk", "vv", "qq", "kk"])
def test_relations_are_those_of_the_stored_features(look: Look, kind: str) -> None:
    """Computed here from the stored rows and weights alone."""
    row, reader = good_row(look), TeacherReader(look.store, "all")
    x = reader.tap(0, "block3.attn_in", row, row + 1)
    whole = torch.cat([x.prefix, x.patches], dim=1)[0].double().numpy()
    weight, bias = (np.asarray(reader.weights[f"block3/qkv_{name}"], np.float64) for name in ("weight", "bias"))
    parts = dict(zip("qkv", np.split(whole @ weight.T + bias, 3, axis=1), strict=True))
    first, second = (parts[letter].reshape(17, 3, 16).transpose(1, 0, 2) for letter in kind)
    scores = first @ second.transpose(0, 2, 1) / 4
    exact = np.exp(scores - scores.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    for token, place in ((0, 1), (9, 10), (-1, 0)):
        found = look.relation("all", "block3.attn_in", 0, row, token, kind)
        assert found["heads"] == 3
        assert np.allclose(found["prefix"] + found["values"], exact.mean(0)[place], atol=2e-6)
        found = look.relation("all", "block3.attn_in", 0, row, token, kind, 2)
        assert np.allclose(found["prefix"] + found["values"], exact[2, place], atol=2e-6)


def test_a_stored_relation_is_shown_as_it_is(look: Look) -> None:
    row, reader = good_row(look), TeacherReader(look.store, "all")
    assert look.row("all", "block3.rel.vv", 0, row)["kinds"] == ["vv"]
    stored = reader.tap(0, "block3.rel.vv", row, row + 1)[0].mean(0).numpy()
    found = look.relation("all", "block3.rel.vv", 0, row, 3, "vv")
    assert np.allclose(found["prefix"] + found["values"], stored[4], atol=1e-6)
    assert look.row("all", "block3.rel.vv", 0, row)["map"]


def test_similarities_are_cosines(look: Look) -> None:
    row, reader = good_row(look), TeacherReader(look.store, "all")
    tokens = reader.tap(0, "final", row, row + 1).sequence()[0]
    exact = torch.cosine_similarity(tokens, tokens[6][None]).numpy()
    found = look.relation("all", "final", 0, row, 5, "cosine")
    assert np.allclose(found["prefix"] + found["values"], exact, atol=2e-6)
    assert found["values"][5] == pytest.approx(1, abs=2e-6)
    assert found["heads"] == 0


def test_a_masked_teacher_has_only_what_it_saw(look: Look) -> None:
    row, reader = good_row(look, "half"), TeacherReader(look.store, "half")
    facts = look.row("half", "final", 0, row)
    visible = reader.unpacked(reader.packed_masks(0, row, row + 1))[0].tolist()
    assert facts["visible"] == visible
    assert np.flatnonzero(picture(facts["map"])[..., 3].ravel()).tolist() == visible
    found = look.relation("half", "block3.attn_in", 0, row, visible[2], "qk")
    assert [number for number, value in enumerate(found["values"]) if value is not None] == visible
    assert sum(found["prefix"]) + sum(value for value in found["values"] if value) == pytest.approx(1, abs=1e-4)
    hidden = next(token for token in range(16) if token not in visible)
    with pytest.raises(UsageError, match=f"token {hidden}: not among the 8 tokens that row {row} has"):
        look.relation("half", "block3.attn_in", 0, row, hidden, "qk")


def test_a_failed_row_has_its_reason_and_nothing_else(look: Look) -> None:
    failed = next(row for row in range(21) if look.row("all", "final", 0, row)["failed"])
    facts = look.row("all", "final", 0, failed)
    assert facts["sample"] == "b/broken.png"
    assert "not an image" in facts["failed"]
    assert facts["map"] == ""
    with pytest.raises(UsageError, match=rf"row {failed} failed: .*not an image"):
        look.relation("all", "final", 0, failed, 0, "cosine")
    assert "not an image" in look.image(0, failed)["why"]


def test_taps_without_tokens_have_no_map(look: Look) -> None:
    row, reader = good_row(look), TeacherReader(look.store, "all")
    pooled = look.row("all", "pooled", 0, row)
    assert (pooled["kinds"], pooled["map"], pooled["logits"]) == ([], "", [])
    logits = look.row("all", "logits", 0, row)
    exact = reader.tap(0, "logits", row, row + 1)[0].softmax(-1)
    assert [number for number, _ in logits["logits"]] == exact.argsort(descending=True).tolist()
    assert sum(share for _, share in logits["logits"]) == pytest.approx(1, abs=1e-4)
    with pytest.raises(UsageError, match="tap pooled has no 'cosine'"):
        look.relation("all", "pooled", 0, row, 0, "cosine")


def test_a_picture_is_the_sample_under_its_stored_view(look: Look) -> None:
    """Rendered here from the kept bytes and the numbers that the row shows."""
    from hdcache.datasets import decode, store_dataset

    row = good_row(look)
    facts = look.row("all", "final", 0, row)
    found = look.image(0, row)
    assert found["why"] == ""
    image = decode(store_dataset(look.store).read(facts["sample"]))
    exact = render(image, tuple(facts["box"]), facts["flip"], 224, Preprocessing(size=224).interpolation)
    assert np.array_equal(picture(found["image"]), np.asarray(exact))


def test_originals_are_shown_only_where_that_was_asked_for(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    assert "hdcache serve --originals" in Look(store, originals=False).image(0, 3)["why"]
    assert picture(Look(store, originals=True).image(1, 3)["image"]).shape == (224, 224, 3)


def test_data_that_moved_or_changed_is_said_and_maps_are_still_shown(
    tiny_store: Path, tmp_path: Path, make_npz: Callable[..., str]
) -> None:
    copy = shutil.copytree(tiny_store, tmp_path / "s")
    about = json.loads((copy / "about.json").read_text())

    def shown(spec: str) -> dict[str, str]:
        (copy / "about.json").write_text(json.dumps(about | {"data": spec}))
        found = Look(Store.open(copy), originals=True)
        assert found.row("t", "final", 0, 3)["map"]
        return found.image(0, 3)

    assert "no such file" in shown(f"npz:{tmp_path}/gone.npz")["why"]
    assert (
        "not the data set that this store was made from" in shown(make_npz(tmp_path / "other.npz", 64, seed=1))["why"]
    )
    assert "does not say where its data set was" in shown("")["why"]


def test_a_store_cannot_have_the_network_asked(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(tiny_store, tmp_path / "s")

    def opened(*arguments: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(module, "store_dataset", opened)
    for spec in ("hf:owner/name?split=train", "torchvision:CIFAR10?root=/tmp"):
        (copy / "about.json").write_text(json.dumps({"data": spec, "source": "", "written_with": {}}))
        assert "only local ones are opened" in Look(Store.open(copy), originals=True).image(0, 3)["why"]


def test_clips_are_strips_with_a_frame_for_each_slot(tmp_path: Path, tiny: str) -> None:
    av = pytest.importorskip("av")
    from hdcache.extract.run import extract

    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 5, 5, 3), dtype=np.uint8)
    for number, clip in enumerate(noise):
        (tmp_path / "d").mkdir(exist_ok=True)
        with av.open(str(tmp_path / "d" / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 40
            for frame in clip:
                shown = av.VideoFrame.from_ndarray(np.kron(frame, np.ones((8, 8, 1), np.uint8)), format="rgb24")
                container.mux(stream.encode(shown))
            container.mux(stream.encode())
    extract(
        f"video:{tmp_path}/d", store=tmp_path / "s", teachers=[f"t={tiny}&frames=4"], taps=["final"], device="cpu",
        views="videomae?frames=4&stride=1", encoding="fp32", precision="fp32", batch=2, threads=2, pixels="source", quiet=True,
    )  # fmt: skip
    look = Look(Store.open(tmp_path / "s"), originals=False)
    facts = look.row("t", "final", 0, 1)
    assert (facts["slots"], len(facts["frames"])) == (2, 4)
    assert picture(facts["map"]).shape == (4, 8, 4)
    strip = picture(look.image(0, 1, 2)["image"])
    assert strip.shape == (224, 448, 3)
    whole = picture(look.image(0, 1, 4)["image"])
    assert np.array_equal(strip[:, 224:], whole[:, 448:672]), "the first frame of the second slot"
    assert len(look.relation("t", "final", 0, 1, 20, "cosine")["values"]) == 32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nobody", "final", 0, 0), InputNotFound, "no teacher 'nobody'"),
        (("all", "block1.out", 0, 0), InputNotFound, "holds .*, not 'block1.out'"),
        (("all", "final", 7, 0), InputNotFound, "view 7"),
        (("all", "final", 0, 21), UsageError, "row 21: choose from 0 to 20"),
        (("all", "final", 0, -1), UsageError, "row -1: choose from 0 to 20"),
        (("../all", "final", 0, 0), UsageError, "teacher '../all' may hold only"),
    ],
)
def test_what_is_not_there_is_refused(
    look: Look, arguments: tuple[Any, ...], error: type[HdcacheError], message: str
) -> None:
    with pytest.raises(error, match=message):
        look.row(*arguments)


@pytest.mark.parametrize(
    ("token", "kind", "head", "message"),
    [
        (16, "qk", None, "token 16: not among the 16 tokens"),
        (-2, "qk", None, "token -2"),
        (0, "xx", None, "no 'xx'; choose from: qk, vv, qq, kk, cosine"),
        (0, "qk", 3, "head 3: choose from 0 to 2"),
    ],
)
def test_tokens_and_heads_that_do_not_exist_are_refused(
    look: Look, token: int, kind: str, head: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        look.relation("all", "block3.attn_in", 0, good_row(look), token, kind, head)


def test_damaged_rows_are_an_error_and_no_picture(kept_store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(kept_store, tmp_path / "s")
    chunks = [path for path in (copy / "teachers/all/views/0/final").rglob("c.*") if path.is_file()]
    assert chunks
    for path in chunks:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    look = Look(Store.open(copy), originals=False)
    with pytest.raises(StoreCorrupt):
        look.row("all", "final", 0, good_row(look, "half"))


def test_neighbours_share_their_colours(look: Look) -> None:
    """Rows are coloured by one fit, so that equal features have equal colours."""
    reader = TeacherReader(look.store, "all")
    rows = [row for row in range(16) if not look.row("all", "final", 0, row)["failed"]]
    values = np.concatenate([reader.tap(0, "final", row, row + 1).patches[0].numpy() for row in rows])
    painted = np.concatenate([picture(look.row("all", "final", 0, row)["map"]).reshape(-1, 4)[:, :3] for row in rows])
    centred = values - values.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    score = centred @ axes[0]
    assert abs(np.corrcoef(score, painted[:, 0].astype(float))[0, 1]) > 0.98
