"""A name that users import from here: it lives in `stages/losses/view_relation.py`."""

from .losses.view_relation import view_relation_loss

__all__ = ["view_relation_loss"]
