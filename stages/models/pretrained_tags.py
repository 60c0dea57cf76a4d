"""Weights that open_clip knows by a tag: checked before anything is downloaded, then on disk or refused in one line."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip

from ...cache.errors import InputError, did_you_mean
from .weights_file import one_line


@dataclass(frozen=True)
class Asked:
    """What the user wrote, for the messages.

    Attributes:
        model, weights: key and value that name the architecture, and those that name the weights.
        by_hand: what to do with weights that were fetched elsewhere.
        prefix: what stands before an architecture's name in the config.
    """

    model: str
    weights: str
    by_hand: str
    prefix: str = ""


def tag_weights(name: str, tag: str, asked: Asked) -> tuple[Path, dict[str, Any]]:
    """The file with the weights of a tag, downloaded if it is not there yet, and what open_clip knows about the tag.

    Args:
        name: of an architecture that open_clip has.

    Raises:
        InputError: for an unknown tag, for weights that were trained with another activation than the architecture's,
            and when the download fails.
    """
    tag_cfg = open_clip.get_pretrained_cfg(name, tag)
    variant = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    # Where no variant has the tag, it merely does not mention its QuickGELU (roberta-ViT-B-32): the config is right.
    fits = tag_cfg and quick_gelu(tag_cfg) == quick_gelu(open_clip.get_model_config(name))
    if not fits and open_clip.is_pretrained_cfg(variant, tag):
        raise wrong_activation(tag, variant, asked)
    if not tag_cfg:
        known = open_clip.list_pretrained_tags_by_model(name)
        hint = did_you_mean(tag, known) or f"; its tags are: {', '.join(known) or 'none'}"
        raise InputError(f"{asked.weights}: {name} has no such tag{hint}")
    place = tag_cfg.get("hf_hub") or tag_cfg.get("url")
    path = download(lambda: open_clip.download_pretrained(tag_cfg), f"{name} with the tag {tag}", place, asked.by_hand)
    return path, dict(tag_cfg)


def wrong_activation(weights: str, variant: str, asked: Asked) -> InputError:
    """The error for weights of another activation than the architecture's; `variant` is the model that has theirs."""
    return InputError(
        f"{asked.model}: the weights {weights!r} were trained with another activation (QuickGELU or GELU) "
        f"than it has; use model = {asked.prefix + variant!r}"
    )


def quick_gelu(config: dict[str, Any] | None) -> bool:
    """Whether a model config, or a tag's, is of QuickGELU."""
    return bool((config or {}).get("quick_gelu", False))


def download(fetch: Callable[[], str], wanted: str, place: str | None, by_hand: str) -> Path:
    """Where `fetch` has put a file; InputError if it fails, with what was wanted, the place, and what to do by hand."""
    try:
        return Path(fetch())
    except Exception as error:  # hub, network and disk errors have no type in common
        raise InputError(
            f"{wanted}: cannot be downloaded from {place} ({one_line(error)}); fetch it where there is a network and "
            f"{by_hand}"
        ) from error


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Keep open_clip and timm from logging and warning: what matters of it is raised as an error here."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handler = logging.NullHandler()
    root.addHandler(handler)  # with no handler at all, logging.info() would install one that prints for ever after
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)
