"""Arms, prices, policies and the rules around them."""

import json
import random
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfleet.bandit.arms import Arm, ArmSpace, expand, rank_and_depth, targets
from rankfleet.bandit.policies import modules, policy_class
from rankfleet.bandit.policies.cost_ucb import CostUCB, sweep
from rankfleet.bandit.policy import Member, Outcome, Priced
from rankfleet.bandit.tuner import NoArm, Tuner
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.stack import Stack
from rankfleet.profiles.card import ModelCard, Module
from rankfleet.profiles.cost import price
from rankfleet.profiles.device import SOURCES, DeviceProfile, generic, library, match
from rankfleet.profiles.memory import memory_mb


def card(layers: int = 6, h: int = 384, f: int = 1536) -> ModelCard:
    modules = []
    for i in range(layers):
        modules += [
            Module(f"layer.{i}.{n}", i, h, h, "attention") for n in ("query", "key", "value", "dense")
        ]
        modules += [Module(f"layer.{i}.up", i, f, h, "up"), Module(f"layer.{i}.down", i, h, f, "down")]
    return ModelCard("m", "0" * 64, "bert", layers, h, f, 12, 1000, 12_000_000, modules)


CARD = card()
sparse_bits = Stack(build_stack(["sparse"])).wire_bits
SPACE = ArmSpace(ranks=(4, 8, 16), prune=(0.0, 0.1, 0.2), bits=(32, 8, 4), steps=(8, 12), batch=8)


def tuner(policy: str = "cost_ucb", state: Any = None, **settings_: Any) -> Tuner:
    return Tuner(
        policy_class(policy)(**settings_),
        CARD,
        targets(CARD, ["auto"]),
        SPACE,
        max_depth=3,
        length=32,
        head=4000,
        wire_bits=sparse_bits,
        seed=1,
        state=state,
    )


def device(name: str, budget: float) -> DeviceProfile:
    return msgspec.structs.replace(library()[name], model_budget_mb=budget)


FLEET = [
    ("nano", device("jetson-orin-nano-8gb", 42.0), 0.2),
    ("pi", device("raspberry-pi-5-8gb", 109.0), 0.3),
    ("laptop", device("laptop-x86-16gb", 369.0), 0.5),
]


def joined(made: Tuner) -> Tuner:
    for name, profile, _ in FLEET:
        made.join(name, profile, {})
    return made


def test_placements() -> None:
    modules = targets(CARD, ["auto"])
    top = expand("top(2, r=8)", CARD, modules)
    assert len(top) == 4
    assert set(top.values()) == {8}
    assert rank_and_depth(top, CARD) == (8, 2)
    rising = expand("rising(3..5, total=48)", CARD, modules)
    ranks = [rising[f"layer.{i}.query"] for i in (3, 4, 5)]
    assert ranks == sorted(ranks)
    assert sum(ranks) == 48
    scored = expand("scored(query,value@5,1; r=4..16)", CARD, modules)
    assert scored == {"layer.1.query": 8, "layer.1.value": 8, "layer.5.query": 16, "layer.5.value": 16}
    assert rank_and_depth(scored, CARD) == (16, 5)
    for bad in (
        "top(2)",
        "rising(3..9, total=10)",
        "scored(key@1; r=1..2)",
        "import os",
        "scored(query@9; r=1..2)",
    ):
        with pytest.raises(ValueError, match=r"."):
            expand(bad, CARD, modules)


@given(
    st.integers(1, 6),
    st.sampled_from([4, 8, 16]),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.sampled_from([4, 8, 32]),
)
@settings(deadline=None)
def test_cost_grows_with_depth_and_falls_with_pruning(depth: int, rank: int, prune: float, bits: int) -> None:
    modules = targets(CARD, ["all"])

    def of(d: int, p: float) -> tuple[float, float]:
        placement = expand(f"top({d}, r={rank})", CARD, modules)
        cost = price(
            CARD, library()["raspberry-pi-5-8gb"], placement, prune=p, bits=bits, batch=8, steps=8, length=32
        )
        return cost.memory_mb, cost.seconds

    memory, seconds = of(depth, prune)
    if depth < 6:
        assert of(depth + 1, prune) > (memory, seconds)
    assert memory <= of(depth, 0.0)[0]
    assert seconds <= of(depth, 0.0)[1]


