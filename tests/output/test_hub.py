"""The hub, without a network: what is asked of it, what goes there, and that the token goes nowhere else."""

import dataclasses
import json
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, httpx

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.output import hub
from flatlora_diffusion.output.card import CARD, is_ours, sealed
from flatlora_diffusion.train import afterwards, loop
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from flatlora_diffusion.train.loop import Run

TOKEN = "hf_DoNotTellAnybody"


def refusal(kind: type, status: int, message: str) -> Exception:
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return kind(message, response=httpx.Response(status, request=request))


class Hub:
    """In place of the hub: a list of calls, and the README.md that it has."""

    def __init__(self):
        self.calls = []
        self.readme = None
        self.failure = None

    def create_repo(self, **settings):
        self.calls.append(("create_repo", settings))
        if self.failure:
            raise self.failure
        return SimpleNamespace(repo_id=f"me/{settings['repo_id']}")

    def hf_hub_download(self, repo_id, filename, token):
        self.calls.append(("hf_hub_download", {"repo_id": repo_id, "filename": filename, "token": token}))
        if self.readme is None:
            raise refusal(RemoteEntryNotFoundError, 404, "404 Client Error.")
        return str(self.readme)

    def upload_folder(self, **settings):
        self.calls.append(("upload_folder", settings))
        if self.failure:
            raise self.failure
        folder = Path(settings["folder_path"])
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        self.uploaded = set(filter_repo_objects(files, ignore_patterns=settings["ignore_patterns"]))


@pytest.fixture
def fake(monkeypatch):
    fake = Hub()
    for name in ("create_repo", "hf_hub_download", "upload_folder"):
        monkeypatch.setattr(hub, name, getattr(fake, name))
    return fake


@pytest.fixture
def pushed(config):
    return dataclasses.replace(
        config,
        max_train_steps=2,
        checkpointing_steps=1,
        report_to="tensorboard",
        push_to_hub=True,
        hub_token=TOKEN,
    )


@pytest.mark.slow
def test_a_run_opens_the_repository_first_and_uploads_what_it_made(pushed, fake, monkeypatch):
    began = []
    original = Run.train
    monkeypatch.setattr(Run, "train", lambda self: (began.append(list(fake.calls)), original(self))[1])
    output = Path(pushed.output_dir)
    train(pushed)
    opened = ("create_repo", {"repo_id": "run", "exist_ok": True, "token": TOKEN})
    assert began == [[opened]]
    assert fake.calls[1] == ("hf_hub_download", {"repo_id": "me/run", "filename": CARD, "token": TOKEN})
    name, upload = fake.calls[2]
    assert name == "upload_folder"
    assert {key: upload[key] for key in ("repo_id", "folder_path", "commit_message", "token")} == {
        "repo_id": "me/run",
        "folder_path": str(output),
        "commit_message": "End of training",
        "token": TOKEN,
    }
    assert len(list(output.glob("checkpoint-*"))) == 2 and list(output.glob("logs/**/events*"))
    assert fake.uploaded == {WEIGHTS_NAME, "summary.json", CARD}
    assert 'load_lora_weights("me/run", weight_name=' in (output / CARD).read_text()


