"""Presets, branches and fusion strategies by name: what each may see, that it learns, and that it comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.bundle import load_bundle
from springtide.config import (
    ModelConfig,
    Settings,
    TrainConfig,
    as_given,
    load_settings,
    parse_settings,
    with_values,
)
from springtide.errors import SpringtideError
from springtide.model.batch import Batch, History, pad_rows, scoring_batch
from springtide.model.fuse import DAY_MS, TimeDecay
from springtide.model.fusion import FusionModel, Interest
from springtide.presets import PRESETS
from springtide.training.loop import make_optimizer
from toy import sequences_of, tables_of, toy_bundle, toy_log, toy_settings

torch.set_num_threads(1)
ITEMS, LENGTH = 30, 12
ALONE = ("lstm", "gru", "dynamic_mlp", "bert_lstm", "multimodal_attention")
# Small sizes for every part; a preset keeps its shape.
SMALL: dict[str, Any] = {"neighbour_items": 12, "dim": 16, "long_hidden": 12, "long_window": 20, "short_window": 4}
NOTHING_COUNTED: dict[str, Any] = dict.fromkeys(
    ("memory", "neighbours", "borrowing", "text_neighbours", "popularity", "recent_popularity"), False
)
SYSTEMS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    **{f"long {name}": {"long_branch": name} for name in ("lstm", "cnn_lstm", "cnn", "mlp", "transformer", "none")},
    **{
        f"long {name}, last": {"long_branch": name, "long_pool": "last"}
        for name in ("gru", "cnn_lstm", "cnn", "transformer")
    },
    "two transformer blocks": {"long_branch": "transformer", "long_layers": 2},
    "mlp without time": {"long_branch": "mlp", "use_time": False},
    "cnn_lstm without time": {"long_branch": "cnn_lstm", "use_time": False},
    "no short": {"short_branch": "none"},
    **{f"fusion {name}": {"fusion": name} for name in ("attention", "time_decay", "concat", "sum", "model")},
    "time_decay, request time": {"fusion": "time_decay", "request_time": True},
    "linear input, no rating, no time": {"event_input": "linear", "use_rating": False, "use_time": False},
    **{f"{name} without text": {"preset": name, "text_dim": 0} for name in PRESETS if name != "bert_lstm"},
}


def config_of(system: str, **values: Any) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | {"text_dim": 8} | SYSTEMS[system] | values)


def build(system: str, heads: tuple[float, float] = (0.0, 0.0), randomise: bool = True) -> FusionModel:
    """The named system with random weights everywhere, so that nothing is zero by initialisation."""
    config = config_of(system)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    text = torch.randn(ITEMS, config.text_dim, generator=generator)
    model = FusionModel(
        config,
        3,
        text,
        torch.arange(ITEMS) != ITEMS - 1,
        torch.arange(ITEMS - 1, -1, -1),
        (3.0, 1.5),
        heads,
    )
    rng = np.random.default_rng(3)
    log = sequences_of([rng.integers(0, ITEMS - 1, 20).tolist() for _ in range(20)])
    tables_of(log, ITEMS, config, text=text.numpy()).fill(model)
    if randomise:
        for name, parameter in model.named_parameters():
            if "log_life" not in name:  # milliseconds: random ones would make every event infinitely old
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def history(length: int, seed: int, **same: Any) -> History:
    rng = np.random.default_rng(seed)
    ratings = rng.integers(1, 6, length).astype(np.float32)
    ratings[rng.random(length) < 0.3] = np.nan
    times = np.cumsum(rng.integers(0, 10**8, length)) + 10**12
    return replace(History(rng.integers(0, ITEMS - 1, length), rng.integers(0, 3, length), ratings, times), **same)


def training(histories: list[History]) -> Batch:
    """Each history's events but the last, with the next one and its rating as target."""
    batch = scoring_batch([h.before(len(h) - 1) for h in histories], 1000)
    return replace(
        batch,
        targets=torch.from_numpy(pad_rows([h.items[1:] for h in histories], np.int64, -1)),
        now=torch.from_numpy(pad_rows([h.timestamps[1:] for h in histories], np.int64)),
        target_ratings=torch.from_numpy(pad_rows([h.ratings[1:] for h in histories], np.float32, np.nan)),
    )


