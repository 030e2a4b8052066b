"""Errors sorted by what the caller must do, and the one table that turns them into HTTP and gRPC status."""

import grpc


class HubError(Exception):
    """Something in the hub went wrong."""

    # Stable and in capitals: machines read the reason, people read the text.
    REASON = "INTERNAL"
    HTTP_STATUS = 500
    GRPC_STATUS = grpc.StatusCode.INTERNAL

    def __init__(self, detail: str = "", *, reason: str = "", retry_after_s: int | None = None) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip()
        self.reason = reason or self.REASON
        self.retry_after_s = retry_after_s
        super().__init__(self.detail)


class Invalid(HubError):
    """The request is not understood; change it before sending it again."""

    REASON = "INVALID"
    HTTP_STATUS = 400
    GRPC_STATUS = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(HubError):
    """No valid key came with the request; send one as "Authorization: Bearer KEY"."""

    REASON = "UNAUTHENTICATED"
    HTTP_STATUS = 401
    GRPC_STATUS = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(HubError):
    """This key may not do that."""

    REASON = "FORBIDDEN"
    HTTP_STATUS = 403
    GRPC_STATUS = grpc.StatusCode.PERMISSION_DENIED


class NotFound(HubError):
    """There is no such thing, or this key may not see it."""

    REASON = "NOT_FOUND"
    HTTP_STATUS = 404
    GRPC_STATUS = grpc.StatusCode.NOT_FOUND


class AlreadyExists(HubError):
    """There is one of that name already."""

    REASON = "ALREADY_EXISTS"
    HTTP_STATUS = 409
    GRPC_STATUS = grpc.StatusCode.ALREADY_EXISTS


class Conflict(HubError):
    """The thing is in a state that does not allow this."""

    REASON = "CONFLICT"
    HTTP_STATUS = 409
    GRPC_STATUS = grpc.StatusCode.FAILED_PRECONDITION


class TooLarge(HubError):
    """The request is larger than its limit; send it in smaller parts."""

    REASON = "TOO_LARGE"
    HTTP_STATUS = 413
    GRPC_STATUS = grpc.StatusCode.RESOURCE_EXHAUSTED


class SlowDown(HubError):
    """Too much at once; send again after the given time."""

    REASON = "SLOW_DOWN"
    HTTP_STATUS = 429
    GRPC_STATUS = grpc.StatusCode.RESOURCE_EXHAUSTED


class TryAgain(HubError):
    """A part of the hub does not answer; nothing was stored, send again after the given time."""

    REASON = "TRY_AGAIN"
    HTTP_STATUS = 503
    GRPC_STATUS = grpc.StatusCode.UNAVAILABLE
