"""What kind of transformer a checkpoint holds: its numbers from `config.json`, its tensors' names by family.

One description serves all families that the engine runs itself; any other architecture runs on
transformers' own modules.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

Config = Mapping[str, Any]


class Names(msgspec.Struct, frozen=True):
    """Checkpoint names; `{l}` is the layer. Empty: there is none. `q`, `k`, `v` are equal where the
    checkpoint has one map for all.

    Of images `word` is the convolution that embeds patches, and `first` the token before them; `position`
    is no map then.
    """

    word: str
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    norm1: str
    norm2: str = ""
    gate: str = ""
    position: str = ""
    kind: str = ""
    norm0: str = ""
    final: str = ""
    q_norm: str = ""
    k_norm: str = ""
    head: str = ""
    first: str = ""


class Architecture(msgspec.Struct, frozen=True):
    """A transformer as the engine runs it."""

    family: str
    names: Names
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    activation: str
    eps: float
    causal: bool
    rms: bool = False
    post: bool = False
    """The norm stands behind the residual addition, as in BERT."""
    parallel: bool = False
    """Attention and feed-forward read the same normalised input, as in Phi."""
    theta: float = 0.0
    """Base of rotary positions; 0: none."""
    rotary: int = 0
    """Channels of a head that rotate."""
    offset: int = 0
    """Row of the table of learned positions that position 0 has."""
    norm_plus: float = 0.0
    """Added to the weights of norms: 1 in Gemma."""
    word_scale: float = 1.0
    transposed: bool = False
    """Linear maps lie as (in, out), as in GPT-2."""
    window: int = 0
    """A token sees so many before it; 0: all."""
    patch: int = 0
    """Side of the square of pixels that is a token; 0: it reads texts."""

    def roles(self) -> dict[str, str]:
        """Pattern of a map's name → what its rows or columns are."""
        n = self.names
        found = {n.q: "qkv"} if n.q == n.k else {n.q: "q", n.k: "k", n.v: "v"}
        return found | {n.o: "o", n.up: "up", n.down: "down"} | ({n.gate: "up"} if n.gate else {})


def read_architecture(config: Config) -> Architecture | None:
    """The description, or None where transformers has to run it."""
    config = {**config, **config.get("text_config", {})}
    make = _FAMILIES.get(config.get("model_type", ""))
    return make(config) if make else None


def _bert(c: Config) -> Architecture | None:
    if c.get("position_embedding_type", "absolute") != "absolute" or c.get("is_decoder"):
        return None
    at = "encoder.layer.{l}."
    names = Names(
        word="embeddings.word_embeddings", position="embeddings.position_embeddings",
        kind="embeddings.token_type_embeddings",
        norm0="embeddings.LayerNorm", q=at + "attention.self.query", k=at + "attention.self.key",
        v=at + "attention.self.value",
        o=at + "attention.output.dense", norm1=at + "attention.output.LayerNorm",
        up=at + "intermediate.dense", down=at + "output.dense",
        norm2=at + "output.LayerNorm",
    )  # fmt: skip
    roberta = c["model_type"] != "bert"
    return _architecture(c, names, causal=False, post=True, eps=c.get("layer_norm_eps", 1e-12),
    activation=c.get("hidden_act", "gelu"),
                         offset=c.get("pad_token_id", 1) + 1 if roberta else 0)  # fmt: skip


def _vit(c: Config) -> Architecture | None:
    """Images: patches as tokens, norms before attention and feed-forward, one behind the last layer."""
    if (
        not isinstance(c.get("patch_size", 16), int)
        or not isinstance(c.get("image_size", 224), int)
        or c.get("use_mask_token")
    ):
        return None
    at = "encoder.layer.{l}."
    names = Names(
        word="embeddings.patch_embeddings.projection", position="embeddings.position_embeddings",
        first="embeddings.cls_token",
        q=at + "attention.attention.query", k=at + "attention.attention.key",
        v=at + "attention.attention.value",
        o=at + "attention.output.dense", norm1=at + "layernorm_before", norm2=at + "layernorm_after",
        up=at + "intermediate.dense",
        down=at + "output.dense", final="layernorm",
    )  # fmt: skip
    return _architecture(c, names, causal=False, eps=c.get("layer_norm_eps", 1e-12),
    activation=c.get("hidden_act", "gelu"),
                         patch=c.get("patch_size", 16))  # fmt: skip


def _gpt2(c: Config) -> Architecture | None:
    if (
        c.get("scale_attn_by_inverse_layer_idx")
        or c.get("add_cross_attention")
        or not c.get("scale_attn_weights", True)
    ):
        return None
    at = "h.{l}."
    qkv = at + "attn.c_attn"
    names = Names(word="wte", position="wpe", q=qkv, k=qkv, v=qkv, o=at + "attn.c_proj", norm1=at + "ln_1",
    norm2=at + "ln_2",
                  up=at + "mlp.c_fc", down=at + "mlp.c_proj", final="ln_f", head="lm_head")  # fmt: skip
    return _architecture(c, names, causal=True, transposed=True, eps=c.get("layer_norm_epsilon", 1e-5),
                         activation=c.get("activation_function", "gelu_new"))  # fmt: skip


