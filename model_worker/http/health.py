"""The routes `/healthz`, `/readyz` and `/metrics` are for operators of the worker."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

from model_worker.http.errors import json_response
from model_worker.http.metrics import Metrics
from model_worker.serve.served import Served


def routes(served: Served, metrics: Metrics) -> APIRouter:
    """Return the routes of health and figures."""
    router = APIRouter()

    @router.get("/healthz", operation_id="healthz")
    async def healthz() -> Response:
        """Say that the process answers."""
        return json_response({"status": "ok"})

    @router.get("/readyz", operation_id="readyz")
    async def readyz() -> Response:
        """Say whether requests are answered now: not while the model is loaded, and not while the worker stops."""
        served.check_ready()
        return json_response({"status": "ok"})

    @router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Return the figures of the worker, as Prometheus reads them."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
