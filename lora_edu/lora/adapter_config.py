"""What adapter_config.json may say of a LoRA, and what it does say of ours.

A key is read, or is known to leave the numbers alone, or is refused by name as soon as it is set to something: a config
that asks for more than is computed here must not load in silence.

Source: PEFT 0.21, `LoraConfig`.
"""
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lora_edu.files import read_json
from lora_edu.lora.layer import LoRALinear, is_conv1d
from lora_edu.lora.settings import scaling_of
from lora_edu.numbers import real, whole

CONFIG = "adapter_config.json"


def _texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _text_or_texts(value) -> bool:
    return value is None or isinstance(value, str) or _texts(value)


def _indices(value) -> bool:
    several = value if isinstance(value, list) else [value]
    return value is None or all(whole(n) is not None and n >= 0 for n in several)


def _rank(value) -> bool:
    return whole(value) is not None and 0 < value < 2**31


def _pattern(fits):
    return lambda value: isinstance(value, dict) and all(fits(v) for v in value.values())


# key -> (what it is where it is left out, does a value fit, what fits)
READ = {
    "r": (8, _rank, "a whole number from 1"),
    "lora_alpha": (8, lambda v: real(v) is not None, "a finite number"),
    "use_rslora": (False, lambda v: isinstance(v, bool), "true or false"),
    "lora_dropout": (0.0, lambda v: real(v) is not None and 0 <= v < 1, "a share, 0 or more and under 1"),
    "target_modules": (None, lambda v: isinstance(v, str) or (_texts(v) and v), "names of layers, or one expression"),
    "rank_pattern": ({}, _pattern(_rank), "ranks by the names of layers"),
    "alpha_pattern": ({}, _pattern(lambda v: real(v) is not None), "alphas by the names of layers"),
    "modules_to_save": ([], _texts, "names of modules"),
    "ensure_weight_tying": (False, lambda v: isinstance(v, bool), "true or false"),
    "exclude_modules": (None, _text_or_texts, "names of layers, or one expression"),
    "layers_to_transform": (None, _indices, "a layer's number, or several"),
    "layers_pattern": (None, _text_or_texts, "the name of the list of layers, or several"),
}
# starts that leave the base alone; of the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) the base on disk is not the base
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# of these no value changes what the model computes
HARMLESS = {"task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
            "fan_in_fan_out", "eva_config", "megatron_core", "qalora_group_size", "runtime_config",
            "peft_type", "init_lora_weights", "bias", *READ}


def read_config(folder: Path) -> dict:
    """The keys of `READ` from a folder's adapter_config.json, each of its type.

    Raises:
        ValueError: no settings, a value that does not fit its key, or a key that asks for more than plain LoRA.
    """
    file = folder / CONFIG
    said = read_json(file, "an adapter_config.json that PEFT wrote")
    asked = [f"{key}={value!r}" for key, value in said.items() if key not in HARMLESS and value not in (None, False)
             and value != {} and value != [] and value != ""]
    asked += [f"{key}={said[key]!r}" for key, plain in (("init_lora_weights", STARTS), ("bias", (None, "none")))
              if said.get(key) not in plain]
    if said.get("peft_type") != "LORA":
        asked.insert(0, f"peft_type={said.get('peft_type')!r}")
    if asked:
        raise ValueError(f"{file} asks for {', '.join(text[:80] for text in asked)}: only plain LoRA is read here; "
                         "load it with PEFT.")
    config = {}
    for key, (default, fits, what) in READ.items():
        # an empty pattern, or no module: PEFT writes null
        value = default if key not in said or (said[key] is None and isinstance(default, (dict, list))) else said[key]
        if isinstance(value, float) and key == "r" and value.is_integer():
            value = int(value)
        if not fits(value):
            raise ValueError(f"{file} has {key}={value!r}, and {what} fits there: mend it, or fetch the adapter again.")
        config[key] = value
    return config


def left_out(config: Mapping, name: str) -> bool:
    """Is a layer that `target_modules` matches left out all the same, by PEFT's rules (0.21)? Excluded by name, part
    of a module that is saved whole, or in a layer of another number; numbers count for a list of targets only.

    >>> only = {"exclude_modules": None, "modules_to_save": [], "target_modules": ["q"], "layers_to_transform": [1]}
    >>> [left_out(only | {"layers_pattern": None}, f"model.layers.{i}.q") for i in (0, 1)]
    [True, False]
    """
    excluded = config["exclude_modules"] or []
    if (re.fullmatch(excluded, name) if isinstance(excluded, str)
            else any(("." + name).endswith("." + entry) for entry in excluded)):
        return True
    if any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config["modules_to_save"]):
        return True
    wanted, targets = config["layers_to_transform"], config["target_modules"]
    if wanted in (None, []) or isinstance(targets, str) or name in targets:
        return False
    pattern = config["layers_pattern"] or []
    lists = [r".*?\.[^.]*"] if not pattern else [rf"(?:^|.*?\.){one}" for one in
                                                 ([pattern] if isinstance(pattern, str) else pattern)]
    found = next(filter(None, (re.match(rf"{one}\.(\d+)\.", name) for one in lists)), None)
    return found is None or int(found[1]) not in (wanted if isinstance(wanted, list) else [wanted])


def for_layer(config: Mapping, name: str) -> dict:
    """rank, alpha, dropout and rslora of the layer of this name, by PEFT's rule for patterns: the first that matches an
    ending.

    >>> config = {"r": 8, "lora_alpha": 16, "use_rslora": False, "lora_dropout": 0.0, "rank_pattern": {"q_proj": 4}}
    >>> for_layer(config | {"alpha_pattern": {}}, "layers.0.q_proj")
    {'rank': 4, 'alpha': 16, 'dropout': 0.0, 'rslora': False}
    """
    def pick(pattern: dict, default):
        try:
            return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
        except re.error as error:
            raise ValueError(f"a pattern of the config is no regular expression ({error}): "
                             f"{', '.join(map(repr, pattern))}.") from None
    return {"rank": pick(config["rank_pattern"], config["r"]),
            "alpha": pick(config["alpha_pattern"], config["lora_alpha"]),
            "dropout": config["lora_dropout"], "rslora": config["use_rslora"]}


def config_of(layers: Mapping[str, LoRALinear]) -> dict:
    """The keys that make PEFT compute what these layers compute now: ranks and alphas of their own in patterns, a
    strength or a scaling that was set by hand folded into alpha.
    """
    rslora = all(layer.rslora for layer in layers.values())
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _alpha(layer, rslora) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(layers.values()))
    return {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "lora_dropout": first.dropout,
            "fan_in_fan_out": is_conv1d(first.base_layer), "rank_pattern": patterns(ranks, rank),
            "alpha_pattern": patterns(alphas, alpha)}


def _alpha(layer: LoRALinear, rslora: bool) -> float:
    if layer.scaling == scaling_of(layer.rank, layer.alpha, rslora):
        return layer.alpha
    return layer.scaling / scaling_of(layer.rank, 1, rslora)


def patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Whole names, as expressions, of the layers whose value is not the usual one, and of those that end in such a
    name, which would be taken for it; longer names first, since the first that matches counts.

    >>> patterns({"q": 4, "b.q": 8, "b.k": 8}, usual=8)
    {'b\\\\.q': 8, 'q': 4}
    """
    unusual = [name for name, value in values.items() if value != usual]
    told = [name for name in values if any(("." + name).endswith("." + other) for other in unusual)]
    return {re.escape(name): values[name] for name in sorted(told, key=len, reverse=True)}
