"""Training of eviction policies from routing traces (needs torch: `pip install 'flashmoe-ssd[train]'`)."""
