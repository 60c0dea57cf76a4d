"""How fast training is and what it waits for."""

import time
from dataclasses import dataclass

ADVISE_ABOVE = 0.1
"""Share of the time spent waiting for data above which the loader is what limits."""


@dataclass(frozen=True)
class Speed:
    """Reading of a meter.

    Attributes:
        images_per_s: images of all processes.
        step_s: seconds of a step, mean.
        wait_s: seconds of it that this process waited for data.
        compute_s: the others: the model, the losses, the optimiser; with several students, all of theirs.
        data_wait: share of the time spent waiting.
    """

    images_per_s: float
    step_s: float
    wait_s: float
    compute_s: float
    data_wait: float

    def advice(self, workers: int, reads_files: bool) -> str | None:
        """One line, if the loader is what limits."""
        if self.data_wait <= ADVISE_ABOVE:
            return None
        kept = ", or keep small pixels in the cache (cache.pixels = 'jpeg-256')" if reads_files else ""
        return (
            f"{self.data_wait:.0%} of the time goes to waiting for images: the loader is what limits; raise "
            f"distill.workers (now {workers}) if there are cores left{kept}"
        )


class Meter:
    """Steps, images and waiting since it was made."""

    def __init__(self) -> None:
        self._began, self._steps, self._images, self._wait_s = time.perf_counter(), 0, 0, 0.0

    def add(self, num_images: int, wait_s: float) -> None:
        """Count one step."""
        self._steps += 1
        self._images += num_images
        self._wait_s += wait_s

    def leave_out(self, seconds: float) -> None:
        """Time that went to something else than steps."""
        self._began += seconds

    def read(self) -> Speed:
        """What was counted so far, over the time since the meter was made, less what was left out."""
        seconds = time.perf_counter() - self._began
        steps = max(1, self._steps)
        return Speed(
            images_per_s=self._images / seconds,
            step_s=seconds / steps,
            wait_s=self._wait_s / steps,
            compute_s=(seconds - self._wait_s) / steps,
            data_wait=self._wait_s / seconds,
        )
