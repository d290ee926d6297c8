"""The settings section `data`, and what every section of the settings is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict, int)) else value


def _as_strings(value: Any) -> Any:
    values = _as_list(value)
    return [str(v) if type(v) is int else v for v in values] if isinstance(values, list) else values


def _some_text(values: list[str]) -> list[str]:
    if not values:
        raise ValueError("the list is empty; write something into it, or leave the setting out")
    if not all(value.strip() for value in values):
        raise ValueError("a value is empty; write something there, or leave it out")
    return values


Strings = Annotated[list[str], BeforeValidator(_as_strings), AfterValidator(_some_text)]
Column = str | int  # a name, or the position (from 0) in a file that has no header line
FileFormat = Literal["csv", "tsv", "jsonl", "parquet"]


class Section(BaseModel):
    """Base of every section: unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())


class EventColumns(Section):
    user_id: Column = "user_id"
    item_id: Column = "item_id"
    # Epoch seconds or milliseconds, or ISO-8601. null: there is none, and rows happened in the order of the log.
    timestamp: Column | None = "timestamp"
    action: Column | None = None
    rating: Column | None = None


class ColumnRule(Section):
    """A test on one source column. Exactly one of `matches`, `above` and `below` is given."""

    column: Column
    matches: str | None = None  # regular expression (RE2), anywhere in the text
    above: float | None = None  # strictly
    below: float | None = None

    @model_validator(mode="after")
    def _one_test(self) -> ColumnRule:
        if sum(v is not None for v in (self.matches, self.above, self.below)) != 1:
            raise ValueError("give exactly one of matches, above and below")
        try:
            pc.match_substring_regex(pa.array([""]), self.matches or "")
        except pa.ArrowInvalid as error:
            raise ValueError(f"matches is no regular expression that RE2 knows: {one_line(error)}") from None
        return self


class ActionRule(ColumnRule):
    action: str  # the action of the rows that pass the test; the first rule that fits a row wins


class EventSource(Section):
    paths: Strings  # files or folders, local (~ is your home) or a URI that pyarrow can open
    format: FileFormat | None = None  # guessed from the file name if absent
    columns: EventColumns = EventColumns()
    action: str | None = None  # a constant, for a source without the column
    action_rules: list[ActionRule] = []  # read the action off other columns
    keep: list[ColumnRule] = []  # rows that fail a rule are quarantined as "filtered"

    @model_validator(mode="after")
    def _one_action(self) -> EventSource:
        if self.action is not None and self.columns.action is not None:
            raise ValueError("give either action (a constant) or columns.action, not both")
        return self


class ItemColumns(Section):
    item_id: Column = "item_id"
    title: Column | None = None
    categories: Column | None = None


class ItemSource(Section):
    paths: Strings
    format: FileFormat | None = None
    columns: ItemColumns = ItemColumns()
    # Source columns whose values are joined with ". ", or one template such as "{title} by {author}".
    # Absent: title and categories.
    text: Strings | None = None
    category_separator: str = Field("|", min_length=1)
    keep: list[ColumnRule] = []  # descriptions that fail a rule are quarantined as "filtered"


class DataConfig(Section):
    events: Annotated[list[EventSource], BeforeValidator(_as_list)] = Field(min_length=1)
    items: ItemSource | None = None  # absent: the catalogue is the items of the log, without text
    split: Literal["leave_one_out", "temporal", "none"] = "leave_one_out"
    exclude_seen: bool = True  # never recommend what the user's history already holds
    # exact: rows equal in user, item, time, action and rating; user_item: keep the first row of each user, item, action
    deduplicate: Literal["exact", "user_item"] = "exact"
    min_user_events: int = Field(1, ge=1)  # k-core: users and items with fewer events are dropped,
    min_item_events: int = Field(1, ge=1)  # again and again until nothing changes
    target_actions: Strings | None = None  # only these are predicted and tested; others are context. Absent: all
    partitions: int = Field(8, ge=1, le=4096)  # hash partitions of users = Parquet files per table

    @model_validator(mode="after")
    def _all_have_times_or_none(self) -> DataConfig:
        if len({source.columns.timestamp is None for source in self.events}) > 1:
            raise ValueError(
                "some sources of events have columns.timestamp: null and some have times, so nobody can tell what came"
                " first; set it to null in all, and their rows follow one another as the sources are listed, or in none"
            )
        return self

    @property
    def timeless(self) -> bool:
        """Whether the log has no times, so that they are made up from the order of its rows."""
        return self.events[0].columns.timestamp is None
