"""Which processes are an agent, and the program that is both programs."""

import pytest

from rankfleet import __version__, cli
from rankfleet.edge_agent.cli import _is_agent


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("/usr/bin/python3 /opt/edge-agent/bin/edge-agent run", True),
        ("python -m rankfleet.edge_agent run", True),
        ("python /venv/bin/rankfleet agent run", True),
        ("python -m rankfleet agent run", True),
        ("python -m rankfleet coordinator serve", False),
        ("ssh-agent rankfleet", False),
    ],
)
def test_an_agent_by_its_command_line(line: str, ours: bool) -> None:
    assert _is_agent(line.split()) == ours


def test_one_program_for_both(capsys: pytest.CaptureFixture[str]) -> None:
    for program, name in (("agent", "edge-agent"), ("coordinator", "coordinator")):
        with pytest.raises(SystemExit, match="0"):
            cli.main([program, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} ")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"rankfleet {__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["linter"])
