"""A small web server for a ``TextIndex``: a page to search from, and the same as JSON (Starlette, uvicorn).

    GET /                      the page
    GET /api/search?q=&k=      {"query", "seconds", "hits": [{"score", "file", "line", "text"}]}
    GET /api/info              {"passages", "files", "kind", "nbytes"}

An index that is served from a folder is read again when a newer one has been saved there; the old one stays open until
the next is read, for answers that are under way.  Nothing but the page itself is loaded by the browser, and texts are
never read as HTML.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from quernel._errors import QuernelError
from quernel._io import CONFIG
from quernel._validate import check_int
from quernel.apps.text_index._page import PAGE
from quernel.apps.text_index.collection import TextIndex

MOST_HITS, LONGEST_QUERY = 100, 2000
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LOCAL = ("127.0.0.1", "localhost", "[::1]")

Prepare = Callable[[TextIndex], TextIndex]


class _Served:
    """The index to be asked now: a given one, or what a folder holds, loaded again when that has changed."""

    def __init__(self, source: TextIndex | Path, prepare: Prepare) -> None:
        self._lock = threading.Lock()
        self._prepare, self._path, self._stamp = prepare, None if isinstance(source, TextIndex) else source, 0
        self._index = prepare(source) if isinstance(source, TextIndex) else None
        self._retired: TextIndex | None = None

    def get(self) -> TextIndex:
        with self._lock:
            if self._path is not None:
                stamp = (self._path / CONFIG).stat().st_mtime_ns if (self._path / CONFIG).exists() else -1
                if self._index is None or stamp != self._stamp:
                    self._index, self._stamp = self._loaded(), stamp
            if self._index is None:
                raise QuernelError("there is no index to be asked")
            return self._index

    def _loaded(self) -> TextIndex:
        old, new = self._index, TextIndex.load(self._path or "")
        if old is not None:
            new.encoder = old.encoder
        made = self._prepare(new)
        if self._retired is not None:
            self._retired.close()
        self._retired = old
        return made


def as_it_is(index: TextIndex) -> TextIndex:
    """Return the index."""
    return index


def make_app(source: TextIndex | Path, *, prepare: Prepare = as_it_is, hosts: tuple[str, ...] = LOCAL) -> Any:
    """Return the application, to be run by any ASGI server.

    Parameters
    ----------
    source : TextIndex or Path
        An index, or the folder of a saved one.
    prepare : callable, optional
        Applied to every index that is loaded, such as ``lambda index: index.spread(2)``.
    hosts : tuple of str
        Names under which it may be asked; ``("*",)`` for all.  Others are refused, so that no page of another site can
        ask by a name that points here.

    Raises
    ------
    FormatError
        If the folder holds no text index.
    """
    served = _Served(source, prepare)
    served.get()

    def page(request: Request) -> Response:
        return HTMLResponse(PAGE, headers=_HEADERS)

    def search(request: Request) -> Response:
        query = request.query_params.get("q", "").strip()
        try:
            k = check_int("k", int(request.query_params.get("k", "10")), low=1, high=MOST_HITS)
            if len(query) > LONGEST_QUERY:
                raise QuernelError(f"q must have at most {LONGEST_QUERY} characters; got {len(query)}")
            start = time.perf_counter()
            hits = served.get().search(query, k)
        except ValueError as error:  # a QuernelError, or k is no number
            return JSONResponse({"error": str(error)}, 400, _HEADERS)
        seconds = round(time.perf_counter() - start, 4)
        return JSONResponse({"query": query, "seconds": seconds, "hits": [asdict(h) for h in hits]}, headers=_HEADERS)

    def info(request: Request) -> Response:
        index = served.get()
        facts = {"passages": len(index), "files": len(index.files), "kind": index.index_kind, "nbytes": index.nbytes}
        return JSONResponse(facts, headers=_HEADERS)

    routes = [Route("/", page), Route("/api/search", search), Route("/api/info", info)]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(routes=routes, middleware=middleware)


def serve(source: TextIndex | Path, *, host: str = "127.0.0.1", port: int = 8000, prepare: Prepare = as_it_is) -> None:
    """Serve until interrupted.

    Parameters
    ----------
    source, prepare
        As in ``make_app``.
    host : str, default="127.0.0.1"
        Address to listen on; another one than this machine's own makes the texts readable from outside.
    port : int, default=8000
    """
    import uvicorn

    hosts = LOCAL if host in (*LOCAL, "::1") else ("*",)
    uvicorn.run(make_app(source, prepare=prepare, hosts=hosts), host=host, port=port, log_level="warning")
