"""Base models from the coordinator: over HTTPS, by digest, resumed; and what is not believed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rankfleet.coordinator.config import Https
from rankfleet.coordinator.exchange.https_server import HttpsServer
from rankfleet.coordinator.store import tables
from rankfleet.edge_agent.exchange import base_models
from rankfleet.edge_agent.exchange.base_models import Bases
from rankfleet.edge_agent.trust.identity import Identity
from rankfleet.federated.errors import ConfigError, Refused, WireError
from rankfleet.federated.wire.messages import ModelSource
from rankfleet.profiles.card import model_digest

from .world import World, job

KEY = b"k" * 32
WHO = Identity("main", "d0", "mqtt://localhost", KEY, b"", b"")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HttpsServer]:
    made = HttpsServer(Https(models=True), tmp_path / "c", lambda device: KEY if device == "d0" else None)
    (tmp_path / "c").mkdir()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_models, "TRIES", 2)


def order(digest: str, source: ModelSource | None) -> Any:
    return SimpleNamespace(model="tiny", model_digest=digest, source=source)


async def test_the_same_files_arrive_and_a_second_job_needs_no_server(
    tmp_path: Path, tiny: Path, server: HttpsServer
) -> None:
    digest = model_digest(tiny)
    source = server.offer(digest, tiny)
    mine = Bases(tmp_path / "d0", WHO, 100)
    folder = Path(await asyncio.to_thread(mine.folder, order(digest, source), "coordinator"))
    assert model_digest(folder) == digest
    assert mine.folder(order(digest, None), "coordinator") == str(folder)
    assert mine.folder(order(digest, None), str(tiny)) == str(tiny)


async def test_a_half_arrived_file_goes_on_where_it_stopped(
    tmp_path: Path, tiny: Path, server: HttpsServer
) -> None:
    digest = model_digest(tiny)
    part = tmp_path / "d0" / "models" / f"{digest}.part"
    part.mkdir(parents=True)
    whole = (tiny / "model.safetensors").read_bytes()
    (part / "model.safetensors").write_bytes(whole[:5000])
    seen: list[int] = []
    mine = Bases(tmp_path / "d0", WHO, 100, lambda done, total: seen.append(total - done))
    folder = Path(
        await asyncio.to_thread(mine.folder, order(digest, server.offer(digest, tiny)), "coordinator")
    )
    assert mine.resumed == 1
    assert model_digest(folder) == digest
    assert seen[-1] == 0


async def test_a_damaged_beginning_is_fetched_again(tmp_path: Path, tiny: Path, server: HttpsServer) -> None:
    digest = model_digest(tiny)
    part = tmp_path / "d0" / "models" / f"{digest}.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"x" * 5000)
    mine = Bases(tmp_path / "d0", WHO, 100)
    assert (
        model_digest(
            Path(
                await asyncio.to_thread(mine.folder, order(digest, server.offer(digest, tiny)), "coordinator")
            )
        )
        == digest
    )


@pytest.mark.parametrize(
    ("who", "pin", "limit", "error", "message"),
    [
        (WHO, "00" * 32, 100, WireError, "another certificate than the assignment names"),
        (
            msgspec.structs.replace(WHO, link_key=b"other"),
            "",
            100,
            WireError,
            "403: this device is not known",
        ),
        (msgspec.structs.replace(WHO, device="ghost"), "", 100, WireError, "403"),
        (WHO, "", 0.001, Refused, "this device allows 0 MB"),
    ],
)
async def test_what_is_refused(
    tmp_path: Path,
    tiny: Path,
    server: HttpsServer,
    who: Identity,
    pin: str,
    limit: float,
    error: Any,
    message: str,
) -> None:
    digest = model_digest(tiny)
    source = server.offer(digest, tiny)
    assert source
    mine = Bases(tmp_path / "d0", who, limit)
    with pytest.raises(error, match=message):
        await asyncio.to_thread(
            mine.folder, order(digest, ModelSource(source.url, pin or source.pin)), "coordinator"
        )
    with pytest.raises(Refused, match="serves no files"):
        mine.folder(order("ab" * 32, None), "coordinator")
    with pytest.raises(WireError, match="404"):
        await asyncio.to_thread(
            Bases(tmp_path / "d0", WHO, 1).folder, order("ab" * 32, source), "coordinator"
        )


async def test_hostile_names_and_wrong_digests_are_not_believed(
    tmp_path: Path, tiny: Path, server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = server.offer("ab" * 32, tiny)
    mine = Bases(tmp_path / "d0", WHO, 100)
    for name in ("../../evil", "a/b", ".hidden"):
        monkeypatch.setattr(mine, "_ask", lambda s, p, start=0, name=name: _answer(name))
        with pytest.raises(WireError, match="not plain files"):
            await asyncio.to_thread(mine.folder, order("ab" * 32, source), "coordinator")
    assert not (tmp_path / "evil").exists()


def _answer(name: str) -> Any:
    body = msgspec.json.encode([{"name": name, "size": 1, "digest": "00"}])
    return SimpleNamespace(close=lambda: None), SimpleNamespace(read=lambda n: body)


async def test_a_device_without_the_model_takes_part(tmp_path: Path, tiny: Path) -> None:
    class Serving(World):
        async def start_coordinator(self) -> None:
            await super().start_coordinator()
            service = self.coordinator
            service.models.config = Https(models=True)
            await service.models.start()

    world = Serving(tmp_path, tiny, devices=2)
    world.agent_changes["d1"] = {"models": {"tiny": "coordinator"}}
    async with world:
        name = await world.run(job(rounds=2))
        states = {
            r["device"]: r["state"]
            for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=1)
        }
        assert states == {"d0": "counted", "d1": "counted"}
        fetched = list((tmp_path / "d1" / "models").iterdir())
        assert [model_digest(p) for p in fetched] == [model_digest(tiny)]


async def test_a_certificate_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nothing")
    server = HttpsServer(
        Https(models=True, cert_file=str(tmp_path / "bad.pem"), key_file=str(tmp_path / "bad.pem")),
        tmp_path,
        lambda d: None,
    )
    with pytest.raises(ConfigError, match="https"):
        await server.start()
    await server.stop()
