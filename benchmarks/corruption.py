"""Damage a cache at random and see whether `verify` finds all of it and `repair` mends all of it.

    python benchmarks/corruption.py [CONFIG] [--flips 200] [--cuts 20] [--extras 20] [--rounds 20] [--seed 0]

CONFIG is a config whose stage one is run first if need be; without one, a small world with a random teacher is made.
The damage: single bytes changed, files cut at a random place, files that do not belong, spread over every kind of file
that a cache has. It is done in rounds; after each, every damaged file must be named by `verify`, and after `repair`,
with teacher and sources at hand, every file must have the bytes that it had before. Prints a table by kind of file and
exits with 1 when anything was missed or left.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from dimefm.cache.disk.durable import digest
from dimefm.cache.disk.layout import Layout
from dimefm.cache.reader.masks import Side, add_mask
from dimefm.cache.version.manifest import read_manifest
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.append import append_to
from dimefm.pipeline.upkeep.repair.repair import repair
from dimefm.pipeline.upkeep.verify import verify

KINDS = {
    "manifest": ("manifest.json", "manifest.xxh3"),
    "plan": ("plan",),
    "row tables": ("rows/",),
    "embeddings": ("teacher.zarr/images/embedding/c/", "teacher.zarr/sentences/embedding/c/"),
    "evaluation": ("teacher.zarr/evaluate/",),
    "pairs": ("pairs",),
    "indexes": ("index/",),
    "text tower": ("text_tower/",),
    "masks": ("masks/",),
    "kept pixels": ("pixels/",),
}
FLIP, CUT, EXTRA = "byte changed", "cut", "extra"


def kind_of(name: str) -> str:
    """The row of the table that a file counts in."""
    if name.endswith("zarr.json"):
        return "zarr metadata"
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "other")


def tree(root: Path) -> dict[str, str]:
    """Digest of every file of a cache but its log, which has times in it, and what an older version has left."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    found = {path.relative_to(root).as_posix(): digest(path.read_bytes()) for path in files}
    manifest = read_manifest(Layout(root))
    old = set(manifest.superseded) if manifest else set()
    return {name: value for name, value in found.items() if not name.startswith("log/") and name not in old}


def flip(path: Path, rng: random.Random) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Cut a file somewhere."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def damage(root: Path, counts: dict[str, int], rng: random.Random) -> list[tuple[str, str]]:
    """Damage as many files as asked for, each once, of every kind in turn; returns (what, file)."""
    by_kind = defaultdict(list)
    for name in tree(root):
        by_kind[kind_of(name)].append(name)
    kinds = sorted(by_kind)
    for names in by_kind.values():
        rng.shuffle(names)
    rng.shuffle(kinds)
    done: list[tuple[str, str]] = []
    for what, spoil in ((FLIP, flip), (CUT, cut)):
        for i in range(counts[what]):
            left = [kind for kind in kinds[i % len(kinds) :] + kinds if by_kind[kind]]
            name = by_kind[left[0]].pop()
            spoil(root / name, rng)
            done.append((what, name))
    folders = sorted({path.parent for path in root.rglob("*") if path.is_file()} - {root / "log"})
    folders = [folder for folder in folders if "log" not in folder.relative_to(root).parts]
    for i in range(counts[EXTRA]):
        path = rng.choice(folders) / rng.choice([f"extra{i}.bin", f"{1000 + i}", f".x{i}.partial"])
        path.write_bytes(rng.randbytes(100))
        done.append((EXTRA, path.relative_to(root).as_posix()))
    return done


def torment(root: Path, totals: dict[str, int], rounds: int, seed: int) -> list[dict[str, object]]:
    """Damage a sound cache in rounds; returns what became of each damage: `what`, `file`, `found`, `mended`."""
    rng, wanted, results = random.Random(seed), tree(root), []
    assert verify(root)["sound"], f"{root} is not sound to begin with"
    for i in range(rounds):
        counts = {what: total // rounds + (i < total % rounds) for what, total in totals.items()}
        damages = damage(root, counts, rng)
        named = {finding["where"] for finding in verify(root)["findings"]}
        repair(root)
        now = tree(root)
        for what, name in damages:
            mended = now.get(name) == wanted.get(name)
            results.append({"what": what, "file": name, "found": name in named, "mended": mended})
        assert verify(root)["sound"] and now == wanted, sorted(set(now.items()) ^ set(wanted.items()))
    return results


def table(results: list[dict[str, object]]) -> str:
    """Found and mended, by kind of file and of damage."""
    lines = [f"{'':<16}" + "".join(f"{what:>22}" for what in (FLIP, CUT, EXTRA))]
    for kind in [*sorted({kind_of(str(result["file"])) for result in results}), "all"]:
        cells = []
        for what in (FLIP, CUT, EXTRA):
            mine = [r for r in results if r["what"] == what and kind in (kind_of(str(r["file"])), "all")]
            found, mended = sum(bool(r["found"]) for r in mine), sum(bool(r["mended"]) for r in mine)
            cells.append(f"{len(mine)}: {found} / {mended}" if mine else "-")
        lines.append(f"{kind:<16}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join([*lines, "(damaged: found / mended to the same bytes)"])


def small_world(folder: Path) -> Path:
    """A cache with every kind of file in it, grown once, with a random teacher; returns the config."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.support.teachers import make_teacher
    from tests.support.worlds import make_world, picture

    config = make_world(folder, make_teacher(folder / "teacher"), num_images=60, num_sentences=40)
    config.write_text(config.read_text().replace("shard_rows = 4", 'shard_rows = 4\npixels = "jpeg-24"'))
    cache_teacher(load_config(config))
    layout = Layout(load_config(config).cache.dir)
    sides: tuple[tuple[Side, int], ...] = (("images", 60), ("sentences", 40))
    for side, num_rows in sides:
        add_mask(layout, side, "some", np.arange(num_rows) % 3 > 0)
    for i in range(10):
        picture((20 * i, 90, 40), 100 + i).save(folder / "images" / f"new{i}.png")
    with (folder / "captions.txt").open("a") as file:
        file.writelines(f"one more line, number {i}\n" for i in range(7))
    append_to(layout.root, config)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--extras", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = options.config or small_world(Path(folder))
        cache_teacher(load_config(config))
        root = Path(folder) / "copy"  # the user's own stays as it is
        shutil.copytree(load_config(config).cache.dir, root, symlinks=True)
        totals = {FLIP: options.flips, CUT: options.cuts, EXTRA: options.extras}
        results = torment(root, totals, options.rounds, options.seed)
    print(table(results))
    if not all(result["found"] and result["mended"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
