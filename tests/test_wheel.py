"""The wheel, installed outside of the checkout, does the main job offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from contextlib import suppress
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

MAIN_JOB = """
import json, sys
from pathlib import Path
import safegen
from safegen import mini
from safegen.audit import verify

pipe = mini.load()
with safegen.apply_policy(pipe, "mini-strict", audit="audit") as guard:
    images = pipe(["a ghost", "an owl"], num_inference_steps=4, guidance_scale=4.0).images
    decisions = guard.decide(["a ghost", "an owl"])
report = verify("audit")
print(json.dumps({
    "home": str(Path(safegen.__file__).parent),
    "sizes": [image.size for image in images],
    "outcomes": [decision.outcome for decision in decisions],
    "verified": report.ok,
}))
"""
NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise OSError("the main job must work offline")

socket.socket.connect = refuse
"""


ONLY_DECLARED = """
import sys
from importlib.machinery import PathFinder

class Declared(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Declared
"""


def undeclared(wheel: Path) -> set[str]:
    """Names of the modules in this environment that no dependency of the wheel brings, directly or indirectly."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    declared: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        if name not in declared and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            declared.add(name)
            with suppress(PackageNotFoundError):  # optional parts of torch, such as CUDA's
                wanted += requires(name) or []
    found = packages_distributions()
    return {module for module, names in found.items() if not {canonicalize_name(n) for n in names} & declared}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new venv that holds the built wheel; dependencies come from the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    home = folder / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    # A path from a .pth file is searched after this venv's own packages, and its .pth files (the editable install of
    # the checkout) are not read: safegen can come from the wheel only.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    names = undeclared(wheel) - {"safegen"}
    assert {"peft", "accelerate", "pytest", "hypothesis", "resvg_py"} <= names  # what only extras bring
    (site / "sitecustomize.py").write_text(NO_NETWORK + ONLY_DECLARED.format(names=names))
    return python


def test_what_only_extras_bring_is_out_of_reach(installed: Path) -> None:
    done = subprocess.run([installed, "-c", "import peft"], capture_output=True, text=True, check=False)
    assert "No module named 'peft'" in done.stderr


def test_main_job_runs_from_the_wheel_offline(installed: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "HF_HUB_OFFLINE"}}
    env |= {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    done = subprocess.run(
        [installed, "-c", MAIN_JOB], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["home"].startswith(str(installed.parent.parent))
    assert found["sizes"] == [[64, 64], [64, 64]]
    assert found["outcomes"] == ["erase", "allow"]
    assert found["verified"]


def test_shipped_policies_and_membranes_are_found_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from safegen.policy.load import shipped_policies, load_policy; "
        "from safegen.bundle.store import MembraneStore; "
        "print(shipped_policies(), load_policy('strict').metadata.id, sorted(MembraneStore().installed('mini')))"
    )
    done = subprocess.run([installed, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "strict" in done.stdout
    assert "santa-claus" in done.stdout
