"""Several processes share out the pictures of a grid, and come to the bytes of one."""

import logging

import pytest

from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.lock import output_lock
from flatlora_diffusion.grid import draw
from flatlora_diffusion.grid.command import main
from tests.grid.test_draw import files, pictures
from tests.processes import in_processes

pytestmark = pytest.mark.distributed


@pytest.fixture
def words(base_path, adapters, tmp_path):
    return [
        *("--base", str(base_path), "--adapter", f"LoRA={adapters['LoRA'].parent}", "--device", "cpu"),
        *(
            "--prompt",
            "a red icon",
            "--seed",
            "0",
            "1",
            "2",
            "--width",
            "16",
            "--height",
            "16",
            "--steps",
            "1",
        ),
        *("--guidance", "1", "--output", str(tmp_path / "out")),
    ]


def drawing(words, **refused):
    """Draw in this process, counting: how many batches, and what ended it if anything did."""
    batches, draw_batch = [], draw.draw_batch

    def count(pipeline, adapter, wanted, *arguments, **settings):
        if wanted[0][1] == refused.get("seed"):
            raise UserError("the disk is full")
        batches.append(wanted)
        return draw_batch(pipeline, adapter, wanted, *arguments, **settings)

    draw.draw_batch = count  # of a process that ends with the test
    logging.getLogger().handlers.clear()  # pytest's, that the command has its own
    with pytest.raises(SystemExit) as left:
        run_command(lambda: main(words))
    return len(batches), left.value.code


def test_two_processes_draw_what_one_draws_and_only_what_is_missing(words, tmp_path, capfd):
    whole, output = tmp_path / "whole", tmp_path / "out"
    main([*words, "--output", str(whole)])
    capfd.readouterr()
    assert in_processes(lambda rank: drawing(words)) == [[3, 0], [3, 0]]
    said = capfd.readouterr()
    assert said.out.count(f"{output / 'sheet.png'}\n") == 1
    assert said.err.count("2 processes draw 6 pictures\n") == 1 and "6/6" in said.err
    assert files(output) == files(whole)
    for gone in list(pictures(output))[:2]:
        (output / gone).unlink()
    kept = {name: (output / name).stat().st_ino for name in pictures(output)}
    assert in_processes(lambda rank: drawing(words)) == [[1, 0], [1, 0]]
    assert files(output) == files(whole)
    assert {name: (output / name).stat().st_ino for name in kept} == kept


def test_an_error_in_one_process_ends_all_and_is_told_in_a_line(words, tmp_path, capfd):
    assert in_processes(lambda rank: drawing(words, seed=rank or None)) == [[1, 2], [0, 2]]
    said = capfd.readouterr().err
    assert said.count("error: process 1: the disk is full\n") == said.count("error") == 1
    assert "Traceback" not in said
    # What was drawn stays, and the folder is free: any number of processes goes on with it.
    kept = {name: (tmp_path / "out" / name).stat().st_ino for name in pictures(tmp_path / "out")}
    assert kept
    main(words)
    assert len(pictures(tmp_path / "out")) == 6
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept


def test_what_the_main_process_is_refused_none_does(words, tmp_path, capfd):
    with output_lock(tmp_path / "out"):
        assert in_processes(lambda rank: drawing(words)) == [[0, 2], [0, 2]]
    said = capfd.readouterr().err
    assert said.startswith("error: --output ") and "another run" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_on_a_disk_of_another_machine_are_missed(words, tmp_path, capfd):
    def elsewhere(rank):
        return drawing([*words, "--output", str(tmp_path / str(rank))])

    assert in_processes(elsewhere) == [[0, 2], [0, 2]]
    said = capfd.readouterr().err
    assert said.count("error") == 1 and "isn't there; all machines must share it" in said
    (tmp_path / "1").mkdir()
    assert in_processes(elsewhere) == [[3, 2], [3, 2]]
    said = capfd.readouterr().err
    assert (
        said.count("error") == 1 and "3 pictures of other processes aren't there; all machines must" in said
    )
    assert not (tmp_path / "0" / "sheet.png").exists()
