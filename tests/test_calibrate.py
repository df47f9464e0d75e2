"""Encodings are fitted on rows that store, teacher and requests alone decide, and measured on others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdcache.datasets import Dataset
from hdcache.encodings import Encoder, request
from hdcache.errors import InputNotFound, UsageError
from hdcache.extract.calibrate import HELDOUT_ROWS, MAX_ROWS, MIN_ROWS, calibrate, write_record
from hdcache.extract.opening import open_or_create
from hdcache.reader import TeacherReader
from hdcache.schema import TeacherRecord
from hdcache.store import Store
from hdcache.taps import Tokens
from hdcache.teachers import Teacher, load_teacher

Fitted = tuple[TeacherRecord, dict[str, Encoder]]


@pytest.fixture
def teacher(tiny: str) -> Teacher:
    return load_teacher(f"t={tiny}", precision="fp32", batch=8)


def opened(tmp_path: Path, data: str | Path, rows_per_shard: int = 8) -> tuple[Store, Dataset]:
    dataset, store = open_or_create(str(data), tmp_path, None, 0, rows_per_shard)
    return store, dataset


def fit(store: Store, dataset: Dataset, teacher: Teacher, *taps: str, threads: int = 2, **settings: Any) -> Fitted:
    asked = [request(tap, settings.get("encoding"), settings.get("fidelity")) for tap in taps or ("final",)]
    return calibrate(store, dataset, teacher, asked, threads=threads, source="somewhere")


def test_the_fit_does_not_depend_on_threads_or_shards(
    tmp_path: Path, teacher: Teacher, make_npz: Callable[..., str]
) -> None:
    data = make_npz(tmp_path / "d.npz", 48)
    first, encoders = fit(*opened(tmp_path / "a", data), teacher, "block3.attn_in", "final")
    for threads, shard in ((1, 8), (3, 16)):
        again, others = fit(
            *opened(tmp_path / str(threads), data, shard), teacher, "block3.attn_in", "final", threads=threads
        )
        assert again == first
        for tap, encoder in encoders.items():
            for name, value in encoder.constants.items():
                assert np.array_equal(value, others[tap].constants[name])


def test_rows_that_are_measured_are_not_rows_that_were_fitted(
    tmp_path: Path, teacher: Teacher, make_npz: Callable[..., str]
) -> None:
    for count, fitted, held in ((1, 1, 1), (2, 1, 1), (40, 32, 8), (300, 240 - 48, 60 - 12)):
        record, _ = fit(*opened(tmp_path / str(count), make_npz(tmp_path / "d.npz", count)), teacher)
        certificate = record.taps["final"].certificate
        if count <= MIN_ROWS:
            assert (certificate.calibration_rows, certificate.heldout_rows) == (fitted, held)
        assert certificate.heldout_rows <= HELDOUT_ROWS
        assert certificate.calibration_rows + certificate.heldout_rows <= min(MAX_ROWS, max(count, 2))


def test_the_asked_fidelity_is_reached(tmp_path: Path, teacher: Teacher, make_npz: Callable[..., str]) -> None:
    store, dataset = opened(tmp_path / "s", make_npz(tmp_path / "d.npz", 128))
    errors = []
    for fidelity in (0.02, 0.1, 0.3):
        record, _ = fit(store, dataset, teacher, fidelity=fidelity)
        errors.append(record.taps["final"].certificate.relative_rmse)
        assert errors[-1] == pytest.approx(fidelity, rel=0.15)
    assert errors == sorted(errors)


def test_an_attention_input_states_what_its_relations_cost(
    tmp_path: Path, teacher: Teacher, make_npz: Callable[..., str]
) -> None:
    store, dataset = opened(tmp_path / "s", make_npz(tmp_path / "d.npz", 40))
    costs = []
    for fidelity in (0.02, 0.3):
        record, _ = fit(store, dataset, teacher, "block3.attn_in", "final", fidelity=fidelity)
        certificate = record.taps["block3.attn_in"].certificate
        assert certificate.kl_qk is not None
        assert certificate.kl_vv is not None
        costs.append((certificate.kl_qk, certificate.kl_vv))
        assert costs[-1] == tuple(float(f"{value:.6g}") for value in costs[-1]), "digits that threads decide"
        assert record.taps["final"].certificate.kl_qk is None
    assert 0 <= costs[0][0] < costs[1][0]
    assert 0 <= costs[0][1] < costs[1][1]
    exact, _ = fit(store, dataset, teacher, "block3.attn_in", encoding="fp32")
    assert exact.taps["block3.attn_in"].certificate.kl_qk == pytest.approx(0, abs=1e-6)


def test_features_leave_the_device_batch_by_batch(
    tmp_path: Path, teacher: Teacher, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, sizes = Teacher.forward, []

    def counted(self: Teacher, pixels: torch.Tensor, taps: list[str], visible: Any) -> dict[str, Tokens | torch.Tensor]:
        sizes.append(len(pixels))
        return forward(self, pixels, taps, visible)

    monkeypatch.setattr(Teacher, "forward", counted)
    fit(*opened(tmp_path / "s", make_npz(tmp_path / "d.npz", 20)), teacher, "final", "pooled")
    assert sizes == [8, 8, 4]


def test_recorded_views_are_replayed(
    tmp_path: Path, teacher: Teacher, tiny: str, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdcache.extract.run import extract

    data = make_npz(tmp_path / "d.npz", 16)
    extract(data, store=tmp_path / "s", teachers=[f"other={tiny}"], device="cpu", precision="fp32", rows_per_shard=8)
    store, dataset = opened(tmp_path / "s", data)
    before, _ = fit(store, dataset, teacher)
    monkeypatch.setattr("hdcache.samples.draw", lambda *_: pytest.fail("a recorded view was drawn again"))
    assert fit(store, dataset, teacher)[0] == before


def test_unreadable_images_are_passed_over(tmp_path: Path, teacher: Teacher, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path / "d", 20)
    for name in ("a/00.png", "b/01.png"):
        (root / name).write_bytes(b"")
    certificate = fit(*opened(tmp_path / "s", root), teacher)[0].taps["final"].certificate
    assert certificate.calibration_rows + certificate.heldout_rows == 18


def test_no_readable_image_at_all(tmp_path: Path, teacher: Teacher, make_folder: Callable[..., Path]) -> None:
    root = make_folder(tmp_path / "d", 3)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        InputNotFound, match=r"none of 3 images could be read; the first: [ab]/0\d\.png: the file is empty"
    ):
        fit(*opened(tmp_path / "s", root), teacher)


@pytest.mark.parametrize(
    ("precision", "advice"), [("fp32", "check the checkpoint for NaN or inf"), ("bf16", "use --precision fp32")]
)
def test_features_that_are_not_finite(
    precision: str, advice: str, tmp_path: Path, tiny: str, make_npz: Callable[..., str]
) -> None:
    teacher = load_teacher(f"t={tiny}", precision=precision, batch=8)
    with torch.no_grad():
        teacher.backbone.model.norm.weight[3] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(UsageError, match=f"teacher t: features are not finite in {precision}; {advice}"):
        fit(*opened(tmp_path / "s", make_npz(tmp_path / "d.npz", 4)), teacher)


def test_some_rows_that_are_not_finite_take_no_part(
    tmp_path: Path, teacher: Teacher, make_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Teacher.forward

    def holed(self: Teacher, pixels: torch.Tensor, taps: list[str], visible: Any) -> dict[str, Tokens | torch.Tensor]:
        found = forward(self, pixels, taps, visible)
        value = found["final"]
        assert isinstance(value, Tokens)
        value.patches[::4, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(Teacher, "forward", holed)
    record, encoders = fit(*opened(tmp_path / "s", make_npz(tmp_path / "d.npz", 40)), teacher)
    certificate = record.taps["final"].certificate
    assert certificate.calibration_rows + certificate.heldout_rows == 30
    assert all(np.isfinite(value).all() for value in encoders["final"].constants.values())


def test_the_record_is_read_back_as_it_was_written(
    tmp_path: Path, teacher: Teacher, make_npz: Callable[..., str], tree: Callable[[Path], dict[str, bytes]]
) -> None:
    store, dataset = opened(tmp_path / "s", make_npz(tmp_path / "d.npz", 40))
    record, encoders = fit(store, dataset, teacher, "block3.attn_in", "final", "pooled")
    assert store.teachers() == [], "calibration writes nothing"
    written = write_record(store, teacher, record, encoders)
    first = tree(tmp_path / "s")
    assert write_record(store, teacher, record, encoders) == written
    assert tree(tmp_path / "s") == first
    reader = TeacherReader(Store.open(tmp_path / "s"), "t")
    assert reader.record == written
    assert reader.record.source == "somewhere"
    for tap, encoder in encoders.items():
        for name, value in encoder.constants.items():
            assert np.array_equal(reader.encoders[tap].constants[name], value)
    weights, facts = teacher.weights_for(["block3.attn_in"])
    assert reader.record.attention == facts
    assert reader.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert np.array_equal(reader.weights[name], value)
    listed = {f"teachers/t/{key}" for key in written.objects}
    assert listed | {"teachers/t/zarr.json", "teachers/t/about.json"} == {
        key for key in first if key.startswith("teachers/t/")
    }
