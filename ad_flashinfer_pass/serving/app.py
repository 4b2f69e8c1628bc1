"""The endpoint: HTTP in, tokens out.

The event loop reads bodies, turns tokens into text and writes streams; a thread of its own encodes prompts;
the engine's thread (``worker``) does nothing of that. A client that leaves, a time limit or a stop string
cancels the request in the engine.
"""

from __future__ import annotations

import asyncio
import copy
import hmac
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.chat import render, require_template
from ad_flashinfer_pass.runtime.detokenize import TextDecoder, TextStream
from ad_flashinfer_pass.runtime.foreign import foreign_code
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.serving.answers import ChatAnswer, Choice, CompletionAnswer, Piece
from ad_flashinfer_pass.serving.metrics import ServerMetrics
from ad_flashinfer_pass.serving.protocol import ChatRequest, CompletionRequest, SamplingFields
from ad_flashinfer_pass.serving.worker import Worker, WorkerDied

logger = logging.getLogger(__name__)
_Body = TypeVar("_Body", bound=SamplingFields)
_GRACE = 5.0
"""Seconds that a client has to read the end of a stream."""
_RETRY_AFTER = {"Retry-After": "1"}


class ApiError(Exception):
    """An answer other than 200, as OpenAI words it."""

    def __init__(self, status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    @property
    def body(self) -> dict[str, Any]:
        """Of the answer."""
        error = {"message": str(self), "type": self.kind, "param": None, "code": self.status}
        return {"error": error}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes upon itself."""

    max_waiting: int = 256
    """Requests beyond ``max_batch_size`` that may wait; further ones get 429."""
    max_body_bytes: int = 8 * 2**20
    timeout: float = 600.0
    """Seconds of one request, from its arrival to its last token."""
    api_key: str | None = None


class Server:
    """The state behind the routes; made while the event loop runs.

    Args:
        llm: whose engine has no requests, and gets no others.
        name: of the model.
        limits: see there.
    """

    def __init__(self, llm: LLM, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.tokenizer = llm.tokenizer
        self.default_sampling = llm.default_sampling
        self.worker = Worker(llm.engine)
        self.metrics = ServerMetrics(llm.engine)
        self.max_requests = llm.model.sequence_info.max_batch_size + limits.max_waiting
        self.num_open = 0
        self.decoder = TextDecoder(self.tokenizer) if self.tokenizer is not None else None
        # One thread, and a tokenizer of its own: they are not made for several.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._encoding_tokenizer = copy.deepcopy(llm.tokenizer)

    async def close(self) -> None:
        """End the threads."""
        self._encoder.shutdown(cancel_futures=True)
        await self.worker.stop()

    @contextmanager
    def admitted(self, num_requests: int) -> Iterator[None]:
        """Count requests while they are here.

        Raises:
            ApiError: there are too many.
        """
        if num_requests > self.max_requests:
            message = (
                f"{num_requests} continuations at once are more than {self.max_requests}; ask for fewer."
            )
            raise ApiError(400, message, "invalid_request_error")
        if self.num_open + num_requests > self.max_requests:
            message = (
                f"{self.num_open} requests run or wait, of at most {self.max_requests}. Try again later."
            )
            raise ApiError(429, message, "rate_limit_error", _RETRY_AFTER)
        self.num_open += num_requests
        self.metrics.open_requests.set(self.num_open)
        try:
            yield
        finally:
            self.num_open -= num_requests
            self.metrics.open_requests.set(self.num_open)

    async def encode(self, make: Callable[[Any], list[int]]) -> list[int]:
        """Token ids, from a function of the tokenizer, in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, make, self._encoding_tokenizer)

    async def open(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], salt: str, deadline: float
    ) -> list[Choice]:
        """Queue n continuations of each prompt; on an error none is left."""
        loop, choices = asyncio.get_running_loop(), list[Choice]()
        try:
            for prompt, given in zip(prompts, params, strict=True):
                for i in range(given.n):
                    seed = None if given.seed is None else given.seed + i
                    one = replace(given, n=1, seed=seed, stop=())
                    ticket = await asyncio.wait_for(
                        self.worker.submit(prompt, one, salt), deadline - loop.time()
                    )
                    text = TextStream(self._decoder(), given.stop)
                    choices.append(Choice(len(choices), prompt, given, ticket, text))
                    ticket.fail_at(deadline, _timed_out(self.limits.timeout))
        except BaseException as err:
            self.abandon(choices)
            if isinstance(err, asyncio.TimeoutError):
                raise _timed_out(self.limits.timeout) from None
            raise
        return choices

    def abandon(self, choices: Sequence[Choice]) -> None:
        """Cancel what has not ended."""
        for choice in choices:
            choice.ticket.release()
            self.worker.close(choice.ticket)

    async def pieces(self, choices: Sequence[Choice]) -> AsyncGenerator[Piece, None]:
        """Of all choices as they come; closing it cancels them."""
        pending: set[asyncio.Future[Piece]] = set()
        try:
            while len(choices) == 1:
                piece = await self._next(choices[0])
                yield piece
                if piece.finish_reason is not None:
                    return
            pending = {asyncio.ensure_future(self._next(choice)) for choice in choices}
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for piece in sorted((task.result() for task in done), key=lambda piece: piece.choice.index):
                    if piece.finish_reason is None:
                        pending.add(asyncio.ensure_future(self._next(piece.choice)))
                    yield piece
        finally:
            for task in pending:
                task.cancel()
            self.abandon(choices)

    async def _next(self, choice: Choice) -> Piece:
        """What steps have brought since the last time. After a stop string only the end is waited for."""
        piece = Piece(choice)
        while True:
            for output in await choice.ticket.next_outputs():
                end = output.completion
                if output.token_id is not None and not choice.text.is_stopped:
                    choice.num_tokens += 1
                    piece.logprobs += [output.logprobs] if output.logprobs is not None else []
                    if end is None or end.finish_reason != "stop":
                        piece.text += choice.text.add(output.token_id)
                    if choice.text.is_stopped:
                        self.worker.close(choice.ticket)
                if end is None:
                    continue
                if end.error is not None and not choice.text.is_stopped:
                    raise ApiError(500, end.error, "server_error")
                piece.text += choice.text.finish()
                piece.finish_reason = "stop" if choice.text.is_stopped else end.finish_reason
                piece.prompt_logprobs, piece.num_cached_tokens = end.prompt_logprobs, end.num_cached_tokens
                return piece
            if not choice.text.is_stopped:
                return piece

    def _decoder(self) -> TextDecoder:
        if self.decoder is None:
            raise RequestError("the model has no tokenizer, and the endpoint answers with text.")
        return self.decoder


