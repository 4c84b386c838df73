"""The wheel holds what it needs, is small, and runs where nothing of this checkout is."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.oldest import constraints

ROOT = Path(__file__).parents[1]
MOST_BYTES = 15_000_000
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    assert list(constraints(PROJECT)) == ["timm==1.0.31", "torch==2.9.*", "torchvision==0.24.*"]
    with pytest.raises(ValueError, match="einops has no lower bound"):
        list(constraints({"dependencies": ["einops"]}))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="needs the extra dev")
    pytest.importorskip("hatchling", reason="needs the extra dev")
    folder = tmp_path_factory.mktemp("dist")
    words = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_is_small_and_whole(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {
        str(path.relative_to(ROOT)) for path in (ROOT / "vitcompress").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip
    assert kept <= names
    assert {"vitcompress/py.typed", "vitcompress/report/schema.json"} <= kept
    assert {name.split("/")[0] for name in names} == {"vitcompress", f"vitcompress-{PROJECT['version']}.dist-info"}


@pytest.mark.slow
def test_it_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Dependencies come from this environment, since they are large; the package is the wheel's."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*words: str) -> str:
        command = [str(tmp_path / "env" / "bin" / words[0]), *words[1:]]
        env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert str(packages) in run("python", "-c", "import vitcompress; print(vitcompress.__file__)")
    assert "compress" in run("vitcompress", "--help")
    assert run("vitcompress", "--version").strip() == PROJECT["version"]
    assert re.search(r"fashion_vit +vit +1,349,770", run("vitcompress", "models", "fashion_vit"))
    assert "mini-swin-t" in run("vitcompress", "recipes")
