"""What a server reads and where its workers write: roots, links, names in an index, report directories."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving import access
from rlvr_landscape_plugin.serving.launch import environment
from rlvr_landscape_plugin.serving.protocol import ROOTS_VARIABLE


@pytest.fixture
def roots(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A directory that may be read, with a snapshot in it, and one that may not, with a file."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    snapshot = inside / "step_000001"
    snapshot.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.safetensors").write_bytes(b"weights of somebody else")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setenv(ROOTS_VARIABLE, str(inside))
    return snapshot, outside


def test_a_snapshot_below_a_root_is_read(roots):
    snapshot, _ = roots
    assert access.confined_snapshot(str(snapshot)) == snapshot
    assert access.confined_snapshot(str(snapshot / ".." / snapshot.name)) == snapshot


def test_a_link_out_of_the_roots_is_refused(roots):
    snapshot, outside = roots
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside / "secret.safetensors")
    with pytest.raises(
        access.AccessError, match=r"file model\.safetensors at .* leads to .*secret.*outside the server's"
    ) as error:
        access.confined_snapshot(str(snapshot))
    assert error.value.status == 403


@pytest.mark.parametrize("name", ["../../outside/secret.safetensors", "{outside}/secret.safetensors"])
def test_an_index_that_names_files_outside_is_refused(roots, name):
    snapshot, outside = roots
    index = {"weight_map": {"w": name.format(outside=outside)}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(access.AccessError, match=r"secret\.safetensors .*outside the server's"):
        access.confined_snapshot(str(snapshot))


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"weight_map": []}', '{"other": 1}'])
def test_an_index_that_is_none_is_left_to_the_reader(roots, content):
    snapshot, _ = roots
    (snapshot / "model.safetensors.index.json").write_text(content)
    assert access.confined_snapshot(str(snapshot)) == snapshot


def test_an_index_outside_is_not_even_read(roots, monkeypatch):
    snapshot, outside = roots

    def loads(text: str) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(access.json, "loads", loads)
    (outside / "index.json").write_text('{"weight_map": {"w": "x"}}')
    (snapshot / "model.safetensors.index.json").symlink_to(outside / "index.json")
    with pytest.raises(access.AccessError, match="index"):
        access.confined_snapshot(str(snapshot))


def test_a_link_inside_the_roots_is_followed(roots):
    snapshot, _ = roots
    (snapshot.parent / "blob").write_bytes(b"weights")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(snapshot.parent / "blob")
    assert access.confined_snapshot(str(snapshot)) == snapshot


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ("/etc", 403, "snapshot /etc is outside the server's RLVR_LANDSCAPE_ROOTS; add its directory there"),
        ("{inside}/../outside", 403, "outside"),
        ("{inside}/circle", 422, "no path that can be followed"),
        ("{inside}/\0", 422, "no path that can be followed"),
    ],
)
def test_other_paths_are_refused(roots, given, status, message):
    snapshot, _ = roots
    (snapshot.parent / "circle").symlink_to(snapshot.parent / "circle")
    with pytest.raises(access.AccessError, match=message) as error:
        access.confined_snapshot(given.format(inside=snapshot.parent))
    assert error.value.status == status


def test_without_roots_nothing_is_read(roots, monkeypatch):
    snapshot, _ = roots
    monkeypatch.delenv(ROOTS_VARIABLE)
    with pytest.raises(access.AccessError, match=f"set {ROOTS_VARIABLE}") as error:
        access.confined(str(snapshot), "snapshot")
    assert error.value.status == 503


def test_a_server_started_here_may_follow_the_links_of_its_snapshots(roots):
    """The Hub's cache keeps a snapshot as links to files elsewhere."""
    snapshot, outside = roots
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside / "secret.safetensors")
    env = environment(ServerConfig(device="cpu"), "token", [snapshot, outside.parent / "not there yet"])
    places = env[ROOTS_VARIABLE].split(os.pathsep)
    assert places == [str(snapshot), str(outside.parent / "not there yet"), str(outside / "secret.safetensors")]


def test_reports_go_only_where_the_routes_made_a_directory(tmp_path, monkeypatch):
    with access.report_directory() as folder:
        assert access.check_report_directory(str(folder)) == folder
    with pytest.raises(access.AccessError, match="cannot be used"):
        access.check_report_directory(str(folder))
    monkeypatch.setattr(access.tempfile, "gettempdir", lambda: str(tmp_path))
    made = [tmp_path / name for name in ("rlvr-landscape-1", "other", "rlvr-landscape-2", "rlvr-landscape-3")]
    for path in made[:3]:
        path.mkdir(mode=0o700)
    made[2].chmod(0o777)
    made[3].symlink_to(made[0])
    below = made[0] / "rlvr-landscape-4"
    below.mkdir(mode=0o700)
    assert access.check_report_directory(str(made[0])) == made[0]
    for path in (*made[1:], below, "", "relative", "/etc"):
        with pytest.raises(access.AccessError, match=r"not a report directory|cannot be used"):
            access.check_report_directory(str(path))


@pytest.mark.parametrize("value", ["1", "2", " 1", "yes"])
def test_development_mode_is_refused(monkeypatch, value):
    monkeypatch.setenv(access.DEVELOPMENT_VARIABLE, value)
    with pytest.raises(access.AccessError, match=r"VLLM_SERVER_DEV_MODE is set.*unset it"):
        access.refuse_development_mode()


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_development_mode_nothing_is_refused(monkeypatch, value):
    if value is None:
        monkeypatch.delenv(access.DEVELOPMENT_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(access.DEVELOPMENT_VARIABLE, value)
    access.refuse_development_mode()
