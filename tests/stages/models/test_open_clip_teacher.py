"""Teachers: found, refused, loaded, and embedding as open_clip itself does."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file

from dimefm.cache import InputError
from dimefm.stages.images.decode import ImageError
from dimefm.stages.models import teacher_source
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.open_clip_teacher import MAX_ASPECT, OpenClipTeacher
from dimefm.stages.models.teacher_identity import configured_identity
from dimefm.stages.settings.models import TeacherSettings

from ...support.teachers import EMBED_DIM, IMAGE_SIZE, make_teacher

CPU = torch.device("cpu")


def load(model: str | Path, pretrained: str | Path | None = None, **keys: Any) -> OpenClipTeacher:
    settings = TeacherSettings(model=str(model), pretrained=None if pretrained is None else str(pretrained), **keys)
    return load_teacher(settings, CPU)


def refusal(model: str | Path, pretrained: str | Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load(model, pretrained)
    text = str(caught.value)
    assert "\n" not in text
    return text


def wrap(config: Path, path: Path, **preprocess: Any) -> Path:
    """Write a model config as the document of open_clip's folders, with preprocessing."""
    path.write_text(json.dumps({"model_cfg": json.loads(config.read_text()), "preprocess_cfg": preprocess}))
    return path


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def teacher(tiny_teacher: tuple[Path, Path]) -> OpenClipTeacher:
    return load(*tiny_teacher)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)
    monkeypatch.setattr(teacher_source, "download_pretrained_from_hf", refuse)


