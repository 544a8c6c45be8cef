"""What is installed, and what importing a part of it brings along."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The two packages, wherever this suite runs them from.
PACKAGES = (ROOT / "clipa_fast", ROOT / "kernels" / "clipa_kernels")


def python(program, cwd="/"):
    """Runs a program away from the checkout, so that nothing is importable by chance."""
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def files_of(package):
    parent = package.parent
    return {
        path.relative_to(parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def tracked():
    """Files of the two packages that git knows, so that a stray one in the tree is no failure."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "clipa_fast", "kernels/clipa_kernels"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {name.removeprefix("kernels/") for name in listed.stdout.splitlines()} or None


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Names in the wheel, and names and content in the editable one, built by the backend itself: no network."""
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    folder = tmp_path_factory.mktemp("wheels")
    built = {}
    for kind in ("standard", "editable"):
        (path,) = builder.build(directory=str(folder / kind), versions=[kind])
        with zipfile.ZipFile(path) as archive:
            built[kind] = {name: archive.read(name) for name in archive.namelist()}
    return built


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheels):
    names = set(wheels["standard"])
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in names - info} == {"clipa_fast", "clipa_kernels"}
    present = set.union(*map(files_of, PACKAGES))
    assert names - info <= present
    assert (tracked() or present) <= names
    assert {"clipa_fast/report/page.css", "clipa_fast/text/part_of_speech.txt"} <= names
    (entry_points,) = (wheels["standard"][name] for name in info if name.endswith("entry_points.txt"))
    assert b"clipa-fast = clipa_fast.cli.main:main" in entry_points


def test_the_kernels_wheel_holds_the_kernels_and_nothing_else(wheels, tmp_path):
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT / "kernels"))
    (path,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    package = {name: content for name, content in files.items() if name.startswith("clipa_kernels/")}
    info = {name.split("/")[0] for name in files.keys() - package.keys()}
    (metadata,) = (content.decode() for name, content in files.items() if name.endswith("METADATA"))
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    # Whichever of the two distributions is installed last, the files are the same.
    trainers = wheels["standard"]
    assert package == {name: content for name, content in trainers.items() if name.startswith("clipa_kernels/")}
    assert [line.split()[1].split(">")[0] for line in needed] == ["jax", "numpy"]
    (version,) = (name.split("/")[0] for name in trainers if name.endswith("METADATA"))
    assert info == {version.replace("clipa_fast", "clipa_kernels")}


def test_the_kernels_source_distribution_stands_alone(tmp_path):
    builder = pytest.importorskip("hatchling.builders.sdist").SdistBuilder(str(ROOT / "kernels"))
    (path,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        # pip refuses links that lead out of the archive.
        assert all(member.isfile() for member in archive.getmembers())
        (licence,) = (member for member in archive.getmembers() if member.name.endswith("/LICENSE"))
        assert archive.extractfile(licence).read() == (ROOT / "LICENSE").read_bytes()


def test_an_editable_install_puts_the_folder_of_links_on_the_path(wheels):
    (path,) = (content for name, content in wheels["editable"].items() if name.endswith(".pth"))
    assert path.decode().split() == [str(ROOT / ".editable")]
    assert not any(name.endswith(".py") for name in wheels["editable"])


def test_the_links_lead_to_the_packages_and_to_nothing_else():
    links = {link.name: link.resolve() for link in (ROOT / ".editable").iterdir()}
    assert links == {package.name: package for package in PACKAGES}
    # No package of this name: it is another project's on PyPI, which libraries look up.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_other_projects_do_not_see_the_folders_beside():
    program = (
        "import importlib.util, clipa_fast, clipa_kernels\n"
        "found = [importlib.util.find_spec(name) for name in ('kernels', 'tests', 'bench', 'tools')]\n"
        "print([list(s.submodule_search_locations or [s.origin]) for s in found if s])"
    )
    assert str(ROOT) not in python(program)


def imported(program):
    """Top-level modules in memory after the program."""
    return set(python(f"{program}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})").split())


HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "clipa_kernels", "cv2"}


@pytest.mark.parametrize(
    "program",
    [
        "import clipa_fast.data.loader, clipa_fast.data.shards, clipa_fast.data.glyphs, clipa_fast.text.tokenizer",
        "import clipa_fast.cli.main, clipa_fast.config, clipa_fast.recipes",
        "import clipa_fast.model.costs, clipa_fast.run.metrics",
        "from clipa_fast.cli.main import main; main(['recipes'])",
        "from clipa_fast.cli.main import main; main(['plan', '--check'])",
    ],
)
def test_data_workers_and_the_command_line_do_not_import_jax(program):
    program = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    {program}"
    assert not imported(program) & HEAVY


@pytest.mark.parametrize("command", ["['--help']", "['train', '--help']", "['train']", "['eval', '--help']"])
def test_help_and_usage_errors_do_not_import_jax(command):
    program = (
        "import contextlib, io\n"
        "from clipa_fast.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        f"    with contextlib.suppress(SystemExit):\n        main({command})"
    )
    assert not imported(program) & HEAVY


def test_the_kernels_stand_alone():
    modules = imported("import clipa_kernels")
    assert not modules & {"clipa_fast", "flax", "optax", "orbax", "matplotlib", "PIL", "yaml", "tyro"}
    assert {"jax", "numpy"} <= modules


@pytest.mark.skipif(not os.access(sys.prefix, os.W_OK), reason="no environment of its own")
def test_the_command_is_installed():
    script = Path(sys.executable).parent / "clipa-fast"
    if not script.exists():
        pytest.skip(f"not installed in this environment: {script} is absent")
    done = subprocess.run([script, "--help"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0
    assert "recipes" in done.stdout
    assert done.stderr == ""
