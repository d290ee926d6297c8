"""The lists that benchmarks/quality.py has compared: what a bundle recommends to the users whom `evaluate` judged.

    python benchmarks/quality_lists.py EXPERIMENT.yaml OUT.parquet [section.key=value ...]

Every user of the test part, their history up to it, the first 20 of the whole catalogue, as Parquet `user, items`. Not
what the job `recommend` writes, whose histories hold the test as well. Prints NDCG@10 over the headline users as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

import polars as pl

from springtide.bundle import load_bundle
from springtide.config import load_settings
from springtide.data.prepared import load_prepared
from springtide.evaluation.metrics import MRR_AT, user_metrics
from springtide.evaluation.ranking import ask_model, build_cases, flatten, headline_mask, rank_cases
from springtide.schemas import PARTS


def main() -> None:
    settings = load_settings(sys.argv[1], sys.argv[3:])
    prepared, bundle = load_prepared(settings.workspace), load_bundle(Path(settings.workspace) / "bundle")
    events = flatten(prepared.sequences(), prepared.items.num_rows)
    cases = build_cases(events, PARTS[settings.evaluate.part], settings.data.split)
    recommender, split = bundle.recommender, settings.data.split
    ranking = rank_cases(
        cases, lambda histories: ask_model(recommender, histories, split).logits, depth=MRR_AT,
        exclude_seen=settings.data.exclude_seen, batch_size=settings.evaluate.batch_size,
    )  # fmt: skip
    ids = recommender.item_ids
    users = [events.user_ids[int(user)].as_py() for user in cases.users]
    lists = [[ids[row] for row in rows if row >= 0] for rows in ranking.lists.tolist()]
    table = pl.DataFrame({"user": users, "items": lists}, schema={"user": pl.String, "items": pl.List(pl.String)})
    table.write_parquet(sys.argv[2])
    chosen, _ = headline_mask(cases)
    print(json.dumps({"ndcg@10": float(user_metrics(ranking.ranks, [10])["ndcg@10"][chosen].mean())}))


if __name__ == "__main__":
    main()
