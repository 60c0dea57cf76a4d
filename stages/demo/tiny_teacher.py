"""Trains the demo's teacher: a small CLIP, from scratch, on scenes and captions. Its scores demonstrate, no more.

That takes minutes, so the package ships the result. `python -m dimefm.stages.demo.tiny_teacher` makes that file again.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from open_clip.model import CLIP
from torch import Tensor

from .scene_captions import TEMPLATES, caption, classes
from .scene_pictures import draw
from .scenes import COLOURS, Scene, Source, make_scene
from .shipped_teacher import MODEL_CONFIG, SHIPPED, pack

_LARGEST_LOGIT_SCALE = 100.0

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much of it is done, how much there is)."""


@dataclass(frozen=True)
class TeacherRecipe:
    """How the teacher is trained."""

    num_pairs: int = 10240
    """Pictures, each with `num_captions` captions."""
    num_captions: int = 4
    """Captions of one picture, one for each pass over the pictures in turn."""
    steps: int = 1700
    batch_size: int = 64
    lr: float = 2e-3
    """Peak learning rate of AdamW; one cycle with a short warm-up and a cosine."""
    warmup: float = 0.08
    """Share of the steps."""
    weight_decay: float = 0.1
    num_checked: int = 256
    """Fresh pairs that the finished teacher is asked to match."""


@dataclass(frozen=True)
class _Pairs:
    """`pixels` (N, 3, 64, 64) uint8, `tokens` (captions, N, context) int64, `colours` (N,) of the first things."""

    pixels: Tensor
    tokens: Tensor
    colours: np.ndarray


def prompts() -> list[str]:
    """Every class of the demo, those that are held out too, through every template."""
    names = [name for held_out in (False, True) for names in classes(held_out).values() for name in names]
    return [template.format(name) for template in TEMPLATES for name in names]


def train_teacher(seed: int, recipe: TeacherRecipe, progress: Progress | None = None) -> tuple[bytes, float]:
    """Draw the pairs and train on them, on the CPU; the same bytes again with the same versions, threads and processor.

    Args:
        seed: of the demo: scenes, initial weights and order. None of the pictures is among the demo's images.
        recipe: sizes and rates.
        progress: told after each picture drawn and each step.

    Returns:
        The file that `shipped_teacher.unpack` reads; and the share of `num_checked` fresh pictures whose own caption
        fits better than all the other ones'.
    """
    tell: Progress = progress or (lambda text, done, total: None)
    tokenizer = SimpleTokenizer(context_length=MODEL_CONFIG["text_cfg"]["context_length"])
    pairs = _make_pairs(seed, 0, recipe.num_pairs, recipe.num_captions, tokenizer, tell)
    fresh = _make_pairs(seed, recipe.num_pairs, recipe.num_checked, 1, tokenizer, tell)
    # Few of the 49,408 tokens occur. Training on those alone keeps the order, so the end token is still the largest.
    # The prompts are not trained on, but the teacher will be asked about them: their tokens stay in the vocabulary.
    used = torch.cat([pairs.tokens.flatten(), fresh.tokens.flatten(), tokenizer(prompts()).flatten()]).unique()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(
            embed_dim=MODEL_CONFIG["embed_dim"],
            vision_cfg=MODEL_CONFIG["vision_cfg"],
            text_cfg={**MODEL_CONFIG["text_cfg"], "vocab_size": len(used)},
        )
        model.visual.to(memory_format=torch.channels_last)
        _fit(model, pairs, used, seed, recipe, tell)
        accuracy = _pair_accuracy(model, fresh, used)
    weights = {name: value.detach().contiguous().numpy() for name, value in model.state_dict().items()}
    return pack(weights, used.numpy()), accuracy


