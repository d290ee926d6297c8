"""Names in a Serve configuration that nothing has: Springtide knows actions, categories and items only by the log.

None of them is a fault, for an item may be added and an action come tomorrow, so `deploy` tells and goes on.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from springtide.errors import SpringtideError
from springtide.serving.options import ScorerOptions
from springtide.serving.tokens import open_tokens

Json = dict[str, Any]
TOLD = 5  # names of one setting; further ones are counted


def warnings(config: Json, actions: Collection[str], bundle: Path) -> Iterator[str]:
    """What a linted and filled-in configuration names in vain. actions: of the log; bundle: a folder with items."""
    for app in config["applications"]:
        auth = (app.get("args") or {}).get("auth") or {}
        if auth.get("tokens_file"):
            try:
                open_tokens(auth["tokens_file"], None)
            except SpringtideError as error:
                yield f"{error}, here at least; every node with an Ingress needs it"
        for part in app["deployments"]:
            if part["name"] == "Scorer":
                yield from _of_policies(ScorerOptions.model_validate(part["user_config"]), actions, bundle)


def _of_policies(options: ScorerOptions, actions: Collection[str], bundle: Path) -> Iterator[str]:
    policies = options.policies
    of_actions = {"action_weights": policies.action_weights, "seen_actions": policies.seen_actions or ()}
    of_categories = {
        "categories": policies.categories,
        "exclude_categories": policies.exclude_categories,
        "caps.categories": policies.caps.categories,
    }
    of_items = {"allow_items": policies.allow_items or (), "block_items": policies.block_items}
    yield from _unheard(of_actions, actions, "action of the log")
    if any(of_categories.values()) or any(of_items.values()):
        items = pq.read_table(bundle / "items.parquet", columns=["item_id", "categories"])
        known = {category for some in items["categories"].to_pylist() for category in some or ()}
        yield from _unheard(of_categories, known, "category of the catalogue")
        yield from _unheard(of_items, set(items["item_id"].to_pylist()), "item of the catalogue")


def _unheard(settings: Mapping[str, Collection[str]], known: Collection[str], kind: str) -> Iterator[str]:
    for setting, names in settings.items():
        unknown = [name for name in names if name not in known]
        for name in unknown[:TOLD]:
            near = difflib.get_close_matches(name, known, n=1)
            yield f"policies.{setting}: {name} is no {kind}{f'; did you mean {near[0]}?' if near else ''}"
        if len(unknown) > TOLD:
            yield f"policies.{setting}: and {len(unknown) - TOLD} more that are no {kind}"
