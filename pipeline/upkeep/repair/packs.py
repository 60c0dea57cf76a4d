"""Mending kept pixels: bad packs made again from the sources; the teacher is not needed for them."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from importlib.metadata import version

from ....cache.audit.inventory import Piece, unlisted_packs
from ....cache.disk.layout import IMAGES, table_of
from ....cache.disk.row_tables import LOST
from ....cache.errors import InputError
from ....cache.reader.pixel_packs import kept_setting
from ....cache.version.journal import Journal
from ....cache.version.versions import move_file
from ....stages.embed.pack_pixels import pack_shard
from ...stage_one.kept_packs import pack_task, packed_images
from ..live_teacher import image_source
from .context import Hands, Shards


def mend_packs(hands: Hands, whole: Iterable[Piece], bad: Collection[str], found: Shards) -> None:
    """Make bad packs again.

    Args:
        whole: every file that the manifest lists; packs that it should list as well are seen to here.
        bad: names of files.
        found: what became of bad shards; what becomes of packs joins it. Rows that it gives up may do without pixels.
    """
    setting, states = kept_setting(hands.manifest), found.states.get(IMAGES, {})
    source = image_source(hands.config, IMAGES) if hands.config else None
    for piece in [*whole, *unlisted_packs(hands.manifest, int(hands.plan["shard_rows"]))]:
        if piece.content != "pixels" or piece.name not in bad:
            continue
        if hands.config is None or source is None or setting is None:
            found.left[piece.name] = f"its images are not at hand: {hands.without or 'images.source is gone'}"
            continue
        num_rows = hands.specs[IMAGES].shape[0]
        table = table_of(hands.mend, IMAGES)
        images = [
            replace(image, lost=True) if image and (states.get(piece.first + i) or "").startswith(LOST) else image
            for i, image in enumerate(packed_images(source, hands.mend, table, num_rows, piece.chunk))
        ]
        task = pack_task(hands.mend, setting, piece.chunk, hands.plan)
        try:
            record = pack_shard(task, source, images, hands.config.teacher.workers)
        except InputError as error:
            found.left[piece.name] = str(error)
            continue
        if record.digest == piece.digest:
            move_file(task.path, hands.layout.root / piece.name)
            found.same.append(piece.name)
        else:
            Journal(hands.mend).add(record, {})
            origin = {"by": "repair", "libraries": {"pillow": version("pillow")}}
            found.changed.append((replace(piece, num_bytes=task.path.stat().st_size), record, origin))
