"""What a sceptical reader should know of how the figures were made, as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from springtide.evaluation.ranking import WARM
from springtide.evaluation.series import label_of


def notes_on(body: Mapping[str, Any]) -> list[str]:
    """What a sceptical reader should know, as sentences."""
    part = body["part"]
    seen = "items already in the history are left out" if body["exclude_seen"] else "items already seen may come again"
    asked = "training and validation events" if part == "test" else "training events"
    fitted = "training and validation events" if body["refit"] else "the training part alone"
    notes = [
        f"Every scorer ranks the whole catalogue of {body['catalogue']:,} items, without sampling; {seen}; equal "
        "scores rank in catalogue order.",
        f"The baselines are fitted on {fitted}, as the model is, and all scorers are asked with the same histories: "
        f"{asked}.",
        f"{_on_tuning(body)} The best baseline is the one with the highest NDCG@10 on the {part} part itself, which "
        "favours the baselines.",
        f"Intervals are percentile bootstraps over users with {body['bootstrap']:,} resamples; ratios and differences "
        "are paired, that is, resampled over the same users.",
        "With one target per user, recall@K equals HR@K and precision@K is HR@K / K.",
    ]
    if part == "valid":
        notes.append(
            "These are validation figures: the model's stopping point and the baselines' settings were chosen on them, "
            "so they flatter every scorer."
        )
    if body["split"] == "temporal":
        kind = (
            "users and items with training events" if body["headline"] == WARM else "all users, as hardly any is warm"
        )
        notes.append(
            f"Headline figures are over {kind}; the target is a user's first event after the cut, and the figures for "
            "all targets count everything the user took after it. Coverage counts every user's list."
        )
    if body["repeated_targets"] and body["exclude_seen"]:
        notes.append(
            f"{body['repeated_targets']:,} targets are already in their user's history. As seen items are left out, "
            "they can only be missed; they stay in the figures, for every scorer alike."
        )
    if body["new_item_targets"]:
        learned = "training or validation" if body["refit"] else "training"
        notes.append(
            f"{body['new_item_targets']:,} targets have no {learned} event, so no baseline can rank them by counting."
        )
    notes += _on_lists(body) + _on_replay(body) + _on_ties(body)
    for name, fit in body["baseline_settings"].items():
        if fit["settings"]:
            told = ", ".join(f"{k} {'endless' if v is None else v}" for k, v in fit["settings"].items())
            notes.append(f"{label_of(name)} settings: {told}.".replace("_", " "))
    return notes


def _on_tuning(body: Mapping[str, Any]) -> str:
    if any(fit["validation_ndcg@10"] is not None for fit in body["baseline_settings"].values()):
        return "Baseline settings are chosen on the validation part (NDCG@10)."
    return "The validation part asks no user with a history, so the baselines have the settings they begin with."


def _on_lists(body: Mapping[str, Any]) -> list[str]:
    """What the figures beyond accuracy mean. They are over the lists of every user."""
    told = ["Novelty@10 is the mean of -log2 of an item's share of all training events, in bits: higher is rarer."]
    if "diversity@10" in body["model"]:
        kind = "Jaccard similarity of the category sets" if body["diversity_of"] == "categories" else "cosine"
        of = "items" if body["diversity_of"] == "categories" else "the model's item vectors"
        told.append(f"Diversity@10 is 1 minus the mean {kind} over all pairs of {of} in a list.")
    return [" ".join(told)]


def _on_replay(body: Mapping[str, Any]) -> list[str]:
    replay = body["prequential"]
    if not replay:
        return []
    notes = [
        "In the replay a figure is the mean over events, and its interval draws users with all their events. Frozen, "
        "every request comes at the cut with the history as of then, and what was taken since is a candidate still; "
        "revealed, it comes at the event with all that the user did before.",
    ]
    if "live" in replay["all"]["modes"]:
        notes.append(
            "Counting everybody's events means that the model's counts and popularity take in all events after the "
            f"cut, also of users not asked about, {replay['chunk']} at a time; no weight is trained."
        )
    if replay["skipped_repeats"]:
        notes.append(
            f"{replay['skipped_repeats']:,} events of these users repeat an item of their history; as seen items are "
            "left out they are revealed, but nobody is asked about them."
        )
    return notes


def _on_ties(body: Mapping[str, Any]) -> list[str]:
    ties = body["ties"]
    if not ties.get("scorers"):
        return []
    swapped = (
        "; where a user's validation and test target have the same time, each is the target half of the time and the "
        "other one is history"
        if ties["swapped_with_validation"]
        else ""
    )
    return [
        "Other orders of ties: events of one user with equal times are shuffled among themselves within the training, "
        f"the validation and the test part{swapped}. Neither the model nor the baseline is trained again, so no "
        "training event becomes a target: it would have been learnt. Training on another order is not tried."
    ]