@pytest.mark.parametrize("size", [(40, 40), (50, 37), (33, 90), (8, 8), (1, 1), (32, 32)])
def test_preprocessing_is_open_clips_own_bit_for_bit(teacher: OpenClipTeacher, size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = image_transform_v2(PreprocessCfg(**teacher.model.visual.preprocess_cfg), is_train=False)(image)
    assert torch.equal(teacher.preprocess(image), expected)


def test_embeddings_are_open_clips_own_before_normalisation(
    teacher: OpenClipTeacher, tiny_teacher: tuple[Path, Path]
) -> None:
    config, weights = tiny_teacher
    # Attention takes another path, with other last bits, where weights ask for gradients.
    reference = open_clip.CLIP(**json.loads(config.read_text())).eval().requires_grad_(False)
    reference.load_state_dict(load_file(weights))
    images = torch.stack([teacher.preprocess(noise(40, 40, seed)) for seed in range(3)])
    sentences = ["a cat", "a dog", ""]
    tokens = open_clip.SimpleTokenizer(context_length=16)(sentences)
    with torch.inference_mode():
        assert torch.equal(teacher.encode_images(images), reference.encode_image(images))
        assert torch.equal(teacher.encode_sentences(sentences), reference.encode_text(tokens))
    assert teacher.encode_images(images).shape == (3, EMBED_DIM)
    assert teacher.logit_scale == pytest.approx(1 / 0.07)
    assert (teacher.image_size, teacher.tokenize([""]).shape) == ((IMAGE_SIZE, IMAGE_SIZE), (1, 16))


def test_of_a_sliver_the_middle_is_seen_without_resizing_all_of_it(teacher: OpenClipTeacher) -> None:
    # 1 x 10,000 px would become 32 x 320,000 px before the crop. White only in the middle: the crop is white.
    image = Image.new("RGB", (1, 10_000))
    image.paste((255, 255, 255), (0, 4_900, 1, 5_100))
    assert teacher.crop(image).min() == 255
    assert teacher.crop(image.transpose(Image.Transpose.ROTATE_90)).min() == 255


def test_an_image_that_would_lose_its_width_is_an_image_error(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    config, weights = tiny_teacher
    longest = load(wrap(config, tmp_path / "wrapped.json", resize_mode="longest"), weights)
    with pytest.raises(ImageError, match="too narrow to resize"):
        longest.crop(Image.new("RGB", (1, MAX_ASPECT + 1)))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("timm", [False, True], ids=["vit", "timm"])
def test_half_precision_agrees_with_full_and_keeps_the_logit_scale(tmp_path: Path, precision: str, timm: bool) -> None:
    files = make_teacher(tmp_path, timm=timm)
    full, half = load(*files), load(*files, precision=precision)
    images, sentences = torch.stack([full.preprocess(noise(40, 40, seed)) for seed in range(2)]), ["a cat", "a dog"]
    for a, b in (
        (full.encode_images(images), half.encode_images(images)),
        (full.encode_sentences(sentences), half.encode_sentences(sentences)),
    ):
        assert b.dtype == torch.float32
        assert torch.cosine_similarity(a, b).min() > 0.999
        assert not torch.equal(a, b)
    assert half.logit_scale == full.logit_scale


def test_a_long_word_costs_no_quadratic_time_and_changes_no_token(teacher: OpenClipTeacher) -> None:
    word = "abcdefghijklmnopqrstuvwxyz0123456789" * 20_000  # about a minute if all of it were encoded
    assert teacher.tokenize([word]).shape == (1, 16)
    sentence = "a photo of a cat. " * 50
    assert torch.equal(teacher.tokenize([sentence]), open_clip.SimpleTokenizer(context_length=16)([sentence]))


def test_odd_sentences_have_tokens(teacher: OpenClipTeacher) -> None:
    odd = ["", "\x00", "a\x00b", "\u200b", "<end_of_text>", "&#xD800;", "\U0010ffff", "\u202eabc", "\n"]
    assert torch.isfinite(teacher.encode_sentences(odd)).all()


def test_identity_is_json_and_repeats(teacher: OpenClipTeacher, tiny_teacher: tuple[Path, Path]) -> None:
    identity = teacher.identity()
    assert json.loads(json.dumps(identity)) == identity == load(*tiny_teacher).identity()
    assert configured_identity(teacher.settings).items() <= identity.items()
    assert identity["model"] == "tiny.json"
    assert identity["preprocess"]["size"] == [IMAGE_SIZE, IMAGE_SIZE]
    assert {"torch", "torchvision", "open_clip_torch", "timm", "pillow", "numpy"} <= identity["libraries"].keys()


@pytest.mark.parametrize(
    ("key", "change"),
    [("weights", {"seed": 1}), ("architecture", {"quick_gelu": True}), ("architecture", {"custom_text": True})],
)
def test_another_teacher_has_another_identity(
    teacher: OpenClipTeacher, tmp_path: Path, key: str, change: dict[str, Any]
) -> None:
    assert load(*make_teacher(tmp_path, **change)).identity()[key] != teacher.identity()[key]


def test_a_config_named_like_a_built_in_does_not_replace_it(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    before = open_clip.get_model_config("ViT-B-32")
    config = tmp_path / "ViT-B-32.json"
    config.write_bytes(tiny_teacher[0].read_bytes())
    assert load(config, tiny_teacher[1]).embed_dim == EMBED_DIM
    assert open_clip.get_model_config("ViT-B-32") == before


def test_two_configs_of_one_name_stay_apart(tmp_path: Path) -> None:
    gelu, quick = make_teacher(tmp_path / "a"), make_teacher(tmp_path / "b", quick_gelu=True)
    image = noise(40, 40)
    teachers = (load(*files) for files in (gelu, quick, gelu))
    outputs = [teacher.encode_images(teacher.preprocess(image)[None]) for teacher in teachers]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_preprocessing_comes_from_an_open_clip_config(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    config, weights = tiny_teacher
    said = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash", "size": 99}
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights.read_bytes())
    by_file = load(wrap(config, tmp_path / "open_clip_config.json", **said), weights)
    by_folder = load(f"local-dir:{tmp_path}")
    for teacher in (by_file, by_folder):
        assert teacher.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
        assert (teacher.preprocess_cfg["resize_mode"], teacher.image_size) == ("squash", (IMAGE_SIZE, IMAGE_SIZE))
        white = teacher.preprocess(Image.new("RGB", (50, 40), (255, 255, 255)))
        assert torch.equal(white, torch.full((3, IMAGE_SIZE, IMAGE_SIZE), 2.0))  # (1 - 0.5) / 0.25
    assert by_file.identity()["weights"] == by_folder.identity()["weights"]


@pytest.mark.parametrize("is_checkpoint", [False, True], ids=["state dict", "training checkpoint"])
def test_pt_files_of_plain_weights_load(
    teacher: OpenClipTeacher, tiny_teacher: tuple[Path, Path], tmp_path: Path, is_checkpoint: bool
) -> None:
    state = load_file(tiny_teacher[1])
    checkpoint = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(checkpoint if is_checkpoint else state, tmp_path / "w.pt")
    assert load(tiny_teacher[0], tmp_path / "w.pt").identity()["weights"] == teacher.identity()["weights"]


def test_loading_leaves_no_trace_in_logging(tiny_teacher: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.root.manager.disable)
    load(*tiny_teacher)
    assert (list(root.handlers), root.level, logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


def test_an_unknown_architecture_is_refused_with_its_neighbours() -> None:
    assert "did you mean ViT-B-32" in refusal("ViT-B-23", "openai")


def test_a_teacher_without_weights_is_refused(tiny_teacher: tuple[Path, Path]) -> None:
    assert "random weights" in refusal("ViT-B-32")
    assert "random weights" in refusal(tiny_teacher[0])


def test_an_unknown_tag_is_refused_with_its_neighbours(tiny_teacher: tuple[Path, Path]) -> None:
    assert "did you mean openai?" in refusal("ViT-B-32-quickgelu", "opennai")
    assert "its tags are: laion2b_s13b_b90k" in refusal("coca_ViT-B-32", "zzz")
    assert "tags belong to open_clip's own architectures" in refusal(tiny_teacher[0], "openai")


@pytest.mark.parametrize(
    ("model", "tag", "right"),
    [
        ("ViT-L-14", "openai", "ViT-L-14-quickgelu"),
        ("ViT-B-16", "dfn2b", "ViT-B-16-quickgelu"),
        ("ViT-L-14-quickgelu", "laion2b_s32b_b82k", "ViT-L-14"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_weights_of_another_activation_are_refused_before_any_download(model: str, tag: str, right: str) -> None:
    text = refusal(model, tag)
    assert "another activation" in text and text.endswith(f"use model = '{right}'")


@pytest.mark.parametrize(
    ("model", "pretrained", "place"),
    [
        ("ViT-L-14-quickgelu", "openai", "timm/vit_large_patch14_clip_224.openai/"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", "laion/"),  # its config is QuickGELU, its tag does not say so
        ("hf-hub:laion/CLIP-ViT-B-32", None, "laion/CLIP-ViT-B-32"),
        ("ViT-B-32", "hf-hub:laion/CLIP-ViT-B-32", "laion/CLIP-ViT-B-32"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_without_a_network_a_download_says_what_to_fetch_by_hand(
    model: str, pretrained: str | None, place: str
) -> None:
    text = refusal(model, pretrained)
    assert f"cannot be downloaded from {place}" in text
    assert "ConnectionError: no route to the hub" in text and "teacher.pretrained" in text


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tiny_teacher: tuple[Path, Path], tmp_path: Path) -> Path:
    """A hub with one repository: the tiny teacher, with preprocessing of its own."""
    config, weights = tiny_teacher
    document = wrap(config, tmp_path / "open_clip_config.json", resize_mode="squash")
    files = {"open_clip_config.json": document, None: weights}

    def fetch(repository: str, filename: str | None = None) -> str:
        assert repository == "org/tiny"
        return str(files[filename])

    monkeypatch.setattr(teacher_source, "download_pretrained_from_hf", fetch)
    return config


def test_weights_from_the_hub_bring_their_preprocessing(hub: Path, teacher: OpenClipTeacher) -> None:
    loaded = load(hub, "hf-hub:org/tiny")
    assert loaded.preprocess_cfg["resize_mode"] == "squash"
    assert loaded.identity()["weights"] == teacher.identity()["weights"]


def test_hub_weights_of_another_activation_are_refused(hub: Path, tmp_path: Path) -> None:
    quick, _ = make_teacher(tmp_path / "quick", quick_gelu=True)
    assert refusal(quick, "hf-hub:org/tiny").endswith("use model = 'hf-hub:org/tiny'")


def test_a_model_that_brings_weights_takes_no_others(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    assert "brings its own weights" in refusal(f"local-dir:{tmp_path}", tiny_teacher[1])


def test_a_folder_without_one_clear_weights_file_is_refused(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    assert "no such file" in refusal(f"local-dir:{tmp_path}")
    wrap(tiny_teacher[0], tmp_path / "open_clip_config.json")
    assert "weights found: none" in refusal(f"local-dir:{tmp_path}")
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(tiny_teacher[1].read_bytes())
    assert "weights found: a.safetensors, b.safetensors" in refusal(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "no embed_dim and no vision_cfg and no text_cfg in it; wanted an open_clip model config"),
        ('{"embed_dim": 8, "vision_cfg": {"mlp_ratio": NaN}, "text_cfg": {}}', "NaN is no JSON number"),
        ('{"embed_dim": 8}', "no vision_cfg and no text_cfg in it"),
        (
            '{"embed_dim": 8, "vision_cfg": {"layerz": 2}, "text_cfg": {}}',
            "open_clip cannot build this model: TypeError",
        ),
        ('{"embed_dim": 8, "vision_cfg": {"timm_model_name": "resnet10q"}, "text_cfg": {}}', "open_clip cannot build"),
    ],
)
def test_a_wrong_model_config_is_refused(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    assert words in refusal(path, tiny_teacher[1])


def test_weights_whose_logit_scale_is_no_number_are_refused(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    state = load_file(tiny_teacher[1])
    state["logit_scale"] = torch.tensor(float("nan"))
    save_file(state, tmp_path / "bad.safetensors")
    assert "their logit scale is nan" in refusal(tiny_teacher[0], tmp_path / "bad.safetensors")


def test_a_missing_file_is_refused(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    assert "no such file" in refusal(tiny_teacher[0], tmp_path / "none.safetensors")
    assert "no such file" in refusal(tmp_path / "none.json", tiny_teacher[1])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("data", [b"", b"garbage!" * 100], ids=["empty", "garbage"])
def test_a_damaged_weights_file_is_refused(
    tiny_teacher: tuple[Path, Path], tmp_path: Path, suffix: str, data: bytes
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    assert "weights" in refusal(tiny_teacher[0], path)


def test_a_cut_weights_file_is_refused(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(load_file(tiny_teacher[1]), tmp_path / "whole.pt")
    for path in (tiny_teacher[1], tmp_path / "whole.pt"):
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(path.read_bytes()[:-5000])
        assert "damaged or no checkpoint" in refusal(tiny_teacher[0], cut)


def test_checkpoints_that_hold_no_weights_are_refused(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    for content in ({}, torch.zeros(3), [1, 2]):
        torch.save(content, tmp_path / "w.pt")
        assert "damaged or no checkpoint" in refusal(tiny_teacher[0], tmp_path / "w.pt")


def test_pickled_objects_and_torchscript_are_refused_with_the_safetensors_route(
    tiny_teacher: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "objects.pt")
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name in ("objects.pt", "script.pt"):
        assert "safetensors.torch.save_file" in refusal(tiny_teacher[0], tmp_path / name)


def test_weights_of_another_architecture_are_refused(tiny_teacher: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads(tiny_teacher[0].read_text())
    config["vision_cfg"]["width"] = 96
    (tmp_path / "wide.json").write_text(json.dumps(config))
    assert "not the weights of this architecture" in refusal(tmp_path / "wide.json", tiny_teacher[1])


def test_a_tower_that_does_not_run_in_a_precision_is_refused_at_once(
    tiny_teacher: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 must have the same dtype, but got Float and BFloat16")

    monkeypatch.setattr(open_clip.CLIP, "encode_text", fail)
    assert "does not run in fp32 on cpu (RuntimeError: mat1 and mat2" in refusal(*tiny_teacher)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path: Path, tiny_teacher: tuple[Path, Path]) -> None:
    config = json.loads(tiny_teacher[0].read_text())
    config["text_cfg"]["vocab_size"] = 1000
    (tmp_path / "small.json").write_text(json.dumps(config))
    state = load_file(tiny_teacher[1])
    state["token_embedding.weight"] = state["token_embedding.weight"][:1000].contiguous()
    save_file(state, tmp_path / "small.safetensors")
    assert "vocab_size = 1000" in refusal(tmp_path / "small.json", tmp_path / "small.safetensors")
