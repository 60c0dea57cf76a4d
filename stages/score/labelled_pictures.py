"""The pictures of a labelled set as a student of one size sees them: decoded by threads, kept in memory if small."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

from ...cache.disk.cores import usable_cores
from ...cache.reader.feature_cache import EvaluateSet
from ..images.decode import ImageError, decode_image
from ..inputs.image_source import ImageSource, row_keys
from ..inputs.open_source import open_source

Pictures = tuple[list[int], Tensor]
"""Row numbers in the set, and (B, 3, S, S) uint8."""


def evaluation_steps(
    preprocess: dict[str, Any], image_size: int
) -> tuple[Callable[[Image.Image], Image.Image], Callable[[Tensor], Tensor]]:
    """open_clip's own steps for a teacher's `preprocess_cfg` at another size.

    Returns:
        What resizes and crops one RGB image to S x S, and what makes (B, 3, S, S) float32 input of uint8 pictures.
    """
    cfg = PreprocessCfg(**{**preprocess, "size": image_size})
    *to_picture, _, normalise = image_transform_v2(cfg, is_train=False).transforms

    def to_inputs(pictures: Tensor) -> Tensor:
        inputs: Tensor = normalise(pictures.to(torch.float32).div(255))
        return inputs

    return Compose(to_picture), to_inputs


class LabelledPictures:
    """Resized and cropped as the teacher's images were, at a student's own size."""

    def __init__(
        self,
        labelled: EvaluateSet,
        images_root: str | Path | ImageSource,
        preprocess: dict[str, Any],
        image_size: int,
        *,
        batch_size: int = 256,
        workers: int = 0,
        keep_bytes: int = 0,
    ) -> None:
        """Nothing is read yet.

        Args:
            images_root: where the set's images are: a folder, or what else `open_source` opens.
            preprocess: the teacher's, as the cache records it.
            image_size: S, pixels.
            workers: threads that decode; 0 takes one for each core.
            keep_bytes: a set whose pictures need no more than that is decoded once and stays in memory.
        """
        self._to_picture, self._normalise = evaluation_steps(preprocess, image_size)
        self._source = open_source(images_root)
        self._keys = row_keys(self._source, labelled.images.rows)(np.arange(len(labelled.images)))
        self._workers = workers or usable_cores()
        usable = labelled.images.usable
        self._batches = [usable[start : start + batch_size].tolist() for start in range(0, len(usable), batch_size)]
        self._keep = len(usable) * 3 * image_size**2 <= keep_bytes
        self._kept: list[Pictures] | None = None

    def __iter__(self) -> Iterator[Pictures]:
        """Batches of the images that can be read, in the order of rows, each decoded during the one before it."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        with ThreadPoolExecutor(self._workers) as pool:
            ahead = deque(pool.map(self._load, rows) for rows in self._batches[:1])
            for i, rows in enumerate(self._batches):
                ahead.extend(pool.map(self._load, following) for following in self._batches[i + 1 : i + 2])
                read = {row: image for row, image in zip(rows, ahead.popleft()) if image is not None}
                if read:
                    pictures = list(read), torch.stack(list(read.values()))
                    if self._keep:
                        kept.append(pictures)
                    yield pictures
        if self._keep:
            self._kept = kept

    def normalise(self, pictures: Tensor) -> Tensor:
        """A student's input, (B, 3, S, S) float32, from pictures on whatever device they are: open_clip's own steps."""
        return self._normalise(pictures)

    def _load(self, row: int) -> Tensor | None:
        try:
            picture: Tensor = pil_to_tensor(self._to_picture(decode_image(self._source.read(self._keys[row]))))
        except ImageError:
            return None
        return picture
