"""Recipes of stage two on the real photos, held against each other: which of them makes the better students?

    python benchmarks/recipes.py prepare                        # stage one, masks of sentences, a cache of five crops
    python benchmarks/recipes.py screen [RECIPE ...]            # one seed of each, scored on dev
    python benchmarks/recipes.py finals RECIPE RECIPE ...       # five seeds of each, scored on dev
    python benchmarks/recipes.py test RECIPE RECIPE ...         # the finalists, once, on test, beside the first
    python benchmarks/recipes.py table                          # what there is so far, as Markdown

`recipes.toml` lists them. Every one trains two students, one convolutional and one transformer, from the finished cache
of configs/photos.toml, all with the same number of steps; choices are made on dev, test is looked at by `test` alone.
One process of one thread for each training, as many at a time as there are cores. It may run for hours, in pieces: what
is finished is not done again, what was interrupted goes on from its checkpoint.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

FAMILIES: dict[str, dict[str, Any]] = {
    "conv": {"model": "timm:mobilenetv3_small_100", "precision": "fp32"},
    "transformer": {"model": "timm:levit_128s", "precision": "bf16"},  # twice as fast so; the convolutions are not
}
EPOCHS, LR, SEEDS = 8, 3e-3, 5
Document = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["prepare", "screen", "finals", "test", "table", "one"])
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/recipes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", default="dev", help="of `one`: the set that is scored")
    asked = parser.parse_args()
    known = read_recipes()
    if unknown := [name for name in asked.recipes if name.split("/")[0] not in known]:
        parser.error(f"no such recipe: {', '.join(unknown)}; there is {', '.join(known)}")
    if asked.what == "one":
        train_and_score(asked.out, asked.recipes[0], asked.set)
    elif asked.what == "prepare":
        prepare()
    elif asked.what == "table":
        print("\n".join(table(asked.out, known)))
    elif asked.what == "test":
        run_all(asked.out, jobs_of(asked.recipes, SEEDS), asked.jobs, "test")
        print("\n".join(test_table(asked.out, known, asked.recipes)))
    else:
        names = asked.recipes or list(known)
        run_all(asked.out, jobs_of(names, SEEDS if asked.what == "finals" else 1), asked.jobs, "dev")
        print("\n".join(table(asked.out, known)))


def read_recipes() -> dict[str, Document]:
    """Recipes by name, in the order of the file."""
    return tomllib.loads((ROOT / "benchmarks/recipes.toml").read_text())


def jobs_of(recipes: Sequence[str], seeds: int) -> list[str]:
    return [f"{recipe}/{family}/{seed}" for seed in range(seeds) for recipe in recipes for family in FAMILIES]


def run_all(out: Path, jobs: Sequence[str], at_a_time: int, name: str) -> None:
    """Each job in a process of its own, one thread each."""
    left = [job for job in jobs if not (out / job / f"{name}.json").exists()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(job: str) -> None:
        command = [sys.executable, __file__, "one", job, "--out", str(out), "--set", name]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or [""])[-1]
        scores = read_scores(out / job, name)
        print(f"{job}: {scores['student_top1']:.1%}" if scores else f"{job}: failed: {last}", flush=True)

    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(run, left))


def prepare() -> None:
    """What recipes want beside the images: the caches and the masks that `recipes.toml` names."""
    import numpy as np

    from dimefm.cache.reader.feature_cache import FeatureCache
    from dimefm.cache.reader.masks import add_mask, mask_names
    from dimefm.pipeline.config.load import Config, load_config
    from dimefm.pipeline.row_masks.select import select
    from dimefm.pipeline.stage_one.cache_teacher import cache_teacher

    config = load_config(ROOT / "configs/photos.toml")
    cache_teacher(config)
    cache = FeatureCache.open(config.cache.dir)
    there = mask_names(cache.manifest, "sentences")
    if "retrieved" not in there:
        select(config.cache.dir, "retrieved", k=8)
    if "csls-4" not in there:
        select(config.cache.dir, "csls-4", k=4, rank="csls", cap=32)
    if "captions" not in there:
        origins = np.array(cache.sentences.rows.column("origin").to_pylist())
        add_mask(cache.layout, "sentences", "captions", origins != "prompts")
    document = merged(config.model_dump(exclude_unset=True), {"cache": views_cache()})
    cache_teacher(Config.model_validate(document))


def views_cache() -> Document:
    """`[cache]` of five crops of each photo, over the row tables of the first cache."""
    return {"dir": ROOT / "data/photos-views", "rows": ROOT / "data/photos-cache", "views": 5}


def configure(out: Path, job: str) -> Any:
    """The config of one job: that of the photos with the recipe's changes."""
    from dimefm.pipeline.config.load import Config, load_config

    recipe, family, seed = job.split("/")
    changes = {key: value for key, value in read_recipes()[recipe].items() if key not in ("about", "against")}
    shape = {**FAMILIES[family]}
    common: Document = {
        "distill": {
            "output": out / job, "epochs": EPOCHS, "seed": int(seed), "workers": 1, "precision": shape.pop("precision"),
            "lr": LR, "loss": {}, "log_every": 50, "checkpoint_every": 100,
        }
    }  # fmt: skip
    document = load_config(ROOT / "configs/photos.toml").model_dump(exclude_unset=True)
    document["student"] = {"student": {**shape, "image_size": 64}}
    if "views" in changes.get("distill", {}):
        common["cache"] = views_cache()
    for change in (common, changes):
        document = merged(document, change)
    for student in document["student"].values():
        if "text" in student:
            student["text"] = str(ROOT / "benchmarks" / student["text"])
    return Config.model_validate(document)


