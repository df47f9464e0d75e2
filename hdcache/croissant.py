"""``croissant.json``: what a store holds, in MLCommons' format for describing data sets (Croissant 1.1, JSON-LD).

It says what is sealed and nothing else: no date, no path, no author, since a store does not know them. Croissant has no
reader of Zarr and takes no field without a source, so arrays are listed as sets of files and described in words; only the
classes, which are in no array, are records. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hdcache.array_metadata import names_in, read_record
from hdcache.durable import stored_object
from hdcache.errors import HdcacheError, StoreUnreadable
from hdcache.held import held_taps
from hdcache.records import canonical_json
from hdcache.schema import StoreCard, TapCard, TeacherRecord
from hdcache.store import PIXELS, Store, is_view

CONFORMS_TO = "http://mlcommons.org/croissant/1.1"
ZARR = "https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html"
"""The format of a store's arrays: no media type is registered for it, and Croissant then takes the page that defines it."""
_SEAL = "manifest.json"
_BESIDE_TAPS = {
    "mask": "Which patch tokens were seen by teacher",
    "pixels": "sha256 of the pixels that were seen by teacher",
}
_OWN = (
    "annotation arrayShape citeAs column containedIn equivalentProperty excludes extract field fileObject fileProperty fileSet "
    "format includes isArray isLiveDataset jsonPath key md5 parentField path readLines recordSet references regex repeated replace "
    "samplingRate sdVersion separator source subField transform unArchive value"
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    **{name: f"cr:{name}" for name in _OWN.split()},
}
"""The standard's own context, its appendix 1, and what its checker expects beside it."""


def croissant_json(store: Store) -> bytes:
    """The content of ``croissant.json``: equal bytes for equal seals.

    Reads the records of teachers and hashes manifests, never a shard. What cannot be read is left out: this describes
    a store, and finding its faults is for ``hdcache verify``.
    """
    card = store.card
    views = _sealed_views(store, "views")
    teachers = dict(_teachers(store))
    seals = [f"views/{view}" for view in views]
    seals += [f"teachers/{name}/views/{view}" for name, (_, sealed) in teachers.items() for view in sealed]
    seals += [PIXELS] * (store.path / PIXELS / _SEAL).is_file()
    records = [f"{key}/{_SEAL}" for key in seals]
    whole = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": f"hdcache-{store.id}",
        "description": _description(card, views, teachers),
        "url": "./",
        # More seals are more data beside the same; what is sealed does not change.
        "version": f"1.{len(seals)}.0",
        "keywords": ["features", "knowledge distillation", "vision transformer", "zarr"],
        "license": list(_licences(card, teachers)),
        "distribution": [
            *_file_objects(store, ["samples/receipt.json", *records]),
            *_file_sets(store, views, teachers),
        ],
        "recordSet": list(_record_sets(card)),
    }
    return canonical_json(whole)


def _sealed_views(store: Store, key: str) -> list[int]:
    folder = store.path / key
    return sorted(int(name) for name in names_in(folder) if is_view(name) and (folder / name / _SEAL).is_file())


def _teachers(store: Store) -> Iterator[tuple[str, tuple[TeacherRecord, list[int]]]]:
    """Record, with the taps that this copy has, and sealed views of each teacher that has any."""
    for name in store.teachers():
        with _whole():
            if views := store.views(name):
                record, held = store.teacher(name), held_taps(store, name)
                here = {tap: card for tap, card in record.taps.items() if held is None or tap in held}
                yield name, (record.model_copy(update={"taps": here}), views)


@contextmanager
def _whole() -> Iterator[None]:
    """Leave out what is damaged, which is for others to say; not what the system cannot read now."""
    try:
        yield
    except StoreUnreadable:
        raise
    except HdcacheError:
        pass


def _description(card: StoreCard, views: list[int], teachers: dict[str, tuple[TeacherRecord, list[int]]]) -> str:
    data = card.dataset
    parts = [
        f"What frozen vision networks make of {data.count} {data.noun} ({len(data.classes)} classes) under {len(views)} stored "
        f"views ({card.views.kind}). A store of hdcache, format {card.format}: a Zarr v3 group whose arrays use core codecs only.",
        *(_teacher_text(record, len(sealed)) for record, sealed in teachers.values()),
        "Croissant cannot read Zarr, so samples and features are described in words, with the files that hold them, and not as "
        "record sets; the manifests among the files list every object with size and sha256. The data set's fingerprint is "
        f"{data.fingerprint}.",
    ]
    return " ".join(parts)


