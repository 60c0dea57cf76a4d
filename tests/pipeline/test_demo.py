"""The demo: complete, safe to repeat, and fit for the rest of the program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dimefm.cache.errors import InputError
from dimefm.pipeline import demo
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.demo import DemoSize, write_demo
from dimefm.stages.demo.scene_captions import TEMPLATES, classes
from dimefm.stages.demo.scenes import COLOURS, HELD_OUT, SHAPES

TINY = DemoSize(num_images=30, num_sentences=40, num_per_class=1)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new"
    write_demo(folder, size=TINY)
    return folder


def test_its_config_is_accepted_and_everything_it_names_is_there(tiny_demo):
    config = load_config(tiny_demo / "demo.toml")
    named = [config.images.source, *config.sentences.source, config.teacher.model, config.teacher.pretrained]
    for labelled in config.evaluate.values():
        named += [labelled.images, labelled.classes, labelled.templates]
    assert all(Path(path).exists() for path in named)
    assert set(config.evaluate) == {"dev", "test", "heldout"}
    assert len({student.model for student in config.student.values()}) == 2


def test_it_has_as_much_of_everything_as_asked_for(tiny_demo):
    sentences = (tiny_demo / "captions.txt").read_text().splitlines()
    assert len(sentences) == len(set(sentences)) == TINY.num_sentences
    assert len(list(tiny_demo.glob("images/00/*.jpg"))) == TINY.num_images


@pytest.mark.parametrize(
    ("name", "class_file"), [("dev", "classes.json"), ("test", "classes.json"), ("heldout", "classes_heldout.json")]
)
def test_a_labelled_set_has_one_folder_for_each_class(tiny_demo, name, class_file):
    class_ids = json.loads((tiny_demo / class_file).read_text())
    assert {path.name for path in (tiny_demo / name).iterdir()} == set(class_ids)
    assert {len(list(path.iterdir())) for path in (tiny_demo / name).iterdir()} == {TINY.num_per_class}


def test_a_labelled_picture_shows_its_class_and_nothing_else():
    for path, scene in demo.pictures(TINY):
        place, label = path.split("/")[:2]
        if place != "images":
            (thing,) = scene.things
            assert f"{thing.colour}-{thing.shape}" == label


def test_held_out_classes_are_in_no_training_image_and_in_no_sentence(tiny_demo):
    held_out = {f"{colour} {shape}" for colour, shape in HELD_OUT}
    assert {name for names in classes(held_out=True).values() for name in names} == held_out
    shown = [thing for path, scene in demo.pictures(TINY) if path.startswith("images/") for thing in scene.things]
    assert not {f"{thing.colour} {thing.shape}" for thing in shown} & held_out
    sentences = (tiny_demo / "captions.txt").read_text()
    assert not [name for name in held_out if name in sentences]


def test_the_two_class_files_share_no_class_and_make_up_all_of_them():
    seen, held_out = set(classes(held_out=False)), set(classes(held_out=True))
    assert not seen & held_out
    assert len(seen | held_out) == len(COLOURS) * len(SHAPES)


def test_a_repeat_writes_nothing(tiny_demo):
    before = stamps(tiny_demo)
    write_demo(tiny_demo, size=TINY)
    assert stamps(tiny_demo) == before


@pytest.mark.parametrize("stop_at", ["writing sentences", "drawing pictures"])
def test_cut_off_and_repeated_it_ends_with_the_same_bytes(tiny_demo, tmp_path, stop_at):
    def stop(text, done, total):
        if text == stop_at and done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", stop, TINY)
    (tmp_path / "demo" / ".left.over.partial").touch()
    assert not (tmp_path / "demo" / "demo.toml").exists()
    write_demo(tmp_path / "demo", size=TINY)
    assert contents(tmp_path / "demo") == contents(tiny_demo)


def test_a_picture_that_a_power_cut_left_empty_is_drawn_again(tiny_demo):
    picture = tiny_demo / "images" / "00" / "000007.jpg"
    before = picture.read_bytes()
    picture.write_bytes(b"")
    write_demo(tiny_demo, size=TINY)
    assert picture.read_bytes() == before


def test_a_folder_in_other_use_and_a_demo_of_another_size_are_refused(tiny_demo, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="in other use"):
        write_demo(tmp_path, size=TINY)
    with pytest.raises(InputError, match="another size"):
        write_demo(tiny_demo, size=DemoSize(num_images=31))


def test_the_teacher_is_an_open_clip_checkpoint(tiny_demo):
    import torch

    from dimefm.stages.models.load_teacher import load_teacher
    from dimefm.stages.settings.models import TeacherSettings

    files = TeacherSettings(model=str(tiny_demo / "teacher.json"), pretrained=str(tiny_demo / "teacher.safetensors"))
    teacher = load_teacher(files, torch.device("cpu"))
    assert teacher.encode_images(torch.zeros(2, 3, 64, 64)).shape == (2, 128)
    assert len(teacher.encode_sentences([template.format("red star") for template in TEMPLATES])) == len(TEMPLATES)


def test_making_the_demo_imports_no_torch(tmp_path):
    program = (
        "import sys; from pathlib import Path; from dimefm.pipeline.demo import DemoSize, write_demo\n"
        "write_demo(Path(sys.argv[1]), size=DemoSize(num_images=1, num_sentences=1, num_per_class=1))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "demo")], check=True)
