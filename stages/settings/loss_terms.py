"""The losses: one line of a table each, and the settings that are made from it. No torch: functions are named here.

A new loss is a file in `stages/losses` and a line of `LOSS_TERMS`; docs/losses.md says how its function is called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails

from .base import Settings, Weight
from .plugins import is_function, require_function

Temperature = Annotated[float, Field(gt=0.0)]
Want = Literal["others", "bank", "views"]
"""What a loss may want of a step beside the rows that the student embeds: teacher embeddings of the other modality
(sentences, where the student embeds images), of more rows of the same one, or of the images' other cached views."""


@dataclass(frozen=True)
class LossTerm:
    """A built-in loss.

    Attributes:
        name: in `[distill.loss]`, `[distill.temperature]` and the log.
        function: `package.module:function`, as of a loss from outside.
        summary: one line, the description of its key in the config.
        weight: where `[distill.loss]` is left out.
        temperature: default; None for a loss without one.
        wants: what is drawn for it. A loss that wants views is off on the text side: texts have none.
        options: keyword arguments of the function, each a key `NAME_OPTION` of `[distill.loss]`, with type and bounds.
        learnable: whether `NAME_learned` of `[distill.temperature]` makes a run learn its factor.
        diagnostics: `package.module:function` of what is logged beside its value, or None.
        first_weight: in runs from before the record named any loss.
    """

    name: str
    function: str
    summary: str
    weight: float = 0.0
    temperature: float | None = None
    wants: tuple[Want, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    learnable: bool = False
    diagnostics: str | None = None
    first_weight: float = 0.0


_THRESHOLD = Annotated[
    float | None,
    Field(
        gt=-1.0,
        le=1.0,
        description="Rows whose teacher embeddings have at least this cosine are no negatives of each other.",
    ),
]
_DIME, _CLIP_KD, _VIEWS = (f"dimefm.stages.losses.{module}" for module in ("dime", "clip_kd", "view_relation"))

LOSS_TERMS = (
    LossTerm(
        "vl",
        f"{_DIME}:vl_share",
        "Vision-language: images over sentences and sentences over images.",
        weight=0.7,
        temperature=1.0,
        wants=("others",),
        diagnostics=f"{_DIME}:vl_diagnostics",
        first_weight=0.7,
    ),
    LossTerm(
        "pvl",
        f"{_DIME}:pvl_share",
        "Pseudo vision-language: the batch's teacher image embeddings stand in for sentences.",
        weight=0.3,
        temperature=3.0,
        wants=("bank",),
        diagnostics=f"{_DIME}:pvl_diagnostics",
        first_weight=0.3,
    ),
    LossTerm(
        "udist",
        f"{_DIME}:udist_share",
        "Uni-modal distance: student-student against teacher-teacher similarities.",
        temperature=7.0,
        diagnostics=f"{_DIME}:udist_diagnostics",
    ),
    LossTerm("feature", f"{_DIME}:feature_share", "1 - cosine between the student's embedding and the teacher's."),
    LossTerm(
        "mse",
        f"{_CLIP_KD}:mse_share",
        "CLIP-KD's feature loss: the mean squared error between unit embeddings, 2 / embed_dim of `1 - cosine`.",
    ),
    LossTerm(
        "icl",
        f"{_CLIP_KD}:icl_share",
        "CLIP-KD's interactive contrastive loss, the teacher's image embeddings in the place of texts.",
        weight=1.0,
        temperature=1.0,
        wants=("bank",),
        options={"threshold": _THRESHOLD},
        learnable=True,
        diagnostics=f"{_CLIP_KD}:icl_diagnostics",
    ),
    LossTerm(
        "views",
        f"{_VIEWS}:views_share",
        "View relation: each image's view against the other cached views of the batch's images; wants two or more that "
        "are replayed (`distill.views`).",
        temperature=3.0,
        wants=("views",),
        diagnostics=f"{_VIEWS}:views_diagnostics",
    ),
)


@dataclass(frozen=True)
class ActiveLoss(LossTerm):
    """A loss that is on, built-in or from outside: weight, temperature and the options' values are the config's.

    Attributes:
        learned: whether the factor that it multiplies cosines by is learned.
    """

    learned: bool = False


class OutsideLoss(Settings):
    """`[distill.loss."package.module:function"]`: a loss that is no part of this package."""

    weight: float = Field(gt=0.0)
    temperature: Temperature | None = None
    """The function's factor is logit scale / temperature; None: the logit scale itself."""
    wants: list[Want] = Field(default_factory=list)
    """What is drawn for it: `others` (sentences), `bank` (`distill.bank_images`), `views` (other replayed crops)."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the function."""


def _temperature_keys() -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for term in LOSS_TERMS:
        if term.temperature is not None:
            keys[term.name] = (Temperature, term.temperature)
        if term.learnable:
            described = f"Whether `{term.name}` only begins with its temperature and learns it, as CLIP-KD does."
            keys[f"{term.name}_learned"] = (bool, Field(default=False, description=described))
    return keys


_WEIGHTS: dict[str, Any] = {
    term.name: (Weight, Field(default=0.0, description=term.summary)) for term in LOSS_TERMS
} | {f"{term.name}_{key}": (kind, None) for term in LOSS_TERMS for key, kind in term.options.items()}
"""A weight of each built-in loss, then the options."""
_Weights: Any = create_model("_Weights", __base__=Settings, **_WEIGHTS)
_Temperatures: Any = create_model("_Temperatures", __base__=Settings, **_temperature_keys())


class LossSettings(_Weights):
    """`[distill.loss]`: weights; a loss that is not named is off. Losses from outside have a table each."""

    model_config = Settings.model_config | {"extra": "allow"}
    __pydantic_extra__: dict[str, OutsideLoss]

    logit_scale: Literal["teacher"] | Annotated[float, Field(gt=0.0)] = "teacher"
    """Multiplies cosines before the softmax: the teacher's own, from the cache, or a number."""

    @model_validator(mode="before")
    @classmethod
    def _other_keys_are_functions(cls, keys: object) -> object:
        others = [key for key in keys if key not in cls.model_fields] if isinstance(keys, dict) else []
        for key in others:
            if not is_function(key):
                unknown = InitErrorDetails(type="extra_forbidden", loc=(key,), input=key)
                raise ValidationError.from_exception_data(cls.__name__, [unknown])
            require_function(key)
        return keys

    @model_validator(mode="after")
    def _something_is_on(self) -> "LossSettings":
        if not any(getattr(self, term.name) for term in LOSS_TERMS) and not self.outside:
            names = ", ".join(term.name for term in LOSS_TERMS)
            raise ValueError(f"every loss is off; give one of {names} a weight above 0")
        return self

    @property
    def outside(self) -> dict[str, OutsideLoss]:
        """Losses from outside by `package.module:function`."""
        return dict(self.__pydantic_extra__)


class TemperatureSettings(_Temperatures):
    """`[distill.temperature]`: softmax temperatures, the same for teacher and student."""


def default_losses() -> LossSettings:
    """What is on where `[distill.loss]` is left out."""
    return LossSettings(**{term.name: term.weight for term in LOSS_TERMS})


def first_losses() -> LossSettings:
    """What was on in runs whose record names no loss."""
    return LossSettings(**{term.name: term.first_weight for term in LOSS_TERMS})


def active_losses(loss: LossSettings, temperature: TemperatureSettings) -> list[ActiveLoss]:
    """The losses that are on: the built-in ones in the order of the table, then those from outside."""
    active = [
        ActiveLoss(
            term.name,
            term.function,
            term.summary,
            weight,
            None if term.temperature is None else getattr(temperature, term.name),
            term.wants,
            {key: getattr(loss, f"{term.name}_{key}") for key in term.options},
            term.learnable,
            term.diagnostics,
            learned=term.learnable and getattr(temperature, f"{term.name}_learned"),
        )
        for term in LOSS_TERMS
        if (weight := getattr(loss, term.name))
    ]
    return active + [
        ActiveLoss(name, name, "", one.weight, one.temperature, tuple(one.wants), one.options)
        for name, one in loss.outside.items()
    ]


def wanting(losses: Sequence[ActiveLoss], want: Want) -> list[str]:
    """Names of the losses that want something of a step."""
    return [loss.name for loss in losses if want in loss.wants]
