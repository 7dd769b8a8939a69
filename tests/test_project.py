"""The project's files agree with each other: dependencies, address, licences, sizes, targets."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tools import address, install_cell

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
APART = [
    Requirement(line) for name in ("bench", "inception", "text") for line in EXTRAS.pop(name)
]  # for environments of their own
NEEDED = [Requirement(line) for group in (PROJECT["dependencies"], *EXTRAS.values()) for line in group]
# Of the machine that wrote a file, not of the project: a folder under one of these roots, or a package index.
MACHINE = re.compile(
    r"(?<![\w.:/})~<-])/(?:home|root|Users|work|workspace|mnt|opt|tmp|private)/\w"
    r"|file:///\w|https?://[^\s\"'`]*/simple\b|(?:index-url|find-links)[= ]+\S*/"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert all(pairs), "constraints.txt holds name==version lines and comments only, with no local version"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs}


def tracked() -> list[Path]:
    """The files that git knows; all that are not caches where there is no git, as in an archive of the source."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
        return [path for path in paths if path.is_file()]
    ignored = {"_build", "build", "dist", "node_modules", "vendor", "__pycache__"}
    inside = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return [ROOT / path for path in inside if not any(p in ignored or p.startswith(".") for p in path.parts)]


def texts() -> dict[str, str]:
    """Name and content of every tracked text file."""
    found = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content:
            found[path.relative_to(ROOT).as_posix()] = content.decode("utf-8")
    return found


@pytest.mark.parametrize("requirement", NEEDED + APART, ids=str)
def test_every_dependency_is_a_range_that_holds_its_pin(requirement):
    assert requirement.specifier
    assert not any(part.operator == "==" for part in requirement.specifier)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_all_that_the_dependencies_install_is_pinned():
    seen: set[str] = set()
    waiting = list(NEEDED)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # what a GPU build of torch brings is fixed by torch's own version
        assert name in pins(), f"{name} is not in constraints.txt"
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if any(
                not needed.marker or needed.marker.evaluate({"extra": extra}) for extra in requirement.extras | {""}
            ):
                waiting.append(needed)


def test_no_pin_pulls_a_gpu_toolkit():
    assert [name for name in pins() if name.startswith(("nvidia", "cuda", "triton", "pytorch-triton"))] == []


def test_conda_and_make_install_the_same():
    environment = yaml.safe_load(read("environment.yml"))
    python, pip, lists = environment["dependencies"]
    install = f".[{','.join(EXTRAS)}]"
    assert lists == {"pip": ["-c constraints.txt", f"-e {install}"]}
    assert pip == "pip"
    assert f'-c constraints.txt -e "{install}"' in read("Makefile")
    version = python.removeprefix("python=")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    workflow = yaml.safe_load(read(".github/workflows/book.yml"))
    versions = [step["with"]["python-version"] for step in workflow["jobs"]["build"]["steps"] if "python" in str(step)]
    assert versions == [version]
    assert f"Python {version}" in read("README.md")


