"""Which of the tensors in a checkpoint are a model's weights: the one place for teachers and students.

People wrap weights in many ways: `state_dict`, `model`, `model_state_dict`, `ema`, Lightning's `state_dict` with names
below `model.`, and what DDP, FSDP and torch.compile put into names. Nothing of that is told by its name alone: a state
is taken if it fits the model.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that DDP and averages, torch.compile, FSDP and activation checkpointing put in."""
_AVERAGED = re.compile(r"(^|[_.:])(ema|swa|averaged?)($|[_.:])", re.IGNORECASE)
_USUAL = ("state_dict", "model", "model_state_dict")
_DEPTH = 4
_ENOUGH = 0.5
"""Of a model's elements; where no state as it stands has so many, those below a common prefix are looked at."""


@dataclass(frozen=True)
class Found:
    """Tensors by name, and where in the file they are: "" for the file itself, else keys, and a prefix with its dot."""

    where: str
    state: dict[str, Tensor]

    @property
    def is_averaged(self) -> bool:
        return _AVERAGED.search(self.where) is not None

    @property
    def is_usual(self) -> bool:
        return self.where.rpartition(".")[2] in _USUAL

    @property
    def shown(self) -> str:
        return f"`{self.where}`" if self.where else "the top level"


def choose_state(document: Any, share: Callable[[State], float]) -> tuple[dict[str, Tensor], str] | None:
    """The weights of a model out of what was read from a file, by name.

    Of states that fit equally well, averaged weights (`ema` and the like) come before plain ones, and a usual name
    before others.

    Args:
        document: what `torch.load` or safetensors returned.
        share: how much of the model a state has, 0 to 1.

    Returns:
        The state, wrappers' parts taken out of its names, and what to say where others fit too, else ""; None if there
        is no named tensor.
    """
    found = [one for state in _states(document) for one in _unwrapped(state)]
    if not found:
        return None
    shares = [share(one.state) for one in found]
    level = found
    while max(shares) < _ENOUGH and level:
        level = [one for above in level for inner in _below(above) for one in _unwrapped(inner)]
        found += level
        shares += [share(one.state) for one in level]
    best = max(shares)
    fit = [one for one, its in zip(found, shares) if its == best]
    taken = min(fit, key=lambda one: (not one.is_averaged, not one.is_usual, -len(one.state)))
    return taken.state, _line(taken, [one for one, its in zip(found, shares) if its >= _ENOUGH])


def _states(document: Any, where: str = "", depth: int = 0) -> Iterator[Found]:
    """The document itself and the dicts in it that hold tensors. Not an optimiser's, which may average by name."""
    if not isinstance(document, Mapping) or depth > _DEPTH:
        return
    tensors = {name: value for name, value in document.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield Found(where, tensors)
    for key, value in document.items():
        if isinstance(key, str) and isinstance(value, Mapping) and not key.startswith("optim"):
            yield from _states(value, f"{where}.{key}" if where else key, depth + 1)


def _unwrapped(found: Found) -> Iterator[Found]:
    """A state without wrappers' parts in its names; as it stands too, for a model that has such a part of its own."""
    clean = {_without_wrappers(name): value for name, value in found.state.items() if name != "n_averaged"}
    if len(clean) >= len(found.state) - 1 and clean.keys() != found.state.keys():
        yield Found(found.where, clean)
    yield found


def _without_wrappers(name: str) -> str:
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part not in _WRAPPERS), last])


def _below(found: Found) -> Iterator[Found]:
    """The parts of a state that share the first part of their names, without it."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in found.state.items():
        first, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(first, {})[rest] = value
    where = found.where if found.where.endswith(".") or not found.where else f"{found.where}:"
    for first, state in groups.items():
        if len(state) > 1:
            yield Found(f"{where}{first}.", state)


def _line(taken: Found, fitting: list[Found]) -> str:
    """What to say where a file holds several states that would do."""
    others = sorted({one.shown for one in fitting} - {taken.shown})
    if not others:
        return ""
    kind = "averaged weights" if taken.is_averaged else "the weights"
    return f"{kind} under {taken.shown} are taken; others are under {', '.join(others)}"
