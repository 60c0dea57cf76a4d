"""A student's own text tower: its losses, that it learns, that it goes on as it was, and that it is scored with."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from open_clip.transformer import TextTransformer

from dimefm.cache import FeatureCache, InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.stage_two.evaluate import evaluate
from dimefm.pipeline.stage_two.score_table import score_table
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.load.sentence_tokens import SentenceTokens
from dimefm.stages.losses.clip_kd import icl_loss, mse_loss
from dimefm.stages.losses.dime import feature_loss, pvl_loss, udist_loss, vl_loss
from dimefm.stages.losses.terms import load_losses
from dimefm.stages.models.text_student import TextStudent, build_text_student, text_tokenizer
from dimefm.stages.run_folder.checkpoint import load_checkpoint, save_checkpoint
from dimefm.stages.run_folder.load_student import load_text_student
from dimefm.stages.settings.distill import DistillSettings, LossSettings, TemperatureSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.loop import train
from dimefm.stages.train.processes import World, open_world
from dimefm.stages.train.student import Student
from dimefm.stages.train.student_run import Run
from dimefm.stages.train.targets import Targets
from dimefm.stages.train.tower import Tower

from ...support.commands import refused
from ...support.small_cache import text_config
from ...support.training import lines_of, train_one, weights_of
from ...support.worlds import make_world

CPU = torch.device("cpu")
ALL = LossSettings(vl=0.7, pvl=0.3, udist=0.2, feature=1.0, mse=2.0, icl=0.1, icl_threshold=0.9)
SETTINGS = DistillSettings(
    epochs=2,
    batch_images=9,
    batch_sentences=12,
    batch_texts=5,
    bank_images=4,
    lr=0.01,
    log_every=1,
    checkpoint_every=2,
    device="cpu",
    workers=1,
    loss=ALL,
    ema=0.9,
    clip_grad_norm=0.5,
    temperature=TemperatureSettings(icl_learned=True),
)


def student_with(text, model="with_dropout"):
    return StudentSettings(model=f"own_students:{model}", image_size=8, text=text)


def train_here(world, text, run, settings=SETTINGS, **options):
    cache, folder = world
    return train_one(cache, folder / "images", student_with(text), settings, folder / run, **options)


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kl(teacher, student):
    """Mean over rows of KL(softmax(teacher) || softmax(student)), from the definition."""
    p, q = teacher.softmax(dim=1), student.softmax(dim=1)
    return (p * (p / q).log()).sum(dim=1).mean()


def test_its_losses_are_those_of_images_with_the_roles_swapped(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, bank, sentences = (torch.randn(n, 16, generator=generator).half() for n in (9, 4, 12))
    settings = SETTINGS.model_copy(update={"temperature": TemperatureSettings(icl=2.0)})
    model = build_text_student(text_config(tmp_path), 16)
    tower = Tower(model, load_losses(settings.losses), settings, World(CPU), "fp32", 20.0)
    tokens = torch.randint(49406, (5, 12), generator=generator)
    tower.learn(tokens, Targets.gather(images, sentences, bank, World(CPU)).of_texts(5), 0.0, 1)
    texts, found, further = sentences[:5], tower.embeddings, sentences[5:]
    over = torch.cat([images, bank])
    wanted = {
        "vl": vl_loss(found, texts, over, 1.0, 20.0),
        "pvl": pvl_loss(found, texts, 3.0, 20.0, bank_images=further),
        "udist": udist_loss(found, texts, 7.0, 20.0),
        "feature": feature_loss(found, texts),
        "mse": mse_loss(found, texts),
        "icl": icl_loss(found, texts, 2.0, 20.0, bank_images=further, threshold=0.9),
    }
    wanted = {name: value.item() for name, value in wanted.items()}
    assert {name: term.item() for name, term in tower.terms.items()} == pytest.approx(wanted, rel=1e-5)
    assert tower.loss.item() == pytest.approx(
        sum(getattr(ALL, name) * value for name, value in wanted.items()), rel=1e-5
    )
    v_hat, v, u, w = (F.normalize(rows.double(), dim=1) for rows in (found, texts, over, torch.cat([texts, further])))
    by_hand = kl(20 * v @ u.T, 20 * v_hat @ u.T) + kl(20 * u @ v.T, 20 * u @ v_hat.T)
    assert tower.terms["vl"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    by_hand = 2 * kl(20 / 3 * v @ w.T, 20 / 3 * v_hat @ w.T)
    assert tower.terms["pvl"].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_it_learns_the_teachers_embeddings_of_sentences(world):
    folder = world[1]
    settings = SETTINGS.model_copy(update={"epochs": 20, "loss": LossSettings(feature=1.0), "ema": None})
    settings = settings.model_copy(update={"batch_sentences": 30, "batch_texts": 30})
    train_here(world, text_config(folder, width=64), "run", settings)
    metrics = lines_of(folder / "run")
    assert metrics[0]["text_cosine"] < 0.3 and metrics[-1]["text_cosine"] > 0.9
    assert metrics[-1]["text_feature"] == pytest.approx(1 - metrics[-1]["text_cosine"], abs=1e-5)
    assert metrics[-1]["text_loss"] < 0.2 * metrics[0]["text_loss"]
    tower = load_text_student(folder / "run", "cpu")
    texts = [f"s{i}" for i in range(30)]
    found = F.normalize(torch.from_numpy(tower.encode_sentences(texts)), dim=1)
    wanted = F.normalize(torch.from_numpy(world[0].sentences.embeddings[:]).float(), dim=1)
    same_for_all = (wanted @ F.normalize(wanted.mean(dim=0), dim=0)).mean()
    # Row i of the cache is sentence i: of rows in another order it would know no more than their mean.
    assert (found * wanted).sum(dim=1).mean() > 0.9 > same_for_all + 0.1


def test_losses_are_summed_and_logged_by_name(world):
    train_here(world, text_config(world[1]), "run", stop_after=2)
    last = lines_of(world[1] / "run")[-1]
    names = ("vl", "pvl", "udist", "feature", "mse", "icl")
    text = sum(getattr(ALL, name) * last[f"text_{name}"] for name in names)
    assert last["text_loss"] == pytest.approx(text, rel=1e-5)
    assert last["loss"] == pytest.approx(text + sum(getattr(ALL, name) * last[name] for name in names), rel=1e-5)
    assert {"text_gradient_norm", "text_icl_scale", "text_icl_masked", "text_vl_candidates"} <= last.keys()
    assert 1 <= last["text_pvl_candidates"] <= 12 and 1 <= last["text_vl_candidates"] <= 13


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_image_tower_ends_with_the_weights_that_it_gets_without_a_text_tower(world, accumulate):
    settings = SETTINGS.model_copy(update={"accumulate": accumulate})
    train_here(world, "teacher", "without", settings)
    train_here(world, text_config(world[1]), "with", settings)
    for key in ("model", "ema"):
        assert_equal(*(weights_of(world[1] / run, key) for run in ("without", "with")))
    assert not any(name.startswith("text") for name in load_checkpoint(world[1] / "without/checkpoint.pt"))
    for without, with_text in zip(*(lines_of(world[1] / run) for run in ("without", "with")), strict=True):
        del without["loss"]
        assert without.items() <= with_text.items()


def test_a_student_with_the_teachers_text_reads_no_sentence(world, monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(SentenceTokens, "__init__", refuse)
    train_here(world, "teacher", "run", SETTINGS.model_copy(update={"batch_texts": 100}))


def test_a_run_that_stopped_goes_on_bit_for_bit(world):
    folder, text = world[1], text_config(world[1])
    train_here(world, text, "whole")
    for steps in (1, 2, None):
        train_here(world, text, "run", stop_after=steps)
    assert lines_of(folder / "run") == lines_of(folder / "whole")
    for key in ("model", "text_model", "text_ema", "text_icl_scale"):
        assert_equal(*(weights_of(folder / run, key) for run in ("run", "whole")))


def test_students_with_and_without_learn_together_as_alone(world):
    cache, folder = world
    texts = {"one": text_config(folder), "none": "teacher"}
    (folder / "other").mkdir()
    texts["other"] = text_config(folder / "other", context_length=8, layers=2)
    for name, text in texts.items():
        train_here(world, text, f"alone-{name}")
    with open_world("cpu") as processes:
        runs = [Run(name, student_with(text), folder / name) for name, text in texts.items()]
        results = train(cache, ImageFolder(folder / "images"), runs, SETTINGS, processes)
    for name, result in zip(texts, results):
        own = name != "none"
        assert (result.num_text_parameters is not None) == ("M (text tower)" in result.line()) == own
        for key in ("model", *(["text_model"] if own else [])):
            assert_equal(weights_of(folder / name, key), weights_of(folder / f"alone-{name}", key))
        assert lines_of(folder / name) == lines_of(folder / f"alone-{name}")


def test_sentences_are_drawn_though_vl_is_off(world):
    settings = SETTINGS.model_copy(update={"loss": LossSettings(pvl=1.0), "temperature": TemperatureSettings()})
    train_here(world, text_config(world[1]), "run", settings)
    metrics = lines_of(world[1] / "run")
    assert metrics[0]["text_pvl"] > 0 and not {"text_vl", "vl_candidates", "text_vl_candidates"} & metrics[0].keys()


def test_a_run_of_before_there_were_text_towers_goes_on_with_the_teachers(world):
    train_here(world, "teacher", "run", stop_after=2)
    path = world[1] / "run/run.json"
    record = json.loads(path.read_text())
    assert record["student"]["own"].pop("text") == "teacher" and record["distill"].pop("batch_texts") == 5
    assert record["parameters"].keys() == {"image_tower"}
    path.write_text(json.dumps(record))
    settings = SETTINGS.model_copy(update={"batch_texts": DistillSettings().batch_texts})
    with pytest.raises(InputError, match=r"student.own.text = 'teacher', but this run asks for"):
        train_here(world, text_config(world[1]), "run", settings.model_copy(update={"batch_texts": 3}))
    assert train_here(world, "teacher", "run", settings).finished


def test_a_loss_of_its_that_breaks_ends_the_run(world, monkeypatch):
    learn = Student.learn

    def broken(self, *arguments):
        learn(self, *arguments)
        self.text.loss = self.text.loss * (math.nan if self.step == 2 else 1)

    monkeypatch.setattr(Student, "learn", broken)
    with pytest.raises(InputError, match="the loss of step 2 is not finite"):
        train_here(world, text_config(world[1]), "run")


def test_token_ids_are_those_of_the_rows_own_sentences(world):
    cache, folder = world
    spec = text_config(folder)
    ids = SentenceTokens(cache.sentences, [spec, spec])(np.array([7, 0, 29]))
    assert torch.equal(ids[spec], SimpleTokenizer(context_length=12)(["s7", "s0", "s29"]))


def test_a_tokenizer_that_forgets_gives_the_same_ids(world, monkeypatch):
    cache, folder = world
    spec = text_config(folder)
    tokens, rows = SentenceTokens(cache.sentences, [spec]), np.arange(30)
    before = tokens(rows)[spec]
    monkeypatch.setattr("dimefm.stages.load.sentence_tokens._WORDS_KEPT", 0)
    for _ in range(2):
        assert torch.equal(tokens(rows)[spec], before)
    assert tokens._tokenizers[0][0].cache == {word: word for word in ("<start_of_text>", "<end_of_text>")}


def test_a_class_vector_is_the_mean_of_its_prompts_one_by_one(tmp_path):
    spec = text_config(tmp_path)
    torch.manual_seed(0)
    tower = build_text_student(spec, 16)
    prompts = [["a red thing", "something red"], ["one green"], ["blue", "a blue", "very blue"]]
    head = TextStudent(tower, text_tokenizer(spec), CPU).class_head(prompts)
    alone = TextTransformer(12, 49408, 16, 2, 1, output_dim=16).eval()
    alone.load_state_dict(tower.state_dict())  # open_clip's names
    tokenizer = SimpleTokenizer(context_length=12)
    with torch.no_grad():
        for row, of_class in zip(head, prompts, strict=True):
            units = [F.normalize(alone(tokenizer([text]))[0].double(), dim=0) for text in of_class]
            wanted = F.normalize(torch.stack(units).mean(dim=0), dim=0)
            np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_teacher):
    """A world whose student has the teacher's text tower for its own, its weights put into the checkpoint by hand."""
    folder = tmp_path_factory.mktemp("scored")
    path = make_world(folder, tiny_teacher)
    text = path.read_text().replace("[student.vit]", f'text = "{tiny_teacher[0]}"\n[student.vit]')
    text = text.replace("batch_sentences = 12", "batch_sentences = 12\nbatch_texts = 8\nema = 0.9")
    (folder / "pairs.json").write_text(json.dumps({f"c_red/{i}.png": [f"red {i}", "some red"] for i in range(3)}))
    path.write_text(text + 'captions = "pairs.json"\n')
    config = load_config(path)
    cache_teacher(config)
    distill(config, [], stop_after=1)
    return path


