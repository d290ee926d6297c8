"""An Ingress' calls of other deployments, which are played here: who shares one, what a death or a failure costs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from springtide.serving.calls import Answered, Encoders, Scorers
from springtide.serving.engine import ScoreRequest
from springtide.serving.metrics import PrometheusMetrics
from springtide.serving.models import Failure, Told
from springtide.serving.options import CALLS_PER_REPLICA
from springtide.serving.query_cache import Encoded


class Replica:
    """A deployment of one replica whose methods answer after a while; the first `dies` calls end with its death."""

    def __init__(self, answer: Callable[[Any], Any], takes: float = 0.01, dies: int = 0) -> None:
        self.calls: list[Any] = []
        self.score = self.encode = self.similar = SimpleNamespace(remote=self._remote)
        self._answer, self._takes, self._dies = answer, takes, dies

    async def _remote(self, asked: Any) -> Any:
        self.calls.append(asked)
        if len(self.calls) <= self._dies:
            raise RayActorError
        await asyncio.sleep(self._takes)
        return self._answer(asked)


def scored(requests: list[ScoreRequest]) -> Answered[list[Any]]:
    """The k that was asked for, or a failure where that is 13."""
    return Answered("a", [Failure("unlucky") if r.k == 13 else {"k": r.k} for r in requests])


def request(k: int, events: int = 0) -> ScoreRequest:
    return ScoreRequest([{"item_id": "i"}] * events, k=k)


def run(calls: Callable[[], Awaitable[list[Any]]]) -> list[Any]:
    async def limited() -> list[Any]:
        async with asyncio.timeout(10):
            return await calls()

    return asyncio.run(limited())


def test_requests_that_wait_share_calls_and_each_has_its_own_answer() -> None:
    replica = Replica(scored)

    async def calls() -> list[Any]:
        scorers = Scorers(replica, 5, 5)
        return await asyncio.gather(*(scorers.call("score", request(k)) for k in range(40)))

    assert run(calls) == [Failure("unlucky") if k == 13 else {"k": k} for k in range(40)]
    assert len(replica.calls) <= CALLS_PER_REPLICA and max(map(len, replica.calls)) == 32


def test_metrics_tell_how_many_wait_for_a_call() -> None:
    metrics, replica = PrometheusMetrics(), Replica(scored, takes=0.05)

    def waiting() -> float:
        (found,) = re.findall(r'springtide_waiting{part="scorer"} (.*)', metrics.text().decode())
        return float(found)

    async def calls() -> list[Any]:
        scorers, asked = Scorers(replica, 5, 5, metrics), []
        for k in range(CALLS_PER_REPLICA + 3):
            asked.append(asyncio.create_task(scorers.call("score", request(k))))
            await asyncio.sleep(0.001)
        seen = waiting()
        await asyncio.gather(*asked)
        return [seen, waiting()]

    assert run(calls) == [3, 0]


def test_long_histories_fill_a_call_sooner() -> None:
    replica = Replica(scored)

    async def calls() -> list[Any]:
        scorers = Scorers(replica, 5, 5)
        return await asyncio.gather(*(scorers.call("score", request(k, 1000)) for k in range(8)))

    assert run(calls) == [{"k": k} for k in range(8)]
    assert max(map(len, replica.calls)) == 2


def test_a_replica_that_died_is_asked_again_once() -> None:
    async def calls(dies: int) -> list[Any]:
        return [await Scorers(Replica(scored, dies=dies), 5, 5).call("score", request(3))]

    assert run(lambda: calls(1)) == [{"k": 3}]
    with pytest.raises(RayActorError):
        run(lambda: calls(2))


def test_a_call_that_hangs_is_given_up() -> None:
    async def calls() -> list[Any]:
        scorers = Scorers(Replica(scored, takes=60), 0.1, 5)
        return await asyncio.gather(*(scorers.call("score", request(k)) for k in range(6)), return_exceptions=True)

    assert all(isinstance(one, TimeoutError) for one in run(calls))


def test_other_methods_go_alone() -> None:
    replica = Replica(lambda item: f"like {item}")
    assert run(lambda: asyncio.gather(*(Scorers(replica, 5, 5).call("similar", i) for i in "ab"))) == [
        "like a",
        "like b",
    ]
    assert replica.calls == ["a", "b"]


def test_queries_share_calls_and_have_none_of_a_long_list_before_them_but_one() -> None:
    replica = Replica(lambda texts: Answered("a", Encoded(np.array([[len(t)] for t in texts], np.float32), "bert@1")))

    async def calls() -> list[Any]:
        encoders = Encoders(replica, 5, 5)
        lists = [asyncio.create_task(encoders.encode(["list"] * 40)) for _ in range(3)]
        await asyncio.sleep(0)
        return await asyncio.gather(*(encoders.encode(["x" * n]) for n in range(9)), *lists)

    found = run(calls)
    assert [one.vectors.tolist() for one in found[:9]] == [[[n]] for n in range(9)]
    assert [one.vectors.tolist() for one in found[9:]] == [[[4]] * 40] * 3
    assert {one.encoder for one in found} == {"bert@1"}
    of_lists = [n for n, texts in enumerate(replica.calls) if texts[0] == "list"]
    queries = [n for n, texts in enumerate(replica.calls) if texts[0] != "list"]
    assert max(map(len, replica.calls)) == 16 and len(queries) < 9
    assert sum(n < max(queries) for n in of_lists) == 1 and len(of_lists) == 8


def test_a_list_of_texts_is_read_by_one_encoder() -> None:
    """Which may be swapped after the first of its calls."""
    asked: list[int] = []

    def answer(texts: list[str]) -> Answered[Encoded]:
        asked.append(len(texts))
        return Answered("a", Encoded(np.full((len(texts), 1), len(asked)), f"bert@{min(len(asked), 2)}"))

    async def calls() -> list[Any]:
        return [await Encoders(Replica(answer), 5, 5).encode(["x"] * 20)]

    (found,) = run(calls)
    assert found.encoder == "bert@2" and found.vectors.tolist() == [[3]] * 16 + [[4]] * 4
    assert asked == [16, 4, 16, 4]


class Replicas(Replica):
    """A deployment of several replicas, of which `answer` tells what all answer when they are asked together."""

    def __init__(self, answer: Callable[[], Awaitable[list[Any]]]) -> None:
        super().__init__(lambda asked: asked)
        self.models = SimpleNamespace(remote=self._one)
        self._together = answer

    async def _one(self) -> str:
        return "one"

    def broadcast(self, method: str) -> Any:
        async def results_async(timeout_s: float, return_exceptions: bool) -> list[Any]:
            assert method == "models" and timeout_s == 0.5 and return_exceptions
            return await self._together()

        return SimpleNamespace(results_async=results_async)


async def _all() -> list[Any]:
    return ["a", "b"]


async def _but_one() -> list[Any]:
    return ["a", RayActorError()]


async def _too_slow() -> list[Any]:
    raise TimeoutError


async def _none() -> list[Any]:
    raise DeploymentUnavailableError(DeploymentID("Scorer", "app"))


@pytest.mark.parametrize(
    ("answer", "scorers", "encoders"),
    [
        (_all, Told(["a", "b"], 2), Told(["a", "b"], 2)),
        (_but_one, Told(["a"], 2), Told(["a"], 2)),
        (_too_slow, Told(["one"], None), Told([], None)),
        (_none, Told(["one"], None), Told([], 0)),
    ],
)
def test_who_asks_every_replica_learns_how_many_did_not_tell(answer: Any, scorers: Told, encoders: Told) -> None:
    async def calls() -> list[Any]:
        handle = Replicas(answer)
        return [await Scorers(handle, 9, 1).everywhere("models"), await Encoders(handle, 9, 1).everywhere("models")]

    assert run(calls) == [scorers, encoders]
