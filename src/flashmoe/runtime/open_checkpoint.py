"""Opens a safetensors checkpoint with Hugging Face Transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flashmoe.cache import sizing
from flashmoe.common import memory
from flashmoe.engines.transformers.library import open_transformers
from flashmoe.runtime import budget
from flashmoe.runtime.layout import PLAIN
from flashmoe.runtime.opening import Loading, Opened
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.checkpoint import read_checkpoint
from flashmoe.storage.disk import tune
from flashmoe.storage.hub import resolve_checkpoint
from flashmoe.storage.reader import ExpertReader

# What evaluating takes beside weights and context, as seen: copies of the hidden states of a micro-batch, and scratch
# of torch's kernels and threads
_STATES = 24
_SCRATCH = 96 << 20


def open_checkpoint(loading: Loading, stack: ExitStack) -> Opened:
    """What is opened is closed by `stack`. Raises ModelError, BudgetError, PolicyError, LibraryError, UsageError."""
    options, limit = loading.options, loading.limit
    open_transformers()
    import torch

    from flashmoe.engines.transformers import device as devices
    from flashmoe.engines.transformers.catalog import read_layout
    from flashmoe.engines.transformers.engine import TransformersEngine
    from flashmoe.engines.transformers.front import Front, device_slots
    from flashmoe.engines.transformers.loader import load_dense
    from flashmoe.engines.transformers.skeleton import read_skeleton

    device = devices.open_device() if options.vram is not None else None
    checkpoint = read_checkpoint(resolve_checkpoint(loading.model))
    skeleton = read_skeleton(checkpoint)
    layout = read_layout(checkpoint, skeleton)
    catalog = layout.catalog
    loading.chosen.check(catalog)
    text = skeleton.config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None) or budget.DEFAULT_CONTEXT
    budget.check_context(options.n_ctx, trained)
    context = options.n_ctx or min(trained, budget.DEFAULT_CONTEXT)
    wished = options.n_ubatch or sizing.USUAL_UBATCH
    outputs = text.vocab_size if options.all_logits else 0
    each = token_bytes(text, layout.dtype.itemsize)

    def scratch(step: int) -> int:
        """Bytes that a micro-batch takes."""
        return _SCRATCH + step * 4 * (_STATES * text.hidden_size + context + outputs)

    front = None
    if device is not None:
        fixed = catalog.dense_bytes + context * each + scratch(min(wished, context))
        there = device_slots(str(options.vram), catalog, device.free_bytes(), fixed)
        front = Front(device, there, loading.chosen.make_policy())
    reader = ExpertReader(checkpoint.files)
    stack.callback(reader.close)
    tune(reader, catalog.read_bytes)
    align = max(file.align for file in reader.files)
    if limit:
        budget.check_before_loading(catalog, limit, align)
    torch.set_num_threads(loading.threads)
    dense = catalog.dense_bytes
    model = load_dense(checkpoint, skeleton, layout, reader.files, lambda n: loading.progress(n, dense))
    if device is not None:
        model.to(device.place)
    aside = reader.reserve_bounce_buffers(catalog.largest_placed) if catalog.largest_placed else 0
    promised = aside + loading.chosen.prepare(catalog, limit)
    if limit and device is None:
        if options.n_ctx is None:
            left = limit - memory.status_bytes("VmRSS") - promised - budget.RESERVE
            context = budget.default_context(context, budget.SMALL_CONTEXT * each, left)
        promised += context * each
    step = min(wished, context)
    if limit:
        step, slots = _fit(catalog, limit, align, step, lambda n: promised + scratch(n))
    else:
        slots = sizing.parse_cache(str(options.cache), catalog, align)
    engine = TransformersEngine(
        model,
        catalog,
        skeleton.experts,
        checkpoint.folder,
        n_ctx=context,
        n_ubatch=step,
        threads=loading.threads,
        all_logits=options.all_logits,
        front=front,
    )
    stack.callback(engine.close)
    return Opened(engine, catalog, reader, slots, PLAIN, budget.Conversations())


def _fit(
    catalog: ExpertCatalog, limit: int, align: int, step: int, beside: Callable[[int], int]
) -> tuple[int, list[int]]:
    """The largest micro-batch up to `step` that leaves room for a pool, and that pool's slots.

    beside: bytes that are not taken yet, by the tokens of a micro-batch. Raises BudgetError.
    """
    while True:
        used = memory.status_bytes("VmRSS") + beside(step) + budget.RESERVE
        pool = budget.plan_pool(catalog, limit, used, align, memory.status_bytes("VmHWM"))
        if pool.slots:
            return step, pool.slots
        if step == 1:
            raise budget.too_small(limit, pool.least)
        step //= 2


def token_bytes(config: Any, itemsize: int) -> int:
    """Bytes that one token takes in the KV caches of all layers; an upper bound where some layers keep less."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention: kept expanded
        numbers = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    else:
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        numbers = 2 * (getattr(config, "num_key_value_heads", None) or heads) * size
    return int(config.num_hidden_layers * numbers * itemsize)
