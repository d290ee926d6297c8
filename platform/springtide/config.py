"""One typed settings tree for every stage. A YAML file is one experiment; `--set section.key=value` overrides it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from springtide.config_data import DataConfig, Section, one_line
from springtide.errors import SpringtideError
from springtide.presets import PRESETS, check_preset


# ---------------------------------------------------------------- text
class TextConfig(Section):
    encoder: str = "default"  # "default" = the packaged all-MiniLM-L6-v2; else a Hugging Face name or a folder
    max_tokens: int = Field(64, ge=4, le=512)
    batch_size: int = Field(64, ge=1)
    actors: int = Field(1, ge=1)
    cpus_per_actor: float = Field(0.5, gt=0)  # a service on the same two cores leaves one
    gpus_per_actor: float = Field(0.0, ge=0)


# ---------------------------------------------------------------- model
# Events of a log below which a model is so wide and its long branch so deep.
SIZES = ((20_000, 32, 1), (5_000_000, 64, 1), (float("inf"), 128, 2))


class ModelConfig(Section):
    # A named system: other defaults for this section. What is given beside it wins. See presets.py.
    preset: str = "gated_fusion"
    dim: int = Field(0, ge=0)  # width of item vectors, branches and gate; 0 = by the size of the log
    text_dim: int = Field(128, ge=0)  # kept principal components of the text vectors; 0 = ID only
    id_embeddings: bool = True  # off: items are their text alone
    # Where ID rows begin: as a factorisation of the transition counts (where there is a memory), or drawn at random.
    id_start: Literal["transitions", "random"] = "transitions"
    id_dropout: float = Field(0.1, ge=0, lt=1)  # share of items whose ID row is hidden in a training step
    dropout: float = Field(0.3, ge=0, lt=1)
    # sum: item vector + action + rating + gap; linear: W1 item vector + W2 [action; gap; rating] + b
    event_input: Literal["sum", "linear"] = "sum"
    long_branch: Literal["gru", "lstm", "cnn_lstm", "cnn", "mlp", "transformer", "none"] = "lstm"
    long_hidden: int = Field(0, ge=0)  # width inside the long branch; 0 = dim
    long_layers: int = Field(0, ge=0, le=4)  # 0 = by the size of the log
    long_pool: Literal["attention", "last"] = "attention"  # over its states; mlp has running means instead
    long_window: int = Field(200, ge=2)  # most recent events that the long branch reads
    short_branch: Literal["attention", "none"] = "attention"
    short_window: int = Field(16, ge=1)  # events that the short branch attends to
    short_heads: int = Field(2, ge=1)  # also of a transformer as the long branch
    fusion: Literal["gate", "attention", "time_decay", "concat", "sum", "model"] = "gate"  # of the two branches
    gate: Literal["channel", "scalar", "mean"] = "channel"  # one weight a channel, one in all, or a plain average
    gate_hidden: int = Field(0, ge=0)  # width of the gate's hidden layer; 0 = linear
    use_rating: bool = True
    use_time: bool = True  # log-bucketed gap to the event before
    # Tell the gate the gap from the last event to the request. Absent: where the split is temporal, because there the
    # request is known to come at the cut or later; in leave-one-out nothing is known of when the last item was wanted.
    request_time: bool | None = None
    # The counting channels, each with a weight per user and moment.
    memory: bool = True  # transition memory
    memory_distances: int = Field(10, ge=1)  # an item counts as a successor up to this many events later
    memory_decay: float = Field(0.8, gt=0, le=1)  # weight of distance d is decay^(d-1)
    memory_recent: int = Field(10, ge=1)  # history events that the memory is asked about
    memory_neighbours: int = Field(256, ge=1)  # successors kept for each item
    neighbours: bool = True  # long-term neighbours: a linear item-item model (EASE), cosines of pairs not in it
    neighbour_items: int = Field(5000, ge=1)  # most items in it, the most popular ones: its size is their square
    neighbour_l2: float = Field(500.0, gt=0)  # its regularisation
    neighbour_shrinkage: float = Field(5.0, gt=0)  # of the cosines that tell neighbours of all other items
    borrowing: bool = True  # items counted seldom or never take over counted scores of items with a like text
    # What is known of an item's text: what the encoder makes of it (meaning), its spelling, which needs no encoder that
    # knows the language, or both. auto: whichever ranks what users took next best on its own, on validation users.
    text_features: Literal["auto", "meaning", "spelling", "both"] = "auto"
    text_neighbours: bool = True  # how near an item's text is to those of the history
    popularity: bool = True  # a learned multiple of log popularity
    recent_popularity: bool = True  # the same of the popularity at the time of the request
    # Of recent popularity, as a share of the log's span. Absent: 0.1, unless another is clearly better on its own at
    # telling what validation users take.
    recent_half_life: float | None = Field(None, gt=0)

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, given: Any, validate: ModelWrapValidatorHandler[ModelConfig]) -> ModelConfig:
        if not isinstance(given, dict):
            return validate(given)
        name = given.get("preset")
        model = validate({**(PRESETS.get(name, {}) if isinstance(name, str) else {}), **given})
        model.model_fields_set.intersection_update(given)  # what the preset says is nobody's choice; see as_given
        return model

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        return check_preset(name)

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.long_branch == self.short_branch == "none":
            raise ValueError("long_branch and short_branch are both none; give at least one")
        if 0 < self.dim < 4:
            raise ValueError(f"dim ({self.dim}) must be 4 or more, or 0 to let the size of the log decide")
        if not self.id_embeddings and not self.text_dim:
            raise ValueError("id_embeddings: false needs text_dim above 0, or items have no vector at all")
        self._check_heads()
        return self

    def _check_heads(self) -> None:
        """Where there is attention, every width that it can get must be shared out evenly among its heads."""
        widths = {"dim": self.dim} if self.short_branch == "attention" else {}
        if self.long_branch == "transformer":
            widths["a transformer's long_hidden"] = self.long_hidden or self.dim
        by_size = [dim for _, dim, _ in SIZES]
        for name, width in widths.items():
            if any(each % self.short_heads for each in ([width] if width else by_size)):
                told = width or f"0, so {' or '.join(map(str, by_size))} by the size of the log"
                raise ValueError(f"{name} ({told}) must be a multiple of short_heads ({self.short_heads})")


# ---------------------------------------------------------------- train
class TrainConfig(Section):
    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(0.5, gt=0)  # below a whole CPU, or Ray Data finds none left on a small machine
    use_gpu: bool = False
    threads_per_worker: int = Field(1, ge=1)
    epochs: int = Field(30, ge=1)
    patience: int = Field(5, ge=1)  # epochs without a validation NDCG (over all ranks) 0.5 % higher before stopping
    batch_positions: int = Field(750, ge=1)  # events in a step, over all workers together
    batch_size: int = Field(512, ge=1)  # most sequences in a step, over all workers together
    learning_rate: float = Field(5e-3, gt=0)
    memory_learning_rate: float = Field(2e-2, gt=0)  # for the few scalars that weigh memory and popularity
    weight_decay: float = Field(1e-4, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    average: float = Field(0.99, ge=0, lt=1)  # decay per step of the weights' moving average, which is kept; 0 = off
    full_softmax_items: int = Field(10_000, ge=1)  # up to this catalogue the softmax is over all items,
    negatives: int = Field(2048, ge=1)  # above it over this many draws, corrected for how they were drawn
    # Share of the moments within a session that are learned from (its start always is). Absent: 1, or 0.1 where the
    # split is temporal, because a cut in time falls between sessions.
    within_session: float | None = Field(None, ge=0, le=1)
    crop: float = Field(0.0, ge=0, le=1)  # share of the sequences cut to a random stretch,
    mask: float = Field(0.0, ge=0, lt=1)  # of the events hidden from the network,
    reorder: float = Field(0.0, ge=0, le=1)  # of the sequences in which it sees a short stretch turned round
    # Train once more on training and validation events together, for as many epochs as were best.
    refit: bool = True
    update_epochs: int = Field(2, ge=0)  # of `update` over the windows with new events; 0 = they are only counted
    # What a wider reach of what is recommended may cost, as a share of validation NDCG. A quarter of it is spent on
    # damping popularity (as strongly as it pays for; of NDCG@10, two standard errors more), and the rest, as far as it
    # takes, on lifting items that are in nobody's list, until lists hold a quarter more than the neighbours' own do (a
    # model without neighbours lifts none).
    coverage_cost: float = Field(0.04, ge=0, le=1)
    # From this many items on the bundle holds an index (FAISS), so that an answer scores some thousand candidates in
    # place of all. It reads as little as still finds `ann_recall` of the ten best items that scoring all would find.
    ann_items: int = Field(1_000_000, ge=40)
    ann_recall: float = Field(0.98, gt=0, le=1)
    # Beside the next item, learn what it will be rated (squared error of standardised ratings, where there is one) and
    # whether it will be taken (against random others), with these weights. 0 = no such head.
    rating_weight: float = Field(0.0, ge=0)
    click_weight: float = Field(0.0, ge=0)
    clip_norm: float = Field(5.0, gt=0)
    # Where no validation part asks a user with a history (split: none), the last event of this share of users is held
    # out.
    validation_share: float = Field(0.1, gt=0, le=0.5)
    validation_users: int = Field(5000, ge=1)  # at most this many users are ranked after each epoch
    # A worker keeps its shard in memory after the first epoch if it fits; else every epoch streams it again.
    cache_mb: int = Field(1024, ge=0)
    max_failures: int = Field(3, ge=0)  # worker deaths survived, each from the last checkpoint
    keep_checkpoints: int = Field(2, ge=1)
    collective_timeout_s: int = Field(120, ge=1)
    seed: int = Field(0, ge=0)

    @property
    def heads(self) -> tuple[float, float]:
        """The weights of the rating and the click loss."""
        return self.rating_weight, self.click_weight


# ---------------------------------------------------------------- tune
class TuneConfig(Section):
    # Setting -> list of choices, or {min, max, log?, integer?}; for example model.dim: [32, 64, 128].
    space: dict[str, Any] = {
        "model.gate": ["channel", "scalar", "mean"],
        "model.gate_hidden": [0, 32, 64],
        "model.dim": [32, 64, 96],
        "train.learning_rate": {"min": 5e-4, "max": 5e-3, "log": True},
    }
    trials: int = Field(8, ge=1)
    epochs: int = Field(12, ge=1)
    grace_epochs: int = Field(3, ge=1)  # no trial is stopped earlier
    reduction: int = Field(2, ge=2)  # ASHA keeps one of this many at each rung
    workers_per_trial: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)


# ---------------------------------------------------------------- evaluate, recommend, serve
class EvaluateConfig(Section):
    ks: list[Annotated[int, Field(ge=1)]] = [5, 10, 20]
    batch_size: int = Field(256, ge=1)  # users ranked at once
    bootstrap: int = Field(2000, ge=100)  # resamples for the intervals
    part: Literal["test", "valid"] = "test"
    # Under split: temporal, replay the events after the cut in time order, each one revealed once it is predicted.
    prequential: bool = True
    prequential_events: int = Field(20_000, ge=1)  # at most this many are predicted: those of users drawn at random
    tie_orders: int = Field(5, ge=0)  # random orders of events with equal times to judge again; 0 = none


class CompareConfig(Section):
    presets: list[Annotated[str, AfterValidator(check_preset)]] = Field(list(PRESETS), min_length=1)
    epochs: int = Field(10, ge=1)  # of each preset, unless its validation stops it earlier


class RecommendConfig(Section):
    k: int = Field(20, ge=1)
    batch_size: int = Field(256, ge=1)
    actors: int = Field(1, ge=1)
    cpus_per_actor: float = Field(0.5, gt=0)  # a service on the same two cores leaves one


class ServeConfig(Section):
    config: str = "serve_configs/local.yaml"  # the Serve file that `deploy` lints, fills in and applies
    store: str | None = None  # replaces the file's event log; a relative path is below the workspace
    port: int | None = Field(None, ge=1, le=65535)  # replaces the file's http_options.port
    allow_public: bool = False  # let the linter accept an address that other machines can reach
    # Longest wait for the applications to be ready; where they are not, as long again for those before to be back.
    timeout_s: float = Field(180.0, gt=0)
    plan_only: bool = False  # print what would restart and what would be reconfigured, and apply nothing


class Settings(Section):
    """Everything one experiment needs. `workspace` is the root under which its files live."""

    name: str = "experiment"
    workspace: str = "workspace"
    data: DataConfig
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    recommend: RecommendConfig = RecommendConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _follow_the_split(self) -> Settings:
        """Fill in what is absent and depends on the split."""
        temporal = self.data.split == "temporal"
        if self.model.request_time is None:
            self._fill_in("model", "request_time", temporal)
        if self.train.within_session is None:
            self._fill_in("train", "within_session", 0.1 if temporal else 1.0)
        return self

    def _fill_in(self, section: str, name: str, value: Any) -> None:
        """Set what was not given, and do not count it as given. Sections are frozen, and default ones are shared."""
        own = getattr(self, section).model_copy()
        object.__setattr__(own, name, value)
        object.__setattr__(self, section, own)


# ---------------------------------------------------------------- loading
def load_settings(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Read a YAML experiment and apply `section.key=value` overrides (the value is read as YAML).

    Raises SpringtideError for a missing file, broken YAML, an unknown key (with the nearest valid name) or a bad value.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpringtideError(
            f"cannot read the settings file {path}: {error.strerror}; check the path after --config"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpringtideError(f"{path} is not valid YAML: {one_line(error)}") from None
    if raw is not None and not isinstance(raw, dict):
        raise SpringtideError(f"{path} must hold sections such as data: and train:, not a {type(raw).__name__}")
    tree: dict[str, Any] = raw or {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise SpringtideError(f"--set {override}: write it as section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpringtideError(f"--set {override}: the value is not valid YAML: {one_line(error)}") from None
        set_by_path(tree, key.strip(), value)
    return parse_settings(tree, str(path))


def parse_settings(tree: dict[str, Any], where: str = "settings") -> Settings:
    """Validate a tree of plain values. `where` names its origin in the error. Raises SpringtideError."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SpringtideError(f"{where}: {_explain(error)}") from None


