"""What a DeepSeek-V3 model is, read from and written to the config.json of its checkpoint."""

import dataclasses
import json
import math
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `factor` None is the plain one, otherwise YaRN (arXiv 2309.00071)."""

    theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """A DeepSeek-V3 model: the names and meanings of its config.json, with DeepSeek-V3's own values as defaults."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope(factor=40.0, mscale=1.0, mscale_all_dim=1.0)
    rope_interleave: bool = True
    max_position_embeddings: int = 163840
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    eos_token_id: int | tuple[int, ...] | None = 1
    # FP8 weights with one scale a block of 128 x 128.
    quantized: bool = False
    # The format of the scales that products in FP8 compute, "float32" or "ue8m0": see `jaxkern.quantize`.
    scale_format: str = "float32"
    # The config.json that this was read from: `to_hf` gives it back. No part of what the model is.
    source: dict[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if isinstance(self.eos_token_id, list):  # as in JSON; compiled programs are cached by what can be hashed
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check(self)

    @classmethod
    def from_hf(cls, path: str | pathlib.Path) -> "Config":
        """Reads a config.json (or the one in a folder): the spelling of DeepSeek's releases or of transformers 5.

        Errors: FileNotFoundError where there is none; ValueError naming the key where a value is not supported, or
            where the key is neither known nor in the list of those that cannot change the output.
        """
        path = pathlib.Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not there; it takes a local folder with a config.json, not a hub's name"
            )
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> "Config":
        """`from_hf` for what config.json holds."""
        return _from_dict(source)

    def to_hf(self) -> dict[str, Any]:
        """What config.json holds for this model: what it was read from, if it was, else DeepSeek's spelling."""
        if self.source is None:
            return _to_dict(self)
        if Config.from_dict(self.source) == self:
            return dict(self.source)
        return {**{key: value for key, value in self.source.items() if key in _NEUTRAL}, **_to_dict(self)}

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """What the cache holds for one token of one layer: the latent and the rotated key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        if self.rope.factor is not None and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """What a file holds that is one JSON object."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# Keys of config.json whose value is a field of the same name.
_OTHER_FIELDS = ("rope", "quantized", "scale_format", "source")
_FIELDS = tuple(f.name for f in dataclasses.fields(Config) if f.name not in _OTHER_FIELDS)
_REQUIRED = tuple(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads q_lora_rank kv_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts""".split()
)
_REQUIRED_MOE = tuple(
    """moe_intermediate_size n_shared_experts num_experts_per_tok n_group topk_group routed_scaling_factor
    norm_topk_prob first_k_dense_replace""".split()
)
# Keys with one supported value, which is also what an absent key means.
_ONLY = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "mlp_bias": False}
_ROPE_KEYS = {
    "rope_theta": "theta",
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
# Keys that cannot change the logits: bookkeeping, training, sampling defaults and forms of output.
_NEUTRAL = set(
    """
    architectures auto_map model_type transformers_version torch_dtype dtype _name_or_path _commit_hash name_or_path
    _attn_implementation attn_implementation experts_implementation use_cache use_bfloat16 torchscript tf_legacy_loss
    output_hidden_states output_attentions output_router_logits return_dict return_dict_in_generate output_scores
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder pruned_heads gradient_checkpointing tokenizer_class prefix task_specific_params problem_type
    finetuning_task id2label label2id num_labels bos_token_id pad_token_id sep_token_id unk_token_id cls_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values
    pretraining_tp ep_size aux_loss_alpha router_aux_loss_coef seq_aux attention_dropout
    """.split()
)
_QUANTIZATION = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "weight_block_size": ([128, 128],),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("float", "ue8m0", None),
    "modules_to_not_convert": (None, [], ["lm_head"]),
    "ignored_layers": (None, []),
    "dequantize": (None, False),
}


def _from_dict(source: dict[str, Any]) -> Config:
    model_type = source.get("model_type", "deepseek_v3")
    indexer = sorted(key for key in source if key.startswith("index_"))
    if model_type == "deepseek_v32" or indexer:
        keys = ", ".join([f"model_type {model_type!r}", *indexer])
        raise ValueError(f"config.json: DeepSeek-V3.2's sparse attention is not supported ({keys})")
    if model_type != "deepseek_v3":
        raise ValueError(f"config.json: model_type must be 'deepseek_v3', got {model_type!r}")
    for key in _REQUIRED + (_REQUIRED_MOE if source.get("n_routed_experts") else ()):
        if key not in source:
            raise ValueError(f"config.json: {key} is missing")
    values = {key: source[key] for key in _FIELDS if key in source}
    seen = set(values) | _NEUTRAL
    for key, only in _ONLY.items():
        seen.add(key)
        if source.get(key, only) != only:
            raise ValueError(f"config.json: {key} must be {only!r}, got {source[key]!r}")
    if "num_mtp_layers" in source:
        seen.add("num_mtp_layers")
        _agree(source, "num_mtp_layers", values.setdefault("num_nextn_predict_layers", source["num_mtp_layers"]))
    # null stands for "none of it" in these.
    for key in ("n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"):
        values[key] = values.get(key, 0) or 0
    for key in ("attention_bias", "tie_word_embeddings"):
        values[key] = False if values.get(key) is None else values[key]
    if not values["n_routed_experts"]:
        values["num_experts_per_tok"] = values["n_group"] = values["topk_group"] = 1
    else:
        for key in ("n_group", "topk_group"):
            values[key] = values.get(key) or 1
    values.setdefault("max_position_embeddings", Config.max_position_embeddings)
    longest = values["max_position_embeddings"]
    _require(_is_number(longest) and longest > 0, "max_position_embeddings", "a positive number", longest)
    values["rope"] = _rope(source, longest)
    seen |= {"rope_theta", "rope_scaling", "rope_parameters"}
    values |= _quantization(source.get("quantization_config"))
    seen.add("quantization_config")
    config = Config(**values, source=dict(source))
    # Keys that say again what others say.
    again = {
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
        "head_dim": config.qk_rope_head_dim,
        "num_local_experts": config.n_routed_experts,
    }
    for key, expected in again.items():
        seen.add(key)
        if source.get(key) is not None:
            _agree(source, key, expected)
    if unknown := sorted(set(source) - seen):
        raise ValueError(f"config.json: unknown keys, which may change the output: {', '.join(unknown)}")
    return config


def _agree(source: dict[str, Any], key: str, expected):
    if source[key] != expected:
        raise ValueError(f"config.json: {key} must be {expected!r} as other keys have it, got {source[key]!r}")


def _rope(source: dict[str, Any], max_position_embeddings: int) -> Rope:
    """`rope_theta` and `rope_scaling` of DeepSeek's releases, or `rope_parameters` of transformers 5."""
    place = "rope_parameters" if source.get("rope_parameters") else "rope_scaling"
    given = source.get(place) or {}
    _require(isinstance(given, dict), place, "an object", given)
    given = dict(given)
    if place == "rope_parameters" and source.get("rope_scaling"):
        raise ValueError("config.json: rope_parameters and rope_scaling exclude each other")
    if source.get("rope_theta") is not None:
        _agree(source, "rope_theta", given.setdefault("rope_theta", source["rope_theta"]))
    kinds = {given.pop(key) for key in ("type", "rope_type") if key in given} or {"default"}
    if len(kinds) != 1 or not kinds <= {"default", "yarn"}:
        raise ValueError(f"config.json: {place}: rope_type must be 'default' or 'yarn', got {sorted(kinds)}")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: {place}: partial_rotary_factor must be 1.0")
    if unknown := sorted(set(given) - set(_ROPE_KEYS)):
        raise ValueError(f"config.json: {place}: unknown keys, which may change the output: {', '.join(unknown)}")
    if kinds == {"default"}:
        if ignored := sorted(set(given) - {"rope_theta"}):
            raise ValueError(f"config.json: {place}: rope_type 'default' has no {', '.join(ignored)}")
        return Rope(**{"theta": given["rope_theta"]} if given.get("rope_theta") is not None else {})
    if given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = max_position_embeddings
    rope = Rope(**{_ROPE_KEYS[key]: value for key, value in given.items() if value is not None})
    if rope.factor is None:
        _check_rope(rope)
        rope = dataclasses.replace(rope, factor=max_position_embeddings / rope.original_max_position_embeddings)
    return rope


def _quantization(quantization: dict[str, Any] | None) -> dict[str, Any]:
    if not quantization:
        return {}
    for key, value in quantization.items():
        if key not in _QUANTIZATION or value not in _QUANTIZATION[key]:
            allowed = f", one of {_QUANTIZATION[key]} is" if key in _QUANTIZATION else ""
            raise ValueError(f"config.json: quantization_config: {key} {value!r} is not supported{allowed}")
    for key in ("quant_method", "weight_block_size"):
        if key not in quantization:
            raise ValueError(f"config.json: quantization_config: {key} is missing")
    return {"quantized": True, "scale_format": "ue8m0" if quantization.get("scale_fmt") == "ue8m0" else "float32"}


def _to_dict(config: Config) -> dict[str, Any]:
    values = {key: getattr(config, key) for key in _FIELDS}
    if isinstance(config.eos_token_id, tuple):
        values["eos_token_id"] = list(config.eos_token_id)
    rope = {name: getattr(config.rope, field) for name, field in _ROPE_KEYS.items()}
    theta = rope.pop("rope_theta")
    scaling = {name: value for name, value in rope.items() if value is not None}
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        **({"scale_fmt": "ue8m0"} if config.scale_format == "ue8m0" else {}),
    }
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **values,
        "num_key_value_heads": config.num_attention_heads,
        **_ONLY,
        "rope_theta": theta,
        "rope_scaling": None if config.rope.factor is None else {"type": "yarn", **scaling},
        **({"quantization_config": quantization} if config.quantized else {}),
    }


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds, key: str, what: str, value):
    if not holds:
        raise ValueError(f"config: {key} must be {what}, got {value!r}")


