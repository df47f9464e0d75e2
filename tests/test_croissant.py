"""``croissant.json`` says what is sealed, all of it and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from hdcache.array_metadata import group_metadata, read_attributes
from hdcache.croissant import croissant_json
from hdcache.errors import StoreUnreadable
from hdcache.ledgers import teacher_ledger, view_ledger
from hdcache.store import Store


def described(path: Path) -> dict[str, Any]:
    found = json.loads(croissant_json(Store.open(path)))
    assert isinstance(found, dict)
    return found


def of_type(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in found["distribution"] if entry["@type"] == kind]


def test_it_has_what_the_standard_requires_and_a_store_knows(tiny_store: Path) -> None:
    """All but creator and date, which no store records; ids are unique and every piece has what its type requires."""
    found = described(tiny_store)
    assert (found["@type"], found["conformsTo"]) == ("sc:Dataset", "http://mlcommons.org/croissant/1.1")
    assert {"@context", "name", "description", "license", "url", "distribution", "recordSet"} <= found.keys()
    assert not {"creator", "datePublished", "dateCreated"} & found.keys()
    for entry in of_type(found, "cr:FileObject"):
        assert {"@id", "name", "contentUrl", "contentSize", "encodingFormat", "sha256"} <= entry.keys()
    for entry in of_type(found, "cr:FileSet"):
        assert {"@id", "name", "encodingFormat", "includes"} <= entry.keys()
    fields = [field for records in found["recordSet"] for field in records["field"]]
    ids = [entry["@id"] for entry in (*found["distribution"], *found["recordSet"], *fields)]
    assert len(set(ids)) == len(ids)
    # A field without a source has its values in the file itself: Croissant has no source of Zarr to name.
    assert all(records["data"] for records in found["recordSet"])
    assert "Croissant cannot read Zarr" in found["description"]


def test_every_sealed_file_is_named(tiny_store: Path) -> None:
    """Manifests by size and sha256; all arrays that they list by the patterns of the file sets, each in one."""
    found = described(tiny_store)
    objects = {entry["@id"]: entry for entry in of_type(found, "cr:FileObject")}
    manifests = [path.relative_to(tiny_store).as_posix() for path in tiny_store.rglob("manifest.json")]
    assert objects.keys() == {"samples/receipt.json", *manifests}
    listed = {f"samples/{key}" for key in json.loads((tiny_store / "samples/receipt.json").read_text())["objects"]}
    for key, entry in objects.items():
        data = (tiny_store / key).read_bytes()
        assert (entry["contentUrl"], entry["contentSize"]) == (key, f"{len(data)} B")
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        listed |= json.loads(data)["objects"].keys() if key != "samples/receipt.json" else set()
    sets = of_type(found, "cr:FileSet")
    arrays = {key for key in listed if key.rpartition("/")[2].startswith("c.")}
    for key in arrays:
        assert sum(any(fnmatch(key, pattern) for pattern in entry["includes"]) for entry in sets) == 1, key
    for entry in sets:
        for pattern in entry["includes"]:
            assert any(fnmatch(key, pattern) for key in arrays), f"{pattern} names nothing"


def test_taps_are_described_with_shape_encoding_and_measured_error(sealed_store: Path) -> None:
    sets = {entry["@id"]: entry["description"] for entry in of_type(described(sealed_store), "cr:FileSet")}
    record = Store.open(sealed_store).teacher("t")
    error = record.taps["block1.attn_in"].certificate.relative_rmse
    assert sets["teachers/t/block1.attn_in-arrays"] == (
        f"Tap block1.attn_in of teacher t: [9, 6] and 1 prefix tokens as klt, relative RMSE {error:g}."
    )
    assert record.identity_digest() in described(sealed_store)["description"]


def test_classes_are_records(tiny_store: Path) -> None:
    (classes,) = described(tiny_store)["recordSet"]
    names = Store.open(tiny_store).card.dataset.classes
    assert classes["data"] == [{"classes/index": number, "classes/name": name} for number, name in enumerate(names)]
    assert {field["@id"] for field in classes["field"]} == {"classes/index", "classes/name"}


def test_licences_that_nobody_stated_are_said_to_be_unknown(sealed_store: Path) -> None:
    assert [(entry["name"], entry["description"]) for entry in described(sealed_store)["license"]] == [
        ("none", "Licence of the weights of teacher t, as its source states it."),
        ("unknown", "Licence of the images: a store does not record it."),
    ]
    path = sealed_store / "teachers" / "t" / "zarr.json"
    record = read_attributes(path) | {"licence": "unknown"}
    path.write_bytes(group_metadata(record))
    assert described(sealed_store)["license"][0] == {
        "@type": "sc:CreativeWork",
        "name": "unknown",
        "description": "Licence of the weights of teacher t, which its source does not state.",
    }


def test_equal_seals_have_equal_bytes_wherever_they_lie(tiny_store: Path, tmp_path: Path) -> None:
    """Another folder, other notes on where the data was, and no shard at all: none of it is read."""
    copy = shutil.copytree(tiny_store, tmp_path / "elsewhere")
    (copy / "about.json").write_text('{"data": "folder:/moved"}')
    for shard in copy.rglob("c.*"):
        shard.unlink()
    assert croissant_json(Store.open(copy)) == croissant_json(Store.open(tiny_store))


def test_what_is_not_sealed_is_not_there(sealed_store: Path) -> None:
    """The version counts seals: more of them are more data beside the same."""
    store, whole = Store.open(sealed_store), described(sealed_store)
    assert whole["version"] == "1.2.0"
    teacher_ledger(store, "t", 0).unseal()
    without = described(sealed_store)
    assert without["version"] == "1.1.0"
    assert not [entry for entry in without["distribution"] if "teachers" in entry["@id"]]
    assert "Teacher t" not in without["description"]
    view_ledger(store, 0).unseal()
    assert [entry["@id"] for entry in described(sealed_store)["distribution"]] == [
        "samples/receipt.json",
        "samples-arrays",
    ]
    assert described(sealed_store)["name"] == whole["name"]


def test_a_teacher_that_cannot_be_read_now_is_not_left_out(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def failing(path: Any, *given: Any, **more: Any) -> int:
        if str(path).endswith("teachers/t/zarr.json"):
            raise OSError(5, "Input/output error")
        return opened(path, *given, **more)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(StoreUnreadable, match=r"t/zarr\.json: cannot be read \(Input/output error\); check the disk"):
        croissant_json(Store.open(sealed_store))


@pytest.mark.parametrize("damage", [b"", b"[", b"{}", b'{"attributes": {"hdcache": {"name": "t"}}}'])
def test_a_damaged_teacher_is_left_out_and_no_error(damage: bytes, sealed_store: Path) -> None:
    """Extraction of another teacher must go on."""
    (sealed_store / "teachers" / "t" / "zarr.json").write_bytes(damage)
    assert "Teacher t" not in described(sealed_store)["description"]


def test_kept_samples_and_masks_are_sets_of_files(make_npz: Any, tiny: str, tmp_path: Path) -> None:
    from hdcache.extract.run import extract

    data = make_npz(tmp_path / "d.npz", 10)
    options: dict[str, Any] = {"device": "cpu", "precision": "fp32", "taps": ["final"], "pixels": "source"}
    extract(data, store=tmp_path / "s", teachers=[f"t={tiny}"], teacher_mask="0.75", **options)
    found = described(tmp_path / "s")
    sets = {entry["@id"]: entry["includes"] for entry in of_type(found, "cr:FileSet")}
    assert sets["pixels-arrays"] == ["samples/pixels/**"]
    assert sets["teachers/t/mask-arrays"] == ["teachers/t/views/0/mask/**"]
    assert "samples/pixels/manifest.json" in {entry["@id"] for entry in of_type(found, "cr:FileObject")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_checker_of_the_standard_finds_no_fault(tiny_store: Path, tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    path = tmp_path / "croissant.json"
    path.write_bytes(croissant_json(Store.open(tiny_store)))
    dataset = mlcroissant.Dataset(jsonld=path)
    assert not dataset.metadata.ctx.issues.errors
    assert len(list(dataset.records("classes"))) == 3


def test_taps_that_a_copy_does_not_have_are_not_described(sealed_store: Path) -> None:
    whole = described(sealed_store)
    (sealed_store / "teachers/t/held.json").write_text('{"taps":["final"]}')
    found = described(sealed_store)
    gone = {entry["@id"] for entry in whole["distribution"]} - {entry["@id"] for entry in found["distribution"]}
    assert gone == {"teachers/t/block1.attn_in-arrays", "teachers/t/pooled-arrays"}
    assert "block1.attn_in" not in json.dumps(found)