def test_bits_are_chosen_once_by_what_fits_and_is_fastest() -> None:
    made = joined(tuner())
    assert [made.state["devices"][d]["bits"] for d in ("nano", "pi", "laptop")] == [4, 32, 32]
    fast8 = tuner()
    assert fast8.join("laptop", FLEET[2][1], {"32": 9.0, "8": 3.0, "4": 5.0}) == 8
    assert fast8.join("laptop", FLEET[2][1], {"32": 1.0, "8": 3.0, "4": 5.0}) == 8
    with pytest.raises(NoArm, match="allows 5 MB for the model, the smallest arm needs"):
        tuner().join("tiny", device("raspberry-pi-5-8gb", 5.0), {})


@pytest.mark.parametrize("policy", sorted(modules()))
def test_no_policy_ever_picks_what_does_not_fit_and_replays_the_same(policy: str) -> None:
    def play(made: Tuner, restart: bool) -> list[dict[str, str]]:
        joined(made)
        seen = []
        for number in range(25):
            if restart:
                made = tuner(policy, json.loads(json.dumps(made.state)))
            chosen = made.choose(number, FLEET)
            for name, profile, _ in FLEET:
                arm = chosen[name].arm
                placement = made.placements[arm.placement]
                assert (
                    memory_mb(CARD, placement, arm.prune, arm.bits, arm.batch, 32, 4000) <= profile.budget_mb
                )
                assert chosen[name].why
            seen.append({d: c.arm.text() for d, c in chosen.items()})
            rng = random.Random(number)
            made.observe(
                [
                    Outcome(d, p.name, chosen[d].arm, 2.0, 2.0 - rng.random(), 1 + rng.random(), 0.3)
                    for d, p, _ in FLEET
                ],
                {d: p for d, p, _ in FLEET},
                {},
            )
        return seen

    first = play(tuner(policy), restart=False)
    assert first == play(tuner(policy), restart=True)


def test_pruning_only_grows_and_at_most_every_fifth_round() -> None:
    made = joined(tuner("ucb1"))
    last: dict[str, tuple[float, int]] = {}
    for number in range(40):
        for name, choice in made.choose(number, FLEET).items():
            prune, since = last.get(name, (choice.arm.prune, number - 5))
            assert choice.arm.prune >= prune
            if choice.arm.prune > prune:
                assert number - since >= 5
                since = number
            last[name] = (
                choice.arm.prune,
                since if choice.arm.prune > prune or name not in last else last[name][1],
            )
        made.observe([], {}, {})


def test_the_time_model_follows_what_was_measured() -> None:
    made = joined(tuner("fixed"))
    for number in range(12):
        chosen = made.choose(number, FLEET)
        outcomes = []
        for name, profile, _ in FLEET:
            arm = chosen[name].arm
            truth = price(
                CARD,
                profile,
                made.placements[arm.placement],
                prune=arm.prune,
                bits=arm.bits,
                batch=8,
                steps=arm.steps,
                length=32,
                head=4000,
                wire_bits=sparse_bits,
                correction=3.0 if name == "pi" else 1.0,
            ).seconds
            outcomes.append(Outcome(name, profile.name, arm, 2.0, 1.5, truth))
        made.observe(outcomes, {d: p for d, p, _ in FLEET}, {})
    assert made.state["devices"]["pi"]["speed"] == pytest.approx(3.0, rel=0.1)
    assert made.state["devices"]["laptop"]["speed"] == pytest.approx(1.0, rel=0.05)


