"""What the compiled and the Python half of the eval callback share, and why the one calls the other."""

from __future__ import annotations

import ctypes as C

RETURNED, NOT_RETURNED = 0, 1
MOST_QUIET = 62  # bits of Control.quiet
#: Why Python is called: a node is ready; it is wanted to be looked at; a graph begins; it has ended; rows of a table
#: are about to be gathered; a layer has been served and there is something to read ahead; routes cannot be
#: rewritten; the router's ranking is to be recorded; a layer's products are to be computed apart.
READY, LOOK, BEGIN, END, GATHER, SERVED, REFUSED, RANKED, APART = range(9)
TO_RANK = 1 << 32  # in what rewrites: the router's ranking is to be recorded
CHOSEN, GATHERED = 0, 1  # where routes are rewritten: experts are chosen; their weights are gathered

# Python's half: (node, why); what it returns is not looked at, Control.outcome says whether to go on
PYTHON_CALLBACK = C.CFUNCTYPE(C.c_uint8, C.c_void_p, C.c_uint8)


class Control(C.Structure):
    """What both halves share; the engine hands its address to the callback."""

    _fields_ = [
        ("python", C.c_int64),  # address of a PYTHON_CALLBACK
        ("inspect", C.c_int64),  # whether it wants to see every node
        ("outcome", C.c_int64),  # NOT_RETURNED while it runs, and for ever if it did not succeed
        ("buffer", C.c_int64),  # address of int32 [capacity]: ids on the way in, slots on the way out
        ("capacity", C.c_int64),
        ("block", C.c_int64),  # of the node: its block, tokens and experts per token
        ("tokens", C.c_int64),
        ("top_k", C.c_int64),
        ("ids", C.c_int64),  # address of the ids' tensor
        ("weights", C.c_int64),  # address of float32 [tokens, top_k]
        ("pending", C.c_int64),  # whether reads for the layer's last product are still under way
        ("late", C.c_int64),  # address of prefixes, each ended by 0, of the names of that product's inputs
        ("late_length", C.c_int64),  # of all of them, 0 for none
        ("logits", C.c_int64),  # address of the router's logits' tensor, 0 if it was not found
        ("hidden", C.c_int64),  # address of the router's input, float32 [tokens, n]
        ("begun", C.c_int64),  # whether Python knows of the graph under way
        ("thread", C.c_int64),  # the thread that evaluates it, 0 for none
        ("ignore", C.c_int64),  # whether graphs are to end at their first node, uncounted
        ("inputs", C.c_int64),  # address of int32 [tokens]: the token ids of the graph that begins
        ("request", C.c_int64),  # address of the policy's compiled request, 0 where Python is to be asked
        ("pool", C.c_int64),  # its arguments, and where it leaves the slots
        ("arrays", C.c_int64),
        ("slots", C.c_int64),
        ("layers", C.c_int64),  # address of int64 [blocks]: the layer of each block, and its first slot
        ("first_slots", C.c_int64),
        ("done", C.c_int64),  # what the request returned
        ("hits", C.c_int64),  # counted since the start
        ("recent", C.c_int64),  # address of int16 [layers, RECENT], the latest requests, or 0
        ("recent_at", C.c_int64),  # address of int64 [layers]: where the next one goes
        ("recent_size", C.c_int64),
        ("quiet", C.c_int64),  # bit n: graphs of n tokens need no Python where they begin and end
        ("is_quiet", C.c_int64),  # tokens of the one under way where it is such
        ("graphs", C.c_int64),  # counted since the start, of quiet ones: graphs, their tokens and nanoseconds
        ("graph_tokens", C.c_int64),
        ("nanoseconds", C.c_int64),
        ("began", C.c_int64 * 2),  # struct timespec
        ("ended", C.c_int64 * 2),
        ("stop", C.c_int64),  # whether the graph under way is to end at its next node
        ("spans", C.c_int64),  # address of where every block's tensors lie in the pool (spans.Spans), or 0
        ("whole", C.c_int64),  # whether they have to show all of it
        ("values", C.c_int64),  # the first place of layers for values, 0 where there are none
        ("chosen", C.c_int64),  # address of ids that become true again when their product is computed, or 0
        ("true_ids", C.c_int64),  # address of int32 [capacity]: what they were
        ("turn", C.c_int64),  # address of the prefetcher's compiled turn, or 0, and of its state
        ("guesses", C.c_int64),
        ("held", C.c_int64),  # address of int64 [layers + 1]: how many experts of each are prefetched, then 0
        ("ahead", C.c_int64),  # whether these, or new guesses, concern Python
        ("log", C.c_int64),  # address of the RoutingLog of the graph under way; 0: Python is told at once
        ("tables", C.c_int64),  # address of int64 [...]: tensors whose rows are read when gathered, then 0
        ("look_in", C.c_int64),  # whether the next layer is to ask Python, come what may
        ("rewrite", C.c_int64),  # address of what rewrites routes (rewriting.py), 0 for exact ones
        ("rewriting", C.c_int64),  # and of its state
        ("diverted", C.c_int64),  # what `Overlap.divert` has said of the layer's products, or 0
    ]
