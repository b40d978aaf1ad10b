"""What the rest of the coordinator asks of the ledger and writes into it, by name: nobody else speaks SQL.

Questions are single transactions. What must change together goes through one `Transaction`, from
`Ledger.write`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from sqlalchemy import Connection, Table, bindparam, delete, insert, update

from rankfleet.federated.wire.states import ENDED, HELD, AnswerState, JobState, VersionState

from . import tables
from .database import Row, Store, text


class Transaction:
    """Several changes that come into force together, or not at all."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def insert(self, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows as they are."""
        if rows:
            self._connection.execute(insert(table), [dict(r) for r in rows])

    def open_round(self, job: str, number: int, opened: float, expected_s: float) -> None:
        """A round begins, at `opened` (seconds since 1970)."""
        row = {"job": job, "number": number, "state": "open", "opened": opened, "expected_s": expected_s}
        self.insert(tables.rounds, [row])

    def close_round(self, job: str, number: int, closed: float, info: Mapping[str, Any]) -> None:
        """A round is over; `info` is its line in tables and plots."""
        table = tables.rounds
        where = (table.c.job == job, table.c.number == number)
        self._connection.execute(
            update(table).where(*where).values(state="closed", closed=closed, info=text(info))
        )

    def forget_round(self, job: str, number: int) -> None:
        """A round that nobody could answer, and its assignments: it is opened once more."""
        for table, column in (
            (tables.rounds, tables.rounds.c.number),
            (tables.assignments, tables.assignments.c.round),
        ):
            self._connection.execute(delete(table).where(table.c.job == job, column == number))

    def received(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Updates that lie on disk: `job`, `round`, `device`, `digest`, `telemetry`, `seconds`, `resumed`
        of each."""
        if not rows:
            return
        table = tables.assignments
        key, values = ("job", "round", "device"), ("digest", "telemetry", "seconds", "resumed")
        change = update(table).where(*(table.c[k] == bindparam(f"of_{k}") for k in key))
        change = change.values(state="received", **{k: bindparam(f"new_{k}") for k in values})
        bound = [{f"of_{k}": r[k] for k in key} | {f"new_{k}": r[k] for k in values} for r in rows]
        self._connection.execute(change, bound)

    def settle(self, job: str, number: int, folded: Sequence[Sequence[Any]], oldest: int) -> None:
        """Assignments after a round: `folded` ([device, round] each) are counted, whoever has not answered
        is late, and what lies there from the round `oldest` or before is dropped."""
        a = tables.assignments
        if folded:
            key = (
                a.c.job == job,
                a.c.round == bindparam("of"),
                a.c.device == bindparam("who"),
                a.c.state == "received",
            )
            counted = update(a).where(*key).values(state="counted", folded=number)
            self._connection.execute(counted, [{"who": device, "of": of} for device, of in folded])
        silent = (a.c.job == job, a.c.round == number, a.c.state == "assigned")
        self._connection.execute(update(a).where(*silent).values(state="late"))
        stale = (a.c.job == job, a.c.round <= oldest, a.c.state == "received")
        dropped = update(a).where(*stale).values(state="dropped", reason="it came too late to be folded")
        self._connection.execute(dropped)

    def record_version(self, job: str, number: int, digest: str, created: float) -> None:
        """A version whose files are on disk; in the place of one of that number, if its closing was cut
        off."""
        table = tables.versions
        self._connection.execute(delete(table).where(table.c.job == job, table.c.number == number))
        row = {"job": job, "number": number, "state": "candidate", "digest": digest, "created": created}
        self.insert(table, [row])

    def judge_version(self, job: str, number: int, state: VersionState, metrics: Mapping[str, Any]) -> None:
        """What devices measured of a version, and what follows."""
        table = tables.versions
        where = (table.c.job == job, table.c.number == number)
        self._connection.execute(update(table).where(*where).values(state=state, metrics=text(metrics)))

    def add_bytes(self, counts: Mapping[str, int], seen: float) -> None:
        """Payload that devices sent since the last time: device → bytes."""
        if counts:
            table = tables.devices
            change = update(table).where(table.c.id == bindparam("who"))
            change = change.values(bytes_in=table.c.bytes_in + bindparam("more"), seen=seen)
            self._connection.execute(change, [{"who": device, "more": n} for device, n in counts.items()])


class Ledger(Store):
    """The ledger's questions, by what they are about: jobs, rounds, answers of devices, versions,
    operators."""

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Changes that come into force together."""
        with self.engine.begin() as connection:
            yield Transaction(connection)

    # jobs
    def job(self, job: str) -> Row | None:
        """The row of a job."""
        return self.row(tables.jobs, id=job)

    def jobs(self, state: JobState | Literal[""] = "") -> list[Row]:
        """Jobs in the order of submission, all or those in one state."""
        rows = self.rows(tables.jobs, **_where("state", state))
        return sorted(rows, key=lambda r: int(r["number"]))

    def open_jobs(self) -> list[Row]:
        """Jobs that run or wait for their turn, in the order of submission."""
        return [r for r in self.jobs() if r["state"] not in (*ENDED, HELD)]

    def add_job(self, name: str, content: str) -> str:
        """A new job, held, under `name` and the next number; returns its id."""
        number = 1 + max((int(r["number"]) for r in self.rows(tables.jobs, "number")), default=0)
        job = f"{name}-{number}"
        self.add(tables.jobs, id=job, text=content, state=HELD, created=time.time(), number=number)
        return job

    def remove_job(self, job: str) -> None:
        """A job that was refused while it was submitted."""
        self.remove(tables.jobs, id=job)

    def set_job(
        self, job: str, state: JobState, *, before: JobState | Literal[""] = "", reason: str | None = None
    ) -> bool:
        """Another state, if there is such a job and it is in the state `before` (where one is given)."""
        where = {"id": job, **({"state": before} if before else {})}
        return bool(
            self.change(tables.jobs, where, state=state, **({} if reason is None else {"reason": reason}))
        )

    def events(self, job: str) -> list[Row]:
        """What happened, oldest first."""
        return self.rows(tables.events, job=job)

    # rounds
    def round(self, job: str, number: int) -> Row | None:
        """The row of a round."""
        return self.row(tables.rounds, job=job, number=number)

    def rounds(self, job: str) -> list[Row]:
        """All rounds of a job, oldest first."""
        return self.rows(tables.rounds, job=job)

    def newest_rounds(self) -> dict[str, int]:
        """Job → its newest round, of all jobs at once."""
        return {r["job"]: int(r["number"]) for r in self.rows(tables.rounds, "job", "number")}

    def begin_closing(self, job: str, number: int, folding: Sequence[Sequence[Any]]) -> None:
        """Which updates ([device, round] each) go into the version that this round makes: decided once."""
        where = {"job": job, "number": number}
        self.change(tables.rounds, where, state="closing", folding=text([list(f) for f in folding]))

    # what devices answered
    def answer(self, job: str, number: int, device: str) -> Row | None:
        """One device's assignment of a round, and what came of it."""
        return self.row(tables.assignments, job=job, round=number, device=device)

    def answers(
        self, job: str, number: int | None = None, *columns: str, state: AnswerState | Literal[""] = ""
    ) -> list[Row]:
        """Assignments of a round, or of the whole job, and what came of them: those in one state, or all."""
        where = {} if number is None else _where("round", number)
        return self.rows(tables.assignments, *columns, job=job, **where, **_where("state", state))

    def answers_since(
        self, job: str, number: int, *columns: str, state: AnswerState | Literal[""] = ""
    ) -> list[Row]:
        """The same for this round and all later ones."""
        return self.rows(tables.assignments, *columns, since=number, job=job, **_where("state", state))

    def refuse(
        self, job: str, number: int, device: str, reason: str, *, before: AnswerState | Literal[""] = ""
    ) -> bool:
        """An answer that is not used, with the reason; `before`: only from that state."""
        where = {"job": job, "round": number, "device": device, **({"state": before} if before else {})}
        return bool(self.change(tables.assignments, where, state="refused", reason=reason))

    def drop(self, job: str, number: int, device: str, reason: str) -> None:
        """An update that came and goes into no version, with the reason."""
        where = {"job": job, "round": number, "device": device, "state": "received"}
        self.change(tables.assignments, where, state="dropped", reason=reason)

    def failed(
        self, job: str, number: int, device: str, state: AnswerState, reason: str, code: str, seconds: float
    ) -> None:
        """A device could not carry out its assignment, or would not."""
        where = {"job": job, "round": number, "device": device}
        telemetry = text({"code": code})
        self.change(
            tables.assignments, where, state=state, reason=reason, telemetry=telemetry, seconds=seconds
        )

    # versions
    def version(self, job: str, number: int) -> Row | None:
        """The row of a version."""
        return self.row(tables.versions, job=job, number=number)

    def versions(self, job: str, state: VersionState | Literal[""] = "") -> list[Row]:
        """Versions of a job, oldest first, all or those in one state."""
        return self.rows(tables.versions, job=job, **_where("state", state))

    def set_version(self, job: str, number: int, state: VersionState) -> None:
        """What an operator says of a version."""
        self.change(tables.versions, {"job": job, "number": number}, state=state)

    # devices, certificates, operators
    def set_device(self, device: str, **values: Any) -> None:
        """Change a device's row."""
        self.change(tables.devices, {"id": device}, **values)

    def invite(self, device: str, link_key: bytes) -> None:
        """A row without a past for a device that is to come."""
        fresh = {"public_key": b"", "state": "invited", "hello": "{}", "seen": 0.0, "bytes_in": 0, "note": ""}
        self.put(tables.devices, {"id": device}, link_key=link_key, **fresh)

    def device_row(self, device: str) -> Row | None:
        """The row of a device."""
        return self.row(tables.devices, id=device)

    def device_rows(self) -> list[Row]:
        """Every device that was ever invited."""
        return self.rows(tables.devices)

    def claim(self, device: str) -> Row | None:
        """The open invitation of a device."""
        return self.row(tables.claims, device=device)

    def set_claim(self, device: str, expires: float) -> None:
        """An invitation, in the place of the one before."""
        self.put(tables.claims, {"device": device}, expires=expires)

    def certificates(self, device: str = "") -> list[Row]:
        """Certificates of one device, or all."""
        return self.rows(tables.certificates, **_where("device", device))

    def add_certificate(self, serial: str, device: str, begins: float, ends: float) -> None:
        """A certificate that was made."""
        self.add(tables.certificates, serial=serial, device=device, begins=begins, ends=ends)

    def remove_certificate(self, serial: str) -> None:
        """One that ended long ago."""
        self.remove(tables.certificates, serial=serial)

    def revoke_certificates(self, device: str, at: float) -> int:
        """All that a device has are void from `at` on; returns how many there were."""
        return self.change(tables.certificates, {"device": device, "revoked": 0.0}, revoked=at)

    def add_audit(self, operator: str, action: str, content: str) -> None:
        """A line that stays."""
        self.add(tables.audit, at=time.time(), operator=operator, action=action, text=content)

    def audit(self, most: int) -> list[Row]:
        """The newest lines, oldest of them first."""
        return self.rows(tables.audit)[-most:]

    def add_signature(self, job: str, key: bytes, signature: bytes) -> None:
        """An operator's signature over a job."""
        self.put(tables.signatures, {"job": job, "key": key}, signature=signature, at=time.time())

    def signatures(self, job: str) -> list[tuple[bytes, bytes]]:
        """(key, signature) of everybody who signed a job."""
        return [(bytes(r["key"]), bytes(r["signature"])) for r in self.rows(tables.signatures, job=job)]

    # the whole, for backups
    def everything(self) -> dict[str, list[dict[str, Any]]]:
        """Table → rows."""
        return {t.name: [dict(r) for r in self.rows(t)] for t in tables.meta.sorted_tables}

    def fill(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Rows of a backup into empty tables; columns that this version does not know are left out."""
        with self.write() as tx:
            for table in tables.meta.sorted_tables:
                known = set(table.c.keys())
                if table is not tables.facts:
                    kept = [{k: v for k, v in r.items() if k in known} for r in rows.get(table.name, [])]
                    tx.insert(table, kept)

    def set_epoch(self, epoch: int) -> None:
        """Another life of this coordinator."""
        self.put(tables.facts, {"name": "epoch"}, value=str(epoch))


def _where(column: str, value: Any) -> dict[str, Any]:
    """A condition on a column; none for an empty text."""
    return {} if value == "" else {column: value}