def test_a_student_whose_text_tower_is_the_teachers_scores_as_with_the_teachers(scored):
    run = scored.parent / "runs/small"
    trained = evaluate([run])[str(run)]["dev"]
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    from safetensors.torch import load_file

    tower = load_file(scored.parent / "cache/text_tower/open_clip_text.safetensors")
    own = {name: tower[name] for name in checkpoint["text_ema"]}
    assert not torch.equal(own["text_projection"], checkpoint["text_ema"]["text_projection"])
    save_checkpoint(run / "checkpoint.pt", {**checkpoint, "text_ema": own})
    try:
        scores = evaluate([scored])
    finally:
        save_checkpoint(run / "checkpoint.pt", checkpoint)
    as_teacher = scores[str(run)]["dev"]
    assert as_teacher["student_top1"] == as_teacher["student_top1_teacher_text"] == trained["student_top1_teacher_text"]
    assert as_teacher["student_top1_interval"] == as_teacher["student_top1_teacher_text_interval"]
    assert as_teacher["teacher_top1"] == trained["teacher_top1"]
    assert "student_top1_teacher_text" not in scores[str(scored.parent / "runs/vit")]["dev"]
    assert "top-1 by teacher's text" in score_table(scores)
    head = load_text_student(run, "cpu")
    head.tower.load_state_dict(own)
    prompts = [[f"a {name[2:]} picture", f"something {name[2:]}"] for name in ("c_blue", "c_green", "c_red", "c_white")]
    cached = FeatureCache.open(scored.parent / "cache").evaluate["dev"].head
    np.testing.assert_allclose(head.class_head(prompts), cached, rtol=1e-4, atol=1e-5)


