"""Which actions a repair takes: decided from what is damaged and what is at hand, before any of them is taken."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ....cache.audit.findings import Runs
from ....cache.audit.inventory import Piece
from ....cache.disk.layout import IMAGES, Layout, table_of
from ....cache.version.journal import ShardRecord
from .context import Damage

LostRows = Mapping[str, Mapping[int, str]]
"""For each array, rows that a repair gave up, and why."""


@dataclass(frozen=True)
class AtHand:
    """What is there to repair with.

    Attributes:
        teacher: the cache's teacher is loaded.
        arrays: arrays that teacher and sources can embed again.
        pictures: the training images are there.
        waiting: (array, shard) of shards that a killed repair has embedded already.
        without: why something is not at hand.
    """

    teacher: bool = False
    arrays: Collection[str] = ()
    pictures: bool = False
    waiting: Mapping[tuple[str, int], ShardRecord] = field(default_factory=dict)
    without: str = ""


@dataclass
class Actions:
    """What is to be done, in this order. What then changes the version follows from the results.

    Attributes:
        metadata: zarr.json documents to write again.
        text_tower: damaged files of the text tower, which is to be saved again.
        retry: rows that an earlier repair gave up and that are embedded again with their shards.
        reuse: shards that a killed repair has embedded already.
        give_up: shards whose rows are to be marked as lost: those rows; None for all of them.
        embed: shards to embed again.
        packs: packs of kept pixels to write again.
        left: files that nothing can be done about, and why.
    """

    metadata: list[str] = field(default_factory=list)
    text_tower: list[str] = field(default_factory=list)
    retry: LostRows = field(default_factory=dict)
    reuse: dict[Piece, ShardRecord] = field(default_factory=dict)
    give_up: dict[Piece, Runs | None] = field(default_factory=dict)
    embed: list[Piece] = field(default_factory=list)
    packs: list[Piece] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def shards(self) -> list[Piece]:
        """Every shard that is damaged or has lost rows to try again."""
        return [*self.reuse, *self.give_up, *self.embed]


def plan_actions(layout: Layout, damage: Damage, pieces: Iterable[Piece], lost: LostRows, at_hand: AtHand) -> Actions:
    """Decide what to do about each damaged file. Reads and writes nothing.

    Args:
        layout: of the cache; names its row tables.
        damage: what is still damaged once the cache has restored what it can from its own copies.
        pieces: every file of the manifest, and packs that it should list.
        lost: rows that earlier repairs gave up.

    A shard whose row table is damaged is left: without the table nothing tells what its rows are.
    """
    actions = Actions()
    if at_hand.teacher:
        actions.text_tower = sorted(damage.below("text_tower/"))
    actions.metadata = sorted(name for name in damage.below("teacher.zarr/") if name.endswith("zarr.json"))
    actions.retry = {
        array: rows
        for array, rows in lost.items()
        if rows and array in at_hand.arrays and _has_table(layout, damage, array)
    }
    for piece in pieces:
        if piece.content == "pixels" and piece.name in damage.files and _has_table(layout, damage, IMAGES):
            if at_hand.pictures:
                actions.packs.append(piece)
            else:
                actions.left[piece.name] = f"its images are not at hand: {at_hand.without or 'images.source is gone'}"
        elif piece.is_teachers:
            _plan_shard(actions, layout, damage, piece, at_hand)
    return actions


def _plan_shard(actions: Actions, layout: Layout, damage: Damage, piece: Piece, at_hand: AtHand) -> None:
    is_head, is_damaged = piece.content == "head", piece.name in damage.files
    retried = any(piece.first <= row < piece.first + piece.num_rows for row in actions.retry.get(piece.array, ()))
    if not (is_damaged or retried) or not (is_head or _has_table(layout, damage, piece.array)):
        return
    record = at_hand.waiting.get((piece.array, piece.chunk))
    if record and at_hand.teacher:
        actions.reuse[piece] = record
    elif piece.array in at_hand.arrays:
        actions.embed.append(piece)
    elif is_head:
        why = at_hand.without or "these have changed or are gone"
        actions.left[piece.name] = f"class vectors need the teacher and the class names: {why}"
    else:
        is_readable = is_damaged and piece.name not in damage.unreliable
        actions.give_up[piece] = damage.wrong_rows.get(piece.name) if is_readable else None


def _has_table(layout: Layout, damage: Damage, array: str) -> bool:
    return layout.name_of(table_of(layout, array)) not in damage.files
