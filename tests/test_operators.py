"""Operators: roles, signatures, approvals; and a coordinator in the wrong hands, which devices do not
obey."""

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from rankfleet.coordinator.broker.child import mosquitto
from rankfleet.coordinator.config import Oidc
from rankfleet.coordinator.operators.oidc import Issuer
from rankfleet.coordinator.operators.operator_key import OperatorKey, generate
from rankfleet.coordinator.store import tables
from rankfleet.coordinator.web.app import Api
from rankfleet.federated.errors import ConfigError, Refused
from rankfleet.federated.trust.roster import encode_key

from .secure import SecureWorld
from .world import World, job

KIND = "mosquitto" if mosquitto() else "amqtt"


class People:
    """Three operators with their keys, and rosters that alice signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = {}
        for name in ("alice", "bob", "eve"):
            generate(folder / f"{name}.key")
            self.keys[name] = OperatorKey(folder / f"{name}.key")

    def roster(self, version: int = 1, approvals: int = 1, by: str = "alice", **roles: str) -> bytes:
        roles = roles or {"alice": "admin", "bob": "operator"}
        people = {n: {"role": r, "key": encode_key(self.keys[n].public)} for n, r in roles.items()}
        path = self.folder / "roster.yaml"
        path.write_text(yaml.safe_dump({"approvals": approvals, "operators": people}))
        return self.keys[by].roster(path, "main", version)


@pytest.fixture
def people(tmp_path: Path) -> People:
    (tmp_path / "people").mkdir()
    return People(tmp_path / "people")


async def asked(
    world: World, who: OperatorKey | None, method: str, path: str, body: str = "", **headers: str
) -> tuple[int, Any]:
    """A request to the API, signed."""
    api = Api(world.coordinator)
    token = next(v for k, v in api.app.items() if isinstance(v, str))
    async with TestClient(TestServer(api.app)) as client:
        signed = who.request("main", method, path, body.encode()) if who else {}
        answer = await client.request(
            method, path, data=body, headers={"Authorization": f"Bearer {token}", **signed, **headers}
        )
        return answer.status, await answer.json()


async def test_roles(tmp_path: Path, tiny: Path, people: People) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        operators = world.coordinator.operators
        assert (await asked(world, None, "POST", "/devices/d0/suspend"))[
            0
        ] == 200  # no roster: the token is enough
        assert (await asked(world, None, "POST", "/devices/d0/resume"))[0] == 200
        operators.replace(people.roster(alice="admin", bob="operator", eve="viewer"))
        alice, bob, eve = people.keys.values()
        assert (await asked(world, None, "GET", "/devices"))[0] == 200
        for who, status in ((None, 400), (eve, 400), (bob, 200)):
            assert (await asked(world, who, "POST", "/devices/d0/suspend"))[0] == status
        assert "takes the role admin" in (await asked(world, bob, "POST", "/devices/d0/revoke"))[1]["error"]
        assert (await asked(world, alice, "POST", "/devices/d0/revoke"))[0] == 200
        for path in ("/devices/d0/revoke?dry=1", "/devices/d0/suspend?dry=1", "/jobs/toy-1/cancel?dry=1"):
            assert "not signed" in (await asked(world, None, "POST", path))[1]["error"]
        assert (
            "takes the role admin" in (await asked(world, bob, "POST", "/devices/d0/revoke?a=b"))[1]["error"]
        )
        trail = [(r["operator"], r["text"]) for r in world.coordinator.ledger.rows(tables.audit)]
        assert trail[1:] == [("bob", "/devices/d0/suspend"), ("alice", "/devices/d0/revoke")]


async def test_requests_that_are_old_altered_or_heard_before(
    tmp_path: Path, tiny: Path, people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        world.coordinator.operators.replace(people.roster())
        bob = people.keys["bob"]
        headers = bob.request("main", "POST", "/devices/d0/suspend", b"")
        assert (await asked(world, None, "POST", "/devices/d0/resume", **headers))[0] == 400
        assert (await asked(world, None, "POST", "/devices/d0/suspend", **headers))[0] == 200
        assert (
            "heard before" in (await asked(world, None, "POST", "/devices/d0/suspend", **headers))[1]["error"]
        )
        real = time.time
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: real() - 400)
            old = bob.request("main", "POST", "/devices/d0/resume", b"")
        assert "too long ago" in (await asked(world, None, "POST", "/devices/d0/resume", **old))[1]["error"]


async def test_rosters_are_signed_by_an_admin_and_only_get_newer(
    tmp_path: Path, tiny: Path, people: People
) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        operators = world.coordinator.operators
        for bad, why in (
            (people.roster(by="eve"), "not signed by an admin"),
            (people.roster(approvals=3), "2 operators could sign, 3 must"),
            (people.roster(by="bob", bob="operator"), "not signed by an admin"),
            (b"rubbish", "no roster"),
        ):
            with pytest.raises((Refused, ConfigError), match=why):
                operators.replace(bad)
        operators.replace(people.roster(version=2))
        with pytest.raises(Refused, match="version 2 is in force"):
            operators.replace(people.roster(version=2))
        with pytest.raises(Refused, match="not signed by an admin"):
            operators.replace(people.roster(version=3, by="eve", eve="admin"))
        operators.replace(people.roster(version=3, alice="admin", eve="admin"))
        assert sorted(operators.roster.operators) == ["alice", "eve"]  # type: ignore[union-attr]


def before_anybody_joins(world: SecureWorld) -> SecureWorld:
    """Its devices' data is there, they are not."""
    world.names = []
    return world


