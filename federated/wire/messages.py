"""What the two sides say to each other. msgpack, versioned, every message sealed.

A message travels in an `Envelope`: protocol version, sender, a rising number, the body, an HMAC-SHA256
under the device's own key (agreed at enrolment; the idle agent can check it with the standard library
alone) and, where it matters beyond the link, an Ed25519 signature (assignments by the coordinator, updates
by the device; made and checked in the worker).
"""

import hashlib
import hmac
import time
from typing import Any, Literal, TypeVar

import msgspec

from ..errors import TooLarge, WireError, WrongVersion

PROTOCOL = 1
OLDEST = max(1, PROTOCOL - 1)
"""The version before ours is understood too: a fleet is upgraded device by device."""
MAX_MESSAGE = 1 << 20
MAC_BYTES = 16

Ranges = list[tuple[int, int]]
"""Half-open ranges of chunk numbers."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of everything said; the tag is the class name."""


class Blob(msgspec.Struct, frozen=True, array_like=True):
    """Content by its SHA-256: `size` bytes in pieces of `chunk` bytes."""

    digest: str
    size: int
    chunk: int

    @property
    def chunks(self) -> int:
        """Number of pieces."""
        return max(1, -(-self.size // self.chunk))


class DatasetOffer(msgspec.Struct, frozen=True):
    """A dataset that the owner of a device lets jobs use."""

    name: str
    task: str
    examples: int


class Hello(Message, tag="hello", frozen=True):
    """I am here: who I am, what I can do, what my owner allows and requires."""

    profile: dict[str, Any]
    datasets: list[DatasetOffer]
    public_key: bytes
    agent: str = ""
    models: list[str] = []
    methods: list[str] = []
    jobs: list[str] = []
    require: list[Any] = []
    bits_ms: dict[str, float] = {}
    tags: dict[str, str] = {}
    """What jobs may aim at, such as `site: lab`."""
    held: list[str] = []
    """`job/round` of updates that wait in the outbox."""


class Want(Message, tag="want", frozen=True):
    """Publish these pieces of a blob, please."""

    digest: str
    missing: Ranges


class Offer(Message, tag="offer", frozen=True):
    """An update lies in my outbox: may I send it? `signature` covers `manifest()`."""

    job: str
    round: int
    blob: Blob
    signature: bytes
    data: bytes = b""
    """The whole update, where the assignment allows that and it fits into a packet."""
    cost: dict[str, float] = {}
    """What the round took here: seconds by part, `peak_mb`. Beside the update and not in it: the same work
    gives the same bytes."""


class Report(Message, tag="report", frozen=True):
    """Progress, or why there will be no update."""

    job: str
    round: int
    state: Literal["downloading", "training", "failed", "refused", "installed"]
    reason: str = ""
    code: str = ""
    """`memory`, `consent`, `data`, `job`, `crash`: what the planner may learn from."""


class Bundle(Message, tag="bundle", frozen=True):
    """What the coordinator asked for: the last lines of the log, or what `doctor` finds; without secrets,
    and bounded."""

    number: int
    text: str


class Ask(Message, tag="ask", frozen=True):
    """Tell an operator more, please. The device's owner may have said no (`allow.support`)."""

    number: int
    what: Literal["logs", "doctor"]


class Leave(Message, tag="leave", frozen=True):
    """This device goes for good; forget its key."""


class Welcome(Message, tag="welcome", frozen=True):
    """You are known; assignments follow."""

    coordinator: str = ""


class Sorry(Message, tag="sorry", frozen=True):
    """What you sent was refused, with the reason."""

    reason: str


class Grant(Message, tag="grant", frozen=True):
    """Send these pieces of your update now."""

    job: str
    round: int
    digest: str
    missing: Ranges


class Receipt(Message, tag="receipt", frozen=True):
    """Your update is on disk here (or is refused for good): drop it from the outbox."""

    job: str
    round: int
    digest: str
    accepted: bool
    reason: str = ""


class ModelSource(msgspec.Struct, frozen=True):
    """Where a base model can be fetched: an HTTPS server, and SHA-256 of the certificate that it shows."""

    url: str
    pin: str


def model_ticket(key: bytes, path: str, at: str) -> str:
    """What a device shows to the model server: it knows the fleet's link key."""
    return hmac.new(key, f"rankfleet model {PROTOCOL}\n{path}\n{at}\n".encode(), hashlib.sha256).hexdigest()


class Task(msgspec.Struct, frozen=True):
    """What a job learns, in words that every device understands its own way."""

    dataset: str
    kind: str
    labels: list[str] = []
    max_length: int = 128
    template: str = ""
    tolerance: float = 0.5
    """Regression: how far off still counts as right."""
    samples: list[str] = []
    """Prompts of the job (never of a device) whose answers go into the report."""


class Recipe(msgspec.Struct, frozen=True):
    """How a device trains in one round: its arm, as numbers."""

    bits: int
    batch: int
    steps: int
    lr: float
    optimizer: str = "adamw"
    prune: float = 0.0
    probe: int = 32
    """Examples whose loss is measured before and after."""
    evaluate: int = 128
    """Held-out examples on which the received version is measured, at most."""
    memory_mb: float = 0.0
    """What the planner expects the arm to need."""
    keeps: int = 1
    """Rounds, this one included, for which frozen layers that have adapters stay as they are."""
    floor: int = 0
    """The lowest layer that anybody in this job adapts."""
    score: bool = False
    """Tell what heads and channels are worth to this device's data?"""
    clip: float = 1.0
    """Norm that a step's gradient is cut to, all tensors together; 0: not cut."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises to `lr`."""


class Assignment(Message, tag="assignment", frozen=True):
    """What one device does in one round. Retained, so that a device that wakes finds it."""

    job: str
    round: int
    rounds: int
    version: int
    purpose: Literal["train", "install"]
    model: str
    model_digest: str
    task: Task
    stack: list[Any]
    space: str
    recipe: Recipe
    blobs: dict[str, Blob]
    """`view` (spec, factors, heads, extras of methods), `frozen` (layers below the boundary), `masks`
    (kept channels)."""
    seed: int
    say: str = ""
    """Why this arm, in one sentence."""
    inline: bool = False
    """A small update may travel with its offer: the coordinator has room for all of them."""
    epoch: int = 0
    """Which life of the coordinator says this: one that was restored from a backup begins another, and
    rounds may come again."""
    source: ModelSource | None = None
    """Where a device without the base model finds it."""


class Done(Message, tag="done", frozen=True):
    """No work at present: the job ended in this state."""

    job: str
    state: str


Up = Hello | Want | Offer | Report | Bundle | Leave
Down = Ask | Welcome | Sorry | Grant | Receipt | Assignment | Done
M = TypeVar("M")


class Envelope(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A sealed message."""

    version: int
    sender: str
    number: int
    body: bytes
    mac: bytes
    signature: bytes = b""


_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_up: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Up)
_down: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Down)


def _mac(key: bytes, version: int, sender: str, number: int, body: bytes) -> bytes:
    text = b"%d\0%s\0%d\0" % (version, sender.encode(), number) + body
    return hmac.new(key, text, hashlib.sha256).digest()[:MAC_BYTES]


def seal(message: Message, sender: str, key: bytes, signature: bytes = b"", number: int = 0) -> bytes:
    """`message` as bytes, under the link key."""
    body = _encoder.encode(message)
    number = number or time.time_ns() // 1000
    return _encoder.encode(
        Envelope(PROTOCOL, sender, number, body, _mac(key, PROTOCOL, sender, number, body), signature)
    )


def unpack(data: bytes) -> Envelope:
    """The envelope, unchecked but for version and size. Raises WireError."""
    if len(data) > MAX_MESSAGE:
        raise TooLarge(f"a message of {len(data):,} bytes, at most {MAX_MESSAGE:,} are read")
    try:
        envelope = _envelopes.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a message: {error}") from None
    if not OLDEST <= envelope.version <= PROTOCOL:
        spoken = str(PROTOCOL) if OLDEST == PROTOCOL else f"{OLDEST} and {PROTOCOL}"
        raise WrongVersion(
            f"`{envelope.sender[:64]}` speaks protocol {envelope.version}, this side speaks {spoken}",
            "upgrade the older side",
        )
    return envelope


def body(message: Message) -> bytes:
    """The bytes that a signature over `message` covers."""
    return _encoder.encode(message)


def check(envelope: Envelope, key: bytes) -> None:
    """Raises WireError unless the envelope was sealed under `key`."""
    if not hmac.compare_digest(
        _mac(key, envelope.version, envelope.sender, envelope.number, envelope.body), envelope.mac
    ):
        raise WireError(
            f"a message that names `{envelope.sender[:64]}` as sender is not sealed with its key",
            "enrol the device again, or find out who else publishes on its topic",
        )


def open_up(envelope: Envelope, key: bytes) -> Up:
    """A device's message, checked. Raises WireError."""
    check(envelope, key)
    message: Up = _read(_up, envelope.body)
    return message


def open_down(envelope: Envelope, key: bytes) -> Down:
    """The coordinator's message, checked. Raises WireError."""
    check(envelope, key)
    message: Down = _read(_down, envelope.body)
    return message


def read_assignment(data: bytes) -> Assignment:
    """An assignment's body, as the worker reads it after checking the signature. Raises WireError."""
    message = _read(_down, data)
    if not isinstance(message, Assignment):
        raise WireError(f"expected an assignment, got a {type(message).__name__.lower()}")
    return message


def _read(decoder: msgspec.msgpack.Decoder[M], data: bytes) -> M:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"unreadable message: {error}") from None


def manifest(job: str, round: int, device: str, digest: str) -> bytes:
    """What a device signs for an update. Its first line has a version of its own: it may outlive the
    protocol's."""
    return f"rankfleet update 1\n{job}\n{round}\n{device}\n{digest}\n".encode()
