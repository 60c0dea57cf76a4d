"""The steps of a repair: what is put back, what is computed again, and the version that comes of it."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ....cache.audit.findings import BYTES, Finding, Report, Runs, runs_of
from ....cache.audit.inventory import Piece, pieces
from ....cache.disk.arrays import declare_arrays
from ....cache.disk.layout import IMAGES, SENTENCES, Layout, table_of
from ....cache.disk.row_tables import LOST, RowTable, good_rows, read_own_failures, restate_rows, write_own_failures
from ....cache.errors import CacheError, DimefmError
from ....cache.version.journal import Journal
from ....cache.version.manifest import file_entry, read_manifest
from ....cache.version.plan_file import read_plan
from ....cache.version.spares import has_spare, put_back
from ....cache.version.versions import put_in_force
from ....stages.settings.cache import PairsSettings
from ...config.remembered import ConfigChoice, config_of
from ...progress import say
from ...stage_one.embed_shards import planned_specs, teacher_at_hand
from ...stage_one.finish import count_failures, files_of
from ...stage_one.pseudo_pairs import write_pairs
from ..live_teacher import image_folder, require_same_teacher
from .context import Hands, Outcome, Shards
from .files import move_away, refill, remake_retrieval, remake_tables, restore_text_tower, settle_journal
from .packs import mend_packs
from .shards import keep_waiting, mend_shards

SIDES = ("teacher.zarr/zarr.json", "teacher.zarr/images/", "teacher.zarr/sentences/", "rows/images", "rows/sentences")
"""What indexes and pairs are made of."""

Files = dict[str, dict[str, Any]]


class Mending:
    """One repair of one cache, by the writer that has its lock."""

    def __init__(self, layout: Layout, report: Report, outcome: Outcome) -> None:
        """Take what `verify` found; the manifest is in order by now."""
        manifest = read_manifest(layout)
        assert manifest is not None
        self._layout, self._mend, self._manifest = layout, layout.mend, manifest
        self._report, self._outcome = report, outcome
        unlisted = {finding.where for finding in report.findings if finding.kind == "pixels"}
        self._bad = {name for name in report.files if name in manifest["files"]} | unlisted
        self._bad_bytes = {finding.where for finding in report.findings if finding.kind in BYTES}

    def run(self, config_path: ConfigChoice | Path | None) -> None:
        """Mend what can be mended; the outcome says what was and what was not."""
        layout, outcome, manifest = self._layout, self._outcome, self._manifest
        for finding in self._report.findings:
            if finding.kind in ("extra", "leftover"):
                outcome.mended[finding.where] = move_away(layout, finding.where)
        for name in sorted(filter(has_spare, self._bad & self._bad_bytes)):
            if put_back(layout, name, manifest["files"][name]["digest"]):
                self._mended(name, "put back from its spare copy")
        if str(manifest.get("plan_file", "plan.json")) in self._bad:
            self._leave(self._bad, "the plan and its spare copy are lost; restore it from a backup")
            return
        plan = read_plan(layout)
        assert plan is not None
        whole = pieces(manifest, plan["shard_rows"])
        specs = planned_specs(plan)
        for piece in whole:
            if (
                piece.is_teachers
                and piece.name in self._bad & self._bad_bytes
                and refill(layout, piece, specs[piece.array])
            ):
                self._mended(piece.name, "only its padding, length or failed rows were damaged: the same bytes")
        keep_waiting(self._mend)
        with ExitStack() as stack:
            hands = self._hands(stack, plan, config_path)
            self._restore_documents(hands)
            shards = self._mend_shards(hands, whole)
            self._settle(hands, shards, whole)
        shutil.rmtree(self._mend.root, ignore_errors=True)
        after = read_manifest(layout)
        assert after is not None
        if settle_journal(layout, after, pieces(after, plan["shard_rows"]), hands.specs):
            self._mended("log/shards.jsonl", "agrees with the manifest again")
        self._leave(self._bad, hands.without or "could not be made again")
        outcome.lost = {array: runs_of(sorted(rows)) for array, rows in lost_rows(layout, after).items() if rows}

    def _mended(self, name: str, how: str) -> None:
        self._outcome.mended[name] = how
        self._bad.discard(name)

    def _leave(self, names: set[str], why: str) -> None:
        known = {finding.where for finding in self._outcome.left}
        self._outcome.left += [
            Finding(finding.kind, finding.where, finding.message, why, finding.array, finding.rows)
            for finding in self._report.findings
            if finding.where in names - known
        ]

    def _bad_in(self, *starts: str) -> set[str]:
        return {name for name in self._bad if name.startswith(starts)}

    def _hands(self, stack: ExitStack, plan: dict[str, Any], config_path: ConfigChoice | Path | None) -> Hands:
        """Config and teacher, as far as they are wanted and at hand."""
        tables = self._bad_in("rows/")
        lost = any(lost_rows(self._layout, self._manifest).values())
        chunks = {name for name in self._bad_in("teacher.zarr/") if not name.endswith("zarr.json")}
        wants_teacher = bool(chunks or self._bad_in("text_tower/")) or lost
        config = teacher = None
        without = ""
        if wants_teacher or tables or self._bad_in("pixels/"):
            try:
                config = config_of(self._layout, config_path)
                if wants_teacher:
                    loaded = stack.enter_context(teacher_at_hand(config))
                    require_same_teacher(self._layout.root, plan, loaded)
                    teacher = loaded
            except DimefmError as error:
                without = " ".join(str(error).split())
                say(f"without the teacher: {without}")
        return Hands(self._layout, self._mend, self._manifest, plan, planned_specs(plan), config, teacher, without)

    def _restore_documents(self, hands: Hands) -> None:
        """Row tables without a spare copy, zarr.json documents, the text tower."""
        tables = self._bad_in("rows/")
        if hands.config and tables:
            for name, how in remake_tables(
                hands.config, self._layout, self._mend, hands.plan, self._manifest, tables
            ).items():
                self._mended(name, how)
        documents = {name for name in self._bad_in("teacher.zarr/") if name.endswith("zarr.json")}
        if documents:
            declare_arrays(self._layout.teacher_zarr, hands.specs)
            self._written(documents, "written again")
        tower = self._bad_in("text_tower/")
        if tower and hands.teacher:
            restore_text_tower(self._layout, hands.teacher)
            self._written(tower, "saved again from the teacher")

    def _written(self, names: set[str], how: str) -> None:
        for name in sorted(names):
            if (self._layout.root / name).exists():
                same = file_entry(self._layout.root / name) == self._manifest["files"][name]
                self._mended(name, f"{how}: {'the same' if same else 'other'} bytes")

    def _mend_shards(self, hands: Hands, whole: list[Piece]) -> Shards:
        layout, unknown = self._layout, self._bad_in("rows/", "failed.parquet")
        rows: dict[str, Runs] = {}
        for finding in self._report.findings:
            if finding.kind == "rows":
                rows[finding.where] = rows.get(finding.where, ()) + finding.rows
        lost = {
            array: of_array
            for array, of_array in lost_rows(layout, self._manifest).items()
            if of_array and hands.teacher and hands.config and (array == SENTENCES or image_folder(hands.config, array))
        }
        bad: dict[Piece, Runs | None] = {}
        for piece in whole:
            if piece.content == "embeddings" and layout.name_of(table_of(layout, piece.array)) in unknown:
                continue
            given_up = (row for row in lost.get(piece.array, ()) if piece.first <= row < piece.first + piece.num_rows)
            if piece.is_teachers and piece.name in self._bad:
                bad[piece] = None if piece.name in self._bad_bytes else rows.get(piece.name)
            elif piece.content == "embeddings" and any(True for _ in given_up):
                bad[piece] = None
        found = mend_shards(hands, bad, lost) if bad else Shards()
        if layout.name_of(table_of(layout, IMAGES)) not in unknown:
            mend_packs(hands, whole, self._bad, found)
        for name in self._bad & set(found.same):
            self._mended(name, "computed again: the same bytes")
        for name, why in found.left.items():
            self._leave({name}, why)
        return found

    def _settle(self, hands: Hands, shards: Shards, whole: list[Piece]) -> None:
        """Bring into force what has other bytes than before, and the indexes and pairs that hang on it."""
        layout, mend, manifest = self._layout, self._mend, self._manifest
        changed_sides = {piece.array for piece, _, _ in shards.changed} & {IMAGES, SENTENCES}
        unsound = bool(self._bad_in(*SIDES, "failed.parquet") - {piece.name for piece, _, _ in shards.changed})
        if changed_sides and manifest["pairs"] and unsound:
            # Indexes and pairs of what is half mended would be wrong, and the old ones are wrong already.
            self._leave({piece.name for piece, _, _ in shards.changed}, "the rest of its side has to be mended first")
            return
        document = {**manifest, "version": manifest["version"] + 1, "files": dict(manifest["files"])}
        for name in self._outcome.mended:
            if name in manifest["files"] and name.startswith(("text_tower/", "teacher.zarr/")):
                document["files"][name] = file_entry(layout.root / name)
        tables = self._write_states(hands, shards)
        document["files"] |= tables
        if shards.changed:
            self._record(document, shards)
        if changed_sides and manifest["pairs"]:
            declare_arrays(mend.teacher_zarr, hands.specs)
            self._new_retrieval(document)
        else:
            self._settle_retrieval(document, whole, unsound)
        if shards.changed or tables:
            own = read_own_failures(mend.find(mend.own_failures))
            document["arrays"] = {
                array: count_failures(
                    RowTable(table_of(mend, array), hands.specs[array].shape[0]),
                    own.get(array, {}),
                    "rows_of" in hands.plan,
                )
                for array in manifest["arrays"]
            }
            if layout.next.root.exists():
                self._outcome.notes.append("next/: an append under way stood on the damaged version; it begins anew")
            put_in_force(mend, document)
        elif {**document, "version": 0} != {**manifest, "version": 0}:
            put_in_force(layout, document)

    def _record(self, document: dict[str, Any], shards: Shards) -> None:
        """Where shards with other bytes come from, in the manifest."""
        origins = {array: dict(of_array) for array, of_array in self._manifest.get("origins", {}).items()}
        for piece, record, origin in shards.changed:
            document["files"][piece.name] = {"bytes": piece.num_bytes, "digest": record.digest}
            origins.setdefault(piece.array, {})[str(piece.chunk)] = origin
            lost = sum(reason.startswith(LOST) for _, reason in record.failures)
            cosine = origin.get("cosine")
            how = f", cosine at least {cosine['least']:.6f} on {origin['compared']} sound rows" if cosine else ""
            self._mended(piece.name, f"{lost} rows marked as lost" if lost else f"computed again: other bytes{how}")
        document["origins"] = origins

    def _write_states(self, hands: Hands, shards: Shards) -> Files:
        """Entries of tables that wait in `mend/`, those with rows that have another state now among them."""
        layout, mend = self._layout, self._mend
        states = {array: of_array for array, of_array in shards.states.items() if of_array}
        if "rows_of" not in hands.plan:
            for array, of_array in states.items():
                name = layout.name_of(table_of(layout, array))
                restate_rows(table_of(mend, array), mend.root / name, of_array, int(hands.plan["shard_rows"]))
        elif states:  # another cache's tables are not for this one to write
            own = read_own_failures(layout.own_failures)
            for array, of_array in states.items():
                marked: dict[int, str | None] = {**own.get(array, {}), **of_array}
                own[array] = {row: reason for row, reason in marked.items() if reason is not None}
            write_own_failures(mend.own_failures, own)
        waiting = [mend.own_failures]
        if "rows_of" not in hands.plan:
            waiting += sorted((mend.root / "rows").rglob("*.parquet"))
        entries = {mend.name_of(path): file_entry(path) for path in waiting if path.exists()}
        return {name: entry for name, entry in entries.items() if entry != self._manifest["files"].get(name)}

    def _settle_retrieval(self, document: dict[str, Any], whole: list[Piece], unsound: bool) -> None:
        """Indexes and pairs where the embeddings are as they were: made again in place."""
        pairs = self._manifest["pairs"]
        if not pairs:
            return
        bad = {finding.where for finding in self._report.findings if finding.kind in ("pairs", "index")}
        bad |= self._bad_in(f"{pairs['store']}/", "index/")
        if bad and unsound:
            self._leave(bad, "the embeddings have to be mended first")
        elif bad:
            made = remake_retrieval(self._layout, self._manifest, bad, whole)
            document |= {"index": made["index"], "pairs": made["pairs"]}
            document["files"] |= made["files"]
            for name in sorted(bad):
                same = document["files"].get(name) == self._manifest["files"].get(name)
                self._mended(name, f"made again: {'the same' if same else 'other'} bytes")

    def _new_retrieval(self, document: dict[str, Any]) -> None:
        """Indexes and pairs of embeddings that have changed, under the names of the new version."""
        journal = Journal(self._mend)
        settings = PairsSettings.model_validate(self._manifest["pairs_settings"])
        retrieved = write_pairs(self._mend, settings, journal, document["version"])
        old = (f"{self._manifest['pairs']['store']}/", "index/")
        kept = {name: entry for name, entry in document["files"].items() if not name.startswith(old)}
        document |= {"index": retrieved["index"], "pairs": retrieved["pairs"]}
        document["files"] = kept | dict(files_of(self._mend, journal, [], [], retrieved))
        for name in self._bad_in(*old):
            self._mended(name, "made again for the new version")


def lost_rows(layout: Layout, manifest: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Rows that a repair of this cache gave up, and why; nothing for a table that cannot be read."""
    lost: dict[str, dict[int, str]] = {}
    with suppress(OSError, ValueError):
        lost = {array: dict(rows) for array, rows in read_own_failures(layout.own_failures).items()}
    for array, entry in manifest["arrays"].items() if not layout.shares_rows else ():
        with suppress(CacheError, OSError, ValueError):
            columns = RowTable(table_of(layout, array), entry["rows"]).columns("status", "reason")
            bad = np.flatnonzero(~good_rows(columns, shared=False))
            reasons = columns["reason"].take(pa.array(bad)).to_pylist()
            lost[array] = dict(zip(bad.tolist(), map(str, reasons), strict=True))
    return {array: {row: why for row, why in rows.items() if why.startswith(LOST)} for array, rows in lost.items()}
