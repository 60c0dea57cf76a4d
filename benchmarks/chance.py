"""What a trained student's score is worth: the same architecture untrained, and the class vectors shuffled.

    python benchmarks/chance.py RUN [--set test]

Both should stay near chance, 1 / classes; the trained student's own score is printed beside them. A shuffle moves every
class vector to another class. Prints per cent, with the standard error of a binomial at chance.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from dimefm.cache import FeatureCache
from dimefm.stages.models.image_student import build_student
from dimefm.stages.run_folder.load_student import load_student
from dimefm.stages.score.embed_set import embed_set
from dimefm.stages.score.zero_shot import zero_shot_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", default="test")
    options = parser.parse_args()
    source = json.loads((options.run / "source.json").read_bytes())
    cache = FeatureCache.open(source["cache"])
    folder = Path(source["evaluate"][options.set])
    student, record = load_student(options.run)
    torch.manual_seed(0)
    settings = record["student"][record["name"]]
    untrained = build_student(settings["model"], record["embed_dim"], settings["image_size"]).eval()

    labelled = cache.evaluate[options.set]
    numbers, classes = np.random.default_rng(0), np.arange(len(labelled.head))
    order = numbers.permutation(classes)
    while (order == classes).any():  # neighbours in the sorted ids are alike: a rotation would leave more than chance
        order = numbers.permutation(classes)
    head = labelled.head[order]
    evaluate = {**cache.evaluate, options.set: dataclasses.replace(labelled, head=head)}
    shuffled = dataclasses.replace(cache, evaluate=evaluate)
    for name, module, where in (
        ("trained", student, cache),
        ("untrained", untrained, cache),
        ("trained, class vectors shuffled", student, shuffled),
    ):
        scores = zero_shot_scores(embed_set(module, record, where, options.set, folder))
        print(f"{name:>32}: student {100 * scores['student_top1']:.1f} %, teacher {100 * scores['teacher_top1']:.1f} %")
    chance, num_images = 1 / len(labelled.class_ids), len(labelled.labels)
    error = (chance * (1 - chance) / num_images) ** 0.5
    print(f"{'chance':>32}: {100 * chance:.1f} % +- {100 * error:.1f}")


if __name__ == "__main__":
    main()
