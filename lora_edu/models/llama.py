"""A LLaMA that reads in one sitting: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Read `Llama.forward`, then `Block`, then `Attention`: that is the whole model. Names are Hugging Face's
(`model.layers.0.self_attn.q_proj.weight`), so one folder loads here and in `transformers.LlamaForCausalLM` with the
same logits. Axes: B batch, T time, C channels, H heads, D channels of one head.

Source: Touvron et al. (2023), "LLaMA", section 2.2, arXiv:2302.13971; rotary positions: Su et al. (2021),
arXiv:2104.09864; grouped queries: Ainslie et al. (2023), arXiv:2305.13245; SwiGLU: Shazeer (2020), arXiv:2002.05202.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lora_edu.models import folder
from lora_edu.models.sampling import generate, stream


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a `Llama`, under the names that config.json uses; every size counts numbers, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    head_dim: int = 0          # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} "
                             "key/value heads evenly: choose num_key_value_heads that divides num_attention_heads.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, "
                             "and rotary positions turn channels in pairs: choose an even one.")


class KVCache:
    """Keys and values of the tokens already read, one pair (B, H_kv, T, D) a layer; `length` is T."""

    def __init__(self, layers: int):
        self.pairs = [None] * layers

    @property
    def length(self) -> int:
        return 0 if self.pairs[0] is None else self.pairs[0][0].shape[2]

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pairs[layer] is not None:
            k = torch.cat([self.pairs[layer][0], k], dim=2)
            v = torch.cat([self.pairs[layer][1], v], dim=2)
        self.pairs[layer] = (k, v)
        return k, v


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight. 16-bit inputs are squared in float32: x² leaves their range early."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_angles(config: LlamaConfig, start: int, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (T, D) in float32 (as in transformers): position t turns pair i by t / rope_theta**(2i/D)."""
    D = config.head_dim
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.int64, device=device).float() / D)
    angle = torch.outer(torch.arange(start, start + length, device=device).float(), frequency)   # (T, D/2)
    angle = torch.cat([angle, angle], dim=-1)                                                    # (T, D)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_i, x_{i+D/2}) of (B, H, T, D). Hugging Face's layout; the paper pairs neighbours instead."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal attention; several query heads share one key/value head."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.D, self.layer = D, layer
        self.share = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        B, T, _ = x.shape
        # (B, H, T, D)
        q, k, v = (p(x).view(B, T, -1, self.D).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        past = 0
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            past = k.shape[2] - T
        k, v = (t.repeat_interleave(self.share, dim=1) if self.share > 1 else t for t in (k, v))
        # new tokens see all of the past; among themselves each sees only those before it
        seen = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past and T > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not past and T > 1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: one projection opens and shuts the other, channel by channel."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention, then x + MLP, each behind a norm."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids (B, T) in, logits (B, T, vocab_size) out, in the dtype of the weights.

    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> Llama(config)(torch.zeros(3, 7, dtype=torch.long)).shape
    torch.Size([3, 7, 50])

    A new model is random: normal with standard deviation 0.02, the two projections that write into the residual
    stream smaller by sqrt(2 · layers) (GPT-2's rule, so that depth does not raise the variance).
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # named as Hugging Face names it, so that `model.layers.0…` means the same there
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                shrink = (2 * config.num_hidden_layers) ** 0.5 if last else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        if ids.ndim != 2:
            raise ValueError(f"ids of shape {tuple(ids.shape)}: the model reads (batch, "
                             "time); use ids[None] for one text.")
        past = cache.length if cache is not None else 0
        limit = self.config.max_position_embeddings
        if past + ids.shape[1] > limit:
            raise ValueError(f"{past + ids.shape[1]} tokens do not fit a context of {limit}: shorten the text.")
        embed_tokens = self.model["embed_tokens"]
        ids = ids.to(embed_tokens.weight.device)                     # a tokenizer's ids come from the CPU
        x = embed_tokens(ids)                                        # (B, T, C)
        cos, sin = (t.to(x.dtype) for t in rotary_angles(self.config, past, ids.shape[1], ids.device))
        for layer in self.model["layers"]:
            x = layer(x, cos, sin, cache)
        return self.lm_head(self.model["norm"](x))

    def new_cache(self) -> KVCache:
        return KVCache(self.config.num_hidden_layers)

    stream = stream
    generate = generate

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> "Llama":
        """Load a Hugging Face folder: config.json and model.safetensors, or the shards of model.safetensors.index.json.

        Raises:
            FileNotFoundError: a file of the folder is missing.
            ValueError: the config asks for something this model does not have, or the tensors do not fit it.
        """
        with torch.device("meta"):                   # no time spent on random numbers that the file replaces
            model = cls(LlamaConfig(**folder.read_config(path)))
        tensors = folder.read_tensors(path, {name: p.shape for name, p in model.named_parameters()})
        model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, assign=True, strict=False)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model["embed_tokens"].weight
        return model.eval()

    def save_folder(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors; `from_folder` and transformers read them."""
        folder.write(path, self.config, {name: p.detach().to(dtype) for name, p in self.named_parameters()})
