"""What the embeddings of a step's texts are held against: the image losses with the roles of the two sides swapped."""

import torch
from torch import Tensor

from ..losses.diagnostics import effective_candidates
from ..losses.info_nce import masked_share
from ..losses.loss_inputs import LossInputs
from ..losses.similarity_blocks import Rows
from ..settings.distill import DistillSettings
from .processes import World
from .targets import Targets


class TextTargets:
    """The teacher's embeddings of the first sentences of a step, of the further ones, and of the step's images.

    In `LossInputs` terms a text stands where an image stood, and the images (the bank's after the step's own) where
    the sentences did; the step's further sentences are the bank.

    Attributes:
        own: (n, D) of this process's texts.
    """

    def __init__(self, targets: Targets, num_texts: int, world: World) -> None:
        """Divide a step's sentences.

        Args:
            num_texts: texts of the whole step, divisible among the processes.
        """
        assert targets.all_sentences is not None, "a text tower is trained on sentences"
        self._everybodys = targets.all_sentences[:num_texts]
        further = targets.all_sentences[num_texts:]
        self._further = further if len(further) else None
        self._first = world.rank * (num_texts // world.size)
        self.own = self._everybodys
        if world.size > 1:  # with one process the two stay one object: the losses then save a product
            self.own = self._everybodys[self._first : self._first + num_texts // world.size]
        self._images = _both(targets.own, targets.own_bank)
        self._all_images = self._images if world.size == 1 else _both(targets.everybodys, targets.bank)

    def against(self, embeddings: Tensor, world: World) -> LossInputs:
        """Embeddings of this process's texts beside all of that."""
        return LossInputs(
            student_images=embeddings,
            teacher_images=self.own,
            all_student_images=world.gather_with_gradient(embeddings),
            all_teacher_images=self._everybodys,
            sentences=self._images,
            all_sentences=self._all_images,
            bank_images=self._further,
            first_image=self._first,
        )

    def signs(self, settings: DistillSettings, logit_scale: float) -> dict[str, Tensor]:
        """What `Targets.signs` says of images, of this process's texts."""
        temperature, loss = settings.temperature, settings.loss
        columns: Rows = self._everybodys if self._further is None else (self._everybodys, self._further)
        pairs: dict[str, tuple[Tensor, Rows, float]] = {}
        if loss.vl:
            pairs["vl_candidates"] = self.own, self._all_images, temperature.vl
            pairs["vl_candidates_images"] = self._images, self._everybodys, temperature.vl
        if loss.pvl:
            pairs["pvl_candidates"] = self.own, columns, temperature.pvl
        if loss.udist:
            pairs["udist_candidates"] = self.own, self._everybodys, temperature.udist
        signs = {key: effective_candidates(rows, over, of, logit_scale) for key, (rows, over, of) in pairs.items()}
        if loss.icl and loss.icl_threshold is not None:
            signs["icl_masked"] = masked_share(self.own, columns, self._first, loss.icl_threshold)
        return signs


def _both(rows: Tensor, more: Tensor | None) -> Tensor:
    return rows if more is None else torch.cat([rows, more])
