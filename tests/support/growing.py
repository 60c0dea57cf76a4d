"""A finished cache whose sources grow: run stage one, add images and lines, append."""

from pathlib import Path

from dimefm.cache import FeatureCache
from dimefm.cache.disk.layout import Layout
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.append import append

from .worlds import COLOURS, picture


def stage_one(config: Path) -> FeatureCache:
    loaded = load_config(config)
    cache_teacher(loaded)
    return FeatureCache.open(loaded.cache.dir)


def grow(config: Path) -> FeatureCache:
    loaded = load_config(config)
    append(loaded, Layout(loaded.cache.dir))
    return FeatureCache.open(loaded.cache.dir)


def add_images(world: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        path = world / "images" / name
        path.parent.mkdir(exist_ok=True)
        picture(list(COLOURS.values())[i % 4], 500 + i).save(path)


def add_lines(world: Path, *lines: str) -> None:
    with (world / "captions.txt").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def edit(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
