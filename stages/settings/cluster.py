"""What a user sets about a Dask cluster: how long is waited for whom. No part of a cache's identity."""

from typing import Annotated

from pydantic import Field

from .base import Settings

Seconds = Annotated[float, Field(gt=0.0, strict=False)]


class ClusterSettings(Settings):
    """`[cluster]`: `--scheduler`'s patience, in seconds. What is waited for is said long before."""

    scheduler_timeout: Seconds = 30.0
    """How long the scheduler may be out of reach, at the start and later, before the run stops."""
    worker_timeout: Seconds = 21_600.0
    """How long is waited for a worker that can be used, at the start and later: a batch system's queue takes hours."""
    heartbeat_timeout: Seconds = 30.0
    """How long a worker may send no sign of life before its shards go to others."""
