"""States are written in one file, and the ledger's columns hold them."""

import re
from pathlib import Path

from rankfleet.coordinator.store import tables
from rankfleet.federated.wire.states import ALL

ROOT = Path(__file__).parent.parent.parent


def test_every_state_fits_its_column() -> None:
    for table, states in ALL.items():
        assert max(map(len, states)) <= tables.meta.tables[table].c.state.type.length


def test_the_ended_states_are_listed_nowhere_else() -> None:
    listed = re.compile(r"\(\s*\"finished\",\s*\"failed\",\s*\"cancelled\"")
    for room in ("coordinator", "edge_agent", "federated", "demo", "bandit", "profiles"):
        for path in (ROOT / room).rglob("*.py"):
            assert path.name == "states.py" or not listed.search(path.read_text(encoding="utf-8")), path
