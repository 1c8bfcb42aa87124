"""Errors of the server, in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

NOT_FOUND, TOO_MANY, OWN_FAULT, UNAVAILABLE = 404, 429, 500, 503
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Type by status; others are requests that are wrong, from 500 on the server is."""


class RefusalError(Exception):
    """A request isn't answered: status, what to say, and which part of it is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return what is sent."""
        usual = "server_error" if self.status >= OWN_FAULT else "invalid_request_error"
        kind = ERROR_TYPES.get(self.status, usual)
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}
