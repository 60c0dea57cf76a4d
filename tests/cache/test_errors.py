"""Messages of known errors."""

from dimefm.cache.errors import did_you_mean


def test_a_message_names_what_may_have_been_meant():
    assert did_you_mean("shard_row", ["dir", "shard_rows"]) == "; did you mean shard_rows?"
    assert did_you_mean("ViT-B-23", ["ViT-B-32", "RN50", "ViT-B-16"]) == "; did you mean ViT-B-32 or ViT-B-16?"


def test_nothing_is_suggested_where_nothing_is_close():
    assert did_you_mean("zzz", ["dir", "shard_rows"]) == did_you_mean("dir", []) == ""
