"""flwr's side of bench-overhead: FedAvg over a MiniLM rank-8 adapter to which each client adds a slice of seeded noise.

Runs in flwr's own environment, as an app in deployment mode, or with `python noise_app.py CLIENTS ROUNDS OUT` in its simulation.
"""

import json
import sys
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

SHAPES = ([(8, 384), (384, 8)] * 4 + [(8, 384), (1536, 8), (8, 1536), (384, 8)]) * 6
TABLE = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(1e-3)
client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Add noise that depends on client and time."""
    arrays = message.content["arrays"].to_numpy_ndarrays()
    at = hash((context.node_id, time.time_ns())) % (len(TABLE) - 400_000)
    moved = []
    for a in arrays:
        moved.append(a + TABLE[at : at + a.size].reshape(a.shape))
        at += a.size
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that writes down when each round was aggregated."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.times: list[tuple[float, int]] = []

    def aggregate_train(self, server_round: int, replies: object) -> object:
        """As FedAvg does it."""
        found = list(replies)
        result = super().aggregate_train(server_round, found)
        self.times.append((time.time(), len(found)))
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, then the times as JSON."""
    config = context.run_config
    run(grid, int(config["clients"]), int(config["rounds"]), str(config["out"]))


def run(grid: Grid, clients: int, rounds: int, out: str) -> None:
    """FedAvg with everybody in every round."""
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(s, np.float32) for s in SHAPES]), num_rounds=rounds)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(strategy.times, file)


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    count, total, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    simulated = ServerApp()

    @simulated.main()
    def simulate(grid: Grid, context: Context) -> None:
        """The same rounds in memory."""
        run(grid, count, total, where)

    run_simulation(simulated, client, num_supernodes=count, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
