"""Offers every update in the outbox until the coordinator's receipt; a broker's acknowledgement proves
nothing."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from rankfleet.federated.program.within import within
from rankfleet.federated.wire.messages import Grant, Message, Offer, Receipt
from rankfleet.federated.wire.transfer import cut, numbers

from ..order import Meta, result_of, update_file
from ..status import Status
from .outbox import Outbox

log = logging.getLogger(__name__)
OFFER_BYTES = 512
"""What an offer takes beside the data in it, at most."""
IN_FLIGHT = 2
"""Pieces under way: the link is never idle, and a cut loses little."""
TRIES = 5
"""Unanswered offers after which the broker is suspected aloud."""


class Sender:
    """One upload at a time, oldest first. `mail` wakes it."""

    def __init__(
        self,
        outbox: Outbox,
        status: Status,
        say: Callable[[Message], Awaitable[None]],
        publish: Callable[[str, bytes], Coroutine[Any, Any, bool]],
        answer_s: float,
    ) -> None:
        self.outbox, self.status, self.say, self.publish, self.answer_s = (
            outbox,
            status,
            say,
            publish,
            answer_s,
        )
        self.mail = asyncio.Event()
        self._since: float | None = None
        self._answers: dict[str, asyncio.Queue[Grant | Receipt | None]] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            for result, meta in self.outbox.due():
                if (data := self.outbox.read(result)) is None:
                    log.error(
                        "the update of round %d is damaged on disk and is trained again when the "
                        "coordinator asks",
                        meta.round,
                    )
                else:
                    await self._send(result, meta, data)
            self.mail.clear()
            if not self.outbox.due():
                if self.status["state"] == "sending":
                    self.status.write(state="idle")
                await self.mail.wait()

    def unanswered_s(self) -> float:
        """For how long nobody has answered an offer; 0 where none waits."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def wake(self) -> None:
        """The connection is new: whoever waits for an answer asks again."""
        for queue in self._answers.values():
            queue.put_nowait(None)
        self.mail.set()

    def answer(self, message: Grant | Receipt) -> None:
        """The coordinator's answer, for the upload that it is about."""
        queue = self._answers.get(message.digest)
        if queue is not None:
            queue.put_nowait(message)
        elif isinstance(message, Receipt):
            self._settle(message)

    async def _send(self, result: Path, meta: Meta, data: bytes) -> None:
        """Offer, send what is granted, until a receipt; every wait has an end, and then it starts over."""
        queue = self._answers[meta.blob.digest] = asyncio.Queue()
        tries, offered = 0, False
        try:
            while update_file(result).exists():
                # Small updates travel with their first offer; if that is not answered, the coordinator says
                # what it lacks.
                small = meta.inline and not offered and len(data) + OFFER_BYTES <= meta.blob.chunk
                await self.say(
                    Offer(meta.job, meta.round, meta.blob, meta.signature, data if small else b"", meta.cost)
                )
                offered = True
                self._since = self._since if self._since is not None else time.monotonic()
                try:
                    while True:
                        answer = await within(self.answer_s * min(6, 1 + tries), queue.get())
                        if answer is None:
                            break
                        self._since = None
                        if isinstance(answer, Receipt):
                            self._settle(answer)
                            return
                        if not await self._pieces(
                            data, meta, list(numbers(answer.missing, meta.blob.chunks))
                        ):
                            break
                except asyncio.TimeoutError:
                    tries += 1
                    if tries == TRIES:
                        self.status.fail("the broker accepts but does not deliver: ACL or size limit?")
                        log.error("no receipt after %d tries: %s", tries, self.status["last_error"])
        finally:
            self._answers.pop(meta.blob.digest, None)

    async def _pieces(self, data: bytes, meta: Meta, wanted: list[int]) -> bool:
        """Send pieces, two at a time, so that the link is never idle; False where the connection was lost
        in between."""
        sending: set[asyncio.Task[bool]] = set()
        while wanted or sending:
            while wanted and len(sending) < IN_FLIGHT:
                sending.add(
                    asyncio.create_task(
                        self.publish("chunk", cut(data, meta.blob, wanted.pop(0))), name="piece"
                    )
                )
            done, sending = await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
            if not all(t.result() for t in done):
                await asyncio.gather(*sending)
                return False
        return True

    def _settle(self, receipt: Receipt) -> None:
        result = result_of(self.outbox.jobs, receipt.job, receipt.round)
        if not receipt.accepted:
            log.error("the coordinator refused the update of round %d: %s", receipt.round, receipt.reason)
            self.status.fail(receipt.reason)
        self.outbox.drop(result)
