"""What a Serve configuration may say of our application: its `args` and each deployment's `user_config`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from springtide.serving.haproxy_config import MAX_CONCURRENT
from springtide.serving.policies import Policies
from springtide.serving.store import file_of
from springtide.text.encoder import Runtime

IMPORT_PATH = "springtide.serving.deployments:build"

# A call to another process costs about as much as scoring a request in a batch. So an Ingress has so many calls of a
# replica under way, and what comes meanwhile shares the next one.
CALLS_PER_REPLICA = 4


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AuthOptions(Options):
    """Where the bearer tokens are; see serving.tokens for their form."""

    tokens_file: str | None = Field(None, min_length=1)  # read by each Ingress replica, and again when it changes
    tokens_env: str | None = Field(None, min_length=1)  # an environment variable that holds the text of such a file

    @model_validator(mode="after")
    def _one_place(self) -> AuthOptions:
        if (self.tokens_file is None) == (self.tokens_env is None):
            raise ValueError("give either tokens_file or tokens_env")
        return self


@dataclass(frozen=True)
class Limits:
    """How long an Ingress waits for each part, when it leaves one alone, and how much it holds; see AppOptions."""

    encoder_timeout_s: float
    scorer_timeout_s: float
    store_timeout_s: float
    other_timeout_s: float
    breaker_failures: int
    breaker_pause_s: float
    query_cache: int
    query_cache_s: float
    history_cache_events: int
    max_added_items: int


class AppOptions(Options):
    """`args` of the application. A change restarts every replica."""

    store: str = Field(min_length=1)  # the event log: a file, sqlite:///absolute/path or redis://host:port/number
    require_aof: bool = True  # refuse a Redis that could lose an event it has acknowledged
    retention_events: int | None = Field(None, ge=1)  # of each user, the most recent ones; None keeps all
    retention_days: float | None = Field(None, gt=0, le=100_000)  # by the events' own timestamps; None keeps all
    workspace: str | None = None  # its prepared log becomes the users' first histories
    history_cache_events: int = Field(100_000, ge=0)  # held by each Ingress, about 0.4 KB each; 0 holds none
    encoder_timeout_s: float = Field(1.0, gt=0, le=600)
    scorer_timeout_s: float = Field(2.0, gt=0, le=600)
    store_timeout_s: float = Field(1.0, gt=0, le=600)
    other_timeout_s: float = Field(5.0, gt=0, le=600)  # of calls that have no degraded answer, such as events
    breaker_failures: int = Field(5, ge=1, le=1000)  # calls of a part that fail in a row before it is left alone
    breaker_pause_s: float = Field(2.0, gt=0, le=600)  # for so long; then one call tries it again
    max_concurrent: int = Field(MAX_CONCURRENT, ge=1, le=100_000)  # requests under way in one Ingress; more get 503
    auth: AuthOptions | None = None  # None: no tokens, which the linter accepts on loopback alone
    # Names by which a gateway asks, beside addresses and localhost; looked at without auth alone.
    allowed_hosts: list[Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9.-]+$")]] = []
    max_added_items: int = Field(100_000, ge=0, le=10_000_000)  # by PUT /v1/items; a further one is refused
    access_log: bool = False  # a line of JSON for each request, without ids and texts
    ray_metrics: bool = True  # count through Ray's metrics agent too, beside GET /metrics
    query_cache: int = Field(10_000, ge=0, le=1_000_000)  # queries whose vectors each Ingress keeps; 0 = none
    query_cache_s: float = Field(600.0, gt=0)  # then a query is encoded again

    def limits(self) -> Limits:
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})

    @field_validator("store")
    @classmethod
    def _known_kind(cls, url: str) -> str:
        file_of(url)
        return url


class TrafficOptions(Options):
    """Which model answers whom. Without it, the primary answers everyone."""

    split: dict[str, float] = Field({}, max_length=100)  # model -> weight; a user stays with a model
    shadow: dict[str, float] = Field({}, max_length=10)  # model -> share of requests (0..1) that it scores unseen
    salt: str = Field("", max_length=64)  # another one draws every user anew
    shadow_concurrency: int = Field(4, ge=1, le=256)  # copies under way at once; further ones are left out

    @model_validator(mode="after")
    def _in_bounds(self) -> TrafficOptions:
        if any(not 0 <= weight < math.inf for weight in self.split.values()):
            raise ValueError("split: a weight must be 0 or more")
        if self.split and not sum(self.split.values()) > 0:
            raise ValueError("split: at least one weight must be above 0")
        if any(not 0 <= share <= 1 for share in self.shadow.values()):
            raise ValueError("shadow: a share must lie between 0 and 1")
        return self


class ExposureOptions(Options):
    """The log of what was shown to whom, below `exposures/` of the workspace."""

    pseudonymise: bool = True  # users as salted hashes; the salt lies beside the log
    max_mb: float = Field(64, gt=0, le=4096)  # size of a part
    max_age_s: float = Field(3600, gt=0)  # age of a part
    keep_days: float | None = Field(90, gt=0)  # older parts are removed; null: none
    queue: int = Field(10_000, ge=1, le=1_000_000)  # exposures that wait for the disk; further ones are dropped


class IngressOptions(Options):
    """`user_config` of Ingress. A new log is imported in the background, a new bundle's popular items are read."""

    traffic: TrafficOptions = TrafficOptions()
    exposures: ExposureOptions | None = None  # absent: nothing is logged
    log: str | None = None  # content hash of the prepared log, which `deploy` fills in
    bundle: str | None = None  # its popular items are the answer while no Scorer gives one
    policies: Policies | None = None  # filters of these items: the Scorer's, which `deploy` fills in
    version: str | None = None  # of the bundle; a new version at the same path is then noticed
    name: str = Field("default", min_length=1, max_length=64, pattern=r"^[\w.-]+$")