def test_a_memory_failure_lowers_what_is_asked() -> None:
    made = joined(tuner())
    before = max(p.memory_mb for p in made.feasible("pi", FLEET[1][1], 0))
    for _ in range(2):
        arm = made.choose(0, FLEET)["pi"].arm
        made.observe(
            [Outcome("pi", "raspberry-pi-5-8gb", arm, 0, 0, 1.0, failed="memory")],
            {d: p for d, p, _ in FLEET},
            {},
        )
    assert made.state["devices"]["pi"]["bits"] == 8
    assert made.feasible("pi", FLEET[1][1], 0)
    assert before <= 109


def test_the_sweep_does_not_let_one_slow_device_set_the_pace() -> None:
    def member(name: str, speed: float) -> Member:
        return Member(
            name,
            name,
            0.5,
            [Priced(Arm(placement=f"top({d}, r=8)"), 8, d, d * speed, 1.0, d**0.5) for d in (1, 2, 3)],
        )

    members = [member("fast", 1.0), member("slow", 20.0)]
    assert sweep(members) == 20.0
    chosen = CostUCB(width=0.0).choose(members, {}, 0, random.Random(0))
    assert chosen["slow"].arm.placement == "top(1, r=8)"
    assert chosen["fast"].arm.placement == "top(3, r=8)"


def test_the_bandit_learns_which_arm_pays() -> None:
    arms = [Priced(Arm(placement=f"top({d}, r=8)"), 8, d, 1.0, 1.0, 1.0) for d in (1, 2, 3)]
    policy, state = CostUCB(explorers=1.0), {}
    for number in range(60):
        pick = policy.choose([Member("d", "k", 1.0, arms)], state, number, random.Random(number))["d"].arm
        drop = {"top(1, r=8)": 0.1, "top(2, r=8)": 0.5, "top(3, r=8)": 0.2}[pick.placement]
        other = Outcome("x", "other", arms[0].arm, 1.0, 0.4, 1.0)
        policy.observe([Outcome("d", "k", pick, 1.0, 1.0 - drop, 1.0), other], state)
    assert pick.placement == "top(2, r=8)"


def test_profiles_match_what_a_probe_sees(tmp_path: Path) -> None:
    assert match("aarch64", "NVIDIA Jetson Orin Nano Developer Kit", 7500, 6).name == "jetson-orin-nano-8gb"
    assert match("aarch64", "NVIDIA Jetson Orin NX Engineering", 15700, 8).name == "jetson-orin-nx-16gb"
    assert match("aarch64", "Raspberry Pi 5 Model B Rev 1.0", 8064, 4).name == "raspberry-pi-5-8gb"
    assert match("x86_64", "", 16000, 8).name == "laptop-x86-16gb"
    assert match("riscv64", "", 4000, 4) == generic("riscv64", 4000, 4)
    for profile in library().values():
        assert set(profile.source.values()) <= set(SOURCES), (
            f"{profile.name} says where its figures come from"
        )
        assert "gflops" in profile.source


def test_auto_takes_what_a_device_measured_fastest_and_never_assumes_bf16() -> None:
    space = msgspec.convert({"bits": "auto"}, ArmSpace)
    made = Tuner(
        policy_class("fixed")(),
        CARD,
        targets(CARD, ["auto"]),
        space,
        max_depth=3,
        length=32,
        head=4000,
        wire_bits=sparse_bits,
        seed=1,
    )
    roomy = device("laptop-x86-16gb", 4000.0)
    assert made.join("avx2", roomy, {"32": 4.0, "16": 120.0, "8": 5.0, "4": 6.0}) == 32
    assert made.join("bf16", roomy, {"32": 4.0, "16": 2.0, "8": 2.5, "4": 2.6}) == 16
    assert made.join("unmeasured", roomy, {}) != 16
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"bits": "best"}, ArmSpace)


def test_the_file_name_is_the_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"cost_ucb", "fedspine", "fixed", "ucb1"} <= set(modules())
    theirs = EntryPoint("dice", "rankfleet.bandit.policies.fixed", "rankfleet.policies")
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [theirs] if group == "rankfleet.policies" else []
    )
    modules.cache_clear()
    try:
        assert policy_class("dice").__name__ == "Fixed"
    finally:
        policy_class.cache_clear()
        modules.cache_clear()
