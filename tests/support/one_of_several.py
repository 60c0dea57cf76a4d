"""A process of a run of several.

`torchrun --nproc-per-node 2 tests/support/one_of_several.py FOLDER RUN MODEL STEPS SETTINGS INTERRUPT_AT TEXT`

Trains as `dimefm distill` does and leaves the gradients of each step in RUN-gradients-RANK.pt. INTERRUPT_AT n asks the
second process to stop after step n; -n asks all of them, as torchrun does, during the n-th batch that is scored.
"""

import itertools
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from dimefm.cache.errors import InputError
from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.stages.score.labelled_pictures import LabelledPictures
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train import dev_scores
from dimefm.stages.train.interrupt import Interrupted
from dimefm.stages.train.student import Student
from tests.support.training import gradients_of, train_one


def others_and_own() -> list[int]:
    """The processes of the run: children of the same torchrun."""
    listed = (Path(f"/proc/{os.getppid()}/task") / str(os.getppid()) / "children").read_text()
    return [int(process) for process in listed.split()]


def main(folder: Path, run: str, model: str, steps: int, settings: str, interrupt_at: int, text: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    rank = int(os.environ["RANK"])
    gradients = []
    learn = Student.learn

    def remember(self, *arguments):
        learn(self, *arguments)
        gradients.append(gradients_of(self))
        if rank == 1 and self.step == interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)

    Student.learn = remember
    dev_scores.LabelledPictures = partial(LabelledPictures, batch_size=3)  # several batches of the small cache's dev
    normalise, scored = LabelledPictures.normalise, itertools.count(1)

    def stopping(self, pictures):
        if next(scored) == -interrupt_at:
            for process in others_and_own():
                os.kill(process, signal.SIGTERM)
        return normalise(self, pictures)

    LabelledPictures.normalise = stopping
    notes: list[str] = []
    try:
        train_one(
            FeatureCache.open(folder / "cache"),
            folder / "images",
            StudentSettings(model=f"own_students:{model}", image_size=8, text=text),
            DistillSettings.model_validate_json(settings),
            folder / run,
            stop_after=steps,
            note=notes.append,
        )
    except Interrupted as interrupted:
        notes.append(str(interrupted))
    except InputError as error:
        notes.append(f"error: {error}")
    torch.save(gradients, folder / f"{run}-gradients-{rank}.pt")
    (folder / f"{run}-notes-{rank}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    place, name, model_name, number, settings_json, stop, text_spec = sys.argv[1:]
    main(Path(place), name, model_name, int(number), settings_json, int(stop), text_spec)
