import threading

import gradio as gr
import pytest

from flatlora_diffusion.app import engine
from flatlora_diffusion.app.engine import Drawn, Job, Step, Studio
from flatlora_diffusion.app.frames import Frames
from flatlora_diffusion.app.site import warn_of_cut
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.draw.stamp import BASE

DRAWING = Drawing(16, 16, 3, 3.0)


@pytest.fixture(scope="module")
def loaded(base_path, written_adapters):
    return Studio(load_pipeline(str(base_path)), "tiny", written_adapters)


@pytest.fixture
def studio(loaded, monkeypatch):
    """One that has kept no pictures of other tests."""
    monkeypatch.setattr(loaded, "_frames", Frames())
    return loaded


@pytest.fixture(scope="module")
def lone(base_path, written_adapters):
    """Draws with a pipeline of its own."""
    pipeline = load_pipeline(str(base_path))
    for label, path in written_adapters.items():
        load_adapter(pipeline, label, path)

    def draw(method, prompt, seed, scale=1.0, drawing=DRAWING):
        return draw_with(pipeline, None if method == BASE else method, prompt, seed, drawing, scale).tobytes()

    return draw


def jobs(studio, seed, prompt="a icon", drawing=DRAWING):
    return [Job(method, [(prompt, seed)], drawing) for method in studio.methods]


def drawn(events):
    return [event.pictures[0].tobytes() for event in events if isinstance(event, Drawn)]


@pytest.mark.slow
def test_jobs_give_the_pictures_of_lone_requests(studio, lone):
    work = [
        Job("LoRA", [("a icon", 1), ("a red icon", 2)], DRAWING, 0.5),
        Job(BASE, [("a icon", 1)], DRAWING, 0.5),
        Job("Flat-LoRA", [("a icon", 1)], DRAWING),
    ]
    done = [event for event in studio.run(work) if isinstance(event, Drawn)]
    assert [event.job for event in done] == [0, 1, 2]
    assert [picture.tobytes() for event in done for picture in event.pictures] == [
        lone("LoRA", "a icon", 1, 0.5),
        lone("LoRA", "a red icon", 2, 0.5),
        lone(BASE, "a icon", 1),
        lone("Flat-LoRA", "a icon", 1),
    ]
    assert all(event.seconds > 0 for event in done)


@pytest.mark.slow
def test_steps_tell_how_far_it_is_and_show_it(studio, monkeypatch):
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_STEPS", 0.0)
    work = [Job(BASE, [("a icon", 1), ("a icon", 2)], DRAWING), Job("LoRA", [("a icon", 1)], DRAWING)]
    steps = [event for event in studio.run(work) if isinstance(event, Step)]
    assert [step.job for step in steps] == [0, 0, 0, 1, 1, 1]
    assert [step.fraction * 9 for step in steps] == pytest.approx([2, 4, 6, 7, 8, 9])
    assert [len(step.sketches) for step in steps] == [2, 2, 2, 1, 1, 1]
    assert all(step.seconds_left > 0 for step in steps[:-1]) and steps[-1].seconds_left == 0
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_STEPS", 1e9)
    assert not [event for event in studio.run(work) if isinstance(event, Step)]


@pytest.mark.slow
def test_a_run_that_is_closed_stops_at_once_and_leaves_the_pipeline_sound(studio, lone):
    run = studio.run(jobs(studio, 1, drawing=Drawing(16, 16, 100_000, 3.0)))
    assert isinstance(next(run), Step)
    run.close()
    for worker in [thread for thread in threading.enumerate() if thread.name == "drawing"]:
        worker.join(10)
        assert not worker.is_alive()
    assert drawn(studio.run(jobs(studio, 5))) == [lone(method, "a icon", 5) for method in studio.methods]


@pytest.mark.slow
def test_a_run_waits_for_another_until_that_is_closed(studio):
    first = studio.run(jobs(studio, 1, drawing=Drawing(16, 16, 100_000, 3.0)))
    next(first)
    ended = threading.Event()
    waiting = studio.run(jobs(studio, 2))

    def wait():
        next(waiting)  # after the first was closed
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not ended.wait(0.5)
    first.close()
    assert ended.wait(30)
    thread.join()
    waiting.close()


def test_closing_the_studio_stops_all_that_is_drawn(base_path, written_adapters):
    studio = Studio(load_pipeline(str(base_path)), "tiny", written_adapters)
    runs = [studio.run(jobs(studio, seed, drawing=Drawing(16, 16, 100_000, 3.0))) for seed in (1, 2)]
    next(runs[0])
    waiting = threading.Thread(target=lambda: list(runs[1]), daemon=True)
    waiting.start()
    assert studio.close(30)
    assert not [thread for thread in threading.enumerate() if thread.name == "drawing"]


@pytest.mark.slow
def test_what_goes_wrong_is_raised_and_the_next_run_is_right(studio, lone, monkeypatch):
    def fail(*arguments, **settings):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "draw_batch", fail)
        with pytest.raises(MemoryError, match="no room"):
            list(studio.run(jobs(studio, 1)))
    assert drawn(studio.run(jobs(studio, 5))) == [lone(method, "a icon", 5) for method in studio.methods]


@pytest.mark.slow
def test_runs_of_many_threads_get_their_own_pictures(studio, lone):
    """Without the lock, adapters and schedulers of one request reach another."""
    got, short = {}, Drawing(16, 16, 1, 3.0)

    def ask(seed):
        got[seed] = drawn(studio.run(jobs(studio, seed, drawing=short)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        assert got[seed] == [lone(method, "a icon", seed, drawing=short) for method in studio.methods]


def test_the_stamp_says_how_a_picture_was_made(studio):
    stamp = studio.stamp("LoRA", "a icon", 7, Drawing(16, 24, 3, 2.5, "blue"), 0.5)
    assert (stamp.prompt, stamp.negative_prompt, stamp.seed) == ("a icon", "blue", 7)
    assert (stamp.width, stamp.height, stamp.steps, stamp.guidance) == (16, 24, 3, 2.5)
    assert (stamp.sampler, stamp.base, stamp.method) == ("Euler", "tiny", "LoRA")
    assert stamp.adapter_sha256 == studio.adapters["LoRA"].sha256 and stamp.scale == 0.5
    assert (stamp.dtype, stamp.device) == ("fp32", "cpu")
    of_base = studio.stamp(BASE, "a icon", 7, DRAWING, 0.5)
    assert of_base.adapter_sha256 is None and of_base.scale is None


def test_no_adapter_is_called_like_the_base(base_path, adapters):
    with pytest.raises(UserError, match="an adapter is called base, as the base is"):
        Studio(load_pipeline(str(base_path)), "tiny", {BASE: adapters["LoRA"]})


def test_a_damaged_adapter_is_named(base_path, adapters):
    adapters["LoRA"].write_bytes(adapters["LoRA"].read_bytes()[:-1])
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: not a sound safetensors file"):
        Studio(load_pipeline(str(base_path)), "tiny", adapters)


def test_the_page_warns_of_prompts_that_are_cut(studio, monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", told.append)
    warn_of_cut(studio, "<b> " + "a " * 80, "short", None)
    assert len(told) == 1
    assert told[0].startswith("&quot;&lt;b&gt; a a a")