class ModelOptions(Options):
    """A further model of the Scorer, beside the primary."""

    bundle: str = Field(min_length=1)
    version: str | None = None  # as the primary's


class ScorerOptions(Options):
    """`user_config` of Scorer. A change swaps the models in place that it concerns."""

    bundle: str = Field(min_length=1)
    name: str = Field("default", min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    version: str | None = None  # of the bundle; a new version at the same path is then noticed
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    threads: int = Field(1, ge=1)
    policies: Policies = Policies()  # of every model
    max_batch: int = Field(32, ge=1, le=1024)  # requests scored at once: those that came while others were scored
    batch_wait_ms: float = Field(0.0, ge=0, le=1000)  # for more to come, before that
    observe_every_s: float = Field(5.0, ge=0, le=86_400)  # then popularity and transitions know new events; 0 = never
    observe_at_most: int = Field(200_000, ge=0, le=100_000_000)  # of the latest events, by a model that was just loaded
    models: dict[Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")], ModelOptions] = Field({}, max_length=16)  # by name

    @model_validator(mode="after")
    def _names_differ(self) -> ScorerOptions:
        if self.name in self.models:
            raise ValueError(f"models: {self.name} is the name of the primary; give the further model another one")
        return self


class EncoderOptions(Options):
    """`user_config` of TextEncoder. A change swaps the encoder in place, or its batching alone."""

    encoder: str = "default"  # as text.encoder in the settings
    max_tokens: int = Field(64, ge=4, le=512)
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    threads: int = Field(1, ge=1)
    max_batch_tokens: int = Field(2048, ge=4)  # padded tokens encoded at once, as above
    batch_wait_ms: float = Field(0.0, ge=0, le=1000)
    # onnx-int8 keeps a cosine of 0.99 to torch, or stays in float; auto: onnx-int8 on a CPU, torch on a GPU
    runtime: Runtime = "auto"

    def same_encoder(self, other: EncoderOptions) -> bool:
        """Whether the two differ in how texts are batched alone, for which nothing has to be loaded."""
        batching = {"max_batch_tokens": 0, "batch_wait_ms": 0}
        return self.model_copy(update=batching) == other.model_copy(update=batching)

    @model_validator(mode="after")
    def _onnx_on_a_cpu(self) -> EncoderOptions:
        if self.device != "cpu" and self.runtime.startswith("onnx"):
            raise ValueError("runtime onnx needs device: cpu; use torch or auto on a GPU")
        return self

    @model_validator(mode="after")
    def _one_text_fits(self) -> EncoderOptions:
        if self.max_batch_tokens < self.max_tokens:
            raise ValueError("max_batch_tokens must be at least max_tokens, or a long text fits no batch")
        return self


USER_CONFIG: dict[str, type[Options]] = {
    "Ingress": IngressOptions,
    "TextEncoder": EncoderOptions,
    "Scorer": ScorerOptions,
}
