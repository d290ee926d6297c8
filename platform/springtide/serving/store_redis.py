"""The event log in Redis, shared by the nodes of a cluster."""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import LockError, RedisError
from redis.lock import Lock
from redis.retry import Retry

from springtide.errors import SpringtideError
from springtide.serving.redis_scripts import (
    APPEND,
    DIGITS,
    HISTORY,
    ITEMS_SINCE,
    PREFIX,
    PUT_ITEM,
    TRIM_LIVE,
    TRIM_SEEDED,
)
from springtide.serving.store_rows import (
    LAST_TIMESTAMP,
    REMOVAL_DELAY_MS,
    AddedItem,
    EventRow,
    HistoryRow,
    Retention,
    SeedRow,
    StoredItem,
    event_rows,
    merged,
    milliseconds,
)

log = logging.getLogger("springtide.serving")
# More than the threads of an Ingress, 64 for writes and 16 for reads: no read waits for a write to give its connection
# back. Opened as they are needed.
CONNECTIONS = 128
SEED_ROWS = 5_000  # in one step: Redis serves nobody else meanwhile
USERS_AT_ONCE = 500
TRIM_ROWS = 1_000  # of one user in one step
LOCK_S = 60.0  # a task whose process died is free again after this
EVICTING = "allkeys-"
PASSWORD_VARIABLE = "SPRINGTIDE_REDIS_PASSWORD"


