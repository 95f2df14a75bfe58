"""What the router of a model asked for: traces, the recorder that makes them, and what can be read from
them."""

from flashmoe.routing.recorder import Recorder
from flashmoe.routing.trace import DECODE, PREFILL, RoutingTrace

__all__ = ["DECODE", "PREFILL", "Recorder", "RoutingTrace"]
