"""Jobs over HTTP: submit, look at, hold, go on, cancel; their rounds and arms."""

from typing import Any

from aiohttp import web

from rankfleet.bandit.tuner import NoArm, Tuner
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.wire.states import ENDED, HELD

from ..jobs.plan import Plan
from ..jobs.spec import read_job
from ..service import Service
from ..store import database
from .answers import answer, is_dry, signed_by_operator


class Jobs:
    """Handlers of `/jobs`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def jobs(self, request: web.Request) -> web.Response:
        """All jobs."""
        ledger = self.service.ledger
        newest = ledger.newest_rounds()
        return answer(
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
        if not is_dry(request):
            signed = signed_by_operator(request) if operators.roster else None
            job = self.service.jobs.submit(text, signed)
        return answer({"job": job, "devices": preview, "lacks": operators.lacks(job, text) if job else 0})

    async def text(self, request: web.Request) -> web.Response:
        """A job as it was submitted, and who signed it."""
        job = request.match_info["job"]
        row = self.service.ledger.job(job)
        if row is None:
            raise ConfigError(f"no job `{job}`", "coordinator jobs")
        return answer({"text": row["text"], "signed": self.service.operators.agreed(job, row["text"])})

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
            agreed = self.service.operators.sign(job, *signed_by_operator(request))
            self.service.jobs.approved(job)
            return answer(
                {
                    "job": job,
                    "done": verb,
                    "signed": agreed,
                    "lacks": self.service.operators.lacks(job, row["text"]),
                }
            )
        if row["state"] == HELD and verb in ("pause", "resume"):
            raise ConfigError(
                f"job `{job}` waits for operators to sign it", f"coordinator approve {job} --key FILE"
            )
        if verb == "cancel":
            self.service.jobs.cancel(job)
        elif verb in ("pause", "resume"):
            self.service.ledger.set_job(job, "paused" if verb == "pause" else "running")
            self.service.changed()
        else:
            raise ConfigError(f"`{verb}` is not one of approve, cancel, pause, resume")
        return answer({"job": job, "done": verb})

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
        return answer({"rounds": found, "live": self.service.live, "events": events})

    async def progress(self, request: web.Request) -> web.Response:
        """When each round closed and how many updates it had: cheap to ask for again and again."""
        rows = self.service.ledger.rounds(request.match_info["job"])
        return answer(
            [{"round": r["number"], "closed": r["closed"], **database.read(r["info"])} for r in rows]
        )

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

    async def arms(self, request: web.Request) -> web.Response:
        """Arms that were used, and what the tuner believes."""
        job = request.match_info["job"]
        rows = self.service.ledger.answers(job)
        runner = self.service.jobs.runner
        believed = {}
        if runner is not None and runner.job == job:
            believed = {d: runner.tuner.explain(d) for d in runner.tuner.state["devices"]}
        return answer(
            {
                "used": [
                    {
                        "round": r["round"],
                        "device": r["device"],
                        "arm": database.read(r["arm"]),
                        "why": r["why"],
                    }
                    for r in rows
                ],
                "tuner": believed,
            }
        )
