"""DeepSeek-V3 in NumPy and float64, straight from config.json and the tensors' public names: an oracle for tests."""

import numpy as np


def logits(config: dict, tensors: dict[str, np.ndarray], input_ids: np.ndarray, rounded=lambda x: x) -> np.ndarray:
    """rounded: what FP8 makes of the activations [t, k] that a linear layer multiplies."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    v_dim, rank, eps = config["v_head_dim"], config["kv_lora_rank"], config["rms_norm_eps"]
    out = []
    for ids in input_ids:
        s = len(ids)
        x = t["model.embed_tokens.weight"][ids]
        cos, sin = _angles(config, s)
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."

            def linear(name, x, prefix=prefix):
                return rounded(x) @ t[f"{prefix}{name}.weight"].T + t.get(f"{prefix}{name}.bias", 0.0)

            h = _norm(x, t[prefix + "input_layernorm.weight"], eps)
            if config["q_lora_rank"] is None:
                q = linear("self_attn.q_proj", h)
            else:
                q = _norm(linear("self_attn.q_a_proj", h), t[prefix + "self_attn.q_a_layernorm.weight"], 1e-6)
                q = linear("self_attn.q_b_proj", q)
            q = q.reshape(s, heads, nope + rope)
            down = linear("self_attn.kv_a_proj_with_mqa", h)
            latent = _norm(down[:, :rank], t[prefix + "self_attn.kv_a_layernorm.weight"], 1e-6)
            kv = linear("self_attn.kv_b_proj", latent).reshape(s, heads, nope + v_dim)
            k_rope = _rotate(config, down[:, rank:], cos, sin)
            attended = np.zeros((s, heads, v_dim))
            for i in range(heads):
                q_rope = _rotate(config, q[:, i, nope:], cos, sin)
                scores = (q[:, i, :nope] @ kv[:, i, :nope].T + q_rope @ k_rope.T) * _scale(config)
                scores = np.where(np.tri(s, dtype=bool), scores, -np.inf)
                attended[:, i] = _softmax(scores) @ kv[:, i, nope:]
            x = x + linear("self_attn.o_proj", attended.reshape(s, -1))

            def mlp(name, x, linear=linear):
                gate = linear(f"{name}.gate_proj", x)
                return linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{name}.up_proj", x))

            h = _norm(x, t[prefix + "post_attention_layernorm.weight"], eps)
            if f"{prefix}mlp.gate.weight" not in t:
                x = x + mlp("mlp", h)
                continue
            y = mlp("mlp.shared_experts", h) if config["n_shared_experts"] else np.zeros_like(h)
            for token in range(s):
                for expert, weight in _route(config, t, prefix, h[token]):
                    y[token] += weight * mlp(f"mlp.experts.{expert}", h[token : token + 1])[0]
            x = x + y
        x = _norm(x, t["model.norm.weight"], eps)
        out.append(x @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T)
    return np.stack(out)


def _route(config, t, prefix, x):
    score = 1 / (1 + np.exp(-(t[f"{prefix}mlp.gate.weight"] @ x)))
    biased = score + t[f"{prefix}mlp.gate.e_score_correction_bias"]
    groups = np.split(np.arange(len(score)), config["n_group"])
    best = sorted(groups, key=lambda g: -np.sort(biased[g])[-2:].sum())[: config["topk_group"]]
    allowed = np.concatenate(best)
    chosen = allowed[np.argsort(-biased[allowed])][: config["num_experts_per_tok"]]
    weights = score[chosen]
    if config["norm_topk_prob"]:
        weights = weights / weights.sum()
    return zip(chosen, weights * config["routed_scaling_factor"], strict=True)


def _angles(config, s):
    dim, theta, yarn = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    factor = 1.0
    if yarn:

        def pair(rotations):
            length = yarn["original_max_position_embeddings"]
            return dim * np.log(length / (rotations * 2 * np.pi)) / (2 * np.log(theta))

        low, high = pair(yarn.get("beta_fast", 32)), pair(yarn.get("beta_slow", 1))
        if yarn.get("truncate", True):
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        frequency = frequency / yarn["factor"] * ramp + frequency * (1 - ramp)
        if "mscale" in yarn:
            factor = _mscale(yarn["factor"], yarn["mscale"]) / _mscale(yarn["factor"], yarn["mscale_all_dim"])
        else:
            factor = _mscale(yarn["factor"], 1)
    angles = np.arange(s)[:, None] * frequency
    return np.cos(angles) * factor, np.sin(angles) * factor


def _rotate(config, x, cos, sin):
    """Pairs stay where they are, unlike in the model: products of two rotated vectors are the same."""
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    a, b = np.s_[..., :half], np.s_[..., half:]
    if config.get("rope_interleave", True):
        a, b = np.s_[..., ::2], np.s_[..., 1::2]
    out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def _scale(config):
    yarn = config["rope_scaling"] or {}
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    return scale * (_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2 if yarn.get("mscale_all_dim") else 1.0)


def _mscale(factor, mscale):
    return 0.1 * mscale * np.log(factor) + 1 if factor > 1 else 1.0


def _norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