def _check_rope(rope: Rope):
    _require(_is_number(rope.theta) and rope.theta > 1, "rope_theta", "a number above 1", rope.theta)
    for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        value = getattr(rope, key)
        allowed = (key == "factor" and value is None) or (_is_number(value) and value > 0)
        _require(allowed, f"rope_scaling: {key}", "a positive number", value)
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        value = getattr(rope, key)
        _require(value is None or _is_number(value), f"rope_scaling: {key}", "a number", value)
    _require(rope.truncate in (True, False), "rope_scaling: truncate", "true or false", rope.truncate)


def _check(config: Config):
    def require(holds, key, what):
        _require(holds, key, what, getattr(config, key))

    def integer(key, least=1):
        value = getattr(config, key)
        what = "a positive integer" if least else "an integer, at least 0"
        require(isinstance(value, int) and value >= least, key, what)

    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        integer(key)
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_layer_freq"):
        integer(key)
    for key in ("n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"):
        integer(key, 0)
    for key in ("norm_topk_prob", "attention_bias", "rope_interleave", "tie_word_embeddings"):
        require(getattr(config, key) in (True, False), key, "true or false")
    require(_is_number(config.rms_norm_eps) and config.rms_norm_eps >= 0, "rms_norm_eps", "a number, at least 0")
    require(config.scale_format in ("float32", "ue8m0"), "scale_format", "'float32' or 'ue8m0'")
    if config.q_lora_rank is not None:
        require(isinstance(config.q_lora_rank, int) and config.q_lora_rank > 0, "q_lora_rank", "null or positive")
    require(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even")
    stops = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    require(stops == (None,) or all(isinstance(x, int) for x in stops), "eos_token_id", "one integer, several or null")
    _check_rope(config.rope)
    if config.n_routed_experts:
        for key in ("moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group"):
            integer(key)
        integer("first_k_dense_replace", 0)
        require(_is_number(config.routed_scaling_factor), "routed_scaling_factor", "a number")
        experts, groups = config.n_routed_experts, config.n_group
        require(experts % groups == 0, "n_group", f"a divisor of n_routed_experts {experts}")
        require(groups == 1 or experts // groups >= 2, "n_group", f"at most {experts // 2}: a group has two experts")
        require(config.topk_group <= groups, "topk_group", f"in 1..n_group {groups}")
        selectable = experts // groups * config.topk_group
        require(config.num_experts_per_tok <= selectable, "num_experts_per_tok", f"in 1..{selectable}")
