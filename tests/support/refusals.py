"""What a refused call carries: a reason of the public list, with its gRPC code."""

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvbank.v1 import direct_pb2


def error_of(answer: bytes) -> tuple[str, str, str]:
    """Return code, reason and message of the error that a direct call answered, a serialized DirectResponse."""
    status = status_pb2.Status.FromString(direct_pb2.DirectResponse.FromString(answer).error)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return code_pb2.Code.Name(status.code), info.reason, status.message


class Refusals:
    """Makes context managers whose block must end with this reason and code."""

    def __call__(self, reason: str, code: grpc.StatusCode) -> "Refusals":
        self._expected = (reason, code)
        return self

    def __enter__(self) -> "Refusals":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        assert isinstance(error, grpc.RpcError), f"not refused ({error!r})"
        self.info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(error)
        assert status is not None, error
        assert status.details[0].Unpack(self.info)
        assert self.info.domain == "kvbank"
        assert (self.info.reason, error.code()) == self._expected, error.details()
        self.message = error.details()
        return True
