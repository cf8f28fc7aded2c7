"""What is wrong with a request, as an answer."""

from starlette.responses import JSONResponse

from asr.errors import AsrError, AudioError, AudioTooLong

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}


class Refusal(Exception):
    """A request that is not served."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """param: the field that is wrong. code: a word for programs."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, str | None]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """In the form of OpenAI's errors."""
        return JSONResponse({"error": self.body()}, self.status, HEADERS.get(self.status))


def refusal_of(error: AsrError) -> Refusal:
    """What the library says of audio or of a language is the client's to mend."""
    if isinstance(error, AudioError):
        return Refusal(413 if isinstance(error, AudioTooLong) else 400, str(error), "file", "invalid_audio")
    return Refusal(400, str(error), "language", "invalid_value")


def leaving() -> Refusal:
    return Refusal(503, "the server is leaving", code="unavailable")


def gone() -> Refusal:
    """Nobody reads it, but the log tells its status, as nginx does."""
    return Refusal(499, "the client has gone")


def broken() -> Refusal:
    return Refusal(500, "internal error", code="internal_error")
