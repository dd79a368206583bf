"""Concurrent requests, one forward pass: whatever waits while a pass runs becomes the next one."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from service.predictor import Answer, Predictor, Question
from service.problems import NOT_READY, OVERLOADED, Problem
from trainer.config import ServiceSettings

# Within some 5 ms. In a thread of its own a pass would wait for the interpreter at each of its operations while the
# event loop is busy.
INLINE_ROWS: Final = 1024
MOST_WAITING_ROWS: Final = 65_536  # up to a second of work; rows are what waiting requests hold in memory


class _Waiting(NamedTuple):
    question: Question
    predictor: Predictor | None  # None for whichever is current when the pass begins
    answer: asyncio.Future[Answer]
    due_s: float  # by the loop's clock, when it waits for no more company


class Batcher:
    """Gathers questions on the event loop and answers them pass by pass, all questions of a pass by one model.

    Args:
        current: gives the model to use, read once for each pass; None while there is none.
        settings: how much may wait, how many rows a pass takes, and how long it waits for them.
    """

    def __init__(self, current: Callable[[], Predictor | None], settings: ServiceSettings) -> None:
        self._current = current
        self._max_queue = settings.max_queue
        self._max_batch_size = settings.max_batch_size
        self._max_wait_s = settings.max_wait_s
        self._waiting: deque[_Waiting] = deque()
        self._waiting_rows = 0
        self._running = False
        self._in_thread = False
        self._timer: asyncio.TimerHandle | None = None  # set while a pass waits for more rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict")

    def __len__(self) -> int:
        """Questions that wait."""
        return len(self._waiting)

    def ask(self, question: Question, predictor: Predictor | None = None) -> asyncio.Future[Answer]:
        """Queues a question, for the current model or for one that is given; to be called on the event loop.

        Raises:
            Problem: too much waits already.
        """
        rows = question.rows
        self.check_room(rows)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(question, predictor, loop.create_future(), loop.time() + self._max_wait_s)
        self._waiting.append(waiting)
        self._waiting_rows += rows
        if self._timer is not None and self._waiting_rows >= self._max_batch_size:
            self._timer.cancel()
            self._timer = None
            loop.call_soon(self._next_pass)
        elif not self._running:
            self._running = True
            # Not at once: requests that came in by the same turn of the loop join the pass.
            loop.call_soon(self._next_pass)
        return waiting.answer

    def check_room(self, rows: int = 0) -> None:
        """Whether a question of so many rows may wait.

        Raises:
            Problem: too much waits already.
        """
        if len(self._waiting) >= self._max_queue or (self._waiting and self._waiting_rows + rows > MOST_WAITING_ROWS):
            raise Problem(OVERLOADED, f"{len(self._waiting)} requests wait already; try again later.")

    @property
    def is_behind(self) -> bool:
        """Whether what has just been asked waits for longer than this turn of the event loop."""
        return self._in_thread or self._waiting_rows > INLINE_ROWS or self._max_wait_s > 0

    def forget(self, answer: asyncio.Future[Answer]) -> None:
        """Gives up a question: if it still waits, it is never answered and its place is free."""
        answer.cancel()
        for place, waiting in enumerate(self._waiting):
            if waiting.answer is answer:
                del self._waiting[place]
                self._waiting_rows -= waiting.question.rows
                return

    def close(self) -> None:
        """Waits for a pass that runs in the thread."""
        self._thread.shutdown()

    def _next_pass(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        if self._max_wait_s and self._waiting and self._waiting_rows < self._max_batch_size:
            due_s = self._waiting[0].due_s
            if loop.time() < due_s:
                self._timer = loop.call_at(due_s, self._next_pass)
                return
        asked = self._take()
        if not asked:
            self._running = False
            return
        predictor = asked[0].predictor or self._current()
        if predictor is None:
            _fail(asked, Problem(NOT_READY, "There is no model to predict with."))
            loop.call_soon(self._next_pass)
            return
        questions = [waiting.question for waiting in asked]
        if sum(question.rows for question in questions) <= INLINE_ROWS:
            try:
                _settle(asked, predictor.answer(questions))
            except Exception as error:
                _fail(asked, error)
            loop.call_soon(self._next_pass)
            return

        def done(future: asyncio.Future[list[Answer]]) -> None:
            self._in_thread = False
            error = future.exception()
            if error is None:
                _settle(asked, future.result())
            else:
                _fail(asked, error)
            self._next_pass()

        self._in_thread = True
        loop.run_in_executor(self._thread, predictor.answer, questions).add_done_callback(done)

    def _take(self) -> list[_Waiting]:
        taken: list[_Waiting] = []
        rows = 0
        while self._waiting:
            following = self._waiting[0]
            if taken and (
                following.predictor is not taken[0].predictor or rows + following.question.rows > self._max_batch_size
            ):
                break
            waiting = self._waiting.popleft()
            self._waiting_rows -= waiting.question.rows
            if not waiting.answer.done():  # a request that was given up is not answered
                rows += waiting.question.rows
                taken.append(waiting)
        return taken


def _settle(asked: Sequence[_Waiting], answers: Sequence[Answer]) -> None:
    for waiting, answer in zip(asked, answers, strict=True):
        if not waiting.answer.done():
            waiting.answer.set_result(answer)


def _fail(asked: Sequence[_Waiting], error: BaseException) -> None:
    for waiting in asked:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
