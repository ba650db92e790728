"""The page as a Space of Hugging Face: the training run in `run/` beside this file."""

import tempfile
from pathlib import Path

from flatlora_diffusion.app.__main__ import main
from flatlora_diffusion.common.command import run_command

HERE = Path(__file__).resolve().parent
KEPT = Path("/data")  # a Space's persistent storage, where it has any

arguments = ["--run", str(HERE / "run"), "--host", "0.0.0.0", "--port", "7860"]
arguments += ["--votes", str((KEPT if KEPT.is_dir() else Path(tempfile.gettempdir())) / "votes.jsonl")]
if (HERE / "base").is_dir():
    arguments += ["--base", str(HERE / "base")]

if __name__ == "__main__":
    run_command(lambda: main(arguments))
