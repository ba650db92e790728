"""The recommended scale: the rule on made-up curves, and where it is noted."""

import dataclasses
import errno
import hashlib
import logging
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import adapter_bytes, read_facts
from flatlora_diffusion.adapter.strength import Strength, file_digest, read_strength, write_strength
from flatlora_diffusion.app.runs_tab import strengths
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.evaluate.request import _note_scale
from flatlora_diffusion.evaluate.strength import HELDOUT, RETENTION, recommend
from flatlora_diffusion.evaluate.tables import markdown
from flatlora_diffusion.output.card import CARD, Making, is_ours, write_card
from flatlora_diffusion.output.noted import note_in_cards
from flatlora_diffusion.output.reading import find_runs
from flatlora_diffusion.sdxl.lora import add_lora
from tests.tiny import assert_equal, build_unet

BETTER = Strength(0.6, -0.0125, 0.002, -0.058, 0.004, 16)


def curve(heldout: dict[float, list[float]], retention: dict[float, list[float]] | None = None) -> list[dict]:
    """A trade-off of losses of single pictures by scale."""
    points = [{"scale": scale, HELDOUT: losses} for scale, losses in heldout.items()]
    for point in points if retention else ():
        point[RETENTION] = retention[point["scale"]]
    return points


def test_the_change_and_its_error_are_those_of_paired_pictures():
    found = recommend(curve({0.5: [0.9, 1.7], 1.0: [1.0, 2.0]}, {0.5: [2.0, 2.0], 1.0: [4.0, 4.0]}))
    # Changes of -0.1 and -0.3, by a mean loss of 1.5; their standard deviation is sqrt(2) / 10.
    assert found == Strength(
        *(0.5, pytest.approx(-0.2 / 1.5), pytest.approx(0.1 / 1.5)),
        *(pytest.approx(-0.5), 0.0, 2),
    )


@pytest.mark.parametrize(
    ("heldout", "retention", "scale"),
    [
        # Lowest held-out loss, with the base's styles no worse.
        ({0.4: [3, 3], 0.6: [1, 1], 1: [4, 4]}, {0.4: [1, 1], 0.6: [2, 2], 1: [3, 3]}, 0.6),
        # More style at the cost of the base's own is no gain, and neither is the reverse.
        ({0.4: [5, 5], 1: [4, 4], 1.2: [2, 2]}, {0.4: [1, 1], 1: [3, 3], 1.2: [5, 5]}, 1),
        # The style equal, less forgotten.
        ({0.8: [4, 4], 1: [4, 4]}, {0.8: [2, 2], 1: [3, 3]}, 0.8),
        # A tie.
        ({0.8: [4, 4], 1: [4, 4]}, {0.8: [3, 3], 1: [3, 3]}, 1),
        # Within its noise: changes of -3 and +1, whose error is 2.
        ({0.8: [1, 5], 1: [4, 4]}, None, 1),
        # Changes of -3 and -2, whose error is 0.5.
        ({0.8: [1, 2], 1: [4, 4]}, None, 0.8),
        # One picture tells nothing.
        ({0.8: [1], 1: [4]}, None, 1),
        # Of equally good ones the nearest to 1.
        ({0.4: [3, 3], 0.8: [3, 3], 1: [4, 4]}, None, 0.8),
        # The base is no way to draw with an adapter.
        ({0: [1, 1], 0.2: [2, 2], 1: [4, 4]}, None, 0.2),
        # Infinities are null in a report.
        ({0.8: [None, 1], 1: [4, 4]}, None, 1),
    ],
)
def test_the_rule(heldout, retention, scale):
    found = recommend(curve(heldout, retention))
    assert found.scale == scale
    if scale == 1:
        assert (found.heldout, found.heldout_error) == (0, 0)
        assert "1.0 is as good as any" in found.sentence("LoRA")


def test_what_was_measured_before_there_were_single_losses_recommends_nothing():
    assert recommend([{"scale": 0.8, "heldout_loss": 1.0}, {"scale": 1.0, "heldout_loss": 2.0}]) is None
    assert recommend(curve({0.8: [1, 1]})) is None
    assert recommend([]) is None


