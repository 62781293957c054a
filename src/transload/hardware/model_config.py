"""Reads a Hugging Face `config.json` of a decoder-only transformer into a `ModelCard`.

Counts, never computes: a family whose arithmetic is unknown here is counted by its keys, with a remark; one whose
layers this project cannot count (state-space, linear attention, encoder-decoder) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transload.errors import DeploymentError
from transload.hardware.config_keys import Keys
from transload.hardware.config_precision import read_precision
from transload.hardware.model_card import Attention, Experts, Extras, Gqa, Mla, ModelCard, Provenance

KNOWN = {
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3",
    "kimi_k2", "gpt_oss", "opt", "gpt2", "gpt_neox", "phi", "starcoder2", "step3_text", "glm4_moe", "phi3", "granite",
    "granitemoe", "gemma2", "gemma3_text", "ernie4_5",
}  # fmt: skip
"""Families whose small weights and defaults are known; their parameters are counted to the unit or nearly so."""
REFUSED_KEYS = {
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
    "state_size": "state-space layers",
    "linear_num_value_heads": "linear-attention layers",
    "linear_attn_config": "linear-attention layers",
    "attn_type_list": "linear-attention layers",
    "hybrid_override_pattern": "state-space layers",
    "intermediate_size_mlp": "layers with two feed-forward widths",
}
REFUSED_FAMILIES = {"bloom", "codegen", "dbrx", "falcon", "gpt_bigcode", "gptj", "longcat_flash", "mpt", "nemotron"}
"""Laid out otherwise than their keys suggest: counting them would be wrong by tens of percent."""
BIASED = {"opt", "gpt2", "gpt_neox", "phi", "starcoder2"}
"""Two matrices in the feed-forward, and biases everywhere."""
FULL, SLIDING = "full_attention", "sliding_attention"


def read_config(
    config: Mapping[str, Any], *, model_id: str, name: str, provenance: Provenance, where: str
) -> ModelCard:
    """The card of the model a config describes; `where` begins every complaint. Raises `DeploymentError`."""
    keys, remarks = _text_part(Keys(dict(config), where))
    family = str(keys.values.get("model_type") or "unstated")
    _refuse_what_cannot_be_counted(keys, family)
    if family not in KNOWN:
        remarks.append(
            f"model_type {family} is not known here: counted by its keys as a decoder of attention and feed-forward"
        )
    if "index_topk" in keys.values:
        remarks.append("its sparse-attention indexer is not counted: attention is counted as if it read everything")
    if (extra := keys.values.get("num_nextn_predict_layers")) not in (None, 0):
        remarks.append(f"{extra} multi-token-prediction layer(s) are not counted")
    num_layers = keys.size("num_hidden_layers", "n_layer", "num_layers", limit=10_000)
    hidden = keys.size("hidden_size", "n_embd", "d_model")
    experts, expert_layers = _experts(keys, family, num_layers)
    window, sliding_layers = _sliding(keys, family, num_layers)
    precision, precision_remarks = read_precision(keys)
    return ModelCard(
        id=model_id,
        name=name,
        family=family,
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        num_layers=num_layers,
        ffn_size=None if all(expert_layers) and expert_layers else _ffn_size(keys, hidden),
        gated_ffn=family not in BIASED,
        attention=_attention(keys, family, hidden),
        experts=experts,
        expert_layers=expert_layers,
        sliding_window=window,
        sliding_layers=sliding_layers,
        tied_embeddings=keys.flag("tie_word_embeddings", _tied_unless_said(family)),
        max_context=keys.optional_size("max_position_embeddings", "n_positions", "max_seq_len"),
        extras=_extras(keys, family),
        precision=precision,
        provenance=provenance,
        remarks=(*remarks, *precision_remarks),
    )


def _text_part(keys: Keys) -> tuple[Keys, list[str]]:
    """The language model inside a multimodal config."""
    for name in ("text_config", "llm_config", "language_config"):
        inner = keys.values.get(name)
        if isinstance(inner, dict):
            outer: dict[str, Any] = {key: keys.values.get(key) for key in ("quantization_config", "torch_dtype")}
            return Keys({**outer, **inner}, f"{keys.where}: {name}"), ["only the language model is counted"]
    return keys, []


def _refuse_what_cannot_be_counted(keys: Keys, family: str) -> None:
    if family in REFUSED_FAMILIES:
        raise DeploymentError(f"{keys.where}: models of type {family} cannot be counted yet")
    if keys.flag("is_encoder_decoder", False):
        raise DeploymentError(f"{keys.where}: is_encoder_decoder is true; only decoders can be counted")
    for key, what in REFUSED_KEYS.items():
        if keys.values.get(key) is not None:
            raise DeploymentError(f"{keys.where}: {key} means {what}, which this project cannot count yet")
    kinds = keys.values.get("layer_types")
    if isinstance(kinds, list):
        strange = [str(kind) for kind in kinds if kind not in (FULL, SLIDING)]
        if strange:
            raise DeploymentError(
                f"{keys.where}: layer_types has {strange[0]}; only {FULL} and {SLIDING} can be counted"
            )


def _attention(keys: Keys, family: str, hidden: int) -> Attention:
    num_heads = keys.size("num_attention_heads", "n_head")
    if keys.values.get("kv_lora_rank") is not None:
        return Mla(
            num_heads=num_heads,
            query_rank=keys.optional_size("q_lora_rank"),
            kv_rank=keys.size("kv_lora_rank"),
            nope_head_dim=keys.size("qk_nope_head_dim"),
            rope_head_dim=keys.size("qk_rope_head_dim"),
            value_head_dim=keys.size("v_head_dim"),
        )
    kv_heads = keys.optional_size("num_key_value_heads", "num_attention_groups") or num_heads
    if num_heads % kv_heads:
        raise DeploymentError(
            f"{keys.where}: {num_heads} attention heads cannot share {kv_heads} key/value heads evenly"
        )
    usual = 128 if family == "qwen3" else 64 if family == "gpt_oss" else hidden // num_heads
    head_dim = keys.optional_size("head_dim") or usual
    if not head_dim:
        raise DeploymentError(f"{keys.where}: hidden_size {hidden} is smaller than {num_heads} attention heads")
    return Gqa(
        num_heads=num_heads, num_kv_heads=kv_heads, head_dim=head_dim, query_rank=keys.optional_size("share_q_dim")
    )


def _ffn_size(keys: Keys, hidden: int) -> int:
    if keys.values.get("n_inner", 0) is None or "n_inner" in keys.values:
        return keys.optional_size("n_inner") or 4 * hidden
    return keys.size("intermediate_size", "ffn_dim")


def _experts(keys: Keys, family: str, num_layers: int) -> tuple[Experts | None, tuple[bool, ...]]:
    num_experts = keys.optional_size("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
    if num_experts is None or num_experts == 1:
        return None, ()
    per_token = keys.size("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "experts_per_token")
    if per_token > num_experts:
        raise DeploymentError(f"{keys.where}: {per_token} experts per token, but only {num_experts} experts")
    expert_size = keys.size("moe_intermediate_size", "expert_ffn_dim", "intermediate_size")
    num_shared = keys.optional_size("n_shared_experts", "num_shared_experts") or 0
    shared_size = keys.optional_size("shared_expert_intermediate_size", "share_expert_dim")
    if shared_size is not None:
        num_shared = num_shared or 1
    experts = Experts(
        num_experts=num_experts,
        per_token=per_token,
        expert_size=expert_size,
        num_shared=num_shared,
        shared_size=shared_size if shared_size is not None else num_shared * expert_size,
        shared_gate=family == "qwen2_moe",
    )
    return experts, _expert_layers(keys, num_layers)


def _expert_layers(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts, in the spellings of DeepSeek, Qwen and Step-3."""
    listed = keys.values.get("moe_layers_enum")
    if listed is not None:
        try:
            chosen = {int(number) for number in str(listed).strip("()[]").split(",")}
        except ValueError:
            raise DeploymentError(f"{keys.where}: moe_layers_enum is {listed!r}, wanted numbers and commas") from None
        return tuple(layer in chosen for layer in range(num_layers))
    first = keys.optional_size("first_k_dense_replace", smallest=0) or 0
    every = keys.optional_size("decoder_sparse_step", "moe_layer_freq") or 1
    dense = keys.values.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple):
        raise DeploymentError(f"{keys.where}: mlp_only_layers is {dense!r}, wanted a list of layers")
    offset = 1 if "decoder_sparse_step" in keys.values else 0
    return tuple(layer >= first and (layer + offset) % every == 0 and layer not in dense for layer in range(num_layers))


