"""A teacher whose weights are a file prepares images as plain open_clip does for the tag that they are of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import pretrained as tags
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from PIL import Image

from dimefm.cache import InputError
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher
from dimefm.stages.models.preprocessing import preprocessing_of_file
from dimefm.stages.models.teacher_identity import configured_identity, recorded_identity
from dimefm.stages.settings.models import PreprocessSettings, TeacherSettings

NAME = "dimefm-tags"
SIZES = [(40, 40), (51, 37), (33, 90), (8, 9), (1, 1), (300, 17)]
KINDS = {
    "openai": tags._pcfg,
    "siglip": tags._slpcfg,
    "clipa": tags._apcfg,
    "mobileclip": tags._mccfg,
    "mobileclip2": tags._mc2cfg,
    "pe": tags._pecfg,
    "longest": lambda **more: tags._pcfg(resize_mode="longest", fill_color=7, **more),
}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def load(model: str | Path, weights: Path | None, **keys: Any) -> OpenClipTeacher:
    settings = TeacherSettings(model=str(model), pretrained=None if weights is None else str(weights), **keys)
    return load_teacher(settings, torch.device("cpu"))


def same_as_plain(teacher: OpenClipTeacher, model: str, tag: str | None = None) -> bool:
    """Image in, tensor out, by open_clip alone."""
    *_, plain = open_clip.create_model_and_transforms(model, pretrained=tag, load_weights=False)
    return all(torch.equal(teacher.preprocess(noise(*size)), plain(noise(*size))) for size in SIZES)


@pytest.fixture
def architecture(tiny_teacher: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes open_clip know the tiny teacher as an architecture with these tags; returns weights in a folder apart."""
    config, weights = tiny_teacher
    (tmp_path / f"{NAME}.json").write_text(config.read_text())
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    own = tmp_path / "weights" / "model.safetensors"
    own.parent.mkdir()
    own.write_bytes(weights.read_bytes())

    def known(**by_tag: str) -> Path:
        made = {tag: KINDS[kind](file=str(weights)) for tag, kind in by_tag.items()}
        monkeypatch.setitem(tags._PRETRAINED, NAME, made)
        return own

    return known


def put_config(folder: Path, config: dict[str, Any], **preprocess: Any) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_by_path_see_what_their_tag_sees(architecture: Any, kind: str) -> None:
    weights = architecture(one=kind, two=kind)
    teacher = load(NAME, weights)
    assert same_as_plain(teacher, NAME, "one")
    assert len(teacher.notes) == (kind != "openai")
    assert kind == "openai" or "prepared as the tags of its architecture say" in teacher.notes[0]


def test_every_tag_of_open_clip_is_met_or_refused_with_the_key() -> None:
    """By the table alone: of each architecture a file is prepared as by each of its tags, unless they disagree."""
    refused = set()
    for model, tag in open_clip.list_pretrained():
        config, cfg = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
        wanted = merge_preprocess_dict(PreprocessCfg(), cfg)
        try:
            found, _ = preprocessing_of_file(Path("nowhere/w.pt"), model, config, {})
        except InputError as error:
            assert "teacher.preprocess" in str(error) and "\n" not in str(error)
            given = {key: wanted[key] for key in ("mean", "std", "interpolation", "resize_mode")}
            given = PreprocessSettings(**given).given
            found = {**preprocessing_of_file(Path("nowhere/w.pt"), model, config, given)[0], **given}
            refused.add(model)
        found = merge_preprocess_dict(PreprocessCfg(), found)
        assert all(np.array_equal(found[key], wanted[key]) for key in wanted), (model, tag)
    assert {"ViT-L-14", "ViT-H-14"} <= refused and len(refused) < 10
    assert "MobileCLIP2-S0" not in refused


def test_where_tags_disagree_the_message_is_what_to_set(architecture: Any) -> None:
    weights = architecture(first="openai", second="siglip", third="siglip")
    with pytest.raises(InputError, match=r"teacher\.preprocess: missing") as refused:
        load(NAME, weights)
    assert '{mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5], resize_mode = "squash"} (second, third)' in str(
        refused.value
    )
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    assert same_as_plain(load(NAME, weights, preprocess=half), NAME, "second")


def test_the_config_beside_the_weights_counts_more_than_tags(architecture: Any) -> None:
    weights, config = architecture(one="openai", two="siglip"), open_clip.get_model_config(NAME)
    put_config(weights.parent, config, mean=[0, 0, 0], std=[1, 1, 1], interpolation="bilinear")
    teacher = load(NAME, weights)
    assert teacher.preprocess_cfg["std"] == [1, 1, 1] and "open_clip_config.json" in teacher.notes[0]
    assert same_as_plain(teacher, f"local-dir:{weights.parent}")
    assert same_as_plain(load(f"local-dir:{weights.parent}", None), f"local-dir:{weights.parent}")


def test_a_config_of_another_model_in_the_same_folder_does_not_count(architecture: Any) -> None:
    weights, config = architecture(one="siglip"), open_clip.get_model_config(NAME)
    put_config(weights.parent, {**config, "embed_dim": 999}, mean=[0, 0, 0])
    assert same_as_plain(load(NAME, weights), NAME, "one")


def test_a_copy_of_an_architectures_config_has_its_tags(architecture: Any, tmp_path: Path) -> None:
    weights = architecture(one="mobileclip")
    copied = tmp_path / "copy.json"
    copied.write_text(json.dumps(open_clip.get_model_config(NAME)))
    assert same_as_plain(load(copied, weights), NAME, "one")
    copied.write_text(json.dumps({"model_cfg": open_clip.get_model_config(NAME), "preprocess_cfg": {"std": [1, 1, 1]}}))
    assert load(copied, weights).preprocess_cfg["mean"] == list(PreprocessCfg().mean)  # its own word counts


def test_what_is_set_counts_over_all_else_and_is_part_of_the_identity(architecture: Any) -> None:
    weights = architecture(one="siglip")
    plain, other = load(NAME, weights), load(NAME, weights, preprocess={"std": [1.0, 1.0, 1.0]})
    assert other.preprocess_cfg == {**plain.preprocess_cfg, "std": [1.0, 1.0, 1.0]}
    unset, wanted = configured_identity(plain.settings), configured_identity(other.settings)
    # A cache from before the key has what it says, or is refused, without loading a teacher.
    assert "preprocess" not in unset and recorded_identity(other.identity(), wanted) == wanted
    assert recorded_identity(plain.identity(), wanted) != wanted
    assert recorded_identity(other.identity(), unset) == unset


def test_preprocessing_that_does_not_exist_is_refused(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "odd.json"
    for preprocess in ({"resize_mode": "shrink"}, {"interpolation": "nearest"}, ["mean"]):
        document = {"model_cfg": json.loads(tiny_teacher[0].read_text()), "preprocess_cfg": preprocess}
        config.write_text(json.dumps(document))
        with pytest.raises(InputError, match="preprocess") as refused:
            load(config, tiny_teacher[1])
        assert "\n" not in str(refused.value)


def test_a_teacher_from_outside_takes_no_such_keys() -> None:
    for keys in ({"preprocess": {"mean": [0, 0, 0]}}, {"logit_scale": 20.0}):
        with pytest.raises(ValueError, match="mine:load sets its own: remove the key"):
            TeacherSettings(model="mine:load", **keys)
