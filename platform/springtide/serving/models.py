"""Several models in one Scorer: which are loaded, which was refused and why, and which of them answers a request.

A Models never changes after it is built; a change of configuration builds the next one beside it, taking over every
engine whose configuration stayed the same.
"""

from __future__ import annotations

import hashlib
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from springtide.errors import without_data
from springtide.serving.engine import Engine, Json, Refusal, ScoreRequest
from springtide.serving.options import ScorerOptions

log = logging.getLogger("ray.serve")
AGAIN_S = 0.5  # after a model failed to load, before the one more try
_OF_THE_QUEUE = (
    "max_batch",
    "batch_wait_ms",
    "observe_every_s",
    "observe_at_most",
    "models",
)  # settings that no engine depends on


@dataclass(frozen=True)
class Failure:
    """Why one of the requests of a batch has no answer: a fault of a model, not of the Scorer that it is in."""

    message: str


def failure(what: str, error: BaseException) -> Failure:
    """An exception, which might not survive the way to who asked, told in the log with the way to it.

    Without its text, which may repeat what a caller sent.
    """
    told = without_data(error)
    log.error("%s: %s\n%s", what, told, "".join(traceback.format_tb(error.__traceback__)))
    return Failure(f"{what}: {told}")


@dataclass(frozen=True)
class Models:
    """The engines by name. Every answer of the old one is possible until the reference to it is swapped."""

    primary: str  # answers where nobody names a model
    engines: Mapping[str, Engine]
    sources: Mapping[str, ScorerOptions]  # what each engine was loaded from
    refused: Mapping[str, str]  # name of a configured model -> why it, or its new version, is not served

    @property
    def engine(self) -> Engine:
        return self.engines[self.primary]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Json | Refusal | Failure]:
        """One answer per request, in order; requests for the same model are scored together, and fail together."""
        answers: dict[int, Json | Refusal | Failure] = {}
        groups: dict[str, list[tuple[int, ScoreRequest]]] = {}
        for place, request in enumerate(requests):
            name = self._name_of(request.model)
            if request.assigned and not self._answers(name, request):  # not the caller's wish: whoever can may answer
                groups.setdefault(self.primary, []).append((place, replace(request, model=None)))
            elif name is None:
                labels = ", ".join(engine.label for engine in self.engines.values())
                answers[place] = Refusal(
                    404, "unknown_model", f"there is no model {request.model!r} here; served: {labels}"
                )
            else:
                groups.setdefault(name, []).append((place, request))
        for name, group in groups.items():
            found = self._score(name, [request for _, request in group])
            answers.update(zip((place for place, _ in group), found, strict=True))
        return [answers[place] for place in range(len(requests))]

    def _score(self, name: str, requests: list[ScoreRequest]) -> Sequence[Json | Refusal | Failure]:
        engine = self.engines[name]
        try:
            return engine.score(requests)
        except Exception as error:  # whatever it is: other models of the batch answer all the same
            return [failure(f"the model {engine.label} failed", error)] * len(requests)

    def interests(self, events: list[Json]) -> Json:
        return self.engine.interests(events)

    def similar(self, item_id: str, k: int) -> Json | Refusal:
        return self.engine.similar(item_id, k)

    def describe(self) -> Json:
        """The primary model; `error` says why its last change was refused."""
        return self._described(self.primary)

    def models(self) -> Json:
        """Every model, the primary first, then what was refused without an old version to keep."""
        names = sorted(self.engines, key=lambda name: name != self.primary)
        absent = [name for name in self.refused if name not in self.engines]
        missing = [{"model": name, "name": name, "primary": False, "error": self.refused[name]} for name in absent]
        return {"models": [*map(self._described, names), *missing]}

    def _described(self, name: str) -> Json:
        engine = self.engines[name]
        error = {"error": self.refused[name]} if name in self.refused else {}
        return {**engine.describe(), "primary": name == self.primary, **error}

    def _answers(self, name: str | None, request: ScoreRequest) -> bool:
        """Whether a drawn model is here and reads what it is asked."""
        return name is not None and (request.query is None or self.engines[name].takes_new_items)

    def _name_of(self, model: str | None) -> str | None:
        """The engine that a request means by nothing, a name, or name@version."""
        if model is None:
            return self.primary
        if model in self.engines:
            return model
        return next((name for name, engine in self.engines.items() if engine.label == model), None)


