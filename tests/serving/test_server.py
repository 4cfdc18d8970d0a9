"""The live server: moves, scores and caches, against transformers; refusals."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import reference
import torch
from conftest import POLICY, TASKSET
from safetensors.torch import load_file, save_file

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.directions import DirectionSpec, SliceSpec
from rlvr_landscape_plugin.errors import ServerError
from rlvr_landscape_plugin.serving.access import DEVELOPMENT_VARIABLE
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import LocalServer, command, environment, free_port, local_server
from rlvr_landscape_plugin.serving.protocol import MAX_REQUESTS, MOVE_PATH_VARIABLE, Sampling
from rlvr_landscape_plugin.snapshot import file_sha256, write_safetensors

pytestmark = pytest.mark.server
SLICE = {"seed": 0}


def prompts(count: int) -> list[list[int]]:
    from rlvr_landscape_plugin.episodes import ChatFormat, load_tasks, open_environment

    chat = ChatFormat(POLICY)
    tasks = load_tasks(open_environment("rlvr-alphabet-sort", TASKSET), count)
    return [chat.opening(json.dumps([{"role": "user", "content": t.data.info["user_turns"][0]}])) for t in tasks]


def client_of(server: LocalServer, **options: object) -> LandscapeClient:
    return LandscapeClient(server.url, server.token, **options)  # type: ignore[arg-type]


GREEDY = Sampling(temperature=0.0)


async def test_scores_agree_with_transformers_over_the_slice(server):
    """Way in, cast, fused projections, tied embedding: all of it shows in the scores if one is wrong."""
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0, 0)
        sampled = await asyncio.gather(*(client.generate(p, 7 + i, 64) for i, p in enumerate(prompts(8))))
        sequences = [np.concatenate([p, c.tokens]).astype(np.int32) for p, c in zip(prompts(8), sampled, strict=True)]
        for alpha, beta in ((0.0, 0.0), (0.05, 0.0), (-0.1, 0.05), (0.15, 0.15)):
            await client.move(alpha, beta)
            model = reference.perturbed(POLICY, 0, alpha, beta)
            for ids, scored in zip(sequences, await client.score(sequences), strict=True):
                np.testing.assert_allclose(scored, reference.logprobs(model, ids), atol=1e-3)


async def test_decoding_follows_the_weights(server):
    """Greedy tokens after moves, from prompts that were cached under other weights."""
    async with client_of(server, sampling=GREEDY) as client:
        await client.load(str(POLICY), SLICE)
        for alpha, beta in ((0.0, 0.0), (0.2, -0.2), (0.0, 0.0)):
            await client.move(alpha, beta)
            model = reference.perturbed(POLICY, 0, alpha, beta)
            for prompt in prompts(3):
                got = (await client.generate(prompt, 0, 12)).tokens.tolist()
                expected = reference.greedy(model, prompt, len(got))
                assert got == expected


async def test_no_prefix_cache_outlives_a_move(server):
    """Fails if the endpoint stops emptying the cache: the sampler would see keys and values of other weights."""
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        for alpha in (0.0, 0.3, -0.3):
            await client.move(alpha, 0.0)
            # Several cache blocks long: only whole blocks are reused.
            batch = [(prompt * 20)[:500] for prompt in prompts(4)]
            sampled = await asyncio.gather(*(client.generate(p, 1, 24) for p in batch for _ in range(2)))
            whole = [
                np.concatenate([p, c.tokens]) for p, c in zip([p for p in batch for _ in "ab"], sampled, strict=True)
            ]
            for ids, completion, scored in zip(whole, sampled, await client.score(whole), strict=True):
                start = len(ids) - len(completion.tokens) - 1
                np.testing.assert_allclose(completion.logprobs, scored[start:], atol=1e-4)


async def prefix_cache(server: LocalServer) -> np.ndarray:
    """Prompt tokens so far that were looked up in the prefix cache, and that were found there."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/metrics") as response:
            lines = (await response.text()).splitlines()
    counters = ("vllm:prefix_cache_queries_total{", "vllm:prefix_cache_hits_total{")
    return np.array([sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in counters])


