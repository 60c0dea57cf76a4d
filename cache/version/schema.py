"""plan.json and manifest.json as types. Every attribute has the name of its key in the file.

What a file does not say takes the default of its attribute and is not written back; keys that this version does not
know are kept. So a document that is read and written again has the same bytes.
"""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..disk.durable import to_json
from ..disk.layout import FORMAT
from ..errors import CacheError


class Record(BaseModel):
    """A frozen part of a document."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: keys that were given, nothing else."""
        return self.model_dump(exclude_unset=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with some keys set; all others as they were, absent ones absent."""
        return type(self)(**{name: value for name, value in self if name in self.model_fields_set} | changes)


class NewerFormatError(CacheError):
    """A document of a format that this version does not know."""


class Document(Record):
    """A whole file: JSON with the format's version."""

    format: int = FORMAT

    @classmethod
    def parse(cls, path: Path, data: bytes) -> Self:
        """Read the bytes of a file.

        Args:
            path: the file, for messages.

        Raises:
            CacheError: if it is not such a document.
            NewerFormatError: if its format is newer than this code.
        """
        try:
            document = json.loads(data)
        except ValueError as error:
            raise CacheError(f"{path}: not a JSON document ({error}); it was cut or edited") from error
        found = document.get("format") if isinstance(document, dict) else None
        if not isinstance(found, int):
            raise CacheError(f"{path}: says no format; wanted a document that dimefm wrote")
        if found > FORMAT:
            raise NewerFormatError(f"{path}: format {found}, this dimefm reads up to {FORMAT}; update dimefm")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CacheError(f"{path}: {where}: {first['msg']}; restore the file that dimefm wrote") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """As `parse`, from the file."""
        return cls.parse(path, path.read_bytes())

    def to_bytes(self) -> bytes:
        """The file: JSON with sorted keys."""
        return to_json({"format": FORMAT, **self.to_dict()})


def refuse_newer(path: Path, data: bytes) -> None:
    """Refuse a document of a newer format before its unknown content is taken for damage.

    Raises:
        NewerFormatError: if it is one.
    """
    try:
        Document.parse(path, data)
    except NewerFormatError:
        raise
    except CacheError:
        return


# plan.json


class TeacherIdentity(Record):
    """All that an embedding depends on but the input."""

    model: str
    pretrained: str | None = None
    precision: str = ""
    batch_size: int = 0
    embed_dim: int = 0
    logit_scale: int | float = 1.0
    architecture: str = ""
    weights: str = ""
    tokenizer: Any = None
    preprocess: dict[str, Any] = {}
    libraries: dict[str, str] = {}


class ImageList(Record):
    """A list of images: how many, and the digest of their names in the order of their rows."""

    rows: int
    digest: str = ""


class SentenceSource(Record):
    """One file of sentences: its name, its lines and their digest."""

    name: str
    rows: int
    digest: str


class PromptList(Record):
    """Prompts among the sentences."""

    rows: int
    digest: str


class SentenceList(Record):
    """All sentences: those of the files, then the prompts."""

    rows: int
    sources: list[SentenceSource] = []
    prompts: PromptList | None = None


class LabelledList(Record):
    """A labelled set. `class_ids` are sorted, a label is a position in them; `prompts` is a digest."""

    class_ids: list[str]
    class_names: list[list[str]]
    prompts: str | None = None
    rows: int = 0
    digest: str = ""


class Inputs(Record):
    """What is embedded."""

    images: ImageList
    sentences: SentenceList
    evaluate: dict[str, LabelledList] = {}


class Views(Record):
    """Crops of each training image beside the centre: how many, their settings, and what decoded the images."""

    count: int
    crops: dict[str, Any]
    decoder: dict[str, str] = {}


class GrowthStep(Record):
    """One append: the digest of the plan before, its rows by array, and what embedded the rows that followed."""

    plan: str
    rows: dict[str, int] = {}
    libraries: dict[str, str] = {}
    decoder: dict[str, str] = {}


class Plan(Document):
    """Identity of a cache: teacher, inputs and division into shards.

    Attributes:
        shard_rows: rows of a shard.
        rows_of: path, from the cache's folder, of the cache whose row tables it shares.
        pixels: setting of `cache.pixels` that stage one began with.
        views: crops; None where there is the centre alone.
        grown: the appends, oldest first.
    """

    shard_rows: int
    teacher: TeacherIdentity
    inputs: Inputs
    rows_of: str | None = None
    pixels: str | None = None
    views: Views | None = None
    grown: list[GrowthStep] = []


# manifest.json


class FileEntry(Record):
    """Size and XXH3-128 of a file."""

    bytes: int
    digest: str


class ArrayCounts(Record):
    """Rows of an array, how many of them failed, and how many for each reason."""

    rows: int
    failed: int = 0
    reasons: dict[str, int] = {}


class PairStore(Record):
    """Pseudo-pairs: the Zarr group, neighbours of each row, and what the journal calls the group's arrays."""

    store: str
    k: int
    counted: str = ""


class IndexInfo(Record):
    """A FAISS index (see `build_index`). None where a number does not apply.

    Attributes:
        rows: rows that are in it.
        nlist, nprobe: lists of an IVF index, and how many of them are probed.
        train_rows: size of the sample that lists were trained with.
        recall: recall@`recall_k` on `recall_queries` rows of the other side.
        trained_on: of any but a flat index, the rows that it had when its kind and its lists were chosen.
        tried: of an exact index over float16 rows, `nlist`, `nprobe` and `recall` of the lists that were not enough.
    """

    file: str
    type: str = ""
    rows: int = 0
    nlist: int | None = None
    nprobe: int | None = None
    train_rows: int | None = None
    recall: int | float | None = None
    recall_k: int | None = None
    recall_queries: int | None = None
    trained_on: int | None = None
    tried: dict[str, Any] | None = None


class KeptPixels(Record):
    """Packs of small JPEGs of the training images."""

    setting: str
    folder: str
    shard_rows: int
    quality: int = 0
    subsampling: Any = None


class Origin(Record):
    """Where a shard comes from that a repair made again, and the cosine of sound rows with what was there."""

    by: str
    libraries: dict[str, str] = {}
    cosine: dict[str, float] | None = None
    compared: int = 0


class Manifest(Document):
    """A version of a finished cache: counts, names and every file.

    Attributes:
        plan: digest of the plan in force.
        plan_file: its name.
        arrays: each array of embeddings.
        files: every file of the cache, by its path.
        superseded: files of an earlier version that are still there for those who have them open.
        pairs_settings: `[pairs]` of the config; None where retrieval is off.
        index: FAISS index of each side.
        text_tower: folder of the text tower; None where the teacher cannot save one.
        transductive: evaluation sets whose class names were among the training prompts.
        origins: array -> chunk -> where its bytes come from, of chunks that a repair made again with other bytes.
    """

    version: int = 1
    plan: str = ""
    plan_file: str = "plan.json"
    arrays: dict[str, ArrayCounts]
    files: dict[str, FileEntry] = {}
    superseded: list[str] = []
    pairs: PairStore | None = None
    pairs_settings: dict[str, Any] | None = None
    index: dict[str, IndexInfo] = {}
    pixels: KeptPixels | None = None
    text_tower: str | None = "text_tower"
    transductive: list[str] = []
    origins: dict[str, dict[str, Origin]] = {}