def _timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the request was not done within {seconds:g} seconds.", "timeout_error")


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed whatever happens to the client.

    Args:
        events: what is sent.
        seconds: after which a client that does not read is let go.
        on_end: called at the end.
    """

    def __init__(self, events: AsyncGenerator[str, None], seconds: float, on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._seconds, self._on_end = events, seconds, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ``StreamingResponse``."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
        except asyncio.TimeoutError:
            logger.info("%s %s: the client does not read", scope["state"]["id"], scope["path"])
        finally:
            await self._events.aclose()
            self._on_end()


def create_app(llm: LLM, name: str, limits: Limits | None = None) -> FastAPI:
    """The endpoint of a model.

    Args:
        llm: a model; nobody else may use it as long as the app runs.
        name: under which it is served.
        limits: default: ``Limits()``.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.server = Server(llm, name, limits)
        try:
            yield
        finally:
            await app.state.server.close()

    app = FastAPI(
        title="ad-flashinfer-pass", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )

    @app.exception_handler(ApiError)
    async def refuse(request: Request, err: ApiError) -> Response:
        return JSONResponse(err.body, err.status, err.headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, err: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {err.detail}"
        return JSONResponse(ApiError(err.status_code, message, "invalid_request_error").body, err.status_code)

    app.add_middleware(_RequestIds)

    @app.get("/health")
    async def health(request: Request) -> Response:
        is_alive = request.app.state.server.worker.error is None
        return JSONResponse(
            {"status": "ok" if is_alive else "the engine has ended"}, 200 if is_alive else 503
        )

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        text, media_type = request.app.state.server.metrics.exposition()
        return Response(text, media_type=media_type)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _authorize(request, limits)
        llm_info = llm.model.sequence_info
        model = {"id": name, "object": "model", "created": 0, "owned_by": "ad-flashinfer-pass"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": llm_info.max_seq_len}]})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, ChatRequest)

    return app


class _RequestIds:
    """Middleware: each request has an id, the client's if it gave one, which its answer and the log show."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid4().hex
        scope.setdefault("state", {})["id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                if message["status"] >= 400:
                    logger.info("%s %s %d", request_id, scope["path"], message["status"])
            await send(message)

        await self._app(scope, receive, send_with_id)


def _authorize(request: Request, limits: Limits) -> None:
    if limits.api_key is not None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {limits.api_key}".encode()):
            raise ApiError(401, "the API key is missing or wrong.", "authentication_error")


async def _answer(request: Request, kind: type[_Body]) -> Response:
    """Of either endpoint: everything up to the first token, then a stream or the whole."""
    server: Server = request.app.state.server
    loop = asyncio.get_running_loop()
    start = loop.time()
    _authorize(request, server.limits)
    body = await _read(request, kind, server.limits.max_body_bytes)
    if body.model not in (None, server.name):
        raise ApiError(
            404, f"the model {body.model!r:.80} is not served; {server.name!r} is.", "not_found_error"
        )
    num_prompts = len(body.prompts()) if isinstance(body, CompletionRequest) else 1
    with _said_as_api_errors(), ExitStack() as stack:
        stack.enter_context(server.admitted(num_prompts * (body.n or 1)))
        prompts = await _prompts(server, body)
        params = [_params(server, body, prompt) for prompt in prompts]
        deadline = start + server.limits.timeout
        await _compiled(server, params, deadline)
        choices = await server.open(prompts, params, body.cache_salt or "", deadline)
        stack.callback(server.abandon, choices)
        answer_type: Any = ChatAnswer if isinstance(body, ChatRequest) else CompletionAnswer
        answer = answer_type(server.name, request.state.id, body, choices, server.tokenizer)
        stack.callback(_log_end, server, request, answer, start)
        pieces = _timed(server.pieces(choices), server, start)
        if body.stream:
            events = _events(answer, pieces)
            return EventStream(events, server.limits.timeout + _GRACE, stack.pop_all().close)
        await _unless_client_leaves(request, _collect(answer, pieces))
        return JSONResponse(answer.whole())


@contextmanager
def _said_as_api_errors() -> Iterator[None]:
    try:
        yield
    except RequestError as err:
        raise ApiError(400, str(err), "invalid_request_error") from None
    except WorkerDied as err:
        raise ApiError(503, f"the engine has ended: {err}", "server_error") from None


def _log_end(server: Server, request: Request, answer: ChatAnswer | CompletionAnswer, start: float) -> None:
    usage, seconds = answer.usage(), asyncio.get_running_loop().time() - start
    logger.info(
        "%s %s %s prompt=%d cached=%d new=%d seconds=%.3f",
        request.state.id,
        request.url.path,
        "/".join(sorted(set(answer.reasons.values()))) or "left",
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens"],
        seconds,
    )
    server.metrics.request_ended(seconds, answer.reasons)


async def _compiled(server: Server, params: Sequence[SamplingParams], deadline: float) -> None:
    """Wait until the engine has the grammars, so that a broken one is the client's error."""
    for form in {each.guided_decoding for each in params if each.guided_decoding is not None}:
        # Not to be cancelled: others may wait for the same.
        compiled = asyncio.shield(asyncio.wrap_future(server.worker.engine.grammars.compile(form)))
        await asyncio.wait({compiled}, timeout=deadline - asyncio.get_running_loop().time())
        if not compiled.done():
            raise _timed_out(server.limits.timeout)
        compiled.result()


async def _read(request: Request, kind: type[_Body], most: int) -> _Body:
    """The body, if it is not too large and says what it must."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes.", "invalid_request_error")
        parts.append(part)
    try:
        return kind.model_validate_json(b"".join(parts))
    except ValidationError as err:
        first = err.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{where}: {first['msg']}."[:500].lstrip(": "), "invalid_request_error") from None


async def _prompts(server: Server, body: SamplingFields) -> list[list[int]]:
    if isinstance(body, ChatRequest):
        require_template(server.tokenizer)
        chat, variables = [message.for_template() for message in body.messages], body.variables()
        return [await server.encode(lambda tokenizer: render(chat, tokenizer, **variables))]
    assert isinstance(body, CompletionRequest)
    given = body.prompts()
    if not given:
        raise RequestError("prompt must hold at least one prompt.")
    return [await _encoded(server, prompt) for prompt in given]


async def _encoded(server: Server, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return prompt

    def encode(tokenizer: Any) -> list[int]:
        if tokenizer is None:
            raise RequestError("the model has no tokenizer; give token ids.")
        with foreign_code("the tokenizer cannot encode this prompt"):
            prompt.encode()  # of half a character tokenizers say less
            return list(tokenizer(prompt)["input_ids"])

    return await server.encode(encode)


def _params(server: Server, body: SamplingFields, prompt: Sequence[int]) -> SamplingParams:
    room = server.worker.engine.room_after(len(prompt))
    more: dict[str, Any]
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.")
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        more = {"max_new_tokens": limit, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    else:
        assert isinstance(body, CompletionRequest)
        limit = 16 if body.max_tokens is None else body.max_tokens
        more = {"max_new_tokens": limit, "logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            more["prompt_logprobs"] = body.logprobs
    return body.sampling(server.default_sampling, room, server.tokenizer, **more)


async def _timed(
    pieces: AsyncGenerator[Piece, None], server: Server, start: float
) -> AsyncGenerator[Piece, None]:
    """The same, with the time to the first one noted."""
    is_first = True
    try:
        async for piece in pieces:
            if is_first:
                server.metrics.first_token.observe(asyncio.get_running_loop().time() - start)
                is_first = False
            yield piece
    finally:
        await pieces.aclose()


async def _collect(answer: ChatAnswer | CompletionAnswer, pieces: AsyncGenerator[Piece, None]) -> None:
    try:
        async for piece in pieces:
            answer.add(piece)
    finally:
        await pieces.aclose()


async def _events(
    answer: ChatAnswer | CompletionAnswer, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; an error after the first one is an event, too."""
    try:
        for chunk in answer.opening():
            yield f"data: {json.dumps(chunk)}\n\n"
        async for piece in pieces:
            for chunk in answer.chunks(piece):
                yield f"data: {json.dumps(chunk)}\n\n"
        for chunk in answer.closing():
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"
    except (ApiError, RequestError, WorkerDied) as err:
        api_error = err if isinstance(err, ApiError) else ApiError(500, str(err), "server_error")
        yield f"data: {json.dumps(api_error.body)}\n\n"
    finally:
        await pieces.aclose()


async def _unless_client_leaves(request: Request, work: Awaitable[None]) -> None:
    """Do it, and stop when the client is gone."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # after the body, the next message is that it left
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client left.", "invalid_request_error")
        await task
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
