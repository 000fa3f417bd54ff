"""A tenant of a service that it shares with others, beside the same tenant on a service of its own. Both are asked the
same, and must answer the same: so no other tenant can be seen, counted, evicted, or met in any other way.

Ids of chunks are given over all tenants, in the order of the writes: what one service calls 17 may be 5 on the other.
This file owns that ids are told apart from everything else in requests and answers, and what besides them may differ.
"""

import re
from collections.abc import Callable, Iterable
from difflib import unified_diff
from functools import partial
from pprint import pformat
from typing import Any, NamedTuple

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvbank.v1 import bank_pb2, service_pb2_grpc
from kvbank.v1 import service_pb2 as pb
from tests.support.waiting import wait_until

_IDS = ("chunk_id", "chunk_ids", "evicted_chunk_ids")
# What is random, or made of that and of ids (so is the header of a file, whose length varies with their digits); and
# the index, which is looked after in the background.
_APART = (
    *("uid", "store_id", "seed", "checksum", "header_checksum", "header_length", "file_length", "offset"),
    "index",
)
# What an id becomes that the tenant was never told.
_FAR = 10**12


class Refusal(NamedTuple):
    """How a call was refused: its code, and what is said of that."""

    code: str
    metadata: dict[str, str]
    text: str


class Twin:
    """A tenant on both services. `told` are the ids that it was told by the service that it shares."""

    def __init__(self, tenant: str, shared: grpc.Channel, alone: grpc.Channel) -> None:
        """Ask over channels whose calls carry a key of the tenant."""
        self.tenant = tenant
        self._shared, self._alone = map(service_pb2_grpc.MemoryServiceStub, (shared, alone))
        self._ids: dict[int, int] = {}

    @property
    def told(self) -> list[int]:
        return list(self._ids)

    def ask(self, method: str, *requests: Message) -> list[Message] | Refusal:
        """Ask both services, and return what the shared one answers; pages are asked for to the last. A stream has
        several requests."""
        theirs = _answered(self._shared, method, requests)
        mine = _answered(self._alone, method, [_changed(each, self._id_alone) for each in requests])
        if method == "WriteChunks":
            acks = zip(*([] if isinstance(each, Refusal) else each for each in (theirs, mine)), strict=False)
            self._ids |= {one.chunk_id: other.chunk_id for one, other in acks}
        shared, alone = self._plain(theirs, self._id_alone), self._plain(mine, int)
        if shared != alone:
            lines = unified_diff(*(pformat(each).splitlines() for each in (alone, shared)), "alone", "shared", n=1)
            raise AssertionError("\n".join([f"{method} of {self.tenant}", *map(str, requests), *lines]))
        return theirs

    def wait(self, until: Callable[[service_pb2_grpc.MemoryServiceStub], bool]) -> None:
        """Wait for what each service does in the background."""
        for stub in (self._shared, self._alone):
            wait_until(partial(until, stub))

    def _id_alone(self, chunk_id: int) -> int:
        return self._ids.get(chunk_id, _FAR + chunk_id if chunk_id else 0)

    def _plain(self, answers: list[Message] | Refusal, ids: Callable[[int], int]) -> Any:
        """Return what is to be equal in answers. ids: tells the id of a chunk on the tenant's own service."""
        if not isinstance(answers, Refusal):
            return [MessageToDict(_scrubbed(_changed(each, ids))) for each in answers]
        code, metadata, text = answers
        if (chunk_id := metadata.get("chunk_id")) is None:
            return answers
        own = str(ids(int(chunk_id)))
        return code, metadata | {"chunk_id": own}, re.sub(rf"\b{chunk_id}\b", own, text)


def _answered(stub: Any, method: str, requests: Iterable[Message]) -> list[Message] | Refusal:
    call = getattr(stub, method)
    try:
        if method == "WriteChunks":
            return list(call(iter(requests)))
        (request,) = requests
        answer = call(request)
        if not isinstance(answer, Message):
            return _joined(answer)
        answers = [answer]
        while token := getattr(answers[-1], "next_page_token", ""):
            next_page = type(request)()
            next_page.CopyFrom(request)
            next_page.page_token = token
            answers.append(call(next_page))
        return answers
    except grpc.RpcError as error:
        return _refusal(error)


def _refusal(error: Any) -> Refusal:
    """Return how a call was refused. Errors: AssertionError where the service has failed."""
    status, info = rpc_status.from_call(error), error_details_pb2.ErrorInfo()
    assert status is not None, error
    assert status.details[0].Unpack(info)
    assert info.reason not in ("INTERNAL", "NOT_SERVING", "STORAGE_ERROR"), error
    return Refusal(error.code().name, {"reason": info.reason, **info.metadata}, error.details())


def _joined(answer: Iterable[Any]) -> list[Message]:
    """Return a header, and all bytes behind it in one frame, however they were cut. Such answers have the counts that
    are written so far; calls that list chunks have all, and are compared with them."""
    header, *frames = answer
    for chunk in header.header.chunks:
        chunk.ClearField("retrieval_count")
        chunk.ClearField("last_retrieve_time")
    return [header, type(header)(data=b"".join(frame.data for frame in frames))]


def _changed(message: Message, ids: Callable[[int], int]) -> Message:
    """Copy a message with other ids of chunks."""
    copy = type(message)()
    copy.CopyFrom(message)
    for part in _parts(copy):
        for name in _IDS:
            value = getattr(part, name, 0)
            if isinstance(value, int):
                if value:
                    setattr(part, name, ids(value))
            elif value:
                value[:] = list(map(ids, value))
    return copy


def _scrubbed(message: Message) -> Message:
    """Take out of a message what differs between two services; of a token of a page it stays that there is one."""
    for part in _parts(message):
        for name in _APART:
            if name in part.DESCRIPTOR.fields_by_name:
                part.ClearField(name)
        if getattr(part, "next_page_token", ""):
            part.next_page_token = "more"  # type: ignore[attr-defined]
    return message


def _parts(message: Message) -> list[Any]:
    """Return a message and all messages within it."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        within = [value] if isinstance(value, Message) else value
        found += [part for each in within for part in _parts(each)]
    return found


def is_settled(stub: service_pb2_grpc.MemoryServiceStub, name: str) -> bool:
    """Tell whether a bank holds no more than its capacity, or nothing that may go."""
    bank = stub.GetBank(pb.GetBankRequest(name=name)).bank
    unit = bank.capacity.WhichOneof("limit")
    if unit is None or bank.policy.kind == bank_pb2.POLICY_KIND_REJECT:
        return True
    if getattr(bank.usage, unit) <= getattr(bank.capacity, unit):
        return True
    chunks = stub.ListChunks(pb.ListChunksRequest(bank=name, page_size=1000)).chunks
    return all(chunk.pinned for chunk in chunks)