def test_retrieval_asks_the_students_own_text_tower(scored, monkeypatch):
    run = scored.parent / "runs/small"
    asked = []
    encode = TextStudent.encode_sentences
    monkeypatch.setattr(
        TextStudent, "encode_sentences", lambda self, texts: asked.append(list(texts)) or encode(self, texts)
    )
    found = evaluate([run])[str(run)]["dev"]["retrieval"]
    assert asked[-1] == [text for i in range(3) for text in (f"red {i}", "some red")]
    assert found["captions"] == 6


def test_other_templates_than_the_teachers_are_refused(scored, capsys):
    templates = scored.parent / "templates.txt"
    kept = templates.read_text()
    templates.write_text("a drawing of {}\n")
    try:
        line = refused(capsys, "evaluate", scored.parent / "runs/small")
    finally:
        templates.write_text(kept)
    assert "evaluate.dev.templates" in line and "not those that the cache's class vectors were made with" in line


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"hf_model_name": "roberta-base"}, "its hf_model_name is 'roberta-base'.*downloads nothing"),
        ({"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}, "its hf_tokenizer_name is"),
        ({"vocab_size": 100}, "vocab_size = 100, but its tokenizer"),
        ({"width": 15}, "its text tower cannot be built"),
        ({"depth": 3}, "its text tower cannot be built .*depth"),
        ({"proj_type": "none", "width": 32}, r"emits \(2, 32\) for 2 sentences; wanted \(2, 16\)"),
        ({"pool_type": "first"}, "says the same of two sentences"),
        ({"tokenizer_kwargs": {"colour": 1}}, "its tokenizer cannot be built .*colour"),
    ],
)
def test_a_config_that_makes_no_text_tower_is_refused_in_one_line(tmp_path, more, wanted):
    with pytest.raises(InputError, match=wanted) as caught:
        build_text_student(text_config(tmp_path, **more), 16)
    assert "\n" not in str(caught.value)