async def submitted(world: World, who: OperatorKey, text: str) -> str:
    status, answer = await asked(world, who, "POST", "/jobs", text, **{"X-Job": who.job("main", text)})
    assert status == 200, answer
    return str(answer["job"])


async def test_two_must_sign(tmp_path: Path, tiny: Path, people: People) -> None:
    async with before_anybody_joins(SecureWorld(tmp_path, tiny, KIND, devices=1)) as world:
        world.coordinator.operators.replace(people.roster(approvals=2))
        await world.join("d0")
        await world.until(lambda: world.coordinator.devices.enrolled("d0"))
        alice, bob, eve = people.keys.values()
        text = job(rounds=1, stack=["sparse"])
        status, answer = await asked(world, alice, "POST", "/jobs", text)
        assert status == 400
        assert "not signed" in answer["error"]
        name = await submitted(world, alice, text)
        assert world.job_state(name) == "held"
        status, answer = await asked(
            world, alice, "POST", f"/jobs/{name}/approve", **{"X-Job": alice.job("main", text)}
        )
        assert answer["lacks"] == 1  # the same person twice is one person
        for who, said in ((eve, text), (bob, text + " ")):
            assert (
                await asked(world, who, "POST", f"/jobs/{name}/approve", **{"X-Job": who.job("main", said)})
            )[0] == 400
        assert world.job_state(name) == "held"
        status, answer = await asked(
            world, bob, "POST", f"/jobs/{name}/approve", **{"X-Job": bob.job("main", text)}
        )
        assert (status, answer["signed"], answer["lacks"]) == (200, ["alice", "bob"], 0)
        await world.until(lambda: world.job_state(name) == "finished")


