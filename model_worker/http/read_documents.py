"""The route `/v1/kvbank/documents/forget` forgets a document that was read into a bank.

A worker has no rights of its own: the service is asked with the key of the caller.
"""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

import kvbank
from model_worker.http.asking import client_of
from model_worker.http.documents import receipt_document
from model_worker.http.errors import json_response
from model_worker.remember.document import SOURCE
from model_worker.serve.served import Served

Name = Annotated[str, Field(min_length=1, max_length=4096)]


class ForgetDocumentRequest(BaseModel):
    """The body of `forget`. bank: the one that has the document. source: names it, as its chunks do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bank: Name
    source: Name


def routes(served: Served) -> APIRouter:
    """Return the route of documents."""
    router = APIRouter(prefix="/v1/kvbank/documents")

    @router.post("/forget", operation_id="forgetDocument")
    def forget(request: Request, body: ForgetDocumentRequest) -> Response:
        """Delete the chunks of a document for good, and return the receipt."""
        with client_of(served, request) as client:
            receipt = client.forget_chunks(body.bank, kvbank.Filter(metadata={SOURCE: body.source}))
        return json_response(receipt_document(receipt))

    return router
