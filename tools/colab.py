"""Run chapters as Colab does, and see that the install cell leaves torch alone.

    python -m tools.colab dist/ddpm_lib-0.1.0-py3-none-any.whl book/forward.ipynb ...

Each notebook lies alone in an empty folder. Its Python has torch, numpy, matplotlib, ipywidgets and safetensors, as
Colab's has, and no ddpm_lib; there is no network. The first cell must install that wheel and nothing else.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRESENT = ["torch", "numpy", "matplotlib", "ipywidgets", "safetensors"]
# A new network namespace has not even a loopback device that is up, and the kernel talks through that.
RUN = """
import fcntl, socket, struct, sys
import nbclient, nbformat

if sys.argv[2] == "isolated":
    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        fcntl.ioctl(device, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
"""
STATE = """
import importlib.metadata, importlib.util, json, pathlib
found = {}
for name in ("torch", "numpy"):
    where = importlib.util.find_spec(name).origin
    found[name] = [importlib.metadata.version(name), where, pathlib.Path(where).stat().st_ctime_ns]
found["ddpm_lib"] = importlib.util.find_spec("ddpm_lib") is not None
print(json.dumps(found))
"""


def run(*command: str | Path, **options) -> str:
    """Run a command and give what it prints; show that where the command fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout


def isolation() -> list[str]:
    """The command prefix that takes the network away, empty where this machine does not allow it."""
    prefix = ["unshare", "--net", "--map-root-user"]
    allowed = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else []


def environment(home: Path, binaries: Path, wheel: Path) -> dict[str, str]:
    """What a notebook's kernel sees: nothing of this project and no way to a package index."""
    nowhere = "http://127.0.0.1:9"
    kept = {name: os.environ[name] for name in ("LANG", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "PATH": f"{binaries}{os.pathsep}{os.defpath}",
        "DDPM_LIB": str(wheel),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "http_proxy": nowhere,
        "https_proxy": nowhere,
    }


def main(wheel: str, *chapters: str) -> None:
    with tempfile.TemporaryDirectory(prefix="colab-") as scratch:
        folder = Path(scratch)
        venv.create(folder / "python", with_pip=True)
        binaries = folder / "python" / "bin"
        python = binaries / "python"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run(*pip, "install", "-c", ROOT / "constraints.txt", *PRESENT, "ipykernel", "nbclient")
        (folder / "home").mkdir()
        env = environment(folder / "home", binaries, Path(wheel).resolve())
        before = json.loads(run(python, "-c", STATE, cwd=scratch, env=env))
        assert not before["ddpm_lib"]

        offline = isolation()
        print(f"torch {before['torch'][0]}; no network by {'namespace' if offline else 'proxies that lead nowhere'}")
        for path in map(Path, chapters):
            alone = folder / path.stem
            alone.mkdir()
            shutil.copy(path, alone)
            start = time.perf_counter()
            run(*offline, python, "-c", RUN, path.name, "isolated" if offline else "", cwd=alone, env=env)
            after = json.loads(run(python, "-c", STATE, cwd=scratch, env=env))
            if after != before | {"ddpm_lib": True}:
                raise SystemExit(f"{path.name}: the installed packages changed from {before} to {after}")
            run(*pip, "uninstall", "--yes", "ddpm-lib")
            print(f"{path.name}: every cell ran, torch untouched, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
