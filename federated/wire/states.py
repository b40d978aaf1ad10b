"""Every state that a job, a round, an answer, a version or a device can be in: written once."""

from typing import Literal, get_args

JobState = Literal["held", "queued", "running", "paused", "finished", "failed", "cancelled"]
"""`held`: waits for operators' signatures."""
RoundState = Literal["open", "closing", "closed"]
"""`closing`: which updates go in is decided, and the next version is being made of them."""
AnswerState = Literal["assigned", "received", "counted", "failed", "refused", "late", "dropped"]
"""Of one device in one round. `received`: its update lies here; `counted`: it went into a version; `late`:
the round closed without it, and it may still come; `dropped`: it came too late for any version."""
VersionState = Literal["candidate", "good", "rolled back"]
"""`good`: devices measured it and found it no worse than the last good one."""
DeviceState = Literal["invited", "enrolled", "suspended", "left", "revoked"]

HELD: JobState = "held"
ENDED: tuple[JobState, ...] = ("finished", "failed", "cancelled")
"""In these a job does nothing any more."""
ARRIVED: tuple[AnswerState, ...] = ("received", "counted", "dropped")
"""In these a device's update of the round was taken."""
USABLE: tuple[AnswerState, ...] = ("received", "counted")
"""In these it is, or may come, in a version."""
GONE: tuple[DeviceState, ...] = ("left", "revoked")

ALL: dict[str, tuple[str, ...]] = {
    "jobs": get_args(JobState),
    "rounds": get_args(RoundState),
    "assignments": get_args(AnswerState),
    "versions": get_args(VersionState),
    "devices": get_args(DeviceState),
}
"""Table of the ledger → its states."""
