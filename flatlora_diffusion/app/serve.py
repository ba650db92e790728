"""From the app's flags to a page that is served."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.adapter.mix import Source
from flatlora_diffusion.app.engine import Studio
from flatlora_diffusion.app.first import FirstComparison
from flatlora_diffusion.app.guard import KnownHosts
from flatlora_diffusion.app.measured import Measured
from flatlora_diffusion.app.page import build, launch_settings
from flatlora_diffusion.app.presets import presets
from flatlora_diffusion.app.references import References
from flatlora_diffusion.app.site import Site
from flatlora_diffusion.app.votes import VoteFile
from flatlora_diffusion.common.command import hide_progress_bars
from flatlora_diffusion.common.devices import DTYPES, checked_device
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.pipeline import load_pipeline
from flatlora_diffusion.draw.stamp import BASE, base_name
from flatlora_diffusion.output.names import ARMS, BEST
from flatlora_diffusion.output.reading import RunFolder, find_runs

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).parents[2]
DEMO_BASE = PROJECT / "assets" / "micro-sdxl"
DEMO_STEPS = 20  # on two cores a comparison takes seconds, and more steps don't show
DEMO_GUIDANCE = 2.0


def serve(given: argparse.Namespace) -> None:
    """Load the base and the adapters, and serve the page until Ctrl-C.

    Args:
        given: From `flags.parse_app_arguments`.

    Raises:
        UserError: A flag names something that is missing, damaged, or doesn't fit the base.
    """
    hide_progress_bars()
    if not given.votes.parent.is_dir():
        raise UserError(f"--votes {given.votes}: there is no folder {given.votes.parent}; make it")
    folders = given.run or ([] if given.adapter else [demo_folder(PROJECT)])
    runs = _runs(folders)
    adapters = _adapters(runs, dict(given.adapter))
    base = given.base or _base(runs if given.run else {})
    device = checked_device(given.device)
    pipeline = load_pipeline(base, device=device, dtype=DTYPES[given.dtype])
    studio = Studio(
        pipeline,
        base_name(base),
        adapters,
        caption_chunks=given.caption_chunks,
        transparent=given.transparent,
    )
    is_demo = Path(base).is_dir() and DEMO_BASE.is_dir() and Path(base).samefile(DEMO_BASE)
    references = References.of_runs(runs)
    site = Site(
        studio,
        presets=presets(studio.adapters, references),
        steps=DEMO_STEPS if is_demo else Site.steps,
        guidance=DEMO_GUIDANCE if is_demo else Site.guidance,
        runs=runs,
        votes=VoteFile(given.votes),
        references=references,
        measured=Measured.of(runs, studio.adapters, studio.base),
        toy=is_demo,
    )
    first = FirstComparison(site)
    first.find()
    # Pages on one machine share gradio's own folder, and one that ends removes what another may be showing.
    os.environ.setdefault("GRADIO_TEMP_DIR", str(site.new_folder()))
    page = build(site, first)
    hosts = KnownHosts(given.host, given.known_host)
    try:
        _, address, public = page.launch(
            server_name=given.host,
            server_port=given.port,
            share=given.share,
            auth=given.auth,
            prevent_thread_lock=True,
            quiet=True,
            **launch_settings(hosts),
        )
    except OSError as error:  # gradio's own line says which ports it has tried
        raise UserError(f"--host {given.host} --port {given.port or 7860}: {error}") from error
    print(f"the page is at {public or address} (Ctrl-C ends it)", flush=True)
    first.begin()
    if public:
        hosts.add(str(urlsplit(public).hostname))
    try:
        while page.is_running:
            time.sleep(0.1)
    except KeyboardInterrupt:  # SIGTERM, too
        print("the page is closed", flush=True)
    page.close(verbose=False)
    if not studio.close():
        # A step that takes long: when Python ends, torch aborts the process from within that thread.
        logging.shutdown()
        os._exit(0)


def demo_folder(project: Path) -> Path:
    """Where the adapters of `make demo` are, else those that come with the project."""
    for folder in (project / "demo-output", project / "assets" / "adapters"):
        if all((folder / arm / WEIGHTS_NAME).is_file() for arm in ARMS.values()):
            return folder
    if not folder.parent.is_dir():  # an installed package comes without them
        raise UserError(
            f"nothing to show: the demo's adapters are only in the project's repository, and {folder} isn't "
            "there; give --run DIR, or --base with --adapter NAME=PATH"
        )
    raise UserError(f"no adapters in {folder}: restore that folder, or give --run DIR or --adapter NAME=PATH")


def _runs(folders: list[Path]) -> dict[str, RunFolder]:
    """The runs of all folders; where two have the same label, each has its folder's name before it."""
    found = [(folder, label, run) for folder in folders for label, run in find_runs(folder).items()]
    labels = [label for _, label, _ in found]
    runs = {}
    for folder, label, run in found:
        name = label if labels.count(label) == 1 else f"{folder.resolve().name}: {label}"
        if name in runs:
            raise UserError(f"--run {folder}: another one has the same name {name}; rename the folder")
        runs[name] = run
    return runs


def _adapters(runs: Mapping[str, RunFolder], given: Mapping[str, Source]) -> dict[str, Source]:
    """All adapters by their labels: of finished runs the best steps, then the last ones, then those given.

    The page opens with the last two.
    """
    best_steps: dict[str, Source] = {}
    last_steps: dict[str, Source] = {}
    for label, run in runs.items():
        if adapter := run.read().adapter:
            last_steps[label] = adapter
            best = adapter.parent / BEST / adapter.name
            if best.is_file():
                best_steps[f"{label}, step {read_facts(best)['steps']} (best held-out loss)"] = best
        else:
            logger.warning("%s has no adapter yet: its curves are shown alone", label)
    adapters = best_steps | last_steps
    for label, path in given.items():
        if label in adapters or label == BASE or not label.strip():
            raise UserError(f"--adapter {label}=...: each needs a name of its own, and not {BASE}")
        adapters[label] = path
    return adapters


def _base(runs: Mapping[str, RunFolder]) -> str:
    """The base that the adapters of training runs were trained on, else the demo base."""
    adapters = [run.read().adapter for run in runs.values()]
    named = (read_facts(adapter).get("base") for adapter in adapters if adapter)
    bases = {base for base in named if base is not None}
    if len(bases) > 1:
        raise UserError(f"the runs have different bases ({', '.join(sorted(bases))}); show them one by one")
    if not bases and not DEMO_BASE.is_dir():
        raise UserError(
            f"no --base: the demo base is only in the project's repository, and {DEMO_BASE} isn't there; "
            "give --base FOLDER or the name of one on the hub"
        )
    return bases.pop() if bases else str(DEMO_BASE)
