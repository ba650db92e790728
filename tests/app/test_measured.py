"""What the page says was measured of its adapters: no more than that."""

import json
import shutil
from types import SimpleNamespace

import pytest

from flatlora_diffusion.app.measured import Measured
from flatlora_diffusion.app.serve import PROJECT
from flatlora_diffusion.output.reading import find_runs

SHIPPED = PROJECT / "assets" / "adapters"


def method(loss, rise):
    points = [{"sigma": sigma, "rise": sigma * rise, "standard_error": 0.0} for sigma in (0.1, 0.3)]
    return {"heldout": {"loss": loss, "bands": []}, "flatness": {"loss": 0.1, "rise": points}}


REPORT = {
    "base": "models/tiny",
    "settings": {"adapters": {"plain": "aa", "flat": "bb"}, "heldout": {"pictures": 64, "sha256": ""}},
    "methods": {"base": method(0.2, 0.01), "plain": method(0.1, 0.04), "flat": method(0.09, 0.02)},
}
ADAPTERS = {"LoRA": SimpleNamespace(sha256="aa"), "Flat-LoRA": SimpleNamespace(sha256="bb")}


@pytest.fixture
def runs(tmp_path):
    """A comparison's folder, which may get an evaluation."""
    for arm, heldout in (("lora", 0.1), ("flat_lora", 0.0995)):
        shutil.copytree(SHIPPED / arm, tmp_path / arm)
        summary = tmp_path / arm / "summary.json"
        facts = json.loads(summary.read_text())
        summary.write_text(json.dumps(facts | {"heldout_losses": {facts["steps"]: heldout}}))
    return find_runs(tmp_path)


def test_an_evaluation_of_just_these_files_is_told(runs, tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(REPORT))
    found = Measured.of(runs, ADAPTERS, "tiny")
    assert found.heldout == {"base": 0.2, "LoRA": 0.1, "Flat-LoRA": 0.09}
    assert dict(found.rises["LoRA"])[0.3] == pytest.approx(12)
    told = found.verdict("LoRA", "Flat-LoRA")
    assert "<strong>Is Flat-LoRA better?</strong> Its error in cleaning noise off 64 pictures" in told
    assert "not trained on is 10.0% lower than that of LoRA." in told and "chance" not in told
    assert "(sigma 0.3), its error rises by 6.0%, that of LoRA by 12.0%." in told
    assert "11.1% higher than that of Flat-LoRA." in found.verdict("Flat-LoRA", "LoRA")
    assert found.verdict("LoRA", "mine") == ""


@pytest.mark.parametrize(
    ("adapters", "base"),
    [
        (ADAPTERS, "another"),
        ({"LoRA": SimpleNamespace(sha256="cc"), "Flat-LoRA": SimpleNamespace(sha256="dd")}, "tiny"),
    ],
)
def test_figures_of_other_files_or_another_base_are_none(runs, tmp_path, adapters, base):
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT))
    found = Measured.of(runs, adapters, base)
    assert not found.rises and found.heldout == {"LoRA": 0.1, "Flat-LoRA": 0.0995}  # of the runs


@pytest.mark.parametrize("content", ["", "[]", "3", '{"base": 3}', '{"base": "models/tiny"}'])
def test_a_damaged_evaluation_is_passed_over(runs, tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    told = Measured.of(runs, ADAPTERS, "tiny").verdict("LoRA", "Flat-LoRA")
    assert "0.5% lower than that of LoRA, so little that it may be chance." in told and "sigma" not in told


def test_runs_that_are_no_arms_of_one_comparison_are_not_compared(runs, tmp_path):
    alone = find_runs(tmp_path / "lora") | find_runs(tmp_path / "flat_lora")
    assert not Measured.of(alone, {label: SimpleNamespace(sha256="") for label in alone}, "tiny").heldout
    assert Measured().verdict("LoRA", "Flat-LoRA") == ""


def test_equal_losses_are_called_so():
    assert "not trained on is that of LoRA." in Measured({"LoRA": 0.1, "B": 0.1}).verdict("LoRA", "B")
