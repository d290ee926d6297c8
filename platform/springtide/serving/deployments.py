"""The Ray Serve application: Ingress (HTTP, event log) -> TextEncoder (queries) and Scorer (model, top K).

A recommendation by history is one hop, with a query two. Heavy work runs in a thread, so that each replica's event
loop stays free to take requests, answer health checks and report its queue to the autoscaler.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from springtide.errors import SpringtideError
from springtide.serving.app import Edge, create_app
from springtide.serving.batching import Batches, in_thread
from springtide.serving.calls import Answered, Encoders, Scorers
from springtide.serving.engine import Engine, Json, Refusal, ScoreRequest
from springtide.serving.exposures import FOLDER, ExposureLog
from springtide.serving.live import Live, NoLogHere
from springtide.serving.metrics_ray import RayMetrics
from springtide.serving.models import Failure, Models, failure, load_models
from springtide.serving.options import AppOptions, EncoderOptions, ExposureOptions, IngressOptions, ScorerOptions
from springtide.serving.popular import load_popular
from springtide.serving.query_cache import Encoded
from springtide.serving.seeding import seed_until_done
from springtide.serving.service import Service
from springtide.serving.store import HistoryStore, file_of, open_store
from springtide.serving.store_rows import Retention
from springtide.serving.tokens import open_tokens

log = logging.getLogger("ray.serve")
STORE_PATIENCE_S = 0.25  # of a Scorer, which goes on with what it knows


def _replica() -> str:
    return serve.get_replica_context().replica_id.unique_id


def _padded_tokens(items: list[tuple[str, int]]) -> int:
    """Cost of a batch of (text, tokens): every text is padded to the longest."""
    return len(items) * max(tokens for _, tokens in items)


@serve.deployment(max_ongoing_requests=64)
class TextEncoder:
    """Texts -> unit vectors. Texts of concurrent requests share a batch, filled by padded tokens, not by count."""

    def __init__(self) -> None:
        self._encoder: Any = None
        self._options: EncoderOptions | None = None  # of the encoder in use
        self._refused: str | None = None  # why it is not the one that was configured last
        self._metrics = RayMetrics()
        self._thread = ThreadPoolExecutor(1)  # tokenizers of Hugging Face refuse two threads at once
        most = EncoderOptions().max_batch_tokens
        self._batches = Batches(in_thread(self._thread, self._encode), most, _padded_tokens)

    async def reconfigure(self, config: Json) -> None:
        """Load the encoder that `config` (EncoderOptions) names beside the old one, warm it, then swap.

        Queries are answered by the old one meanwhile; where only batching changes nothing is loaded.
        """
        try:
            options, encoder = EncoderOptions.model_validate(config), self._encoder
            if self._options is None or not self._options.same_encoder(options):
                encoder = await asyncio.to_thread(_load_encoder, options)
        except Exception as error:
            if self._encoder is None:
                raise _startup_error("TextEncoder", error) from None
            log.exception("TextEncoder keeps its old encoder, the new one failed to load")
            self._refused = _sentence(error)
            return
        self._encoder, self._options, self._refused = encoder, options, None
        self._batches.most, self._batches.wait_s = options.max_batch_tokens, options.batch_wait_ms / 1000

    async def encode(self, texts: list[str]) -> Answered[Encoded]:
        """[n, D] float32, all of one encoder."""
        assert self._options is not None  # Serve sends nothing before the first configuration is in place
        lengths, most = await self._run(self._encoder.token_lengths, texts), self._options.max_tokens
        sized = [(text, min(n, most)) for text, n in zip(texts, lengths, strict=True)]
        while True:
            found = await asyncio.gather(*(self._batches(item) for item in sized))
            encoders = {one.encoder for one in found}
            if len(encoders) == 1:  # else it was swapped in between
                return Answered(_replica(), Encoded(np.stack([one.vectors for one in found]), encoders.pop()))

    async def describe(self) -> Json:
        """The encoder in use; `error` says why the one that was configured last was refused."""
        error = {"error": self._refused} if self._refused is not None else {}
        return {"encoder": self._encoder.identity, **error}

    def _encode(self, items: list[tuple[str, int]]) -> list[Encoded]:
        self._metrics.observe("springtide_batch_size", len(items), part="encoder")
        encoder = self._encoder
        return [Encoded(vector, encoder.identity) for vector in encoder.encode([text for text, _ in items])]

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


@serve.deployment(max_ongoing_requests=128)
class Scorer:
    """Histories and query vectors -> items, from the bundle that `user_config` (ScorerOptions) names."""

    def __init__(self, options: AppOptions) -> None:
        self._models: Models | None = None
        self._live = Live(lambda: _store_to_follow(options.store))
        self._observe_every_s = 0.0
        self._reconfigured = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()
        most = ScorerOptions.model_fields["max_batch"].default
        self._batches = Batches(in_thread(ThreadPoolExecutor(1, "score"), self._score), most)
        self._lookups = ThreadPoolExecutor(2, "lookups")  # similar items and interests never wait in that one's way
        self._apart = ThreadPoolExecutor(1)  # copies for comparison: one at a time, never in a batch that is awaited
        self._metrics = RayMetrics()

    async def reconfigure(self, config: Json) -> None:
        """Load, check and warm new models beside the old ones, then swap one reference; see load_models."""
        try:
            options = ScorerOptions.model_validate(config)
            self._live.observe_at_most = options.observe_at_most  # by engines that begin
            load = partial(self._load, count=options.observe_every_s > 0)
            models = await asyncio.to_thread(load_models, options, self._models, load, _sentence)
        except Exception as error:
            if self._models is None:
                raise _startup_error("Scorer", error) from None
            old = self._models
            self._models = replace(old, refused={**old.refused, old.primary: _sentence(error)})
            log.error("Scorer keeps its models, the new configuration was refused: %s", _sentence(error))
            return
        gone = self._models.engines.values() if self._models is not None else ()
        for served, engines in ((0, gone), (1, models.engines.values())):
            for engine in engines:
                self._metrics.set("springtide_model", served, model=engine.label)
        self._models = models
        self._observe_every_s = options.observe_every_s
        self._reconfigured.set()
        self._batches.most, self._batches.wait_s = options.max_batch, options.batch_wait_ms / 1000
        log.info("Scorer serves %s", ", ".join(engine.label for engine in models.engines.values()))

    async def score(self, requests: list[ScoreRequest]) -> Answered[list[Json | Refusal | Failure]]:
        return Answered(_replica(), await asyncio.gather(*map(self._batches, requests)))

    def _score(self, requests: list[ScoreRequest]) -> list[Json | Refusal | Failure]:
        """Answers with every item that was added until now, or degraded ones where the store does not tell."""
        self._metrics.observe("springtide_batch_size", len(requests), part="scorer")
        try:
            models = self._ready_models()
            current = self._live.add_items(models.engines.values())
            answers = models.score(requests)
        except Exception as error:
            return [failure("the Scorer failed", error)] * len(requests)
        return answers if current else [{**a, "degraded": True} if isinstance(a, dict) else a for a in answers]

    async def interests(self, events: list[Json]) -> Json:
        return await self._look_up(lambda: self._current_models().interests(events))

    async def similar(self, item_id: str, k: int) -> Json | Refusal:
        return await self._look_up(lambda: self._current_models().similar(item_id, k))

    async def _look_up(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._lookups, work)

    async def score_apart(self, request: ScoreRequest) -> Json | Refusal | Failure:
        """Score a request that nobody waits for."""
        models = self._ready_models()
        return (await asyncio.get_running_loop().run_in_executor(self._apart, models.score, [request]))[0]

    async def describe(self) -> Json:
        return self._ready_models().describe()

    async def models(self) -> Json:
        models = self._ready_models()
        told = models.models()
        for model in told["models"]:
            if model["name"] in models.engines:
                model["live"] = self._live.told(models.engines[model["name"]])
        return told

    def _load(self, options: ScorerOptions, count: bool) -> Engine:
        """An engine that knows what was stored since its bundle was trained; count: events too, not items alone."""
        engine = _load_engine(options)
        self._live.prepare(engine, count=count)
        return engine

    def _current_models(self) -> Models:
        """The models with every item that was added until now. Not on the event loop: it asks the store."""
        models = self._ready_models()
        self._live.add_items(models.engines.values())
        return models

    def _follow(self) -> None:
        """Count new events now and then, for as long as the replica lives."""
        while True:
            if self._reconfigured.wait(self._observe_every_s or None):
                self._reconfigured.clear()
            models = self._models
            if models is not None and self._observe_every_s:
                try:
                    while self._live.observe(models.engines.values()):
                        pass
                except Exception:  # whatever it is, the next events deserve another try
                    log.exception("new events were not counted")

    def _ready_models(self) -> Models:
        if self._models is None:
            raise SpringtideError("Scorer has no user_config, so no model; name a bundle in the Serve configuration")
        return self._models


@serve.deployment(max_ongoing_requests=128)
@serve.ingress()
class Ingress:
    """HTTP and the event log. Imports the prepared log in the background; /readyz waits for the first one.

    While a newer log is imported the histories of the one before are in place.
    """

    def __init__(self, encoder: DeploymentHandle, scorer: DeploymentHandle, options: AppOptions) -> None:
        self._edge = Edge(
            tokens=open_tokens(options.auth.tokens_file, options.auth.tokens_env) if options.auth else None,
            hosts=tuple(options.allowed_hosts),
            also=RayMetrics() if options.ray_metrics else None,
            access_log=options.access_log,
            numbered=True,  # by Serve
            max_concurrent=options.max_concurrent,
        )
        limits = options.limits()
        encoding_s = max(limits.encoder_timeout_s, limits.other_timeout_s)
        encoders = Encoders(encoder, encoding_s, limits.other_timeout_s, self._edge.counted)
        scorers = Scorers(scorer, limits.scorer_timeout_s, limits.other_timeout_s, self._edge.counted)
        self._service = Service(
            _open_store(options),
            encoders.encode,
            scorers.call,
            limits,
            metrics=self._edge.counted,
            scorers=scorers.everywhere,
            encoders=encoders.everywhere,
        )
        self._workspace = options.workspace
        self._log: str | None = None
        self._exposures: ExposureOptions | None = None
        self._seeding, self._superseded = threading.Lock(), threading.Event()  # the event: a newer import is wanted
        if options.workspace is not None:
            self._service.seeding = "the prepared log is not imported yet"

    async def reconfigure(self, config: Json) -> None:
        """Read the popular items; import the prepared log in the background if it is new.

        On the event loop, where requests use what is changed here; files are read and opened in threads.
        """
        options = IngressOptions.model_validate(config)
        self._service.queries.clear()  # a new bundle may have come with another encoder
        if options.bundle is not None:
            read = partial(load_popular, options.bundle, options.name, options.policies)
            try:
                self._service.popular = await asyncio.to_thread(read)
            except SpringtideError as error:  # those read before go on being the fallback
                log.error("popular items not read: %s", error)
        self._service.direct(options.traffic)
        await self._log_exposures(options.exposures)
        wanted = options.log
        if self._workspace is None or (wanted == self._log and self._service.seeding == "ok"):
            return
        self._log = wanted
        self._superseded.set()
        self._superseded = threading.Event()
        threading.Thread(target=self._seed, args=(Path(self._workspace), self._superseded), daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._edge)

    async def _log_exposures(self, options: ExposureOptions | None) -> None:
        """Open, change or close the exposure log; one that cannot be opened costs the exposures, not the answers."""
        if options == self._exposures:
            return
        old, self._service.exposures, self._exposures = self._service.exposures, None, options
        if old is not None:
            threading.Thread(target=old.close, daemon=True).start()
        if options is None or self._workspace is None:
            return
        try:
            folder = Path(self._workspace) / FOLDER
            self._service.exposures = await asyncio.to_thread(ExposureLog, folder, options)
        except SpringtideError as error:
            self._exposures = None
            log.error("exposures are not logged: %s", error)

    def _seed(self, workspace: Path, superseded: threading.Event) -> None:
        store, tell = self._service.store, self._service.note_import
        with self._seeding:
            seed_until_done(store, workspace, tell, lambda: not superseded.is_set(), superseded.wait)


def build(args: dict[str, Any]) -> Application:
    """The application builder that Serve configurations name in `import_path`; `args` are AppOptions."""
    options = AppOptions.model_validate(args)
    return Ingress.bind(TextEncoder.bind(), Scorer.bind(options), options)  # type: ignore[attr-defined]


def _open_store(options: AppOptions) -> HistoryStore:
    """Whether it answers or not: without it answers are degraded, and without an Ingress there are none."""
    retention, aof = Retention(options.retention_events, options.retention_days), options.require_aof
    # Patience of a write: an import of a log may hold the lock meanwhile. A read is given up before, by the service.
    return open_store(options.store, retention, timeout_s=options.other_timeout_s, require_aof=aof, may_be_absent=True)


def _store_to_follow(url: str) -> HistoryStore:
    """The event log as a Scorer reads it. Never makes one: an empty file of its own would tell it nothing."""
    path = file_of(url)
    if path is not None and not path.exists():
        raise NoLogHere(
            f"the event log {path} is not on this node, so added items and new events stay unknown here; use Redis "
            "where Ingress and Scorer run on several nodes"
        )
    return open_store(url, timeout_s=STORE_PATIENCE_S, require_aof=False)


# ---------------------------------------------------------------- loading, in a thread
def _load_engine(options: ScorerOptions) -> Engine:
    import torch

    from springtide.bundle import check_parity, load_bundle

    torch.set_num_threads(options.threads)
    bundle = load_bundle(options.bundle)
    if options.version is not None and options.version != bundle.version:
        raise SpringtideError(
            f"bundle {bundle.path} has version {bundle.version} and the configuration says {options.version}; deploy "
            "again"
        )
    if options.device != "cpu":
        bundle.recommender.to(options.device)
    check_parity(bundle)
    engine = Engine(bundle, options.name, options.policies)
    engine.warm_up()
    return engine


def _load_encoder(options: EncoderOptions) -> Any:
    import torch

    from springtide.text.encoder import load_encoder

    torch.set_num_threads(options.threads)
    encoder = load_encoder(options.encoder, options.max_tokens, options.device, options.runtime, options.threads)
    encoder.encode(["warm up", "up " * options.max_tokens])
    return encoder


def _startup_error(name: str, error: Exception) -> RuntimeError:
    """Serve shows only the text of this, so it must carry the sentence."""
    return RuntimeError(f"{name} cannot start: {_sentence(error)}")


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"user_config {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error) if isinstance(error, SpringtideError) else f"{type(error).__name__}: {error}"
