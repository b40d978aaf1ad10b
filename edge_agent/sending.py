"""Offers every update in the outbox until the coordinator's receipt; a broker's acknowledgement proves nothing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from federated.messages import Grant, Message, Offer, Receipt
from federated.transfer import cut, numbers
from federated.within import within

from .order import Meta, round_folder
from .outbox import Outbox
from .status import Status

log = logging.getLogger(__name__)
TRIES = 5
"""Unanswered offers after which the broker is suspected aloud."""


class Sender:
    """One upload at a time, oldest first. `mail` wakes it."""

    def __init__(
        self,
        outbox: Outbox,
        status: Status,
        say: Callable[[Message], Awaitable[None]],
        publish: Callable[[str, bytes], Awaitable[None]],
        answer_s: float,
    ) -> None:
        self.outbox, self.status, self.say, self.publish, self.answer_s = outbox, status, say, publish, answer_s
        self.mail = asyncio.Event()
        self._answers: dict[str, asyncio.Queue[Grant | Receipt]] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            for folder, meta in self.outbox.due():
                try:
                    await self._send(folder, meta)
                except OSError as error:
                    log.warning("update of round %d: %s", meta.round, error)
            self.mail.clear()
            if not self.outbox.due():
                if self.status["state"] == "sending":
                    self.status.write(state="idle")
                await self.mail.wait()

    def answer(self, message: Grant | Receipt) -> None:
        """The coordinator's answer, for the upload that it is about."""
        queue = self._answers.get(message.digest)
        if queue is not None:
            queue.put_nowait(message)
        elif isinstance(message, Receipt):
            self._settle(message)

    async def _send(self, folder: Path, meta: Meta) -> None:
        """Offer, send what is granted, until a receipt; every wait has an end, and then it starts over."""
        queue = self._answers[meta.blob.digest] = asyncio.Queue()
        data = (folder / "update").read_bytes()
        tries = 0
        try:
            while (folder / "update").exists():
                await self.say(Offer(meta.job, meta.round, meta.blob, meta.signature))
                try:
                    while True:
                        answer = await within(self.answer_s * min(6, 1 + tries), queue.get())
                        if isinstance(answer, Receipt):
                            self._settle(answer)
                            return
                        for number in numbers(answer.missing, meta.blob.chunks):
                            await self.publish("chunk", cut(data, meta.blob, number))
                except asyncio.TimeoutError:
                    tries += 1
                    if tries == TRIES:
                        self.status.fail("the broker accepts but does not deliver: ACL or size limit?")
                        log.error("no receipt after %d tries: %s", tries, self.status["last_error"])
        finally:
            self._answers.pop(meta.blob.digest, None)

    def _settle(self, receipt: Receipt) -> None:
        folder = round_folder(self.outbox.jobs, receipt.job, receipt.round)
        if not receipt.accepted:
            log.error("the coordinator refused the update of round %d: %s", receipt.round, receipt.reason)
            self.status.fail(receipt.reason)
        if folder.exists():
            self.outbox.drop(folder)
