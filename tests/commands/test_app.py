"""The app's command line, up to the page that it serves."""

import os
import re
import signal
import socket
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

from flatlora_diffusion.app import serve
from flatlora_diffusion.app.flags import parse_app_arguments
from flatlora_diffusion.app.serve import DEMO_BASE, PROJECT, _base, _runs, demo_folder
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.output.reading import find_runs

pytest_plugins = ["tests.trained"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--adapter", "broken"], r"--adapter: broken: must be NAME=PATH"),
        (["--adapter", "a=nowhere"], r"nowhere: not a sound safetensors file"),
        (
            ["--adapter", "a=PICKLED"],
            r"pickled: has only pytorch_lora_weights\.bin; a pickled",
        ),
        (["--adapter", "base=ADAPTER"], r"--adapter base=\.\.\.: each needs a name of its own, and not base"),
        (["--adapter", "a=ADAPTER", "--base", "nowhere/x"], r"nowhere/x"),
        (["--adapter", "a=ADAPTER", "--device", "warp"], r"--device warp: "),
        (["--run", "nowhere"], r"--run nowhere: no such folder"),
        (["--auth", "secret"], r"--auth: must be USER:PASSWORD"),
        (["--port", "99999"], r"--port: 99999: must be a whole number from 1 to 65535"),
        (["--dtype", "int3"], r"--dtype: invalid choice: 'int3'"),
        (["--sharing"], r"unknown argument --sharing"),
    ],
)
def test_bad_flags_get_one_line(base_path, adapters, tmp_path, flags, told):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_lora_weights.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    places = {"ADAPTER": str(adapters["LoRA"]), "PICKLED": str(pickled)}
    words = [re.sub("|".join(places), lambda met: places[met[0]], flag) for flag in flags]
    if "--base" not in words:
        words += ["--base", str(base_path)]
    with pytest.raises(UserError, match=told) as refused:
        serve.serve(parse_app_arguments(words))
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)


def test_the_command_exits_with_code_2(launcher):
    done = launcher.run("app.py", "--run", "nowhere")
    assert done.code == 2
    assert done.stderr == "error: --run nowhere: no such folder; give the --output_dir of a training run\n"


def test_without_gradio_it_says_what_to_do(launcher):
    done = launcher.run("app.py", prepare=hide_gradio)
    assert done.code == 2
    assert done.stderr == "error: app.py needs the package gradio: pip install gradio\n"


def hide_gradio() -> None:
    sys.modules["gradio"] = None


def test_what_a_run_left_is_served(launcher, comparison):
    port = free_port()
    running = launcher.start("app.py", "--run", comparison, "--port", port, prepare=forget_folder)
    assert running.wait_until(lambda: running.stdout.endswith("\n"))
    assert running.stdout == f"the page is at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    client = Client(f"http://127.0.0.1:{port}/", download_files=False, verbose=False)
    assert list(client.predict(api_name="/methods")) == ["base", "LoRA", "Flat-LoRA"]
    files, facts = client.predict("a icon", "", 3, 2, 3.0, 1.0, "default", 16, 16, api_name="/compare")
    assert len(files) == 3 and facts["base"]["base"] == "tiny-sdxl"
    places = [Path(file["path"]) for file in files]
    assert not any(place.is_relative_to(Path(tempfile.gettempdir(), "gradio")) for place in places)
    assert client.predict("LoRA", api_name="/training_run")["losses"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.2:{port}/")  # it listens on one address
    client.submit("a icon", "", 3, 100, 3.0, 1.0, "default", 24, 24, api_name="/compare")
    os.kill(running.pid, signal.SIGTERM)  # while it draws, or is about to
    assert running.wait() == 0
    assert running.stdout.endswith("the page is closed\n") and not running.stderr
    assert not any(place.exists() for place in places)


def forget_folder() -> None:
    os.environ.pop("GRADIO_TEMP_DIR", None)


def test_visitors_are_asked_for_the_password(launcher, base_path, adapters):
    port = free_port()
    flags = ["--base", base_path, "--adapter", f"mine={adapters['LoRA']}", "--auth", "me:secret"]
    running = launcher.start("app.py", *flags, "--port", port)
    assert running.wait_until(lambda: "the page is at" in running.stdout)
    address = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{address}/config").status_code == 401
    wrong = httpx.post(f"{address}/login", data={"username": "me", "password": "wrong"})
    assert wrong.status_code == 400
    assert list(Client(address, auth=("me", "secret"), verbose=False).predict(api_name="/methods")) == [
        *("base", "mine")
    ]
    running.kill()


def test_adapters_of_make_demo_come_before_those_of_the_project(tmp_path):
    with pytest.raises(UserError, match=r"only in the project's repository.* give --run DIR, or --base with"):
        demo_folder(tmp_path)
    (tmp_path / "assets").mkdir()
    with pytest.raises(UserError, match=r"no adapters in .*assets/adapters: restore that folder"):
        demo_folder(tmp_path)
    for folder in ("assets/adapters", "demo-output"):
        for arm in ("lora", "flat_lora"):
            (tmp_path / folder / arm).mkdir(parents=True)
            (tmp_path / folder / arm / "pytorch_lora_weights.safetensors").touch()
        assert demo_folder(tmp_path) == tmp_path / folder
    assert demo_folder(PROJECT).name in ("demo-output", "adapters")


def test_runs_with_the_same_labels_are_told_apart(comparison, clean_copy):
    other = clean_copy(comparison, "other")
    names = ["compared: LoRA", "compared: Flat-LoRA", "other: LoRA", "other: Flat-LoRA"]
    assert list(_runs([comparison, other])) == names
    with pytest.raises(UserError, match=r"compared: another one has the same name compared: LoRA"):
        _runs([comparison, comparison])


def test_the_base_is_that_of_the_runs(comparison, base_path):
    assert _base(find_runs(comparison)) == str(base_path)
    assert _base({}) == str(DEMO_BASE)


def test_an_installed_package_has_no_base_of_its_own(comparison, base_path, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "DEMO_BASE", tmp_path / "assets" / "micro-sdxl")
    assert _base(find_runs(comparison)) == str(base_path)
    with pytest.raises(UserError, match=r"^no --base: the demo base is only in the project's repository"):
        _base({})


def test_prompts_of_a_run_are_presets(comparison):
    from flatlora_diffusion.app.presets import presets
    from flatlora_diffusion.app.references import References

    found = presets({}, References.of_runs(find_runs(comparison)))
    assert "a <b>icon</b> ${1+1} {{x}}" in [prompt for prompts in found.values() for prompt in prompts]


def test_flags_answer_at_once(monkeypatch):
    given = parse_app_arguments(["--adapter", "a=b=c", "--auth", "me:a:b"])
    assert given.adapter == [("a", serve.Path("b=c"))] and given.auth == ("me", "a:b")
    assert (given.host, given.share, given.run, given.device) == ("127.0.0.1", False, [], None)
