"""A whole sweep in which verifiers' own agents play, on fake servers: said, recorded, and measured as any other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from conftest import QUIZ
from fake_server import FakeServer

HOOKS = QUIZ.replace(
    'id = "tiny-quiz"\nnum_prompts = 4\nrollouts = 3', 'id = "hook-quiz"\nnum_prompts = 2\nrollouts = 2'
)


def opened(folder):
    with xr.open_dataset(folder / "landscape_step000000_slice0.nc") as data:
        return data.load()


def test_a_sweep_of_tasks_with_hooks_says_and_records_its_path(sweep_here, fake_server, tmp_path):
    with FakeServer() as second:
        code, said = sweep_here(fake_server, second, "--env.runtime", "subprocess", config=HOOKS)
    assert code == 0, said
    assert (
        "episodes are played by verifiers' own agents (harness 'rlvr-chat'), which is slower than the chat loop" in said
    )
    assert "it intercepts model requests" in said
    data = opened(tmp_path / "out")
    env = json.loads(data.attrs["configuration"])["env"]
    assert (env["path"], env["harness"], env["tool_parser"]) == ("verifiers", {"id": "rlvr-chat"}, None)
    assert "timeout" not in env
    assert (data.status != 2).all()
    assert set(np.unique(data.reward)) == {0.0, 1.0}
    # A reply that the hook replaced has the tokens that the policy said: its KL is that of the others.
    assert (data.completion_tokens > 0).all()
    away = data.kl_k3.sel(alpha=data.alpha[-1], beta=data.beta[-1])
    assert (away > 0).all()
    assert (data.kl_k1.sel(alpha=0.0, beta=0.0) == 0).all()


def test_two_paths_never_mix_in_one_dataset(sweep_here, fake_server):
    plain = QUIZ.replace("num_prompts = 4\nrollouts = 3", "num_prompts = 2\nrollouts = 2")
    assert sweep_here(fake_server, config=plain)[0] == 0
    code, said = sweep_here(fake_server, "--env.path", "verifiers", "--env.runtime", "subprocess", config=plain)
    assert code == 2
    assert "env.path" in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "env.runtime = 'subprocess' with env.path = 'auto' or 'verifiers' lets verifiers' own agents do that"),
        (("--env.runtime", "subprocess", "--env.harness", '{"id": "bash"}'), "does not show the policy its tools"),
    ],
)
def test_a_sweep_that_cannot_play_ends_before_a_server_is_asked(sweep_here, fake_server, options, message):
    code, said = sweep_here(fake_server, *options, config=HOOKS)
    assert code == 2
    assert message in said
    assert not fake_server.asked
