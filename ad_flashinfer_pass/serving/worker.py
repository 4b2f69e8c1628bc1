"""The thread that runs the engine, and the way of requests into it and of tokens out of it.

Nobody else calls the engine, so nothing that a client does can hold up a step: requests and cancellations
wait in an inbox that is emptied between two steps. What steps bring goes to the event loop in one call,
however many have passed until it comes round to it: a loop that is late gets more tokens at once, not more
calls.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from ad_flashinfer_pass.collector import new_objects_alone
from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.engine import Engine, StepOutput
from ad_flashinfer_pass.runtime.sampling import SamplingParams


class WorkerDied(RuntimeError):
    """The engine's thread has ended by an error that is nobody's request's."""


class Ticket:
    """A request in the engine, as the event loop sees it."""

    def __init__(self) -> None:
        self.request_id = -1
        self._outputs: deque[StepOutput] = deque()
        self._has_news = asyncio.Event()
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, outputs: Sequence[StepOutput]) -> None:
        """Take what steps brought."""
        self._outputs += outputs
        self._has_news.set()

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._error = error
        self._has_news.set()

    def fail_at(self, when: float, error: Exception) -> None:
        """Fail at a time of the event loop, unless ``release`` is called before."""
        self._timer = asyncio.get_running_loop().call_at(when, self.fail, error)

    def release(self) -> None:
        """Nobody waits for it any more."""
        if self._timer is not None:
            self._timer.cancel()

    async def next_outputs(self) -> list[StepOutput]:
        """What has come since the last time; the last output of all has a completion.

        Raises:
            Exception: what ``fail`` was called with.
        """
        await self._has_news.wait()
        self._has_news.clear()
        if self._error is not None:
            raise self._error
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs


class Worker:
    """Runs an engine, which from now on is its own, in a thread.

    Args:
        engine: with no requests.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        """Only what it says of itself is for others."""
        self._loop = asyncio.get_running_loop()
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        """By request id; of the engine's thread."""
        self._news: list[tuple[Ticket, list[StepOutput]]] = []
        self._lock = threading.Lock()
        """Of ``_news``."""
        self.error: BaseException | None = None
        """Why the thread has ended, if it was not asked to."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, token_ids: Sequence[int], params: SamplingParams, cache_salt: str) -> Ticket:
        """Queue a request. ``close`` must be called with what this returns, whatever happens.

        Raises:
            RequestError: the engine refuses it.
            WorkerDied: there is no engine any more.
        """
        ticket, accepted = Ticket(), Future[None]()

        def add() -> None:
            if self.error is not None:
                accepted.set_exception(WorkerDied(str(self.error)))
                return
            try:
                ticket.request_id = self.engine.add_request(
                    token_ids, params, cache_salt=cache_salt, detokenize=False
                )
            except RequestError as err:
                accepted.set_exception(err)
                return
            self._tickets[ticket.request_id] = ticket
            accepted.set_result(None)

        self._inbox.put(add)
        if self.error is not None:  # then nobody may be left to look into the inbox
            raise WorkerDied(str(self.error))
        try:
            await asyncio.shield(asyncio.wrap_future(accepted))
        except asyncio.CancelledError:
            self.close(ticket)  # which is carried out after add
            raise
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Cancel a request if it has not ended; its last output comes as always. Does not wait."""

        def cancel() -> None:
            if self.error is None and ticket.request_id in self._tickets:
                self.engine.cancel(ticket.request_id)

        self._inbox.put(cancel)

    async def stop(self) -> None:
        """End the thread; whatever is left is cancelled."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            gc.collect()  # from now on nobody looks for what the start has left behind
            with new_objects_alone():
                while self._obey():
                    self._hand_out(self.engine.step())
        except BaseException as err:  # those who wait must hear of it
            self.error = err
            for ticket in self._tickets.values():
                self._loop.call_soon_threadsafe(ticket.fail, WorkerDied(f"{type(err).__name__}: {err}"))
            while not self._inbox.empty():
                command = self._inbox.get()
                if command is not None:
                    command()
            raise

    def _obey(self) -> bool:
        """Do what is in the inbox, and wait for it if there is nothing else to do; false to end."""
        while True:
            try:
                command = self._inbox.get(block=not self.engine.has_work)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _hand_out(self, outputs: list[StepOutput]) -> None:
        by_ticket: dict[Ticket, list[StepOutput]] = {}
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None:
                by_ticket.setdefault(ticket, []).append(output)
                if output.completion is not None:
                    del self._tickets[output.request_id]
        if not by_ticket:
            return
        with self._lock:
            is_first = not self._news
            self._news += by_ticket.items()
        if is_first:
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            news, self._news = self._news, []
        for ticket, outputs in news:
            ticket.put(outputs)