def read(model: FusionModel, histories: list[History], now: np.ndarray | None = None) -> Interest:
    return model.interest(scoring_batch(histories, 1000, now), model.item_vectors())


def tensors(interest: Interest) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(interest).items() if isinstance(value, torch.Tensor)}


# ---------------------------------------------------------------- every system
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("empty", [False, True], ids=["targets", "nothing to learn"])
def test_every_parameter_gets_a_gradient(system: str, empty: bool) -> None:
    """Or DDP would wait for it; also on a worker whose share of the data has run out."""
    model = build(system, (0.5, 0.5)).train()
    batch = training([history(LENGTH, 0), history(5, 1)])
    if empty:
        batch = replace(batch, targets=torch.full_like(batch.targets, -1))
    loss, count = model(batch, exclude_seen=True)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert loss.isfinite() and (loss.item() == 0) is empty and count == (0 if empty else LENGTH - 1 + 4)
    if not empty:
        assert [name for name, p in model.named_parameters() if not p.grad.any()] == []  # type: ignore[union-attr]


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 3 * LENGTH), min_size=1, max_size=5), data=st.data())
def test_one_moment_read_alone_is_the_same_as_among_all(system: str, lengths: list[int], data: st.DataObject) -> None:
    model, vectors = MODELS[system], MODELS[system].item_vectors()
    batch = scoring_batch([history(length, seed) for seed, length in enumerate(lengths)], 1000)
    moments = torch.tensor([[row, data.draw(st.integers(0, length - 1))] for row, length in enumerate(lengths)])
    whole, alone = model.interest(batch, vectors), model.interest(batch, vectors, moments[:, 1])
    for name, tensor in tensors(alone).items():
        at = tensors(whole)[name][moments[:, 0], moments[:, 1]]
        assert tensor.shape[1] == 1
        torch.testing.assert_close(tensor[:, 0], at, rtol=1e-4, atol=1e-5, msg=lambda why, of=name: f"{of}: {why}")
    logits = [model.logits_at(batch, interest, vectors, moments) for interest in (whole, alone)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    # The channels read many moments of a history in another way than one of each.
    many = model.logits_at(batch, whole, vectors, moments.repeat_interleave(2, 0))
    torch.testing.assert_close(many[::2], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=6)
@given(seed=st.integers(0, 10**6), moment=st.integers(0, LENGTH - 2))
def test_the_future_never_changes_an_earlier_interest(system: str, seed: int, moment: int) -> None:
    model, past, other = MODELS[system], history(LENGTH, seed), history(LENGTH, seed + 1)
    known = np.arange(LENGTH) <= moment
    later = History(**{name: np.where(known, array, getattr(other, name)) for name, array in vars(past).items()})
    later.timestamps[moment + 1 :] += 10**9
    asked = np.array([past.timestamps[-1] + 10**10])
    first, second = (read(model, [h], asked) for h in (past, later))
    for name, value in tensors(first).items():
        torch.testing.assert_close(value[:, : moment + 1], tensors(second)[name][:, : moment + 1], rtol=0, atol=1e-6)


MODELS = {system: build(system) for system in SYSTEMS}


@pytest.mark.parametrize("system", [name for name, model in MODELS.items() if model.channels.weigh is not None])
def test_few_moments_teach_the_channels_what_many_do(system: str) -> None:
    """Texts are summed in another way where each history has one moment; training meets that in small blocks."""
    model, vectors = MODELS[system], MODELS[system].item_vectors()
    assert model.channels.weigh is not None
    batch = scoring_batch([history(LENGTH, 0), history(5, 1)], 1000)
    few = torch.tensor([[0, LENGTH - 1], [1, 3]])
    gradients = []
    for moments, every in ((few, 1), (few.repeat_interleave(2, 0), 2)):
        logits = model.logits_at(batch, model.interest(batch, vectors), vectors, moments)[::every]
        gradients.append(torch.autograd.grad(logits.square().sum(), model.channels.weigh.weight, retain_graph=True)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("system", SYSTEMS)
def test_shapes_weights_and_padding(system: str) -> None:
    model = MODELS[system]
    histories = [history(n, n) for n in (1, 7, LENGTH, 3)]
    together = read(model, histories)
    for name in ("user", "long", "short", "gate"):
        assert getattr(together, name).shape == (4, LENGTH, 16)
    assert ((together.gate >= 0) & (together.gate <= 1)).all()
    assert together.attention_long.shape == (4, LENGTH, LENGTH) and together.attention_short.shape == (4, LENGTH, 4)
    for row, past in enumerate(histories):
        alone = read(model, [past])
        torch.testing.assert_close(together.user[row, : len(past)], alone.user[0], rtol=1e-4, atol=1e-5)
        for weights, there in (
            (alone.attention_long, model.config.long_branch != "none"),
            (alone.attention_short, model.config.short_branch != "none"),
        ):
            torch.testing.assert_close(weights.sum(-1), torch.full((1, len(past)), float(there)))
    assert not together.attention_long.triu(1).any()


ODD = {
    "no rating": history(6, 1, ratings=np.full(6, np.nan, np.float32)),
    "equal timestamps": history(6, 1, timestamps=np.full(6, 10**12)),
    "no timestamps": history(6, 1, timestamps=np.zeros(6, np.int64)),
    "one event": history(1, 1),
    "centuries apart": history(2, 1, timestamps=np.array([0, 10**14])),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_odd_histories_score_and_train(system: str) -> None:
    model = build(system, (1.0, 1.0), randomise=False)
    for name, past in ODD.items():
        assert read(model, [past]).user.isfinite().all(), name
    loss, _ = model.train()(training([past for past in ODD.values() if len(past) > 1]), True)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def rows_of_toy_log() -> list[History]:
    rows: dict[str, list[int]] = {}
    for event in toy_log(40, ITEMS):
        rows.setdefault(event["user_id"], []).append(int(event["item_id"][1:]))
    return [history(len(items), number, items=np.array(items)) for number, items in enumerate(rows.values())]


@pytest.mark.parametrize("system", [*PRESETS, "long transformer", "fusion model", "fusion attention", "fusion concat"])
def test_a_simple_pattern_is_learned(system: str) -> None:
    """In the toy log item i is followed by i + 1 four times out of five."""
    config = config_of(system, **NOTHING_COUNTED, dropout=0.0, id_dropout=0.0)
    text = torch.eye(ITEMS) if config.text_dim else torch.zeros(ITEMS, 0)
    torch.manual_seed(0)
    model = FusionModel(config, 3, text, torch.ones(ITEMS, dtype=torch.bool), torch.ones(ITEMS))
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.01))
    batch = training(rows_of_toy_log())
    for _ in range(150):
        loss, count = model(batch, False)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    asked = scoring_batch([history(3, i, items=np.arange(i, i + 3)) for i in range(ITEMS - 3)], 20)
    vectors = model.eval().item_vectors()
    last = torch.tensor([[row, 2] for row in range(ITEMS - 3)])
    best = model.logits_at(asked, model.interest(asked, vectors), vectors, last).topk(3).indices
    hits = (best == torch.arange(3, ITEMS)[:, None]).any(1).float().mean()
    assert hits > 0.5  # by chance 0.1


# ---------------------------------------------------------------- particular parts
def test_without_time_a_cnn_lstm_is_its_convolution() -> None:
    assert build("cnn_lstm without time").state_dict().keys() == MODELS["long cnn"].state_dict().keys() - {
        "event_input.gap.weight"
    }
    model = build("long cnn_lstm")
    still, moving = ODD["equal timestamps"], history(6, 1)
    before = [read(model, [past]).long for past in (still, moving)]
    for name, parameter in model.named_parameters():
        if "recurrent" in name:
            torch.nn.init.zeros_(parameter)
    after = [read(model, [past]).long for past in (still, moving)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_every_event_updates_the_running_features() -> None:
    model = MODELS["dynamic_mlp"]
    user = read(model, [history(LENGTH, 0)]).user[0]
    assert (user.diff(dim=0).abs().amax(1) > 1e-4).all()


def test_one_branch_alone_is_used_as_it_is() -> None:
    past = [history(LENGTH, 0)]
    long, short = read(MODELS["no short"], past), read(MODELS["long none"], past)
    assert torch.equal(long.user, long.long) and not long.short.any() and not long.gate.any()
    assert torch.equal(short.user, short.short) and not short.long.any() and (short.gate == 1).all()


def test_time_decay_gives_old_windows_less_weight() -> None:
    fuse = TimeDecay(config_of("fusion time_decay"))
    long, short = torch.randn(2, 1, 6, 16)

    def gate(*days: float) -> list[float]:
        times = (np.array(days) * DAY_MS).astype(np.int64) + 10**12
        batch = scoring_batch([history(6, 0, timestamps=times)], 20)
        return fuse(long, short, torch.zeros(1, 6, 4), batch)[1][0, :, 0].tolist()  # type: ignore[no-any-return]

    most = torch.sigmoid(fuse.most[0]).item()
    assert gate(0, 0, 0, 0, 0, 0) == pytest.approx([most] * 4 + [most * 4 / 5, most * 4 / 6])
    fresh, stale = gate(0, 20, 20, 20, 20, 20)[-1], gate(0, 20, 20, 20, 20, 25)[-1]
    assert fresh > gate(19, 20, 20, 20, 20, 20)[-1] > stale  # what lies before the window is old; a pause came last


@pytest.mark.parametrize("fusion", ["gate", "attention", "time_decay"])
def test_the_gate_is_the_weight_that_was_used(fusion: str) -> None:
    system = "gated_fusion" if fusion == "gate" else f"fusion {fusion}"
    found = read(MODELS[system], [history(LENGTH, 0)])
    torch.testing.assert_close(found.user, found.gate * found.short + (1 - found.gate) * found.long)


# ---------------------------------------------------------------- settings
def tree(**model: Any) -> dict[str, Any]:
    return {"data": {"events": {"paths": "log.csv"}}, "model": model}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_comes_back_out_of_its_dump(preset: str) -> None:
    for more in ({}, {"long_layers": 3, "dim": 64}):
        chosen = parse_settings(tree(preset=preset, **more))
        assert Settings.model_validate(chosen.model_dump(mode="json")) == chosen
        assert with_values(chosen, {"train.epochs": 3}).model == chosen.model
        assert as_given(chosen) == tree(preset=preset, **more) | {"data": {"events": [{"paths": ["log.csv"]}]}}
    expected = ModelConfig().model_dump() | PRESETS[preset] | {"preset": preset}
    assert ModelConfig(preset=preset).model_dump() == expected


def test_what_is_given_beside_a_preset_wins(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(tree(dim=64)))
    model = load_settings(file, ["model.preset=lstm", "model.long_layers=1"]).model
    assert (model.dim, model.long_layers, model.long_hidden, model.memory) == (64, 1, 50, False)


def test_another_preset_takes_the_place_of_the_old_one_and_leaves_what_was_given(tmp_path: Path) -> None:
    # long_layers and dropout are given, though the old preset and the new one's defaults say the same.
    given = {"gate_hidden": 8, "long_layers": 2, "dropout": 0.2}
    old = with_values(parse_settings(tree(preset="lstm", **given)), {"train.epochs": 3})
    changed = with_values(old, {"model.dim": 32, "model.preset": "gated_fusion"}).model
    assert changed == ModelConfig(preset="gated_fusion", dim=32, request_time=False, **given)
    file = tmp_path / "best.yaml"
    file.write_text(yaml.safe_dump(as_given(old)))
    assert load_settings(file) == old
    assert load_settings(file, ["model.preset=bert_lstm"]).model == ModelConfig(
        preset="bert_lstm", request_time=False, **given
    )


def test_heads_matter_only_where_something_attends() -> None:
    assert ModelConfig(preset="lstm", short_heads=4).dim == 50
    assert ModelConfig(dim=15, short_branch="none").short_heads == 2
    assert ModelConfig(dim=48, short_heads=3).dim == 48


def test_a_wrong_section_is_shown_only_where_there_is_room_for_all_of_it() -> None:
    long = {"memory_decay": 0.5, "neighbour_l2": 1.0, "recent_half_life": 0.5}
    for more, shown in (({}, " (got {'preset': 'bert_lstm', 'text_dim': 0})"), (long, "")):
        with pytest.raises(SpringtideError) as caught:
            parse_settings(tree(**more, **{"preset": "bert_lstm", "text_dim": 0}))
        assert str(caught.value).endswith(f"vector at all{shown}")


def test_lstm_and_gru_differ_in_the_cell_alone() -> None:
    one, other = (ModelConfig(preset=name).model_dump() for name in ("lstm", "gru"))
    assert {name for name in one if one[name] != other[name]} == {"preset", "long_branch"}
    assert (one["dim"], one["long_hidden"], one["long_layers"], one["dropout"]) == (50, 50, 2, 0.2)


def test_only_the_articles_own_systems_stand_alone() -> None:
    for name in PRESETS:
        model = ModelConfig(preset=name)
        counting = (model.memory, model.neighbours, model.text_neighbours, model.popularity, model.recent_popularity)
        assert counting == ((False,) * 5 if name in ALONE else (True,) * 5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"preset": "lsmt"}, r"model.preset: there is no preset 'lsmt'; did you mean lstm\?"),
        ({"long_branch": "none", "short_branch": "none"}, "both none; give at least one"),
        ({"preset": "gru", "long_branch": "none"}, "both none; give at least one"),
        ({"long_branch": "transformer", "long_hidden": 5}, r"long_hidden \(5\) must be a multiple of short_heads"),
        ({"dim": 15}, r"dim \(15\) must be a multiple of short_heads \(2\)"),
        ({"short_heads": 3}, r"dim \(0, so 32 or 64 or 128 by the size of the log\) must be a multiple of short_heads"),
        (
            {"long_branch": "transformer", "short_branch": "none", "short_heads": 3, "long_hidden": 0},
            r"a transformer's long_hidden \(0, so 32",
        ),
        ({"preset": "bert_lstm", "text_dim": 0}, "needs text_dim above 0"),
        ({"fusion": "mean"}, "model.fusion"),
    ],
    ids=str,
)
def test_what_makes_no_model_is_refused_in_a_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpringtideError, match=said):
        parse_settings(tree(**values))
    with pytest.raises(SpringtideError, match=r"did you mean lstm\?"):
        parse_settings({**tree(), "compare": {"presets": ["lsmt"]}})


