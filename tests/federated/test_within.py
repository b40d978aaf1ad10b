"""A wait that ends: by its result, by its deadline, or by a cancellation, also one that meets the result."""

import asyncio

import pytest

from rankfleet.federated.program.within import within


async def test_result_and_deadline() -> None:
    assert await within(1.0, asyncio.sleep(0, "x")) == "x"
    with pytest.raises(asyncio.TimeoutError):
        await within(0.01, asyncio.sleep(10))


async def test_a_cancellation_that_meets_the_result_is_heard() -> None:
    event = asyncio.Event()
    ended = []

    async def loop() -> None:
        try:
            while True:
                event.clear()
                await within(10.0, event.wait())
        finally:
            ended.append(True)

    task = asyncio.create_task(loop())
    for _ in range(6):
        await asyncio.sleep(0)
    event.set()
    await asyncio.sleep(0)
    task.cancel()
    done, _pending = await asyncio.wait({task}, timeout=1.0)
    assert done
    assert ended


async def test_what_was_waited_for_ends_too() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            cancelled.set()

    task = asyncio.create_task(within(10.0, work()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(cancelled.wait(), 1)