def test_the_words():
    assert BETTER.sentence("Flat-LoRA") == (
        "Recommended scale of Flat-LoRA: 0.6; the loss on held-out pictures is 1.25% (± 0.20) lower, that on "
        "the base's own styles 5.80% (± 0.40) lower than at 1.0."
    )
    report = {"methods": {"base": {}, "LoRA": {"recommended": dataclasses.asdict(BETTER)}}}
    assert f"\n\n{BETTER.sentence('LoRA')}\n" in markdown(report)


# Where it is noted.


@pytest.fixture
def adapter(tmp_path):
    """The file of an adapter of this trainer."""
    unet = build_unet()
    add_lora({"unet": unet}, rank=2, alpha=2, seed=0)
    facts = {"method": "LoRA", "steps": 3, "rank": 2, "alpha": 2, "targets": {"unet": ["to_k"]}, "seed": 0}
    facts |= {"versions": {}, "flat_sigma": 0.0}
    path = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    path.write_bytes(adapter_bytes({"unet": unet}, facts))
    return path


def test_a_note_leaves_tensors_facts_and_the_hash_as_they_were(adapter):
    before, tensors, facts = adapter.read_bytes(), load_file(adapter), read_facts(adapter)
    assert file_digest(adapter) == hashlib.sha256(before).hexdigest() and read_strength(adapter) is None
    for strength in (BETTER, dataclasses.replace(BETTER, scale=1.0, retention=None, retention_error=None)):
        assert write_strength(adapter, strength)
        assert read_strength(adapter) == strength
        assert_equal(load_file(adapter), tensors)
        assert read_facts(adapter) == facts
        assert file_digest(adapter) == hashlib.sha256(before).hexdigest()
    after = adapter.read_bytes()
    assert after.endswith(before[-1000:]) and list(adapter.parent.iterdir()) == [adapter]
    write_strength(adapter, strength)
    assert adapter.read_bytes() == after


def test_a_full_disk_leaves_the_file(adapter, monkeypatch):
    before = adapter.read_bytes()
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space"))
    monkeypatch.setattr("flatlora_diffusion.common.files.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space\); free some space"):
        write_strength(adapter, BETTER)
    assert adapter.read_bytes() == before


def test_other_programs_files_and_damaged_notes(adapters, adapter):
    content = adapters["LoRA"].read_bytes()
    foreign = adapters["LoRA"]
    foreign.write_bytes(content.replace(b"flat_lora", b"flat_sora"))
    before = foreign.read_bytes()
    assert not write_strength(foreign, BETTER) and foreign.read_bytes() == before
    write_strength(adapter, BETTER)
    adapter.write_bytes(adapter.read_bytes().replace(b'\\"scale\\": 0.6', b'\\"scale\\": [0]'))
    assert read_strength(adapter) is None


def test_the_log_says_where_it_is_noted_and_where_not(adapter, adapters, caplog):
    caplog.set_level(logging.INFO)
    foreign = adapters["LoRA"]
    foreign.write_bytes(foreign.read_bytes().replace(b"flat_lora", b"flat_sora"))
    for label, file, mix in (
        ("one", adapter, ()),
        ("two", foreign, ()),
        ("mix", adapter, ((None, 0.5),) * 2),
    ):
        _note_scale(label, SimpleNamespace(file=file, mix=mix), BETTER)
    assert caplog.messages == [
        f"one: the recommended scale is noted in {adapter}",
        f"two: {foreign} is of another program and stays as it is; no scale is noted",
        "mix: several files have no scale of their own; none is noted",
    ]


def test_the_card_and_the_page_say_it(adapter, config):
    config = dataclasses.replace(config, output_dir=str(adapter.parent))
    making = Making(images=4, processes=1, precision="no")
    write_card(config, {"LoRA": adapter.parent}, making)
    write_strength(adapter, dataclasses.replace(BETTER, scale=0.4))
    card = adapter.parent / CARD
    assert note_in_cards(adapter) == [card]
    write_strength(adapter, BETTER)
    note_in_cards(adapter)
    told = card.read_bytes()
    assert is_ours(told) and told.count(b"Recommended scale") == 1
    assert f"## Use\n\n{BETTER.sentence('LoRA')}\n\n```python" in told.decode()
    write_card(config, {"LoRA": adapter.parent}, making)
    assert card.read_bytes() == told, "the card of the run that is finished again"
    runs = {label: run.read() for label, run in find_runs(adapter.parent).items()}
    assert BETTER.sentence("run") in strengths(runs).replace("&#x27;", "'")
    card.write_bytes(told + b"my own words")
    assert note_in_cards(adapter) == []
