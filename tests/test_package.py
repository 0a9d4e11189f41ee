"""The wheel: everything that the package needs and nothing else, and what it says of itself."""

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("build") or not find_spec("hatchling"), reason="building needs the dev extra"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, REPO]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    expected = {
        p.relative_to(REPO).as_posix()
        for p in (REPO / "basis_select").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert names == expected
    kinds = {".py", ".pyi", ".cpp", ".h", ".css", ".html", ".md", ".yaml", ".typed"}
    assert {Path(name).suffix for name in names} <= kinds
    shown = {f"evaluation/{name}" for name in ("report.css", "templates/page.html", "templates/blocks.html")}
    needed = {
        "py.typed",
        "__init__.pyi",
        "layers/cpp/kernels.cpp",
        "layers/cpp/products.h",
        "publish/card_template.md",
        "evaluation/tasks/gsm8k.yaml",
        *shown,
    }
    assert {f"basis_select/{name}" for name in needed} <= names


def test_it_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (folder,) = {name.split("/")[0] for name in opened.namelist() if ".dist-info/" in name}
        about = Parser().parsestr(opened.read(f"{folder}/METADATA").decode())
        entry_points = opened.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in opened.namelist()
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert (about["Name"], about["Version"]) == (project["name"], project["version"])
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == project["requires-python"]
    assert about.get_all("Provides-Extra") == sorted(project["optional-dependencies"])
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(needed) == len(project["dependencies"])
    assert "basis-select = basis_select.cli:main" in entry_points
    assert about.get_payload().startswith("# basis_select")


def test_an_index_would_take_it(wheel):
    every = [str(p) for p in wheel.parent.iterdir()]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *every], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(every) == 2  # and the source distribution