async def test_rollouts_of_one_prompt_share_it_over_turns_and_a_whole_score_does_not_look(server):
    prompt = (prompts(1)[0] * 20)[:200]
    whole = 200 // 32 * 32  # tokens in whole blocks of the cache
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0.01, 0)
        before = await prefix_cache(server)
        first = await asyncio.gather(*(client.generate(prompt, seed, 40) for seed in range(16)))
        opening = await prefix_cache(server) - before
        assert opening.tolist() == [16 * 200, 15 * whole]
        longer = [[*prompt, *completion.tokens.tolist(), *prompt[:30]] for completion in first]
        second = await asyncio.gather(*(client.generate(tokens, seed, 8) for seed, tokens in enumerate(longer)))
        asked, found = await prefix_cache(server) - before - opening
        assert asked == sum(map(len, longer))
        assert found >= 16 * whole
        sequences = [np.array([*p, *c.tokens], np.int32) for p, c in zip(longer, second, strict=True)]
        scored = await client.score(sequences)
        assert (await prefix_cache(server) - before - opening).tolist() == [asked, found]
        for ids, completion, logprobs in zip(sequences, second, scored, strict=True):
            start = len(ids) - len(completion.tokens) - 1
            np.testing.assert_allclose(completion.logprobs, logprobs[start:], atol=1e-4)


async def test_scores_from_a_token_on_share_what_comes_before_and_have_the_same_bits(server):
    prompt = (prompts(1)[0] * 20)[:200]
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0.0, 0)
        said = await asyncio.gather(*(client.generate(prompt, seed, 60) for seed in range(12)))
        sequences = [np.array([*prompt, *completion.tokens], np.int32) for completion in said]
        sequences.append(sequences[0])
        first = [200] * len(sequences)
        for warm in (False, True):
            await client.move(0.03, 0)
            alone = await client.score(sequences)
            await client.move(0.03, 0)
            if warm:  # completions of the moved policy in the cache, some of which begin as those of the checkpoint
                await asyncio.gather(*(client.generate(prompt, seed, 60) for seed in range(12)))
            before = await prefix_cache(server)
            shared = await client.score(sequences, first)
            found = (await prefix_cache(server) - before)[1]
            assert found >= (12 + warm) * 192
            for ids, one, other in zip(sequences, alone, shared, strict=True):
                np.testing.assert_array_equal(one[199:], other[199:])
                assert np.isnan(other[:199]).all()
                assert len(other) == len(ids) - 1


async def test_the_origin_is_the_snapshot_bit_for_bit(server, tmp_path, monkeypatch):
    """Kernel-layout checksums: as vLLM loaded the checkpoint itself, after a tour, and on the loader's path."""
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0, 0)
        home = await client.checksums()
        seen = [home]
        for alpha, beta in ((0.05, 0.0), (0.05, -0.05), (-0.15, 0.15)):
            await client.move(alpha, beta)
            seen.append(await client.checksums())
        await client.move(0, 0)
        assert await client.checksums() == home
        for one, other in itertools.combinations(seen, 2):
            assert all(one[0][name] != other[0][name] for name in home[0]), "every parameter moves, packed ones too"
    monkeypatch.setenv(MOVE_PATH_VARIABLE, "loader")
    async with local_server(ServerConfig(), POLICY, [POLICY], tmp_path / "second.log") as fresh:
        async with client_of(fresh) as client:
            assert await client.checksums() == home
            assert (await client.load(str(POLICY), SLICE))["move_path"] == "loader"
            await client.move(0.05, -0.05)
            assert await client.checksums() == seen[2]


async def test_loading_says_how_weights_will_move(server):
    async with client_of(server) as client:
        loaded = await client.load(str(POLICY), SLICE)
        assert loaded["move_path"] == "kernel", loaded["move_path_reason"]
        assert loaded["directions_memory"] == "float32 on the host"
        assert (await client.info())["loaded"]["move_path"] == "kernel"
        still = await client.load(str(POLICY), SLICE | {"exclude": ["*"]})
        assert (still["move_path"], still["move_path_reason"]) == ("loader", "no tensor moves")


async def test_a_move_waits_for_the_requests_in_flight(server):
    """They end under the weights they began with, and their outputs arrive."""
    async with client_of(server, sampling=GREEDY) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0.0, 0.0)
        alone = await asyncio.gather(*(client.generate(prompt, 0, 200) for prompt in prompts(8)))
        together = [asyncio.create_task(client.generate(prompt, 0, 200)) for prompt in prompts(8)]
        await asyncio.sleep(0.03)
        assert not all(task.done() for task in together)
        await client.move(0.3, -0.3)
        for task, before in zip(together, alone, strict=True):
            assert (await task).tokens.tolist() == before.tokens.tolist()


async def test_same_seeds_same_tokens_other_seeds_other_tokens(server):
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0.1, 0)
        prompt = prompts(1)[0]
        draws = [
            [c.tokens.tolist() for c in await asyncio.gather(*(client.generate(prompt, s, 32) for s in seeds))]
            for seeds in (range(8), range(8), range(8, 16))
        ]
        assert draws[0] == draws[1]
        assert draws[0] != draws[2]


