"""How fast the programs start, and what they import: seconds of `--help`, memory of an agent that has
imported everything idle."""

import subprocess
import sys

from .table import interleaved, report

IDLE = (
    "import rankfleet.edge_agent.service, rankfleet.edge_agent.supervise.process, "
    "rankfleet.edge_agent.trust.identity; "
    "import rankfleet.edge_agent.machine.probe, rankfleet.federated.transport.mqtt, ssl, psutil; "
    "print(psutil.Process().memory_info().rss / 2**20)"
)


def main() -> None:
    """Both programs, beside a bare interpreter."""

    def run(*words: str) -> str:
        return subprocess.run([sys.executable, *words], capture_output=True, check=True, text=True).stdout

    times = interleaved(
        {
            "python": lambda: run("-c", ""),
            "edge-agent": lambda: run("-m", "rankfleet.edge_agent", "--help"),
            "coordinator": lambda: run("-m", "rankfleet.coordinator", "--help"),
            "coordinator methods": lambda: run("-m", "rankfleet.coordinator", "methods"),
        }
    )
    rows = [{"program": k, "seconds": round(t, 3)} for k, t in times.items()]
    report("start", rows, idle_imports_mb=round(float(run("-c", IDLE)), 1))


if __name__ == "__main__":
    main()
