"""What LoRA is compared with: bottleneck adapters, prefix tuning, prompt tuning and BitFit, on our `Llama` and on transformers' Llama.

Each `apply_…` freezes the model, adds what its method trains, and returns how many numbers that is; each `remove_…` gives back the
model as it was. Read `BottleneckAdapter.forward`, then `Prefix.give`: one makes the model deeper, the other its past longer.

Sources: Houlsby et al. (2019), arXiv:1902.00751; Lin et al. (2020), arXiv:2004.03829; Pfeiffer et al. (2021), arXiv:2005.00247;
Li and Liang (2021), arXiv:2101.00190; Lester et al. (2021), arXiv:2104.08691; Ben Zaken et al. (2022), arXiv:2106.10199.
"""
import torch
from torch import nn
from torch.nn import functional as F

PLACES = {"houlsby": ("o_proj", "down_proj"), "lin": ("down_proj",)}     # the layers that write into the residual stream


# -- adapters: more layers ---------------------------------------------------------------------------------------------

class BottleneckAdapter(nn.Module):
    """``y = h + up(gelu(down(h)))`` with ``h = base_layer(x)``: two small layers in sequence behind a frozen one.

    `up` starts at zero, so a new adapter is the identity, bit for bit (Houlsby et al., section 2.1, ask for nearly that).

    Shapes: down (r, d) and up (d, r), both with a bias: 2dr + r + d numbers; h and y (..., d).
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int):
        super().__init__()
        size, like = base_layer.out_features, dict(device=base_layer.weight.device, dtype=base_layer.weight.dtype)
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(size, bottleneck, **like), nn.Linear(bottleneck, size, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base_layer(x)
        return h + self.up(F.gelu(self.down(h)))


def apply_adapters(model: nn.Module, bottleneck: int, kind: str = "houlsby") -> int:
    """Put adapters into every block, in front of its residual sums, and freeze the rest; the model is changed in place.

    Args:
        bottleneck: r, the width of the narrow place.
        kind: "houlsby": two a block, behind attention and behind the MLP. "lin": one, behind the MLP (Pfeiffer's, in a model that
            norms first as a LLaMA does).

    Returns:
        What trains: 2dr + r + d numbers an adapter, d being hidden_size. The papers train the norms as well; here they stay frozen.

    Raises:
        ValueError: a bottleneck under 1, a kind that is neither, a model without such layers, or one that is adapted already.
    """
    refuse_adapted(model)
    if bottleneck < 1:
        raise ValueError(f"bottleneck={bottleneck}: choose a whole number, 1 or more.")
    if kind not in PLACES:
        raise ValueError(f"kind={kind!r}: choose 'houlsby' (two adapters a block) or 'lin' (one).")
    places = [name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PLACES[kind]]
    if not places:
        raise ValueError(f"this {type(model).__name__} has no linear layer called {' or '.join(PLACES[kind])}, and adapters go behind "
                         "these: give a LLaMA.")
    model.requires_grad_(False)
    for name in places:
        put(model, name, BottleneckAdapter(model.get_submodule(name), bottleneck))
    return trainable(model)


def remove_adapters(model: nn.Module) -> None:
    """Take every adapter out again. There is no merging them: what stands between the two small layers is not linear."""
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, BottleneckAdapter)]
    if not adapters:
        raise ValueError("the model has no adapter: call apply_adapters(model, …) first.")
    for name, adapter in adapters:
        put(model, name, adapter.base_layer)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module.train(model.get_submodule(name).training))


# -- prefix and prompt: a longer past ----------------------------------------------------------------------------------

OURS, THEIRS = ("ids", "cache"), ("input_ids", "attention_mask", "position_ids", "past_key_values")     # in the order of forward


class Virtual(nn.Module):
    """P positions in front of every text, so the text's own begin at P; they are gone from the context."""

    length: int              # P
    handles: list            # of the hooks on the model

    def arguments(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[dict, str, int]:
        """What the model was called with, by name; "ids" or "input_ids"; and how many tokens of the text it has read before."""
        ours = hasattr(model, "new_cache")
        given = dict(zip(OURS if ours else THEIRS, args)) | kwargs
        key, cache = ("ids", given.get("cache")) if ours else ("input_ids", given.get("past_key_values"))
        if given.get(key) is None:
            raise ValueError(f"a {type(self).__name__.lower()} stands before token ids, and none were given: call model({key}).")
        seen = 0 if cache is None else cache.length if ours else cache.get_seq_length()
        return given, key, max(seen - self.length, 0)

    def check_room(self, model: nn.Module, tokens: int) -> None:
        limit = model.config.max_position_embeddings
        if self.length + tokens > limit:
            raise ValueError(f"{tokens} tokens do not fit: of a context of {limit} the {type(self).__name__.lower()} leaves "
                             f"{limit - self.length}. Shorten the text.")

    def shift(self, given: dict) -> None:
        """transformers' own arguments, where they are given, learn of the P positions."""
        if given.get("attention_mask") is not None:
            mask = given["attention_mask"]
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.length


class Prefix(Virtual):
    """Trainable keys and values for P positions, which every text finds in its cache: 2 · layers · P · H_kv · D numbers.

    Shapes: keys and values (layers, H_kv, P, D). Keys are stored as the cache holds them, turned to their positions already.
    """

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.cat([pair[i] for pair in pairs]).detach()) for i in (0, 1))
        self.length = self.keys.shape[2]

    def give(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the model reads: a cache that is empty gets the prefix as its past."""
        given, key, past = self.arguments(model, args, kwargs)
        batch, tokens = given[key].shape
        self.check_room(model, past + tokens)
        self.shift(given)
        if not past:
            pairs = [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in zip(self.keys, self.values)]
            name = "cache" if key == "ids" else "past_key_values"
            given[name] = fill(model, given.get(name), pairs)
        return (), given


def fill(model: nn.Module, cache, pairs: list[tuple[torch.Tensor, torch.Tensor]]):
    """The caller's empty cache, or a new one, with these keys and values (B, H_kv, P, D) in it."""
    if hasattr(model, "new_cache"):
        cache = cache or model.new_cache()
        cache.pairs = pairs
        return cache
    from transformers import DynamicCache
    cache = cache if cache is not None else DynamicCache()
    for layer, (k, v) in enumerate(pairs):
        cache.update(k, v, layer)
    return cache


def apply_prefix(model: nn.Module, ids: torch.Tensor) -> int:
    """Prefix tuning: freeze the model and give it trainable keys and values in front of every text, in each layer.

    Args:
        ids: (1, P) tokens. The prefix starts as their own keys and values (Li and Liang, section 7.4: better than a random start), so
            the model begins as one that has just read them.

    Returns:
        What trains: 2 · layers · P · H_kv · D numbers; there is no MLP that makes the prefix, as the paper has for training.

    Raises:
        ValueError: no token, a prefix that fills the whole context, a model that is adapted already.
    """
    check_ids(model, ids, "prefix")
    with torch.no_grad():
        if hasattr(model, "new_cache"):
            model(ids, cache := model.new_cache())
            pairs = cache.pairs
        else:
            pairs = [(layer.keys, layer.values) for layer in model(ids, use_cache=True).past_key_values.layers]
    model.requires_grad_(False)
    model.prefix = Prefix(pairs).train(model.training)
    model.prefix.handles = [model.register_forward_pre_hook(model.prefix.give, with_kwargs=True)]
    return trainable(model)


def remove_prefix(model: nn.Module) -> None:
    """The model without its prefix, and with its whole context."""
    remove_virtual(model, "prefix")


class Prompt(Virtual):
    """Trainable embeddings (P, C) that are read before every text; their outputs are cut off again."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors, self.length = nn.Parameter(vectors.detach()), len(vectors)
        self.tokens = 0          # of the text whose reading has just begun, else 0

    def lengthen(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the model reads: P places in front, whose ids do not matter."""
        given, key, past = self.arguments(model, args, kwargs)
        ids = given[key]
        self.check_room(model, past + ids.shape[1])
        self.shift(given)
        self.tokens = 0 if past else ids.shape[1]
        if not past:
            given[key] = torch.cat([ids.new_zeros(len(ids), self.length), ids], dim=1)
            if given.get("position_ids") is not None:
                places = torch.arange(self.length, device=ids.device).expand(len(given["position_ids"]), -1)
                given["position_ids"] = torch.cat([places, given["position_ids"]], dim=1)
            if given.get("labels") is not None:
                given["labels"] = torch.cat([ids.new_full((len(ids), self.length), -100), given["labels"]], dim=1)
        return (), given

    def speak(self, embedding: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """In place of their embeddings: the trained ones."""
        if not self.tokens:
            return output
        return torch.cat([self.vectors.expand(len(output), -1, -1), output[:, self.length:]], dim=1)

    def cut(self, model: nn.Module, args: tuple, output):
        """After the model has read: only the text's own logits."""
        if self.tokens and hasattr(output, "logits"):
            output.logits = output.logits[:, -self.tokens:]
        elif self.tokens:
            output = output[:, -self.tokens:]
        self.tokens = 0
        return output


def apply_prompt(model: nn.Module, ids: torch.Tensor) -> int:
    """Prompt tuning: freeze the model and let it read P trainable embeddings before every text; P · C numbers.

    Args: `ids`, and what is raised, as in `apply_prefix`; the start is their embeddings (Lester et al., section 2.1.2).
    """
    check_ids(model, ids, "prompt")
    embedding = model.get_submodule("model.embed_tokens")
    model.requires_grad_(False)
    model.prompt = Prompt(embedding(ids)[0]).train(model.training)
    model.prompt.handles = [model.register_forward_pre_hook(model.prompt.lengthen, with_kwargs=True),
                            embedding.register_forward_hook(model.prompt.speak), model.register_forward_hook(model.prompt.cut)]
    return trainable(model)


def remove_prompt(model: nn.Module) -> None:
    """The model without its prompt, and with its whole context."""
    remove_virtual(model, "prompt")


def check_ids(model: nn.Module, ids: torch.Tensor, what: str) -> None:
    refuse_adapted(model)
    if ids.ndim != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(f"ids of shape {tuple(ids.shape)}: a {what} starts from the tokens of one text, (1, P) with P at least 1.")
    limit = model.config.max_position_embeddings
    if ids.shape[1] >= limit:
        raise ValueError(f"a {what} of {ids.shape[1]} leaves no place for a text in a context of {limit}: choose fewer than {limit} "
                         "positions, and as many fewer as the longest text has tokens.")


def remove_virtual(model: nn.Module, what: str) -> None:
    virtual = getattr(model, what, None)
    if not isinstance(virtual, Virtual):
        raise ValueError(f"the model has no {what}: call apply_{what}(model, …) first.")
    for handle in virtual.handles:
        handle.remove()
    delattr(model, what)


# -- biases ------------------------------------------------------------------------------------------------------------

def add_biases(model: nn.Module) -> int:
    """BitFit: freeze the model and train the biases of its linear layers, all but the output head; returns how many numbers train.

    A layer without a bias (LLaMA has none) gets one of zeros, which changes nothing; so here BitFit costs an addition a layer.
    """
    refuse_adapted(model)
    model.requires_grad_(False)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] != "lm_head":
            values = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter(values)
    return trainable(model)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def refuse_adapted(model: nn.Module) -> None:
    """One method at a time: the second would freeze the first."""
    found = [type(module).__name__ for module in model.modules() if isinstance(module, (BottleneckAdapter, Virtual))]
    found += ["LoRA" for name, _ in model.named_parameters() if "lora_" in name]
    if found:
        raise ValueError(f"the model carries a {found[0]} already, and adding another method would freeze it: remove it first.")