async def test_realised_step_is_the_relative_norm(server):
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        assert (await client.move(0, 0)).realised_step == 0.0
        result = await client.move(0.05, -0.1)
        theta = {n: p.detach().numpy() for n, p in reference.perturbed(POLICY, 0, 0, 0).named_parameters()}
        moved = {n: p.detach().numpy() for n, p in reference.perturbed(POLICY, 0, 0.05, -0.1).named_parameters()}
        change = np.sqrt(sum(float(np.sum((moved[n] - theta[n]).astype(np.float64) ** 2)) for n in theta))
        total = np.sqrt(sum(float(np.sum(theta[n].astype(np.float64) ** 2)) for n in theta))
        assert result.realised_step == pytest.approx(change / total, rel=1e-5)


async def test_stale_versions_and_unmoved_snapshots_are_refused(server):
    async with client_of(server) as first, client_of(server) as second:
        await first.load(str(POLICY), SLICE)
        await first.move(0.05, 0)
        await second.move(0.1, 0)
        with pytest.raises(ServerError, match="stale weight version"):
            await first.generate(prompts(1)[0], 0, 4)
        await second.load(str(POLICY), {"seed": 3})
        with pytest.raises(ServerError, match="weights are unknown"):
            await second.score([np.arange(9, dtype=np.int32)])


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("move", {"alpha": 0.0}, 422, "beta"),
        ("move", {"alpha": 0.0, "beta": 0.0, "gamma": 1}, 422, "gamma"),
        ("move", "[]", 422, "bad request body"),
        ("load", {"snapshot": "/etc", "slice": {"seed": 0}}, 403, "outside"),
    ],
)
async def test_bad_requests_are_refused(server, route, body, status, message):
    data = body if isinstance(body, str) else json.dumps(body)
    headers = {"Authorization": f"Bearer {server.token}"}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/landscape/{route}", data=data, headers=headers) as response:
            assert response.status == status
            assert message in await response.text()


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_every_route_wants_the_token(server, token):
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        for method, route in (
            ("GET", "info"),
            ("GET", "checksums"),
            ("POST", "load"),
            ("POST", "move"),
            ("POST", "generate"),
            ("POST", "score"),
        ):
            async with session.request(method, f"{server.url}/landscape/{route}") as response:
                assert response.status == 401
    async with aiohttp.ClientSession() as session:
        for route in ("collective_rpc", "pause", "update_weights"):
            async with session.post(f"{server.url}/{route}") as response:
                assert response.status == 404, "vLLM's development routes must stay off"


def broken(playground: Path, name: str, change) -> Path:
    path = playground / name
    if not path.exists():
        shutil.copytree(POLICY, path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("missing", lambda t: t.pop(KEY), f"tensor '{KEY}' is missing"),
        ("shape", lambda t: t.update({KEY: t[KEY][:-1].clone()}), f"tensor '{KEY}' has shape"),
        (
            "foreign",
            lambda t: t.update({"extra.weight": torch.ones(2)}),
            "'extra.weight' in .* is not part of the model",
        ),
        ("nan", lambda t: t[KEY].view(-1)[5:6].fill_(torch.nan), f"tensor '{KEY}' holds NaN"),
    ],
)
async def test_unfit_snapshots_are_refused_and_change_nothing(server, playground, name, change, message):
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0.1, 0)
        before, version = await client.checksums(), client.version
        with pytest.raises(ServerError, match=message):
            await client.load(str(broken(playground, name, change)), SLICE)
        assert await client.checksums() == before
        client.version = version
        assert len((await client.score([np.arange(9, dtype=np.int32)]))[0]) == 8


async def test_another_snapshot_of_the_same_model_is_taken_in(server, playground):
    other = broken(playground, "other", lambda t: t[KEY].mul_(1.01))
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0, 0)
        home = await client.checksums()
        await client.load(str(other), SLICE)
        await client.move(0, 0)
        assert await client.checksums() != home
        ids = np.array(prompts(1)[0], np.int32)
        model = reference.perturbed(other, 0, 0, 0)
        np.testing.assert_allclose((await client.score([ids]))[0], reference.logprobs(model, ids), atol=1e-3)


