"""One shard through the teacher: fixed batches, failures marked, decoding ahead of the model."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dimefm.cache import InputError
from dimefm.stages.embed.image_rows import ShardResult, embed_image_shard
from dimefm.stages.embed.sentence_rows import class_head, embed_sentence_shard
from dimefm.stages.images.decode import decode_image
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.open_clip_teacher import OpenClipTeacher as Teacher
from dimefm.stages.settings.models import TeacherSettings

BATCH = 4
ANYWHERE = ImageFolder(Path())
"""Keys are whole paths."""


@pytest.fixture
def teacher(tiny_teacher: tuple[Path, Path]) -> Teacher:
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]))
    return load_teacher(settings, torch.device("cpu"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Ten images, the fourth cut short and the eighth empty."""
    paths = [tmp_path / f"{row}.png" for row in range(10)]
    for row, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(row).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:3000])
    paths[7].write_bytes(b"")
    return paths


def images(teacher: Teacher, files: Sequence[Path | None], workers: int = 2) -> ShardResult:
    return embed_image_shard(teacher, ANYWHERE, files, BATCH, workers, threading.Lock())


def sentences(teacher: Teacher, texts: Sequence[str | None]) -> ShardResult:
    return embed_sentence_shard(teacher, texts, BATCH, threading.Lock())


def spy(monkeypatch: pytest.MonkeyPatch, teacher: Teacher, name: str) -> list[torch.Tensor]:
    """The batches that a method of the teacher is called with."""
    seen: list[torch.Tensor] = []
    original: Callable[[torch.Tensor], torch.Tensor] = getattr(teacher, name)

    def record(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.clone())
        return original(batch)

    monkeypatch.setattr(teacher, name, record)
    return seen


def test_an_embedding_is_the_teachers_own_in_its_full_batch(teacher: Teacher, files: list[Path]) -> None:
    result = images(teacher, [*files[:3], files[4]])
    batch = torch.stack([teacher.preprocess(decode_image(path.read_bytes())) for path in (*files[:3], files[4])])
    assert result.embeddings.dtype == np.float16
    assert np.array_equal(result.embeddings, teacher.encode_images(batch).numpy().astype(np.float16))
    assert result.failures == []


def test_unreadable_images_are_nan_and_named_and_the_others_are_not(teacher: Teacher, files: list[Path]) -> None:
    result = images(teacher, files)
    assert result.failures == [(3, "truncated"), (7, "empty file")]
    assert np.flatnonzero(np.isnan(result.embeddings).any(axis=1)).tolist() == [3, 7]


def test_a_row_that_is_known_to_fail_is_nan_but_not_named_again(teacher: Teacher, files: list[Path]) -> None:
    result = images(teacher, [files[0], None, files[3]])
    assert result.failures == [(2, "truncated")]
    assert np.isnan(result.embeddings).all(axis=1).tolist() == [False, True, True]


