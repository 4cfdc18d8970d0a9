"""Failed moves, full disks of servers, development mode, and what somebody with bad intentions sends."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from conftest import POLICY
from fault_servers import PATIENCE, Forked, Skip, ToyHost, Violation
from fault_sweeps import REFUSED, Sweep, fault
from toy_engine import TOKEN
from toy_engine import main as serve_toy

from rlvr_landscape_plugin.serving.protocol import MAX_REQUESTS, pack


def _toy(sweep: Sweep) -> ToyHost:
    host = sweep.host()
    if not isinstance(host, ToyHost):
        raise Skip("needs a toy server")
    return host


def _toys(sweep: Sweep) -> list[ToyHost]:
    """All servers, none of which is being restarted."""
    for host in sweep.hosts:
        host.wait()
    return [host for host in sweep.hosts if isinstance(host, ToyHost)]


@fault("server: a move that cannot be undone", toy=14)
def dirty_move(sweep: Sweep) -> tuple[str, str]:
    """R1: the first move after a load, or a later one; the same server works again afterwards."""
    first = sweep.rng.random() < 0.6
    if first:
        sweep.kill()
        sweep.prepare()
        for host in _toys(sweep):
            host.fail(*[sweep.rng.choice(["dirty", "raise"])] * sweep.rng.randint(1, 2))
        sweep.start()
    else:
        sweep.moment()
        sweep.alive()
        _toy(sweep).fail(sweep.rng.choice(["dirty", "raise"]))
    outcome = sweep.settle()
    for host in sweep.hosts:
        host.mend()
    if outcome == REFUSED:
        if "weights are dirty" not in sweep.errors:
            raise Violation(f"refused for another reason:\n{sweep.errors}")
        sweep.start(("one",))  # on the same server: it must not be wedged
        if sweep.settle() == REFUSED:
            raise Violation(f"the server did not come back:\n{sweep.errors}")
    return "the first one" if first else "a later one", outcome


@fault("server: a move that was undone", toy=6)
def restored_move(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    sweep.alive()
    word = sweep.rng.choice(["restored", "unchanged"])
    _toy(sweep).fail(word)
    return word, sweep.settle()


@fault("server: TMPDIR full", toy=10)
def full_tmpdir(sweep: Sweep) -> tuple[str, str]:
    """The reports of the workers cannot be written, at any call of the routes."""
    if sweep.rng.random() < 0.5:
        sweep.kill()
        sweep.prepare()
        for host in _toys(sweep):
            host.temporary.fill(0)
        sweep.start()
    else:
        sweep.moment()
        sweep.alive()
        _toy(sweep).temporary.fill(sweep.rng.choice([0, 0, 4096]))
    process = sweep.alive()
    end = time.monotonic() + sweep.rng.uniform(0.5, 3.0)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    for host in _toys(sweep):
        host.temporary.mend()
    outcome = sweep.settle()
    if outcome == REFUSED and "No space left" not in sweep.errors:
        raise Violation(f"the reason is not said:\n{sweep.errors}")
    return sweep.mode, outcome


@fault("server: in development mode", toy=4)
def development(sweep: Sweep) -> tuple[str, str]:
    """R2: such a server does not start, beside a sweep that goes on."""
    sweep.moment()
    sweep.alive()
    value = sweep.rng.choice(["1", "2", " 1", "yes", "true"])
    folder = sweep.hosts[0].roots[-1] / f"control-{uuid.uuid4().hex[:8]}"
    (folder / "tmp").mkdir(parents=True)
    command = Forked(_serve_in_development, folder, value)
    try:
        _, said = command.communicate(timeout=60)
    finally:
        command.kill()
    if command.returncode == 0 or (folder / "url.txt").exists() or "VLLM_SERVER_DEV_MODE is set" not in said:
        raise Violation(f"a server started in development mode:\n{said}")
    return repr(value), sweep.settle()


def _serve_in_development(folder: Path, value: str) -> int:
    serve_toy(folder, [POLICY], "float32", 0.0, value)
    return 0


@fault("weights: updated past the routes", toy=8)
def foreign_update(sweep: Sweep) -> tuple[str, str]:
    """R2: no point is measured with weights that somebody else wrote through vLLM itself."""
    sweep.moment()
    sweep.alive()
    _toy(sweep).update_behind(f"a trainer's step {sweep.rng.randrange(100)}")
    return sweep.mode, sweep.settle()


def _ask(host: ToyHost, method: str, route: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.request(method, f"{host.server.url}/landscape/{route}", headers=headers, timeout=60, **options)


def _index(folder: Path, name: str) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    return folder


def _link(folder: Path, target: Path, name: str = "model.safetensors") -> Path:
    (folder / "config.json").write_text("{}")
    (folder / name).symlink_to(target)
    return folder


PATHS: dict[str, Callable[[Path, Path], str]] = {
    "an index that climbs": lambda folder, secret: str(_index(folder, f"../../../{secret.parent.name}/{secret.name}")),
    "an index with a path": lambda folder, secret: str(_index(folder, str(secret))),
    "a linked file": lambda folder, secret: str(_link(folder, secret)),
    "a linked directory": lambda folder, secret: str(_link(folder, secret.parent, "below") / "below"),
    "a circle of links": lambda folder, secret: str(_link(folder, folder / "circle", "circle") / "circle"),
    "a path outside": lambda folder, secret: str(secret.parent),
    "a climbing path": lambda folder, secret: f"{folder}/../../../{secret.parent.name}",
    "a null character": lambda folder, secret: f"{folder}/\0",
}


@fault("attack: a path out of the roots", toy=12)
def path_out(sweep: Sweep) -> tuple[str, str]:
    """R7, R11: as snapshot, base model or direction; the answer has no byte of what lies there."""
    sweep.moment()
    sweep.alive()
    host = _toy(sweep)
    outside = host.control.parent / "outside"
    outside.mkdir(exist_ok=True)
    (secret := outside / "secret.safetensors").write_text("words of somebody else")
    folder = host.roots[-1] / f"attack-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    name = sweep.rng.choice(list(PATHS))
    path = PATHS[name](folder, secret)
    place = sweep.rng.choice(["snapshot", "base", "direction"])
    body: dict[str, Any] = {"snapshot": path if place == "snapshot" else str(POLICY), "slice": {"seed": 0}}
    if place == "base":
        body["base"] = path
    if place == "direction":
        path = path if name in ("a path outside", "a climbing path", "a null character") else str(secret)
        body["directions"] = {"alpha": path}
    answer = _ask(host, "POST", "load", json=body)
    shutil.rmtree(folder)
    if answer.status_code not in (403, 422):
        raise Violation(f"{name} as {place}: answered {answer.status_code} {answer.text}")
    if "words of somebody else" in answer.text:
        raise Violation(f"{name} as {place}: the answer shows what lies outside")
    return f"{name}, as {place}", sweep.settle()


@fault("attack: too many requests in one call", toy=6)
def too_many(sweep: Sweep) -> tuple[str, str]:
    """R9: refused at once, and the server answers others meanwhile."""
    sweep.moment()
    sweep.alive()
    host = _toy(sweep)
    count, route = sweep.rng.randint(MAX_REQUESTS + 1, 20_000), sweep.rng.choice(["generate", "score"])
    text = pack(np.arange(4, dtype=np.int32))
    item = {"prompt": text, "seed": 0, "max_tokens": 8}
    body = {"requests": [item] * count, "sampling": {}} if route == "generate" else {"sequences": [text] * count}
    answer = _ask(host, "POST", route, json=body)
    if answer.status_code != 413 or str(MAX_REQUESTS) not in answer.text:
        raise Violation(f"{count} requests: answered {answer.status_code} {answer.text[:200]}")
    return f"{count} to {route}", sweep.settle()


@fault("attack: requests that are never sent to their end", toy=5)
def half_open(sweep: Sweep) -> tuple[str, str]:
    """R9: half-open connections do not keep a sweep from its server."""
    sweep.moment()
    sweep.alive()
    host, count = _toy(sweep), sweep.rng.randint(50, 300)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", host.port), timeout=10))
            connection.sendall(b"POST /landscape/move HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
        outcome = sweep.settle()
    return f"{count} connections", outcome


@fault("attack: a wrong token", toy=4)
def wrong_token(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    sweep.alive()
    given = sweep.rng.choice(["", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"bearer {TOKEN}"])
    for method, route in (("GET", "info"), ("GET", "checksums"), *[("POST", r) for r in ("load", "move", "generate")]):
        url = f"{_toy(sweep).server.url}/landscape/{route}"
        status = httpx.request(method, url, headers={"Authorization": given} if given else {}, json={}).status_code
        if status != 401:
            raise Violation(f"/landscape/{route} answered {status} to {given!r}")
    return repr(given.replace(TOKEN, "TOKEN")), sweep.settle()


TEMPLATES = {
    "reaches into Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "reads a file": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "raises": "{{ raise_exception('never') }}",
    "divides by zero": "{{ 1 // 0 }}",
    "is no template": "{% for message in messages %}",
    "calls what is not there": "{{ strftime_later('%d') }}",
}


@fault("attack: a hostile chat template", toy=6)
def hostile_template(sweep: Sweep) -> tuple[str, str]:
    """R11: refused by name in one message; nothing of it runs."""
    sweep.moment()
    sweep.alive()
    name = sweep.rng.choice(list(TEMPLATES))
    folder = sweep.hosts[0].roots[-1] / f"template-{uuid.uuid4().hex[:8]}"
    shutil.copytree(POLICY, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    beside = sweep.output.with_name(f"{sweep.output.name}-hostile")
    other = sweep.launch(sweep.arguments("one", sweep.hosts[:1]), ["--snapshots", json.dumps([str(folder)])], beside)
    _, said = other.communicate(timeout=PATIENCE)
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(folder)
    if other.returncode != 2 or "Traceback" in said or "template" not in said:
        raise Violation(f"a template that {name}: ended with {other.returncode}:\n{said}")
    return f"a template that {name}", sweep.settle()


@fault("cluster: a job array killed", toy=2)
def killed_jobs(sweep: Sweep) -> tuple[str, str]:
    """R5: no file of the jobs holds the token, and only their owner may look at them."""
    pytest.importorskip("submitit", reason="job arrays need the extra `cluster`")
    sweep.kill()
    sweep.prepare()
    sweep.mode = "one"
    given = [*sweep.arguments("one", sweep.hosts[:1]), "--server.token", TOKEN, "--cluster.executor", "local"]
    process = sweep.process = sweep.launch(given, command=run_cluster)
    end = time.monotonic() + sweep.rng.uniform(8.0, 20.0)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    jobs = sweep.output / "jobs"
    if jobs.exists() and stat.S_IMODE(jobs.stat().st_mode) != 0o700:
        raise Violation(f"{jobs} is open to others")
    sweep.check_secrets()
    outcome = sweep.ended(-signal.SIGKILL)
    return f"{len(list(jobs.rglob('*')))} files of jobs", outcome


def run_cluster(arguments: list[str]) -> int:
    """The command `rlvr-landscape cluster`."""
    from rlvr_landscape_plugin.sweep.cluster import main

    return main(arguments)
