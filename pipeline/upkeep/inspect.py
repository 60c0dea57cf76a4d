"""`dimefm cache inspect`: a screenful on what is in a cache."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ...cache.audit.failures import arrays_of, failed_rows, list_failures
from ...cache.audit.inspect import QUANTILES, inspect_cache, skewness
from ...cache.disk.layout import Layout
from ...cache.reader.feature_cache import FeatureCache
from ...cache.version.journal import Journal
from ...cache.version.manifest import read_manifest
from ...cache.version.plan_file import read_plan
from ...cache.version.schema import Plan
from ...stages.retrieve.hubs import PairScores, Ranking, in_degrees
from ..progress import short, show_counts

NAME_WIDTH = 48


def inspect(folder: Path) -> dict[str, Any]:
    """Look into a cache; nothing is written and no model is loaded.

    Of one that is not finished, only the teacher and, for each array, its rows, its shards and the failures so far.

    Raises:
        CacheError: if the cache is foreign or damaged, or stage one has not listed its rows yet.
    """
    layout = Layout(folder)
    plan = read_plan(layout)
    if plan is not None and read_manifest(layout) is None:
        return _inspect_unfinished(layout, plan)
    cache = FeatureCache.open(folder)
    found = inspect_cache(cache)
    if "image_to_sentence" in found["hubs"]:
        found["hubs"]["image_to_sentence"]["nearest"] = _nearest(cache)
    return found


def _inspect_unfinished(layout: Layout, plan: Plan) -> dict[str, Any]:
    journal, arrays = Journal(layout), {}
    for array, num_rows in arrays_of(plan).items():
        reasons = Counter(failed_rows(layout, plan, array).values())
        num_shards = -(-num_rows // plan.shard_rows)
        arrays[array] = {
            "rows": num_rows,
            "failed": reasons.total(),
            "reasons": dict(sorted(reasons.items())),
            "shards": num_shards,
            "shards_done": len(journal.of(array)),
        }
    teacher = plan.teacher.to_dict()
    return {"cache": str(layout.root), "state": "unfinished", "teacher": teacher, "arrays": arrays}


def inspect_failed(folder: Path) -> dict[str, Any]:
    """Every row without an embedding, of a cache that is finished or is not.

    Returns:
        `cache`, and `failed`: for each row `set` (`images`, `sentences`, `evaluate.NAME`), `row`, `name` (path of the
        image, text of the sentence), `origin` (name of the sentence's file) and `reason`.

    Raises:
        CacheError: if there is no cache, or it is damaged.
    """
    return {"cache": str(folder), "failed": [asdict(failure) for failure in list_failures(Layout(folder))]}


def failed_lines(found: dict[str, Any]) -> list[str]:
    """A line for each row, its parts between tabs: set, row, name, reason."""
    return [
        "\t".join((item["set"], str(item["row"]), _one_line(item["name"]), item["reason"])) for item in found["failed"]
    ]


def _one_line(name: str) -> str:
    return name if name.isprintable() and name.strip() else repr(name)


def _nearest(cache: FeatureCache) -> dict[str, dict[str, float]]:
    """For each ranking: how evenly sentences are an image's very first one. All its neighbours no ranking changes."""
    usable, shown = cache.sentences.usable, {}
    for ranking in get_args(Ranking):
        counts = in_degrees(PairScores.of(cache, ranking, float(cache.teacher["logit_scale"])), first=1)
        degrees = counts[usable]
        shown[ranking] = {
            "max": int(counts.max(initial=0)),
            "never": float(np.mean(degrees == 0)) if len(degrees) else 1.0,
            "skewness": skewness(degrees) if len(degrees) else 0.0,
        }
    return shown


def inspect_lines(found: dict[str, Any]) -> list[str]:
    """The same for a person to read."""
    if found.get("state") == "unfinished":
        return _unfinished_lines(found)
    teacher, sizes = found["teacher"], found["bytes"]
    libraries = ", ".join(f"{name} {version}" for name, version in sorted((teacher["libraries"] or {}).items()))
    wide = max(30, *map(len, found["arrays"]))
    lines = [
        f"{found['cache']}: version {found['version']}, format {found['format']}, identity {found['identity']}",
        f"teacher: {teacher['model']} / {teacher['pretrained']}, {teacher['precision']}, {teacher['embed_dim']} "
        f"dimensions, logit scale {teacher['logit_scale']:.4g}, batches of {teacher['batch_size']}",
        f"made with: {libraries or 'not recorded'}",
        "",
        f"{'rows':<{wide + 2}}{'all':>13}{'failed':>10}  reasons",
    ]
    for name, item in found["arrays"].items():
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in (item.get("reasons") or {}).items())
        lines.append(f"  {name:<{wide}}{item['rows']:>13,}{item.get('failed', 0):>10,}  {reasons}".rstrip())
    for name, item in found["evaluate"].items():
        seen = "; its class names are among the sentences" if name in found["transductive"] else ""
        lines.append(f"  evaluate.{name}: {item['classes']:,} classes{seen}")
    kinds = ", ".join(f"{kind.replace('_', ' ')} {_size(n)}" for kind, n in sizes.items() if n and kind != "total")
    lines += ["", f"size: {_size(sizes['total'])}, {found['shard_rows']:,} rows a chunk: {kinds}"]
    masks = [f"{m['side']}/{m['name']} keeps {m['kept']:,} of {m['of']:,}" for m in found["masks"]]
    lines.append(f"masks: {', '.join(masks) or 'none'}")
    for side, info in found["index"].items():
        recall = (
            "not measured" if info["recall"] is None else f"{info['recall']:.3f} on {info['recall_queries']} queries"
        )
        probed = f", {info['nprobe']} of {info['nlist']} lists probed" if info.get("nlist") else ""
        lines.append(f"index over {side}: {info['type']}, recall@{info['recall_k']} {recall}{probed}")
    lines.append(f"pairs: {found['pairs']['k']} neighbours each way" if found["pairs"] else "pairs: none")
    if views := found["views"]:
        settings = ", ".join(f"{key} {value}" for key, value in views["crops"].items())
        lines.append(f"views: the centre and {views['count']} crops of each image ({settings})")
    else:
        lines.append("views: the centre alone")
    if kept := found["pixels"]:
        whose = f"{_size(kept['mean_bytes'])} a picture" if kept["own"] else "of the cache whose rows it shares"
        lines.append(f"pixels: {kept['setting']}, {whose}")
    else:
        lines.append("pixels: none kept")
    lines += ["", "cosine" + " " * 26 + "".join(f"{100 * q:>8g} %" for q in QUANTILES)]
    for name, values in found["similarity"].items():
        shown = "".join(f"{values[str(q)]:>10.3f}" for q in QUANTILES) if values else "  nothing to measure"
        lines.append(f"  {name.replace('_', ' '):<30}{shown}")
    if found["hubs"]:
        lines += ["", f"{'retrieved':<32}{'mean':>10}{'max':>10}{'skewness':>10}{'never':>9}  most often"]
    for name, item in found["hubs"].items():
        most = "" if item["max_row"] is None else f"{item['max_row']:,} {short(item['max_name'], NAME_WIDTH)}"
        numbers = f"{item['mean']:>10.2f}{item['max']:>10,}{item['skewness']:>10.2f}{100 * item['never']:>7.1f} %"
        lines.append(f"  {name.rsplit('_', 1)[-1] + 's':<30}{numbers}  {most}".rstrip())
    for ranking, item in found["hubs"].get("image_to_sentence", {}).get("nearest", {}).items():
        numbers = f"{'':>10}{item['max']:>10,}{item['skewness']:>10.2f}{100 * item['never']:>7.1f} %"
        lines.append(f"  {'sentences, first by ' + ranking.replace('_', ' '):<38}{numbers[8:]}")
    return lines


def _unfinished_lines(found: dict[str, Any]) -> list[str]:
    teacher, wide = found["teacher"], max(map(len, found["arrays"]))
    lines = [
        f"{found['cache']}: unfinished; `dimefm cache-teacher` goes on with it",
        f"teacher: {teacher['model']} / {teacher['pretrained']}",
    ]
    for name, item in found["arrays"].items():
        done = f"{item['shards_done']:,} of {item['shards']:,} shards done"
        reasons = f": {show_counts(item['reasons'])}" if item["failed"] else ""
        lines.append(f"  {name:<{wide}}  {item['rows']:,} rows, {done}, {item['failed']:,} failed{reasons}")
    if any(item["failed"] for item in found["arrays"].values()):
        lines.append(f"`dimefm cache inspect {found['cache']} --failed` lists the failed rows")
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.3g} MB"
