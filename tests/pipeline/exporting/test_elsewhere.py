"""An export in a virtual environment without this project: the accuracy of `evaluate`, to the image, by every way in.

The environment borrows the libraries of this one by path, so only clip-benchmark and what it needs are installed.
"""

import json
import os
import subprocess
import sysconfig
import tarfile
import venv

import numpy as np
import pyarrow.parquet as pq
import pytest

from dimefm.pipeline.exporting.export import ExportOptions, export
from dimefm.pipeline.stage_two.evaluate import evaluate

SCRIPT = """
import json, sys, numpy, onnxruntime, open_clip, torch
from pathlib import Path
from PIL import Image
form, names, templates = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{form}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{form}")
images = torch.stack([preprocess(Image.open(path)) for path in sorted(Path("dev").rglob("*.png"))])
texts = [tokenizer([template.format(name) for template in templates]) for name in names]
with torch.no_grad():
    if len(sys.argv) > 4:
        image, text = (onnxruntime.InferenceSession(f"{sys.argv[4]}/{kind}.onnx") for kind in ("image", "text"))
        unit = lambda rows: rows / numpy.linalg.norm(rows, axis=-1, keepdims=True)
        embeddings = unit(image.run(None, {"images": images.numpy()})[0])
        head = numpy.stack([unit(unit(text.run(None, {"tokens": t.numpy()})[0]).mean(axis=0)) for t in texts])
    else:
        unit = lambda rows: torch.nn.functional.normalize(rows, dim=-1)
        embeddings = model.eval().encode_image(images, normalize=True).numpy()
        head = torch.stack([unit(model.encode_text(t, normalize=True).mean(dim=0)) for t in texts]).numpy()
numpy.save("logits.npy", embeddings @ head.T)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment that has the libraries of this one, clip-benchmark, and not this project."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=True)
    found = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    # A folder that is named in a .pth file is on the path, and its own .pth files, this project's, are not read.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    # It imports requests and does not say so, and makes numbers of arrays of one, which NumPy 2.4 refuses.
    wanted = ["clip-benchmark", "requests", "numpy<2.4"]
    subprocess.run([found, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return found


def run(python, folder, *words):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [python, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.acceptance
def test_accuracy_elsewhere_is_that_of_evaluate_by_open_clip_onnx_runtime_and_clip_benchmark(trained, tmp_path, python):
    run_dir = trained / "runs/small"
    scores = evaluate([run_dir])[str(run_dir)]["dev"]
    for form in ("open_clip", "onnx"):
        export(run_dir, ExportOptions(form, tmp_path / form))
    (tmp_path / "dev").symlink_to(trained / "dev")
    (tmp_path / "script.py").write_text(SCRIPT)
    assert run(python, tmp_path, "-c", "import importlib.util as u; print(u.find_spec('dimefm'))").strip() == "None"
    table = pq.read_table(run_dir / "predictions" / "dev.parquet")
    ids = sorted(set(table.column("class_id").to_pylist()))
    classes = json.loads((trained / "classes.json").read_text())
    names = [classes[name][0] for name in ids]
    templates = (trained / "templates.txt").read_text().split("\n")[:-1]
    predicted = np.array([ids.index(name) for name in table.column("student").to_pylist()])
    assert [f"{source}" for source in table.column("source").to_pylist()] == sorted(table.column("source").to_pylist())

    for tolerance, words in ((1e-5, []), (1e-4, ["onnx"])):
        run(python, tmp_path, "script.py", "open_clip", json.dumps(names), json.dumps(templates), *words)
        logits = np.load(tmp_path / "logits.npy")
        best = np.sort(logits, axis=1)
        sure = best[:, -1] - best[:, -2] > 10 * tolerance
        other = logits.argmax(axis=1) != predicted
        print(
            f"{words or 'open_clip'}: {other.sum()} of {len(other)} differ, {(other & sure).sum()} of them beyond doubt"
        )
        assert sure.any() and not (other & sure).any()

    wds = tmp_path / "wds" / "test"
    wds.mkdir(parents=True)
    (wds / "nshards.txt").write_text("1")
    (wds.parent / "classnames.txt").write_text("\n".join(names))
    (wds.parent / "zeroshot_classification_templates.txt").write_text(
        "\n".join(t.replace("{}", "{c}") for t in templates)
    )
    with tarfile.open(wds / "0.tar", "w") as tar:
        for i, (source, class_id) in enumerate(
            zip(*(table.column(name).to_pylist() for name in ("source", "class_id")))
        ):
            tar.add(trained / "dev" / source, f"{i:04d}.png")
            label = tmp_path / "label"
            label.write_text(str(ids.index(class_id)))
            tar.add(label, f"{i:04d}.cls")
    words = [
        "eval",
        "--dataset",
        "wds/dev",
        "--dataset_root",
        wds.parent,
        "--model",
        f"local-dir:{tmp_path / 'open_clip'}",
    ]
    words += ["--pretrained", "none", "--no_amp", "--output", tmp_path / "found.json", "--num_workers", "0"]
    words += ["--task", "zeroshot_classification", "--batch_size", "256"]
    run(python, tmp_path, "-m", "clip_benchmark.cli", *words)
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert found["acc1"] == pytest.approx(scores["student_top1"])
    assert found["mean_per_class_recall"] == pytest.approx(scores["student_class_mean"])
