import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import output_lock
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline, native_side
from flatlora_diffusion.draw.stamp import read
from flatlora_diffusion.grid import draw
from flatlora_diffusion.grid.command import main
from flatlora_diffusion.grid.draw import draw_cells, draw_grid
from flatlora_diffusion.grid.flags import grid_parser
from flatlora_diffusion.grid.plan import Grid, Method
from flatlora_diffusion.grid.recipe import Recipe
from flatlora_diffusion.grid.request import read_recipe
from flatlora_diffusion.sheet.layout import contact_sheet

METHODS = [Method("base"), Method("LoRA x 0.5", "one", 0.5), Method("LoRA x 1", "one")]
PROMPTS = ["a red icon", "a blue icon"]
FOOTER = "tiny-sdxl, 2 steps, guidance 3, Euler, 16 x 24 px, fp32; the same initial noise for each seed"
DRAWING = Drawing(16, 24, steps=2, guidance=3.0)


def files(folder):
    """Content of every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pictures(folder):
    """The same of the single pictures."""
    return {name: content for name, content in files(folder).items() if "-seed" in name and name[0] != "."}


@pytest.fixture
def recipe(base_path, adapters):
    return Recipe(str(base_path), Grid(PROMPTS, [3, 4], METHODS), DRAWING, adapters={"one": adapters["LoRA"]})


@pytest.fixture
def words(base_path, adapters):
    """The command line that draws what `recipe` says."""
    lora = adapters["LoRA"].parent
    return [
        *("--base", str(base_path), "--adapter", f"LoRA={lora}@0.5", "--adapter", f"LoRA={lora}"),
        *("--prompt", *PROMPTS, "--seed", "3", "4", "--width", "16", "--height", "24", "--device", "cpu"),
        *("--steps", "2", "--guidance", "3"),
    ]


@pytest.fixture
def words_of_few(words):
    """Three of those pictures."""
    return [*words, "--prompt", "a blue icon", "--seed", "4"]


# The plan.


@pytest.mark.parametrize("places", list(itertools.permutations(("prompt", "seed", "method"))))
@pytest.mark.parametrize("split", range(4))
def test_rows_and_columns_go_through_their_axes_the_first_the_slowest(places, split):
    plan = Grid(PROMPTS, [3, 4], METHODS, rows=places[:split], columns=places[split:])
    values = {"prompt": PROMPTS, "seed": [3, 4], "method": METHODS}
    expected = list(itertools.product(*(values[axis] for axis in places)))
    cells = [cell for row in plan.table() for cell in row]
    assert [tuple(getattr(cell, axis) for axis in places) for cell in cells] == expected
    assert {cell: cell for batch in plan.batches(5) for cell in batch}.keys() == set(cells)
    shown = {"prompt": str, "seed": "seed {}".format, "method": lambda method: method.label}
    for axes, count in ((plan.rows, len(plan.table())), (plan.columns, len(plan.table()[0]))):
        labels = plan.labels(axes)
        assert len(labels) == count
        texts = itertools.product(*([shown[axis](value) for value in values[axis]] for axis in axes))
        assert labels == [text if len(text) > 1 else "".join(text) for text in texts]


def test_settings_of_the_drawing_are_axes_where_they_have_several_values():
    plan = Grid(["a"], [3], METHODS[:1], steps=[1, 2], guidance=[3.0], sampler=["DDIM", "Euler"])
    assert plan.rows == ("prompt", "seed", "steps", "guidance", "sampler") and len(plan) == 4
    assert plan.labels(plan.rows, shared=False) == [
        (f"{steps} steps", sampler) for steps in (1, 2) for sampler in ("DDIM", "Euler")
    ]
    cells = [cell for row in plan.table() for cell in row]
    drawings = [cell.drawing(DRAWING) for cell in cells]
    expected = list(itertools.product((1, 2), ("DDIM", "Euler")))
    assert [(own.steps, own.sampler) for own in drawings] == expected
    assert cells[0].file == "a-seed3-base-1_steps-guidance_3-ddim.png"
    assert {cell for batch in plan.batches(9) for cell in batch} == set(cells)
    assert [len(batch) for batch in plan.batches(9)] == [1] * 4  # of one drawing
    across = Grid(["a"], [3], METHODS, ("prompt", "seed"), ("steps", "method"), steps=[1, 2])
    assert [len(row) for row in across.table()] == [6]
    with pytest.raises(UserError, match="each of prompt, seed, method must be in one of them"):
        Grid(["a"], [3], METHODS, ("prompt", "seed", "steps"))
    with pytest.raises(UserError, match="2 methods, 4000 steps values are 8000 pictures"):
        Grid(["a"], [3], METHODS[:2], steps=range(4000))


def test_a_grid_over_steps_and_guidance_is_drawn_again(words, tmp_path, base_path):
    one = words[: words.index("--adapter")] + words[words.index("--width") : words.index("--steps")]
    first, second = tmp_path / "first", tmp_path / "second"
    varied = ["--prompt", "a icon", "--steps", "1", "2", "--guidance", "3", "1.5"]
    main([*one, *varied, "--columns", "guidance", "method", "--output", str(first)])
    main(["--manifest", str(first), "--output", str(second), "--device", "cpu"])
    assert len(pictures(first)) == 4 and files(first).keys() == files(second).keys()
    assert pictures(first) == pictures(second)
    recipe = Recipe.load(first)
    assert recipe.grid.steps == (1, 2) and recipe.grid.rows == ("prompt", "seed", "steps")
    pipeline = load_pipeline(str(base_path))
    drawing = dataclasses.replace(DRAWING, steps=1, guidance=1.5)
    drawn = draw_with(pipeline, None, "a icon", 0, drawing)
    file = first / "a_icon-seed0-base-1_steps-guidance_1.5.png"
    assert Image.open(file).tobytes() == drawn.tobytes()
    stamp = read(file)
    assert (stamp.steps, stamp.guidance) == (1, 1.5)
    manifest = json.loads((first / "manifest.json").read_text())
    assert "steps" not in manifest["footer"] and "guidance" not in manifest["footer"]
    assert [row["steps"] for row in manifest["rows"]] == [1, 2]


def test_batches_are_of_one_method_and_as_full_as_they_can_be():
    batches = Grid(PROMPTS, [3, 4, 5], METHODS).batches(4)
    assert [len(batch) for batch in batches] == [4, 2] * 3
    assert all(len({cell.method for cell in batch}) == 1 for batch in batches)


def test_every_picture_has_a_readable_file_of_its_own_whatever_the_layout():
    prompts = ["A cat!", "a cat", "a_cat_001", "猫", "犬", "", "x" * 300, "x" * 301, "a/../b"]
    methods = [Method(label) for label in ("base", "LoRA x 0.5", "LoRA x -0.5", "方法", ".")]
    plan = Grid(prompts, [3, 2**64 - 1], methods)
    names = {cell: cell.file for row in plan.table() for cell in row}
    assert len(set(names.values())) == len(plan) and all(len(name) < 120 for name in names.values())
    assert all(name.isascii() and "/" not in name and not name.startswith(".") for name in names.values())
    assert names[plan.table()[0][1]] == "a_cat-seed3-lora_x_0.5.png"
    turned = dataclasses.replace(plan, rows=("method",), columns=("seed", "prompt"))
    assert names.keys() == {cell for row in turned.table() for cell in row}


def test_what_all_share_is_left_to_the_small_print_but_one_label_stays():
    def labels(prompts, seeds, methods, **axes):
        plan = Grid(prompts, seeds, methods, **axes)
        return plan.labels(plan.rows, shared=False), plan.labels(plan.columns, shared=False), plan.shared()

    base = METHODS[:1]
    assert labels(PROMPTS, [3], base) == (PROMPTS, ["base"], ["seed"])
    assert labels(PROMPTS[:1], [3, 4], base) == (["seed 3", "seed 4"], ["base"], ["prompt"])
    assert labels(PROMPTS[:1], [3], base) == (PROMPTS[:1], ["base"], ["seed"])
    axes = {"rows": ("method",), "columns": ("seed", "prompt")}
    assert labels(PROMPTS, [3], METHODS, **axes)[1:] == (PROMPTS, ["seed"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "there is no prompt; give at least one"),
        ({"seeds": ()}, "there is no seed"),
        ({"methods": []}, "there is no method"),
        ({"prompts": ["a", "b", "a"]}, "prompt a: is there twice"),
        ({"seeds": [1, 1]}, "seed 1: is there twice"),
        ({"methods": [Method("base"), Method("base", "one")]}, "method base: is there twice"),
        ({"methods": [Method(" ")]}, "a method has no name"),
        ({"methods": [Method("a", "one", float("nan"))]}, "a: its scale nan must be a finite number"),
        ({"seeds": [2**64]}, "must be 0 or more and have 64 bits at most"),
        ({"rows": ("prompt",)}, "rows prompt, columns method: each of prompt, seed, method must be in one"),
        ({"rows": ("prompt", "seed", "seed")}, "rows prompt seed seed, columns method: each of"),
        ({"columns": ("methods",)}, "columns methods: each of"),
        (
            {"prompts": [str(number) for number in range(700)]},
            "700 prompts, 2 seeds and 3 methods are 4200 pictures, more than the limit of 4096; use fewer",
        ),
    ],
)
def test_grids_that_cannot_be_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Grid(**{"prompts": PROMPTS, "seeds": [3, 4], "methods": METHODS} | changes)


# The pictures.


@pytest.mark.slow
def test_every_picture_is_the_one_drawn_alone_and_says_how_it_was_drawn(recipe, words, adapters, tmp_path):
    main([*words, "--output", str(tmp_path / "out"), "--batch_size", "3"])
    pipeline = load_pipeline(recipe.base)
    facts = load_adapter(pipeline, "one", adapters["LoRA"])
    names = {"base": "base", "LoRA x 0.5": "lora_x_0.5", "LoRA x 1": "lora_x_1"}
    for prompt, seed, method in itertools.product(PROMPTS, (3, 4), METHODS):
        file = tmp_path / "out" / f"{prompt.replace(' ', '_')}-seed{seed}-{names[method.label]}.png"
        expected = draw_with(pipeline, method.adapter, prompt, seed, DRAWING, method.scale)
        assert Image.open(file).tobytes() == expected.tobytes()
        own = read(file)
        assert (own.prompt, own.seed, own.method, own.steps) == (prompt, seed, method.label, 2)
        scale, sha256 = (method.scale, facts.sha256) if method.adapter else (None, None)
        assert (own.scale, own.adapter_sha256, own.base, own.sampler) == (scale, sha256, "tiny-sdxl", "Euler")
    assert len(files(tmp_path / "out")) == 12 + 2
    assert len(set(pictures(tmp_path / "out").values())) == 12


@pytest.mark.slow
def test_the_batch_size_changes_no_bit(words, tmp_path):
    words = [word for word in words if not word.endswith("@0.5")]
    words.remove("--adapter")
    folders = []
    for size in (1, 2, 5):
        main([*words, "--batch_size", str(size), "--output", str(tmp_path / "out")])
        folders.append(files(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    manifests = [json.loads(folder.pop("manifest.json")) for folder in folders]
    assert [manifest["grid"].pop("batch_size") for manifest in manifests] == [1, 2, 5]
    assert folders[0] == folders[1] == folders[2] and manifests[0] == manifests[1] == manifests[2]


@pytest.mark.slow
def test_cells_can_be_drawn_without_a_folder(recipe, adapters):
    pipeline = load_pipeline(recipe.base)
    load_adapter(pipeline, "one", adapters["LoRA"])
    steps = []
    drawn = draw_cells(
        pipeline, recipe.grid, DRAWING, batch_size=4, on_step=lambda step, latents: steps.append(len(latents))
    )
    cell, picture = next(drawn)
    assert (cell.prompt, cell.seed, cell.method) == (PROMPTS[0], 3, METHODS[0]) and picture.size == (16, 24)
    assert steps == [4, 4]
    drawn = {cell: picture} | dict(drawn)
    assert list(drawn) == [cell for batch in recipe.grid.batches(4) for cell in batch]
    by_file = {cell.file: picture for cell, picture in drawn.items()}
    sheet = recipe.sheet(Path("nowhere"), "Euler").draw(lambda file: by_file[file.name])
    expected = contact_sheet(
        [[drawn[cell] for cell in row] for row in recipe.grid.table()],
        columns=[method.label for method in METHODS],
        rows=[(prompt, f"seed {seed}") for prompt in PROMPTS for seed in (3, 4)],
        footer=FOOTER,
    )
    assert sheet.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("scales", "told"),
    [
        ({"A x 2": 2, "B x 0.5": 0.5}, "fp32;"),
        ({"A": 1, "B": 1.0}, "fp32, adapter scale 1;"),
        ({"A": 1, "B x 2": 2}, "fp32, adapter scale 1;"),
        ({"A": 1, "B": 0.5}, "fp32, A at scale 1, B at scale 0.5;"),
    ],
)
def test_the_small_print_has_the_scales_that_no_label_has(recipe, tmp_path, scales, told):
    methods = [Method("base"), *(Method(label, "one", scale) for label, scale in scales.items())]
    own = dataclasses.replace(recipe, grid=dataclasses.replace(recipe.grid, methods=methods))
    assert told in own.sheet(tmp_path, "Euler").footer


def test_what_pictures_should_look_like_stands_beside_rows_of_one_prompt(recipe, icons, tmp_path):
    real = sorted(icons.glob("*.png"))[0]
    own = dataclasses.replace(recipe, references={PROMPTS[1]: real})
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(own.manifest(folder, "Euler", "cpu", {}, {})))
    again = Recipe.load(folder)
    assert {prompt: file.resolve() for prompt, file in again.references.items()} == {PROMPTS[1]: real}
    assert again.adapters and again.sha256 == {}  # a hash that isn't known is that of any file
    rows = own.sheet(folder, "Euler").rows
    assert [row.reference for row in rows] == [None, None, real, real]
    turned = dataclasses.replace(own.grid, rows=("seed",), columns=("prompt", "method"))
    turned = dataclasses.replace(own, grid=turned).sheet(folder, "Euler")
    assert [row.reference for row in turned.rows] == [None, None]


# The folder.


@pytest.mark.slow
def test_the_manifest_draws_the_same_again(words, icons, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "deep" / "second"
    monkeypatch.chdir(tmp_path)
    look = ["--title", "T", "--strip", "icons", "--cell_size", "40", "--margin", "3", "--sampler", "Euler a"]
    layout = ["--rows", "method", "--columns", "seed", "prompt", "--negative_prompt", "green"]
    main([*words, *look, *layout, "--output", "first"])
    main(["--manifest", "first/manifest.json", "--output", str(second), "--device", "cpu"])
    one, other = files(first), files(second)
    manifests = [json.loads(folder.pop("manifest.json")) for folder in (one, other)]
    assert one == other and len(one) == 13
    assert "../first" not in json.dumps(manifests[1]) and str(tmp_path) not in json.dumps(manifests)
    for manifest, folder in zip(manifests, (first, second), strict=True):
        own = manifest["grid"]
        paths = [*manifest.pop("strip"), own.pop("base"), own["adapters"]["adapter_1"].pop("file")]
        assert all((folder / path).exists() for path in paths)
    assert manifests[0] == manifests[1]
    again = tmp_path / "again.png"
    main([str(second), "--output", str(again)])
    assert Image.open(again).tobytes() == Image.open(first / "sheet.png").tobytes()


@pytest.mark.slow
def test_the_sheet_shows_and_says_what_was_drawn(words, tmp_path, capsys):
    output = tmp_path / "out"
    main([*words, "--output", str(output)])
    assert capsys.readouterr().out == f"{output / 'sheet.png'}\n"
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["columns"] == ["base", "LoRA x 0.5", "LoRA x 1"]
    assert [row["label"] for row in manifest["rows"]] == [
        [prompt, f"seed {seed}"] for prompt in PROMPTS for seed in (3, 4)
    ]
    assert manifest["footer"] == FOOTER
    sheet = Image.open(output / "sheet.png")
    assert sheet.tobytes() == draw.draw_sheet(output).tobytes()
    said = sheet.text["parameters"].splitlines()
    assert said[:2] == PROMPTS and said[2].startswith("Steps: 2, Sampler: Euler, CFG scale: 3, Seeds: 3 4, ")


def test_a_killed_command_goes_on_to_the_same_bytes(words, tmp_path, launcher):
    whole, output = tmp_path / "whole", tmp_path / "out"
    main([*words, "--batch_size", "2", "--output", str(whole)])
    command = ("-m", "flatlora_diffusion.grid", *words, "--batch_size", "2", "--output", output)
    running = launcher.start(*command)
    assert running.wait_until(lambda: len(list(output.glob("*-seed*.png"))) >= 5)
    running.kill()
    before = pictures(output)
    assert 5 <= len(before) < 12 and not (output / "sheet.png").exists()
    kept = {name: (output / name).stat().st_ino for name in before}
    assert launcher.run(*command).code == 0
    assert files(output) == files(whole)
    assert {name: (output / name).stat().st_ino for name in before} == kept


@pytest.mark.slow
def test_only_what_is_missing_or_damaged_is_drawn_again(recipe, tmp_path):
    def seen(number, total, cell, picture):
        told.append((number, total, cell.file))
        if len(told) == stop:
            raise KeyError("stopped")

    told, stop, output = [], 5, tmp_path / "out"
    with pytest.raises(KeyError):
        draw_grid(recipe, output, device="cpu", on_picture=seen)
    assert [number for number, _, _ in told] == [1, 2, 3, 4, 5] and {total for _, total, _ in told} == {12}
    assert files(output).keys() == {"manifest.json", *(name for _, _, name in told)}
    stop = 0
    draw_grid(recipe, output, device="cpu", on_picture=seen)
    whole, names = files(output), [name for _, _, name in told]
    assert len(set(names)) == len(names) == 12 and told[-1][0] == 12
    gone, cut, other = names[0], names[1], names[7]
    (output / gone).unlink()
    (output / cut).write_bytes(whole[cut][:-200])
    (output / other).write_bytes(whole[names[2]])
    told.clear()
    draw_grid(recipe, output, device="cpu", on_picture=seen)
    assert {name for _, _, name in told} == {gone, cut, other} and files(output) == whole


@pytest.mark.slow
def test_another_layout_of_the_same_pictures_draws_none(words, tmp_path, monkeypatch):
    output = tmp_path / "out"
    words = [*words, "--seed", "7", "--output", str(output)]
    main(words)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["footer"].endswith("; seed 7") and manifest["rows"][0]["label"] == PROMPTS[0]
    before = pictures(output)
    monkeypatch.setattr(draw, "draw_batch", lambda *_, **__: pytest.fail("drawn"))
    main([*words, "--no_legend", "--columns", "seed", "method", "--title", "T", "--batch_size", "4"])
    manifest = json.loads((output / "manifest.json").read_text())
    assert "footer" not in manifest and manifest["columns"][1] == ["seed 7", "LoRA x 0.5"]
    assert pictures(output) == before


@pytest.mark.slow
def test_another_grid_in_the_folder_is_refused_before_anything_is_loaded(
    words_of_few, adapters, tmp_path, monkeypatch
):
    output, words = tmp_path / "out", words_of_few
    main([*words, "--output", str(output)])
    before = files(output)
    monkeypatch.setattr(draw, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    for changes, message in (
        (["--prompt", "a red icon"], "has a grid with other prompts; give another folder"),
        (["--steps", "1", "--dtype", "bf16"], "other dtype, steps;"),
        (["--seed", "3"], "other seeds;"),
        (["--no_base"], "other methods;"),
        (["--adapter", f"Flat={adapters['Flat-LoRA']}"], "other methods;"),
        (["--base", str(adapters["LoRA"].parent)], "other base;"),
    ):
        with pytest.raises(UserError, match=message):
            main([*words, *changes, "--output", str(output)])
        assert files(output) == before


def test_other_peoples_files_are_never_overwritten(words, tmp_path):
    for name, message in (
        ("sheet.png", "has a sheet.png of something else; give another folder"),
        ("a_red_icon-seed4-base.png", "has a a_red_icon-seed4-base.png of something else"),
        ("manifest.json", "is not valid JSON.*; give another folder"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=message):
            main([*words, "--output", str(folder)])
        assert files(folder) == {name: b"mine"}


@pytest.mark.slow
def test_a_changed_adapter_is_refused(words_of_few, adapters, tmp_path):
    output, again, words = tmp_path / "out", tmp_path / "again", words_of_few
    main([*words, "--output", str(output)])
    before = files(output)
    adapters["LoRA"].write_bytes(adapters["Flat-LoRA"].read_bytes())
    with pytest.raises(UserError, match="has a grid with other adapter files; give another folder"):
        main([*words, "--output", str(output)])
    with pytest.raises(UserError, match=r"isn't the file that the manifest's .* were drawn with .*; restore"):
        main(["--manifest", str(output), "--output", str(again), "--device", "cpu"])
    assert files(output) == before and not again.exists()


@pytest.mark.slow
def test_a_grid_can_take_the_place_of_another(recipe, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    recipe = dataclasses.replace(recipe, grid=dataclasses.replace(recipe.grid, prompts=PROMPTS[:1]))
    draw_grid(recipe, output, device="cpu")
    kept = files(output)
    other = dataclasses.replace(recipe, grid=dataclasses.replace(recipe.grid, prompts=["a icon"]))
    draw_grid(other, output, device="cpu", overwrite=True)
    assert files(output).keys() == {
        *("mine.txt", "manifest.json", "sheet.png"),
        *(f"a_icon-seed{seed}-{name}.png" for seed in (3, 4) for name in ("base", "lora_x_0.5", "lora_x_1")),
    }
    draw_grid(recipe, output, device="cpu", overwrite=True)
    assert files(output) == kept


def test_a_folder_that_is_written_to_is_refused(words, tmp_path):
    with output_lock(tmp_path), pytest.raises(UserError, match=r"--output .*: another run .* writes to it"):
        main([*words, "--output", str(tmp_path)])


# The command line.


def recipe_of(*words):
    return read_recipe(vars(grid_parser().parse_all([*words, "--base", "b"])))


def test_memory_that_runs_out_is_told_in_a_line(words, tmp_path, monkeypatch):
    def too_large(*arguments, **settings):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(draw, "load_pipeline", too_large)
    told = "^out of memory while the grid was drawn: what is in .* stays, and a smaller --batch_size goes on"
    with pytest.raises(UserError, match=told):
        main([*words, "--output", str(tmp_path / "grid")])


def test_adapters_with_scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file@2").touch()
    adapters = ["A=x@0.5", "A=x", "A=x@-1e-1", "B=file@2", "C=file@2@3", "D=a=b"]
    own = recipe_of("--prompt", "p", *(word for text in adapters for word in ("--adapter", text)))
    assert [(m.label, m.adapter and str(own.adapters[m.adapter]), m.scale) for m in own.grid.methods] == [
        ("base", None, 1.0),
        ("A x 0.5", "x", 0.5),
        ("A x 1", "x", 1.0),
        ("A x -0.1", "x", -0.1),
        ("B", "file@2", 1.0),
        ("C x 3", "file@2", 3.0),
        ("D", "a=b", 1.0),
    ]


def test_prompts_from_files_and_captions(icons, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n# a note\n  a cat \n\na dog, 犬\na cat\n", encoding="utf-8")
    assert recipe_of("--prompts_file", str(file)).grid.prompts == ("a cat", "a dog, 犬")
    assert recipe_of("--captions", str(icons)).grid.prompts == ("a blue icon", "a red icon")
    assert recipe_of("--captions", str(icons), "--limit", "1").grid.prompts == ("a blue icon",)
    (icons / "metadata.jsonl").write_text('{"file_name": "red.png", "words": "a \u72ac", "text": "no"}\n')
    named = ("--caption_column", "words")
    assert recipe_of("--captions", str(icons), *named).grid.prompts == ("a 犬",)
    named = ("--instance_prompt", "x")
    assert recipe_of("--captions", str(icons), *named).grid.prompts == ("x", "no")
    (icons / "green.txt").write_text("{instance_prompt} in green")
    assert recipe_of("--captions", str(icons), *named).grid.prompts == ("x", "x in green", "no")
    (icons / "10_sks fox").mkdir()
    Image.new("RGB", (8, 8)).save(icons / "10_sks fox" / "fox.png")
    assert recipe_of("--captions", str(icons), *named, "--kohya_folders").grid.prompts[0] == "sks fox"
    with pytest.raises(UserError, match=r"--captions .*: a caption has .instance_prompt.; say with"):
        recipe_of("--captions", str(icons))


P = ("--prompt", "p")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "prompts come from one of --prompt, --prompts_file, --captions, --dataset_name; none of them is",
        ),
        ([*P, "--captions", "x"], "prompts come from one of .*; 2 of them"),
        (["--prompts_file", "gone.txt"], "--prompts_file gone.txt: no such file"),
        (["--prompts_file", "empty.txt"], "--prompts_file empty.txt: no prompt in it"),
        (["--prompts_file", "binary.txt"], "--prompts_file binary.txt: not text in UTF-8"),
        (["--captions", "gone"], "--captions gone: no such folder"),
        (["--captions", "silent"], "--captions silent: no prompt in it"),
        (["--dataset_name", "silent"], "--caption_column is missing; name the column of --dataset_name"),
        ([*P, "--limit", "0"], "--limit 0: must be greater than 0"),
        ([*P, "--adapter", "x"], "--adapter: x: must be NAME=PATH"),
        ([*P, "--adapter", "x=gone@"], "--adapter: x=gone@: must be NAME=PATH or NAME=PATH@SCALE"),
        ([*P, "--adapter", "x=gone@nan"], "gone@nan doesn't exist, 'nan' is no number"),
        ([*P, "--adapter", "base=gone"], "method base: is there twice"),
        (
            [*P, "--adapter", "x=gone", "--adapter", "x=other"],
            "--adapter x=other: x is gone already; give it",
        ),
        ([*P, "--adapter", "x=gone@2", "--adapter", "x=gone@2.0"], "method x x 2: is there twice"),
        ([*P, "--no_base"], "there is no method"),
        ([*P, "--rows", "prompt", "prompts"], "--rows: invalid choice: 'prompts'"),
        (
            [*P, "--rows", "seed", "--columns", "seed", "method"],
            "each of prompt, seed, method must be in one",
        ),
        ([*P, "--sampler", "DPM"], "--sampler: invalid choice"),
        ([*P, "--resolution", "12"], "width 12: must be a multiple of 8 greater than 0"),
        ([*P, "--height", "0"], "height 0: must be a multiple of 8"),
        ([*P, "--steps", "0"], "steps 0: must be greater than 0"),
        ([*P, "--caption_chunks", "0"], "caption_chunks 0: must be greater than 0"),
        ([*P, "--guidance", "inf"], "guidance inf: must be a finite number"),
        ([*P, "--batch_size", "0"], "batch_size 0: must be greater than 0"),
        ([*P, "--seed", "-1"], "seed -1: must be 0 or more"),
        ([*P, "--device", "abacus"], "--device abacus: "),
        (
            [*P, "--strip", "silent", "gone"],
            "nothing was drawn: gone: cannot be read as an image .No such file",
        ),
        ([*P, "--cell_size", "0"], "cell_size=0 must be at least 1"),
        ([*P, "--margin", "-1"], "margin=-1 must be at least 0"),
        ([*P, "--cell_size", "9000"], "nothing was drawn: the sheet would have .* more than the limit of 64"),
        ([*P, "--output", "empty.txt"], "empty.txt is a file, not a folder"),
        (["--manifest", "m.json", "--steps", "3"], "--(base|steps): is in the manifest; leave it out"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("# nothing\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\xfd")
    Path("silent").mkdir()
    Image.new("RGB", (8, 8)).save("silent/a.png")
    monkeypatch.setattr(draw, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        main(["--base", "b", "--output", "out", "--device", "cpu", "--resolution", "64", *words])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("size", "expected"),
    [([], "own x own"), (["--width", "24"], "24 x own"), (["--resolution", "24"], "24 x 24")],
)
def test_pictures_have_the_size_of_the_base_unless_flags_say_another(tmp_path, base_path, size, expected):
    own = native_side(load_pipeline(str(base_path)))
    assert own != 1024
    main(["--base", str(base_path), *P, "--steps", "1", "--output", str(tmp_path / "out"), *size])
    drawing = json.loads((tmp_path / "out/manifest.json").read_text())["grid"]["drawing"]
    assert f"{drawing['width']} x {drawing['height']}" == expected.replace("own", str(own))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*manifest.json \(No such file"),
        ("{", "manifest.json is not valid JSON"),
        ('{"columns": ["a"], "rows": []}', "tells of a sheet, but not how its pictures were drawn"),
        ('{"columns": ["a"], "rows": [], "grid": {"base": "b"}}', "damaged, or of another version"),
        ('{"columns": ["a"], "rows": [], "grid": []}', "damaged, or of another version"),
    ],
)
def test_manifests_of_no_grid_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        main(["--manifest", str(tmp_path), "--output", str(tmp_path / "out")])


def test_what_is_missing_is_named(capsys):
    for words, message in (([], "--output is missing"), (["--output", "o"], "--base is missing")):
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda words=words: main(words))
        assert exit_.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")
