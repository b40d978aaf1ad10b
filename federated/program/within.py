"""Wait for something, but not for ever, and never deaf to a cancellation.

`asyncio.wait_for` of Python 3.10 and 3.11 returns the result and swallows a cancellation that arrives in
the same moment: a service that is being stopped just as a message comes in would then run on.
`asyncio.wait` does not.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises asyncio.TimeoutError after `seconds`; a cancellation ends `work` too."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