class RedisStore:
    """A HistoryStore in one Redis database (not Redis Cluster: a call touches keys of several users).

    may_be_absent: a Redis that does not answer yet is no error here; every call says so until it comes.

    Guarantee with require_aof: Redis writes each command to its append-only file and calls fsync before it answers
    (appendonly yes, appendfsync always), so an acknowledged event survives `kill -9` of the server and a power cut. The
    server is asked when the store is opened, or, if it came later, before anything is acknowledged; weaker settings are
    refused, `everysec` too, which may lose the last second. A server that may evict keys to free memory is refused as
    well. A replica that takes over after a failure of its primary may lack the last events: replication is
    asynchronous, and nothing here waits for it.

    A password stands in the address or, out of sight of configurations, in the environment variable PASSWORD_VARIABLE.
    Every call ends within 2 * timeout_s: a connection that turns out to be dead is opened once more. A call of `append`
    that was repeated so may count events as known that it stored itself at its first try.
    """

    def __init__(
        self,
        url: str,
        retention: Retention | None = None,
        *,
        timeout_s: float = 10.0,
        require_aof: bool = True,
        may_be_absent: bool = False,
    ) -> None:
        self.retention = retention or Retention()
        parts = urlsplit(url)
        self._name = f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}{parts.path}"  # without a password
        pool = redis.BlockingConnectionPool.from_url(
            url,
            password=os.environ.get(PASSWORD_VARIABLE),  # one in the address goes before it
            max_connections=CONNECTIONS,
            timeout=timeout_s,  # wait for a free connection
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        self._closed = False
        self._redis: Any = redis.Redis(connection_pool=pool)  # its types allow for clients that decode every answer
        self._append = self._redis.register_script(APPEND)
        self._history = self._redis.register_script(HISTORY)
        self._trim_live = self._redis.register_script(TRIM_LIVE)
        self._trim_seeded = self._redis.register_script(TRIM_SEEDED)
        self._put_item = self._redis.register_script(PUT_ITEM)
        self._items_since = self._redis.register_script(ITEMS_SINCE)
        self._to_check = require_aof
        try:
            with self._told():
                self._redis.ping()
            self._check_durable()
        except SpringtideError as error:
            if not (may_be_absent and _is_absence(error.__cause__)):
                raise
            log.error("%s; answers go on without it until it comes", error)

    def _check_durable(self) -> None:
        """Raises SpringtideError if it may lose events; asks once, and again as long as it would."""
        if self._to_check:
            self._ask_durable()
            self._to_check = False

    def _ask_durable(self) -> None:
        hint = "set it in redis.conf, or set require_aof: false if events may be lost"
        wanted = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
        try:
            found = self._redis.config_get(*wanted, "maxmemory", "maxmemory-policy")
        except redis.ResponseError as error:
            raise SpringtideError(
                f"the event log {self._name} does not tell its settings ({error}), so that it keeps every event cannot "
                "be checked; allow CONFIG GET, or set require_aof: false if you have checked it"
            ) from error
        except RedisError as error:
            raise self._refused(error) from error
        for name, value in wanted.items():
            if found.get(name) != value:
                raise SpringtideError(
                    f"the event log {self._name} has {name} {found.get(name)} and may lose events that it has "
                    f"acknowledged; it must be {value}: {hint}"
                )
        if str(found["maxmemory"]) != "0" and str(found["maxmemory-policy"]).startswith(EVICTING):
            raise SpringtideError(
                f"the event log {self._name} has maxmemory-policy {found['maxmemory-policy']} and may drop events when "
                f"its memory is full; it must be noeviction: {hint}"
            )

    # ---------------------------------------------------------------- live events
    def append(self, events: Sequence[dict[str, Any]]) -> int:
        rows = event_rows(events)
        arguments = [value for row in rows for value in (row[0], row[1], row[3], _packed(row))]
        with self._told():
            self._check_durable()
            return int(self._append(args=[milliseconds(), *arguments])) if rows else 0

    def since(self, cursor: int = 0, limit: int = 1000) -> tuple[list[dict[str, Any]], int]:
        # Events get their numbers and their places in the stream in one step, so none can appear behind one read.
        with self._told():
            rows = self._redis.xrange(PREFIX + "log", min=f"({cursor}", max="+", count=limit) if limit > 0 else []
        events = []
        for _, fields in rows:
            item_id, timestamp, action, rating = json.loads(fields[b"event"])
            events.append(
                {
                    "event_id": fields[b"event_id"].decode(),
                    "user_id": fields[b"user_id"].decode(),
                    "item_id": item_id,
                    "timestamp": timestamp,
                    "action": action,
                    "rating": rating,
                }
            )
        return events, int(rows[-1][0].split(b"-")[0]) if rows else cursor

    def cursor(self, latest: int) -> int:
        with self._told():
            return max(0, int(self._redis.get(PREFIX + "counter") or 0) - latest)

    def history(self, user_id: str, limit: int = 1000) -> list[dict[str, Any]]:
        limit, oldest = self.retention.most(limit), self.retention.oldest()

        def read(count: int) -> tuple[list[HistoryRow], list[HistoryRow]]:
            with self._told():
                seeded, live = self._history(args=[user_id, count, oldest])
            return _rows(seeded), _rows(live)

        return merged(read, limit)

    def version(self, user_id: str) -> int:
        with self._told(), self._redis.pipeline() as both:
            both.hget(PREFIX + "versions", user_id)
            both.get(PREFIX + "active")
            last, seed = both.execute()
        return int(last or 0) + (int(seed or 0) << 96)

    def count(self) -> int:
        with self._told():
            active = int(self._redis.get(PREFIX + "active") or 0)
            live = int(self._redis.xlen(PREFIX + "log"))
            return live + int(self._redis.get(f"{PREFIX}seeded-count:{active}") or 0)

    # ---------------------------------------------------------------- the imported log
    def seed(self, name: str, rows: Iterable[SeedRow]) -> int:
        with self._told(), self._alone("seed") as lock:
            assert lock is not None
            active = self._redis.get(PREFIX + "active")
            if active is not None and self._redis.hget(PREFIX + "names", active) == name.encode():
                return 0
            self._drop_unseen(lock)  # an import that was cut short leaves rows that nobody sees
            number = int(self._redis.incr(PREFIX + "last-seed"))
            self._redis.sadd(PREFIX + "seeds", number)
            imported, rest = 0, iter(rows)
            while chunk := list(islice(rest, SEED_ROWS)):
                self._import(number, imported, chunk)
                imported += len(chunk)
                lock.reacquire()
            with self._redis.pipeline() as swap:
                swap.hset(PREFIX + "names", str(number), name)
                swap.set(f"{PREFIX}seeded-count:{number}", imported)
                swap.set(PREFIX + "active", number)
                swap.execute()
            self._drop_unseen(lock)
            return imported

    def _import(self, number: int, first: int, chunk: list[SeedRow]) -> None:
        of_user: dict[str, dict[str, int]] = {}
        for place, (user_id, item_id, timestamp, action, rating) in enumerate(chunk, first):
            member = f"{place:0{DIGITS}d}{_packed(('', user_id, item_id, timestamp, action, rating))}"
            of_user.setdefault(user_id, {})[member] = timestamp
        with self._redis.pipeline() as step:
            for user_id, members in of_user.items():
                step.zadd(f"{PREFIX}seeded:{number}:{user_id}", members)
            step.sadd(f"{PREFIX}seeded-users:{number}", *of_user)
            step.execute()

    def _drop_unseen(self, lock: Lock) -> None:
        """Remove imported rows that are not of the log in place, some users at a time."""
        active = self._redis.get(PREFIX + "active")
        for number in self._redis.smembers(PREFIX + "seeds"):
            if number == active:
                continue
            name = number.decode()
            while users := self._redis.srandmember(f"{PREFIX}seeded-users:{name}", USERS_AT_ONCE):
                with self._redis.pipeline() as step:
                    step.unlink(*(f"{PREFIX}seeded:{name}:".encode() + user for user in users))
                    step.srem(f"{PREFIX}seeded-users:{name}", *users)
                    step.execute()
                lock.reacquire()
            with self._redis.pipeline() as step:
                step.delete(f"{PREFIX}seeded-count:{name}")
                step.hdel(PREFIX + "names", name)
                step.srem(PREFIX + "seeds", name)
                step.execute()

    # ---------------------------------------------------------------- retention
    def retain(self, now_ms: int | None = None) -> int:
        if self.retention == Retention():
            return 0
        now = milliseconds(now_ms)
        bounds = [self.retention.most(LAST_TIMESTAMP), self.retention.oldest(now)]
        with self._told(), self._alone("retain", wait=False) as lock:
            if lock is None:
                return 0
            removed, arrived = 0, now - REMOVAL_DELAY_MS
            users = (user for user, _ in self._redis.hscan_iter(PREFIX + "versions", count=USERS_AT_ONCE))
            while some := list(islice(users, USERS_AT_ONCE)):
                calls = [[user, *bounds, arrived, TRIM_ROWS] for user in some]
                while gone := self._in_one_trip(self._trim_live, calls):
                    removed += gone
                lock.reacquire()
            active = int(self._redis.get(PREFIX + "active") or 0)
            users = self._redis.sscan_iter(f"{PREFIX}seeded-users:{active}", count=USERS_AT_ONCE)
            while some := list(islice(users, USERS_AT_ONCE)):
                removed += self._in_one_trip(self._trim_seeded, [[active, user, *bounds] for user in some])
                lock.reacquire()
            return removed

    def _in_one_trip(self, script: Any, calls: list[list[Any]]) -> int:
        """The sum of what a script answers to several calls, each a step of its own."""
        with self._redis.pipeline(transaction=False) as trip:
            for arguments in calls:
                script(args=arguments, client=trip)
            return sum(int(answer) for answer in trip.execute())

    # ---------------------------------------------------------------- items added while serving
    def put_item(self, item: AddedItem, most: int | None = None) -> int | None:
        vector = None if item["vector"] is None else base64.b64encode(item["vector"]).decode()
        text = json.dumps({**item, "vector": vector}, ensure_ascii=False)
        with self._told():
            self._check_durable()
            revision = self._put_item(args=[item["item_id"], text, -1 if most is None else most])
        return None if revision is None else int(revision)

    def items_since(self, revision: int = 0, limit: int = 1000) -> list[StoredItem]:
        with self._told():
            rows = self._items_since(args=[revision, limit])
        return [_stored_item(int(number), json.loads(text)) for number, text in rows]

    def items_revision(self) -> int:
        with self._told():
            return int(self._redis.get(PREFIX + "item-counter") or 0)

    def identity(self) -> str:
        with self._told():
            if not self._redis.exists(PREFIX + "identity"):  # a replica takes no writes
                self._redis.set(PREFIX + "identity", secrets.token_hex(8), nx=True)
            return str(self._redis.get(PREFIX + "identity").decode())

    def close(self) -> None:
        self._closed = True
        self._redis.close()
        self._redis.connection_pool.disconnect()

    # ---------------------------------------------------------------- locks and refusals
    @contextmanager
    def _alone(self, task: str, wait: bool = True) -> Iterator[Lock | None]:
        """One process at a time does this task; None if one does and `wait` is not set."""
        lock = self._redis.lock(f"{PREFIX}{task}-lock", timeout=LOCK_S, sleep=0.1)
        if not lock.acquire(blocking=wait):
            yield None
            return
        try:
            yield lock
        finally:
            if lock.owned():
                lock.release()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Any refusal of Redis as a sentence."""
        if self._closed:
            raise SpringtideError(f"the event log {self._name} is closed")
        try:
            yield
        except LockError as error:
            raise SpringtideError(
                f"the event log {self._name}: another process took over the task that this one was slow at; {error}"
            ) from error
        except RedisError as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> SpringtideError:
        return SpringtideError(
            f"the event log {self._name} cannot be used: {_without_arguments(error)}; "
            "check that Redis runs there and accepts this client"
        )


def _is_absence(error: BaseException | None) -> bool:
    """Whether nobody answers, or one who still reads its files. Who refuses a password is there."""
    refused = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
    return isinstance(error, (redis.ConnectionError, redis.TimeoutError)) and not isinstance(error, refused)


def _without_arguments(error: Exception) -> str:
    """What went wrong, without the arguments of the command: these name users and their events."""
    told = str(error).rpartition(" of pipeline caused error: ")[2]  # redis-py writes the whole command before this
    return told.partition(", with args beginning with")[0]  # Redis, of a command that it does not know


def _rows(members: list[bytes]) -> list[HistoryRow]:
    """Of a sorted set, latest first, as rows, oldest first."""
    return [tuple(json.loads(member[DIGITS:])) for member in reversed(members)]


def _packed(row: EventRow) -> str:
    return json.dumps(row[2:], ensure_ascii=False, separators=(",", ":"))


def _stored_item(revision: int, fields: dict[str, Any]) -> StoredItem:
    vector = fields["vector"]
    return StoredItem(
        item_id=fields["item_id"],
        title=fields["title"],
        categories=fields["categories"],
        text=fields["text"],
        vector=None if vector is None else base64.b64decode(vector),
        encoder=fields.get("encoder"),
        revision=revision,
    )
