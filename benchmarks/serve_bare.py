"""The yardstick of benchmarks/serve.py: one bundle behind FastAPI and uvicorn in one process, as one writes it by hand.

    python benchmarks/serve_bare.py BUNDLE PORT

Answers POST /v1/recommend by history only: no users, no event log, no queries, no filters, no batching, no model swap.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from springtide.bundle import load_bundle


class Event(BaseModel):
    """One event of a history."""

    item_id: str
    timestamp: int | None = None
    action: str | None = None
    rating: float | None = None


class Request(BaseModel):
    """The part of the contract that the benchmark uses."""

    history: list[Event] = Field(min_length=1, max_length=1_000)
    k: int = Field(10, ge=1, le=1_000)


def create(bundle_path: str) -> FastAPI:
    bundle = load_bundle(bundle_path)
    recommender, exclude_seen = bundle.recommender, bundle.settings.data.exclude_seen
    label = f"{bundle.settings.name}@{bundle.version}"
    app = FastAPI()

    # A plain function runs in the thread pool: torch and numpy release the lock, so requests overlap on several cores.
    @app.post("/v1/recommend")
    def recommend(request: Request) -> Any:
        history, _ = recommender.history([event.model_dump() for event in request.history])
        scores = recommender.score([history])
        rows, values = recommender.top_k(scores.logits, request.k, [history.items] if exclude_seen else None)
        items = [
            {"item_id": recommender.item_ids[row], "score": round(value, 6), "title": recommender.titles[row]}
            for row, value in zip(rows[0].tolist(), values[0].tolist(), strict=True)
            if row >= 0
        ]
        short = float(scores.gate_short[0])
        gate = {"long": 1 - short, "short": short}
        return JSONResponse({"items": items, "model": label, "source": "history", "gate": gate})

    @app.get("/readyz")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvicorn.run(create(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), access_log=False, log_level="warning")