def test_public_ci_runs_the_same_script_as_any_other():
    steps = yaml.safe_load(read(".github/workflows/book.yml"))["jobs"]["build"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.search(r"^make test$.*^make book$.*make browser", read(".ci/run"), re.MULTILINE | re.DOTALL)


def test_the_readme_states_the_two_commands():
    assert "make book" in read("README.md")
    assert "make test" in read("README.md")


def test_help_lists_every_target_that_the_readme_names():
    listed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = set(re.findall(r"^  make ([a-z-]+) ", listed.stdout, re.MULTILINE))
    assert {"book", "test", "serve", "help", "lint", "format", "clean", "notebooks", "address"} <= targets
    assert set(re.findall(r"(?:`|^ {4}|^\$ )make ([a-z-]+)", read("README.md"), re.MULTILINE)) <= targets


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == PROJECT["version"]


def test_the_address_is_the_same_everywhere():
    repository = address.validated(address.current())
    link, site = f"https://github.com/{repository}", address.site(repository)
    configuration, citation = yaml.safe_load(read("_config.yml")), yaml.safe_load(read("CITATION.cff"))
    assert configuration["repository"]["url"] == citation["repository-code"] == link
    assert configuration["html"].get("baseurl", site) == citation["url"] == site
    assert f'REPOSITORY = "{link}"' in install_cell.source()
    for path in address.places():
        text = path.read_text(encoding="utf-8")
        assert address.carried(text, address.UNSET, repository) == text, f"{path.name} shows the unset address"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files that show the address, at a place where they may change."""
    for path in address.places():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_new_address_is_carried_everywhere_and_back(copy):
    address.set_address(address.UNSET, copy)
    unset = contents(copy)
    changed = {path.name for path in address.set_address("ada/noise", copy)}
    assert {"pyproject.toml", "_config.yml", "CITATION.cff"} <= changed
    assert not any(b"owner--not--set" in content for content in contents(copy).values())
    assert yaml.safe_load((copy / "CITATION.cff").read_text())["url"] == "https://ada.github.io/noise/"
    assert address.set_address("ada/noise", copy) == []
    address.set_address("grace/grace.github.io", copy)
    assert yaml.safe_load((copy / "CITATION.cff").read_text())["url"] == "https://grace.github.io/"
    address.set_address(address.UNSET, copy)
    assert contents(copy) == unset


def test_a_page_written_before_the_address_was_set_follows(copy):
    address.set_address("ada/noise", copy)
    page = copy / "book" / "late.md"
    page.write_text(f"See https://github.com/{address.UNSET}/issues, and https://github.com/{address.UNSET}-2.")
    assert address.set_address("ada/noise", copy) == [page]
    assert page.read_text() == f"See https://github.com/ada/noise/issues, and https://github.com/{address.UNSET}-2."


@pytest.mark.parametrize(
    "name",
    ["", "ddpm", "a/b/c", "-a/b", "a-/b", "a--b/c", "a_b/c", "a/", "/b", "a/..", "a/b.git", "a/b c", "a" * 40 + "/b"],
)
def test_a_name_that_github_cannot_have_is_refused(name, copy):
    before = contents(copy)
    with pytest.raises(ValueError, match="not a GitHub repository"):
        address.set_address(name, copy)
    assert contents(copy) == before


@pytest.fixture
def install(monkeypatch):
    """Run the install cell where `present` packages are installed; give the pip command lines that it starts."""

    def start(present: set[str], package: str | None = None) -> list[list[str]]:
        commands = []
        monkeypatch.setattr(util, "find_spec", lambda name: object() if name in present else None)
        monkeypatch.setattr(metadata, "version", lambda name: {"torch": "2.9.1+cu126", "numpy": "2.0.2"}[name])
        monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
        monkeypatch.delenv("DDPM_LIB", raising=False)
        if package:
            monkeypatch.setenv("DDPM_LIB", package)
        exec(install_cell.TEMPLATE.format(repository=address.UNSET), {})
        return commands

    return start


def test_the_install_cell_does_nothing_where_the_package_is(install):
    assert install({"ddpm_lib", "torch", "numpy"}) == []


def test_the_install_cell_says_what_to_do_while_there_is_no_address(install):
    with pytest.raises(RuntimeError, match="set DDPM_LIB to its wheel"):
        install({"torch", "numpy"})


def test_the_install_cell_asks_for_the_torch_that_is_there(install):
    (command,) = install({"torch", "numpy"}, "ddpm_lib.whl")
    assert command[1:] == ["-m", "pip", "install", "--quiet", "ddpm_lib.whl", "torch==2.9.1+cu126", "numpy==2.0.2"]
    (command,) = install(set(), "ddpm_lib.whl")
    assert command[1:] == ["-m", "pip", "install", "--quiet", "ddpm_lib.whl"]


def test_no_file_names_a_place_on_one_machine():
    found = {name: MACHINE.search(text) for name, text in texts().items()}
    assert {name: match[0] for name, match in found.items() if match} == {}


@pytest.mark.parametrize(
    "bad", ["see |home|ada|book", "'|tmp|x'", "file:|||opt", "--index-url http:||x|", "https:||mirror.org|pypi|simple"]
)
def test_places_on_one_machine_are_seen(bad):
    assert MACHINE.search(bad.replace("|", "/"))


def test_no_file_is_large_and_the_package_stays_small():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked()}
    assert {name: size for name, size in sizes.items() if size > 5 * MB} == {}
    assert sum(size for name, size in sizes.items() if name.startswith("ddpm_lib/")) < 30 * MB


def test_everything_that_the_package_carries_is_in_its_wheel_and_described():
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
    package = ROOT / "ddpm_lib"
    packed = {path for pattern in settings["package-data"]["ddpm_lib"] for path in package.glob(pattern)}
    carried = [path for path in tracked() if path.is_relative_to(package) and path.suffix != ".py"]
    assert [path.name for path in carried if path not in packed] == []
    binaries = [path for path in carried if path.suffix in {".npz", ".safetensors"}]
    assert [path.name for path in binaries if not path.with_suffix(".md").exists()] == []


def test_the_licences_are_stated():
    assert PROJECT["license"] == yaml.safe_load(read("CITATION.cff"))["license"] == "MIT"
    assert read("LICENSE").startswith("MIT License")
    assert "https://creativecommons.org/licenses/by/4.0/legalcode" in read("LICENSE-TEXT")
