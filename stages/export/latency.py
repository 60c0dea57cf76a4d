"""How long a batch takes, measured here: median and spread, by turns with what it is held against."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cpu_features import cpu_name, int8_instructions

BATCH_SIZES = (1, 32)
SECONDS = 2.0
"""For each batch size, over all modules."""
_LEAST_RUNS, _MOST_RUNS, _WARM_UP = 5, 200, 2


@torch.inference_mode()
def latencies(modules: Mapping[str, nn.Module], image: Tensor, seconds: float | None = None) -> dict[str, Any]:
    """Time of a forward pass on the CPU. The modules take turns, so that other work on the machine slows all alike.

    Args:
        image: (1, 3, S, S) float32.
        seconds: for each batch size; None for `SECONDS`.

    Returns:
        `cpu`, `int8_instructions`, `threads`, and for each module, for each batch size, `median_ms`, the `quartiles_ms`
        and `runs`.
    """
    found: dict[str, Any] = {name: {} for name in modules}
    for size in BATCH_SIZES:
        batch = image.expand(size, -1, -1, -1).contiguous()
        for module in modules.values():
            for _ in range(_WARM_UP):
                module(batch)
        times: dict[str, list[float]] = {name: [] for name in modules}
        until = time.perf_counter() + (SECONDS if seconds is None else seconds)
        runs = 0
        while runs < _LEAST_RUNS or (runs < _MOST_RUNS and time.perf_counter() < until):
            for name, module in modules.items():
                start = time.perf_counter()
                module(batch)
                times[name].append(1000 * (time.perf_counter() - start))
            runs += 1
        for name, values in times.items():
            low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).round(4).tolist()
            found[name][str(size)] = {"median_ms": median, "quartiles_ms": [low, high], "runs": runs}
    facts = {"cpu": cpu_name(), "int8_instructions": int8_instructions(), "threads": torch.get_num_threads()}
    return {**facts, "batches": found}


def no_faster(found: Mapping[str, Any], name: str, baseline: str) -> list[str]:
    """Batch sizes at which a module is no faster than the baseline."""
    batches = found["batches"]
    return [size for size, of in batches[name].items() if of["median_ms"] >= batches[baseline][size]["median_ms"]]
