"""The prompts of a labelled set, as stage one made them: a student's own text tower makes its class vectors of them."""

from ...cache.disk.durable import digest
from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ...stages.inputs.prompts import prompts_for, read_templates


def cached_set_prompts(cache: FeatureCache, name: str, templates: str | None) -> list[list[str]]:
    """The prompts of each class of a set: its names from the cache, templates from where stage one had them.

    Args:
        templates: the set's setting; None where a run does not say.

    Raises:
        InputError: if the templates are gone, or not those that the cache's class vectors were made with.
    """
    if templates is None:
        raise InputError(
            f"evaluate.{name}: its run does not say which templates made the prompts, and the student's own text tower "
            "needs them; give `dimefm evaluate` the config"
        )
    lines = read_templates(templates)
    prompts = [prompts_for(names, lines) for names in cache.evaluate[name].class_names]
    made_with = cache.plan.inputs.evaluate[name].prompts
    if made_with != digest(*(prompt.encode() + b"\0" for of_class in prompts for prompt in of_class)):
        raise InputError(
            f"evaluate.{name}.templates: {templates}: not those that the cache's class vectors were made with; the "
            "student's would be of other prompts than the teacher's: put them back"
        )
    return prompts
