"""Errors in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

import http
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: Error


class ApiError(Exception):
    """Ends a request with an answer in the shape of an error.

    Args:
        param: the field that is to blame.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.error = Error(message=message, type=kind, param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        return ErrorAnswer(error=self.error).model_dump()

    def answer(self, headers: dict[str, str] | None = None) -> JSONResponse:
        again = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        challenge = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body, self.status, {**again, **challenge, **(headers or {})})

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer from within a middleware."""
        await self.answer()(scope, receive, send)


def of_validation(error: RequestValidationError) -> ApiError:
    """The first complaint as an ApiError, worded as OpenAI would put it."""
    first = error.errors()[0]
    param = ".".join(str(p) for p in first["loc"][1:]) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", "invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", "unknown_parameter", param)
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param or 'body'}'.", "missing_required_parameter", param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{param or 'body'}': {message[0].lower()}{message[1:]}.", "invalid_value", param)


def install(app: FastAPI) -> None:
    """Have every error of `app` answered in this shape, its own and the framework's."""

    async def problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.answer()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(error).answer()

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
        said = error.detail if isinstance(error.detail, str) else str(error.detail)
        plain = said == http.HTTPStatus(error.status_code).phrase
        message = f"{said}: {request.method} {request.url.path}." if plain else said
        return ApiError(error.status_code, message, codes.get(error.status_code)).answer(dict(error.headers or {}))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server made a mistake; its log says which.", "internal_error").answer()

    app.add_exception_handler(ApiError, problem)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, unexpected)
