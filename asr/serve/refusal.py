"""What is wrong with a request, as an answer."""

from starlette.responses import JSONResponse

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
