"""What a Serve configuration may say of our application: its `args` and each deployment's `user_config`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from springtide.serving.store import file_of

IMPORT_PATH = "springtide.serving.deployments:build"


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AppOptions(Options):
    """`args` of the application. A change restarts every replica."""

    store: str = Field(min_length=1)  # the event log: a file, sqlite:///absolute/path or redis://host:port/number
    require_aof: bool = True  # refuse a Redis that could lose an event it has acknowledged
    retention_events: int | None = Field(None, ge=1)  # of each user, the most recent ones; None keeps all
    retention_days: float | None = Field(None, gt=0, le=100_000)  # by the events' own timestamps; None keeps all
    workspace: str | None = None  # its prepared log becomes the users' first histories
    encoder_timeout_s: float = Field(1.0, gt=0, le=600)
    scorer_timeout_s: float = Field(2.0, gt=0, le=600)
    store_timeout_s: float = Field(1.0, gt=0, le=600)
    other_timeout_s: float = Field(5.0, gt=0, le=600)  # of calls that have no degraded answer, such as events
    breaker_failures: int = Field(5, ge=1, le=1000)  # calls of a part that fail in a row before it is left alone
    breaker_pause_s: float = Field(2.0, gt=0, le=600)  # for so long; then one call tries it again

    @field_validator("store")
    @classmethod
    def _known_kind(cls, url: str) -> str:
        file_of(url)
        return url


class IngressOptions(Options):
    """`user_config` of Ingress. A new log is imported in the background, a new bundle's popular items are read."""

    log: str | None = None  # content hash of the prepared log, which `deploy` fills in
    bundle: str | None = None  # its popular items are the answer while no Scorer gives one
    version: str | None = None  # of the bundle; a new version at the same path is then noticed
    name: str = Field("default", min_length=1, max_length=64, pattern=r"^[\w.-]+$")


class ScorerOptions(Options):
    """`user_config` of Scorer. A change swaps the model in place."""

    bundle: str = Field(min_length=1)
    name: str = Field("default", min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    version: str | None = None  # of the bundle; a new version at the same path is then noticed
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    threads: int = Field(1, ge=1)
    max_batch: int = Field(32, ge=1, le=1024)  # requests scored at once
    batch_wait_ms: float = Field(2.0, ge=0, le=1000)


class EncoderOptions(Options):
    """`user_config` of TextEncoder. A change swaps the encoder in place."""

    encoder: str = "default"  # as text.encoder in the settings
    max_tokens: int = Field(64, ge=4, le=512)
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    threads: int = Field(1, ge=1)
    max_batch_tokens: int = Field(2048, ge=4)  # padded tokens encoded at once
    batch_wait_ms: float = Field(2.0, ge=0, le=1000)

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
