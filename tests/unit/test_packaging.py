"""What a user's machine gets: dependencies, pins, the wheel, and where it finds its files."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmssl import doctor

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
SOURCES = sorted(p for d in ("mmssl", "data_tools") for p in (ROOT / d).rglob("*.py"))


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def imports(path):
    """(top-level package, full name, line) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            yield name.split(".")[0], name, node.lineno


# ---------------------------------------------------------------- dependencies


def environment(system, machine):
    return {"sys_platform": system, "platform_machine": machine, "extra": ""}


@pytest.mark.parametrize(
    ("system", "machine", "reader"),
    [
        ("linux", "x86_64", {"decord"}),
        ("win32", "AMD64", {"decord"}),
        ("darwin", "arm64", {"eva-decord"}),
        ("linux", "aarch64", set()),
        ("darwin", "x86_64", set()),
    ],
)
def test_decord_is_asked_for_only_where_a_wheel_exists(system, machine, reader):
    wanted = {
        r.name for r in NEEDED if not r.marker or r.marker.evaluate(environment(system, machine))
    }
    assert wanted & {"decord", "eva-decord"} == reader
    assert "av" in wanted


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("torch", ["2.11.0", "2.12.1"], ["2.10.9", "2.13.0"]),
        ("torchvision", ["0.26.0", "0.27.1"], ["0.25.9", "0.28.0"]),
        ("torchaudio", ["2.11.0"], ["2.10.0", "2.12.0"]),
        ("deepspeed", ["0.19.8"], ["0.19.7"]),
        ("megatron-energon", ["7.4.1"], ["7.3.9"]),
        ("av", ["17.0.0", "18.1.0"], ["16.9.0"]),
        ("decord", ["0.6.0"], ["0.7.0"]),
    ],
)
def test_pins(name, inside, outside):
    pin = next(r for r in NEEDED if r.name == name).specifier
    assert all(pin.contains(v) for v in inside)
    assert not any(pin.contains(v) for v in outside)


def test_frozen_versions_satisfy_every_direct_requirement():
    frozen = constraints()
    extras = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
    here = environment("linux", "x86_64")
    for requirement in NEEDED + extras:
        if requirement.marker and not requirement.marker.evaluate(here):
            continue
        version = frozen[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_extras():
    wanted = {"demo", "ray", "hf", "index", "parquet", "s3", "wandb", "torchcodec", "dev"}
    assert set(PROJECT["optional-dependencies"]) == wanted


def test_every_import_of_the_package_is_a_declared_dependency():
    installed = packages_distributions()
    extras = PROJECT["optional-dependencies"]
    optional = {Requirement(t).name for name in extras if name != "dev" for t in extras[name]}
    declared = {canonicalize_name(r.name) for r in NEEDED} | optional
    own = {"mmssl", "data_tools", "__future__"} | sys.stdlib_module_names
    undeclared = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for top, name, line in imports(path)
        if top not in own
        and not {canonicalize_name(d) for d in installed.get(top, [top])} & declared
    ]
    assert undeclared == []


def test_one_module_speaks_to_other_processes():
    """Only `dist.py` imports torch.distributed: one place to get collectives right."""
    users = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for _, name, _ in imports(path)
        if name.startswith("torch.distributed")
    }
    assert users == {"mmssl/dist.py", "mmssl/launch.py"}  # the latter starts them, as torchrun


def test_deepspeed_works_without_a_compiler(tmp_path, monkeypatch):
    """The PATH holds nothing: no g++, no ninja."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    check = next(c for c in doctor.CHECKS if c.name == "deepspeed")
    finding = doctor.examine(check, tmp_path)
    assert finding.status == "ok", finding
    assert not (tmp_path / "extensions").exists()  # nothing was compiled, nothing came from a cache


# ---------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("mmssl-*.whl")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(unpacked)
    return unpacked


def relative(folder, pattern):
    return {p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if p.is_file()}


def test_wheel_carries_configs_and_data_tools(wheel):
    assert relative(wheel / "mmssl/_configs", "*.*") == relative(ROOT / "configs", "*.*") != set()
    assert relative(wheel / "data_tools", "*.py") == relative(ROOT / "data_tools", "*.py") != set()
    assert relative(wheel / "mmssl", "*.py") == relative(ROOT / "mmssl", "*.py")
    assert (wheel / "mmssl/py.typed").exists()
    assert not (wheel / "tests").exists()


def test_wheel_has_script_and_licence(wheel):
    (info,) = wheel.glob("mmssl-*.dist-info")
    assert "mmssl = mmssl.cli:main" in (info / "entry_points.txt").read_text()
    assert "Apache License" in (info / "licenses/LICENSE").read_text()
    assert re.search(r"^License-Expression: Apache-2.0$", (info / "METADATA").read_text(), re.M)


def test_installed_package_lists_its_methods_outside_the_clone(wheel, tmp_path):
    env = os.environ | {"PYTHONPATH": str(wheel)}
    command = [sys.executable, "-m", "mmssl.cli", "list", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    files = {row["file"] for row in json.loads(done.stdout)}
    assert files == {f"configs/methods/{f}" for f in relative(ROOT / "configs/methods", "*.yaml")}
    code = "from mmssl import config; print(config.builtin_root())"
    place = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    assert Path(place.strip()) == wheel / "mmssl/_configs"