def _opt(c: Config) -> Architecture | None:
    if (
        not c.get("do_layer_norm_before", True)
        or c.get("word_embed_proj_dim", c["hidden_size"]) != c["hidden_size"]
    ):
        return None
    if c.get("_remove_final_layer_norm") or not c.get("enable_bias", True):
        return None
    at = "decoder.layers.{l}."
    names = Names(
        word="decoder.embed_tokens", position="decoder.embed_positions", q=at + "self_attn.q_proj",
        k=at + "self_attn.k_proj",
        v=at + "self_attn.v_proj", o=at + "self_attn.out_proj", norm1=at + "self_attn_layer_norm",
        norm2=at + "final_layer_norm",
        up=at + "fc1", down=at + "fc2", final="decoder.final_layer_norm", head="lm_head",
    )  # fmt: skip
    return _architecture(
        c, names, causal=True, eps=1e-5, activation=c.get("activation_function", "relu"), offset=2
    )


def _llama(c: Config) -> Architecture | None:
    """Llama, Mistral, Qwen2, Qwen3, Gemma: RMS norms, rotary positions, gated feed-forward."""
    family = c["model_type"]
    theta = _theta(c)
    if (
        theta is None
        or c.get("pretraining_tp", 1) != 1
        or any(t != "full_attention" for t in c.get("layer_types") or ())
    ):
        return None
    at = "layers.{l}."
    names = Names(
        word="embed_tokens", q=at + "self_attn.q_proj", k=at + "self_attn.k_proj", v=at + "self_attn.v_proj",
        o=at + "self_attn.o_proj",
        norm1=at + "input_layernorm", norm2=at + "post_attention_layernorm", gate=at + "mlp.gate_proj",
        up=at + "mlp.up_proj",
        down=at + "mlp.down_proj", final="norm", head="lm_head",
        q_norm=at + "self_attn.q_norm" if family == "qwen3" else "",
        k_norm=at + "self_attn.k_norm" if family == "qwen3" else "",
    )  # fmt: skip
    gemma = family == "gemma"
    window = c.get("sliding_window") or 0 if family == "mistral" or c.get("use_sliding_window") else 0
    activation = c.get("hidden_activation") or ("gelu_pytorch_tanh" if gemma else c.get("hidden_act", "silu"))
    return _architecture(
        c, names, causal=True, rms=True, eps=c.get("rms_norm_eps", 1e-6), theta=theta, activation=activation,
        window=window,
        norm_plus=1.0 if gemma else 0.0, word_scale=math.sqrt(c["hidden_size"]) if gemma else 1.0,
    )  # fmt: skip


def _phi(c: Config) -> Architecture | None:
    theta = _theta(c)
    if theta is None or c.get("qk_layernorm"):
        return None
    at = "layers.{l}."
    names = Names(
        word="embed_tokens", q=at + "self_attn.q_proj", k=at + "self_attn.k_proj", v=at + "self_attn.v_proj",
        o=at + "self_attn.dense",
        norm1=at + "input_layernorm", up=at + "mlp.fc1", down=at + "mlp.fc2", final="final_layernorm",
        head="lm_head",
    )  # fmt: skip
    part = float(
        (c.get("rope_parameters") or {}).get("partial_rotary_factor") or c.get("partial_rotary_factor") or 0.5
    )
    return _architecture(c, names, causal=True, parallel=True, eps=c.get("layer_norm_eps", 1e-5), theta=theta,
                         activation=c.get("hidden_act", "gelu_new"), part=part)  # fmt: skip


_FAMILIES: dict[str, Callable[[Config], Architecture | None]] = {
    "bert": _bert, "roberta": _bert, "xlm-roberta": _bert, "camembert": _bert, "vit": _vit, "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "gemma": _llama, "phi": _phi,
}  # fmt: skip
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu")


def _theta(c: Config) -> float | None:
    """Base of the rotary positions; None for the scaled kinds, which transformers runs."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        return None
    return float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0)


def _architecture(
    c: Config, names: Names, *, activation: str, part: float = 1.0, theta: float = 0.0, **more: Any
) -> Architecture | None:
    if activation not in ACTIVATIONS:
        return None
    hidden = c.get("hidden_size") or c["n_embd"]
    heads = c.get("num_attention_heads") or c["n_head"]
    size = c.get("head_dim") or hidden // heads
    return Architecture(
        family=c["model_type"], names=names, layers=c.get("num_hidden_layers") or c["n_layer"], hidden=hidden,
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads, head_size=size, activation=activation, theta=theta,
        rotary=int(size * part) if theta else 0, **more,
    )  # fmt: skip
