"""What a step's embeddings are held against."""

from torch import Tensor

from ..load.batches import Batch
from ..losses.diagnostics import effective_candidates
from ..losses.info_nce import masked_share
from ..losses.loss_inputs import LossInputs, SamplingWeights, log_weights_both_ways
from ..losses.similarity_blocks import LogWeights, Rows
from ..settings.distill import DistillSettings
from .processes import World


class Targets:
    """What a step's embeddings are held against: the teacher's, of this process and of all of them.

    Made once a step; every student that learns from the batch uses it.
    """

    def __init__(
        self,
        targets: Tensor,
        sentences: Tensor | None,
        bank: Tensor | None,
        world: World,
        sentence_cosines: Tensor | None = None,
        sampling: SamplingWeights | None = None,
        other_views: Tensor | None = None,
    ) -> None:
        """Gather what the other processes drew.

        Args:
            targets: (B, D) teacher embeddings of this process's images.
            sentences: (N, D) of its sentences, or None.
            bank: (M, D) of its part of the bank, or None.
            sentence_cosines: (N,) of retrieved sentences, NaN of others; None where nothing is retrieved.
            sampling: of its sentences and images, or None.
            other_views: (M, D) of its images' other cached views, or None.
        """
        self.own, self.sentences = targets, sentences
        self.first_image = world.rank * len(targets)  # every process has as many
        self.everybodys = world.gather(targets)
        self.all_sentences = None if sentences is None else world.gather(sentences)
        self.sampling = sampling
        self.all_sampling = None if sampling is None else sampling.map(world.gather)
        self.first_sentence = 0 if sentences is None else world.rank * len(sentences)
        self._cosines = None if sentence_cosines is None else world.gather(sentence_cosines)
        self.own_bank, self.bank = bank, None if bank is None else world.gather(bank)
        self.other_views = None if other_views is None else world.gather(other_views)
        self._signs: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, batch: Batch, world: World) -> "Targets":
        """What a batch brings along, on the device where it is."""
        return cls(
            batch.targets,
            batch.sentences,
            batch.bank,
            world,
            batch.sentence_cosines,
            batch.sampling,
            batch.other_views,
        )

    def against(self, embeddings: Tensor, world: World) -> LossInputs:
        """Embeddings of this process's images beside all of that."""
        return LossInputs(
            student_images=embeddings,
            teacher_images=self.own,
            sentences=self.sentences,
            bank_images=self.bank,
            all_student_images=world.gather_with_gradient(embeddings),
            all_teacher_images=self.everybodys,
            all_sentences=self.all_sentences,
            first_image=self.first_image,
            sampling=self.sampling,
            all_sampling=self.all_sampling,
            first_sentence=self.first_sentence,
            other_views=self.other_views,
        )

    def signs(self, settings: DistillSettings, logit_scale: float) -> dict[str, Tensor]:
        """What the teacher's own softmaxes say of this process's rows, the same for every student: computed once.

        Returns:
            For each relational loss `…_candidates`, how many columns a row spreads over: exp(entropy), mean over the
            rows. For `icl` with a threshold `icl_masked`, the share of other images that are no negatives. Where
            sentences are retrieved, `pairs_share` of them were, at the mean `pairs_cosine`, NaN if none was.
        """
        if self._signs is None:
            self._signs = self._compute_signs(settings, logit_scale)
        return self._signs

    def _compute_signs(self, settings: DistillSettings, logit_scale: float) -> dict[str, Tensor]:
        temperature, loss = settings.temperature, settings.loss
        pairs: dict[str, tuple[Tensor, Rows, float]] = {}
        weights: dict[str, LogWeights | None] = {}
        if loss.vl and self.sentences is not None and self.all_sentences is not None:
            pairs["vl_candidates"] = self.own, self.all_sentences, temperature.vl
            pairs["vl_candidates_sentences"] = self.sentences, self.everybodys, temperature.vl
            both_ways = log_weights_both_ways(self.sampling, self.all_sampling, self.first_sentence)
            weights = dict(zip(pairs, both_ways))
        columns = self.everybodys if self.bank is None else (self.everybodys, self.bank)
        if loss.pvl:
            pairs["pvl_candidates"] = self.own, columns, temperature.pvl
        if loss.udist:
            pairs["udist_candidates"] = self.own, self.everybodys, temperature.udist
        if loss.views and self.other_views is not None:
            pairs["views_candidates"] = self.own, self.other_views, temperature.views
        signs = {
            key: effective_candidates(rows, over, of, logit_scale, weights.get(key))
            for key, (rows, over, of) in pairs.items()
        }
        if loss.icl and loss.icl_threshold is not None:
            signs["icl_masked"] = masked_share(self.own, columns, self.first_image, loss.icl_threshold)
        if self._cosines is not None:
            signs["pairs_share"] = self._cosines.isfinite().to(self._cosines.dtype).mean()
            signs["pairs_cosine"] = self._cosines.nanmean()
        return signs
