"""What stage one asks of a teacher, whatever library built it."""

from .open_clip_teacher import Teacher


def out_of_memory(teacher: Teacher, batch_size: int) -> str:
    """One line for a batch that the device cannot hold. A smaller one would give other last bits: none is tried."""
    return (
        f"teacher.batch_size = {batch_size}: such a batch does not fit into the memory of {teacher.device}; lower it "
        "(it is part of a cache's identity: start that cache anew)"
    )