@pytest.mark.slow
def test_the_token_is_written_nowhere(pushed, fake, capsys, caplog, monkeypatch):
    caplog.set_level("DEBUG")

    class AskToStop(Callback):
        def on_train_begin(self, run):
            signal.raise_signal(signal.SIGINT)

    words = ["train_dreambooth_flat.py", "--hub_token", TOKEN, f"--hub_token={TOKEN}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(RunInterruptedError) as stop:
        train(pushed, callbacks=[AskToStop()])
    assert str(stop.value).splitlines()[-1] == (
        "  python train_dreambooth_flat.py --hub_token HUB_TOKEN --hub_token=HUB_TOKEN "
        "--resume_from_checkpoint latest"
    )
    train(dataclasses.replace(pushed, resume_from_checkpoint="latest"))
    files = [path for path in Path(pushed.output_dir).rglob("*") if path.is_file()]
    assert {"state.json", "summary.json", "hparams.yml", CARD, WEIGHTS_NAME} <= {path.name for path in files}
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err + caplog.text + str(stop.value) + repr(pushed)
    assert (
        json.loads((Path(pushed.output_dir) / "summary.json").read_text())["settings"]["push_to_hub"] is True
    )


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            refusal(HfHubHTTPError, 401, "401 Client Error.\n\nInvalid username or password."),
            "401 Client Error.",
        ),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "Name or service not known"),
        (ValueError(f"Illegal header value b'Bearer {TOKEN}'"), "Illegal header value b'Bearer ...'"),
    ],
    ids=["refused", "no network", "a malformed token"],
)
def test_a_closed_hub_stops_the_run_before_it_begins(pushed, fake, failure, reason):
    fake.failure = failure
    with pytest.raises(UserError) as error:
        train(pushed)
    message = str(error.value)
    assert message.startswith("--push_to_hub: run cannot be opened (") and reason in message
    assert "`hf auth login` or give --hub_token" in message
    assert "\n" not in message and TOKEN not in message
    assert not Path(pushed.output_dir).exists()


def test_offline_the_hubs_own_functions_give_one_line(pushed):
    """The tests run with HF_HUB_OFFLINE: nothing is faked here."""
    with pytest.raises(UserError, match=r"^--push_to_hub: run cannot be opened .*offline"):
        train(pushed)
    with pytest.raises(UserError, match=r"^--push_to_hub: a--b cannot be opened"):
        train(dataclasses.replace(pushed, hub_model_id="a--b"))
    with pytest.raises(UserError, match=r"the upload to me/run failed .*; upload by hand with: hf upload"):
        hub.upload(pushed, "me/run")


@pytest.mark.slow
def test_a_failed_upload_loses_nothing(pushed, fake, monkeypatch, capsys):
    upload = fake.upload_folder

    def fail(**settings):
        fake.failure = refusal(HfHubHTTPError, 500, "500 Server Error: it's down\nsecond line")
        upload(**settings)

    monkeypatch.setattr(hub, "upload_folder", fail)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: train(pushed))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the upload to me/run failed (500 Server Error: it's down); upload by hand with: hf upload" in line
    command = shlex.split(line.split("by hand with: ")[1].split(" (what was")[0])
    assert command[:5] == ["hf", "upload", "me/run", pushed.output_dir, "."]
    patterns = fake.calls[-1][1]["ignore_patterns"]
    assert command[5:] == [word for pattern in patterns for word in ("--exclude", pattern)]
    assert f"what was trained is in {pushed.output_dir}; with --resume_from_checkpoint latest" in line
    assert {WEIGHTS_NAME, CARD} <= {path.name for path in Path(pushed.output_dir).iterdir()}
    # As the line says: the same command then does the rest.
    monkeypatch.undo()
    fake.failure, fake.calls = None, []
    for name in ("create_repo", "hf_hub_download", "upload_folder"):
        monkeypatch.setattr(hub, name, getattr(fake, name))
    monkeypatch.setattr(loop, "Learner", lambda *_, **__: pytest.fail("it trains again"))
    elsewhere = {"hub_model_id": "icons", "hub_token": None}
    train(dataclasses.replace(pushed, resume_from_checkpoint="latest", **elsewhere))
    assert fake.calls[-1][1]["repo_id"] == "me/icons"
    assert fake.uploaded == {WEIGHTS_NAME, "summary.json", CARD}


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("CUDA"), UserError("full"), OSError(28, "No space")]
)
def test_what_fails_after_training_keeps_nothing_else_from_being_done(pushed, fake, monkeypatch, failure):
    def fail(*arguments, **settings):
        raise failure

    monkeypatch.setattr(afterwards, "draw_grid", fail)
    with pytest.raises(UserError) as error:
        train(dataclasses.replace(pushed, validation_prompt=("a icon",), validation_epochs=0))
    message = str(error.value)
    assert f"what was trained is in {pushed.output_dir}" in message and "\n" not in message
    assert ("out of memory while the comparison was drawn" in message) == ("Memory" in type(failure).__name__)
    assert is_ours(Path(pushed.output_dir, CARD).read_bytes())
    assert WEIGHTS_NAME in fake.uploaded