def _make_pairs(
    seed: int, start: int, count: int, num_captions: int, tokenizer: SimpleTokenizer, tell: Progress
) -> _Pairs:
    scenes: list[Scene] = []
    pixels = torch.empty(count, 3, 64, 64, dtype=torch.uint8)
    for i in range(count):
        scenes.append(make_scene(seed, Source.PAIRS, start + i))
        pixels[i] = torch.from_numpy(np.array(draw(scenes[i]))).permute(2, 0, 1)
        tell("drawing pairs for the teacher", i + 1, count)
    tokens = torch.stack([tokenizer([caption(scene, n) for scene in scenes]) for n in range(num_captions)])
    return _Pairs(pixels, tokens, np.array([COLOURS.index(scene.things[0].colour) for scene in scenes]))


def _fit(model: CLIP, pairs: _Pairs, used: Tensor, seed: int, recipe: TeacherRecipe, tell: Progress) -> None:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) with a learnt logit scale, AdamW and one cycle."""
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _lr_at(step, recipe)
        rows = torch.from_numpy(_rows_of_step(pairs.colours, recipe.batch_size, seed, step))
        draw_of_pass = step * recipe.batch_size // len(pairs.pixels) % len(pairs.tokens)
        tokens = torch.searchsorted(used, pairs.tokens[draw_of_pass, rows])  # positions among the used; padding stays 0
        loss = contrastive_loss(*_embed(model, pairs.pixels[rows], tokens), tokens, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(_LARGEST_LOGIT_SCALE))
        tell("training the teacher", step + 1, recipe.steps)
    model.eval()


def _rows_of_step(colours: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """(batch_size,) int64 rows of the pictures of one step.

    In every other batch half of the first things have one colour and half another: among those, colour tells nothing,
    so the shape must. Without this the small teacher looks at little else than colour for most of its short training.
    """
    half = batch_size // 2
    rng = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, step, 0, 0]))
    if step % 2:
        return rng.integers(len(colours), size=2 * half)
    of_colour = [rows for rows in (np.flatnonzero(colours == i) for i in range(len(COLOURS))) if len(rows)]
    return np.concatenate([rng.choice(of_colour[i], half) for i in rng.choice(len(of_colour), 2, replace=False)])


def _lr_at(step: int, recipe: TeacherRecipe) -> float:
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup))))


def _embed(model: CLIP, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings (B, D) of pictures (B, 3, S, S) uint8 and of sentences (B, L)."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    images = ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
    return F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)


def contrastive_loss(images: Tensor, sentences: Tensor, tokens: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE, images over sentences and back; equal sentences share the target, as neither is wrong for the other.

    Args:
        images: (B, D) unit rows.
        sentences: (B, D) unit rows, sentence i of image i.
        tokens: (B, L) token ids of the sentences.
        logit_scale: scalar that multiplies the cosines.

    Returns:
        Scalar: the mean of both directions' cross entropies.
    """
    logits = logit_scale * images @ sentences.T
    same = (tokens[:, None] == tokens[None]).all(dim=-1).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.inference_mode()
def _pair_accuracy(model: CLIP, pairs: _Pairs, used: Tensor) -> float:
    images, sentences = _embed(model, pairs.pixels, torch.searchsorted(used, pairs.tokens[0]))
    best = (images @ sentences.T).argmax(dim=1)
    return (best == torch.arange(len(best))).float().mean().item()


def main() -> None:
    """Train with one thread, whatever the machine has, and write the file that the package ships, or another."""
    parser = argparse.ArgumentParser(description="Train the demo's teacher again: some minutes of one core.")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="default: the file in the package")
    parser.add_argument("--steps", type=int, default=TeacherRecipe.steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = TeacherRecipe(steps=options.steps)

    def show(text: str, done: int, total: int) -> None:
        if done % (total // 10 or 1) == 0:
            print(f"{text}: {done:,} of {total:,}", file=sys.stderr)

    packed, accuracy = train_teacher(0, recipe, show)
    options.out.write_bytes(packed)
    print(
        f"{options.out}: {len(packed):,} bytes; of {recipe.num_checked} fresh pictures, {accuracy:.0%} fit their own "
        f"caption best (chance {1 / recipe.num_checked:.1%})"
    )


if __name__ == "__main__":
    main()
