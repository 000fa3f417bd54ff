"""The page of a worker: its files, which load nothing from elsewhere and run no script but their own.

This file owns that what a browser may do with the page is told with each of its files: the text of users can be no
script there, whatever it says.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from model_worker.http.errors import ApiError

_FOLDER = Path(__file__).parent / "page"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'"),
    *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"),
)
HEADERS = {
    "content-security-policy": "; ".join(_POLICY),
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def routes() -> APIRouter:
    """Return the routes of the page and its files."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _KINDS}

    def served(name: str) -> Response:
        return Response(files[name], headers=HEADERS, media_type=f"{_KINDS[Path(name).suffix]}; charset=utf-8")

    @router.get("/")
    async def page() -> Response:
        """Return the page itself, which names its files."""
        return served("index.html")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        """Return a file of the page."""
        if name not in files:
            raise ApiError(404, "there is no such path", code="unknown_url")
        return served(name)

    return router