def _teacher_text(record: TeacherRecord, views: int) -> str:
    card = record.card
    taps = "; ".join(f"{name} {_tap_text(tap)}" for name, tap in sorted(record.taps.items()))
    return (
        f"Teacher {record.name}: {card.architecture} at {card.preprocessing.size} pixels, {views} sealed views, "
        f"identity {record.identity_digest()}; {taps}."
    )


def _tap_text(tap: TapCard) -> str:
    shape = ", ".join(str(side) for side in tap.row)
    prefix = f" and {tap.prefix_tokens} prefix tokens" if tap.prefix_tokens else ""
    return f"[{shape}]{prefix} as {tap.encoding}, relative RMSE {tap.certificate.relative_rmse:g}"


def _licences(card: StoreCard, teachers: dict[str, tuple[TeacherRecord, list[int]]]) -> Iterator[dict[str, str]]:
    for name, (record, _) in teachers.items():
        said = "as its source states it" if record.licence != "unknown" else "which its source does not state"
        yield _work(record.licence, f"Licence of the weights of teacher {name}, {said}.")
    yield _work("unknown", f"Licence of the {card.dataset.noun}: a store does not record it.")


def _work(name: str, description: str) -> dict[str, str]:
    return {"@type": "sc:CreativeWork", "name": name, "description": description}


def _file_objects(store: Store, keys: Iterable[str]) -> Iterator[dict[str, str]]:
    for key in keys:
        with _whole():
            found = stored_object(read_record(store.path / key))
            yield {
                "@type": "cr:FileObject",
                "@id": key,
                "name": key,
                "description": "Lists objects of the store, each with size and sha256.",
                "contentUrl": key,
                "contentSize": f"{found.size} B",
                "encodingFormat": "application/json",
                "sha256": found.sha256,
            }


def _file_sets(
    store: Store, views: list[int], teachers: dict[str, tuple[TeacherRecord, list[int]]]
) -> Iterator[dict[str, Any]]:
    ids = (
        "The samples, sorted by id: id i is the UTF-8 text of id_bytes from id_offsets[i] to id_offsets[i + 1], and label[i] the "
        "number of its class, -1 where it has none."
    )
    yield _file_set("samples", ids, [f"samples/{name}/**" for name in ("id_bytes", "id_offsets", "label")])
    if (store.path / PIXELS / _SEAL).is_file():
        yield _file_set("pixels", "The samples themselves, as the data set gave them.", [f"{PIXELS}/**"])
    if views:
        arrays = [f"views/{view}/{name}/**" for view in views for name in ("geometry", "source_digest")]
        yield _file_set(
            "views",
            "One row for each sample under each view: which sample, box and flip; sha256 of its source.",
            arrays,
        )
    for name, (record, sealed) in teachers.items():
        folder = f"teachers/{name}"
        for tap, card in sorted(record.taps.items()):
            arrays = [f"{folder}/views/{view}/{tap}/**" for view in sealed]
            constants = [f"{folder}/encodings/{tap}/**"] * bool(card.constants)
            yield _file_set(f"{folder}/{tap}", f"Tap {tap} of teacher {name}: {_tap_text(card)}.", arrays + constants)
        for other, what in _BESIDE_TAPS.items():
            if arrays := [key for view in sealed if (store.path / (key := f"{folder}/views/{view}/{other}")).is_dir()]:
                yield _file_set(f"{folder}/{other}", f"{what} {name}.", [f"{key}/**" for key in arrays])
        if record.weights:
            yield _file_set(
                f"{folder}/weights", "Frozen weights that derive targets from taps.", [f"{folder}/weights/**"]
            )


def _file_set(key: str, description: str, includes: list[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": f"{key}-arrays",
        "name": f"{key}-arrays",
        "description": description,
        "encodingFormat": ZARR,
        "includes": includes,
    }


def _record_sets(card: StoreCard) -> Iterator[dict[str, Any]]:
    """The one table that is not in an array; a record set of samples would need a source that Croissant can read."""
    if not card.dataset.classes:
        return
    yield {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": "Names of the classes that samples/label numbers.",
        "dataType": "sc:Enumeration",
        "key": {"@id": "classes/index"},
        "field": [_field("classes/index", "sc:Integer", "Number."), _field("classes/name", "sc:Text", "Name.")],
        "data": [{"classes/index": index, "classes/name": name} for index, name in enumerate(card.dataset.classes)],
    }


def _field(key: str, kind: str, description: str) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": key, "name": key.split("/")[1], "dataType": kind, "description": description}
