"""Spare copies of manifest, plans, masks and row tables: verify reads them, the next change renews them."""

import numpy as np
import pytest

from dimefm.cache.audit.verify import verify_cache
from dimefm.cache.disk.durable import file_digest
from dimefm.cache.disk.layout import Layout
from dimefm.cache.reader.masks import add_mask
from dimefm.cache.version.manifest import file_entry, read_manifest, write_manifest
from dimefm.cache.version.spares import renew_spares

from ...support.small_cache import make_cache

TABLE = "rows/images.parquet"


@pytest.fixture
def layout(tmp_path):
    """A cache by hand whose manifest lists one table, so that one file has a spare copy beside the manifest."""
    layout = make_cache(tmp_path).layout
    files = {TABLE: file_entry(layout.image_rows)}
    write_manifest(layout, read_manifest(layout).replace(files=files))
    return layout


def copy_of(layout, name):
    return layout.spares / file_digest(layout.root / name)


def flip(path, place=5):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def spare_findings(layout):
    found = verify_cache(layout.root).findings
    return {finding.where: finding for finding in found if finding.where.startswith("log/spare/")}


def test_sound_copies_are_no_finding(layout):
    assert copy_of(layout, TABLE).read_bytes() == layout.image_rows.read_bytes()
    assert spare_findings(layout) == {}


@pytest.mark.parametrize("name", [TABLE, "manifest.json"])
def test_one_flipped_byte_of_a_copy_is_found_and_says_whose_copy_it_is(layout, name):
    copy = copy_of(layout, name)
    flip(copy)
    ((where, finding),) = spare_findings(layout).items()
    assert where == f"log/spare/{copy.name}" and finding.kind == "changed"
    assert finding.message.startswith(f"spare copy of {name}: ") and "dimefm cache repair" in finding.line()


def test_a_copy_that_was_cut_and_one_that_is_gone_are_found(layout):
    copy_of(layout, TABLE).write_bytes(b"PAR1")
    copy_of(layout, "manifest.json").unlink()
    assert {finding.kind for finding in spare_findings(layout).values()} == {"short", "missing"}


def test_a_cache_of_before_there_were_copies_is_sound_without_any(layout):
    for path in layout.spares.iterdir():
        path.unlink()
    layout.spares.rmdir()
    assert spare_findings(layout) == {}


def test_the_next_change_makes_a_damaged_copy_again(layout):
    copy = copy_of(layout, TABLE)
    flip(copy)
    add_mask(layout, "images", "all", np.ones(40, dtype=bool))
    assert copy.read_bytes() == layout.image_rows.read_bytes() and spare_findings(layout) == {}


def test_damage_of_the_original_does_not_replace_its_copy(layout):
    copy = copy_of(layout, TABLE)
    sound = copy.read_bytes()
    flip(layout.image_rows)
    add_mask(layout, "images", "all", np.ones(40, dtype=bool))
    assert copy.read_bytes() == sound


def test_where_both_are_damaged_the_copy_stays_as_it_is(layout):
    copy, name = copy_of(layout, TABLE), f"log/spare/{copy_of(layout, TABLE).name}"
    flip(copy)
    flip(layout.image_rows, place=9)
    damaged = copy.read_bytes()
    assert renew_spares(layout, read_manifest(layout).files, [name]) == {}
    assert copy.read_bytes() == damaged


def test_a_damaged_copy_of_an_earlier_version_is_removed(layout):
    earlier = copy_of(layout, "manifest.json")
    add_mask(layout, "images", "all", np.ones(40, dtype=bool))
    flip(earlier)
    (where,) = spare_findings(layout)
    assert "earlier version" in renew_spares(layout, read_manifest(layout).files, [where])[where]
    assert not earlier.exists() and Layout(layout.root).spares.exists()
