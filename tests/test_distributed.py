"""Two processes: noise of their own, equal adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.test_resume import command

PROJECT = Path(__file__).parents[1]

# The script itself, with a look at what each process holds before and after training.
PROBE = """
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, {project!r})
sys.argv[0] = "train_dreambooth_flat.py"
from flatlora_diffusion.run import Run
from train_dreambooth_flat import main

loop, report = Run._loop, {{"epsilon": [], "captions": []}}

def digest(tensors):
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()

def watched(self, start, stop):
    step = self._optimizer_step
    def look(*arguments):
        name = next(iter(self.flat.layers))
        report["epsilon"].append(digest([self.flat.epsilon(name)]))
        return step(*arguments)
    self._optimizer_step = look
    loop(self, start, stop)
    trained = [p for model in self.learner.trained.values() for p in model.parameters() if p.requires_grad]
    report["adapter"] = digest(trained)
    unet = self.learner.base.unet.named_parameters()
    report["moved"] = sum(float(p.detach().abs().sum()) for name, p in unet if "lora_B" in name)
    Path({folder!r}, f"rank-{{self.accelerator.process_index}}.json").write_text(json.dumps(report))

Run._loop = watched
main()
"""


def launch(launcher: list[str], script: Path, base_path, icons, output, *extra) -> None:
    flags = command(base_path, icons, output, "--max_train_steps", 4, *extra)[2:]
    words = [sys.executable, "-m", *launcher, str(script), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_with_noise_of_their_own_and_equal_adapters(base_path, icons, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE.format(project=str(PROJECT), folder=str(tmp_path)))
    output = tmp_path / "out"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch(torchrun, probe, base_path, icons, output, "--train_text_encoder", "--flat_schedule", "constant")
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["epsilon"]) == 4
    noises = first["epsilon"] + second["epsilon"]
    assert len(set(noises)) == len(noises)
    assert first["adapter"] == second["adapter"] and first["moved"] > 0
    assert json.loads((output / "summary.json").read_text())["processes"] == 2
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_accelerate_launch(base_path, icons, tmp_path):
    output = tmp_path / "out"
    launcher = ["accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    launch(launcher, PROJECT / "train_dreambooth_flat.py", base_path, icons, output)
    assert (output / "pytorch_lora_weights.safetensors").is_file()