def test_every_batch_has_the_same_shape_and_failed_rows_are_black(
    teacher: Teacher, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spy(monkeypatch, teacher, "normalise")
    images(teacher, files)
    assert [tuple(batch.shape) for batch in seen] == [(BATCH, 32, 32, 3)] * 3
    # Batches share memory in turn: what an earlier one left behind must not show in padding or failed rows.
    assert [batch.flatten(1).any(dim=1).tolist() for batch in seen] == [
        [True, True, True, False],
        [True, True, True, False],
        [True, True, False, False],
    ]


def test_a_shard_is_the_same_bytes_whatever_the_number_of_workers(teacher: Teacher, files: list[Path]) -> None:
    shards = [images(teacher, files, workers).embeddings.tobytes() for workers in (0, 1, 7)]
    assert shards[0] == shards[1] == shards[2]


def test_memory_is_reused_without_mixing_batches(teacher: Teacher, files: list[Path]) -> None:
    many = [files[row % 3] for row in range(9 * BATCH)]
    embeddings = images(teacher, many).embeddings.astype(np.float32)
    assert np.allclose(embeddings, embeddings[[row % 3 for row in range(len(many))]], atol=1e-2)
    assert not np.allclose(embeddings[0], embeddings[1], atol=1e-1)


def test_outputs_that_float16_cannot_hold_are_failures(
    teacher: Teacher, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = torch.ones(BATCH, 32)
    output[0, 5], output[1, 5], output[2, 5] = float("nan"), float("-inf"), 70_000.0
    monkeypatch.setattr(teacher, "encode_images", lambda _: output)
    monkeypatch.setattr(teacher, "encode_tokens", lambda _: output)
    expected = [
        (0, "the teacher's output is not finite"),
        (1, "the teacher's output is not finite"),
        (2, "beyond float16"),
    ]
    for result in (images(teacher, files[:2] + files[4:6]), sentences(teacher, list("abcd"))):
        assert result.failures == expected
        assert np.isnan(result.embeddings).all(axis=1).tolist() == [True, True, True, False]


def test_an_unreadable_image_keeps_its_reason_when_the_teacher_fails_on_it_too(
    teacher: Teacher, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "encode_images", lambda _: torch.full((BATCH, 32), float("nan")))
    assert images(teacher, [files[3]]).failures == [(0, "truncated")]


def test_a_sentence_is_the_teachers_own_in_its_full_batch(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch, teacher, "encode_tokens")
    result = sentences(teacher, ["a", "b", None, "d", "e"])
    expected = [teacher.encode_sentences(batch) for batch in (["a", "b", "", "d"], ["e", "", "", ""])]
    rows = torch.cat(expected)[:5].numpy().astype(np.float16)
    assert np.array_equal(result.embeddings[[0, 1, 3, 4]], rows[[0, 1, 3, 4]])
    assert np.isnan(result.embeddings[2]).all()
    assert result.failures == []
    assert {tuple(batch.shape) for batch in seen} == {(BATCH, 16)}


def test_an_empty_shard_is_empty(teacher: Teacher) -> None:
    for result in (images(teacher, []), sentences(teacher, [])):
        assert result.embeddings.shape == (0, 32)
        assert result.failures == []


def test_seconds_are_split_by_what_they_went_into(teacher: Teacher, files: list[Path]) -> None:
    for result in (images(teacher, files), sentences(teacher, ["a"])):
        assert result.seconds.keys() == {"read", "decode", "wait", "infer"}
        assert all(seconds >= 0 for seconds in result.seconds.values())
        assert result.seconds["infer"] > 0 and result.seconds["decode"] > 0


def test_the_model_is_used_under_the_lock_and_decoding_is_not(
    teacher: Teacher, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, decoded, held = threading.Lock(), threading.Semaphore(0), []
    crop, encode = teacher.crop, teacher.encode_images

    def crop_and_tell(image: Image.Image) -> np.ndarray:
        decoded.release()
        return crop(image)

    def encode_and_look(batch: torch.Tensor) -> torch.Tensor:
        held.append(lock.locked())
        return encode(batch)

    monkeypatch.setattr(teacher, "crop", crop_and_tell)
    monkeypatch.setattr(teacher, "encode_images", encode_and_look)
    lock.acquire()
    shard = threading.Thread(target=embed_image_shard, args=(teacher, ANYWHERE, files, BATCH, 2, lock))
    shard.start()
    for _ in range(8):  # all that can be read: ten less two
        assert decoded.acquire(timeout=30)
    assert held == []
    lock.release()
    shard.join()
    assert held == [True, True, True] and not lock.locked()


def test_only_a_few_batches_are_decoded_ahead(
    teacher: Teacher, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, ahead = [], []
    crop, encode = teacher.crop, teacher.encode_images
    monkeypatch.setattr(teacher, "crop", lambda image: (loaded.append(1), crop(image))[1])

    def encode_and_count(batch: torch.Tensor) -> torch.Tensor:
        ahead.append(len(loaded) - BATCH * len(ahead))
        return encode(batch)

    monkeypatch.setattr(teacher, "encode_images", encode_and_count)
    images(teacher, [files[0]] * 40, workers=8)
    assert max(ahead) <= 3 * BATCH


@pytest.mark.parametrize("method", ["encode_images", "encode_tokens"])
def test_out_of_memory_names_the_setting_and_frees_the_lock(
    teacher: Teacher, files: list[Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teacher, method, fail)
    lock = threading.Lock()
    with pytest.raises(InputError, match=r"teacher\.batch_size = 4: .* does not fit .* lower it \(it is part of"):
        if method == "encode_images":
            embed_image_shard(teacher, ANYWHERE, files, BATCH, 1, lock)
        else:
            embed_sentence_shard(teacher, ["a"] * 9, BATCH, lock)
    assert not lock.locked()


def test_a_fault_of_ours_is_raised_not_recorded(
    teacher: Teacher, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Image.Image) -> np.ndarray:
        raise ZeroDivisionError

    monkeypatch.setattr(teacher, "crop", fail)
    with pytest.raises(ZeroDivisionError):
        images(teacher, files)


def test_a_class_vector_is_the_normalised_mean_of_normalised_prompts(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prompts (3, 0) and (0, 5) -> units (1, 0) and (0, 1) -> mean (.5, .5) -> (.7071, .7071); (0, -2) -> (0, -1).
    vectors = {"a": [3.0, 0.0], "b": [0.0, 5.0], "c": [0.0, -2.0], "": [9.0, 9.0]}
    monkeypatch.setattr(teacher, "embed_dim", 2)
    monkeypatch.setattr(teacher, "tokenize", list)
    monkeypatch.setattr(teacher, "encode_tokens", lambda texts: torch.tensor([vectors[text] for text in texts]))
    head = class_head(teacher, [["a", "b"], ["c"]], 2, threading.Lock())
    assert head.dtype == np.float32
    assert np.allclose(head, [[0.5**0.5, 0.5**0.5], [0, -1]], atol=1e-7)


def test_a_head_agrees_with_open_clips_way_and_the_batch_size_hardly_matters(teacher: Teacher) -> None:
    prompts = [[f"a photo of {name}", f"{name}!", f"many {name}"] for name in ("cats", "dogs", "boats")]
    head = class_head(teacher, prompts, 4, threading.Lock())
    for row, texts in zip(head, prompts):
        units = torch.nn.functional.normalize(teacher.encode_sentences(texts), dim=-1)
        assert np.allclose(row, torch.nn.functional.normalize(units.mean(dim=0), dim=0).numpy(), atol=1e-5)
    assert np.allclose(head, class_head(teacher, prompts, 64, threading.Lock()), atol=1e-5)


@pytest.mark.parametrize("prompts", [[["a"], []], [["a"], ["b", "broken"]]], ids=["no prompt", "nan"])
def test_a_class_without_a_vector_is_refused(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, prompts: list[list[str]]
) -> None:
    monkeypatch.setattr(teacher, "tokenize", list)
    monkeypatch.setattr(
        teacher,
        "encode_tokens",
        lambda texts: torch.tensor([[float("nan") if text == "broken" else 1.0] * 32 for text in texts]),
    )
    with pytest.raises(InputError, match="class 1 of 2 has no vector"):
        class_head(teacher, prompts, 2, threading.Lock())