def _sliding(keys: Keys, family: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Window in tokens and which layers have it, with the defaults of `transformers`."""
    if keys.values.get("use_sliding_window") is False or (
        family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe") and not keys.flag("use_sliding_window", False)
    ):
        return None, ()
    window = keys.optional_size("sliding_window")
    if window is None:
        return None, ()
    kinds = keys.values.get("layer_types")
    if isinstance(kinds, list):
        if len(kinds) != num_layers:
            raise DeploymentError(f"{keys.where}: layer_types has {len(kinds)} entries for {num_layers} layers")
        slides = tuple(kind == SLIDING for kind in kinds)
    elif family in ("gpt_oss", "gemma2"):
        slides = tuple(layer % 2 == 0 for layer in range(num_layers))
    elif (pattern := keys.optional_size("sliding_window_pattern")) is not None:
        slides = tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    elif family.startswith("qwen"):
        first = keys.optional_size("max_window_layers", smallest=0)
        slides = tuple(layer >= (28 if first is None else first) for layer in range(num_layers))
    else:
        slides = (True,) * num_layers
    return (window, slides) if any(slides) else (None, ())


def _tied_unless_said(family: str) -> bool:
    return family in ("opt", "gpt2", "starcoder2") or family.startswith("gemma")


def _extras(keys: Keys, family: str) -> Extras:
    biased = family in BIASED
    gpt_oss = family == "gpt_oss"
    attention_bias = biased or keys.flag("attention_bias", gpt_oss)
    return Extras(
        qkv_bias=attention_bias or family in ("qwen2", "qwen2_moe"),
        output_bias=attention_bias and family != "glm4_moe",
        ffn_bias=biased or gpt_oss or keys.flag("mlp_bias", False),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text") or keys.flag("use_qk_norm", False),
        norm_bias=biased,
        norms_per_layer=4 if family in ("gemma2", "gemma3_text") else 1 if family == "phi" else 2,
        router_bias=gpt_oss or family in ("deepseek_v3", "kimi_k2", "glm4_moe"),
        attention_sinks=gpt_oss,
        learned_positions=_learned_positions(keys, family),
    )


def _learned_positions(keys: Keys, family: str) -> int:
    """Rows of the table of positions, where there is one. OPT's begins with two that stand for none."""
    if family == "opt":
        return keys.size("max_position_embeddings") + 2
    return keys.size("n_positions", "max_position_embeddings") if family == "gpt2" else 0
