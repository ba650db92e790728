"""What only POSIX has is used nowhere: the package is imported and trains without it."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

import flatlora_diffusion
from flatlora_diffusion.common import command, files, lock, memory
from flatlora_diffusion.common.threads import share_processor

PACKAGE = Path(flatlora_diffusion.__file__).parent
POSIX_MODULES = {"fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "syslog", "crypt", "posix"}


def test_no_module_of_posix_is_imported():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not POSIX_MODULES & {name.partition(".")[0] for name in names}, path


# A system of which the package, but not the libraries, sees what Windows has.
WITHOUT_POSIX = """
    import builtins, importlib, os, pkgutil, signal, sys, types

    modules = set(sys.argv[1].split())
    known_signals = {"SIGINT", "SIGTERM", "SIGABRT", "SIGSEGV", "SIG_DFL", "SIG_IGN"}
    import_any = builtins.__import__

    def import_there(name, importer=None, *rest, **others):
        if name in modules and (importer or {}).get("__name__", "").startswith("flatlora_diffusion"):
            raise ModuleNotFoundError(name)
        return import_any(name, importer, *rest, **others)

    builtins.__import__ = import_there
    for name in [name for name in sys.modules if name.startswith("flatlora_diffusion")]:
        del sys.modules[name]  # to be imported anew; of the libraries what is there stays

    class Windows(types.ModuleType):
        def __init__(self, module, lacks):
            super().__init__(module.__name__)
            self._module, self._lacks = module, lacks

        def __getattr__(self, name):
            if self._lacks(name):
                raise AttributeError(name)
            return getattr(self._module, name)

    def open_file(path, flags, mode=0o777):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, flags, mode)

    posix_only = set(sys.argv[2].split())
    windows = Windows(os, posix_only.__contains__)
    windows.name, windows.open = "nt", open_file
    signals = Windows(signal, lambda name: name.startswith("SIG") and name not in known_signals)

    import flatlora_diffusion
    names = [m.name for m in pkgutil.walk_packages(flatlora_diffusion.__path__, "flatlora_diffusion.")]
    assert len(names) > 70, names
    patched = []
    for name in names:
        module = importlib.import_module(name)
        for attribute, value in vars(module).copy().items():
            for real, fake in ((os, windows), (signal, signals)):
                if value is real:
                    setattr(module, attribute, fake)
                    patched.append(name)
    assert "flatlora_diffusion.common.lock" in patched and "flatlora_diffusion.common.signals" in patched

    from flatlora_diffusion import TrainConfig, train
    base, icons, output = sys.argv[3:]
    train(TrainConfig(
        pretrained_model_name_or_path=base, instance_data_dir=icons, instance_prompt="a icon",
        output_dir=output, resolution=16, max_train_steps=3, checkpointing_steps=2, flat_sigma=0.1,
        report_to="none",
    ))
"""
# Of `os`, as its documentation says: "Availability: Unix".
POSIX_FUNCTIONS = """
    WCOREDUMP WEXITSTATUS WIFEXITED WIFSIGNALED WNOHANG WTERMSIG chown chroot confstr ctermid fchdir fchown
    fdatasync fork forkpty fpathconf fstatvfs getegid geteuid getgid getgrouplist getgroups getloadavg getpgid
    getpgrp getpriority getresgid getresuid getsid getuid initgroups killpg lchown lockf major makedev minor
    mkfifo mknod nice openpty pathconf pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread
    preadv pwrite pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile
    setegid seteuid setgid setgroups setpgid setpriority setregid setreuid setsid setuid statvfs sync sysconf
    tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid writev
"""


def test_every_module_is_imported_and_three_steps_are_trained_without_posix(
    base_path, icons, tmp_path, launcher
):
    script, output = tmp_path / "without_posix.py", tmp_path / "run"
    script.write_text(textwrap.dedent(WITHOUT_POSIX))
    done = launcher.run(script, " ".join(POSIX_MODULES), POSIX_FUNCTIONS, base_path, icons, output)
    assert done.code == 0, done.stderr
    names = {path.name for path in output.iterdir()}
    assert names == {"README.md", "checkpoint-2", "pytorch_lora_weights.safetensors", "summary.json"}


# What is otherwise on Windows, part by part.


@pytest.fixture
def on_windows(monkeypatch):
    """Let a module of the package believe that it is there."""

    class Windows:
        name = "nt"

        def __getattr__(self, attribute):
            return getattr(os, attribute)

    return lambda module: monkeypatch.setattr(module, "os", Windows())


def test_no_folder_is_opened_there(tmp_path, monkeypatch, on_windows):
    on_windows(files)
    monkeypatch.setattr(os, "open", None)
    files.sync_folder(tmp_path)


def test_a_lock_is_given_back_there_before_its_file_is_removed(tmp_path, on_windows):
    on_windows(lock)
    with lock.output_lock(tmp_path):
        assert (tmp_path / lock.LOCK_NAME).read_text(encoding="utf-8") == f" process {os.getpid()} on " + (
            lock.socket.gethostname()
        )
        with pytest.raises(lock.UserError, match=f"another run \\(process {os.getpid()} on "):
            lock._take(tmp_path, "--output_dir")
    assert list(tmp_path.iterdir()) == []


def test_commands_are_shown_as_the_shell_takes_them(on_windows):
    words = ["train.py", "--output_dir", r"C:\my runs\a", "it's"]
    assert command.shell_line(words) == "train.py --output_dir 'C:\\my runs\\a' 'it'\"'\"'s'"
    on_windows(command)
    assert command.shell_line(words) == 'train.py --output_dir "C:\\my runs\\a" it\'s'


# Memory and threads.


def test_the_peak_of_memory_is_what_was_held_at_once():
    before = memory.peak_memory()
    held = bytearray(os.urandom(2**20) * 64)
    after = memory.peak_memory()
    del held
    assert 2**20 < before <= after == pytest.approx(memory.peak_memory(), rel=0.05)
    # `before` may be a peak of long ago: in a process of its own the difference is exact.
    words = "peak_memory(); held = bytes(2**20) * 200; print(peak_memory() - one)"
    code = f"from flatlora_diffusion.common.memory import peak_memory; one = {words}"
    told = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, check=True)
    assert int(told.stdout) == pytest.approx(200 * 2**20, rel=0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="has no getrusage")
def test_ru_maxrss_is_that_of_the_module_that_windows_lacks():
    import resource

    assert memory._ru_maxrss() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("load", "percent", "given", "added"),
    [
        (0.0, 100.0, {}, {}),
        (2.0, 100.0, {}, {}),
        (2.1, 51.0, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (9.0, 50.0, {}, {}),  # what was computed has ended
        (9.0, 100.0, {"OMP_NUM_THREADS": "2"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (9.0, 100.0, {"GOMP_SPINCOUNT": "7"}, {}),
        (9.0, 100.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
    ],
)
def test_threads_sleep_on_a_busy_machine_unless_the_user_says_how_they_wait(
    monkeypatch, load, percent, given, added
):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: percent)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    share_processor()
    assert os.environ == given | added


def test_a_command_chooses_before_torch_is_imported():
    code = """
        import os, sys
        import psutil
        from flatlora_diffusion.common.command import run_command

        def told():
            print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"])

        psutil.getloadavg = lambda: (1000.0, 0.0, 0.0)
        psutil.cpu_percent = lambda interval: 100.0
        run_command(told)
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.split() == ["False", "PASSIVE"]
