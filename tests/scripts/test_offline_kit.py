"""The kit for machines without a network: thinning, parts, sums, and its installation, with small wheels of our own."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("offline_kit", ROOT / "scripts" / "offline_kit.py")
assert _spec is not None
assert _spec.loader is not None
offline_kit: Any = importlib.util.module_from_spec(_spec)
sys.modules["offline_kit"] = offline_kit
_spec.loader.exec_module(offline_kit)
TARGET = offline_kit.Target("2.11.*", "cu130", f"{sys.version_info.major}.{sys.version_info.minor}")


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A wheel with these files, and a RECORD made by the rules of the wheel format."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[kit.test]\n{name} = {name}:main\n".encode(),
    }
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for path, data in files.items()
    ]
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/RECORD", "".join(lines) + f"{info}/RECORD,,\n")
    return path


@pytest.mark.parametrize("length", [0, 1, 999, 1000, 1001, 2000, 2500])
def test_parts_are_no_longer_than_asked_and_join_to_the_whole(tmp_path, length):
    whole = os.urandom(length)
    parts = offline_kit.split(io.BytesIO(whole), tmp_path, 1000)
    assert b"".join(part.read_bytes() for part in sorted(tmp_path.iterdir())) == whole
    assert parts == sorted(parts)
    assert all(part.stat().st_size == 1000 for part in parts[:-1])
    assert all(0 < part.stat().st_size <= 1000 for part in parts)


def test_parts_longer_than_one_block_are_whole(tmp_path):
    whole = os.urandom(2**21 + 2**19)
    parts = offline_kit.split(io.BytesIO(whole), tmp_path, 2**20 + 7)
    assert [part.stat().st_size for part in parts] == [2**20 + 7, 2**20 + 7, 2**19 - 14]
    assert b"".join(part.read_bytes() for part in parts) == whole


def test_a_thinned_wheel_holds_what_its_record_lists(tmp_path):
    whole = wheel(tmp_path, "demo", {"demo/__init__.py": b"", "demo/big/a.so": b"a" * 9000, "demo/small.so": b"b"})
    thin, gone = offline_kit.thinned(whole, ["demo/big/*"])
    assert thin.name == "demo-1.0-1thin-py3-none-any.whl"
    assert list(gone) == ["demo/big/a.so"]
    assert not whole.exists()
    offline_kit.check_record(thin)
    with zipfile.ZipFile(thin) as archive:
        assert "demo/small.so" in archive.namelist()
        assert "demo/big/a.so" not in archive.read("demo-1.0.dist-info/RECORD").decode()


def test_a_wheel_that_differs_from_its_record_is_named(tmp_path):
    path = wheel(tmp_path, "demo", {"demo/__init__.py": b"x = 1\n"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("demo/more.py", "")
    with pytest.raises(offline_kit.KitError, match=r"demo-1\.0-py3-none-any\.whl does not hold the files"):
        offline_kit.check_record(path)


def test_the_cuda_that_a_wheel_was_built_for_is_read_from_its_libraries(tmp_path):
    built = wheel(tmp_path, "demo", {"demo/a.so": b"\x7fELF\x00libcudart.so.13\x00libc.so.6"})
    assert offline_kit.cuda_of(built) == 13
    assert offline_kit.cuda_of(wheel(tmp_path, "plain", {"plain/__init__.py": b""})) is None


def test_names_of_targets_and_sizes():
    target = offline_kit.Target.parse("torch2.11-cu130-py312")
    assert (target.torch, target.cuda_major, target.python) == ("2.11.*", 13, "3.12")
    assert offline_kit.Target.parse("torch2.11.0-cu128-py311").torch == "2.11.0"
    assert offline_kit.size_in_bytes("60M") == 60 * 2**20
    for text in ("torch2.11", "torch2.11-cpu-py312", "vllm0.26-cu130-py312"):
        with pytest.raises(offline_kit.KitError, match=r"expected such a name as torch2\.11-cu130-py312"):
            offline_kit.Target.parse(text)
    for text in ("60MB", "0", "-1", ""):
        with pytest.raises(offline_kit.KitError, match="--part-size"):
            offline_kit.size_in_bytes(text)


def test_a_directory_that_holds_something_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run(["bash", ROOT / "scripts" / "offline_kit.sh", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} is not empty; name a new directory\n"


@pytest.fixture
def kit(tmp_path):
    """A kit of two small packages, put together by the functions that put together the real one."""
    folder, scratch = tmp_path / "kit", tmp_path / "scratch"
    wheels, repository = scratch / "wheels", scratch / "repository"
    for path in (folder, wheels, repository):
        path.mkdir(parents=True)
    wheel(wheels, "demo", {"demo/__init__.py": b"import helper\n", "demo/noise": os.urandom(200_000)})
    wheel(wheels, "helper", {"helper/__init__.py": b"", "helper/broken.py": b"import not_carried\n"})
    # The kit's own pip: whichever this Python has, as a wheel.
    import pip

    place = Path(pip.__file__).parent
    with zipfile.ZipFile(wheels / f"pip-{pip.__version__}-py3-none-any.whl", "w") as archive:
        for file in place.rglob("*"):
            if file.suffix != ".pyc":
                archive.write(file, file.relative_to(place.parent))
    (repository / "README.md").write_text("the repository\n")
    subprocess.run(["tar", "-cf", scratch / "repository.tar", "-C", scratch, "repository"], check=True)
    offline_kit.archived([wheels, scratch / "repository.tar"], folder, 2**20)
    facts = {"python": TARGET.python, "torch": "2.*", "verify": {"python": ["demo", "helper"], "compiled": []}}
    (folder / "kit.json").write_text(json.dumps(facts))
    shutil.copy(ROOT / "scripts" / "offline_install.sh", folder / "install.sh")
    # The imports are tried by a program of its own; what it says of the real kit needs vLLM.
    (folder / "verify.py").write_text("import demo, importlib.metadata as m\nprint(m.entry_points(group='kit.test'))\n")
    offline_kit.write_sums(folder)
    return folder


def install(kit: Path, target: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")} | {"PYTHON": sys.executable}
    command = ["bash", str(kit / "install.sh"), str(target)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_kit_is_installed_with_its_entry_points_and_the_repository(kit, tmp_path):
    assert len(list(kit.glob("kit.tar.*"))) > 1
    done = install(kit, tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert "name='demo', value='demo:main'" in done.stdout
    assert (tmp_path / "there" / "repository" / "README.md").read_text() == "the repository\n"
    assert (tmp_path / "there" / "packages" / "helper-1.0.dist-info" / "RECORD").exists()
    found = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert found == ["env.sh", "packages", "repository"]
    again = install(kit, tmp_path / "there")
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path / 'there'} is not empty; name a new directory\n"


def test_a_part_that_was_damaged_or_lost_on_the_way_is_named(kit, tmp_path):
    part = kit / "kit.tar.000"
    data = bytearray(part.read_bytes())
    data[1000] ^= 1
    part.write_bytes(data)
    done = install(kit, tmp_path / "there")
    assert done.returncode == 2
    assert "kit.tar.000: FAILED" in done.stdout
    assert "copy them again" in done.stderr
    part.unlink()
    done = install(kit, tmp_path / "there")
    assert done.returncode == 2
    assert "kit.tar.000" in done.stderr
    assert not list((tmp_path / "there").iterdir())


def test_another_python_is_refused_before_anything_is_written(kit, tmp_path):
    facts = json.loads((kit / "kit.json").read_text()) | {"python": "3.9"}
    (kit / "kit.json").write_text(json.dumps(facts))
    done = install(kit, tmp_path / "there")
    assert done.returncode == 2
    assert "this kit is for Python 3.9" in done.stderr
    assert not (tmp_path / "there").exists()


def test_the_imports_that_fail_are_named(tmp_path):
    """A module that lacks another, a library that needs the driver, one that is not there."""
    package = tmp_path / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "packages" / "broken.py").write_text("import not_carried\n")
    verify = {"python": ["json", "broken"], "compiled": ["_absent"]}
    (tmp_path / "kit.json").write_text(json.dumps({"torch": "1.2.*", "verify": verify}))
    command = [sys.executable, str(ROOT / "scripts" / "offline_verify.py"), str(tmp_path / "kit.json")]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is False
    assert result["checks"]["json"] == "ok"
    assert result["checks"]["broken"] == "FAILED: ModuleNotFoundError: No module named 'not_carried'"
    assert result["checks"]["_absent"].startswith("FAILED")
    assert result["checks"]["torch 1.2.*"].startswith("FAILED: AssertionError: torch is 2.")
