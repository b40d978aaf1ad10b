"""A job's life: open a round, wait, close it, again; then install the result.

Everything that a restart needs is in the ledger and in files before anybody is told, so a kill at any
instant changes nothing: the same assignments are sent again, and a round that was being closed is closed
again from the same updates.
"""

from rankfleet.federated.errors import ConfigError

from . import closing, installing, lineage, opening, waiting
from .run import JobRunner

ATTEMPTS = 5
"""So often a round is opened in which every device fails."""


async def run_job(run: JobRunner) -> None:
    """Until the job is finished. Raises ConfigError where it cannot go on."""
    await _begin(run)
    while run.version.number < run.rounds:
        number = run.version.number
        await run.while_paused()
        if run.ledger.round(run.job, number) is None:
            await opening.open_round(run, number)
        else:
            opening.reopen(run, number)
        await _until_closable(run, number)
        await closing.close(run, number)
    await installing.install_everywhere(run)


async def _begin(run: JobRunner) -> None:
    """Go on from the newest version, or make the first."""
    versions = run.ledger.versions(run.job)
    if versions:
        run.load(max(r["number"] for r in versions))
        return
    await run.members()
    first = run.planner.first_version(run.server_rank(), run.server)
    if run.plan.spec.start:
        lineage.start_from(run, first, run.plan.spec.start)
    with run.ledger.write() as tx:
        run.record(tx, first)
    run.load(first.number)


async def _until_closable(run: JobRunner, number: int) -> None:
    """Wait; open the round again where every device failed. Raises ConfigError when they do so again and
    again."""
    for _ in range(ATTEMPTS):
        failed = await waiting.until_closable(run, number)
        if not failed:
            return
        await waiting.forget(run, number, failed)
        await opening.open_round(run, number)
    raise ConfigError(
        f"round {number}: every device failed {ATTEMPTS} times; the last reason: {failed[-1]['reason']}"
    )
