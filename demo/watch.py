"""Follows the demo's job, prints what happens, and breaks things in the middle."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from rankfleet.coordinator.verbs.client import Client
from rankfleet.coordinator.verbs.results import arm_text
from rankfleet.federated.errors import Unreachable
from rankfleet.federated.wire.states import ENDED

from .fleet import Fleet

LIMIT_S = 400.0


class Watch:
    """One job from submission to its end."""

    def __init__(self, fleet: Fleet, client: Client, job_file: Path, victim: str = "raspberry-pi") -> None:
        self.fleet, self.client, self.job_file, self.victim = fleet, client, job_file, victim
        self.job = ""
        self.rounds: list[dict[str, Any]] = []
        self.killed: dict[str, Any] = {}
        self._seen: set[tuple[int, str]] = set()

    def submit(self) -> None:
        """Wait for the fleet, submit, and show what each device gets."""
        end = time.time() + 60
        while time.time() < end:
            if all(d["state"] == "enrolled" for d in self.client.get("/devices")):
                break
            time.sleep(0.1)
        answer = self.client.post("/jobs", self.job_file.read_text())
        self.job = answer["job"]
        for row in answer["devices"]:
            print(f"  {row['device']:13} {row['arm']:28} {row['why']}")
        missing = [r["device"] for r in answer["devices"] if not r["arm"]]
        if missing:
            raise RuntimeError(f"no arm fits {', '.join(missing)}")

    def follow(self) -> None:
        """Until the job ends. Raises RuntimeError where it fails."""
        end, strike = time.time() + LIMIT_S, 0
        while time.time() < end:
            with contextlib.suppress(Unreachable):
                answer = self.client.get(f"/jobs/{self.job}/rounds")
                self.rounds = answer["rounds"]
                total = max((r["round"] for r in self.rounds), default=0)
                self._print()
                strike = strike or max(2, self._total() // 2)
                if not self.killed and total >= strike:
                    self._strike(answer["live"])
                state = next(j for j in self.client.get("/jobs") if j["job"] == self.job)
                if state["state"] in ENDED:
                    self._settled(state)
                    return
            time.sleep(
                0.05 if not self.killed and self.rounds and self.rounds[-1]["round"] >= strike else 0.3
            )
        raise RuntimeError(f"the job did not end within {LIMIT_S:.0f} s; logs lie in {self.fleet.home}")

    def _total(self) -> int:
        import yaml

        return int(yaml.safe_load(self.job_file.read_text())["rounds"])

    def _settled(self, state: dict[str, Any]) -> None:
        if state["state"] != "finished":
            raise RuntimeError(f"the job {state['state']}: {state['reason']}")
        if not self.killed:
            print("  (no upload was caught in the middle, so nothing was killed)")

    def _print(self) -> None:
        for r in self.rounds:
            for d in r["devices"]:
                key = (r["round"], d["device"])
                if d["state"] == "assigned" or key in self._seen:
                    continue
                self._seen.add(key)
                told = d["telemetry"]
                if r["round"] >= self._total():
                    continue
                loss = (
                    f"loss {told['loss_before']:.2f} → {told['loss_after']:.2f}"
                    if "loss_after" in told
                    else d["reason"][:50]
                )
                sent = self.fleet.status(d["device"]).get("bytes_up", 0) / 1e3
                resumed = f"  {d['resumed']} chunks resumed" if d["resumed"] else ""
                where = f"  round {r['round'] + 1:2}  {d['device']:13} {arm_text(d['arm']):28}"
                print(f"{where} {loss:20} {d['seconds']:5.1f} s {sent:7.0f} kB up{resumed}")
                sys.stdout.flush()

    def _strike(self, live: dict[str, Any]) -> None:
        """Kill broker and one agent while that agent's update is half there."""
        now = live.get(self.victim, {})
        have, total = now.get("chunks", [0, 0])
        if now.get("state") != "sending" or not 0 < have < total:
            return
        broker = self.fleet.kill_broker()
        self.fleet.kill_agent(self.victim)
        self.killed = {"broker": broker, "agent": self.victim, "chunks_there": have, "chunks": total}
        print(
            f"  kill -9: {broker} and the agent of {self.victim}, with {have} of {total} chunks of its "
            "update delivered"
        )
        time.sleep(1.0)
        self.fleet.agent(self.victim)

    def resumed(self) -> int:
        """Chunks that did not have to be sent again."""
        return sum(d["resumed"] for r in self.rounds for d in r["devices"])

    def arms(self) -> dict[str, list[dict[str, Any]]]:
        """Device → its arms, round by round."""
        found: dict[str, list[dict[str, Any]]] = {}
        for r in self.rounds:
            if r["round"] < self._total():
                for d in r["devices"]:
                    found.setdefault(d["device"], []).append(d["arm"])
        return found
