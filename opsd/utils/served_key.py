"""Requires a served teacher's key on every path: vLLM itself requires it only below /v1, where /pooling is not.

scripts/serve_teacher.sh passes `KeyOnEveryPath` to vLLM's --middleware. Only the standard library is imported, so that
a machine that only serves needs nothing but vLLM.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

# This path only says that the server is up.
OPEN = "/health"
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[dict[str, Any], Any, Send], Awaitable[None]]


class KeyOnEveryPath:
    """ASGI middleware: requests without `Authorization: Bearer $VLLM_API_KEY` get status 401, except for OPEN.

    Raises KeyError if VLLM_API_KEY is not set.
    """

    def __init__(self, app: App) -> None:
        self._app, self._wanted = app, f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or scope.get("path") == OPEN or self._allows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            kind = (b"content-type", b"application/json")
            await send({"type": "http.response.start", "status": 401, "headers": [kind]})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _allows(self, scope: dict[str, Any]) -> bool:
        return hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._wanted)