def as_given(settings: Settings) -> dict[str, Any]:
    """What was given, as plain values of which parse_settings makes the same settings again.

    What follows from a default, the preset or the split is left out, so that another preset or split takes effect.
    """
    return settings.model_dump(mode="json", exclude_unset=True)


def with_values(settings: Settings, values: dict[str, Any], where: str = "overridden settings") -> Settings:
    """A copy of `settings` with some dotted settings replaced, validated again. `where` as for parse_settings."""
    tree = as_given(settings)
    for key, value in values.items():
        set_by_path(tree, key, value)
    return parse_settings(tree, where)


def set_by_path(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.0.c` in nested dicts and lists, in place, making missing dicts. Raises SpringtideError."""
    node: Any = tree
    of_space = key.startswith("tune.space.")  # whose keys are dotted settings themselves
    *parents, last = key.split(".", 2 if of_space else -1)
    for position, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if isinstance(node, list) and len(node) == 1 and not (parents[position + 1 :] + [last])[0].isdigit():
            node = node[0]  # a list of one source reads like the source itself
        if not isinstance(node, (dict, list)):
            raise SpringtideError(f"{key}: {part} is a value, not a section; drop what follows it")
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _list_index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        end = f"from 0 to {len(node) - 1}" if node else "in it, but it is empty; give the whole list"
        raise SpringtideError(f"{key}: a list stands before {part}, which must then be a position {end}")
    return int(part)


def _explain(error: ValidationError) -> str:
    """The first problem as one sentence; an unknown key comes with the nearest valid name."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        valid = _fields_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), valid, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*map(str, first['loc'][:-1]), near[0]])}?" if near else ""
        return f"unknown setting {where}{hint}{more}"
    if first["type"] == "missing":
        return f"the setting {where} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    whole_section = isinstance(first["input"], dict) and len(repr(first["input"])) > 80
    got = "" if whole_section else f" (got {first['input']!r:.80})"
    return f"{where or 'settings'}: {message[0].lower()}{message[1:]}{got}{more}"


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section found at `loc`, following lists and optional types."""
    section: type[BaseModel] = Settings
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return []
        found = _section_in(field.annotation)
        if found is None:
            return []
        section = found
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        for argument in get_args(annotation):
            found = _section_in(argument)
            if found is not None:
                return found
    return None
