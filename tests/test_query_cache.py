"""The Ingress' memory of query vectors: what is asked of the encoder, what is forgotten and what is counted."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.serving.query_cache import Encoded, QueryCache


class Encoder:
    """Answers with the length of the text, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.name = "bert@1"

    async def __call__(self, text: str) -> Encoded:
        self.asked.append(text)
        return Encoded(np.full(3, len(text), np.float32), self.name)


@given(st.lists(st.text("abc", max_size=2), max_size=40), st.integers(0, 5))
def test_it_is_a_least_recently_used_cache(texts: list[str], capacity: int) -> None:
    encoder, model, expected = Encoder(), OrderedDict[str, None](), []
    cache = QueryCache(encoder, capacity, 10.0)

    async def ask() -> None:
        for text in texts:
            assert (await cache(text)).vectors.tolist() == [len(text)] * 3
            assert len(cache) <= capacity
            if text not in model:
                expected.append(text)
            model[text] = None
            model.move_to_end(text)
            while len(model) > capacity:
                model.popitem(last=False)

    asyncio.run(ask())
    assert encoder.asked == expected
    assert (cache.hits, cache.misses) == (len(texts) - len(expected), len(expected))


def test_a_vector_is_believed_for_its_time_only() -> None:
    encoder, now = Encoder(), [0.0]
    cache = QueryCache(encoder, 10, 5.0, lambda: now[0])
    for now[0] in (0.0, 4.9, 5.0, 9.9):
        asyncio.run(cache("a"))
    assert len(encoder.asked) == 2 and cache.hits == 2


def test_the_first_vector_of_another_encoder_forgets_all_others() -> None:
    async def run() -> None:
        encoder = Encoder()
        cache = QueryCache(encoder, 10, 5.0)
        await cache("a")
        await cache("b")
        encoder.name = "bert@2"
        assert (await cache("a")).encoder == "bert@1"
        assert (await cache("c")).encoder == "bert@2" and len(cache) == 1
        assert (await cache("a")).encoder == "bert@2"

    asyncio.run(run())


def test_an_error_is_told_and_not_kept() -> None:
    async def refuse(_: str) -> Encoded:
        raise TimeoutError

    cache = QueryCache(refuse, 10, 5.0)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            asyncio.run(cache("a"))
    assert len(cache) == 0 and cache.misses == 2


def test_clear_also_forgets_what_is_being_made() -> None:
    async def run() -> int:
        go = asyncio.Event()

        async def slow(_: str) -> Encoded:
            await go.wait()
            return Encoded(np.zeros(3, np.float32))

        cache = QueryCache(slow, 10, 5.0)
        pending = asyncio.create_task(cache("a"))
        await asyncio.sleep(0)
        cache.clear()
        go.set()
        await pending
        return len(cache)

    assert asyncio.run(run()) == 0