async def test_stock_chat_route_serves_the_moved_policy(server):
    """The same server is an ordinary OpenAI server; its own routes see the moved weights too."""
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0.1, -0.05)
        prompt = prompts(1)[0]
        model = reference.perturbed(POLICY, 0, 0.1, -0.05)
        body = {"model": "policy", "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        url = f"{server.url}/v1/completions"
        async with aiohttp.ClientSession() as session:
            async with session.post(url, json=body) as response:
                assert response.status == 401, "open to every user of the machine"
            async with session.post(url, json=body, headers={"Authorization": f"Bearer {server.token}"}) as response:
                choice = (await response.json())["choices"][0]
        assert choice["token_ids"] == reference.greedy(model, prompt, len(choice["token_ids"]))


async def test_files_outside_the_roots_are_refused_wherever_they_are_named(server, playground, tmp_path):
    """A link, and a name in an index, out of a directory that the server may read."""
    shutil.copytree(POLICY, outside := tmp_path / "outside")
    linked, indexed = playground / "linked", playground / "indexed"
    shutil.copytree(POLICY, linked)
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(outside / "model.safetensors")
    shutil.copytree(POLICY, indexed)
    (indexed / "model.safetensors").unlink()
    target = os.path.relpath(outside / "model.safetensors", indexed)
    names = load_file(POLICY / "model.safetensors")
    (indexed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0, 0)
        before = await client.checksums()
        for snapshot in (linked, indexed):
            with pytest.raises(ServerError, match=r"model\.safetensors .*outside the server's.*HTTP 403"):
                await client.load(str(snapshot), SLICE)
        assert await client.checksums() == before


async def test_more_requests_than_a_call_may_have_are_refused(server):
    headers = {"Authorization": f"Bearer {server.token}"}
    body = json.dumps({"sequences": [""] * (MAX_REQUESTS + 1)})
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.post(f"{server.url}/landscape/score", data=body) as response:
            assert response.status == 413
            assert "send several calls" in await response.text()


async def test_vllm_knows_the_version_of_every_move(server):
    """So that an update past our routes shows."""
    async with client_of(server) as client:
        await client.load(str(POLICY), SLICE)
        await client.move(0.05, 0)
        facts = await client.info()
        assert (facts["state"], facts["version"], facts["logprobs_mode"]) == ("clean", client.version, "raw_logprobs")


@pytest.mark.slow
async def test_a_server_comes_back_after_a_first_move_that_failed(tmp_path):
    """Its direction's file is gone when the first move after the load needs it; another load and move mend it.

    The server was started for processed log-probabilities, which only sampling at temperature 1 can use.
    """
    names = load_file(POLICY / "model.safetensors")
    file = tmp_path / "direction.safetensors"
    write_safetensors(file, {n: w.shape for n, w in names.items()}, (1e-3 * w.numpy() for w in names.values()))
    along = SliceSpec(0, alpha=DirectionSpec("file", "none", sha256=file_sha256(file))).as_dict()
    extra = ["--logprobs-mode", "processed_logprobs"]
    config = ServerConfig(device="cpu", directions_memory="regenerated", extra_args=extra)
    async with local_server(config, POLICY, [POLICY, tmp_path], tmp_path / "log") as other:
        async with client_of(other, sampling=Sampling(temperature=0.7)) as warm:
            with pytest.raises(ServerError, match=r"processed_logprobs; at sampling\.temperature = 0\.7"):
                await warm.info()
        async with client_of(other) as client:
            assert (await client.info())["logprobs_mode"] == "processed_logprobs"
            await client.load(str(POLICY), along, {"alpha": str(file)})
            file.rename(tmp_path / "away")
            with pytest.raises(ServerError, match=r"weights are dirty: FileNotFoundError"):
                await client.move(0.5, 0)
            assert (await client.info())["state"] == "dirty"
            await client.load(str(POLICY), SLICE)
            await client.move(0.0, 0.0)
            scores = await client.score([np.asarray(ids, dtype=np.int32) for ids in prompts(2)])
            model = reference.perturbed(POLICY, 0, 0, 0)
            for ids, scored in zip(prompts(2), scores, strict=True):
                np.testing.assert_allclose(scored, reference.logprobs(model, ids), atol=1e-3)


@pytest.mark.slow
def test_a_landscape_server_does_not_start_in_development_mode(tmp_path):
    """As somebody starts it by hand: vLLM would let anybody move its weights."""
    config = ServerConfig(device="cpu")
    env = environment(config, "token", [POLICY]) | {DEVELOPMENT_VARIABLE: "1"}
    done = subprocess.run(command(config, POLICY, free_port()), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "VLLM_SERVER_DEV_MODE is set" in done.stdout + done.stderr