async def test_a_stolen_coordinator_without_an_operators_key(
    tmp_path: Path, tiny: Path, people: People
) -> None:
    """It holds every key of the coordinator and can send what it likes; the device knows the admins from
    its claim."""
    async with before_anybody_joins(SecureWorld(tmp_path, tiny, KIND, devices=1)) as world:
        operators = world.coordinator.operators
        operators.replace(people.roster())
        await world.join("d0")
        await world.until(lambda: world.coordinator.devices.enrolled("d0"))
        good = await submitted(world, people.keys["bob"], job(rounds=1, stack=["sparse"]))
        await world.until(lambda: world.job_state(good) == "finished")

        async def refused(name: str) -> str:
            await world.until(lambda: any(world.coordinator.ledger.rows(tables.assignments, job=name)))
            await world.until(lambda: world.coordinator.ledger.rows(tables.events, job=name) != [])
            world.coordinator.jobs.cancel(name)
            await world.until(lambda: world.job_state(name) == "cancelled")
            return str(world.coordinator.ledger.rows(tables.events, job=name)[0]["text"])

        def forced(text: str) -> str:
            number = 1 + len(world.coordinator.ledger.rows(tables.jobs))
            name = f"toy-{number}"
            world.coordinator.ledger.add(
                tables.jobs, id=name, text=text, state="queued", created=0.0, number=number
            )
            world.coordinator.jobs._news.set()
            return name

        assert "0 operators signed the job" in await refused(forced(job(rounds=2)))
        signed, warrant = operators.signed, operators.warrant
        operators.warrant = lambda j, text: None  # type: ignore[method-assign]
        assert "no operator signed this job" in await refused(forced(job(rounds=2)))
        operators.warrant = lambda j, text: warrant(good, job(rounds=1, stack=["sparse"]))  # type: ignore[method-assign]
        assert "the assignment's rounds is '2'" in await refused(forced(job(rounds=2, stack=["sparse"])))
        thief = people.roster(version=9, by="eve", eve="admin")
        operators.path.write_bytes(thief)
        world.coordinator.operators = stolen = type(operators)(world.config, world.coordinator.ledger)
        world.coordinator.jobs.operators = stolen
        name = await submitted(world, people.keys["eve"], job(rounds=1))
        assert "not signed by an admin of this fleet" in await refused(name)
        assert signed is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"aprovals": 2}, "unknown key `aprovals`"),
        ({"approvals": 0}, "approvals"),
        ({"operators": {"alice": {"role": "king", "key": "x"}}}, "king"),
        ({"operators": {"alice": {"role": "admin"}}}, "key"),
    ],
)
def test_a_roster_that_is_misspelt_is_refused(
    people: People, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """A typing error in `approvals` would let one operator alone sign."""
    whole = {
        "operators": {"alice": {"role": "admin", "key": encode_key(people.keys["alice"].public)}},
        **change,
    }
    path = tmp_path / "roster.yaml"
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(ConfigError, match=reason):
        people.keys["alice"].roster(path, "main", 1)


def test_keys_are_not_overwritten_and_not_left_open(tmp_path: Path) -> None:
    generate(tmp_path / "a.key")
    with pytest.raises(ConfigError, match="exists"):
        generate(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        OperatorKey(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o600)
    (tmp_path / "a.key").write_text("nonsense")
    with pytest.raises(ConfigError, match="is no key"):
        OperatorKey(tmp_path / "a.key")


class Login:
    """An issuer on loopback."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric import rsa

        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.url = ""

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.add_routes(
            [web.get("/.well-known/openid-configuration", self.about), web.get("/keys", self.keys)]
        )
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def about(self, request: web.Request) -> web.Response:
        return web.json_response({"issuer": self.url, "jwks_uri": f"{self.url}/keys"})

    async def keys(self, request: web.Request) -> web.Response:
        key = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
        return web.json_response({"keys": [{**key, "kid": "1", "use": "sig", "alg": "RS256"}]})

    def token(self, key: Any = None, **claims: Any) -> str:
        said = {
            "iss": self.url,
            "aud": "rankfleet",
            "sub": "carol",
            "exp": time.time() + 60,
            "roles": ["rankfleet-operator"],
            **claims,
        }
        return jwt.encode(said, key or self.key, algorithm="RS256", headers={"kid": "1"})


async def test_operators_who_log_in_at_an_issuer(tmp_path: Path, tiny: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    login = Login()
    runner = await login.start()
    async with World(tmp_path, tiny, devices=1) as world:
        world.coordinator.operators.issuer = Issuer(Oidc(issuer=login.url))
        suspend = lambda **headers: asked(world, None, "POST", "/devices/d0/suspend", **headers)  # noqa: E731
        assert "no token of the issuer" in (await suspend())[1]["error"]
        for token, why in (
            (login.token(roles=["rankfleet-viewer"]), "takes the role operator"),
            (login.token(roles=["root"]), "names no role"),
            (login.token(aud="another"), "not taken"),
            (login.token(iss="https://elsewhere"), "not taken"),
            (login.token(exp=time.time() - 60), "not taken"),
            (login.token(key=rsa.generate_private_key(public_exponent=65537, key_size=2048)), "not taken"),
            (
                jwt.encode(
                    {"sub": "x", "roles": ["rankfleet-admin"]}, "", algorithm="none", headers={"kid": "1"}
                ),
                "not taken",
            ),
            ("rubbish", "not taken"),
        ):
            status, answer = await suspend(**{"X-Oidc": token})
            assert (status, why in answer["error"]) == (400, True), answer
        assert (await suspend(**{"X-Oidc": login.token()}))[0] == 200
        assert [r["operator"] for r in world.coordinator.ledger.rows(tables.audit)] == ["carol"]
    await runner.cleanup()
    with pytest.raises(ConfigError, match="cannot be asked"):
        Issuer(Oidc(issuer=login.url)).role(login.token())
    with pytest.raises(ConfigError, match="not at https"):
        Issuer(Oidc(issuer="http://login.example")).role("x")
