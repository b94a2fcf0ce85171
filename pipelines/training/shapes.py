"""Sizes of a base model: from its config.json, from a recipe's `config`, or from a table.

Counting is arithmetic, so that what a run needs is known in a moment, without torch, without the
weights and without access to them. A test holds the counts against models on the meta device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.settings.model import ScratchConfig
from pipelines.settings.training import Adapter

GATED = ("llama", "qwen2")
PADDED_TO = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that decide how much memory and time a decoder takes.

    `inner` is the width of the MLP, of two matrices, or three where it is gated.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    positions: int
    tied: bool = True
    head_dim: int = 0

    @property
    def gated(self) -> bool:
        """Return whether the MLP has three matrices."""
        return self.model_type in GATED

    @property
    def query(self) -> int:
        """Return the width of all query heads."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def key(self) -> int:
        """Return the width of all key heads, which is that of the value heads."""
        return self.kv_heads * (self.head_dim or self.hidden // self.heads)

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return {name: (width in, width out)} of one block's matrices, by transformers' names."""
        d, q, kv, f = self.hidden, self.query, self.key, self.inner
        if self.model_type == "gpt_bigcode":
            return {"attn.c_attn": (d, q + 2 * kv), "attn.c_proj": (q, d),
                    "mlp.c_fc": (d, f), "mlp.c_proj": (f, d)}  # fmt: skip
        attention = {"self_attn.q_proj": (d, q), "self_attn.k_proj": (d, kv),
                     "self_attn.v_proj": (d, kv), "self_attn.o_proj": (q, d)}  # fmt: skip
        if self.gated:
            return {**attention, "mlp.gate_proj": (d, f), "mlp.up_proj": (d, f),
                    "mlp.down_proj": (f, d)}  # fmt: skip
        return {**attention, "mlp.c_fc": (d, f), "mlp.c_proj": (f, d)}

    @property
    def block_matrices(self) -> int:
        """Return the parameters in the matrices of one block."""
        return sum(wide * tall for wide, tall in self.linear_layers.values())

    @property
    def block_vectors(self) -> int:
        """Return the parameters of one block that are no matrices: biases and norms."""
        outs = [tall for _, tall in self.linear_layers.values()]
        if self.model_type == "llama":
            return 2 * self.hidden
        if self.model_type == "qwen2":
            return self.query + 2 * self.key + 2 * self.hidden
        return sum(outs) + 4 * self.hidden

    @property
    def embeddings(self) -> int:
        """Return the parameters of the input embeddings, and of the head where it is its own."""
        learned = self.positions if self.model_type == "gpt_bigcode" else 0
        return (self.vocab * (1 if self.tied else 2) + learned) * self.hidden

    @property
    def parameters(self) -> int:
        """Return all parameters; tied ones count once."""
        last_norm = self.hidden * (1 if self.gated else 2)
        blocks = self.layers * (self.block_matrices + self.block_vectors)
        return blocks + last_norm + self.embeddings

    def targets(self, patterns: tuple[str, ...]) -> list[str]:
        """Return the layers of a block that an adapter's patterns name (the end of a name)."""
        return [
            name
            for name in self.linear_layers
            if any(p == "all-linear" or f".{name}".endswith(f".{p}") for p in patterns)
        ]

    def adapter_parameters(self, adapter: Adapter) -> int:
        """Return the parameters of a LoRA; DoRA adds a magnitude for each output."""
        per_block = 0
        for name in self.targets(adapter.target_modules):
            wide, tall = self.linear_layers[name]
            per_block += adapter.r * (wide + tall) + (tall if adapter.use_dora else 0)
        return self.layers * per_block


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """Return the sizes in a config.json, or None for a family that is not known here."""
    first = _first(config)
    try:
        hidden, heads = first("n_embd", "hidden_size"), first("n_head", "num_attention_heads")
        model_type = str(config["model_type"])
        if model_type not in ("gpt_bigcode", "starcoder2", *GATED):
            return None
        kv_heads = first("num_key_value_heads", default=heads)
        if model_type == "gpt_bigcode":
            kv_heads = 1 if config.get("multi_query", True) else heads
        return Shape(
            model_type=model_type,
            layers=first("n_layer", "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            inner=first("n_inner", "intermediate_size", default=4 * hidden),
            vocab=first("vocab_size"),
            positions=first("n_positions", "max_position_embeddings"),
            tied=bool(config.get("tie_word_embeddings", model_type not in GATED)),
            head_dim=first("head_dim", default=hidden // heads),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _first(config: Mapping[str, Any]) -> Any:
    def first(*names: str, default: int | None = None) -> int:
        for name in names:
            if config.get(name) is not None:
                return int(config[name])
        if default is None:
            raise KeyError(names[0])
        return default

    return first


def scratch_shape(config: ScratchConfig, vocab: int) -> Shape:
    """Return the sizes of a model from random weights; its vocabulary is padded."""
    return Shape(
        model_type=config.model_type,
        layers=config.n_layer,
        hidden=config.n_embd,
        heads=config.n_head,
        kv_heads=1,
        inner=4 * config.n_embd,
        vocab=-(-vocab // PADDED_TO) * PADDED_TO,
        positions=config.n_positions,
        tied=config.model_type not in GATED,
    )


def known_shape(name: str) -> Shape | None:
    """Return the sizes of a model of the hub that recipes name often, without asking the hub."""
    owner, _, model = name.partition("/")
    return KNOWN.get(f"{owner}/{model.removesuffix('-Instruct')}") or KNOWN.get(name)


def _bigcode(layers: int, hidden: int, vocab: int = 49_152, positions: int = 8192) -> Shape:
    return Shape(
        "gpt_bigcode", layers, hidden, hidden // 128, 1, 4 * hidden, vocab, positions, tied=True
    )


def _starcoder2(layers: int, hidden: int, heads: int, kv_heads: int, *, tied: bool) -> Shape:
    return Shape(
        "starcoder2", layers, hidden, heads, kv_heads, 4 * hidden, 49_152, 16_384, tied=tied
    )


def _qwen(layers: int, hidden: int, heads: int, kv: int, inner: int, *, tied: bool) -> Shape:
    vocab = 151_936 if tied else 152_064
    return Shape("qwen2", layers, hidden, heads, kv, inner, vocab, 32_768, tied=tied)


# From the config.json of each model and the reports: StarCoder (arXiv 2305.06161, table 5),
# StarCoder2 (2402.19173, table 5), Qwen2.5-Coder (2409.12186, table 1). A test compares the
# parameters that follow with those that the model cards state.
KNOWN = {
    "bigcode/tiny_starcoder_py": Shape("gpt_bigcode", 20, 768, 12, 1, 3072, 49_152, 8192),
    "bigcode/starcoderbase-1b": _bigcode(24, 2048),
    "bigcode/starcoderbase-3b": _bigcode(36, 2816),
    "bigcode/starcoderbase-7b": _bigcode(42, 4096),
    "bigcode/starcoderbase": _bigcode(40, 6144),
    "bigcode/starcoder": _bigcode(40, 6144),
    "bigcode/starcoderplus": _bigcode(40, 6144),
    "bigcode/starcoder2-3b": _starcoder2(30, 3072, 24, 2, tied=True),
    "bigcode/starcoder2-7b": _starcoder2(32, 4608, 36, 4, tied=True),
    "bigcode/starcoder2-15b": _starcoder2(40, 6144, 48, 4, tied=False),
    "Qwen/Qwen2.5-Coder-0.5B": _qwen(24, 896, 14, 2, 4864, tied=True),
    "Qwen/Qwen2.5-Coder-1.5B": _qwen(28, 1536, 12, 2, 8960, tied=True),
    "Qwen/Qwen2.5-Coder-3B": _qwen(36, 2048, 16, 2, 11_008, tied=True),
    "Qwen/Qwen2.5-Coder-7B": _qwen(28, 3584, 28, 4, 18_944, tied=False),
    "Qwen/Qwen2.5-Coder-14B": _qwen(48, 5120, 40, 8, 13_824, tied=False),
    "Qwen/Qwen2.5-Coder-32B": _qwen(64, 5120, 40, 8, 27_648, tied=False),
}
