"""What installs is the whole tree, and `backend="atom"` resolves by name with no import of ours."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]


def run_python(program: str, *, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def source_files() -> Iterator[tuple[str, Path]]:
    """Each file of the package as (where it is once installed, where it is in the tree)."""
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):  # follows no symlink
            if path.is_file() and "__pycache__" not in path.parts:
                installed = package.replace(".", "/") / path.relative_to(ROOT / folder)
                yield installed.as_posix(), path


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: a build leaves folders in its source and picks up an old one."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder,
            copy / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return copy


@pytest.fixture(scope="module")
def wheel_from_tree(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheels = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "-w", wheels, source_copy], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_from_sdist(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sdist")
    build = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"
    run_python(build.format("sdist", str(work)), cwd=source_copy)
    (sdist,) = work.glob("*.tar.gz")
    shutil.unpack_archive(sdist, work, filter="data")
    run_python(build.format("wheel", str(work)), cwd=work / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = work.glob("*.whl")
    return wheel


def test_packages_are_the_folders_of_the_tree() -> None:
    folders = {
        f"{package.replace('.', '/')}/{path.parent.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    in_tree = {folder.removesuffix("/.").replace("/", ".") for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == in_tree


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_symlinks_say_what_package_dir_says(name: str) -> None:
    assert (ROOT / "atom_compile" / name).readlink() == Path("..", name)
    assert FOLDERS[f"atom_compile.{name}"] == name


def test_kernels_is_no_regular_package() -> None:
    """Hugging Face has a package called `kernels`, and transformers imports whatever has that name.

    With the repository's root on `sys.path`, as in `python -c` or a notebook started here, a
    `kernels/__init__.py` makes our folder that package. Without one it is a namespace folder, which
    transformers ignores.
    """
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "passes" / "__init__.py").exists()  # the same rule for both
    run_python("from transformers import LlamaForCausalLM", cwd=ROOT)


@pytest.mark.parametrize("built", ["wheel_from_tree", "wheel_from_sdist"])
def test_wheel_holds_the_tree(built: str, request: pytest.FixtureRequest) -> None:
    with zipfile.ZipFile(request.getfixturevalue(built)) as archive:
        contents = {
            name: archive.read(name)
            for name in archive.namelist()
            if not name.startswith("atom_compile-")
        }
    assert contents == {name: path.read_bytes() for name, path in source_files()}


def test_wheel_runs_without_the_tree(wheel_from_tree: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel_from_tree) as archive:
        archive.extractall(tmp_path)
    program = """if True:
        import torch._dynamo
        backend = torch._dynamo.lookup_backend("atom")
        import atom_compile, atom_compile.kernels.linear, atom_compile.passes
        print(atom_compile.__file__, atom_compile.kernels.linear.__file__)
        """
    files = run_python(program, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert [Path(file) for file in files] == [
        tmp_path / "atom_compile" / "__init__.py",
        tmp_path / "atom_compile" / "kernels" / "linear.py",
    ]


def test_backend_resolves_by_name(tmp_path: Path) -> None:
    program = """if True:
        import sys
        import torch
        assert "atom" in torch._dynamo.list_backends()
        assert not [name for name in sys.modules if name.startswith("atom_compile")]
        backend = torch._dynamo.lookup_backend("atom")
        import atom_compile.backend
        assert backend is atom_compile.backend.atom
        assert backend is torch._dynamo.lookup_backend("atom")
        """
    run_python(program, cwd=tmp_path)


def test_constraints_pin_every_requirement_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert all(version.startswith("==") for version in pinned.values())

    project = PYPROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    build = PYPROJECT["build-system"]["requires"]
    for wanted in map(Requirement, [*project["dependencies"], *extras, *build]):
        version = pinned[canonicalize_name(wanted.name)].removeprefix("==")
        assert wanted.specifier.contains(version), f"{wanted} does not admit the pinned {version}"
