"""`dimefm export`: files that others load, proved on the run's sets and rows, with a card and a certificate."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from dimefm.cache import FeatureCache
from dimefm.pipeline.exporting import export as module
from dimefm.pipeline.exporting.export import ExportOptions, export
from dimefm.pipeline.stage_two.evaluate import evaluate
from dimefm.stages.export.export_job import Exported, emitted, largest_difference
from dimefm.stages.run_folder.load_student import load_student

from ...support.commands import refused, run_dimefm, tree
from ...support.exports import code_of, elsewhere


def by(run, out, form="open_clip", **options):
    return export(run, ExportOptions(form, out, **options))


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory):
    """Every format of the small student, and what `export` returned of each."""
    out = tmp_path_factory.mktemp("exports")
    forms = ("open_clip", "timm", "onnx", "torch")
    from dimefm.stages.export import latency

    latency.SECONDS, latency.BATCH_SIZES, before = 0.0, (1, 2), (latency.SECONDS, latency.BATCH_SIZES)
    found = {form: by(trained / "runs/small", out / form, form) for form in forms}
    latency.SECONDS, latency.BATCH_SIZES = before
    return out, found


def test_the_code_of_every_card_runs_elsewhere_and_gives_the_student(trained, exports):
    out, _ = exports
    student, _ = load_student(trained / "runs/small")
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    script = "import os\n"
    for form in ("open_clip", "timm", "onnx", "torch"):
        lines = code_of(out / form / "README.md")
        assert len(lines) == 3
        script += f"os.chdir({str(out / form)!r})\n" + "\n".join(lines) + "\n"
        emits = {
            "open_clip": "model.eval().encode_image(inputs['images'])",
            "timm": "model.eval()(inputs['images'])",
            "onnx": "torch.from_numpy(session.run(None, {'images': inputs['images'].numpy()})[0])",
            "torch": "image(inputs['images'])",
        }
        script += f"outputs[{form!r}] = {emits[form]}\n"
    found = elsewhere(script, out / "open_clip", {"images": images})
    for form, embeddings in found.items():
        assert largest_difference(embeddings.numpy(), emitted(student, images)) < 1e-4, form


def test_scores_of_the_files_are_those_of_evaluate_with_every_agreement(trained, exports):
    _, found = exports
    run = trained / "runs/small"
    scores = evaluate([run])[str(run)]["dev"]
    for form, document in found.items():
        mine = document["sets"]["dev"]
        for key in ("n", "student_top1", "student_top1_interval", "teacher_top1", "agreement", "retention"):
            assert mine[key] == scores[key], (form, key)
        assert mine["unexported"]["agreement"] == 1.0 and mine["unexported"]["top1"] == scores["student_top1"]
        rest = document["unlabelled"]
        assert rest["rows"] == 20 and rest["cosine_with_student"] == pytest.approx(1, abs=1e-5)
        assert rest["cosine_with_teacher"] == pytest.approx(rest["student_cosine_with_teacher"], abs=1e-5)
        assert document["latency"]["batches"]["exported"]["1"]["median_ms"] > 0
    assert found["open_clip"]["text"]["proof"]["cosine_with_teacher"] == pytest.approx(1, abs=1e-3)


def test_the_card_is_the_hubs_and_names_teacher_data_scores_licence_and_cache(trained, exports):
    out, found = exports
    cache = FeatureCache.open(trained / "cache")
    card = ModelCard.load(out / "open_clip" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "open_clip" and data["pipeline_tag"] == "zero-shot-image-classification"
    (result,) = card.data.eval_results
    assert result.dataset_name == "dev" and result.metric_value == round(
        found["open_clip"]["sets"]["dev"]["student_top1"], 4
    )
    for text in (
        cache.identity,
        "tiny.json",
        "30 unlabelled images and 22 sentences",
        "resnet10t",
        "Unknown: it follows",
    ):
        assert text in card.text, text
    assert ModelCard.load(out / "timm" / "README.md").data.to_dict()["library_name"] == "timm"
    document = json.loads((out / "onnx" / "export.json").read_text())
    assert document["files"].keys() >= {"image.onnx", "text.onnx", "preprocessing.json"}
    assert document["bytes"] == sum(document["files"].values())


def test_a_student_with_its_own_text_tower_takes_it_along(trained, tmp_path):
    run = trained / "runs/talks"
    found = by(run, tmp_path / "out", certify=True)
    assert found["text"]["owner"] == "student"
    scores = evaluate([run])[str(run)]["dev"]
    assert found["sets"]["dev"]["student_top1"] == scores["student_top1"]
    assert found["sets"]["dev"]["student_top1_teacher_text"] == scores["student_top1_teacher_text"]
    assert "student sentences -> teacher images" in found["certificate"]["comparisons"]
    state = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert state["text.token_embedding.weight"].shape[1] == 16


def test_int8_is_calibrated_on_rows_that_nothing_is_scored_on_and_proved(trained, tmp_path, capsys):
    done = run_dimefm(
        capsys,
        "export",
        trained / "runs/small",
        "--format",
        "onnx",
        "--precision",
        "int8",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert done.code == 0, done.lines
    found = json.loads(done.out)
    int8 = found["int8"]
    assert int8["calibrated_on"] == "kept pixels (jpeg-64)" and int8["calibration_images"] == 10
    assert found["unlabelled"]["rows"] == 20  # of the 30
    assert found["unlabelled"]["cosine_with_student"] > 0.9
    assert set(found["latency"]["batches"]) == {"exported", "the same graph in float32"}
    assert found["files"]["image.onnx"] < 0.4 * 4 * found["run"]["parameters"]
    assert "int8 instructions" in (tmp_path / "out" / "README.md").read_text()


def test_a_certificate_is_written_and_shown_and_is_one_for_the_teacher_itself(world, tmp_path, monkeypatch):
    run = world / "runs/small"
    found = by(run, tmp_path / "out", "timm", certify=True)
    document = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert document == found["certificate"]
    assert "## Drop-in certificate" in (tmp_path / "out" / "README.md").read_text()
    names = ["student images -> teacher sentences", "student images -> teacher images"]
    names += ["teacher sentences -> student images", "teacher images -> student images"]
    assert sorted(document["comparisons"]) == sorted(names)
    for of in document["comparisons"].values():
        assert of["teacher_fp16"]["1"]["kept"] > 0.8

    class Looked(torch.nn.Module):
        """The teacher: its cached embeddings of the rows that ask, in their order."""

        def forward(self, images):
            return torch.from_numpy(answers.pop(0))

    cache = FeatureCache.open(world / "cache")
    options = ExportOptions("timm", tmp_path / "again", certify=True)
    teacher = {}

    def of_the_teacher(job, exported, cache, rows):
        numbers, _ = rows.proof
        answers.append(cache.images.embeddings[numbers].astype(np.float32))
        teacher.update(certify(job, Exported(Looked(), None, []), cache, rows))
        return teacher

    answers: list = []
    certify = module.certify_run
    monkeypatch.setattr(module, "certify_run", of_the_teacher)
    export(run, options)
    assert cache.images.usable.size == 30
    for of in teacher["comparisons"].values():
        assert all(value["kept"] == 1.0 for value in of["student"].values())


def test_without_pictures_the_export_stands_and_says_what_was_not_measured(world, tmp_path, capsys, monkeypatch):
    opened = dataclasses.replace(FeatureCache.open(world / "cache"), pixels=None)
    monkeypatch.setattr(FeatureCache, "open", lambda folder: opened)
    shutil.rmtree(world / "dev")
    shutil.rmtree(world / "images")
    run = world / "runs/small"
    done = run_dimefm(capsys, "export", run, "--format", "timm", "--out", tmp_path / "out")
    assert done.code == 0, done.lines
    assert "dev: not measured" in done.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not measured" in card
    line = refused(capsys, "export", run, "--format", "onnx", "--precision", "int8", "--out", tmp_path / "q")
    assert "no kept pixels, and the training images are" in line
    assert not (tmp_path / "q").exists()


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(trained, tmp_path, capsys):
    run, out = trained / "runs/own", tmp_path / "out"
    before = tree(trained / "runs")
    line = refused(capsys, "export", run, "--format", "open_clip", "--out", out)
    assert "own_students_x:plain" in line and "--format onnx or torch" in line
    line = refused(capsys, "export", trained / "runs/vit", "--format", "open_clip", "--out", out)
    assert "for 224 px alone" in line
    line = refused(capsys, "export", trained / "runs/small", "--format", "timm", "--precision", "int8", "--out", out)
    assert "take --format onnx" in line
    line = refused(capsys, "export", trained / "images", "--format", "timm", "--out", out)
    assert "run.json" in line
    line = refused(capsys, "export", run, "--format", "torch", "--out", trained / "dev")
    assert "no export of dimefm" in line
    assert not list(tmp_path.iterdir()) and tree(trained / "runs") == before


def test_a_students_own_function_and_other_weights_go_to_torch(trained, tmp_path):
    found = by(trained / "runs/own", tmp_path / "out", "torch", weights="last", license="mit")
    assert found["run"]["checkpoint"] == "last" and found["license"] == "mit"
    assert "mit, as the person" in (tmp_path / "out" / "README.md").read_text()
    program = torch.export.load(tmp_path / "out" / "image.pt2").module()
    student, _ = load_student(trained / "runs/own")
    images = torch.randn(5, 3, 24, 24)
    assert largest_difference(program(images).detach().numpy(), emitted(student, images)) < 1e-4


def test_a_folder_is_pushed_when_it_is_whole(trained, tmp_path, monkeypatch):
    seen = []

    def push(folder, repo):
        seen.append((repo, sorted(path.name for path in folder.iterdir())))
        return "https://hub/commit/1"

    monkeypatch.setattr(module, "push_to_hub", push)
    found = by(trained / "runs/small", tmp_path / "out", "timm", push="me/small")
    names = ["README.md", "config.json", "export.json", "model.safetensors"]
    assert seen == [("me/small", names)] and found["pushed"] == "https://hub/commit/1"
