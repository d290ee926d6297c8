"""Responses of HTTP version 1."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Response(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Response):
    code: str
    message: str


class ErrorBody(Response):
    error: ErrorDetail


class Gate(Response):
    """Weights of the two branches, 1 together; null without a known history."""

    long: float | None
    short: float | None


class HistoryItem(Response):
    """An event of a history as it is told: with the item's title, and what was given of the rest."""

    item_id: str
    title: str
    timestamp: int | None = None
    action: str | None = None
    rating: float | None = None


class PastEvent(HistoryItem):
    weight: float


class ItemExplanation(Response):
    shares: dict[str, float] = Field(
        description="what long and short branch, memory, text, popularity, query and policy put into the score; "
        "`joint` is what a fusion adds of neither branch. They sum to it."
    )
    because: list[PastEvent] = Field(description="the past events that most of memory and text came through")
    sentence: str


class NamedItem(Response):
    item_id: str
    score: float
    title: str


class ScoredItem(NamedItem):
    propensity: float | None = Field(
        None, description="with exploration: the probability of this item at its rank, given those above it"
    )
    explanation: ItemExplanation | None = Field(None, description="with `explain`")


class Explanation(Response):
    gate: Gate
    recent: list[PastEvent] = Field(description="the past events that weighed most")


class RecommendResponse(Response):
    items: list[ScoredItem]
    model: str = Field(description="name@version")
    source: str = Field(description="history, query, history+query or popular")
    gate: Gate
    explanation: Explanation | None = None
    unknown_items: list[str] | None = Field(None, description="item ids of the history that the model does not know")
    unknown_categories: list[str] | None = Field(None, description="of the filters, which no item has as it is spelt")
    degraded: bool | None = Field(None, description="true when a part was down and the answer was made without it")


class EventsResponse(Response):
    accepted: int
    duplicates: int


class ItemResponse(Response):
    item_id: str
    revision: int = Field(description="grows with every item put")


class WeighedEvent(HistoryItem):
    attention_long: float
    attention_short: float


class CategoryShare(Response):
    category: str
    share: float


class Branch(Response):
    categories: list[CategoryShare] = Field(description="shares of the branch's attention, greatest first")
    items: list[NamedItem] = Field(description="the items nearest to the branch's vector, best first")


class InterestsResponse(Response):
    user_id: str
    model: str
    gate: Gate
    events: list[WeighedEvent]
    long: Branch
    short: Branch
    channels: dict[str, float] = Field(description="weights of the counting channels beside the network, by name")
    unknown_items: list[str] | None = None


class SimilarResponse(Response):
    item_id: str
    title: str
    model: str
    items: list[NamedItem]


class EncodeResponse(Response):
    dim: int
    vectors: list[list[float]] | None = None
    vector: list[float] | None = None
    encoder: str | None = Field(None, description="name@weights of the text encoder")


class LiveInfo(Response):
    """What a model knows of what was stored since it was trained, as the Scorer replica that answers has it."""

    observed_events: int = Field(description="counted in popularity and transitions")
    items_revision: int = Field(description="of the last item added that it knows")
    cursor: int | None = Field(None, description="its place in the event log")
    seconds_behind: float | None = Field(None, description="since it had counted all events that were stored")


class ModelInfo(Response):
    model: str
    name: str
    primary: bool = Field(description="answers where a request names no model and no split draws one")
    version: str | None = Field(None, description="absent with all that follows for a model that could not be loaded")
    items: int | None = None
    text: bool | None = Field(None, description="whether its items have texts, so that it answers a query")
    loaded_at: str | None = None
    metrics: dict[str, Any] | None = None
    live: LiveInfo | None = None
    error: str | None = Field(None, description="why the last change of model was refused, if it was")
    versions: list[str | None] | None = Field(
        None, description="those of the Scorer's replicas while they differ; null: a replica without this model"
    )


class Spread(Response):
    mean: float
    deviation: float


class ShadowInfo(Response):
    """How a shadow's answers compare with those shown, as this Ingress replica saw them since traffic changed."""

    model: str
    shadow: str
    requests: int
    failed: int
    skipped: int = Field(description="copies left out because too many were under way")
    overlap: Spread | None = Field(description="share of the items in both answers")
    rank_correlation: Spread | None = Field(description="Spearman's, over the items of either answer")
    score_drift: Spread | None = Field(description="the shadow's score less the model's, over the items in both")


class ExposureInfo(Response):
    """The exposure log of this Ingress replica."""

    written: int
    dropped: int
    waiting: int


class Replicas(Response):
    replicas: int | None = Field(None, description="how many told, where several did")
    replicas_asked: int | None = Field(None, description="where not all of them told; null: one too slow to count them")


class EncoderInfo(Replicas):
    encoders: list[str] = Field(description="name@weights in the TextEncoder's replicas; none while it has none")
    error: str | None = Field(None, description="why the encoder that is configured was refused, if it was")


class ModelsResponse(Replicas):
    models: list[ModelInfo]
    encoder: EncoderInfo
    split: dict[str, float] | None = Field(None, description="share of the users that each model answers")
    shadows: list[ShadowInfo] | None = None
    exposures: ExposureInfo | None = None


class Readiness(Response):
    ready: bool
    checks: dict[str, str]
