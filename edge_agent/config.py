"""The agent's YAML: what the owner of a device maps, allows and requires. Every key has a default."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rankfleet.federated.program.metrics import Metrics

from .guard_config import GuardConfig


class Dataset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One logical dataset of this device: where it lies and which column means what."""

    path: str
    """JSONL, CSV or Parquet file, or `hub:organisation/name`."""
    task: str = "text_classification"
    columns: dict[str, str] = {}
    """Field of the task (`text`, `label`, `pixels`) → column of the file; a field without entry has its
    own name."""
    labels: dict[str, str] = {}
    """Value in the file → label of the job."""


class Allow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the owner consents to; `*` matches anything."""

    jobs: tuple[str, ...] = ("*",)
    models: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("*",)
    support: bool = True
    """May operators fetch the last lines of the log, and what `doctor` finds?"""
    mb_per_day: Annotated[float, Meta(gt=0)] = 500.0
    """Bytes up and down over MQTT in a day, in MB."""
    model_mb: Annotated[float, Meta(gt=0)] = 8000.0
    """Largest base model that is fetched."""


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The connection; rates emulate a slower one and are left out on real devices."""

    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 240
    """Seconds between signs of life on an idle link: 2.3 MB a month with all headers; NAT tables keep
    entries for five minutes."""
    packet_bytes: Annotated[int, Meta(ge=256, le=120_000)] = 120_000
    up_kbps: Annotated[float, Meta(gt=0)] | None = None
    down_kbps: Annotated[float, Meta(gt=0)] | None = None
    delay_ms: Annotated[float, Meta(ge=0)] = 0.0
    answer_s: Annotated[float, Meta(gt=0)] = 5.0
    """How long to wait for the other side before asking again."""
    broker: str = ""
    """Another address of the broker than the claim token named, such as `wss://broker.example/mqtt`."""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    """TLS: the broker's authority, and a client certificate; empty: the system's authorities, none."""
    proxy: str = ""
    """`http://user:password@host:port` or `socks5://…` on the way to the broker."""


class WorkerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The training process."""

    memory_mb: Annotated[float, Meta(gt=0)] | None = None
    """Resident memory over what the runtime itself takes; None: 1,000 MB and four times the model budget."""
    idle_s: Annotated[float, Meta(gt=0)] = 300.0
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it computes; `auto`: on a CUDA device where a real kernel runs, else on the CPU."""
    slots: Annotated[int, Meta(ge=1)] | None = None
    """Workers that may compute at once on this machine; None: one per core."""


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What training may put on the disk: prepared base models, and what lower layers put out for each
    example."""

    quota_mb: Annotated[float, Meta(ge=0)] = 8000.0
    """For both together; 0: nothing, everything is made anew in memory."""
    writes_mb_per_day: Annotated[float, Meta(ge=0)] = 4000.0
    """Cards wear out by being written to; beyond this nothing more is kept today."""
    cache: Literal["auto", "on", "off"] = "auto"
    """Layers' output on disk; `auto`: not on SD cards and USB sticks, whose reading is slow and whose
    cells are few."""


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an owner can set."""

    state_dir: str = "/var/lib/edge-agent"
    profile: str = "auto"
    threads: Annotated[int, Meta(ge=1)] | None = None
    model_budget_mb: Annotated[float, Meta(gt=0)] | None = None
    datasets: dict[str, Dataset] = {}
    models: dict[str, str] = {}
    """Name of a base model → folder, `hub:organisation/name`, or `coordinator` to fetch it from there."""
    tags: dict[str, str] = {}
    """What jobs may aim at, such as `site: lab`."""
    allow: Allow = Allow()
    require: tuple[Any, ...] = ()
    """Stack entries that are put behind a job's own stack."""
    link: Link = Link()
    worker: WorkerLimits = WorkerLimits()
    guard: GuardConfig = GuardConfig()
    disk: Disk = Disk()
    metrics: Metrics = Metrics()
    log: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""
    on_adapter: tuple[str, ...] = ()
    """Command that is run when a new adapter lies in `<state_dir>/adapter/current`: at a job's end, and in
    between at most every 30 s."""

    @property
    def home(self) -> Path:
        """The state directory."""
        return Path(self.state_dir)
