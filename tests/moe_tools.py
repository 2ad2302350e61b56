"""What the tests of dispatch and combine share."""

import numpy as np


def random_routing(tokens, experts, top_k, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32).reshape(tokens, top_k)
    ids[rng.random(ids.shape) < 0.1] = -1
    return ids, rng.standard_normal(ids.shape).astype(np.float32)
