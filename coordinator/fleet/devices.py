"""The devices: who is enrolled, what each one said of itself, and what is sealed for whom."""

from collections import deque
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

import msgspec

from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.federated.wire.messages import Hello
from rankfleet.federated.wire.states import GONE
from rankfleet.profiles.device import DeviceProfile

from ..store.ledger import Ledger


@dataclass
class Device:
    """One row of the device table, in memory."""

    state: str
    link_key: bytes
    public_key: bytes
    said: Hello | None
    profile: DeviceProfile | None = None
    heard: deque[bytes] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """MACs of its last messages: a number comes from a clock, and two messages may have the same."""


REMEMBERED = 512


class Devices:
    """The device table: the ledger holds it, everything that is asked for every message is in memory too."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._rows: dict[str, Device] = {}
        for row in ledger.device_rows():
            said = (
                msgspec.json.decode(row["hello"], type=Hello)
                if row["state"] in ("enrolled", "suspended") and row["hello"] != "{}"
                else None
            )
            self._rows[row["id"]] = Device(row["state"], row["link_key"], row["public_key"], said)

    def key(self, device: str) -> bytes | None:
        """The link key of an invited or enrolled device."""
        row = self._rows.get(device)
        return None if row is None or row.state in GONE else row.link_key

    def public(self, device: str) -> bytes:
        """The key that an enrolled device signs with; empty where there is none."""
        row = self._rows.get(device)
        return row.public_key if row else b""

    def enrolled(self, device: str) -> bool:
        """Has it said hello, and not left?"""
        return device in self._rows and self._rows[device].state == "enrolled"

    def repeated(self, device: str, mac: bytes) -> bool:
        """Was this very message heard before? A broker may deliver it twice, and so may somebody who kept
        it."""
        heard = self._rows[device].heard
        if mac in heard:
            return True
        heard.append(mac)
        return False

    def suspended(self, device: str) -> bool:
        """Is it kept out until an operator says otherwise?"""
        return device in self._rows and self._rows[device].state == "suspended"

    def suspend(self, device: str, note: str) -> None:
        """Keep an enrolled device out; its key stays."""
        self.ledger.set_device(device, state="suspended", note=note)
        self._rows[device] = replace(self._rows[device], state="suspended")

    def resume(self, device: str) -> None:
        """The inverse."""
        self.ledger.set_device(device, state="enrolled", note="")
        self._rows[device] = replace(self._rows[device], state="enrolled")

    def hello(self, device: str, said: Hello, now: float) -> str:
        """Enrol or refresh a device. Returns a reason where it is refused, else an empty text."""
        row = self._rows.get(device)
        if row is None:
            return "unknown device"
        try:
            profile = msgspec.convert(said.profile, DeviceProfile)
        except msgspec.ValidationError as error:
            return f"its profile is not understood: {error}"
        if row.public_key and row.public_key != said.public_key:
            return "another key is enrolled under this name; `coordinator invite` makes a new claim"
        if (row.state, row.said) != ("enrolled", said):
            self.ledger.set_device(
                device,
                state="enrolled",
                public_key=said.public_key,
                seen=now,
                hello=msgspec.json.encode(said).decode(),
            )
            self._rows[device] = Device("enrolled", row.link_key, said.public_key, said, profile, row.heard)
        return ""

    def bind(self, device: str, public_key: bytes) -> None:
        """The first key that is shown under a claim stays."""
        row = self._rows[device]
        if row.public_key != public_key:
            self.ledger.set_device(device, public_key=public_key)
            self._rows[device] = replace(row, public_key=public_key)

    def said(self, device: str) -> Hello | None:
        """A device's last hello."""
        row = self._rows.get(device)
        return row.said if row else None

    def profile(self, device: str) -> DeviceProfile | None:
        """What the device said of itself."""
        row = self._rows.get(device)
        if row is None or row.said is None:
            return None
        if row.profile is None:
            row.profile = msgspec.convert(row.said.profile, DeviceProfile)
        return row.profile

    def leave(self, device: str, state: str = "left") -> None:
        """Forget a device's key: it `left`, or was `revoked`."""
        self.ledger.set_device(device, state=state, link_key=b"", public_key=b"")
        if device in self._rows:
            self._rows[device] = Device(state, b"", b"", None)

    def invite(self, device: str, link_key: bytes) -> None:
        """A new claim; an earlier one under the same name is void."""
        self.ledger.invite(device, link_key)
        self._rows[device] = Device("invited", link_key, b"", None)

    def eligible(self, plan: Plan) -> dict[str, tuple[DeviceProfile, dict[str, float]]]:
        """Devices that may take part in a job: enrolled, aimed at, with its dataset and model, owner
        willing."""
        found = {}
        for device, row in sorted(self._rows.items()):
            if (
                row.state == "enrolled"
                and not self.why_not(device, plan)
                and row.said
                and (profile := self.profile(device))
            ):
                found[device] = (profile, row.said.bits_ms)
        return found

    def tags(self, device: str) -> dict[str, str]:
        """What its owner says of it."""
        said = self.said(device)
        return dict(said.tags) if said else {}

    def why_not(self, device: str, plan: Plan) -> str:
        """Why a device cannot take part; empty if it can."""
        said, spec = self.said(device), plan.spec
        if said is None:
            return "has not said hello yet"
        if not any(fnmatch(device, p) for p in spec.devices):
            return "the job does not aim at it"
        for tag, pattern in spec.where.items():
            if not fnmatch(said.tags.get(tag, ""), pattern) or tag not in said.tags:
                return f"its tag `{tag}` is {said.tags.get(tag, 'not set')!r}, the job wants {pattern!r}"
        offers = {d.name: d.task for d in said.datasets}
        if offers.get(spec.task.dataset) != spec.task.kind:
            return f"maps no dataset `{spec.task.dataset}` for {spec.task.kind}"
        if spec.model not in said.models:
            return f"has no base model `{spec.model}`"
        if said.jobs and not any(fnmatch(spec.name, p) or fnmatch(f"{spec.name}-0", p) for p in said.jobs):
            return "its owner does not allow this job"
        unwilling = [
            n for n in plan.stack.methods if said.methods and not any(fnmatch(n, p) for p in said.methods)
        ]
        return f"its owner does not allow `{unwilling[0]}`" if unwilling else ""

    def table(self) -> list[dict[str, Any]]:
        """What `coordinator devices` shows."""
        rows = []
        for row in self.ledger.device_rows():
            said = self.said(row["id"])
            rows.append(
                {
                    "device": row["id"],
                    "state": row["state"],
                    "profile": said.profile.get("name", "") if said else "",
                    "budget_mb": said.profile.get("model_budget_mb") if said else None,
                    "seen": row["seen"],
                    "tags": said.tags if said else {},
                    "datasets": [d.name for d in said.datasets] if said else [],
                    "bytes_in": row["bytes_in"],
                    "note": row["note"],
                }
            )
        return rows
