"""One trained model and its catalogue as an object that answers: in a notebook, in a batch job and behind HTTP alike.

Item ids outside, catalogue rows inside. Arrays in, arrays out; no files, no Ray, no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from springtide.model.answers import Interests, Judgement, NewItem, Observed, Reasons, Scores
from springtide.model.batch import Batch, History, after_all, read_events, scoring_batch
from springtide.model.decayed import DecayedCounts, popular_scores
from springtide.model.explain import SHARES, by_event, shares
from springtide.model.frozen import FrozenModel
from springtide.model.fusion import FusionModel, Interest
from springtide.model.memory import count_transitions
from springtide.model.question import Question, ask
from springtide.model.retrieval import Index, Retrieval
from springtide.model.tables import Tables
from springtide.ranks import top_k

QUERY_TEMPERATURE = 0.05  # cosines of sentence encoders differ by hundredths; this spreads them like logits
NEAREST = 10


class Recommender:
    """A trained FusionModel with its catalogue. Not thread-safe while items are being added; else free of state."""

    def __init__(
        self,
        model: FusionModel,
        item_ids: list[str],
        titles: list[str],
        categories: list[list[str]],
        actions: list[str],
        popularity: np.ndarray,
        text_vectors: np.ndarray | None,
        tables: Tables | None = None,
        predictable: np.ndarray | None = None,
        timeless: bool = False,
    ) -> None:
        """tables: what `observe` adds to, and when the log ended; predictable: [actions] bool, absent = all.

        timeless: the log had no times, and its rows count as one second apart; so do events that are observed then.
        """
        self.model = model.eval()
        self.item_ids, self.titles, self.categories, self.actions = item_ids, titles, categories, actions
        self.popularity = popularity
        self.text_vectors = text_vectors
        self._transitions = None if tables is None else tables.transitions
        self.log_end = None if tables is None else tables.end  # ms
        self.popular = DecayedCounts(popularity.astype(np.float64), 0, np.inf) if tables is None else tables.popular
        self._predictable = np.ones(len(actions), bool) if predictable is None else predictable
        self._timeless = timeless
        self.index = {item_id: row for row, item_id in enumerate(item_ids)}
        self._action_index = {action: number for number, action in enumerate(actions)}
        self._device = torch.device("cpu")
        self._observed = np.zeros(len(item_ids), bool)  # taken since the model was trained
        self.retrieval: Retrieval | None = None  # finds the best items without scoring all
        self._read_catalogue()

    @torch.inference_mode()
    def _read_catalogue(self) -> None:
        """What follows from the items and their counts."""
        model = self.model
        self._frozen: FrozenModel | None = None  # made at the next request
        self._vectors = model.item_vectors()
        self.item_vectors: np.ndarray = self._vectors.cpu().numpy()  # [I, dim]
        self.newcomer_scores = popular_scores(self.popular.counts, self.popularity)  # [I], without history and query
        # Neither trained nor described: such an item has an arbitrary vector, so it is never recommended. A text counts
        # if the model reads texts; if it does not, the text still answers a query on its own.
        trained = (self.popularity > 0) & model.item_vectors.known.cpu().numpy() | self._observed
        texts = self.text_vectors
        has_text = np.zeros(len(self.item_ids), bool) if texts is None else np.abs(texts).sum(1) > 0
        self.recommendable = trained | (has_text & model.item_vectors.text.any(1).cpu().numpy())
        self.found_by_query = trained | has_text  # by a query alone

    @property
    def vectors(self) -> torch.Tensor:
        """[I, dim] of the items, on the model's device."""
        return self._vectors

    def use_index(self, index: Index | None) -> None:
        """Find the best items by an index that was made of this very state; None: by scoring all."""
        self.retrieval = None if index is None else Retrieval(index, self)

    def release(self) -> None:
        """Let go of what exact scoring keeps ready, as much again as the keys of all items; made again when needed."""
        self._frozen = None

    def put_items(self, items: Sequence[NewItem]) -> None:
        """Add items to the catalogue, or replace what is known of them; each can be recommended from then on.

        Raises ValueError if the model has no texts: nothing is known of an item without events then.
        """
        texts, of_model = self.text_vectors, self.model.item_vectors.text
        if texts is None:
            raise ValueError("this model has no item texts, so it cannot tell what a new item is like")
        for item in items:
            row = self.index.setdefault(item.item_id, len(self.item_ids))
            if row == len(self.item_ids):
                self.item_ids.append(item.item_id)
                self.titles.append("")
                self.categories.append([])
            self.titles[row], self.categories[row] = item.title, item.categories
        rows, count = [self.index[item.item_id] for item in items], len(self.item_ids) - len(texts)
        self.popularity, self.text_vectors = np.pad(self.popularity, (0, count)), np.pad(texts, ((0, count), (0, 0)))
        features = torch.nn.functional.pad(of_model, (0, 0, 0, count))
        for row, item in zip(rows, items, strict=True):
            self.text_vectors[row] = item.text_vector
            features[row] = torch.from_numpy(item.features).to(features.device)
        self._observed, self.popular = np.pad(self._observed, (0, count)), self.popular.grown(count)
        self.model.grow(features, self.popularity, np.unique(rows))
        if self._transitions is not None:
            self._transitions.resize(len(self.item_ids), len(self.item_ids))
        self._read_catalogue()
        if self.retrieval is not None:
            self.retrieval.changed(np.unique(rows))

    def to(self, device: str) -> Recommender:
        """Move the model to a device such as "cuda". Answers stay arrays on the CPU. Returns self."""
        self._device = torch.device(device)
        if self._device.type != "cpu":
            self.retrieval = None  # a GPU scores all items sooner than a CPU finds some
        self.model.to(self._device)
        self._vectors = self._vectors.to(self._device)
        return self

    def history(self, events: Sequence[Mapping[str, Any]]) -> tuple[History, list[str]]:
        """Turn events (`item_id`, optional `timestamp` ms, `action`, `rating`) into a History and the unknown item ids.

        Events are put in time order; equal and missing timestamps keep the order given (missing: as the one before).
        """
        return read_events(events, self.index, self._action_index)

    def score(
        self, histories: Sequence[History], queries: np.ndarray | None = None, now: np.ndarray | None = None
    ) -> Scores:
        """Logits of the whole catalogue for each request.

        queries: [B, D] float32 normalised encoder vectors, NaN row = no query; now: [B] int64 ms, time of the request,
        absent: with the last event of each, or for a model that is told the time, when its log ended. A request with
        neither history nor query gets `newcomer_scores`.
        """
        logits = np.empty((len(histories), len(self.item_ids)), np.float32)
        gate = np.full(len(histories), np.nan, np.float32)
        asked = np.zeros(len(histories), bool) if queries is None else ~np.isnan(queries).any(1)
        told = np.array([len(history) > 0 for history in histories], bool)
        logits[asked & ~told] = 0
        logits[~asked & ~told] = self.newcomer_scores
        if rows := np.flatnonzero(told).tolist():
            own = None if now is None else now[rows]
            logits[rows], gate[rows] = self._score_histories([histories[r] for r in rows], own)
        if asked.any() and queries is not None:
            if self.text_vectors is None:
                raise ValueError("this model has no item texts, so it cannot answer a query")
            logits[asked] += (queries[asked] / QUERY_TEMPERATURE) @ self.text_vectors.T
        for row, by_query_alone in enumerate(asked & ~told):
            allowed = self.found_by_query if by_query_alone else self.recommendable
            logits[row][~allowed] = -np.inf
        return Scores(logits, gate)

    @torch.inference_mode()
    def _score_histories(self, histories: list[History], now: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        batch, interest, last = self._read(histories, now)
        if self._device.type != "cpu":
            logits = self.model.logits_at(batch, interest, self._vectors, last)
        else:
            self._frozen = self._frozen or FrozenModel(self.model, self._vectors)
            logits = self._frozen.logits(batch, interest, last)
        gate = interest.gate[:, 0].mean(-1)
        return logits.cpu().numpy(), gate.cpu().numpy()

    @torch.inference_mode()
    def questions(
        self,
        histories: Sequence[History],
        queries: np.ndarray | None = None,
        now: np.ndarray | None = None,
        damping: float = 0.0,
    ) -> tuple[list[Question | None], np.ndarray]:
        """What each request, as of `score`, asks of `retrieval`, and the gate of each as in Scores.

        None for one with neither history nor query: nothing is to be found for it. damping: times log(1 + events) to
        be taken off every score.
        """
        found: list[Question | None] = [None] * len(histories)
        gate = np.full(len(histories), np.nan, np.float32)
        if told := [row for row, history in enumerate(histories) if len(history)]:
            batch, interest, last = self._read([histories[r] for r in told], None if now is None else now[told])
            gate[told] = interest.gate[:, 0].mean(-1).numpy()
            for row, question in zip(told, ask(self.model, batch, interest, self._vectors, last), strict=True):
                found[row] = question
        for row, query in enumerate(() if queries is None else queries):
            if not np.isnan(query).any():
                found[row] = replace(found[row] or Question({}), text=query / QUERY_TEMPERATURE)
        return [None if question is None else replace(question, damping=damping) for question in found], gate

    def best(
        self,
        histories: Sequence[History],
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
        now: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items after each history, never those in `exclude`, by the index if there is one; see `top_k`.

        now: [B] int64 ms as in `score`.
        """
        retrieval = self.retrieval
        if retrieval is None or not all(map(len, histories)):
            return self.top_k(self.score(histories, now=now).logits, k, exclude)
        k = min(k, len(self.item_ids))
        rows, scores = np.full((len(histories), k), -1), np.full((len(histories), k), -np.inf, np.float32)
        for place, question in enumerate(self.questions(histories, now=now)[0]):
            barred = np.zeros(len(self.item_ids), bool)
            barred[exclude[place] if exclude else []] = True
            if question is not None:
                found, their = retrieval.best(question, k, barred)
                rows[place, : len(found)], scores[place, : len(found)] = found, their
        return rows, scores

    def _read(self, histories: list[History], now: np.ndarray | None) -> tuple[Batch, Interest, torch.Tensor]:
        """The histories, what the model makes of their last moments, and these moments [B, 2]."""
        if now is None and self.model.config.request_time and self.log_end is not None:
            now = after_all(histories, self.log_end)
        batch = scoring_batch(histories, self.model.config.long_window, now).to(self._device)
        last = batch.mask.sum(1) - 1
        interest = self.model.interest(batch, self._vectors, last)
        return batch, interest, torch.stack([torch.arange(len(histories), device=self._device), last], 1)

    def top_k(
        self, logits: np.ndarray, k: int, exclude: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each row of `logits` [B, I], never those in `exclude` (catalogue rows, per row).

        Returns rows [B, k'] int64 (-1 where fewer items remain) and scores [B, k'] float32, best first, ties by
        catalogue row; k' = min(k, I).
        """
        scores = logits.copy()
        for row, banned in enumerate(exclude or ()):
            scores[row, banned] = -np.inf
        best = top_k(scores, k)
        values = np.take_along_axis(scores, best.clip(min=0), axis=1).astype(np.float32)
        values[best < 0] = -np.inf
        return best, values

    def observe(self, histories: Sequence[History], events: Sequence[History]) -> None:
        """Count new events without training: transitions, popularity, recent popularity. The network stays as it is.

        events: what each of B users did after histories[b], in time order.
        """
        self.take(self.count(histories, events))

    def count(self, histories: Sequence[History], events: Sequence[History]) -> Observed:
        """What `observe` would count, for `take`. Changes nothing, so that others may score while it is made."""
        joined = {
            name: np.concatenate([getattr(new, name) for new in events] or [np.zeros(0, np.int64)])
            for name in ("items", "actions", "timestamps")
        }
        transitions = tables = None
        memory = self.model.channels.memory
        if memory is not None and self._transitions is not None and len(joined["items"]):
            pieces = []
            for history, new in zip(histories, events, strict=True):
                before = history.items[-memory.distances :]
                successors = np.concatenate([np.zeros(len(before), bool), self._predictable[new.actions]])
                pieces.append((np.concatenate([before, new.items]), successors))
            added = count_transitions(pieces, len(self.popularity), memory.distances, memory.decay)
            transitions = self._transitions + added
            tables = memory.rearrange(transitions, np.flatnonzero(np.diff(added.indptr)))
        return Observed(**joined, transitions=transitions, tables=tables)

    @torch.no_grad()
    def take(self, observed: Observed) -> None:
        """Add what `count` made of new events."""
        items, channels = observed.items, self.model.channels
        if not len(items):
            return
        self.popularity = self.popularity + np.bincount(items, minlength=len(self.popularity))
        channels.observe_popularity(self.popularity)
        wanted = self._predictable[observed.actions]
        times = observed.timestamps
        if self._timeless:
            rank = np.argsort(np.argsort(times, kind="stable"), kind="stable")
            times = self.popular.moment + 1000 * (rank + 1)
        self.popular = self.popular.after(items[wanted], times[wanted])
        self.newcomer_scores = popular_scores(self.popular.counts, self.popularity)
        if channels.recent is not None:
            channels.recent.observe(items[wanted], times[wanted])
        if channels.memory is not None and observed.tables is not None:
            self._transitions = observed.transitions
            channels.memory.load(observed.tables)
        self._frozen = None
        self._observed |= np.bincount(items, minlength=len(self.popularity)) > 0
        self.recommendable |= self._observed
        self.found_by_query |= self._observed
        if self.retrieval is not None:
            self.retrieval.observed(np.unique(items))

    @torch.inference_mode()
    def interests(self, history: History, now: int | None = None) -> Interests:
        """Which events weigh in each branch, how the gate mixes them, and what each branch alone is after; now: ms."""
        if not len(history):
            none, nobody = np.zeros(0, np.float32), np.zeros(0, np.int64)
            return Interests(none, none, float("nan"), nobody, nobody, {})
        _, interest, last = self._read([history], None if now is None else np.array([now], np.int64))
        length = int(last[0, 1]) + 1
        long, short = np.zeros(len(history), np.float32), np.zeros(len(history), np.float32)
        long[-length:] = interest.attention_long[0, 0, :length].cpu().numpy()
        window = interest.attention_short[0, 0].cpu().numpy()
        reach = min(length, len(window))
        short[-reach:] = window[-reach:]
        nearest = []
        config = self.model.config
        for name, branch in ((config.long_branch, interest.long), (config.short_branch, interest.short)):
            if name == "none":
                nearest.append(np.zeros(0, np.int64))
                continue
            scores = (branch[0, 0] @ self._vectors.T).cpu().numpy()
            scores[~self.recommendable] = -np.inf
            nearest.append(self.top_k(scores[None], NEAREST)[0][0])
        weights = dict(zip(self.model.channels.names, interest.weights[0, 0].tolist(), strict=True))
        return Interests(long, short, float(interest.gate[0, 0].mean()), nearest[0], nearest[1], weights)

    @torch.inference_mode()
    def explain(
        self, history: History, rows: np.ndarray, query: np.ndarray | None = None, now: int | None = None
    ) -> Reasons:
        """The parts of the scores that `score` gives distinct catalogue rows [N] for one request.

        query: [D] float32 normalised encoder vector; now: ms. See explain.SHARES for what each share is.
        """
        found = {name: np.zeros(len(rows), np.float32) for name in SHARES}
        through = np.zeros((len(history), len(rows)), np.float32)
        if len(history):
            batch, interest, last = self._read([history], None if now is None else np.array([now], np.int64))
            columns = torch.from_numpy(rows).to(self._device)
            parts = shares(self.model, batch, interest, self._vectors, last, columns)
            found |= {name: part[0].cpu().numpy() for name, part in parts.items()}
            weights = interest.weights[0, 0]
            said = by_event(self.model.channels, batch.items[0], weights, columns).cpu().numpy()
            through[len(history) - len(said) :] = said
        elif query is None:
            found["popularity"] = self.newcomer_scores[rows]
        if query is not None:
            if self.text_vectors is None:
                raise ValueError("this model has no item texts, so it cannot answer a query")
            found["query"] = self.text_vectors[rows] @ query / QUERY_TEMPERATURE
        return Reasons(found, through)

    @torch.inference_mode()
    def judge(self, histories: Sequence[History], items: np.ndarray) -> Judgement:
        """What each owner of B histories, none empty, would make of N catalogue rows of their own, `items` [B, N]."""
        interest = self._read(list(histories), None)[1]
        rows = torch.from_numpy(items).to(self._device)
        user = interest.user.expand(-1, rows.shape[1], -1)  # [B, N, dim]
        ratings = clicks = None
        if self.model.rating_head is not None:
            ratings = self.model.rate(user, rows, self._vectors).cpu().numpy()
        if self.model.click_head is not None:
            clicks = self.model.click_probability(user, rows, self._vectors).cpu().numpy()
        return Judgement(ratings, clicks)

    @torch.inference_mode()
    def disagreement(self, histories: Sequence[History]) -> np.ndarray:
        """How far apart the branches are after each history: 1 - cos(long, short). [B] float32, NaN without history."""
        out = np.full(len(histories), np.nan, np.float32)
        rows = [row for row, history in enumerate(histories) if len(history)]
        if rows:
            interest = self._read([histories[row] for row in rows], None)[1]
            cosine = torch.cosine_similarity(interest.long[:, 0], interest.short[:, 0], dim=-1)
            out[rows] = (1 - cosine.clamp(-1, 1)).cpu().numpy()
        return out

    def similar(self, item: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items whose vectors have the highest cosine with that of `item`: rows and cosines, best first."""
        norms = np.linalg.norm(self.item_vectors, axis=1).clip(min=1e-9)
        cosine = (self.item_vectors @ self.item_vectors[item]) / (norms * norms[item])
        cosine[~self.recommendable] = -np.inf
        rows, scores = self.top_k(cosine[None].astype(np.float32), k, [np.array([item])])
        return rows[0][rows[0] >= 0], scores[0][rows[0] >= 0]
