"""A built-in loss is named in one line of one table; the documentation says what the table says."""

import ast
import re
from pathlib import Path

import pytest

import dimefm
from dimefm.stages.losses.terms import load_losses
from dimefm.stages.settings.loss_terms import LOSS_TERMS, LossSettings, TemperatureSettings, active_losses

from ...support.paths import ROOT

NAMES = [term.name for term in LOSS_TERMS]
DISTINCT = {"vl", "pvl", "udist", "mse", "icl"}
"""Names that mean nothing but a loss: `feature` and `views` are words of their own as well."""


def test_the_documentation_lists_every_loss_with_its_defaults():
    wanted = [
        f"| `{term.name}` | {term.weight:g} | {'' if term.temperature is None else f'{term.temperature:g}'} "
        f"| {', '.join(term.wants)} |"
        for term in LOSS_TERMS
    ]
    text = (ROOT / "docs" / "losses.md").read_text().partition("## In words")[0]
    found = re.findall(r"^\| `\w+` \| [\d.]+ \|.*\|$", text, flags=re.M)
    assert [re.sub(" +", " ", line) for line in found] == [re.sub(" +", " ", line) for line in wanted]


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_can_be_imported_with_its_diagnostics(name):
    (loss,) = load_losses(active_losses(LossSettings(**{name: 1.0}), TemperatureSettings()))
    assert (loss.settings.name, loss.settings.weight) == (name, 1.0)


def test_no_other_code_names_a_loss():
    """Attributes, keyword arguments and text that is nothing but a loss's name."""
    package = Path(dimefm.__file__).parent
    named = []
    for path in [*(package / "stages").rglob("*.py"), *(package / "pipeline").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = {ast.Attribute: "attr", ast.keyword: "arg", ast.Constant: "value"}.get(type(node))
            if name and getattr(node, name) in DISTINCT:
                named.append(path.relative_to(package).as_posix())
    assert set(named) == {"stages/settings/loss_terms.py"} and len(named) == len(DISTINCT)
