"""The HTTP API on loopback that the CLI speaks, behind a token that lies beside the ledger, readable by the owner alone."""

import asyncio
import secrets
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from rankfleet.bandit.tuner import NoArm, Tuner
from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.federated.errors import ConfigError, RankfleetError
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.program.health import plain
from rankfleet.federated.trust.roster import decode_key, encode_key
from rankfleet.federated.wire.states import ENDED, HELD

from ..health import conditions
from ..jobs.spec import read_job
from ..operators.roster_in_force import Operators, role_for
from ..service import Service
from ..store import database


def _json(data: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), status=status, content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """A RankfleetError is an answer, with its hint."""
    if request.headers.get("Authorization") != f"Bearer {request.app[TOKEN]}" and request.path != "/health":
        return _json({"error": "the token is wrong", "hint": "use the data_dir of the running service"}, 401)
    try:
        if request.path != "/health":
            body = await request.read()
            role = role_for(request.method, request.path, _dry(request))
            await asyncio.to_thread(request.app[OPERATORS].allowed, request.method, request.path_qs, body, request.headers, role)
        answer: web.StreamResponse = await handler(request)
        return answer
    except RankfleetError as error:
        return _json({"error": str(error.args[0]), "hint": error.hint}, 400)


TOKEN: web.AppKey[str] = web.AppKey("token", str)
OPERATORS: web.AppKey[Operators] = web.AppKey("operators", Operators)


def _dry(request: web.Request) -> bool:
    """Is a job only to be looked at?"""
    return bool(request.query.get("dry"))


def _signed(request: web.Request) -> tuple[bytes, bytes]:
    """The operator's key and signature over the job itself. Raises ConfigError."""
    try:
        return decode_key(request.headers.get("X-Operator", ""), "the operator's key"), bytes.fromhex(request.headers["X-Job"])
    except (KeyError, ValueError):
        raise ConfigError("the job is not signed", "--key FILE, or RANKFLEET_KEY") from None


