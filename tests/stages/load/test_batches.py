"""Batches: their content is a function of the step; threads, prefetching and resuming change nothing."""

import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dimefm.cache import InputError
from dimefm.stages.counter_random import uniforms
from dimefm.stages.images.crops import NUM_UNIFORMS
from dimefm.stages.images.views import ViewMaker
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.inputs.image_source import require_at_hand
from dimefm.stages.load.batches import Batch, BatchLoader, normalise
from dimefm.stages.losses.loss_inputs import SamplingWeights
from dimefm.stages.sample.order import BankStream, Stream
from dimefm.stages.settings.distill import AugmentSettings

from ...support.small_cache import make_cache

SIDE = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    return make_cache(folder), folder / "images"


def view(side):
    return ViewMaker(AugmentSettings(flip=True), side, Image.Resampling.BICUBIC)


def loader(world, sentences=True, sides=(SIDE,), **options):
    cache, root = world
    stream = Stream(cache.images.usable, 10, 0, "images")
    texts = (cache.sentences, Stream(cache.sentences.usable, 7, 0, "sentences")) if sentences else None
    files = ImageFolder(root)
    return BatchLoader(cache.images, stream, files, [view(side) for side in sides], 5, sentences=texts, **options)


def batches(world, first, end, **options):
    with loader(world, **options) as one:
        return list(one.batches(first, end))


def equal(first, second):
    return (
        first.step == second.step
        and (first.rows == second.rows).all()
        and all(map(torch.equal, first.images, second.images))
        and torch.equal(first.targets, second.targets)
        and torch.equal(first.sentences, second.sentences)
    )


def test_a_batch_holds_the_rows_of_its_step_their_views_and_their_cached_embeddings(world):
    cache, root = world
    (batch,) = batches(world, 4, 5)
    draw = Stream(cache.images.usable, 10, 0, "images").draw(4)
    assert (batch.rows == draw.rows).all() and draw.passes.tolist() == [1] * 10
    assert batch.images[0].shape == (10, SIDE, SIDE, 3) and batch.images[0].dtype == torch.uint8
    assert (batch.targets.numpy() == cache.images.embeddings[draw.rows]).all() and batch.targets.dtype == torch.float16
    sentences = Stream(cache.sentences.usable, 7, 0, "sentences").draw(4).rows
    assert (batch.sentences.numpy() == cache.sentences.embeddings[sentences]).all()
    maker = ViewMaker(AugmentSettings(flip=True), SIDE, Image.Resampling.BICUBIC)
    for i, one in enumerate(uniforms(5, draw.rows, draw.passes, NUM_UNIFORMS).tolist()):
        data = (root / f"{draw.rows[i]:03d}.jpg").read_bytes()
        assert (batch.images[0][i].numpy() == maker.view(data, one)).all()


def test_starting_in_the_middle_gives_the_batches_of_a_run_from_the_start(world):
    whole = batches(world, 0, 9)
    assert [batch.step for batch in whole] == list(range(9))
    assert all(map(equal, whole[5:], batches(world, 5, 9)))


def test_the_number_of_threads_changes_nothing(world):
    assert all(map(equal, batches(world, 0, 5, workers=1), batches(world, 0, 5, workers=7)))


def test_failed_rows_are_never_drawn(world):
    drawn = np.concatenate([batch.rows for batch in batches(world, 0, 8)])
    assert 3 not in drawn and set(drawn) == set(range(40)) - {3}


def test_an_image_has_another_view_in_each_pass(world):
    seen = {}
    for batch in batches(world, 0, 8):
        for row, one in zip(batch.rows, batch.images[0]):
            seen.setdefault(int(row), set()).add(one.numpy().tobytes())
    assert max(map(len, seen.values())) > 1


def test_sentences_are_not_read_where_no_loss_wants_them(world):
    assert batches(world, 0, 1, sentences=False)[0].sentences is None


def test_views_of_several_sizes_from_one_reading_are_those_made_alone(world):
    both = batches(world, 0, 4, sides=(SIDE, 20))
    alone = [batches(world, 0, 4, sides=(side,)) for side in (SIDE, 20)]
    for step, batch in enumerate(both):
        assert all(torch.equal(views, one[step].images[0]) for views, one in zip(batch.images, alone))


def test_a_bank_brings_the_targets_of_more_images(world):
    cache, root = world
    stream = Stream(cache.images.usable, 10, 0, "images")
    bank = BankStream(stream, 6, 0)
    with BatchLoader(cache.images, stream, ImageFolder(root), [view(8)], 5, bank=bank, workers=1) as one:
        (batch,) = one.batches(2, 3)
    assert batch.sentences is None and batch.bank.dtype == torch.float16
    assert (batch.bank.numpy() == cache.images.embeddings[bank.draw(2).rows]).all()


def test_an_image_that_is_gone_stops_the_run_naming_file_and_row(tmp_path):
    cache = make_cache(tmp_path)
    (tmp_path / "images/007.jpg").unlink()
    with pytest.raises(InputError, match=r"images/007\.jpg: row 7 can no longer be used \(gone\)"):
        batches((cache, tmp_path / "images"), 0, 8)


def test_no_thread_outlives_the_loader_even_after_an_error(tmp_path):
    cache = make_cache(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    before = threading.active_count()
    with pytest.raises(InputError, match="empty"):
        batches((cache, tmp_path / "images"), 0, 8)
    assert threading.active_count() == before


def test_a_missing_folder_of_images_is_refused(world, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        require_at_hand(ImageFolder(tmp_path / "absent"), "wanted some")


def test_normalising_is_torchvisions():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.3, 0.2, 0.1])
    found = normalise(torch.from_numpy(pixels), mean, std)
    wanted = (pixels.transpose(0, 3, 1, 2) / 255 - mean.numpy()[:, None, None]) / std.numpy()[:, None, None]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_a_loader_that_is_closed_before_its_iteration_ends_it_in_silence(world, capfd):
    with loader(world) as one:
        coming = one.batches(0, 50)
        next(coming)
    coming.close()
    assert capfd.readouterr().err == ""


def test_every_tensor_of_a_batch_goes_to_the_device_one_that_is_new_and_nested_ones_too(world):
    @dataclass(frozen=True)
    class Larger(Batch):
        new: torch.Tensor | None = None
        nested: tuple[dict[str, torch.Tensor], ...] = ()

    (batch,) = batches(world, 0, 1)
    weights = SamplingWeights(torch.zeros(7), torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10, 2))
    batch = replace(batch, sampling=weights, tokens={"a": torch.zeros(1)})
    larger = Larger(**vars(batch), new=torch.zeros(2), nested=({"x": torch.zeros(3)},))
    moved = larger.map(lambda tensor: tensor.to("meta"))
    assert type(moved) is Larger and (moved.rows is larger.rows, moved.step, moved.bank) == (True, 0, None)
    tensors = [*moved.images, moved.targets, moved.sentences, moved.new, moved.nested[0]["x"], moved.tokens["a"]]
    tensors += [moved.sampling.sentences, moved.sampling.places, moved.sampling.values]
    assert len(tensors) == 9 and all(tensor.is_meta for tensor in tensors)
