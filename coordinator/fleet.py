"""The devices: who is enrolled, what each one said of itself, and what is sealed for whom."""

from fnmatch import fnmatch
from typing import Any

import msgspec

from federated.messages import Hello
from profiles.device import DeviceProfile

from . import store
from .job import Plan


class Devices:
    """The device table, with what is asked often kept in memory."""

    def __init__(self, ledger: store.Store) -> None:
        self.ledger = ledger
        self._keys: dict[str, bytes] = {}
        self._hello: dict[str, Hello | None] = {}

    def key(self, device: str) -> bytes | None:
        """The link key of an invited or enrolled device."""
        if device not in self._keys:
            row = self.ledger.row(store.devices, id=device)
            if row is None or row["state"] in ("left", "revoked"):
                return None
            self._keys[device] = row["link_key"]
        return self._keys[device]

    def hello(self, device: str, said: Hello, now: float) -> str:
        """Enrol or refresh a device. Returns a reason where it is refused, else an empty text."""
        row = self.ledger.row(store.devices, id=device)
        if row is None:
            return "unknown device"
        try:
            msgspec.convert(said.profile, DeviceProfile)
        except msgspec.ValidationError as error:
            return f"its profile is not understood: {error}"
        if row["public_key"] and row["public_key"] != said.public_key:
            return "another key is enrolled under this name; `coordinator invite` makes a new claim"
        self.ledger.change(
            store.devices, {"id": device}, state="enrolled", public_key=said.public_key, seen=now, hello=msgspec.json.encode(said).decode()
        )
        self._hello[device] = said
        return ""

    def said(self, device: str) -> Hello | None:
        """A device's last hello."""
        if device not in self._hello:
            row = self.ledger.row(store.devices, id=device)
            known = row is not None and row["state"] == "enrolled" and row["hello"] != "{}"
            self._hello[device] = msgspec.json.decode(row["hello"], type=Hello) if known and row else None
        return self._hello[device]

    def profile(self, device: str) -> DeviceProfile | None:
        """What the device said of itself."""
        said = self.said(device)
        return msgspec.convert(said.profile, DeviceProfile) if said else None

    def leave(self, device: str) -> None:
        """Forget a device's key."""
        self.ledger.change(store.devices, {"id": device}, state="left")
        self._keys.pop(device, None)
        self._hello.pop(device, None)

    def invite(self, device: str, link_key: bytes) -> None:
        """A new claim; an earlier one under the same name is void."""
        self.ledger.put(
            store.devices, {"id": device}, link_key=link_key, public_key=b"", state="invited", hello="{}", seen=0.0, bytes_in=0, note=""
        )
        self._keys.pop(device, None)
        self._hello.pop(device, None)

    def eligible(self, plan: Plan) -> dict[str, tuple[DeviceProfile, dict[str, float]]]:
        """Devices that may take part in a job: enrolled, aimed at, with its dataset and model, owner willing."""
        found = {}
        for row in self.ledger.rows(store.devices, state="enrolled"):
            if not self.why_not(row["id"], plan):
                said, profile = self.said(row["id"]), self.profile(row["id"])
                if said and profile:
                    found[row["id"]] = (profile, said.bits_ms)
        return found

    def why_not(self, device: str, plan: Plan) -> str:
        """Why a device cannot take part; empty if it can."""
        said, spec = self.said(device), plan.spec
        if said is None:
            return "has not said hello yet"
        if not any(fnmatch(device, p) for p in spec.devices):
            return "the job does not aim at it"
        offers = {d.name: d.task for d in said.datasets}
        if offers.get(spec.task.dataset) != spec.task.kind:
            return f"maps no dataset `{spec.task.dataset}` for {spec.task.kind}"
        if spec.model not in said.models:
            return f"has no base model `{spec.model}`"
        if said.jobs and not any(fnmatch(spec.name, p) or fnmatch(f"{spec.name}-0", p) for p in said.jobs):
            return "its owner does not allow this job"
        unwilling = [n for n in plan.stack.methods if said.methods and not any(fnmatch(n, p) for p in said.methods)]
        return f"its owner does not allow `{unwilling[0]}`" if unwilling else ""

    def table(self) -> list[dict[str, Any]]:
        """What `coordinator devices` shows."""
        rows = []
        for row in self.ledger.rows(store.devices):
            said = self.said(row["id"])
            rows.append(
                {
                    "device": row["id"],
                    "state": row["state"],
                    "profile": said.profile.get("name", "") if said else "",
                    "budget_mb": said.profile.get("model_budget_mb") if said else None,
                    "seen": row["seen"],
                    "datasets": [d.name for d in said.datasets] if said else [],
                    "bytes_in": row["bytes_in"],
                    "note": row["note"],
                }
            )
        return rows
