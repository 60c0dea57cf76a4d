"""The config: every shipped one loads, everything wrong is refused in one line with the key's full name."""

import subprocess
import sys
from pathlib import Path

import pytest

import dimefm
from dimefm.cache.errors import InputError
from dimefm.pipeline.config.load import load_config

ROOT = Path(dimefm.__file__).parent
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))

MINIMAL = """
[teacher]
model = "ViT-B-32"
pretrained = "openai"
[images]
source = "images/"
[sentences]
source = ["captions.txt"]
[cache]
dir = "cache"
"""


def write(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refused(folder, text):
    with pytest.raises(InputError) as caught:
        load_config(write(folder, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert load_config(path).student


def test_some_configs_are_shipped():
    assert SHIPPED


def test_relative_paths_start_at_the_configs_own_folder(tmp_path):
    config = load_config(write(tmp_path, MINIMAL.replace('"openai"', '"weights/b32.safetensors"')))
    assert config.images.source == tmp_path / "images"
    assert config.sentences.source == [tmp_path / "captions.txt"]
    assert config.cache.dir == tmp_path / "cache"
    assert config.teacher.pretrained == str(tmp_path / "weights/b32.safetensors")
    assert config.distill.output == tmp_path / "runs"


def test_a_tag_is_not_taken_for_a_path(tmp_path):
    assert load_config(write(tmp_path, MINIMAL)).teacher.pretrained == "openai"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('"cache"', '"cache"\nshard_row = 5'), "cache.shard_row: no such key; did you mean 'shard_rows'?"),
        (('"cache"', '"cache"\nshard_rows = 0'), "cache.shard_rows: Input should be greater than or equal to 1"),
        (('"cache"', '"cache"\nshard_rows = "many"'), "cache.shard_rows: Input should be a valid integer"),
        (("[cache]", '[teachers]\nmodel = "x"\n[cache]'), "teachers: no such key; did you mean 'teacher'?"),
        (('dir = "cache"', ""), "cache.dir: missing"),
        (('pretrained = "openai"', 'precision = "fp8"'), "teacher.precision: Input should be 'fp32', 'fp16' or 'bf16'"),
        (
            ('"ViT-B-32"', '"ViT-B-23"'),
            "teacher.model: open_clip has no architecture 'ViT-B-23'; did you mean ViT-B-32",
        ),
        (
            ("[cache]", "[distill.loss]\nvl = -1.0\n[cache]"),
            "distill.loss.vl: Input should be greater than or equal to 0",
        ),
        (("[cache]", "[distill]\nclip_grad_norm = inf\n[cache]"), "distill.clip_grad_norm: Input should be a finite"),
        (("[cache]", "[distill.loss]\nvl = nan\n[cache]"), "distill.loss.vl: Input should be "),
        (("[cache]", "[distill.augment]\nratio = [1.0, inf]\n[cache]"), "distill.augment.ratio.1: Input should be "),
        (("[cache]", "[distill.loss]\nlogit_scale = 0.0\n[cache]"), "distill.loss.logit_scale: "),
        (("[cache]", "[distill.loss]\nfeature = 0.0\n[cache]"), "distill.loss: every loss is off"),
        (("[cache]", "[distill.augment]\nscale = [0.9, 0.1]\n[cache]"), "distill.augment: scale = [0.9, 0.1]"),
        (('pretrained = "openai"', 'device = "gpu"'), "teacher.device: "),
        (("[cache]", '[distill]\ndevice = "cuda:"\n[cache]'), "distill.device: "),
        (("[cache]", '[student.a]\nmodel = "resnet"\n[cache]'), "student.a.model: "),
        (("[cache]", '[student.a]\nmodel = "open_clip:ViT-B-33"\n[cache]'), "student.a.model: open_clip has no"),
        (("[cache]", '[student."../up"]\nmodel = "timm:x"\n[cache]'), "student: the name '../up' becomes a folder"),
        (("[cache]", "[cache"), "not TOML"),
    ],
)
def test_what_is_wrong_is_refused_with_the_keys_full_name(tmp_path, change, says):
    assert says in refused(tmp_path, MINIMAL.replace(*change))


def test_the_papers_augmentation_is_a_preset(tmp_path):
    config = load_config(write(tmp_path, MINIMAL + '[distill.augment]\npreset = "paper"\nflip = false\n'))
    assert config.distill.augment.scale == (0.08, 1.0)
    assert config.distill.augment.flip is False


def test_losses_that_are_not_named_are_on_by_default_and_off_beside_one_that_is(tmp_path):
    def loss(text: str) -> dict[str, float]:
        weights = load_config(write(tmp_path, MINIMAL + text)).distill.loss.model_dump()
        return {name: weight for name, weight in weights.items() if isinstance(weight, float) and weight}

    assert loss("") == loss("[distill]\nepochs = 1\n") == {"vl": 0.7, "pvl": 0.3, "icl": 1.0}
    assert loss("[distill.loss]\nvl = 1.0\n") == {"vl": 1.0}


def test_a_missing_file_and_a_folder_are_one_line_each(tmp_path):
    for path, says in ((tmp_path / "none.toml", "no such config file"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=says):
            load_config(path)


def test_a_bad_config_is_refused_before_torch_loads(tmp_path):
    path = write(tmp_path, MINIMAL.replace('"ViT-B-32"', '"ViT-B-23"'))
    program = (
        "import sys; from dimefm.cli import main\n"
        f"sys.argv = ['dimefm', 'cache-teacher', {str(path)!r}]\n"
        "try: main()\n"
        "except SystemExit as leave: assert leave.code == 1, leave.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