# ---------------------------------------------------------------- bundles
@pytest.mark.parametrize("preset", PRESETS)
def test_a_bundle_of_every_preset_answers_as_before(tmp_path: Path, preset: str) -> None:
    values = {"model__preset": preset, "model__long_hidden": 12, "train__rating_weight": 1, "train__click_weight": 1}
    path = toy_bundle(tmp_path, **values)
    first, second = load_bundle(path), load_bundle(path)
    assert first.settings == toy_settings(tmp_path, **values)
    past = [history(7, 0), history(1, 1)]
    one, other = (bundle.recommender.score(past) for bundle in (first, second))
    np.testing.assert_array_equal(one.logits, other.logits)
    assert np.isfinite(one.logits).all() and ((one.gate_short >= 0) & (one.gate_short <= 1)).all()
    said, again = (bundle.recommender.judge(past, np.array([[1, 2], [3, 4]])) for bundle in (first, second))
    assert said.ratings is not None and said.clicks is not None and said.ratings.shape == (2, 2)
    np.testing.assert_array_equal(said.ratings, again.ratings)
    assert ((said.clicks > 0) & (said.clicks < 1)).all()


def test_a_branch_that_is_not_there_is_after_nothing(tmp_path: Path) -> None:
    told = load_bundle(toy_bundle(tmp_path, model__preset="gru")).recommender.interests(history(7, 0))
    assert len(told.items_short) == 0 and len(told.items_long) == 10
    assert not told.attention_short.any() and told.gate_short == 0


def test_without_heads_nothing_is_judged(tmp_path: Path) -> None:
    recommender = load_bundle(toy_bundle(tmp_path)).recommender
    said = recommender.judge([history(3, 0)], np.array([[1]]))
    assert said.ratings is None and said.clicks is None
    for ask in (recommender.model.rate, recommender.model.click_probability):
        with pytest.raises(ValueError, match="weight above 0"):
            ask(torch.zeros(1, 16), torch.zeros(1, dtype=torch.int64))
