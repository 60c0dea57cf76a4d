"""Each format holds the student: loaded by its library elsewhere, it emits what the student emits."""

import dataclasses
import importlib.util
import json
import math

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dimefm.cache import InputError
from dimefm.stages.export.export_job import emitted, largest_difference, smallest_cosine
from dimefm.stages.export.exporters import EXPORTERS, exporter_for
from dimefm.stages.export.to_onnx import write_onnx
from dimefm.stages.export.to_open_clip import write_open_clip
from dimefm.stages.export.to_timm import write_timm
from dimefm.stages.export.to_torch import write_torch
from dimefm.stages.score.labelled_pictures import evaluation_steps

from ...support.exports import PREPROCESS, elsewhere, job_of, text_of
from ...support.small_cache import STUDENTS

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
SENTENCES = ["a photo of a cat.", "", "Zwölf Boxkämpfer", "a long sentence " * 20]


def vit_of(folder, name="vit.json", **config):
    """`open_clip:` spec of a tiny vision transformer."""
    path = folder / name
    vision = {**VIT, **config.pop("vision", {})}
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, **config}))
    return f"open_clip:{path}"


def pictures(count=3):
    noise = np.random.default_rng(0).integers(0, 256, (count, 40, 52, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def as_the_student_sees(job):
    crop, normalise = evaluation_steps(job.record["preprocess"], job.image_size)
    return normalise(torch.stack([torch.from_numpy(np.asarray(crop(i)).copy()).permute(2, 0, 1) for i in pictures()]))


READ_PICTURES = """
from PIL import Image
pictures = [Image.fromarray(pixels.numpy()) for pixels in inputs["pixels"]]
"""
PIXELS = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures()]))


def test_an_open_clip_folder_is_loaded_elsewhere_with_towers_preprocessing_tokenizer_scale_and_bias(tmp_path):
    text = dataclasses.replace(text_of(tmp_path), logit_bias=-7.25)
    job = job_of(tmp_path, "timm:resnet10t", text=text)
    write_open_clip(job)
    script = f"""{READ_PICTURES}
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
model.eval()
outputs["seen"] = torch.stack([preprocess(picture) for picture in pictures])
outputs["images"] = model.encode_image(outputs["seen"])
outputs["tokens"] = tokenizer({SENTENCES!r})
outputs["texts"] = model.encode_text(outputs["tokens"])
outputs["scale"], outputs["bias"] = model.logit_scale.exp(), model.logit_bias
"""
    found = elsewhere(script, job.folder, {"pixels": PIXELS})
    seen = as_the_student_sees(job)
    assert torch.equal(found["seen"], seen)
    assert largest_difference(found["images"].numpy(), emitted(job.student, seen)) < 1e-5
    assert torch.equal(found["tokens"], text.tokens(SENTENCES))
    assert largest_difference(found["texts"].numpy(), text.encoder.encode_sentences(SENTENCES)) < 1e-5
    assert float(found["scale"]) == pytest.approx(14.5) and float(found["bias"]) == -7.25


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_an_open_clip_student_has_its_own_activation_and_size_in_both_formats(tmp_path, quick_gelu):
    text = text_of(tmp_path, quick_gelu=quick_gelu)
    job = job_of(tmp_path, vit_of(tmp_path, quick_gelu=quick_gelu), text=text)
    exported = write_open_clip(job)
    images = as_the_student_sees(job)
    assert largest_difference(emitted(exported.image, images), emitted(job.student, images)) < 1e-5
    (tmp_path / "timm").mkdir()
    timm_job = dataclasses.replace(job, folder=tmp_path / "timm")
    bare = write_timm(timm_job)
    assert largest_difference(emitted(bare.image, images), emitted(job.student, images)) < 1e-5
    assert ("quickgelu" in bare.facts["timm"]["model"]) == quick_gelu


def test_towers_of_two_activations_are_refused_with_both_named(tmp_path):
    job = job_of(tmp_path, vit_of(tmp_path), text=text_of(tmp_path, quick_gelu=True))
    with pytest.raises(
        InputError, match=r"has GELU and the teacher's text tower QuickGELU.*take --format onnx or torch"
    ):
        write_open_clip(job)
    # timm's towers have an activation of their own: nothing stands in the way
    write_open_clip(job_of(tmp_path, "timm:resnet10t", text=text_of(tmp_path, quick_gelu=True)))


