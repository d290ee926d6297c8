"""Names in a Serve configuration that nothing has: Springtide knows actions, categories and items only by the log.

None of them is a fault: an item may have been added since, and an action come tomorrow. So `deploy` tells and goes on.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from springtide.errors import SpringtideError
from springtide.serving.options import ScorerOptions
from springtide.serving.policies import Policies
from springtide.serving.tokens import open_tokens

Json = dict[str, Any]
TOLD = 5  # names of one setting; further ones are counted


def named_in_vain(config: Json, bundle: Path) -> list[str]:
    """What a linted and filled-in configuration names in vain, as sentences. bundle: the folder of the primary.

    A bundle that cannot be read, as while another one takes its place, is not looked at.
    """
    found: list[str] = []
    for app in config["applications"]:
        auth = (app.get("args") or {}).get("auth") or {}
        if auth.get("tokens_file"):
            try:
                open_tokens(auth["tokens_file"], None)
            except SpringtideError as error:
                found.append(f"{error}, here at least; every node with an Ingress needs it")
        for part in app["deployments"]:
            if part["name"] == "Scorer":
                options = ScorerOptions.model_validate(part["user_config"])
                with suppress(OSError, ValueError, KeyError, pa.ArrowException):
                    found += _of_policies(options.policies, bundle)
    return found


def _of_policies(policies: Policies, bundle: Path) -> Iterator[str]:
    of_actions = {"action_weights": policies.action_weights, "seen_actions": policies.seen_actions or ()}
    of_categories = {
        "categories": policies.categories,
        "exclude_categories": policies.exclude_categories,
        "caps.categories": policies.caps.categories,
    }
    of_items = {"allow_items": policies.allow_items or (), "block_items": policies.block_items}
    if any(of_actions.values()):
        known = json.loads((bundle / "config.json").read_text(encoding="utf-8"))["actions"][1:]  # the first: unknown
        yield from _unheard(of_actions, known, "action of the log", known)
    if any(of_categories.values()) or any(of_items.values()):
        items = pq.read_table(bundle / "items.parquet", columns=["item_id", "categories"])
        categories = {category for some in items["categories"].to_pylist() for category in some or ()}
        yield from _unheard(of_categories, categories, "category of the trained catalogue", categories)
        # An id that is like another one says nothing, and comparing it with a million of them takes minutes.
        yield from _unheard(of_items, set(items["item_id"].to_pylist()), "item of the trained catalogue")


def _unheard(
    settings: Mapping[str, Collection[str]], known: Collection[str], kind: str, near: Collection[str] = ()
) -> Iterator[str]:
    for setting, names in settings.items():
        unknown = [name for name in names if name not in known]
        for name in unknown[:TOLD]:
            meant = difflib.get_close_matches(name, near, n=1)
            yield f"policies.{setting}: {name} is no {kind}{f'; did you mean {meant[0]}?' if meant else ''}"
        if len(unknown) > TOLD:
            yield f"policies.{setting}: and {len(unknown) - TOLD} more that are no {kind}"
