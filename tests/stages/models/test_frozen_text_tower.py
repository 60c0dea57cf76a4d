"""The frozen text tower on disk speaks exactly as the teacher does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from dimefm.cache import CacheError, InputError
from dimefm.stages.models.frozen_text_tower import WEIGHTS_NAME, load_text_tower, save_text_tower
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher
from dimefm.stages.settings.models import TeacherSettings

from ...support.formula_teacher import FormulaTeacher
from ...support.teachers import make_teacher, teacher_config

CPU = torch.device("cpu")
SENTENCES = ["a photo of a cat.", "", "Zwölf \x00 金魚", "a long sentence " * 20]


def load(files: tuple[Path, Path], precision: Any = "fp32") -> OpenClipTeacher:
    return load_teacher(TeacherSettings(model=str(files[0]), pretrained=str(files[1]), precision=precision), CPU)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "kind", [{}, {"custom_text": True}, {"quick_gelu": True}, {"timm": True}], ids=["clip", "custom", "quick", "timm"]
)
def test_it_gives_the_teachers_embeddings_bit_for_bit(tmp_path: Path, precision: str, kind: dict[str, bool]) -> None:
    teacher = load(make_teacher(tmp_path / "teacher", **kind), precision)
    save_text_tower(teacher, tmp_path / "tower")
    tower = load_text_tower(tmp_path / "tower", CPU)
    assert np.array_equal(tower.encode_sentences(SENTENCES), teacher.encode_sentences(SENTENCES).numpy())
    assert load_file(tmp_path / "tower" / WEIGHTS_NAME)["logit_scale"].exp().item() == teacher.logit_scale
    written = json.loads((tmp_path / "tower/open_clip_config.json").read_text())
    assert written == {"model_cfg": teacher.model_cfg, "preprocess_cfg": teacher.preprocess_cfg}


def test_a_coca_teacher_gives_its_pooled_embedding(tmp_path: Path) -> None:
    config: Any = teacher_config()
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    config["multimodal_cfg"] = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CoCa(**config)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "coca.safetensors")
    (tmp_path / "coca.json").write_text(json.dumps(config | {"custom_text": True}))
    teacher = load((tmp_path / "coca.json", tmp_path / "coca.safetensors"))
    save_text_tower(teacher, tmp_path / "tower")
    tower = load_text_tower(tmp_path / "tower", CPU)
    assert np.array_equal(tower.encode_sentences(SENTENCES), teacher.encode_sentences(SENTENCES).numpy())


def test_equal_teachers_give_equal_bytes(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_text_tower(load(tiny_teacher), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_killed_writer_leaves_no_folder_and_the_next_one_starts_anew(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dimefm.stages.models.frozen_text_tower.write_json", die)  # the last file
        with pytest.raises(KeyboardInterrupt):
            save_text_tower(load(tiny_teacher), tmp_path / "tower")
    assert not (tmp_path / "tower").exists()
    (tmp_path / ".tower.new" / "leftover").touch()
    for _ in range(2):  # the second one replaces the first
        save_text_tower(load(tiny_teacher), tmp_path / "tower")
        assert contents(tmp_path / "tower").keys() == {"open_clip_config.json", WEIGHTS_NAME}
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_a_teacher_that_saves_no_text_tower_leaves_none_and_loading_says_so(tmp_path: Path) -> None:
    save_text_tower(FormulaTeacher(TeacherSettings(model="a:b"), CPU), tmp_path / "tower")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CacheError, match="no text tower in this cache"):
        load_text_tower(tmp_path / "tower", CPU)


def test_open_clip_finds_the_tokenizer_in_the_folder(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = load(tiny_teacher)
    save_text_tower(teacher, tmp_path / "tower")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'tower'}")
    assert torch.equal(tokenizer(SENTENCES), teacher.tokenize(SENTENCES))


def test_half_a_model_is_not_taken_for_a_whole_one(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    save_text_tower(load(tiny_teacher), tmp_path / "tower")
    model = f"local-dir:{tmp_path / 'tower'}"
    with pytest.raises(InputError, match="not the weights of this architecture"):
        load_teacher(TeacherSettings(model=model), CPU)
    with pytest.raises(RuntimeError, match="Missing key"):
        open_clip.create_model(model)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("open_clip_config.json", None),
        ("open_clip_config.json", b"{}"),
        ("open_clip_config.json", b"\xff"),
        (WEIGHTS_NAME, None),
        (WEIGHTS_NAME, b"garbage!"),
    ],
)
def test_a_missing_or_damaged_file_is_a_cache_error(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, name: str, data: bytes | None
) -> None:
    save_text_tower(load(tiny_teacher), tmp_path / "tower")
    (tmp_path / "tower" / name).unlink()
    if data is not None:
        (tmp_path / "tower" / name).write_bytes(data)
    with pytest.raises(CacheError, match="the text tower cannot be loaded") as caught:
        load_text_tower(tmp_path / "tower", CPU)
    assert "\n" not in str(caught.value)


def test_weights_of_another_tower_are_a_cache_error(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    save_text_tower(load(tiny_teacher), tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 2
    (tmp_path / "tower" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CacheError, match="the text tower cannot be loaded"):
        load_text_tower(tmp_path / "tower", CPU)
