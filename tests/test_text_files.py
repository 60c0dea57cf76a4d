"""Every text file that a user edits: a byte order mark and Windows' line ends change nothing, UTF-16 is one line."""

import codecs
import json
from pathlib import Path

import pytest

from dimefm.cache import InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.row_masks.mask import _read as read_keep
from dimefm.stages.inputs.prompts import read_classes, read_templates
from dimefm.stages.inputs.sentences import read_sentences
from dimefm.stages.models.architectures import model_config
from dimefm.stages.models.teacher_identity import configured_embed_dim
from dimefm.stages.models.tokenizer import load_tokenizer
from dimefm.stages.score.recall import read_captions
from dimefm.stages.settings.models import TeacherSettings

from .support.teachers import teacher_config
from .support.worlds import CONFIG

MODEL = json.dumps(teacher_config(), indent=1)


def captions(path):
    texts, rows = read_captions(path, ["a.png"], "dev")
    return texts, rows.tolist()


FILES = {
    "config": (
        "run.toml",
        CONFIG.format(model="tiny.json", weights="tiny.pt"),
        lambda path: load_config(path).model_dump(),
    ),
    "sentences": ("s.txt", "a bird\nzwei Vögel\n", lambda path: [line.text for line in read_sentences([path])]),
    "classes": ("classes.json", '{"a": ["ä"],\n "b": ["b"]}\n', read_classes),
    "templates": ("t.txt", "ein {}\na {} é\n", lambda path: read_templates(str(path))),
    "captions": ("captions.json", '{"a.png":\n ["ä bird"]}\n', captions),
    "keep": ("keep.txt", "3\n1\n", lambda path: read_keep(path, 5).tolist()),
    "model": ("m.json", MODEL, lambda path: model_config(str(path), ["embed_dim"], str(path))),
    "folder": (
        "open_clip_config.json",
        json.dumps({"model_cfg": teacher_config(), "preprocess_cfg": {}}, indent=1),
        lambda path: load_tokenizer(f"local-dir:{path.parent}")(["a bird"]).tolist(),
    ),
    "width": ("m.json", MODEL, lambda path: configured_embed_dim(TeacherSettings(model=str(path), pretrained="x.pt"))),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path, kind: str) -> None:
    name, text, read = FILES[kind]
    path = tmp_path / name
    path.write_bytes(text.encode())
    wanted = read(path)
    path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    assert read(path) == wanted


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"], ids=["with a mark", "without"])
@pytest.mark.parametrize("kind", [kind for kind in FILES if kind not in ("width", "folder")])
def test_utf_16_is_one_clear_line(tmp_path: Path, kind: str, encoding: str) -> None:
    name, text, read = FILES[kind]
    (tmp_path / name).write_bytes(text.lstrip().encode(encoding))
    with pytest.raises(InputError, match=rf"{name}.*encoded as UTF-16.*wanted UTF-8, for example by iconv -f UTF-16"):
        read(tmp_path / name)
