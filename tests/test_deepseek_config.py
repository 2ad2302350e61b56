"""config.json: both spellings, what is refused and under which name."""

import dataclasses
import json

import pytest
from deepseek_tools import GOLDEN, SMALL

from jaxkern.models.deepseek import Config, Rope


def read(**changes):
    return Config.from_dict({key: value for key, value in (SMALL | changes).items() if value is not ...})


def test_values_are_read():
    config = Config.from_hf(GOLDEN / "v3-tiny" / "config.json")
    assert config == Config.from_hf(GOLDEN / "v3-tiny")
    assert (config.q_lora_rank, config.kv_lora_rank, config.qk_head_dim, config.latent_width) == (48, 64, 48, 80)
    assert (config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok) == (16, 4, 2, 4)
    assert [config.is_moe(i) for i in range(3)] == [False, True, True]
    assert config.rope.factor == 40 and config.rope.original_max_position_embeddings == 64
    assert not config.quantized and Config.from_hf(GOLDEN / "v3-fp8").quantized


def test_deepseek_v3_is_the_default():
    config = Config()
    assert config.softmax_scale == pytest.approx(0.1352338, rel=1e-6)
    assert sum(config.is_moe(i) for i in range(config.num_hidden_layers)) == 58
    assert Config.from_dict(config.to_hf()) == config


def test_both_spellings_mean_the_same():
    deepseek = read()
    scaling = {key: value for key, value in SMALL["rope_scaling"].items() if key != "type"}
    parameters = scaling | {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0}
    transformers = read(rope_scaling=..., rope_theta=..., rope_parameters=parameters, dtype="bfloat16")
    assert transformers == deepseek
    plain = read(rope_scaling=None, rope_theta=5.0)
    assert plain.rope == Rope(theta=5.0)
    assert plain == read(rope_scaling=..., rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    assert plain.softmax_scale == plain.qk_head_dim**-0.5
    assert read(num_mtp_layers=2) == read(num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="num_mtp_layers must be 1 as other keys have it, got 2"):
        read(num_nextn_predict_layers=1, num_mtp_layers=2)


def test_several_stop_tokens():
    config = Config(eos_token_id=[1, 2])
    assert config.eos_token_id == (1, 2) and hash(config) == hash(Config(eos_token_id=(1, 2)))
    assert read(eos_token_id=[1, 2]).to_hf()["eos_token_id"] == config.to_hf()["eos_token_id"] == [1, 2]


def test_factor_from_lengths():
    scaling = {key: value for key, value in SMALL["rope_scaling"].items() if key != "factor"}
    assert read(rope_scaling=scaling).rope.factor == 40


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("model_type", "deepseek_v2"),
        ("model_type", "deepseek_v32"),
        ("index_topk", 2048),
        ("mlp_bias", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_scaling", SMALL["rope_scaling"] | {"low_freq_factor": 1.0}),
        ("quantization_config", {"quant_method": "awq"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128], "bits": 4}),
        ("num_key_value_heads", 1),
        ("head_dim", 128),
        ("n_group", 3),
        ("n_group", 8),
        ("topk_group", 5),
        ("num_experts_per_tok", 5),
        ("qk_rope_head_dim", 7),
        ("kv_lora_rank", ...),
        ("n_shared_experts", ...),
        ("swiglu_limit", 7.0),
        ("routed_scaling_factor", None),
        ("first_k_dense_replace", None),
        ("num_experts_per_tok", None),
        ("moe_intermediate_size", None),
        ("moe_intermediate_size", "16"),
        ("topk_group", "2"),
        ("n_shared_experts", "1"),
        ("q_lora_rank", "24"),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", None),
        ("rope_interleave", None),
        ("norm_topk_prob", "false"),
        ("eos_token_id", "1"),
        ("eos_token_id", [1, 1.5]),
        ("max_position_embeddings", None),
        ("rope_theta", "10000"),
        ("rope_scaling", "yarn"),
        *[
            ("rope_scaling", SMALL["rope_scaling"] | {key: value})
            for key, value in (
                ("factor", "40"),
                ("factor", 0),
                ("original_max_position_embeddings", 0),
                ("mscale", "1"),
            )
        ],
    ],
)
def test_what_is_not_supported_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        read(**{key: value})


def test_deepseek_v32_is_refused():
    with pytest.raises(ValueError, match="sparse attention is not supported.*deepseek_v32.*index_head_dim"):
        Config.from_hf(GOLDEN / "v32-tiny")


def test_fp8_formats():
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    assert read(quantization_config=fp8).quantized
    assert read(quantization_config=fp8).scale_format == "float32"
    rounded = read(quantization_config=fp8 | {"scale_fmt": "ue8m0"})
    assert rounded.quantized and rounded.scale_format == "ue8m0"
    for config in (read(quantization_config=fp8), rounded):
        assert Config.from_dict(dataclasses.replace(config, source=None).to_hf()) == config
    with pytest.raises(ValueError, match="scale_format"):
        dataclasses.replace(rounded, scale_format="e8m0")


def test_written_config():
    source = json.loads((GOLDEN / "v3-tiny" / "config.json").read_text())
    config = Config.from_dict(source)
    assert config.to_hf() == source
    made = Config(
        **{f: getattr(config, f) for f in config.__dataclass_fields__ if f != "source"},
    )
    assert made == config and made.to_hf() != source
    assert Config.from_dict(made.to_hf()) == config
    # A config that was changed after it was read is written as it is now.
    changed = dataclasses.replace(config, num_hidden_layers=2)
    assert changed.to_hf()["num_hidden_layers"] == 2 and changed.to_hf()["bos_token_id"] == 0