def test_an_architecture_or_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="'ViT-S-33': open_clip has no such architecture; did you mean ViT-S-32"):
        build_text_student("ViT-S-33", 16)
    with pytest.raises(InputError, match="no such file"):
        build_text_student(str(tmp_path / "none.json"), 16)
    (tmp_path / "half.json").write_text('{"embed_dim": 16, "vision_cfg": {}}')
    with pytest.raises(InputError, match="no text_cfg in it"):
        build_text_student(str(tmp_path / "half.json"), 16)


def test_a_coca_config_gives_one_embedding(tmp_path):
    spec = text_config(tmp_path, embed_cls=True, output_tokens=True)
    tower = build_text_student(spec, 16)
    assert tower(text_tokenizer(spec)(["a", "b"])).shape == (2, 16)


@pytest.mark.parametrize(
    ("update", "wanted"),
    [
        ({"batch_texts": 13}, "distill.batch_texts = 13: more than distill.batch_sentences = 12"),
        ({"batch_sentences": 0, "loss": LossSettings(pvl=1.0)}, "batch_sentences = 0, but a student's text tower"),
    ],
)
def test_settings_that_leave_it_without_texts_are_refused(world, update, wanted):
    with pytest.raises(InputError, match=wanted):
        train_here(world, text_config(world[1]), "run", SETTINGS.model_copy(update=update))


def test_a_config_names_an_architecture_or_a_file_beside_it(tmp_path, tiny_teacher):
    path = make_world(tmp_path, tiny_teacher, num_images=1)
    base = path.read_text()
    path.write_text(base.replace("[student.vit]", 'text = "texts/tiny.json"\n[student.vit]'))
    config = load_config(path)
    assert config.student["small"].text == str(tmp_path / "texts/tiny.json")
    assert config.student["vit"].text == "teacher"
    path.write_text(base.replace("[student.vit]", 'text = "ViT-S-33"\n[student.vit]'))
    with pytest.raises(InputError, match=r"student.small.text: open_clip has no architecture 'ViT-S-33'; did you mean"):
        load_config(path)
