"""plan.json and manifest.json as types: `documents/` were written by earlier versions of this project."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from dimefm.cache import CacheError
from dimefm.cache.disk.layout import IMAGES
from dimefm.cache.version.schema import FileEntry, Manifest, PairStore, Plan

DOCUMENTS = Path(__file__).parent / "documents"


def read(name):
    path = DOCUMENTS / f"{name}.json"
    return (Plan if name.startswith("plan") else Manifest).read(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCUMENTS.iterdir()))
def test_a_document_that_is_read_and_written_again_has_the_same_bytes(name):
    assert read(name).to_bytes() == (DOCUMENTS / f"{name}.json").read_bytes()


def test_a_plan_says_what_the_first_version_wrote():
    plan = read("plan_first")
    assert (plan.format, plan.shard_rows, plan.teacher.embed_dim, plan.inputs.images.rows) == (1, 4, 32, 30)
    assert plan.inputs.sentences.sources[0].name == "captions.txt" and plan.inputs.sentences.prompts is None
    assert (plan.rows_of, plan.pixels, plan.views, plan.grown) == (None, None, None, [])


def test_a_plan_of_two_appends_and_one_of_shared_rows_with_crops():
    first, second = read("plan_grown").grown
    assert first.rows[IMAGES] < second.rows[IMAGES] and first.plan != second.plan and second.libraries["torch"]
    plan = read("plan_views")
    assert plan.rows_of == "../cache" and plan.views.count == 1
    assert plan.views.crops["flip"] is False and plan.views.decoder["pillow"]


def test_a_manifest_of_the_first_version_has_what_came_later_as_defaults():
    manifest = read("manifest_first")
    assert (manifest.version, manifest.plan_file, manifest.superseded, manifest.pixels) == (1, "plan.json", [], None)
    assert manifest.pairs.k == 3 and manifest.index["images"].rows == manifest.arrays[IMAGES].rows == 30
    assert manifest.files["rows/images.parquet"].bytes > 0


def test_a_manifest_of_a_repaired_cache_says_where_its_chunks_come_from():
    origins = read("manifest_repaired").origins
    assert {origin.by for of_array in origins.values() for origin in of_array.values()} == {"repair"}
    kept = read("manifest_pixels")
    assert kept.pixels.setting == "jpeg-24" and kept.origins[kept.pixels.folder]["5"].libraries["pillow"]


def test_keys_that_are_not_known_survive_wherever_they_stand():
    document = json.loads((DOCUMENTS / "manifest_first.json").read_bytes())
    document |= {"later": [1, {"x": None}], "pairs": document["pairs"] | {"later": 0.5}}
    document["files"]["plan.json"]["later"] = True
    manifest = Manifest.parse(Path("manifest.json"), json.dumps(document).encode())
    assert json.loads(manifest.to_bytes()) == document
    assert json.loads(manifest.replace(version=2).to_bytes()) == document | {"version": 2}


def test_an_absent_key_and_null_stay_what_they_are():
    absent, null = Manifest(arrays={}), Manifest(arrays={}, pairs=None)
    assert json.loads(absent.to_bytes()) == {"format": 1, "arrays": {}}
    assert json.loads(null.to_bytes()) == {"format": 1, "arrays": {}, "pairs": None}


def test_a_changed_copy_leaves_the_rest_as_it_was():
    manifest = read("manifest_repaired")
    changed = manifest.replace(pairs=PairStore(store="pairs-2.zarr", k=1), files={"a": FileEntry(bytes=1, digest="0")})
    assert changed.pairs.store == "pairs-2.zarr" and manifest.pairs.store != "pairs-2.zarr"
    assert changed.replace(pairs=manifest.pairs, files=manifest.files).to_bytes() == manifest.to_bytes()
    with pytest.raises(ValidationError):
        manifest.version = 3


def test_a_document_without_what_every_version_wrote_is_refused_in_one_line():
    document = json.loads((DOCUMENTS / "plan_first.json").read_bytes())
    del document["inputs"]["images"]["rows"]
    with pytest.raises(CacheError, match=r"^c/plan.json: inputs.images.rows: Field required; restore") as error:
        Plan.parse(Path("c/plan.json"), json.dumps(document).encode())
    assert "\n" not in str(error.value)
