"""The evaluation command: its report against the functions behind it, resuming, and bad input."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_bytes
from flatlora_diffusion.adapter.strength import read_strength
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import find_samples
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import load_pipeline
from flatlora_diffusion.evaluate import drawn as evaluate_drawn
from flatlora_diffusion.evaluate import evaluation, plots
from flatlora_diffusion.evaluate.command import evaluation_parser, main
from flatlora_diffusion.evaluate.denoising import DenoisingSet, embed
from flatlora_diffusion.evaluate.evaluation import REPORT, Evaluation
from flatlora_diffusion.evaluate.flatness import expected_rise, landscape_plane, top_eigenvalue
from flatlora_diffusion.evaluate.merged import adapted_layers, merged_unet
from flatlora_diffusion.evaluate.plots import tradeoff
from flatlora_diffusion.evaluate.request import TABLES, read_plan
from flatlora_diffusion.sdxl.lora import add_lora
from tests.processes import in_processes
from tests.tiny import global_rng_state


@pytest.fixture
def heldout(tmp_path):
    folder = tmp_path / "heldout"
    folder.mkdir()
    for colour in ("navy", "olive"):
        Image.new("RGB", (24, 24), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} icon")
    return folder


@pytest.fixture
def training(tmp_path):
    """Two pictures, one of them with a caption."""
    folder = tmp_path / "training"
    folder.mkdir()
    for colour in ("red", "teal"):
        Image.new("RGB", (24, 24), colour).save(folder / f"{colour}.png")
    (folder / "red.txt").write_text("a red icon")
    return folder


@pytest.fixture
def small(monkeypatch):
    """Few points and few layers and no plots, so that a part takes a moment."""
    monkeypatch.setattr(plots, "PLOTS", {})
    monkeypatch.setattr(evaluation, "filters", lambda unet: ["conv_in", "conv_out"])
    for name, value in (
        ("SIGMAS", (0.1, 0.5)),
        ("DRAWS", 2),
        ("LINE", (0.0, 0.5)),
        ("DIRECTIONS", 1),
        ("PLANE", (0.0, 0.5)),
        ("SCALES", (0.0, 1.0)),
        ("HELDOUT_TIMESTEPS", 4),
        ("TIMESTEPS", 2),
        ("FLATNESS_PICTURES", 1),
        ("CURVED_PICTURES", 1),
        ("ITERATIONS", 1),
    ):
        monkeypatch.setattr(evaluation, name, value)


@pytest.fixture
def command(base_path, adapters, training, heldout, tmp_path, small):
    """Flag -> values of a whole evaluation of two adapters, without drawing."""
    return {
        "--base": [str(base_path)],
        "--adapter": [f"{label}={path}" for label, path in adapters.items()],
        "--heldout": [str(heldout)],
        "--training": [str(training)],
        "--retention": [str(heldout)],
        "--instance_prompt": ["a icon"],
        "--output": [str(tmp_path / "evaluation")],
        "--device": ["cpu"],
    }


@pytest.fixture
def command_of_one(command, adapters):
    """The same of one adapter."""
    return command | {"--adapter": [f"LoRA={adapters['LoRA']}"]}


def words(command: dict[str, list[str]]) -> list[str]:
    repeated = [word for path in command["--adapter"] for word in ("--adapter", path)]
    return repeated + [w for flag, values in command.items() if flag != "--adapter" for w in (flag, *values)]


def report_of(command) -> dict:
    main(words(command))
    return json.loads((images.Path(command["--output"][0]) / REPORT).read_text())


@pytest.mark.slow
def test_the_report_is_what_the_measures_say(command, base_path, adapters, training, heldout, monkeypatch):
    monkeypatch.setattr(evaluation, "HELDOUT_TIMESTEPS", 8)
    rng = global_rng_state()
    report = report_of(command | {"--adapter": [f"Flat-LoRA={adapters['Flat-LoRA']}"]})
    assert global_rng_state() == rng
    assert list(report["methods"]) == ["base", "Flat-LoRA"]
    pipeline = load_pipeline(str(base_path))
    load_adapter(pipeline, "Flat_LoRA", adapters["Flat-LoRA"])
    unet = merged_unet(pipeline, "Flat_LoRA")
    shown = DenoisingSet(pipeline, find_samples(heldout, "a icon"), 16, 8)
    known = DenoisingSet(pipeline, find_samples(training, "a icon")[:1], 16, 2)
    prompts = embed(pipeline, "Flat_LoRA", [*shown.captions, *known.captions])
    losses = shown.losses(unet, prompts)
    found = report["methods"]["Flat-LoRA"]
    assert found["heldout"]["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert [band["loss"] for band in found["heldout"]["bands"]] == pytest.approx(
        losses.view(-1, 4, 2).mean(dim=(0, 2)).tolist(), rel=1e-6
    )
    assert found["retention"]["loss"] == found["heldout"]["loss"]  # the same folder

    def loss(unet):
        return known.losses(unet, prompts).mean().item()

    layers = adapted_layers(pipeline.unet, ["Flat_LoRA"])
    rises = expected_rise(loss, unet, layers, [0.1, 0.5], 2)
    assert [rise["rise"] for rise in found["flatness"]["rise"]] == pytest.approx(
        [rise.rise for rise in rises], rel=1e-4
    )
    plane = landscape_plane(loss, unet, ["conv_in", "conv_out"], [0.0, 0.5])
    assert found["flatness"]["plane"]["losses"] == [pytest.approx(row, rel=1e-5) for row in plane]
    assert found["flatness"]["plane"]["losses"][0][0] == found["flatness"]["loss"]
    assert found["flatness"]["top_eigenvalue"] is None, "one iteration can't tell it"


@pytest.mark.slow
def test_the_hessian_is_a_part_of_its_own_in_full_precision(
    command_of_one, base_path, adapters, training, monkeypatch
):
    monkeypatch.setattr(evaluation, "ITERATIONS", 60)
    monkeypatch.setattr(evaluation, "adapted_layers", lambda *adapted: adapted_layers(*adapted)[:2])
    methods = report_of(command_of_one | {"--parts": ["sharpness"], "--dtype": ["bf16"]})["methods"]
    pipeline = load_pipeline(str(base_path), dtype=torch.bfloat16)
    load_adapter(pipeline, "lora", adapters["LoRA"])
    layers = adapted_layers(pipeline.unet, ["lora"])[:2]
    for label, name in (("base", None), ("LoRA", "lora")):
        unet = merged_unet(pipeline, name).float()
        shown = DenoisingSet(pipeline, find_samples(training, "a icon")[:1], 16, 2)
        prompts = embed(pipeline, name, shown.captions)
        value = top_eigenvalue(partial(shown.parts_of_mean, prompts=prompts), unet, layers)
        assert methods[label]["flatness"] == {"top_eigenvalue": pytest.approx(value, rel=1e-3)}
    assert methods["base"]["flatness"] != methods["LoRA"]["flatness"]


@pytest.mark.slow
def test_a_part_that_does_not_fit_into_the_memory_is_named_and_the_others_are_kept(
    command_of_one, monkeypatch
):
    def too_large(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(evaluation, "top_eigenvalue", too_large)
    with pytest.raises(UserError, match=r"^sharpness of base: the memory of cpu ran out; .*--parts$"):
        main(words(command_of_one | {"--parts": ["losses", "sharpness"]}))
    folder = images.Path(command_of_one["--output"][0])
    assert "heldout" in json.loads((folder / REPORT).read_text())["methods"]["LoRA"]
    assert "- sharpness of base: the memory of cpu ran out" in (folder / TABLES).read_text()
    monkeypatch.setattr(DenoisingSet, "losses", too_large)  # so they are not measured again
    assert "heldout" in report_of(command_of_one | {"--parts": ["losses"]})["methods"]["LoRA"]


def test_models_that_do_not_fit_into_the_memory_are_told(command, monkeypatch):
    def too_large(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(evaluation, "load_pipeline", too_large)
    with pytest.raises(UserError, match=r"^--device cpu: its memory ran out while models were loaded; "):
        main(words(command))


@pytest.mark.slow
def test_the_held_out_pictures_alone_are_enough(command_of_one, tmp_path):
    del command_of_one["--training"], command_of_one["--retention"]
    report = report_of(command_of_one)
    lora = report["methods"]["LoRA"]
    assert report["settings"]["flatness"]["of"] == "heldout"
    assert lora["heldout"] and lora["flatness"]["rise"] and len(lora["tradeoff"]) == 2
    tables = (tmp_path / "evaluation" / "evaluation.md").read_text()
    assert "loss on some of the held-out pictures" in tables and "## Style against retention" in tables


@pytest.mark.slow
def test_what_was_measured_before_stays_in_the_report(command_of_one):
    whole = report_of(command_of_one | {"--parts": ["losses"]})
    both = report_of(command_of_one | {"--parts": ["tradeoff"]})["methods"]["LoRA"]
    assert both["heldout"] == whole["methods"]["LoRA"]["heldout"] and both["tradeoff"]
    again = report_of(command_of_one | {"--parts": ["tradeoff"], "--resolution": ["24"]})["methods"]["LoRA"]
    assert "heldout" not in again and again["tradeoff"] != both["tradeoff"]


@pytest.mark.slow
def test_an_adapter_of_text_encoders_alone_has_no_flatness_of_its_own(command, base_path, tmp_path):
    pipeline = load_pipeline(str(base_path))
    add_lora({"text_encoder": pipeline.text_encoder}, rank=4, alpha=8, seed=0)
    path = tmp_path / "text-alone" / WEIGHTS_NAME
    path.parent.mkdir()
    path.write_bytes(adapter_bytes({"text_encoder": pipeline.text_encoder}, {}))
    command["--adapter"] = [f"text={path}"]
    found = report_of(command | {"--parts": ["flatness", "sharpness"]})["methods"]["text"]["flatness"]
    assert found["rise"] is None and found["plane"]["losses"] and "top_eigenvalue" not in found


@pytest.mark.slow
def test_losses_that_are_not_finite_are_null(command_of_one, monkeypatch):
    monkeypatch.setattr(evaluation, "landscape_line", lambda *arguments: [[1.0, float("nan")]])
    found = report_of(command_of_one | {"--parts": ["flatness"]})["methods"]["LoRA"]["flatness"]
    assert found["line"]["losses"] == [[1.0, None]]


@pytest.mark.slow
def test_labels_may_be_names_of_a_module_s_own(command, adapters):
    command["--adapter"] = [f"half={adapters['LoRA']}", f"Train={adapters['Flat-LoRA']}"]
    assert list(report_of(command | {"--parts": ["losses"]})["methods"]) == ["base", "half", "Train"]


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [(EDMDPMSolverMultistepScheduler, "EDM-style"), (FlowMatchEulerDiscreteScheduler, "flow-matching")],
)
def test_other_objectives_are_refused(command, monkeypatch, scheduler, told):
    original = evaluation.load_pipeline

    def load(*arguments, **settings):
        pipeline = original(*arguments, **settings)
        pipeline.scheduler = scheduler()
        return pipeline

    monkeypatch.setattr(evaluation, "load_pipeline", load)
    with pytest.raises(UserError, match=rf"^--base .*{scheduler.__name__}, and {told} training"):
        main(words(command))


@pytest.mark.slow
def test_the_trade_off_starts_at_the_base_and_meets_the_adapter(command, adapters, monkeypatch):
    monkeypatch.setattr(plots, "PLOTS", {"tradeoff.png": tradeoff})
    report = report_of(command | {"--parts": ["losses", "tradeoff"], "--write_scale": []})
    base, lora = (report["methods"][label] for label in ("base", "LoRA"))
    start, end = lora["tradeoff"]
    assert start["heldout_loss"] == pytest.approx(base["heldout"]["loss"], rel=1e-6)
    assert end["heldout_loss"] == pytest.approx(lora["heldout"]["loss"], rel=1e-6)
    assert end["retention_loss"] == pytest.approx(lora["retention"]["loss"], rel=1e-6)
    assert "tradeoff" not in base and "flatness" not in lora
    folder = images.Path(command["--output"][0])
    assert (folder / "tradeoff.png").is_file() and not (folder / "rise.png").exists()
    assert "| Flat-LoRA" in (folder / "evaluation.md").read_text()
    strength = read_strength(adapters["LoRA"])
    assert dataclasses.asdict(strength) == lora["recommended"]
    assert strength.sentence("LoRA") in (folder / "evaluation.md").read_text()


@pytest.mark.slow
def test_a_trade_off_of_before_is_kept_until_it_is_measured_again(command, merged):
    command |= {"--parts": ["tradeoff"]}
    report_of(command)
    for file in (images.Path(command["--output"][0]) / evaluation.MEASURED).iterdir():
        content = json.loads(file.read_text())
        for point in content["result"]["tradeoff"]:
            del point["heldout_by_picture"], point["retention_by_picture"]
        file.write_text(json.dumps(content))
    merged.clear()
    lora = report_of(command | {"--parts": ["sharpness"]})["methods"]["LoRA"]
    assert len(lora["tradeoff"]) == 2 and "recommended" not in lora
    measured = [scale for _, scale in merged]
    assert report_of(command)["methods"]["LoRA"]["recommended"]["scale"] == 1.0
    assert [scale for _, scale in merged[len(measured) :]] == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.slow
def test_drawn_measures_need_a_clip_and_keep_their_pictures(command, clip_path, tmp_path):
    command |= {"--parts": ["drawn"], "--clip": [str(clip_path)], "--steps": ["2"]}
    report = report_of(command)
    base, lora = (report["methods"][label] for label in ("base", "LoRA"))
    assert base["retention"]["drift"] == 0 < lora["retention"]["drift"]
    assert base["nearest_training"]["true"] == lora["nearest_training"]["true"]
    pictures = (tmp_path / "evaluation" / "pictures").rglob("*.png")
    assert len(list(pictures)) == 3 * 2  # the held-out captions are those of the retention too


@pytest.mark.distributed
def test_two_processes_measure_and_draw_what_one_does(command, clip_path, tmp_path, capfd):
    del command["--retention"]
    command |= {"--parts": ["losses", "drawn"], "--clip": [str(clip_path)], "--steps": ["1"]}
    command |= {"--prompt": ["a cup", "a fox"], "--resolution": ["16"]}

    def measured(rank):
        drawn, draw_batch = [], evaluate_drawn.draw_batch
        merged, merge = [], evaluation.merged_unet
        evaluate_drawn.draw_batch = lambda *given, **how: drawn.append(0) or draw_batch(*given, **how)
        evaluation.merged_unet = lambda *given: merged.append(0) or merge(*given)
        main(words(command))
        return len(drawn), len(merged)

    report = report_of(command)
    capfd.readouterr()
    alone = tmp_path / "evaluation"
    command["--output"] = [str(tmp_path / "together")]
    # Of three methods: two pictures for held-out captions, two for prompts, and one part of losses.
    assert in_processes(measured) == [[6, 2], [6, 1]]
    assert capfd.readouterr().out.count("evaluation.md") == 1
    assert json.loads((tmp_path / "together" / REPORT).read_text()) == report
    for one in (*alone.rglob("*.png"), *(alone / "measured").iterdir()):
        assert (tmp_path / "together" / one.relative_to(alone)).read_bytes() == one.read_bytes()
    assert in_processes(measured) == [[0, 0], [0, 0]]


@pytest.mark.slow
def test_prompts_stand_in_for_pictures_of_the_base(command_of_one, clip_path):
    del command_of_one["--retention"]
    command_of_one |= {
        "--prompt": ["a cat", "a dog"],
        "--clip": [str(clip_path)],
        "--steps": ["2"],
        "--parts": ["losses"],
    }
    report = report_of(command_of_one)
    assert report["settings"]["prompts"] == ["a cat", "a dog"]
    retained = [report["methods"][label]["retention"]["loss"] for label in ("base", "LoRA")]
    assert retained[0] != retained[1]


@pytest.mark.slow
def test_drawing_the_base_s_pictures_leaves_the_adapter_its_text_encoders(command, base_path, tmp_path):
    pipeline = load_pipeline(str(base_path))
    add_lora({"text_encoder": pipeline.text_encoder}, rank=4, alpha=8, seed=0)
    for name, parameter in pipeline.text_encoder.named_parameters():
        if "lora_B" in name:
            parameter.data += 1
    path = tmp_path / "text-alone" / WEIGHTS_NAME
    path.parent.mkdir()
    path.write_bytes(adapter_bytes({"text_encoder": pipeline.text_encoder}, {}))
    del command["--retention"], command["--training"]
    command |= {"--adapter": [f"text={path}"], "--prompt": ["a cat"], "--clip": ["-"], "--steps": ["1"]}
    plan = read_plan(vars(evaluation_parser().parse_all(words(command))))
    measured = Evaluation(dataclasses.replace(plan, parts=["losses"]), tmp_path / "evaluation")
    first, again = (measured._model("text")[1].embed(["a navy icon"]).tokens for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, measured._model("base")[1].embed(["a navy icon"]).tokens)


@pytest.fixture
def merged(monkeypatch):
    """Adapter and scale of every UNet that was merged: losses and trade-offs are measured with one each."""
    calls = []

    def merge(pipeline, name, scale):
        calls.append((name, scale))
        return merged_unet(pipeline, name, scale)

    monkeypatch.setattr(evaluation, "merged_unet", merge)
    return calls


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_where_it_was(command, tmp_path, monkeypatch, merged):
    command |= {"--parts": ["losses", "tradeoff"]}
    whole = report_of(command)
    other = command | {"--output": [str(tmp_path / "again")]}
    _, (lora, _), (flat, _) = losses = merged[:3]
    tradeoffs = [(lora, 0.0), (lora, 1.0), (flat, 0.0), (flat, 1.0)]
    assert merged == [*losses, *tradeoffs] and lora != flat

    def stop(*merging):
        if merging[1:] == (flat, 0.0):
            raise KeyboardInterrupt
        return merge(*merging)

    merge = evaluation.merged_unet
    merged.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "merged_unet", stop)
        main(words(other))
    assert merged == [*losses, *tradeoffs[:2]]
    merged.clear()
    assert report_of(other) == whole
    assert merged == tradeoffs[2:]
    merged.clear()
    assert report_of(other) == whole
    assert merged == [], "nothing is measured a third time"


@pytest.mark.slow
def test_another_adapter_under_a_name_is_measured_anew(command, adapters, merged):
    command |= {"--parts": ["losses"]}
    first = report_of(command)
    _, lora, _ = merged
    merged.clear()
    command["--adapter"] = [f"LoRA={adapters['Flat-LoRA']}", f"Flat-LoRA={adapters['Flat-LoRA']}"]
    second = report_of(command)
    assert merged == [lora]
    assert second["methods"]["LoRA"] == second["methods"]["Flat-LoRA"] == first["methods"]["Flat-LoRA"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--heldout": ["missing"]}, "--heldout missing: no such folder"),
        ({"--adapter": ["base=x"]}, "--adapter base=x: the base itself is called so"),
        ({"--adapter": ["a=x", "a=y"]}, "--adapter a=y: a is x already"),
        ({"--prompt": ["a cat"]}, "--retention and --prompt: give only one of them"),
        ({"--resolution": ["20"]}, "--resolution 20: must be a multiple of 8"),
        ({"--steps": ["0"]}, "--steps 0: must be 1 or more"),
        ({"--caption_chunks": ["0"]}, "--caption_chunks 0: must be 1 or more"),
        ({"--clip": ["missing"]}, "missing: no such folder"),
        ({"--device": ["nowhere"]}, "--device nowhere: "),
        ({"--base": ["missing/base/x"]}, "no such folder"),
        ({"--adapter": ["LoRA=missing"]}, "missing"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(command, tmp_path, changes, said):
    with pytest.raises(UserError) as error:
        main(words(command | changes))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evaluation").exists()


def test_sub_folders_in_kohya_s_layout(command, heldout):
    (heldout / "3_sks fox").mkdir()
    Image.new("RGB", (8, 8)).save(heldout / "3_sks fox" / "a.png")
    given = vars(evaluation_parser().parse_all([*words(command), "--kohya_folders"]))
    assert next(sample.caption for sample in read_plan(given).heldout) == "sks fox"


def test_captions_that_are_missing_are_asked_for(command):
    del command["--instance_prompt"]
    with pytest.raises(UserError, match="has no caption; give --instance_prompt"):
        main(words(command))
