"""Processes that share a model by its heads say what one process says."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from winnow.engine.client import EngineClient
from winnow.engine.config import EngineSettings
from winnow.engine.errors import EngineDied, ModelError
from winnow.engine.messages import CompressionReport, SamplingParams, Submit
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.engine.models.shard import sharded_config
from winnow.engine.ranks import Ranks
from winnow.kernels.dispatch import Backend

from ..models.checkpoints import prompt_of
from .bench import Bench
from .parallel import CASES, PLANS, Said, run_in_processes, write_model

Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("shared")
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, ops: Backend) -> Decoder:
    return load_model(str(folder / "model"), ops, "f32")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Answers]:
    return run_in_processes(2, folder)


@pytest.fixture(scope="module")
def one(whole: Decoder) -> Answers:
    return {case.__name__: case(whole) for case in CASES}


def check_same(said: Said, wanted: Said) -> None:
    """Sums over ranks round otherwise."""
    assert said.tokens == wanted.tokens
    np.testing.assert_allclose(said.logits, wanted.logits, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", PLANS)
def test_two_say_what_one_says(ranks: list[Answers], one: Answers, name: str) -> None:
    said, wanted = ranks[0]["together"][name], one["together"][name]
    check_same(said, wanted)
    # What lies beside the pages fills whole ones at each rank.
    spare = said.report.bytes_held - wanted.report.bytes_held
    assert 0 <= spare <= 3 * 16 * 16 * 2 * 4
    assert msgspec.structs.replace(said.report, bytes_held=wanted.report.bytes_held) == wanted.report


def test_every_rank_says_the_same(ranks: list[Answers]) -> None:
    """To the last bit, whoever was preempted or compressed further on the way."""
    for case in ("together", "crowded", "sampled", "seeing"):
        for name, said in ranks[0][case].items():
            other = ranks[1][case][name]
            assert said.tokens == other.tokens
            assert np.array_equal(said.logits, other.logits)
            assert said.report == other.report
    assert ranks[0]["shortened"] == ranks[1]["shortened"]


@pytest.mark.parametrize("i", range(9))
def test_a_crowd_says_what_it_says_in_one_process(ranks: list[Answers], one: Answers, i: int) -> None:
    said, wanted = ranks[0]["crowded"][str(i)], one["crowded"][str(i)]
    if i % 3 < 2:
        return check_same(said, wanted)
    squeezes = [NEVER if said.report.squeezed_at is None else said.report.squeezed_at for said in (said, wanted)]
    same = min(squeezes) - (40 + 5 * i)  # pages may run out at another token
    assert said.tokens[: same + 1] == wanted.tokens[: same + 1]


NEVER = 1 << 30


def test_draws_guesses_and_hits_are_those_of_one_process(ranks: list[Answers], one: Answers) -> None:
    for name in ("seeded 0", "guessed 0", "recycled 0", "again 0"):
        check_same(ranks[0]["sampled"][name], one["sampled"][name])
    assert ranks[0]["shortened"] == one["shortened"]


@pytest.mark.parametrize("name", ["whole", "pruned", "packed"])
def test_pictures_are_seen_at_each_rank(ranks: list[Answers], one: Answers, name: str) -> None:
    check_same(ranks[0]["seeing"][name], one["seeing"][name])
    assert one["seeing"][name].report.image_tokens_kept == (72 if name == "whole" else 22)


def test_votes_of_all_heads_are_refused(ranks: list[Answers], one: Answers) -> None:
    assert one["refused"] == {"token_select": ""}
    assert ranks[0]["refused"]["token_select"].startswith("compression.kv.read.policy: ")
    assert "tensor_parallel" in ranks[0]["refused"]["token_select"]


@pytest.mark.parametrize(
    ("size", "changes", "why"),
    [
        (3, {}, "does not divide the model's 4 KV heads"),
        (2, {"kv_heads": 1}, "does not divide the model's 1 KV heads"),
        (4, {"intermediate_size": 104}, "does not divide the MLP's width of 104"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(whole: Decoder, size: int, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        sharded_config(replace(whole.config, **changes), Ranks(0, size))


def test_a_draft_model_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel: a draft model"):
        EngineSettings(tensor_parallel=2, draft_model="default")


# The processes -------------------------------------------------------------------------------------------------------


async def asked(client: EngineClient, name: str, tokens: int) -> tuple[list[int], CompressionReport | None]:
    said: list[int] = []
    report = None
    submit = Submit(name, prompt_of(50), SamplingParams(temperature=0.0, max_tokens=tokens), {})
    async for output in client.generate(submit):
        said += output.token_ids
        report = output.compression
    return said, report


async def until_ready(client: EngineClient) -> None:
    for _ in range(3000):
        if client.is_ready:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the engine is not ready")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.timeout(600)  # three processes load torch, twice
def test_an_engine_of_two_processes(folder: Path, whole: Decoder) -> None:
    """It serves; when one of them dies the other one ends and its requests fail; then it serves again."""
    path = str(folder / "model")
    settings = EngineSettings(model=path, weights="f32", kv_memory_gib=0.01, tensor_parallel=2, threads=1)
    wanted = Bench(whole, profiles={}).alone(prompt_of(50), 20)

    async def life() -> None:
        client = EngineClient(settings)
        await client.start()
        try:
            await until_ready(client)
            assert client.info is not None and client.info.kv_heads == 4
            assert await asked(client, "a", 20) == (wanted.tokens, wanted.last.compression)
            assert client._process is not None
            (follower,) = children(client._process.pid)
            pending = asyncio.create_task(asked(client, "b", 900))
            await asyncio.sleep(0.1)
            os.kill(follower, signal.SIGKILL)
            with pytest.raises(EngineDied):
                await asyncio.wait_for(pending, 60)
            await until_ready(client)
            assert client.restarts == 1
            assert (await asked(client, "c", 20))[0] == wanted.tokens
            leader = client._process.pid
        finally:
            await client.stop()
        assert not Path(f"/proc/{leader}").exists()

    asyncio.run(life())