def test_a_text_tower_of_the_hub_and_a_missing_one_are_refused_with_another_format(tmp_path):
    text = text_of(tmp_path)
    config = {**text.model_cfg, "text_cfg": {**text.model_cfg["text_cfg"], "hf_model_name": "xlm-roberta-base"}}
    hub = dataclasses.replace(text, model_cfg=config)
    with pytest.raises(InputError, match=r"the hub's xlm-roberta-base.*take --format onnx or torch"):
        write_open_clip(job_of(tmp_path, "timm:resnet10t", text=hub))
    with pytest.raises(InputError, match=r"keeps no text tower.*--format timm"):
        write_open_clip(job_of(tmp_path, "timm:resnet10t"))


def test_a_timm_student_whose_weights_depend_on_the_size_goes_to_timm_and_not_to_open_clip(tmp_path):
    job = job_of(tmp_path, "timm:vit_tiny_patch16_224", text=text_of(tmp_path))
    with pytest.raises(InputError, match=r"for 224 px alone.*--format timm, onnx or torch.*image_size = 224"):
        write_open_clip(job)
    exported = write_timm(job)
    assert exported.facts["timm"] == {"model": "vit_tiny_patch16_224", "img_size": 32}
    assert exported.facts["check"]["image"]["largest_difference"] < 1e-5


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_a_timm_checkpoint_is_loaded_by_folder_and_by_file_with_its_preprocessing(tmp_path, resize_mode):
    job = job_of(tmp_path, "timm:levit_128s", resize_mode=resize_mode)
    exported = write_timm(job)
    (call,) = [note.split("`")[1] for note in exported.notes if "pretrained_cfg_overlay" in note]
    script = f"""{READ_PICTURES}
import timm
{chr(10).join(exported.usage[1:])}
outputs["seen"] = torch.stack([transform(picture) for picture in pictures])
outputs["folder"] = model.eval()(outputs["seen"])
model = {call}
outputs["file"] = model.eval()(outputs["seen"])
"""
    found = elsewhere(script, job.folder, {"pixels": PIXELS})
    seen = as_the_student_sees(job)
    assert torch.allclose(found["seen"], seen, atol=1e-6)
    wanted = emitted(job.student, found["seen"])
    assert largest_difference(found["folder"].numpy(), wanted) < 1e-5
    assert largest_difference(found["file"].numpy(), wanted) < 1e-5


def test_a_linear_projection_of_open_clips_becomes_the_classifier(tmp_path):
    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    path = tmp_path / "linear.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision}))
    assert write_timm(job_of(tmp_path, f"open_clip:{path}")).facts["check"]["image"]["largest_difference"] < 1e-5
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": {**vision, "timm_proj": "mlp"}}))
    with pytest.raises(InputError, match=r"--format timm.*take --format open_clip, onnx or torch"):
        write_timm(job_of(tmp_path, f"open_clip:{path}"))


