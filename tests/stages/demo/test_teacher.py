"""The demo's teacher: the file that is shipped, and the code that made it."""

import hashlib
import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from safetensors.numpy import load

from dimefm.stages.demo.scene_captions import TEMPLATES, caption, classes
from dimefm.stages.demo.scene_pictures import draw
from dimefm.stages.demo.scenes import SEEN, Source, make_scene
from dimefm.stages.demo.shipped_teacher import MODEL_CONFIG, SHIPPED, VOCABULARY, pack, unpack
from dimefm.stages.demo.tiny_teacher import TeacherRecipe, contrastive_loss, prompts, train_teacher
from dimefm.stages.models.class_vectors import ClassVectors
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.settings.models import TeacherSettings

SHA256 = "9b759b1c7999b3e005bfba9c08366c4c7460e3b68ad410e2c94cc609e00c91f0"


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by more, and other threads would give a trained teacher other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(folder, checkpoint):
    """A teacher as a demo's config loads it."""
    (folder / "teacher.json").write_text(json.dumps(MODEL_CONFIG))
    (folder / "teacher.safetensors").write_bytes(checkpoint)
    files = TeacherSettings(model=str(folder / "teacher.json"), pretrained=str(folder / "teacher.safetensors"))
    return load_teacher(files, torch.device("cpu"))


def test_the_file_that_is_shipped_is_the_one_that_was_measured_and_small():
    data = SHIPPED.read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256
    assert len(data) <= 2_000_000


def test_the_shipped_teacher_names_most_single_things_that_it_has_never_seen(tmp_path):
    teacher = loaded(tmp_path, unpack(SHIPPED.read_bytes()))
    names = [name for (name,) in classes(held_out=False).values()]
    texts = [[template.format(name) for template in TEMPLATES] for name in names]
    vectors = ClassVectors(texts, teacher.embed_dim)
    vectors.add(0, teacher.encode_tokens(teacher.tokenize([*chain(*texts)])).numpy())
    scenes = [make_scene(0, Source.TEST, 20 * i + j, pair, num_things=1) for i, pair in enumerate(SEEN) for j in (0, 1)]
    pictures = teacher.normalise(torch.from_numpy(np.stack([teacher.crop(draw(scene)) for scene in scenes])))
    found = (teacher.encode_images(pictures).numpy() @ vectors.result("the teacher").T).argmax(axis=1)
    right = np.mean([names[i] == " ".join(SEEN[n // 2]) for n, i in enumerate(found)])
    assert right > 0.68  # 0.8 on all 800 of them, of 80 within 0.12 nearly always; chance is 0.025


def test_training_goes_on_the_same_way_each_time_and_ends_with_a_file_like_the_shipped_one(tmp_path):
    recipe = TeacherRecipe(num_pairs=64, steps=2, num_checked=16)
    told = []
    packed, accuracy = train_teacher(0, recipe, lambda *facts: told.append(facts))
    assert packed == train_teacher(0, recipe)[0]
    assert 0 <= accuracy <= 1 and told[-1] == ("training the teacher", 2, 2)
    made, shipped = load(packed), load(SHIPPED.read_bytes())
    assert {name: value.dtype for name, value in made.items()} == {name: v.dtype for name, v in shipped.items()}
    assert loaded(tmp_path, unpack(packed)).encode_images(torch.zeros(2, 3, 64, 64)).shape == (2, 128)


def test_a_packed_teacher_is_unpacked_to_the_whole_vocabulary():
    weights = {
        "token_embedding.weight": np.array([[1.5, -2.0], [0.25, 1 / 3]], np.float32),
        "logit_scale": np.array(3.3, np.float32),  # float16 would make it 3.301
        "bn.num_batches_tracked": np.array(7),
    }
    found = load(unpack(pack(weights, np.array([3, 49407]))))
    table = found["token_embedding.weight"]
    assert table.shape == (VOCABULARY, 2) and table.dtype == np.float32
    assert table[3].tolist() == [1.5, -2.0] and table[49407].tolist() == [0.25, np.float16(1 / 3)]
    assert np.count_nonzero(table) == 4
    assert found["logit_scale"] == np.float32(3.3) and found["bn.num_batches_tracked"] == 7
    assert "token_ids" not in found


def test_every_token_of_captions_and_prompts_is_in_the_shipped_table_and_every_caption_fits():
    context = MODEL_CONFIG["text_cfg"]["context_length"]
    captions = [caption(make_scene(0, Source.SENTENCES, row)) for row in range(3000)]
    tokens = SimpleTokenizer(context_length=77)(captions + prompts())
    assert (tokens != 0).sum(dim=1).max() <= context
    assert set(tokens.unique().tolist()) <= set(load(SHIPPED.read_bytes())["token_ids"].tolist())


def test_the_teachers_loss_lets_equal_captions_share_the_target():
    same, different = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[5, 6], [5, 7]])
    alike, apart, scale = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2), torch.tensor(100.0)
    assert contrastive_loss(alike, alike, same, scale) == pytest.approx(math.log(2))  # 1/2 and 1/2, and rightly so
    assert contrastive_loss(apart, apart, different, scale) == pytest.approx(0.0)
    assert contrastive_loss(apart, apart, same, scale) == pytest.approx(50.0)  # half of the target is 100 away
