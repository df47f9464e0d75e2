"""Shards and constants of a store, made again with the data set and the teachers; in which order everything is mended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from hdcache.durable import durable_move, durable_write, stored_object
from hdcache.errors import HdcacheError, StoreMismatch
from hdcache.extract.audit import live_teacher
from hdcache.extract.calibrate import damaged_constants, repair_constants
from hdcache.extract.damage import Damaged, teacher_of
from hdcache.extract.pipeline import Timing
from hdcache.extract.record_mending import EXTRACT_ADVICE, FROM_COPY, RECORD_ADVICE, RecordMender, make_room
from hdcache.extract.remaking import Again, Remade, SurveyedReader, geometry_again, kept_again, unread_again
from hdcache.extract.rows import order_of
from hdcache.index import held_taps
from hdcache.ledgers import RECEIPTS, Ledger
from hdcache.packed import DIGEST
from hdcache.progress import Progress
from hdcache.reader import TeacherReader
from hdcache.schema import Receipt, StoredObject
from hdcache.store import PIXELS
from hdcache.teachers import Teacher

OTHER_BYTES = "made again, but with other bytes: another machine, device, number of threads or version rounds otherwise; nothing was replaced"
OTHER_IMAGES = (
    "made again, but of other images: one of this shard changed since its view was recorded; restore it, name the original data "
    f"(--data DATA), or {FROM_COPY}"
)
_ENDS_ALL = (6, 75, 130)
"""Exit codes of what ends a repair: no space, a stop."""


class Mender(RecordMender):
    """Mends what a survey found. Every :class:`~hdcache.extract.damage.Damaged` is told what became of it."""

    def run(self) -> None:
        """All of it, in the order in which things build on each other."""
        open_of = self.found.open
        views = [key for key in self.found.receipts if key.startswith("views/")]
        rows = [key for key in self.found.receipts if teacher_of(key)]
        self._twins()
        self._try(self._samples, open_of("samples"))
        for one in open_of("receipt"):
            self._try(partial(self._receipt, one), [one])
        self._try(self._metadata, open_of("metadata"))
        for one in open_of("manifest"):
            if one.ledger != PIXELS and self.found.receipts.get(one.ledger):
                self._try(self._remade(one.ledger).open, [one])  # no seal says what its metadata should be
        for key in views:
            self._try(partial(self._geometry, key), [*open_of("shard", key), *self._untold(key)])
        self._try(self._kept, [*open_of("shard", PIXELS), *self._untold(PIXELS)])
        for name in dict.fromkeys(one.teacher for one in open_of("constants")):
            self._try(partial(self._constants, name), [one for one in open_of("constants") if one.teacher == name])
        for key in rows:
            self._try(partial(self._rows, key), [*open_of("shard", key), *open_of("receipt", key)])
        for key in (*views, PIXELS, *rows):
            damaged = [one for one in open_of("manifest") if one.ledger == key]
            self._try(partial(self._seal, key), damaged)
        for one in open_of():
            if one.kind == "index" or one.why_not:
                continue
            one.why_not = RECORD_ADVICE if one.kind == "record" else f"hdcache cannot make it again; {FROM_COPY}"
            if one.kind == "receipt":
                one.why_not = f"the seal of {one.ledger} is damaged too; {EXTRACT_ADVICE}"

    @staticmethod
    def _try(mend: Callable[[], None], damaged: Sequence[Damaged]) -> None:
        if not damaged:
            return
        try:
            mend()
        except (HdcacheError, OSError) as error:
            if getattr(error, "exit_code", 0) in _ENDS_ALL:
                raise
            for one in damaged:
                one.why_not = one.why_not or ("" if one.outcome else str(error.args[-1] if error.args else error))

    def _live(self, name: str) -> tuple[TeacherReader, Teacher]:
        reader = SurveyedReader(self.store, name)
        if held_taps(self.store, name) is not None:
            raise StoreMismatch(
                f"{self.store.path}: this copy has some taps of teacher {name} only, and a teacher runs for all; delete the damaged file and "
                f"run the same 'hdcache pull' again, or {FROM_COPY}"
            )
        if self._teacher is None or self._teacher.name != name:
            self._teacher = None  # one network is in memory at a time
            self._teacher = live_teacher(reader, self.sources.get(name), self.device)
        return reader, self._teacher

    def _geometry(self, key: str) -> None:
        remade, damaged = self._remade(key), self.found.open("shard", key)
        for shard in sorted({one.shard for one in damaged if one.shard is not None}):
            own = [one for one in damaged if one.shard == shard]
            receipt = self.found.receipt(key, shard)
            if receipt is None:
                for one in own:
                    one.why_not = (
                        f"nothing says what it was: the receipt and the seal of {key} are damaged too; {EXTRACT_ADVICE}"
                    )
                continue
            bad = {one.key.removeprefix(f"{key}/").partition("/")[0] for one in own}
            intact = {"geometry", "source_digest"} - bad
            rows = geometry_again(self.store, self._dataset(), remade, shard, receipt.failed, intact, self.threads)
            objects = remade.geometry_objects(shard, rows)
            # Boxes follow from the images: where these are the same, so are those.
            same = all(
                stored_object(data) == receipt.objects.get(name) for name, data in objects.items() if "digest" in name
            )
            self._take(key, receipt, own, objects, acceptable=same)
        size, count = self.store.card.rows_per_shard, self.store.card.dataset.count
        for one in self._untold(key):
            shard = one.shard or 0
            failed = unread_again(self.store, self._dataset(), remade, shard)
            whole = {"geometry", "source_digest"}
            rows = geometry_again(self.store, self._dataset(), remade, shard, failed, whole, self.threads)
            listed = {name: stored_object(data) for name, data in remade.geometry_objects(shard, rows).items()}
            span = (shard * size, min(count, (shard + 1) * size))
            self._tell(one, Receipt(shard=shard, rows=span, objects=listed, failed=failed))

    def _kept(self) -> None:
        damaged = self.found.open("shard", PIXELS)
        receipts = {one.shard: self.found.receipt(PIXELS, one.shard) for one in damaged if one.shard is not None}
        untrusted = {one.shard for one in damaged if one.key.startswith(f"{DIGEST}/") and one.shard is not None}
        ledger = Ledger(self.store.path, PIXELS)
        untold = {one.shard: one for one in self._untold(PIXELS)}

        def made(new: Receipt) -> None:
            if (lost := untold.get(new.shard)) is not None:
                self._tell(lost, new)
                for name in new.objects:
                    ledger.aside(name).unlink(missing_ok=True)
                return
            own = [one for one in damaged if one.shard == new.shard]
            apart = [one for one in own if new.objects.get(one.key.removeprefix(f"{PIXELS}/")) != one.expected]
            for one in apart:
                one.differs, one.why_not = True, OTHER_BYTES
            if apart and self.reseal:
                ledger.replace(new)
                self.found.receipts[PIXELS][new.shard] = new
                self._accepted.add(PIXELS)
            for one in own:
                if not apart:
                    make_room(self.store.path / one.key)
                    durable_move(ledger.aside(one.key.removeprefix(f"{PIXELS}/")), self.store.path / one.key)
                if not apart or self.reseal:
                    one.outcome, one.why_not = "copied again from the data set", ""
            for name in new.objects:
                ledger.aside(name).unlink(missing_ok=True)

        shards = {shard: receipt.failed for shard, receipt in sorted(receipts.items()) if receipt is not None}
        shards |= {shard: {} for shard in untold if shard is not None}
        kept_again(self.store, self._dataset(), shards, untrusted, made, self.threads)
        self._reseal(PIXELS)

    def _constants(self, name: str) -> None:
        reader, teacher = self._live(name)
        repair_constants(self.store, self._dataset(), teacher, reader.record, threads=self.threads)
        left = damaged_constants(self.store, reader.record)
        for one in self.found.open("constants"):
            if one.teacher == name and one.key.removeprefix(f"teachers/{name}/") not in left:
                one.outcome = "made again from the teacher"

    def _rows(self, key: str) -> None:
        name, view = teacher_of(key), int(key.rpartition("/")[2])
        # A receipt that is waited for tells how many values were clipped; others cannot be mended.
        waiting = [one for one in self.found.open("receipt", key) if not one.why_not]
        damaged = [*self.found.open("shard", key), *waiting]
        lost = {one.shard for one in self.found.open("shard", f"views/{view}")}
        lost |= {one.shard for one in self.found.open("receipt", f"views/{view}")}
        size, shards = self.store.card.rows_per_shard, list[int]()
        failed: dict[int, str] = {}
        untold = {one.shard: one for one in self._untold(key)}
        order = order_of(self.store.card.dataset.count, self.store.card.views.seed, view)
        for shard in sorted({one.shard for one in damaged if one.shard is not None}):
            receipt = self.found.receipt(key, shard)
            if shard in untold and shard not in lost:
                shards.append(shard)
                continue
            if shard in lost or receipt is None:
                for one in damaged:
                    if one.shard == shard:
                        one.why_not = one.why_not or f"views/{view} is damaged there too, and could not be mended"
                continue
            shards.append(shard)
            failed |= {int(order[row]): why for row, why in receipt.failed.items()}
        if not shards:
            return
        reader, teacher = self._live(name)
        encodings = [card.encoding for card in reader.record.taps.values()]
        again = Again(self.store, self._dataset(), teacher, threads=self.threads, failed=failed, encodings=encodings)
        count = sum(min(size, self.store.card.dataset.count - shard * size) for shard in shards)
        with Progress(f"extract {name} again", count, "rows", quiet=self.quiet) as bar:

            def made(shard: int, objects: dict[str, bytes], broken: Mapping[int, str], clipped: int) -> None:
                receipt = self.found.receipt(key, shard)
                own = [one for one in damaged if one.shard == shard]
                if receipt is None:
                    listed = {name: stored_object(data) for name, data in objects.items()}
                    span = (shard * size, min(self.store.card.dataset.count, (shard + 1) * size))
                    new = Receipt(shard=shard, rows=span, objects=listed, failed=dict(broken), saturated=clipped)
                    self._tell(untold[shard], new)
                    return
                if apart := sorted(broken.keys() - receipt.failed.keys()):
                    for one in own:
                        one.why_not = f"{broken[apart[0]]}; restore it, or name the original data: --data DATA"
                    return
                receipt = (
                    receipt if shard in self.found.receipts[key] else receipt.model_copy(update={"saturated": clipped})
                )
                for one in own:
                    if one.kind == "receipt":
                        self._record(one, receipt)
                self._take(key, receipt, [one for one in own if one.kind == "shard"], objects)

            def advance(rows: int, timing: Timing) -> None:
                bar.advance(rows)

            again.run(Remade(self.store, reader.record, view, made, reader.encoders), shards, advance)
        self._reseal(key)

    def _take(
        self,
        key: str,
        receipt: Receipt,
        damaged: Sequence[Damaged],
        objects: Mapping[str, bytes],
        *,
        acceptable: bool = True,
    ) -> None:
        """Replace the damaged objects of a shard by what was made again, where that is what it was."""
        ledger, taken = Ledger(self.store.path, key), {}
        for one in damaged:
            name = one.key.removeprefix(f"{key}/")
            if name not in objects or self._install(one, objects[name], "extracted again"):
                continue
            one.differs, one.why_not = acceptable, OTHER_BYTES if acceptable else OTHER_IMAGES
            if self.reseal and acceptable:
                taken[name] = durable_write(ledger.aside(name), objects[name])
                make_room(self.store.path / one.key)
                one.outcome, one.why_not = "extracted again, with other bytes", ""
        if taken:
            new = receipt.model_copy(update={"objects": dict(sorted((receipt.objects | taken).items()))})
            ledger.replace(new)
            self.found.receipts[key][receipt.shard] = new
            self._accepted.add(key)

    def _reseal(self, key: str) -> None:
        """Seal a ledger some of whose shards have other bytes now; the rest of its seal is as it was."""
        before = self.found.manifests.get(key)
        if key not in self._accepted or before is None:
            return
        ledger, receipts = Ledger(self.store.path, key), self.found.receipts[key].values()
        own = {f"{key}/{name}" for receipt in receipts for name in receipt.objects} | ledger.records(
            before.teacher
        ).keys()
        own |= {f"{key}/{RECEIPTS}/{receipt.shard}.json" for receipt in receipts}
        static: dict[str, StoredObject] = {name: entry for name, entry in before.objects.items() if name not in own}
        ledger.seal(
            receipts, static, teacher=before.teacher, identity=before.identity, view=before.view, rows=before.rows
        )