def test_graphs_and_programs_run_elsewhere_with_batches_of_any_size(tmp_path):
    text = text_of(tmp_path)
    job = job_of(tmp_path, "timm:resnet10t", text=text)
    write_onnx(job)
    torch_job = dataclasses.replace(job, folder=tmp_path / "out" / "torch")
    torch_job.folder.mkdir()
    write_torch(torch_job)
    model = onnx.load(job.folder / "image.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "image_embeddings"]
    script = f"""
import onnxruntime
import open_clip
outputs["tokens"] = open_clip.get_tokenizer("local-dir:.")({SENTENCES!r})
for name, key, values in (("image", "images", inputs["images"]), ("text", "tokens", outputs["tokens"])):
    session = onnxruntime.InferenceSession(f"{{name}}.onnx")
    program = torch.export.load(f"torch/{{name}}.pt2").module()
    for size in (1, 2, 4):
        part = values[:size]
        outputs[f"onnx {{name}} {{size}}"] = torch.from_numpy(session.run(None, {{key: part.numpy()}})[0])
        outputs[f"torch {{name}} {{size}}"] = program(part)
"""
    images = job.example_images(4)
    found = elsewhere(script, job.folder, {"images": images})
    wanted = {"image": emitted(job.student, images), "text": text.encoder.encode_sentences(SENTENCES)}
    assert torch.equal(found["tokens"], text.tokens(SENTENCES))
    for kind in ("onnx", "torch"):
        for name, embeddings in wanted.items():
            for size in (1, 2, 4):
                there = found[f"{kind} {name} {size}"].numpy()
                assert there.shape == (size, 16)
                assert largest_difference(there, embeddings[:size]) < 1e-4, (kind, name, size)
    written = json.loads((job.folder / "preprocessing.json").read_text())
    assert written["images"]["mean"] == PREPROCESS["mean"] and written["images"]["size"] == [32, 32]
    assert written["tokens"]["context_length"] == 12 and written["logit_scale"] == 14.5


def test_an_architecture_that_dynamo_cannot_export_goes_by_the_older_exporter_and_the_card_says_so(
    tmp_path, monkeypatch
):
    whole = torch.onnx.export

    def without_dynamo(*arguments, dynamo, **options):
        if dynamo:
            raise RuntimeError("unsupported")
        return whole(*arguments, dynamo=False, **options)

    monkeypatch.setattr(torch.onnx, "export", without_dynamo)
    exported = write_onnx(job_of(tmp_path, "timm:resnet10t"))
    assert exported.facts["exporter"] == {"image": "torchscript"}
    assert any("older one" in note for note in exported.notes)


@pytest.mark.parametrize("write", [write_open_clip, write_timm, write_onnx, write_torch])
def test_half_precision_keeps_the_direction_and_halves_the_file(tmp_path, write):
    text = text_of(tmp_path)
    half = job_of(tmp_path, "timm:resnet10t", precision="fp16", text=text)
    exported = write(half)
    images = half.example_images(5)
    assert smallest_cosine(emitted(exported.image, images), emitted(half.student, images)) >= 0.9999
    names = {"image.onnx", "image.pt2", "model.safetensors", "open_clip_model.safetensors"}
    (path,) = [path for path in half.folder.iterdir() if path.name in names]
    parameters = sum(value.numel() for value in half.student.state_dict().values())
    if path.name.startswith("open_clip"):
        parameters += sum(value.numel() for value in text.encoder.tower.state_dict().values())
    assert path.stat().st_size < 2.3 * parameters + 300_000
    assert emitted(half.student, images).dtype == np.float32
    assert all(value.dtype == torch.float32 for value in half.student.parameters())  # the student itself stays whole


def test_norms_and_scalars_stay_in_float32_at_half_precision(tmp_path):
    job = job_of(tmp_path, "timm:resnet10t", precision="fp16", text=text_of(tmp_path))
    write_open_clip(job)
    state = load_file(job.folder / "open_clip_model.safetensors")
    assert state["logit_scale"].dtype == torch.float32 and float(state["logit_scale"]) == pytest.approx(math.log(14.5))
    assert state["visual.trunk.bn1.running_var"].dtype == torch.float32
    assert state["visual.trunk.fc.weight"].dtype == torch.float16


def test_students_of_the_users_own_go_to_onnx_and_torch(tmp_path, monkeypatch):
    (tmp_path / "own_students_e.py").write_text(STUDENTS)
    monkeypatch.syspath_prepend(tmp_path)
    job = job_of(tmp_path, "own_students_e:plain", image_size=24)
    images = job.example_images(3)
    for write in (write_onnx, write_torch):
        assert largest_difference(emitted(write(job).image, images), emitted(job.student, images)) < 1e-4
    for name in ("open_clip", "timm"):
        with pytest.raises(
            InputError, match=r"own_students_e:plain, a function of your own.*take --format onnx or torch"
        ):
            exporter_for(name, "fp32", "own_students_e:plain")


def test_a_missing_package_and_a_precision_that_a_format_has_not_are_one_line(monkeypatch):
    with pytest.raises(InputError, match=r"--format timm --precision int8: it has fp32 and fp16; take --format onnx"):
        exporter_for("timm", "int8", "timm:resnet10t")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(InputError, match=r"needs onnxscript; pip install 'dimefm\[export\]'"):
        exporter_for("onnx", "fp32", "timm:resnet10t")
    assert exporter_for("torch", "fp32", "timm:resnet10t") is EXPORTERS["torch"]
