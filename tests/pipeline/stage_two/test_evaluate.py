"""`dimefm evaluate`: two runs, two labelled sets, probes between them, and what is written and printed."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dimefm.cache import FeatureCache, InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.stage_two.evaluate import evaluate
from dimefm.pipeline.stage_two.score_table import score_table
from dimefm.stages.models.frozen_text_tower import load_text_tower
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.score.bootstrap import paired_interval
from dimefm.stages.score.predictions import hits
from dimefm.stages.score.recall import best_own_ranks, read_captions

from ...support.commands import refused, run_dimefm
from ...support.worlds import COLOURS, make_world, picture

TEST_SET = '[evaluate.test]\nimages = "test/"\nclasses = "classes.json"\ntemplates = "templates.txt"\nprobe = "dev"\n'
CAPTIONS = 'captions = "pairs.json"\n'


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_teacher):
    """A world with two labelled sets, test of 20 images, and one step of each of two students."""
    folder = tmp_path_factory.mktemp("trained")
    path = make_world(folder, tiny_teacher)
    for name, colour in COLOURS.items():
        for i in range(5):
            image = folder / "test" / name / f"{i}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            picture(colour, 2000 + i).save(image)
    captions = {f"{name}/{i}.png": [f"something {name[2:]}", f"{i} times {name}"] for name in COLOURS for i in range(5)}
    (folder / "pairs.json").write_text(json.dumps(captions))
    path.write_text(path.read_text() + TEST_SET + CAPTIONS)
    config = load_config(path)
    cache_teacher(config)
    distill(config, [], stop_after=1)
    return path


@pytest.fixture
def config(trained, tmp_path):
    shutil.copytree(trained.parent, tmp_path / "world")
    return tmp_path / "world" / "run.toml"


def test_all_scores_are_written_and_printed_as_json_and_a_screenful_without(trained, capsys):
    done = run_dimefm(capsys, "evaluate", trained, "--json")
    assert done.code == 0, done.lines
    scores = json.loads(done.out)
    runs = [trained.parent / "runs" / name for name in ("small", "vit")]
    for run in runs:
        assert json.loads((run / "evaluation.json").read_bytes()) == scores[str(run)]
        dev, test = (scores[str(run)][name] for name in ("dev", "test"))
        assert dev["n"] == 12 and test["n"] == 20
        assert "probe" not in dev and test["probe"]["fitted_on"] == "dev" and test["probe"]["fit_images"] == 12
        assert list(test["per_class"]) == sorted(COLOURS)
        # The teacher's cached embeddings of one colour are close: neighbours tell four colours apart.
        assert test["probe"]["knn"]["teacher_top1"] == 1.0
    lines = score_table(scores).splitlines()
    assert len(lines) == 17 and max(map(len, lines)) < 125
    for title in ("top-1, 95 %", "retention, 95 %", "probe learns", "k-NN", "minus the first, 95 %"):
        assert title in lines[6]
    assert "student R@1" in lines[12] and "image to text" in lines[13] and "text to image" in lines[14]


def test_runs_are_held_against_the_first_with_pairs_of_images(trained):
    scores = evaluate([trained])
    small, vit = (trained.parent / "runs" / name for name in ("small", "vit"))
    assert "versus" not in scores[str(small)]["test"]
    found = scores[str(vit)]["test"]["versus"]
    one, other = (hits(pq.read_table(run / "predictions" / "test.parquet")) for run in (vit, small))
    assert found["run"] == str(small)
    assert found["student_top1"] == pytest.approx(one.mean() - other.mean())
    assert found["student_top1_interval"] == list(paired_interval(one, other))
    assert scores[str(vit)]["test"]["student_top1"] == pytest.approx(one.mean())


def test_predictions_of_the_teacher_are_those_of_the_cached_arrays_by_hand(trained):
    evaluate([trained])
    test = FeatureCache.open(trained.parent / "cache").evaluate["test"]
    table = pq.read_table(trained.parent / "runs/small/predictions/test.parquet")
    best = (test.images.embeddings[:].astype(np.float64) @ test.head.T).argmax(axis=1)
    assert table.column("teacher").to_pylist() == [test.class_ids[i] for i in best]
    assert table.column("source").to_pylist() == test.images.rows.column("source").to_pylist()


def test_a_probe_is_no_part_of_the_cache_or_the_run_and_may_come_later(config):
    config.write_text(config.read_text().replace('probe = "dev"\n' + CAPTIONS, ""))
    (config.parent / "runs/vit/source.json").unlink()
    cache_teacher(load_config(config))  # the finished cache is this config's as well
    run = config.parent / "runs/small"
    source = json.loads((run / "source.json").read_bytes())
    (run / "source.json").write_text(json.dumps({key: source[key] for key in ("cache", "evaluate")}))  # an older run's
    assert not {"probe", "retrieval"} & evaluate([run])[str(run)]["test"].keys()
    config.write_text(config.read_text() + 'probe = "dev"\n')
    assert evaluate([config])[str(run)]["test"]["probe"]["fitted_on"] == "dev"


def test_captions_are_embedded_as_the_teacher_embeds_them(trained):
    run, config = trained.parent / "runs/small", load_config(trained)
    found = evaluate([run])[str(run)]["test"]["retrieval"]
    cache = FeatureCache.open(config.cache.dir)
    images = cache.evaluate["test"].images
    texts, image_of = read_captions(config.evaluate["test"].captions, images.rows.column("source").to_pylist(), "test")
    embeddings = load_text_tower(cache.text_tower, torch.device("cpu")).encode_sentences(texts)
    live = load_teacher(config.teacher, torch.device("cpu"))
    np.testing.assert_allclose(embeddings, live.encode_tokens(live.tokenize(texts)), rtol=1e-5, atol=1e-6)
    pairs = np.stack([np.arange(40), image_of], axis=1)
    ranks = best_own_ranks(embeddings, images.embeddings[:], pairs)
    assert (found["images"], found["captions"]) == (20, 40)
    for k in (1, 5, 10):
        assert found["text_to_image"][f"teacher_r{k}"] == pytest.approx(np.mean(ranks < k))


def test_captions_that_name_no_image_are_refused_before_anything_is_embedded(config, capsys):
    pairs = json.loads((config.parent / "pairs.json").read_text())
    (config.parent / "pairs.json").write_text(json.dumps({**pairs, "c_red/9.png": ["a red one"]}))
    line = refused(capsys, "evaluate", config)
    assert "pairs.json: 'c_red/9.png' is no image of evaluate.test" in line


def test_images_that_are_in_both_sets_are_told(config, capsys):
    source = config.parent / "runs/small/source.json"
    document = json.loads(source.read_bytes())
    source.write_text(json.dumps({**document, "probes": {"test": "test"}}))
    done = run_dimefm(capsys, "evaluate", config.parent / "runs/small")
    assert done.code == 0
    assert any("20 of its images are nearly in test too" in line for line in done.lines), done.lines


def test_a_probe_on_other_classes_is_refused_before_anything_is_embedded(config, capsys, monkeypatch):
    opened = FeatureCache.open(config.parent / "cache")
    other = opened.evaluate["dev"]
    ids = [*other.class_ids[:-1], "z_other"]
    changed = dataclasses.replace(other, class_ids=ids)
    cache = dataclasses.replace(opened, evaluate={**opened.evaluate, "dev": changed})
    monkeypatch.setattr(FeatureCache, "open", lambda folder: cache)
    line = refused(capsys, "evaluate", config.parent / "runs/small")
    assert "evaluate.test.probe = 'dev': class 'c_white' is in test alone" in line


@pytest.mark.parametrize(
    ("probe", "wanted"),
    [("train", "no such set; there is dev, test"), ("test", "wanted another set than the one that is scored")],
)
def test_a_probe_that_names_no_other_set_is_refused_with_the_config(config, probe, wanted):
    config.write_text(config.read_text().replace('probe = "dev"', f'probe = "{probe}"'))
    with pytest.raises(InputError, match=rf"evaluate: test\.probe = '{probe}': {wanted}"):
        load_config(config)