def test_a_base_that_has_gone_before_the_comparison_is_named_by_the_trainers_flag(
    config, clean_copy, base_path
):
    base = clean_copy(base_path, "base")

    class Remove(Callback):
        def on_train_end(self, run):
            shutil.rmtree(base)

    config = dataclasses.replace(
        config, pretrained_model_name_or_path=str(base), validation_prompt=("a icon",), validation_epochs=0
    )
    with pytest.raises(
        UserError, match=rf"^--pretrained_model_name_or_path {base}: .*what was trained is in"
    ):
        train(config, [Remove()])


@pytest.mark.slow
def test_ctrl_c_after_training_says_where_the_adapter_is(pushed, fake, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(afterwards, "write_card", interrupt)
    with pytest.raises(RunInterruptedError, match=r"interrupted; what was trained is in .*run; with") as stop:
        train(pushed)
    assert stop.value.exit_code == 130
    assert Path(pushed.output_dir, WEIGHTS_NAME).is_file()


@pytest.mark.parametrize("whose", ["ours", "somebody's"])
def test_a_card_that_somebody_wrote_on_the_hub_stays(pushed, fake, tmp_path, whose):
    output = Path(pushed.output_dir)
    output.mkdir()
    fake.readme = tmp_path / "README.md"
    fake.readme.write_bytes(sealed(b"# An earlier one\n") if whose == "ours" else b"# Mine\n")
    for name in (CARD, WEIGHTS_NAME, "checkpoint-2"):
        (output / name).touch()
    hub.upload(pushed, "me/run")
    assert fake.uploaded == ({CARD, WEIGHTS_NAME} if whose == "ours" else {WEIGHTS_NAME})


@pytest.mark.parametrize("logging_dir", ["logs", "my/logs"])
def test_what_stays_at_home(pushed, fake, logging_dir):
    output = Path(pushed.output_dir)
    kept = {
        *("summary.json", "lora/summary.json", "my/notes.txt", "comparison.png", "comparison/000-base.png"),
        *("validation/step-000002.png", "flat_lora/validation/step-000002/000-seed3.png"),
    }
    left = {
        *("checkpoint-2/state.json", "lora/checkpoint-10/optimizer.safetensors"),
        *(".unfinished-checkpoint-4/state.json", "lora/.hidden", ".pytorch_lora_weights.safetensors.tmp"),
        *(f"{logging_dir}/run/events", f"flat_lora/{logging_dir}/hparams.yml"),
    }
    for name in kept | left:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()
    hub.upload(dataclasses.replace(pushed, logging_dir=logging_dir), "me/run")
    assert fake.uploaded == kept


def test_a_token_beside_wandb_is_refused():
    """wandb stores the command line of every run."""
    needed = {"pretrained_model_name_or_path": "b", "instance_data_dir": "d", "instance_prompt": "p"}
    for tracker in ("wandb", "all"):
        with pytest.raises(UserError, match=f"^--hub_token with --report_to {tracker}: .*hf auth login"):
            TrainConfig(**needed, report_to=tracker, hub_token=TOKEN)
        TrainConfig(**needed, report_to=tracker, push_to_hub=True)


def test_the_flags_are_those_of_the_diffusers_script():
    required = ["--pretrained_model_name_or_path", "b", "--instance_data_dir", "d", "--instance_prompt", "p"]
    given = parse_train_config([*required, "--push_to_hub", "--hub_token", "t", "--hub_model_id", "me/x"])
    assert (given.push_to_hub, given.hub_token, given.hub_model_id) == (True, "t", "me/x")