class Api:
    """Routes onto a service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.app = web.Application(middlewares=[_errors], client_max_size=4 << 20)
        self.app[TOKEN] = secrets.token_urlsafe(24)
        self.app[OPERATORS] = service.operators
        self.app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/jobs", self.jobs),
                web.post("/jobs", self.submit),
                web.post("/jobs/{job}/{verb}", self.verb),
                web.get("/jobs/{job}/text", self.text),
                web.get("/operators", self.operators),
                web.post("/operators", self.replace_roster),
                web.get("/jobs/{job}/rounds", self.rounds),
                web.get("/jobs/{job}/progress", self.progress),
                web.get("/devices", self.devices),
                web.post("/devices/{device}/invite", self.invite),
                web.post("/devices/{device}/revoke", self.revoke),
                web.post("/devices/{device}/{verb:suspend|resume}", self.pause_device),
                web.post("/devices/{device}/{what:logs|doctor}", self.bundle),
                web.get("/jobs/{job}/arms", self.arms),
                web.get("/jobs/{job}/versions", self.versions),
                web.post("/jobs/{job}/versions/{number}/{verb}", self.version_verb),
            ]
        )

    async def start(self, home: Path, port: int) -> web.AppRunner:
        """Listen on loopback and write `api.json`."""
        runner = web.AppRunner(self.app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        real = runner.addresses[0][1]
        write_atomic(home / "api.json", msgspec.json.encode({"url": f"http://127.0.0.1:{real}", "token": self.app[TOKEN]}), 0o600)
        return runner

    async def health(self, request: web.Request) -> web.Response:
        """Is the service up, and does it reach its broker?"""
        s = self.service
        return _json(
            {
                "ok": s.bus.connected.is_set(),
                "broker": s.broker_url,
                "problem": s.jobs.problem or getattr(s.bus, "problem", ""),
                "dropped": s.dropped,
                "repeated": s.repeated,
                "not_read": s.admission.dropped,
                "certificates_refused": s.enrolment.refused,
                "corrupt_chunks": s.uploads.corrupt,
                "job": s.jobs.runner.job if s.jobs.runner else "",
                "conditions": plain(conditions(s)),
            }
        )

    async def jobs(self, request: web.Request) -> web.Response:
        """All jobs."""
        ledger = self.service.ledger
        newest = ledger.newest_rounds()
        return _json(
            [
                {
                    "job": r["id"],
                    "state": r["state"],
                    "created": r["created"],
                    "reason": r["reason"],
                    "round": newest.get(r["id"]),
                }
                for r in ledger.jobs()
            ]
        )

    async def submit(self, request: web.Request) -> web.Response:
        """Validate a job whole; queue it unless `dry`. Answers with what each known device would get."""
        text = await request.text()
        plan = self.service.jobs.plan(read_job(text))
        preview = self.preview(plan)
        job, operators = "", self.service.operators
        if not _dry(request):
            signed = _signed(request) if operators.roster else None
            job = self.service.jobs.submit(text, signed)
        return _json({"job": job, "devices": preview, "lacks": operators.lacks(job, text) if job else 0})

    async def text(self, request: web.Request) -> web.Response:
        """A job as it was submitted, and who signed it."""
        job = request.match_info["job"]
        row = self.service.ledger.job(job)
        if row is None:
            raise ConfigError(f"no job `{job}`", "coordinator jobs")
        return _json({"text": row["text"], "signed": self.service.operators.agreed(job, row["text"])})

    async def operators(self, request: web.Request) -> web.Response:
        """The roster in force, and what was done."""
        roster = self.service.operators.roster
        people = {n: {"role": o.role, "key": encode_key(o.key)} for n, o in roster.operators.items()} if roster else {}
        trail = [dict(r) for r in self.service.ledger.audit(100)]
        return _json(
            {"fleet": self.service.config.fleet, "version": roster.version if roster else 0, "operators": people, "audit": trail,
             "approvals": roster.approvals if roster else 0}
        )  # fmt: skip

    async def replace_roster(self, request: web.Request) -> web.Response:
        """A new roster, signed by an admin of the one in force."""
        roster = self.service.operators.replace(await request.read())
        return _json({"version": roster.version, "operators": list(roster.operators)})

    def preview(self, plan: Plan) -> list[dict[str, Any]]:
        """Device → arm of the first round, or why there is none."""
        spec = plan.spec
        tuner = Tuner(
            plan.policy,
            plan.card,
            plan.modules,
            spec.arms,
            max_depth=plan.max_depth,
            length=spec.task.max_length,
            head=plan.head_size,
            wire_bits=plan.stack.wire_bits,
            seed=spec.seed,
        )
        rows, fleet = [], []
        for row in self.service.ledger.device_rows():
            device, reason = row["id"], self.service.devices.why_not(row["id"], plan)
            profile, said = self.service.devices.profile(device), self.service.devices.said(device)
            if not reason and profile and said:
                try:
                    tuner.join(device, profile, said.bits_ms)
                    tuner.feasible(device, profile, 0)
                    fleet.append((device, profile, 1.0))
                    continue
                except NoArm as error:
                    reason = str(error)
            rows.append({"device": device, "arm": "", "why": reason})
        for device, choice in tuner.choose(0, fleet).items() if fleet else ():
            rows.append({"device": device, "arm": choice.arm.text(), "why": choice.why})
        return sorted(rows, key=lambda r: r["device"])

    async def verb(self, request: web.Request) -> web.Response:
        """cancel, pause or resume."""
        job, verb = request.match_info["job"], request.match_info["verb"]
        row = self.service.ledger.job(job)
        if row is None:
            raise ConfigError(f"no job `{job}`", "coordinator jobs")
        if row["state"] in ENDED:
            raise ConfigError(f"job `{job}` is {row['state']}")
        if verb == "approve":
            agreed = self.service.operators.sign(job, *_signed(request))
            self.service.jobs.approved(job)
            return _json({"job": job, "done": verb, "signed": agreed, "lacks": self.service.operators.lacks(job, row["text"])})
        if row["state"] == HELD and verb in ("pause", "resume"):
            raise ConfigError(f"job `{job}` waits for operators to sign it", f"coordinator approve {job} --key FILE")
        if verb == "cancel":
            self.service.jobs.cancel(job)
        elif verb in ("pause", "resume"):
            self.service.ledger.set_job(job, "paused" if verb == "pause" else "running")
            self.service.changed()
        else:
            raise ConfigError(f"`{verb}` is not one of approve, cancel, pause, resume")
        return _json({"job": job, "done": verb})

    async def rounds(self, request: web.Request) -> web.Response:
        """Rounds of a job with every device's arm, state, loss, seconds; and events."""
        job, ledger = request.match_info["job"], self.service.ledger
        if ledger.job(job) is None:
            raise ConfigError(f"no job `{job}`", "coordinator jobs")
        found = []
        versions = {r["number"]: r for r in ledger.versions(job)}
        for row in ledger.rounds(job):
            version = versions.get(row["number"])
            found.append(
                {
                    "round": row["number"],
                    "state": row["state"],
                    "opened": row["opened"],
                    "closed": row["closed"],
                    "expected_s": row["expected_s"],
                    "info": database.read(row["info"]),
                    "version": database.read(version["metrics"]) if version else {},
                    "devices": self._assigned(job, row["number"]),
                }
            )
        events = [{"at": e["at"], "device": e["device"], "text": e["text"]} for e in ledger.events(job)]
        return _json({"rounds": found, "live": self.service.live, "events": events})

    async def progress(self, request: web.Request) -> web.Response:
        """When each round closed and how many updates it had: cheap to ask for again and again."""
        rows = self.service.ledger.rounds(request.match_info["job"])
        return _json([{"round": r["number"], "closed": r["closed"], **database.read(r["info"])} for r in rows])

    def _assigned(self, job: str, number: int) -> list[dict[str, Any]]:
        rows = self.service.ledger.answers(job, number)
        return [
            {
                "device": r["device"],
                "state": r["state"],
                "arm": database.read(r["arm"]),
                "why": r["why"],
                "seconds": r["seconds"],
                "reason": r["reason"],
                "resumed": r["resumed"],
                "telemetry": database.read(r["telemetry"]),
            }
            for r in rows
        ]

    async def devices(self, request: web.Request) -> web.Response:
        """The fleet."""
        self.service.flush()
        ends = self.service.enrolment.ends()
        return _json(
            [
                {**row, "certificate_ends": ends.get(row["device"]), "live": self.service.live.get(row["device"], {})}
                for row in self.service.devices.table()
            ]
        )

    async def invite(self, request: web.Request) -> web.Response:
        """A claim token."""
        device = request.match_info["device"]
        return _json({"device": device, "token": self.service.invite(device)})

    async def revoke(self, request: web.Request) -> web.Response:
        """Shut a device out."""
        device = request.match_info["device"]
        return _json({"device": device, "done": "revoke", "by_hand": self.service.revoke(device)})

    async def pause_device(self, request: web.Request) -> web.Response:
        """suspend or resume."""
        device, verb = request.match_info["device"], request.match_info["verb"]
        if verb == "suspend":
            self.service.suspend(device, "by an operator")
        else:
            self.service.resume(device)
        return _json({"device": device, "done": verb})

    async def bundle(self, request: web.Request) -> web.Response:
        """The device's log, or what its doctor finds."""
        device, what = request.match_info["device"], request.match_info["what"]
        return _json({"device": device, "text": await self.service.support.ask(device, "logs" if what == "logs" else "doctor")})

    async def arms(self, request: web.Request) -> web.Response:
        """Arms that were used, and what the tuner believes."""
        job = request.match_info["job"]
        rows = self.service.ledger.answers(job)
        runner = self.service.jobs.runner
        believed = {}
        if runner is not None and runner.job == job:
            believed = {d: runner.tuner.explain(d) for d in runner.tuner.state["devices"]}
        return _json(
            {
                "used": [{"round": r["round"], "device": r["device"], "arm": database.read(r["arm"]), "why": r["why"]} for r in rows],
                "tuner": believed,
            }
        )

    async def versions(self, request: web.Request) -> web.Response:
        """Versions with their held-out figures."""
        rows = self.service.ledger.versions(request.match_info["job"])
        return _json(
            [
                {
                    "version": r["number"],
                    "state": r["state"],
                    "digest": r["digest"],
                    "created": r["created"],
                    "metrics": database.read(r["metrics"]),
                }
                for r in rows
            ]
        )

    async def version_verb(self, request: web.Request) -> web.Response:
        """promote: this version is good. rollback: this version is good and every later one is not."""
        job, verb, text = request.match_info["job"], request.match_info["verb"], request.match_info["number"]
        number = int(text) if text.isdigit() else -1
        rows = {r["number"]: r for r in self.service.ledger.versions(job)}
        if number not in rows or not (self.service.config.home / "jobs" / job / f"v{number:06d}").exists():
            raise ConfigError(f"job `{job}` has no version {text} on disk", f"coordinator versions list {job}")
        if verb not in ("promote", "rollback"):
            raise ConfigError(f"`{verb}` is not one of promote, rollback")
        self.service.ledger.set_version(job, number, "good")
        for later in (n for n in rows if n > number and verb == "rollback"):
            self.service.ledger.set_version(job, later, "rolled back")
        return _json({"job": job, "version": number, "done": verb})
