"""What a step's embeddings are compared to: the teacher's, of this process and of all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..load.batches import Batch
from ..losses.loss_inputs import LossInputs, SamplingWeights, TeacherInputs
from ..losses.terms import Loss, loss_diagnostics
from .processes import World


class Targets:
    """What one side of a step, its images or its texts, is compared to; made once for all students.

    Attributes:
        inputs: the teacher's embeddings.
    """

    def __init__(
        self,
        inputs: TeacherInputs,
        world: World,
        others: str,
        bank: Tensor | None = None,
        pair_cosines: Tensor | None = None,
    ) -> None:
        """Use `gather`, or `of_texts`.

        Args:
            others: what the rows of the other modality are, `sentences` or `images`.
            bank: this process's part of the bank.
            pair_cosines: of all processes, as in `gather`.
        """
        self.inputs, self._world, self._others, self._bank = inputs, world, others, bank
        self._pair_cosines = pair_cosines
        self._diagnostics: dict[str, Tensor] | None = None
        self._texts: Targets | None = None

    @classmethod
    def gather(
        cls,
        images: Tensor,
        sentences: Tensor | None,
        bank: Tensor | None,
        world: World,
        *,
        pair_cosines: Tensor | None = None,
        sampling: SamplingWeights | None = None,
        views: Tensor | None = None,
    ) -> "Targets":
        """Gather what all processes drew.

        Args:
            images: (B, D) teacher embeddings of this process's images; every process has as many.
            sentences: (N, D) of its sentences, or None.
            bank: (M, D) of its part of the bank, or None.
            pair_cosines: (N,) of retrieved sentences, NaN of others; None where nothing is retrieved.
            sampling: of its sentences and images, or None.
            views: (V, D) of its images' other cached views, or None.
        """

        def gathered(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else world.gather(rows)

        inputs = TeacherInputs(
            local_teacher=images,
            global_teacher=world.gather(images),
            local_others=sentences,
            global_others=gathered(sentences),
            bank=gathered(bank),
            views=gathered(views),
            first_row=world.rank * len(images),
            first_other=0 if sentences is None else world.rank * len(sentences),
            local_sampling=sampling,
            global_sampling=None if sampling is None else sampling.map(world.gather),
        )
        return cls(inputs, world, "sentences", bank, gathered(pair_cosines))

    @classmethod
    def of(cls, batch: Batch, world: World) -> "Targets":
        """What a batch brings along, on the device where it is."""
        return cls.gather(
            batch.targets,
            batch.sentences,
            batch.bank,
            world,
            pair_cosines=batch.sentence_cosines,
            sampling=batch.sampling,
            views=batch.other_views,
        )

    def of_texts(self, num_texts: int) -> "Targets":
        """The same for the step's texts, its first sentences: the sides swap roles.

        A text is a row where an image was one, the images (and the bank's behind them) are the others, and the step's
        further sentences are the bank.

        Args:
            num_texts: texts of the whole step, divisible among the processes.
        """
        if self._texts is not None:
            return self._texts
        images, world = self.inputs, self._world
        assert images.global_others is not None, "a text tower is trained on sentences"
        texts, further = images.global_others[:num_texts], images.global_others[num_texts:]
        first, num_local = world.rank * (num_texts // world.size), num_texts // world.size
        others = _stacked(images.local_teacher, self._bank)
        # With one process, local and global stay one object: the losses then save a product.
        inputs = TeacherInputs(
            local_teacher=texts if world.size == 1 else texts[first : first + num_local],
            global_teacher=texts,
            local_others=others,
            global_others=others if world.size == 1 else _stacked(images.global_teacher, images.bank),
            bank=further if len(further) else None,
            first_row=first,
        )
        self._texts = Targets(inputs, world, "images")
        return self._texts

    def against(self, embeddings: Tensor) -> LossInputs:
        """A student's embeddings of this process's rows beside all of that."""
        return self.inputs.with_student(embeddings, self._world.gather_with_gradient(embeddings))

    def diagnostics(self, losses: Sequence[Loss], logit_scale: float) -> dict[str, Tensor]:
        """Diagnostics of the teacher's softmaxes over this process's rows; the same for every student, computed once.

        Returns:
            Those of each loss: `…_candidates`, how many columns a row spreads over (exp(entropy),
            mean over the rows), `…_masked`, the share of other rows that are no negatives. Where sentences are
            retrieved, `pairs_share` of them were, at the mean `pairs_cosine`, NaN if none was.
        """
        if self._diagnostics is None:
            self._diagnostics = loss_diagnostics(self.inputs, losses, logit_scale, self._others)
            if (cosines := self._pair_cosines) is not None:
                self._diagnostics["pairs_share"] = cosines.isfinite().to(cosines.dtype).mean()
                self._diagnostics["pairs_cosine"] = cosines.nanmean()
        return self._diagnostics


def _stacked(rows: Tensor, more: Tensor | None) -> Tensor:
    return rows if more is None else torch.cat([rows, more])