def merged(base: Document, changes: Document, path: str = "") -> Document:
    """Tables joined key by key; a table of losses replaces the one before, since one that is not named is off."""
    result = dict(base)
    for key, value in changes.items():
        joins = isinstance(value, dict) and isinstance(result.get(key), dict) and f"{path}{key}" != "distill.loss"
        result[key] = merged(result[key], value, f"{path}{key}.") if joins else value
    return result


def train_and_score(out: Path, job: str, name: str) -> None:
    from dimefm.cache.disk.durable import write_json
    from dimefm.cache.reader.feature_cache import FeatureCache
    from dimefm.pipeline.stage_two.class_prompts import cached_set_prompts
    from dimefm.pipeline.stage_two.distill import distill
    from dimefm.stages.run_folder.load_student import load_student, load_text_student
    from dimefm.stages.score.embed_set import embed_set
    from dimefm.stages.score.predictions import write_predictions, zero_shot_predictions
    from dimefm.stages.score.zero_shot import zero_shot_scores

    config = configure(out, job)
    distill(config, [])
    run = config.distill.output / "student"
    cache = FeatureCache.open(config.cache.dir)
    student, record = load_student(run)
    embedded = embed_set(student, record, cache, name, config.evaluate[name].images, device="cpu", workers=1)
    if (text := load_text_student(run)) is not None:
        head = text.class_head(cached_set_prompts(cache, name, config.evaluate[name].templates))
        embedded = dataclasses.replace(embedded, student_head=head)
    write_predictions(out / job / f"{name}.parquet", zero_shot_predictions(embedded))
    scores = {key: value for key, value in zero_shot_scores(embedded).items() if key != "per_class"}
    write_json(out / job / f"{name}.json", {**scores, "steps": record["step"]})


def read_scores(folder: Path, name: str) -> Document | None:
    path = folder / f"{name}.json"
    return dict(json.loads(path.read_bytes())) if path.exists() else None


def of_recipe(out: Path, recipe: str, family: str, name: str) -> dict[int, Document]:
    """Scores by seed."""
    found = ((seed, read_scores(out / recipe / family / str(seed), name)) for seed in range(SEEDS))
    return {seed: scores for seed, scores in found if scores}


def table(out: Path, known: dict[str, Document]) -> Iterator[str]:
    """What every recipe gave on dev so far, and what that is beside the one that it differs from by one thing."""
    yield "| recipe | conv: top-1 % | cosine | transformer: top-1 % | cosine | top-1 beside | seeds |"
    yield "|---|---|---|---|---|---|---|"
    for name, recipe in known.items():
        cells, gains, seeds = [], [], []
        for family in FAMILIES:
            mine = of_recipe(out, name, family, "dev")
            cells += [spread([one["student_top1"] for one in mine.values()])]
            cells += [f"{statistics.mean(one['cosine'] for one in mine.values()):.2f}" if mine else ""]
            others = of_recipe(out, recipe.get("against", name), family, "dev")
            gains += [mine[seed]["student_top1"] - others[seed]["student_top1"] for seed in mine if seed in others]
            seeds.append(len(mine))
        if not any(seeds):
            continue
        beside = f"{100 * statistics.mean(gains):+.1f} ({recipe['against']})" if gains and "against" in recipe else ""
        yield f"| `{name}`: {recipe['about']} | {' | '.join(cells)} | {beside} | {' / '.join(map(str, seeds))} |"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def test_table(out: Path, known: dict[str, Document], recipes: Sequence[str]) -> Iterator[str]:
    """The finalists on test; the gain over the first is paired over images, its seeds averaged for each image."""
    import numpy as np
    import pyarrow.parquet as pq

    from dimefm.stages.score.bootstrap import paired_interval
    from dimefm.stages.score.predictions import hits

    yield "| recipe | student | top-1 on test, % | retention | gain over the first, points (95 %) |"
    yield "|---|---|---|---|---|"
    mean_hits: dict[tuple[str, str], Any] = {}
    for recipe in recipes:
        for family in FAMILIES:
            scores = of_recipe(out, recipe, family, "test")
            tables = [pq.read_table(out / recipe / family / str(seed) / "test.parquet") for seed in scores]
            mine = np.mean([hits(one) for one in tables], axis=0)
            mean_hits[recipe, family] = mine
            first = mean_hits[recipes[0], family]
            low, high = paired_interval(mine, first)
            gain = f"{100 * (mine - first).mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            top1 = spread([one["student_top1"] for one in scores.values()])
            kept = statistics.mean(one["retention"] for one in scores.values())
            beside = gain if recipe != recipes[0] else ""
            yield f"| {known[recipe]['about']} | {family} | {top1} | {kept:.0%} | {beside} |"


if __name__ == "__main__":
    main()
