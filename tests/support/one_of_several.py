"""A process of a run of several.

`torchrun --nproc-per-node 2 tests/support/one_of_several.py FOLDER RUN MODEL STEPS SETTINGS INTERRUPT_AT TEXT`

Trains as `dimefm distill` does and leaves the gradients of each step in RUN-gradients-RANK.pt.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from dimefm.cache.errors import InputError
from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.interrupt import Interrupted
from dimefm.stages.train.student import Student
from tests.support.training import gradients_of, train_one


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
