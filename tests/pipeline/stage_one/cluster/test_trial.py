"""What a worker is tried with: each thing that can be wrong is named. This process plays client and worker."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dimefm.cache import CacheError, InputError
from dimefm.cache.disk.arrays import ArraySpec
from dimefm.cache.disk.layout import IMAGES, SENTENCES
from dimefm.cache.disk.row_tables import IMAGE_COLUMNS, SENTENCE_COLUMNS, write_rows
from dimefm.pipeline.stage_one.cluster.trial import Trial
from dimefm.pipeline.stage_one.cluster.worker_side import TEACHERS, introduce, try_out
from dimefm.stages.embed.tasks import ShardTask
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.settings.models import TeacherSettings

from ....support.teachers import make_teacher
from ....support.worlds import picture

CPU = torch.device("cpu")


@pytest.fixture
def tasks(tmp_path):
    """Three shards of four images, of which the first is no image, and one of sentences."""
    for i in range(12):
        path = tmp_path / "images" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture((20 * i, 90, 30), i).save(path)
    (tmp_path / "images" / "00.jpg").write_bytes(b"no image")
    write_rows(tmp_path / "images.parquet", IMAGE_COLUMNS, ({"source": f"{i:02d}.jpg"} for i in range(12)), 4)
    write_rows(tmp_path / "sentences.parquet", SENTENCE_COLUMNS, ({"text": f"picture {i}"} for i in range(4)), 4)
    store, spec = tmp_path / "cache" / "teacher.zarr", ArraySpec((12, 32), "float16", 4)
    source = ImageFolder(tmp_path / "images")
    images = [
        ShardTask("images", store, IMAGES, spec, shard, table=tmp_path / "images.parquet", source=source)
        for shard in range(3)
    ]
    sentences = replace(spec, shape=(4, 32))
    return [*images, ShardTask("sentences", store, SENTENCES, sentences, 0, table=tmp_path / "sentences.parquet")]


@pytest.fixture
def trial(tasks, tiny_teacher):
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]), batch_size=6, device="cpu")
    teacher = load_teacher(settings, CPU)
    TEACHERS.put(settings, teacher)
    with Trial(tasks, settings, teacher.identity()["weights"], teacher) as trial:
        yield trial
    TEACHERS.clear()
    assert not [*tasks[0].store.iterdir()]


def test_a_worker_like_this_process_passes(trial):
    trial.require_versions(introduce("auto"))
    assert trial.judge(introduce("auto"), try_out(trial.task, "cpu")) is None


def test_the_sample_is_of_images_that_can_be_read_and_of_all_sources(trial):
    (sample,) = trial.task.samples
    assert sample.keys == ("01.jpg", "02.jpg", "04.jpg", "05.jpg", "08.jpg", "09.jpg")
    assert trial.task.sentences == ("picture 0", "picture 2")


def test_images_that_are_missing_or_others_are_named(trial, tmp_path):
    (tmp_path / "images" / "04.jpg").write_bytes((tmp_path / "images" / "05.jpg").read_bytes())
    with pytest.raises(InputError, match=r"1 of 6 sampled images are others there \(.*04\.jpg\)"):
        try_out(trial.task, "cpu")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"it cannot read 6 of 6 sampled images \(.*01\.jpg: "):
        try_out(trial.task, "cpu")


def test_another_folder_in_the_place_of_the_cache_is_named(trial, tmp_path):
    token = trial.task.token
    with pytest.raises(InputError, match=r"it does not see the cache's folder .*nowhere"):
        try_out(replace(trial.task, token=tmp_path / "nowhere" / "token"), "cpu")
    with pytest.raises(InputError, match=r"its folder .*teacher.zarr is not the cache's"):
        try_out(replace(trial.task, secret=b"another"), "cpu")
    tried = try_out(trial.task, "cpu")
    tried.answer.discard()
    with pytest.raises(CacheError, match="what was written for it is not there"):
        trial.judge(introduce("cpu"), tried)
    assert [*token.parent.iterdir()] == [token]


def test_other_weights_are_named(trial, tmp_path, tiny_teacher):
    model, weights = make_teacher(tmp_path / "other", seed=1)
    assert model.read_bytes() == tiny_teacher[0].read_bytes()
    settings = trial.task.settings.model_copy(update={"pretrained": str(weights)})
    with pytest.raises(InputError, match="holds other weights than the one this run began with"):
        try_out(replace(trial.task, settings=settings), "cpu")


@pytest.mark.parametrize("name", ["dimefm", "pillow", "libjpeg"])
def test_another_version_of_the_package_or_of_a_decoder_is_refused(trial, name):
    worker = introduce("cpu")
    other = replace(worker, versions={**worker.versions, name: "0.0.1"})
    with pytest.raises(InputError, match=rf"it has {name} 0\.0\.1, this process has .*; install the same"):
        trial.require_versions(other)
    trial.require_versions(replace(worker, versions={**worker.versions, "torch": "1.0"}))


def test_other_last_bits_are_remarked_with_their_versions_and_other_embeddings_refused(trial):
    worker = replace(introduce("cpu"), versions={**introduce("cpu").versions, "torch": "1.0"})
    tried = try_out(trial.task, "cpu")
    bits = replace(tried, embeddings=tried.embeddings * np.float32(1 + 2**-9))
    remark = trial.judge(worker, bits)
    assert remark.startswith("embeds with other last bits than this process (cosine 1.0000000): torch 1.0 where ")
    for wrong in (tried.embeddings[::-1], np.full_like(tried.embeddings, np.nan), tried.embeddings[:3]):
        with pytest.raises(InputError, match=r"with a cosine of .* to this process; wanted 0\.999 at least"):
            trial.judge(worker, replace(try_out(trial.task, "cpu"), embeddings=wrong))
    other = replace(try_out(trial.task, "cpu"), identity={**tried.identity, "logit_scale": 3.0})
    with pytest.raises(InputError, match=r"its teacher's logit_scale is 3\.0, this process has "):
        trial.judge(worker, other)


def test_a_cache_whose_images_are_all_gone_here_is_no_workers_fault(tasks, tmp_path, tiny_teacher):
    """What becomes of them is decided elsewhere; the sentences are still a probe."""
    shutil.rmtree(tmp_path / "images")
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]), device="cpu")
    teacher = load_teacher(settings, CPU)
    with Trial(tasks, settings, teacher.identity()["weights"], teacher) as trial:
        assert not trial.task.samples and trial.judge(introduce("cpu"), try_out(trial.task, "cpu")) is None
    TEACHERS.clear()
