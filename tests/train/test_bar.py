"""The progress bar: what else takes time is told, and left out of the time left."""

import io
import time

from flatlora_diffusion.train.bar import StepBar


def test_other_work_is_told_and_left_out_of_the_rate(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    bar = StepBar("LoRA", 2, 12)
    bar.fp, bar._time, told = io.StringIO(), time.time, []
    bar.display = lambda *_, **__: told.append(bar.desc)
    bar.start_t = bar.last_print_t = now
    for _ in range(5):
        now += 2
        bar.update()
    with bar.doing("saving a checkpoint"):
        now += 500
    assert told[-2:] == ["LoRA, saving a checkpoint: ", "LoRA: "]
    assert bar.format_dict["elapsed"] == 10
    now += 2
    bar.update()
    assert bar.format_dict["rate"] == 0.5  # a step in two seconds
    bar.close()


def test_a_hidden_bar_does_the_same_work():
    with StepBar("LoRA", 0, 1, hidden=True) as bar, bar.doing("saving"):
        bar.update()
