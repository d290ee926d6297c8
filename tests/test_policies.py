"""Policies: what every combination of them guarantees, and that logged propensities are the frequencies."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from springtide.bundle import load_bundle
from springtide.model.recommender import NewItem
from springtide.ranks import top_k
from springtide.serving.choose import Chosen, Rules, choose
from springtide.serving.engine import Engine, ScoreRequest
from springtide.serving.lint import lint
from springtide.serving.policies import Caps, Exploration, Policies, counting_events
from toy import toy_bundle

NAMES = ("a", "b", "c", "d")
ACTIONS = ("view", "buy", "impression")


class Shelf:
    """A recommender of given scores, whatever the history."""

    text_vectors = retrieval = None

    def __init__(self, scores: Sequence[float], categories: list[list[str]], seed: int) -> None:
        self.scores, self.categories = np.asarray(scores, np.float32), categories
        self.item_ids = [f"i{n}" for n in range(len(scores))]
        self.titles, self.actions = self.item_ids, ["<unknown>", *ACTIONS]
        self.index = {item_id: row for row, item_id in enumerate(self.item_ids)}
        rng = np.random.default_rng(seed)
        self.item_vectors = rng.normal(size=(len(scores), 3)).astype(np.float32)
        self.popularity = rng.integers(0, 50, len(scores))
        self.newcomer_scores = np.log1p(self.popularity)

    def history(self, events: Sequence[Mapping[str, Any]]) -> tuple[Any, list[str]]:
        return np.array([self.index[event["item_id"]] for event in events], np.int64).view(_Items), []

    def score(self, histories: Sequence[Any], queries: Any, now: Any) -> Any:
        return SimpleNamespace(
            logits=np.tile(self.scores, (len(histories), 1)), gate_short=np.full(len(histories), np.nan)
        )

    def top_k(self, logits: np.ndarray, k: int, exclude: Sequence[np.ndarray] = ()) -> tuple[np.ndarray, np.ndarray]:
        logits = logits.copy()
        for row, rows in enumerate(exclude):
            logits[row, rows] = -np.inf
        best = top_k(logits, k)
        return best, np.where(best < 0, -np.inf, np.take_along_axis(logits, best.clip(min=0), 1))


class _Items(np.ndarray):  # type: ignore[type-arg]
    """Rows that are a history."""

    @property
    def items(self) -> np.ndarray:
        return np.asarray(self)


def engine_of(shelf: Any, policies: Policies) -> Engine:
    bundle: Any = SimpleNamespace(
        version="1", settings=SimpleNamespace(data=SimpleNamespace(exclude_seen=True)), metrics={}, recommender=shelf
    )
    return Engine(bundle, "shelf", policies)


def answer_of(engine: Engine, request: ScoreRequest) -> dict[str, Any]:
    answer = engine.score([request])[0]
    assert isinstance(answer, dict)
    return answer


items = st.integers(0, 29).map(lambda n: f"i{n}")
some_items = st.lists(items, max_size=20).map(tuple)
some_names = st.lists(st.sampled_from(NAMES), max_size=2).map(tuple)
policies_drawn = st.builds(
    Policies,
    action_weights=st.dictionaries(st.sampled_from(ACTIONS), st.sampled_from([0.0, 0.3, 1.0])),
    exclude_seen=st.sampled_from([None, True, False]),
    seen_actions=st.none() | st.lists(st.sampled_from(ACTIONS)).map(tuple),
    categories=some_names,
    exclude_categories=st.just(()) | some_names,
    allow_items=st.none() | some_items,
    block_items=some_items,
    popularity_damping=st.sampled_from([0.0, 0.5, 2.0]),
    diversity=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
    caps=st.builds(
        Caps,
        per_category=st.none() | st.integers(1, 4),
        categories=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3), max_size=2),
        strict=st.booleans(),
    ),
    exploration=st.builds(
        Exploration,
        kind=st.sampled_from(["off", "epsilon", "softmax"]),
        epsilon=st.sampled_from([0.0, 0.2, 1.0]),
        temperature=st.sampled_from([0.01, 1.0]),
        candidates=st.integers(1, 40),
    ),
)
shelves = st.integers(1, 30).flatmap(
    lambda n: st.builds(
        Shelf,
        st.lists(st.integers(-5, 5).map(float) | st.just(-math.inf), min_size=n, max_size=n),
        st.lists(st.lists(st.sampled_from(NAMES), max_size=2), min_size=n, max_size=n),
        st.integers(0, 5),
    )
)
requests = st.builds(
    ScoreRequest,
    events=st.lists(
        st.fixed_dictionaries({"item_id": items}, optional={"action": st.sampled_from(ACTIONS)}), max_size=8
    ),
    k=st.integers(1, 12),
    exclude_seen=st.sampled_from([None, True, False]),
    categories=some_names,
    exclude_items=some_items,
    allow_items=st.none() | some_items,
    diversity=st.sampled_from([None, None, 0.0, 0.5]),
    chance=st.sampled_from(["a", "b", "c"]),
)


def passing(shelf: Shelf, policies: Policies, request: ScoreRequest) -> set[int]:
    """By the words of the settings, one item at a time."""
    seen_wanted = [request.exclude_seen, policies.exclude_seen, True]
    seen: set[str] = set()
    if next(choice for choice in seen_wanted if choice is not None):
        if policies.seen_actions is None:
            seen = {event["item_id"] for event in counting_events(request.events, policies.action_weights)}
        else:
            seen = {event["item_id"] for event in request.events if event.get("action") in policies.seen_actions}
    kept = set()
    for row, item_id in enumerate(shelf.item_ids):
        own = set(shelf.categories[row])
        if (
            np.isfinite(shelf.scores[row])
            and all(not wanted or own & set(wanted) for wanted in (policies.categories, request.categories))
            and not own & set(policies.exclude_categories)
            and all(allowed is None or item_id in allowed for allowed in (policies.allow_items, request.allow_items))
            and item_id not in (*policies.block_items, *request.exclude_items)
            and item_id not in seen
        ):
            kept.add(row)
    return kept


def has_room(caps: Caps, categories: list[str], taken: Counter[str]) -> bool:
    for category in set(categories):
        most = caps.categories.get(category, caps.per_category)
        if most is not None and taken[category] >= most:
            return False
    return True


@given(shelves, policies_drawn, requests)
@settings(max_examples=300)
def test_every_combination_keeps_the_guarantee(shelf: Shelf, policies: Policies, request: ScoreRequest) -> None:
    events = [event for event in request.events if event["item_id"] in shelf.index]
    request = ScoreRequest(**{**vars(request), "events": events})
    answer = answer_of(engine_of(shelf, policies), request)["items"]
    rows, free = [shelf.index[item["item_id"]] for item in answer], passing(shelf, policies, request)
    assert len(set(rows)) == len(rows) <= request.k
    assert set(rows) <= free

    damping = policies.popularity_damping if counting_events(events, policies.action_weights) else 0.0
    adjusted = shelf.scores - damping * np.log1p(shelf.popularity)
    assert [item["score"] for item in answer] == pytest.approx([adjusted[row] for row in rows], abs=1e-4)
    taken = Counter(category for row in rows for category in set(shelf.categories[row]))
    left = {row for row in free - set(rows) if has_room(policies.caps, shelf.categories[row], taken)}
    if policies.caps.strict:
        assert len(rows) == request.k or not left
        assert all(n <= policies.caps.categories.get(c, policies.caps.per_category or n) for c, n in taken.items())
    else:
        assert len(rows) == min(request.k, len(free))  # k items whenever the catalogue has k that pass
        exceeded = any(n > policies.caps.categories.get(c, policies.caps.per_category or n) for c, n in taken.items())
        assert not (exceeded and left)  # caps give way only when nothing else is there

    exploring = policies.exploration.kind != "off"
    assert all(("propensity" in item) == exploring for item in answer)
    assert all(0 < item.get("propensity", 1) <= 1 for item in answer)
    diversity = policies.diversity if request.diversity is None else request.diversity
    if not (exploring or diversity):
        assert rows == by_hand(adjusted, free, policies.caps, shelf.categories, request.k)


def by_hand(scores: np.ndarray, free: set[int], caps: Caps, categories: list[list[str]], k: int) -> list[int]:
    """The best item with room, again and again; then, with soft caps, the best without."""
    taken, chosen = Counter[str](), []
    ranked = sorted(free, key=lambda row: (-np.float32(scores[row]), row))
    for row in ranked:
        if len(chosen) < k and has_room(caps, categories[row], taken):
            chosen.append(row)
            taken.update(set(categories[row]))
    if not caps.strict:
        chosen += [row for row in ranked if row not in chosen][: k - len(chosen)]
    return sorted(chosen, key=ranked.index)


# ---------------------------------------------------------------- diversity
def pick_from(scores: np.ndarray, vectors: np.ndarray, rules: Rules, request_id: str | None = None) -> Chosen:
    """Choose from a catalogue without categories."""

    def draw(spent: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        left = np.setdiff1d(np.arange(len(scores)), spent)
        best = left[np.argsort(-scores[left], kind="stable")][:count]
        return best, scores[best]

    return choose(draw, rules, vectors, [[]] * len(scores), lambda names: np.empty(0, np.int64), request_id)


def test_diversity_takes_unlike_items() -> None:
    vectors = np.asarray([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    scores = np.asarray([4.0, 3.9, 3.0, 1.0])
    assert pick_from(scores, vectors, Rules(2, 0.5)).rows == [0, 2]
    assert pick_from(scores, vectors, Rules(2, 0.01)).rows == [0, 1]
    assert sorted(pick_from(scores, vectors, Rules(9, 1.0)).rows) == [0, 1, 2, 3]
    assert pick_from(np.empty(0), np.empty((0, 2)), Rules(3, 0.5)).rows == []


@given(st.integers(0, 1000), st.floats(0.05, 1))
@settings(max_examples=100)
def test_each_item_has_the_greatest_marginal_relevance(seed: int, diversity: float) -> None:
    rng = np.random.default_rng(seed)
    scores, vectors = rng.normal(size=12), rng.normal(size=(12, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance = (scores - scores.min()) / np.ptp(scores)
    chosen = pick_from(scores, vectors, Rules(6, diversity)).rows
    assert chosen[0] == scores.argmax()
    for rank in range(1, 6):
        value = (1 - diversity) * relevance - diversity * (unit @ unit[chosen[:rank]].T).max(1)
        left = [row for row in range(12) if row not in chosen[:rank]]
        assert value[chosen[rank]] == pytest.approx(value[left].max(), abs=1e-9)


def test_diversity_goes_on_where_caps_end_the_first_candidates() -> None:
    """The third item is compared with both chosen before, though they are not among the candidates any more."""
    scores = np.concatenate([np.linspace(10, 9, 12), [1.0, 1.0]])
    categories = [["a"]] * 12 + [["b"], ["b"]]
    vectors = np.tile([1.0, 0.0], (14, 1))
    vectors[1], vectors[13] = [0.0, 1.0], [0.7, 0.7]  # 12 is like 0; 13 is halfway between 0 and 1

    def draw(spent: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        left = np.setdiff1d(np.arange(14), spent)[:count]
        return left, scores[left]

    def rows_of(names: Iterable[str]) -> np.ndarray:
        return np.flatnonzero([bool(set(names) & set(own)) for own in categories])

    rules = Rules(3, 0.9, Caps(per_category=2, strict=True))
    assert rules.candidates == 12
    assert choose(draw, rules, vectors, categories, rows_of).rows == [0, 1, 13]


# ---------------------------------------------------------------- exploration
@pytest.mark.parametrize(
    "policies",
    [
        {"exploration": {"kind": "epsilon", "epsilon": 0.4}},
        {"exploration": {"kind": "softmax", "temperature": 0.7}},
        {"exploration": {"kind": "softmax", "temperature": 2.0, "candidates": 3}},
        {"exploration": {"kind": "softmax"}, "diversity": 0.5},
        {"exploration": {"kind": "epsilon", "epsilon": 0.5}, "caps": {"per_category": 1}},
        {"exploration": {"kind": "softmax"}, "caps": {"per_category": 1, "strict": True}, "popularity_damping": 0.3},
    ],
    ids=str,
)
def test_logged_propensities_are_the_frequencies(policies: dict[str, Any]) -> None:
    """Over many requests each list comes as often as the product of its propensities says (chi-square)."""
    shelf = Shelf([2.0, 1.5, 1.0, 0.0], [["a"], ["a"], ["b"], ["c"]], 0)
    engine, rounds = engine_of(shelf, Policies.model_validate(policies)), 4000
    answers = engine.score([ScoreRequest(k=2, chance=f"request {n}") for n in range(rounds)])
    found, expected = Counter[tuple[str, ...]](), {}
    for answer in answers:
        assert isinstance(answer, dict)
        shown = tuple(item["item_id"] for item in answer["items"])
        found[shown] += 1
        expected.setdefault(shown, math.prod(item["propensity"] for item in answer["items"]))
        assert math.prod(item["propensity"] for item in answer["items"]) == pytest.approx(expected[shown])
    assert len(found) > 3
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4)  # every list that can come has come
    common = [shown for shown in found if expected[shown] * rounds >= 5]
    rest = rounds - sum(found[shown] for shown in common)
    counts, chances = [found[shown] for shown in common], [expected[shown] for shown in common]
    if rest:
        counts, chances = [*counts, rest], [*chances, 1 - sum(chances)]
    total = np.asarray(chances) / sum(chances) * rounds
    assert chisquare(counts, total).pvalue > 0.001


def test_softmax_is_plackett_luce_and_epsilon_spares_the_best() -> None:
    scores, vectors = np.array([1.0, 0.0, -1.0]), np.eye(3)
    softmax = Exploration(kind="softmax", temperature=0.5)
    chosen = pick_from(scores, vectors, Rules(3, exploration=softmax), "x")
    odds = np.exp(scores / 0.5)[chosen.rows]
    assert chosen.propensities == pytest.approx([odds[0] / odds.sum(), odds[1] / odds[1:].sum(), 1.0])
    epsilon = Exploration(kind="epsilon", epsilon=0.3)
    first = {
        chosen.rows[0]: chosen.propensities[0]
        for n in range(200)
        if (chosen := pick_from(scores, vectors, Rules(1, exploration=epsilon), str(n)))
    }
    assert first == pytest.approx({0: 0.8, 1: 0.1, 2: 0.1})


def test_a_request_explores_the_same_again_and_another_differently() -> None:
    engine = engine_of(
        Shelf([0.0] * 20, [[]] * 20, 0), Policies(exploration=Exploration(kind="softmax", temperature=1))
    )
    again = [answer_of(engine, ScoreRequest(chance=name)) for name in ("x", "x", "y")]
    assert again[0] == again[1] != again[2]


# ---------------------------------------------------------------- the history
events_drawn = st.lists(st.fixed_dictionaries({"item_id": items}, optional={"action": st.sampled_from(ACTIONS)}))


@given(events_drawn, st.dictionaries(st.sampled_from(ACTIONS), st.floats(0, 1)))
def test_weights_keep_their_share_from_the_newest_back(events: list[Any], weights: dict[str, float]) -> None:
    events = [{**event, "place": place} for place, event in enumerate(events)]
    kept = counting_events(events, weights)
    assert [event["place"] for event in kept] == sorted(event["place"] for event in kept)
    for action in (None, *ACTIONS):
        before = [event for event in events if event.get("action") == action]
        after = [event for event in kept if event.get("action") == action]
        weight = weights.get(action or "", 1.0)
        for newest in range(1, len(before) + 1):
            entered = [event for event in after if event["place"] >= before[-newest]["place"]]
            assert len(entered) == math.ceil(newest * weight)


def test_an_ignored_action_changes_nothing_and_is_not_seen(tmp_path: Path) -> None:
    engine = Engine(load_bundle(toy_bundle(tmp_path)), "toy", Policies(action_weights={"impression": 0}))
    events = [{"item_id": "i01", "timestamp": 10**12}, {"item_id": "i30", "timestamp": 10**12 + 5}]
    shown = [{"item_id": f"i{n:02d}", "timestamp": 10**12 + 9, "action": "impression"} for n in range(2, 8)]
    plain = ScoreRequest(events, k=38, now=10**12 + 99)
    assert answer_of(engine, plain) == answer_of(engine, ScoreRequest([*events, *shown], k=38, now=10**12 + 99))
    assert len(engine.interests([*events, *shown])["events"]) == 2


# ---------------------------------------------------------------- with the model
def test_shares_sum_to_the_adjusted_score(tmp_path: Path) -> None:
    bundle = load_bundle(toy_bundle(tmp_path))
    engine = Engine(bundle, "toy", Policies(popularity_damping=0.7, diversity=0.2))
    text = bundle.recommender.text_vectors
    assert text is not None
    events = [{"item_id": f"i{n:02d}", "timestamp": 10**12 + n} for n in (4, 9, 5)]
    for request in (ScoreRequest(events), ScoreRequest(events, text[3]), ScoreRequest(query=text[3]), ScoreRequest()):
        for item in answer_of(engine, ScoreRequest(**{**vars(request), "explain": True}))["items"]:
            explanation = item["explanation"]
            assert sum(explanation["shares"].values()) == pytest.approx(item["score"], abs=1e-4)
            known = bool(request.events) or request.query is not None  # else popularity is all there is to go by
            assert explanation["shares"]["policy"] < 0 if known else "policy" not in explanation["shares"]
            assert explanation["sentence"].endswith(".")


def test_an_added_item_passes_and_fails_filters_like_the_others(tmp_path: Path) -> None:
    bundle = load_bundle(toy_bundle(tmp_path))
    texts = bundle.recommender.text_vectors
    assert texts is not None
    engine = Engine(bundle, "toy", Policies(categories=("new", "fresh"), block_items=("blocked",)))
    assert answer_of(engine, ScoreRequest())["items"] == []
    features = bundle.recommender.model.item_vectors.text.numpy()
    described = {"added": ["new"], "blocked": ["new"], "other": ["old"], "i03": ["fresh"]}
    engine.put_items([NewItem(name, name, found, texts[3], features[3]) for name, found in described.items()])
    assert {item["item_id"] for item in answer_of(engine, ScoreRequest())["items"]} == {"added", "i03"}
    assert [i["item_id"] for i in answer_of(engine, ScoreRequest(categories=("new",)))["items"]] == ["added"]


# ---------------------------------------------------------------- as configuration
def test_the_linter_reads_the_section() -> None:
    path = Path(__file__).parents[1] / "serve_configs" / "local.yaml"
    plain = yaml.safe_load(path.read_text())

    def problems(policies: dict[str, Any]) -> list[str]:
        config = copy.deepcopy(plain)
        scorer = next(d for d in config["applications"][0]["deployments"] if d["name"] == "Scorer")
        scorer["user_config"]["policies"] = policies
        return lint(config)

    assert problems({"caps": {"per_category": 3, "categories": {"Drama": 2}}, "block_items": ["1"]}) == []
    assert "policies.caps.stric; did you mean strict?" in problems({"caps": {"stric": True}})[0]
    assert "policies.diversity" in problems({"diversity": 1.5})[0]
    assert "policies.action_weights.view" in problems({"action_weights": {"view": -1}})[0]
