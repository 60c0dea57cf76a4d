"""Warm start: what fits is taken, what does not is said, and weights of another model are refused in one line."""

import json
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.factory import load_checkpoint as load_into_clip
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from dimefm.cache import InputError
from dimefm.cache.disk.durable import write_json
from dimefm.pipeline.config.load import load_config
from dimefm.stages.models.image_student import build_student
from dimefm.stages.models.open_clip_towers import build_image_tower
from dimefm.stages.run_folder.checkpoint import save_checkpoint
from dimefm.stages.train.warm_start import warm_start

from ...pipeline.config.test_load import MINIMAL, refused, write
from ...support.small_cache import STUDENTS
from ...support.teachers import EMBED_DIM, IMAGE_SIZE, make_teacher, teacher_config

WIDTH = 20
RESNET = "timm:resnet10t"
VIT = "timm:vit_tiny_patch16_224"


def start(spec, init, image_size=IMAGE_SIZE, embed_dim=WIDTH):
    student = build_student(spec, embed_dim, image_size)
    return student, warm_start(student, spec, str(init), image_size)


def refusal(spec, init, **keys):
    with pytest.raises(InputError) as caught:
        start(spec, init, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_run(folder, spec, image_size, embed_dim=WIDTH, averaged=False):
    """A run's folder as a warm start reads it; returns the module whose weights should be taken."""
    student, other = (build_student(spec, embed_dim, image_size) for _ in range(2))
    write_json(folder / "run.json", {"name": "a", "student": {"a": {"model": spec}}, "embed_dim": embed_dim})
    state = {"step": 1400, "model": other.state_dict()} if averaged else {"step": 1400, "model": student.state_dict()}
    save_checkpoint(folder / "checkpoint.pt", state | ({"ema": student.state_dict()} if averaged else {}))
    return student


def save(path, module_or_state):
    state = module_or_state if isinstance(module_or_state, dict) else module_or_state.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def tiny_json(tmp_path):
    """An open_clip model config on disk, and CLIP weights for it."""
    return make_teacher(tmp_path / "teacher")


@pytest.mark.parametrize("averaged", [False, True])
def test_another_runs_student_is_taken_whole_its_averaged_weights_first(tmp_path, averaged):
    source = make_run(tmp_path, RESNET, 64, averaged=averaged)
    student, warm = start(RESNET, f"run:{tmp_path}", 64)
    assert same(student, source)
    assert warm.fresh == [] and warm.num_taken == len(source.state_dict())
    words = "averaged weights at" if averaged else "at"
    assert warm.line == f"{warm.num_taken} of {warm.num_taken} tensors from {tmp_path}, {words} step 1,400"


def test_a_run_for_another_width_gives_all_but_the_projection(tmp_path):
    source = make_run(tmp_path, RESNET, 64, embed_dim=WIDTH + 4)
    student, warm = start(RESNET, f"run:{tmp_path}", 64)
    assert warm.fresh == ["trunk.fc.weight", "trunk.fc.bias"]
    assert warm.line.endswith("; fresh: trunk.fc.weight, trunk.fc.bias")
    images = torch.randn(2, 3, 64, 64)
    features = [model.eval().trunk.forward_features(images) for model in (student, source)]
    assert torch.equal(*features)


def test_positions_of_a_run_at_another_size_are_interpolated_as_timm_does(tmp_path):
    source = make_run(tmp_path, VIT, 64)
    student, warm = start(VIT, f"run:{tmp_path}", 96)
    wanted = resample_abs_pos_embed(source.trunk.pos_embed, (6, 6), num_prefix_tokens=1)
    torch.testing.assert_close(student.trunk.pos_embed, wanted)
    assert warm.fresh == [] and "; adapted: trunk.pos_embed" in warm.line


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_timms_own_weights_from_a_file_give_all_but_the_classifier(tmp_path, suffix):
    source = timm.create_model("resnet10t")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}}, path)
    else:
        save(path, source)
    student, warm = start(RESNET, path)
    assert warm.fresh == ["trunk.fc.weight", "trunk.fc.bias"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(student.eval().trunk.forward_features(images), source.eval().forward_features(images))


def test_the_digest_is_of_the_tensors_and_not_of_the_file(tmp_path):
    source = timm.create_model("resnet10t").state_dict()
    save(tmp_path / "a.safetensors", source)
    torch.save(dict(reversed(source.items())), tmp_path / "b.pt")
    source["fc.bias"] += 1
    save(tmp_path / "c.safetensors", source)
    first, again, other = (
        start(RESNET, tmp_path / name)[1].digest for name in ("a.safetensors", "b.pt", "c.safetensors")
    )
    assert first == again != other


def test_averaged_weights_of_a_timm_training_checkpoint_come_first(tmp_path):
    source, averaged = (timm.create_model("resnet10t").state_dict() for _ in range(2))
    torch.save({"epoch": 3, "state_dict": source, "state_dict_ema": averaged}, tmp_path / "last.pth")
    student, _ = start(RESNET, tmp_path / "last.pth")
    assert torch.equal(student.trunk.conv1[0].weight, averaged["conv1.0.weight"])


def test_half_precision_weights_are_widened(tmp_path):
    source = timm.create_model("resnet10t").half()
    student, _ = start(RESNET, save(tmp_path / "half.safetensors", source))
    weight = student.trunk.conv1[0].weight
    assert weight.dtype == torch.float32 and torch.equal(weight, source.conv1[0].weight.float())


def test_a_clip_checkpoint_gives_its_image_tower_at_its_own_size(tiny_json):
    config, weights = tiny_json
    student, warm = start(f"open_clip:{config}", weights, embed_dim=EMBED_DIM)
    clip = open_clip.CLIP(**teacher_config())
    load_into_clip(clip, str(weights))
    assert same(student, clip.visual) and warm.fresh == []


def test_a_clip_checkpoint_at_another_size_is_what_open_clip_makes_of_it(tiny_json):
    config, weights = tiny_json
    student, warm = start(f"open_clip:{config}", weights, image_size=56, embed_dim=EMBED_DIM)
    document = teacher_config()
    clip = open_clip.CLIP(**{**document, "vision_cfg": {**document["vision_cfg"], "image_size": 56}})
    load_into_clip(clip, str(weights))
    assert same(student, clip.visual)
    assert "; adapted: positional_embedding" in warm.line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_positions_at_another_size_are_resized_as_in_float32(tmp_path, dtype):
    config = tmp_path / "vit.json"
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    config.write_text(json.dumps({"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {}}))
    tower = build_student(f"open_clip:{config}", WIDTH, 32).to(dtype)
    half, full = (
        start(f"open_clip:{config}", save(tmp_path / f"{name}.safetensors", module), image_size=48)
        for name, module in (("half", tower), ("full", tower.float()))
    )
    assert half[1].fresh == [] and half[1].line.endswith("; adapted: positional_embedding")
    assert half[0].positional_embedding.shape == (1 + 6 * 6, 32)
    assert same(half[0], full[0])


def test_positions_that_are_no_square_grid_stay_fresh(tmp_path, tiny_json):
    config, _ = tiny_json
    state = build_student(f"open_clip:{config}", WIDTH, IMAGE_SIZE).state_dict()
    state["positional_embedding"] = torch.zeros(1 + 7, state["positional_embedding"].shape[1])
    _, warm = start(f"open_clip:{config}", save(tmp_path / "odd.safetensors", state))
    assert warm.fresh == ["positional_embedding"]


def test_a_clip_checkpoint_for_another_width_gives_all_but_the_projection(tiny_json):
    config, weights = tiny_json
    _, warm = start(f"open_clip:{config}", weights)
    assert warm.fresh == ["proj"] and warm.line.endswith(f" tensors from {weights}; fresh: proj")


def test_a_bare_tower_is_taken_as_it_is(tmp_path, tiny_json):
    config, _ = tiny_json
    source = build_student(f"open_clip:{config}", WIDTH, IMAGE_SIZE)
    student, _ = start(f"open_clip:{config}", save(tmp_path / "bare.safetensors", source))
    assert same(student, source)


def test_positions_of_a_clip_resnet_are_interpolated_too(tmp_path):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
    config = tmp_path / "resnet.json"
    config.write_text(json.dumps({"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {}}))
    source = build_student(f"open_clip:{config}", WIDTH, 64)
    with torch.no_grad():  # the mean's own position, then a grid that is the same everywhere and stays so
        source.attnpool.positional_embedding[0] = 7.0
        source.attnpool.positional_embedding[1:] = torch.arange(256.0)
    state = {f"visual.{name}": value for name, value in source.state_dict().items()}
    student, warm = start(f"open_clip:{config}", save(tmp_path / "clip.safetensors", state), image_size=96)
    assert student.attnpool.positional_embedding.shape == (10, 256) and warm.fresh == []
    assert (student.attnpool.positional_embedding[0] == 7.0).all()
    torch.testing.assert_close(student.attnpool.positional_embedding[1:], torch.arange(256.0).expand(9, 256))


def test_a_timm_student_takes_the_trunk_of_a_clip_checkpoint(tmp_path):
    _, weights = make_teacher(tmp_path, timm=True)
    _, warm = start(RESNET, weights)
    assert warm.fresh == ["trunk.fc.weight", "trunk.fc.bias"]


def test_a_timm_vit_takes_the_tower_of_openai_as_timm_converts_it(tmp_path):
    # timm's vit_tiny has a norm before its blocks where it is made for CLIP; only then do all tensors have a place.
    spec = "timm:vit_base_patch32_clip_224"
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    tower = build_image_tower({"embed_dim": 512, "vision_cfg": vision})
    state = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    student, warm = start(spec, save(tmp_path / "clip.safetensors", state), image_size=64, embed_dim=512)
    assert torch.equal(student.trunk.norm_pre.weight, tower.ln_pre.weight)
    assert torch.equal(student.trunk.blocks[3].mlp.fc1.weight, tower.transformer.resblocks[3].mlp.c_fc.weight)
    assert set(warm.fresh) <= {"trunk.head.weight", "trunk.head.bias"}


def test_a_function_of_the_users_takes_what_fits(tmp_path, monkeypatch):
    (tmp_path / "own_students.py").write_text(STUDENTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = build_student("own_students:with_dropout", WIDTH, 8)
    student, warm = start("own_students:with_dropout", save(tmp_path / "own.safetensors", source), image_size=8)
    sys.modules.pop("own_students", None)
    assert same(student, source) and warm.fresh == []


@pytest.fixture
def tagged(monkeypatch, tiny_json, tmp_path):
    """open_clip knows an architecture `dimefm-test` with the tag `mine`."""
    config, weights = tiny_json
    (tmp_path / "dimefm-test.json").write_text(config.read_text())
    open_clip.add_model_config(tmp_path / "dimefm-test.json")
    cfg = {"url": "https://example.org/mine.pt"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: cfg if tag == "mine" else {})
    return weights


def test_an_open_clip_tag_gives_the_image_tower(monkeypatch, tagged):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tagged))
    student, warm = start("open_clip:dimefm-test", "open_clip:mine", embed_dim=EMBED_DIM)
    clip = open_clip.CLIP(**teacher_config())
    load_into_clip(clip, str(tagged))
    assert same(student, clip.visual) and "from dimefm-test, mine" in warm.line


@pytest.mark.parametrize("init", ["open_clip:mine", "file"])
def test_weights_that_know_other_images_say_so(monkeypatch, tagged, tmp_path, init):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tagged))
    cfg = {"url": "https://example.org/mine.pt", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: cfg)
    if init == "file":
        (tmp_path / "own").mkdir()
        init = str(tmp_path / "own/w.safetensors")
        Path(init).write_bytes(tagged.read_bytes())
        document = {"preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
        (tmp_path / "own/open_clip_config.json").write_text(json.dumps(document))
    _, warm = start("open_clip:dimefm-test", init, embed_dim=EMBED_DIM)
    assert warm.remark({"mean": [0.01, 0, 0], "std": [1, 1, 1]}) == ""
    said = warm.remark({"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]})
    assert "the teacher's mean [0.5, 0.5, 0.5]" in said and "std" not in said


def test_an_open_clip_tag_that_is_not_there_or_cannot_be_fetched_is_refused(monkeypatch, tagged):
    def no_network(cfg):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    assert "init = 'open_clip:yours': dimefm-test has no such tag" in refusal(
        "open_clip:dimefm-test", "open_clip:yours"
    )
    text = refusal("open_clip:dimefm-test", "open_clip:mine")
    assert "cannot be downloaded from https://example.org/mine.pt" in text and text.endswith("file as init")


def test_an_open_clip_tag_of_another_activation_is_refused_before_any_download(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: pytest.fail("downloaded"))
    with pytest.raises(InputError, match="use model = 'open_clip:ViT-B-32-quickgelu'"):
        warm_start(torch.nn.Identity(), "open_clip:ViT-B-32", "open_clip:openai", 224)


@pytest.mark.parametrize(("spec", "adapted"), [(RESNET, False), (VIT, True)])
def test_timms_weights_come_through_its_own_loading_code(monkeypatch, spec, adapted):
    source = timm.create_model(spec.removeprefix("timm:"))
    wanted = f"timm/{spec.removeprefix('timm:')}.{source.pretrained_cfg['tag']}"

    def from_hub(repository, *_, **__):
        assert repository == wanted or repository[0] == wanted
        return dict(source.state_dict())

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", from_hub)
    torch.manual_seed(5)
    student = build_student(spec, WIDTH, 64)
    before = torch.get_rng_state()
    warm = warm_start(student, spec, "pretrained", 64)
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws what it draws without a warm start
    assert len(warm.fresh) == 2 and ("adapted: trunk.pos_embed" in warm.line) == adapted
    has, wanted = student.trunk.state_dict(), source.state_dict()
    as_they_are = [name for name in wanted if name != "pos_embed" and f"trunk.{name}" not in warm.fresh]
    assert all(torch.equal(has[name], wanted[name]) for name in as_they_are)


def test_timms_weights_without_a_network_or_without_any_are_refused(monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", no_network)
    assert "ConnectionError: no route to the hub); fetch them" in refusal(RESNET, "pretrained")
    with pytest.raises(InputError, match="has no weights for botnet50ts_256; remove the key"):
        warm_start(torch.nn.Identity(), "timm:botnet50ts_256", "pretrained", 64)


def test_weights_of_another_model_are_refused(tmp_path):
    other = save(tmp_path / "other.safetensors", timm.create_model("mobilenetv3_small_100"))
    assert f"{other}: 0% of the parameters of {RESNET} at 32 px" in refusal(RESNET, other)
    half = timm.create_model("resnet10t").state_dict()
    half = {name: value for name, value in half.items() if not name.startswith("layer4")}
    share = sum(value.numel() for name, value in half.items() if name[:2] != "fc")
    assert share < 0.5 * sum(p.numel() for p in timm.create_model("resnet10t").parameters())
    text = refusal(RESNET, save(tmp_path / "half.safetensors", half))
    assert "% of the parameters of timm:resnet10t" in text and "wanted at least 50%" in text


def test_a_wide_projection_does_not_count_against_weights_that_fit(tmp_path):
    # 1,024 x 1,280 numbers of the projection are more than the rest of this student.
    path = save(tmp_path / "small.safetensors", timm.create_model("mobilenetv3_small_050"))
    student, warm = start("timm:mobilenetv3_small_050", path, embed_dim=1280)
    fresh = sum(student.state_dict()[name].numel() for name in warm.fresh)
    assert fresh > 0.5 * sum(parameter.numel() for parameter in student.parameters())


def test_a_refused_warm_start_leaves_the_student_as_it_was(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    state["conv1.0.weight"][0, 0, 0, 0] = float("nan")
    path = save(tmp_path / "bad.safetensors", state)
    torch.manual_seed(3)
    untouched = build_student(RESNET, WIDTH, IMAGE_SIZE)
    torch.manual_seed(3)
    student = build_student(RESNET, WIDTH, IMAGE_SIZE)
    with pytest.raises(InputError, match=r"trunk\.conv1\.0\.weight not finite"):
        warm_start(student, RESNET, str(path), IMAGE_SIZE)
    assert same(student, untouched)


class Payload:
    """Would make a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_no_plain_weights_are_refused_and_run_nothing(tmp_path):
    torch.save({"model": Payload(tmp_path / "ran")}, tmp_path / "code.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name in ("code.pt", "script.pt"):
        text = refusal(RESNET, tmp_path / name)
        assert text.startswith(f"{tmp_path / name}: not plain weights") and "safetensors.torch.save_file" in text
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 5)
    assert "damaged or no checkpoint" in refusal(RESNET, tmp_path / "cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "no named tensors in it" in refusal(RESNET, tmp_path / "list.pt")
    assert "cannot be read: No such file" in refusal(RESNET, tmp_path / "none.pt")


def test_folders_that_are_no_run_or_have_no_checkpoint_are_refused(tmp_path):
    assert "run.json: no such file" in refusal(RESNET, f"run:{tmp_path}")
    make_run(tmp_path, RESNET, 64)
    (tmp_path / "checkpoint.pt").unlink()
    assert "checkpoint.pt: missing; train the student first" in refusal(RESNET, f"run:{tmp_path}")


def test_paths_of_init_start_at_the_configs_own_folder(tmp_path):
    def init(model, value):
        text = f'{MINIMAL}[student.a]\nmodel = "{model}"\ninit = "{value}"\n'
        return load_config(write(tmp_path, text)).student["a"].init

    assert init(RESNET, "run:runs/b") == f"run:{tmp_path / 'runs/b'}"
    assert init(RESNET, "weights/r10.safetensors") == str(tmp_path / "weights/r10.safetensors")
    assert init(RESNET, "pretrained") == "pretrained"
    assert init("open_clip:ViT-B-32", "open_clip:laion2b_s34b_b79k") == "open_clip:laion2b_s34b_b79k"
    assert load_config(write(tmp_path, f'{MINIMAL}[student.a]\nmodel = "{RESNET}"\n')).student["a"].init is None


@pytest.mark.parametrize(
    ("model", "init", "says"),
    [
        ("open_clip:ViT-B-32", "pretrained", "student.a: init = 'pretrained' is for timm: models"),
        (RESNET, "open_clip:openai", "student.a: init = 'open_clip:openai': tags belong to open_clip's own"),
        ("open_clip:tower.json", "open_clip:openai", "student.a: init = 'open_clip:openai': tags belong"),
        (RESNET, "openai", "student.a: init = 'openai': wanted run:FOLDER, pretrained, open_clip:TAG or a file"),
        (RESNET, "weights.npz", "student.a: init = 'weights.npz': wanted run:FOLDER"),
        (RESNET, "", "student.a: init = '': wanted run:FOLDER"),
    ],
)
def test_what_init_cannot_be_is_refused_before_anything_loads(tmp_path, model, init, says):
    assert says in refused(tmp_path, f'{MINIMAL}[student.a]\nmodel = "{model}"\ninit = "{init}"\n')
