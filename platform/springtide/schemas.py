"""The Arrow schema of every table that passes between stages, asserted at each boundary.

Timestamps are int64 milliseconds since 1970 UTC. An item is known outside by its string `item_id` and inside by its
catalogue row (`item`, from 0, in the order of the items table). Action 0 means "unknown", so vocabularies start at 1.
"""

from __future__ import annotations

import pyarrow as pa

from springtide.errors import SpringtideError

TRAIN, VALID, TEST = 0, 1, 2  # values of `part`
PARTS = {"train": TRAIN, "valid": VALID, "test": TEST}

EVENTS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("action", pa.string()),
        ("rating", pa.float32()),  # null: none given
        ("position", pa.int32()),  # rank in the user's history, from 0
        ("part", pa.int8()),
        ("file", pa.int32()),  # index into report.json's files
        ("row", pa.int64()),  # row in that file, from 1
    ]
)

ITEMS = pa.schema(
    [
        ("item", pa.int32()),
        ("item_id", pa.string()),
        ("title", pa.string()),  # "" if none
        ("categories", pa.list_(pa.string())),
        ("text", pa.string()),  # what the encoder reads; "" if none
        ("events", pa.int64()),  # training events
    ]
)

# One row per user, oldest event first.
SEQUENCES = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("actions", pa.list_(pa.int32())),
        ("ratings", pa.list_(pa.float32())),  # NaN: none given
        ("timestamps", pa.list_(pa.int64())),
        ("parts", pa.list_(pa.int8())),
        ("targets", pa.list_(pa.bool_())),  # may this event be predicted?
    ]
)

QUARANTINE = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("content", pa.string())])

VECTORS = pa.schema([("item_id", pa.string()), ("vector", pa.list_(pa.float32()))])

# Events that came while a model was served, in the order of their arrival.
EXPORTED = pa.schema(
    [
        ("event_id", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("action", pa.string()),  # null: none given
        ("rating", pa.float64()),
    ]
)

RECOMMENDATIONS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())]
)


def check_schema(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return `table` if its columns are exactly those of `schema`, else raise SpringtideError naming the difference."""
    if table.schema.equals(schema):
        return table
    expected = {f.name: str(f.type) for f in schema}
    found = {f.name: str(f.type) for f in table.schema}
    wrong = [f"{n}: {expected.get(n, 'not expected')} expected, {found.get(n, 'absent')} found"
             for n in {**expected, **found} if expected.get(n) != found.get(n)]  # fmt: skip
    raise SpringtideError(
        f"{where} does not have the expected columns ({'; '.join(wrong) or 'order differs'}); run the stage before it"
    )