@dataclass(frozen=True)
class Told:
    """What the replicas of a deployment answered, and how many were asked; None: one spoke, or nobody, for all."""

    answers: list[Json]
    asked: int | None

    def replicas(self) -> Json:
        """`replicas` that answered, where several did, and `replicas_asked`, where some did not."""
        counted = {"replicas": len(self.answers)} if len(self.answers) > 1 else {}
        return counted if self.asked == len(self.answers) else {**counted, "replicas_asked": self.asked}


def merged_models(told: Told) -> Json:
    """What `models` says in each replica of a Scorer, as one answer.

    A model that is not the same in all of them has `versions` (null: a replica without it), and `error` if any refused
    it.
    """
    by_replica = [{model["name"]: model for model in answer["models"]} for answer in told.answers]
    names = list(dict.fromkeys(name for models in by_replica for name in models))
    merged = []
    for name in names:
        of_replicas = [models.get(name, {}) for models in by_replica]
        model = dict(next(one for one in of_replicas if one))
        versions = {one.get("version") for one in of_replicas}
        if len(versions) > 1:
            model["versions"] = sorted(versions, key=lambda version: version or "")
        if errors := [one["error"] for one in of_replicas if "error" in one]:
            model["error"] = errors[0]
        merged.append(model)
    return {**told.answers[0], "models": merged, **told.replicas()}


def merged_encoders(told: Told) -> Json:
    """What `describe` says in each replica of a TextEncoder, as one answer: `encoders`, and `error` if any refused the
    one that is configured."""
    errors = [answer["error"] for answer in told.answers if "error" in answer]
    encoders = sorted({answer["encoder"] for answer in told.answers})
    return {"encoders": encoders, **({"error": errors[0]} if errors else {}), **told.replicas()}


def load_models(
    options: ScorerOptions,
    old: Models | None,
    load: Callable[[ScorerOptions], Engine],
    sentence: Callable[[Exception], str] = str,
) -> Models:
    """The models that `options` ask for, each loaded and checked by `load` unless `old` has just that one.

    One that `load` refuses keeps its old version if `old` has one, and is left out if not; `refused` tells. A model
    that is configured no more is gone. Raises what `load` raises for a primary when there is no old model at all.
    """
    engines: dict[str, Engine] = {}
    sources: dict[str, ScorerOptions] = {}
    refused: dict[str, str] = {}
    primary = options.name
    for name, source in wanted(options).items():
        if old is not None and old.sources.get(name) == source:
            engines[name], sources[name] = old.engines[name], source
            continue
        try:
            engines[name], sources[name] = _loaded(load, source), source
        except Exception as error:
            if old is None and name == options.name:
                raise
            refused[name] = sentence(error)
            log.error("model %s was refused: %s", name, refused[name])
            if old is not None and name in old.engines:
                engines[name], sources[name] = old.engines[name], old.sources[name]
    if primary not in engines and old is not None:  # a new primary under a new name was refused
        primary = old.primary
        engines.setdefault(primary, old.engine)
        sources.setdefault(primary, old.sources[primary])
    return Models(primary, engines, sources, refused)


def _loaded(load: Callable[[ScorerOptions], Engine], source: ScorerOptions) -> Engine:
    """With one more try after a moment: storage that nodes share may show the files of a new folder late."""
    try:
        return load(source)
    except Exception as error:
        log.warning("model %s was not loaded, trying once more: %s", source.name, error)
        time.sleep(AGAIN_S)
        return load(source)


def wanted(options: ScorerOptions) -> dict[str, ScorerOptions]:
    """Each configured model by name, the primary first, as the configuration of a Scorer with that one alone."""
    plain = {name: ScorerOptions.model_fields[name].get_default(call_default_factory=True) for name in _OF_THE_QUEUE}
    alone = {options.name: options.model_copy(update=plain)}
    for name, further in options.models.items():
        alone[name] = options.model_copy(
            update={**plain, "name": name, "bundle": further.bundle, "version": further.version}
        )
    return {
        name: one if one.version else one.model_copy(update={"version": _version_at(one.bundle)})
        for name, one in alone.items()
    }


def _version_at(bundle: str) -> str | None:
    """The version of what lies there now, so that an unnamed version is loaded again once it has changed."""
    try:
        return hashlib.sha256((Path(bundle) / "manifest.json").read_bytes()).hexdigest()[:12]
    except OSError:
        return None  # loading it will say why
