"""The app of a worker: its routes, its errors and its bounds."""

from fastapi import FastAPI

from kvbank import __version__
from model_worker.http import (
    chat,
    completions,
    conversations,
    errors,
    health,
    models,
    page_files,
    read_documents,
    responses,
    session_memory,
    sessions,
    traces,
)
from model_worker.http.bounds import Bounded, Counted, OwnHost
from model_worker.http.metrics import Metrics
from model_worker.serve.served import Served


def application(served: Served, metrics: Metrics | None = None) -> FastAPI:
    """Return the app that serves a model. It has none of FastAPI's pages, which ask other machines for scripts.

    metrics: the figures that it counts in and shows; None: those of its own.
    """
    app = FastAPI(
        title="kvbank worker",
        version=__version__,
        description="A model with a memory that lasts, behind the API that clients of OpenAI speak.",
        docs_url=None,
        redoc_url=None,
        responses=errors.RESPONSES,
    )
    metrics = metrics or Metrics(served)
    errors.register(app)
    for routes in (chat.routes(served, metrics), completions.routes(served, metrics), models.routes(served)):
        app.include_router(routes)
    for routes in (responses.routes(served, metrics), conversations.routes(served)):
        app.include_router(routes)
    for own in (sessions, session_memory, read_documents, traces):
        app.include_router(own.routes(served))
    app.include_router(page_files.routes())
    app.include_router(health.routes(served, metrics))
    app.add_middleware(Bounded, most=served.bounds.body)
    if served.own_only:
        app.add_middleware(OwnHost)
    app.add_middleware(Counted, metrics=metrics)
    return app
