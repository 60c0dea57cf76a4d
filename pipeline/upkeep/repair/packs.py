"""Repairing kept pixels: damaged packs written again from the sources; the teacher is not needed for them."""

from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version

from ....cache.audit.inventory import Piece
from ....cache.disk.layout import IMAGES, table_of
from ....cache.disk.row_tables import LOST
from ....cache.errors import InputError
from ....cache.reader.pixel_packs import kept_setting
from ....cache.version.journal import Journal
from ....cache.version.schema import Origin
from ....cache.version.versions import move_file
from ....stages.embed.pack_pixels import pack_shard
from ...stage_one.kept_packs import pack_task, packed_images
from ..live_teacher import image_source
from .context import SAME_BYTES, NewBytes, Outcome, RepairContext


def repair_packs(context: RepairContext, packs: Iterable[Piece], new: NewBytes, outcome: Outcome) -> None:
    """Write damaged packs again.

    Args:
        new: takes packs with other bytes. Rows that it marks as lost may do without pixels.
    """
    setting, states = kept_setting(context.manifest), new.states.get(IMAGES, {})
    for piece in packs:
        assert context.sources is not None and setting is not None
        source = image_source(context.sources, IMAGES)
        assert source is not None
        num_rows = context.specs[IMAGES].shape[0]
        table = table_of(context.staged, IMAGES)
        images = [
            replace(image, lost=True) if image and (states.get(piece.first + i) or "").startswith(LOST) else image
            for i, image in enumerate(packed_images(source, context.staged, table, num_rows, piece.chunk))
        ]
        task = pack_task(context.staged, setting, piece.chunk, context.plan)
        try:
            record = pack_shard(task, source, images, context.workers)
        except InputError as error:
            outcome.leave({piece.name}, str(error))
            continue
        if record.digest == piece.digest:
            move_file(task.path, context.layout.root / piece.name)
            outcome.mended[piece.name] = SAME_BYTES
        else:
            Journal(context.staged).add(record, {})
            origin = Origin(by="repair", libraries={"pillow": version("pillow")})
            new.shards.append((replace(piece, num_bytes=task.path.stat().st_size), record, origin))
