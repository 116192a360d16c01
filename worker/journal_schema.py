"""The journal's tables. Times are integer microseconds since 1970; JSON is as msgspec writes it."""

APPLICATION_ID = 0x53664A31  # "SfJ1"
MINIMUM_SQLITE = (3, 37, 0)  # STRICT tables

_V1 = """
CREATE TABLE journal (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    node TEXT NOT NULL,
    epoch TEXT NOT NULL,
    made_at INTEGER NOT NULL,
    clean INTEGER NOT NULL
) STRICT;
CREATE TABLE boots (
    epoch TEXT NOT NULL,
    boot TEXT NOT NULL,
    first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    opened_at INTEGER NOT NULL,
    PRIMARY KEY (epoch, boot)
) STRICT, WITHOUT ROWID;
CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY,
    subject TEXT NOT NULL,
    payload BLOB NOT NULL,
    headers TEXT
) STRICT;
-- One row for each acknowledged batch: marking every row of it would write all its payloads a second time.
CREATE TABLE acks (
    upto_seq INTEGER PRIMARY KEY,
    acked_at INTEGER NOT NULL
) STRICT;
CREATE TABLE commands (
    arrival INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    verb TEXT NOT NULL,
    container TEXT,
    digest TEXT NOT NULL,
    subject TEXT NOT NULL,
    stream_seq INTEGER NOT NULL,
    stream_time INTEGER,
    accepted_at INTEGER NOT NULL,
    deadline INTEGER,
    headers TEXT,
    completed_at INTEGER,
    body BLOB NOT NULL,
    result BLOB
) STRICT;
CREATE INDEX commands_open ON commands (stream_seq) WHERE completed_at IS NULL;
CREATE INDEX commands_done ON commands (completed_at) WHERE completed_at IS NOT NULL;
CREATE TABLE applied (
    container TEXT PRIMARY KEY,
    stream_seq INTEGER NOT NULL,
    stream_time INTEGER,
    applied_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX applied_by_time ON applied (applied_at);
CREATE TABLE rejections (
    stream_seq INTEGER NOT NULL,
    stream_time INTEGER NOT NULL,
    rejected_at INTEGER NOT NULL,
    PRIMARY KEY (stream_seq, stream_time)
) STRICT, WITHOUT ROWID;
CREATE INDEX rejections_by_time ON rejections (rejected_at);
CREATE TABLE containers (
    cid TEXT PRIMARY KEY,
    instance TEXT NOT NULL,
    record BLOB NOT NULL
) STRICT;
CREATE TABLE positions (
    stream TEXT PRIMARY KEY,
    position BLOB NOT NULL
) STRICT;
CREATE TABLE log_cursors (
    instance TEXT NOT NULL,
    stream TEXT NOT NULL,
    next_byte INTEGER NOT NULL,
    run INTEGER NOT NULL,
    eof_run INTEGER NOT NULL,
    PRIMARY KEY (instance, stream)
) STRICT, WITHOUT ROWID;
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT;
"""

MIGRATIONS: tuple[str, ...] = (_V1,)
"""Entry n brings a file of version n (`user_version`) to n + 1. A released entry never changes."""
