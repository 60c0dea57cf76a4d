"""How a teacher wants its images, where its weights come as a file that does not say it.

open_clip knows a tag's preprocessing by the tag alone. The same weights given by path would be prepared as OpenAI's.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg

from ...cache.errors import InputError
from .architectures import read_model_config

CONFIG_NAME = "open_clip_config.json"
_KEYS = ("mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
"""What weights say of their images; the size is the architecture's."""
_TAGS_SHOWN = 2


def of_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a `preprocess_cfg`, or what open_clip knows about a tag, says of images; what is null is not said."""
    return {key: value for key, value in config.items() if key in _KEYS and value is not None}


def preprocessing_of_file(
    weights: Path, model: str, model_cfg: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """What weights given by path want of their images, and one line that says where that is known from.

    That is what an `open_clip_config.json` beside them says if it is one of this architecture, else what the tags of
    the architecture agree on; open_clip's default (OpenAI's) for an architecture without tags.

    Args:
        model: `teacher.model`; a config file or a folder counts as the architecture that its config is a copy of.
        model_cfg: its model config.
        given: keys that the user has set, on which tags need not agree.

    Returns:
        Keys of open_clip's `preprocess_cfg`, and the line, "" where images are prepared as by default.

    Raises:
        InputError: if the tags disagree, naming the key to set; or if the config beside the weights cannot be read.
    """
    said, where = _beside(weights, model_cfg), f"{CONFIG_NAME} beside its weights says"
    if not said:
        said, where = _of_tags(weights, model, model_cfg, given), "the tags of its architecture say"
    cfg = _whole(said)
    if cfg == _whole({}):
        return said, ""
    numbers = ", ".join(f"{key} {cfg[key]}" for key in ("mean", "std"))
    return said, f"{model}: its images are prepared as {where}: {numbers}, {cfg['interpolation']}, {cfg['resize_mode']}"


def _beside(weights: Path, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    path = weights.parent / CONFIG_NAME
    if not path.is_file():
        return {}
    config, preprocess = read_model_config(path, (), str(path))
    same = all(there in (None, here) for there, here in zip(_shape(config), _shape(model_cfg)))
    return of_images(preprocess) if same else {}  # in a folder of several models it is another one's


def _shape(config: Mapping[str, Any]) -> tuple[Any, Any]:
    return config.get("embed_dim"), (config.get("vision_cfg") or {}).get("image_size")


def _of_tags(weights: Path, model: str, model_cfg: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    variants: list[tuple[dict[str, Any], list[str]]] = []
    for name in _architectures(model, model_cfg):
        for tag in open_clip.list_pretrained_tags_by_model(name):
            cfg = _whole({**of_images(open_clip.get_pretrained_cfg(name, tag)), **given})
            tags = next((tags for known, tags in variants if known == cfg), None)
            if tags is None:
                variants.append((cfg, tags := []))
            tags.append(tag)
    if not variants:
        return {}
    first = variants[0][0]
    if len(variants) > 1:
        differing = [key for key in _KEYS if any(cfg[key] != first[key] for cfg, _ in variants)]
        shown = "; ".join(
            f"{{{', '.join(f'{key} = {json.dumps(cfg[key])}' for key in differing)}}} ({_some(tags)})"
            for cfg, tags in variants
        )
        raise InputError(
            f"teacher.preprocess: missing; {weights} does not say how its images are prepared, and the tags of {model} "
            f"differ: {shown}; set teacher.preprocess to that of these weights, or put their {CONFIG_NAME} beside them"
        )
    return first


def _architectures(model: str, model_cfg: Mapping[str, Any]) -> Iterator[str]:
    """Names in open_clip: an architecture's own, or those that the config of a file or a folder is a copy of."""
    known = open_clip.list_models()
    if (name := model.replace("/", "-")) in known:
        yield name
    else:
        yield from (name for name in known if open_clip.get_model_config(name) == model_cfg)


def _whole(said: Mapping[str, Any]) -> dict[str, Any]:
    """All keys, open_clip's defaults for those that are not said; lists instead of tuples."""
    cfg = {**vars(PreprocessCfg()), **said}
    return {key: list(cfg[key]) if isinstance(cfg[key], tuple) else cfg[key] for key in _KEYS}


def _some(tags: list[str]) -> str:
    shown = ", ".join(tags[:_TAGS_SHOWN])
    return shown if len(tags) <= _TAGS_SHOWN else f"{shown} and {len(tags) - _TAGS_SHOWN} more"
