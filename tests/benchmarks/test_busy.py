"""The benchmark of a busy machine: who works beside whom, with which settings, and what is told of it."""

import os
import time
from typing import ClassVar

from benchmarks import busy

SETTINGS = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}


class Idler:
    """A process of a training that takes a hundredth of a second a step, twice that if threads sleep."""

    made: ClassVar[list] = []

    def __init__(self, name, config, samples, log, cache):
        self.settings = {name: os.environ[name] for name in SETTINGS & os.environ.keys()}
        self.seconds = 0.02 if self.settings else 0.01
        self.at_work = False
        self.killed = False
        Idler.made.append(self)

    def step(self):
        assert not self.at_work, "only one may tell it to"
        self.at_work = True
        time.sleep(self.seconds)
        self.at_work = False
        return self.seconds * (1 + sum(other.at_work for other in Idler.made))

    def kill(self):
        self.killed = True


def test_each_way_is_timed_alone_beside_its_like_and_beside_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(busy, "Process", Idler)
    monkeypatch.setattr(Idler, "made", [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ways = busy.environments(spins=[1000], one_thread=False)
    seconds = busy.measure(ways, 3, tmp_path)
    assert [process.settings for process in Idler.made[::2]] == list(ways.values())
    assert [process.settings for process in Idler.made[1::2]] == list(ways.values())
    assert all(process.killed for process in Idler.made)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert {len(taken) for own in seconds.values() for taken in own.values()} == {3}
    asleep = seconds["asleep (OMP_WAIT_POLICY=PASSIVE)"]
    assert asleep["idle"] == [0.02] * 3
    assert min(asleep["beside its like"]) > 0.02
    told = busy.report(seconds)
    assert "| asleep (OMP_WAIT_POLICY=PASSIVE) | 0.020; 2.000 (2.000-2.000) |" in told
    assert "| as it comes | 0.010; 1.000 (1.000-1.000) |" in told
