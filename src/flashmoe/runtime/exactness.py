"""The field `approx` of a request: 0 asks a server that approximates for an exact answer."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext

from flashmoe.errors import UsageError
from flashmoe.routing.approximation import EXACT
from flashmoe.runtime.model import Model

_FIELD = b'"approx"'


def for_request(model: Model, body: bytes) -> AbstractContextManager[None]:
    """For the time of a request: sequences are decoded together, and all are exact while one is.

    Raises UsageError where the request asks for what the model was not loaded with.
    """
    if _FIELD not in body:
        return nullcontext()
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return nullcontext()  # the backend says what is wrong with it
    if not isinstance(request, dict) or request.get("approx") is None:
        return nullcontext()
    asked = request["approx"]
    name = asked if isinstance(asked, str) else "0" if asked in (0, False) else str(asked)
    if name in EXACT:
        return model.exactly()
    own = model.rewritten.approx if model.rewritten else ""
    if name != own:
        started = f"was started with --approx {own}" if own else "was started without --approx"
        raise UsageError(f"approx: this server {started}; a request may give 0 for an exact answer")
    return nullcontext()
