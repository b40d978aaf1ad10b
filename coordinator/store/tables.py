"""The ledger's tables: what was decided and what arrived, one row for each."""

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, Text

meta = MetaData()
SCHEMA = 2
"""Rises when an older version could not read the tables any more; 2: operators, facts."""
devices = Table(
    "devices",
    meta,
    Column("id", String(64), primary_key=True),
    Column("link_key", LargeBinary),
    Column("public_key", LargeBinary),
    Column("state", String(16), default="invited"),
    Column("hello", Text, default="{}"),
    Column("seen", Float, default=0.0),
    Column("bytes_in", Integer, default=0),
    Column("note", Text, default=""),
)
claims = Table(
    "claims",
    meta,
    Column("device", String(64), primary_key=True),
    Column("expires", Float),
)
certificates = Table(
    "certificates",
    meta,
    Column("serial", String(48), primary_key=True),
    Column("device", String(64)),
    Column("begins", Float),
    Column("ends", Float),
    Column("revoked", Float, default=0.0),
)
jobs = Table(
    "jobs",
    meta,
    Column("id", String(96), primary_key=True),
    Column("text", Text),
    Column("state", String(16)),
    Column("created", Float),
    Column("reason", Text, default=""),
    Column("number", Integer),
)
rounds = Table(
    "rounds",
    meta,
    Column("job", String(96), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("state", String(16)),
    Column("opened", Float),
    Column("closed", Float),
    Column("folding", Text, default="[]"),
    Column("expected_s", Float, default=0.0),
    Column("info", Text, default="{}"),
)
assignments = Table(
    "assignments",
    meta,
    Column("job", String(96), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("state", String(16)),
    Column("body", LargeBinary),
    Column("arm", Text, default="{}"),
    Column("why", Text, default=""),
    Column("digest", String(64), default=""),
    Column("folded", Integer, default=-1),
    Column("reason", Text, default=""),
    Column("telemetry", Text, default="{}"),
    Column("seconds", Float, default=0.0),
    Column("sent_at", Float, default=0.0),
    Column("resumed", Integer, default=0),
)
versions = Table(
    "versions",
    meta,
    Column("job", String(96), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("state", String(16)),
    Column("digest", String(64)),
    Column("created", Float),
    Column("metrics", Text, default="{}"),
)
events = Table(
    "events",
    meta,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float),
    Column("job", String(96)),
    Column("device", String(64)),
    Column("text", Text),
)

facts = Table(
    "facts",
    meta,
    Column("name", String(32), primary_key=True),
    Column("value", Text),
)
"""`epoch`: which life of this coordinator it is; a restored one begins another. `schema`: the version of
these tables."""
signatures = Table(
    "signatures",
    meta,
    Column("job", String(96), primary_key=True),
    Column("key", LargeBinary(32), primary_key=True),
    Column("signature", LargeBinary),
    Column("at", Float),
)
audit = Table(
    "audit",
    meta,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float),
    Column("operator", String(64)),
    Column("action", String(16)),
    Column("text", Text),
)
