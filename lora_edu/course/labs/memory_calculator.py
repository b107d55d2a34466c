"""The memory calculator: choose a model, a method and a batch, and see the bill and the cards it fits on.

The page computes the bill itself, from the sizes of the presets and the bytes of the recipes: `memory_calculator.js`
repeats `lora_edu/measure/memory.py`, and a test compares the two.
"""
from lora_edu.course.figures.memory import CARDS, GB, LOOKS, fits_on, plot_bills
from lora_edu.course.labs.lab import Lab
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.measure.memory import OPTIMIZERS, RECIPES, Bill, bill
from lora_edu.models.sizes import PRESETS, Sizes
from lora_edu.numbers import bytes_in_words

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64)
TARGETS = {"llama": {"all linear layers": "all-linear", "queries and values": PLACEMENTS["Q, V"],
                     "attention": PLACEMENTS["Q, K, V, O"]},
           "gpt2": {"all linear layers": "all-linear", "attention": ("attn.c_attn", "attn.c_proj")}}
BEGIN = {"method": "lora", "rank": 8, "targets": "all linear layers", "recipe": "bf16-mixed", "optimizer": "adam",
         "batch": 1, "length": 2048, "checkpointing": False}


def memory_calculator(model: str = "llama-3.1-8b", card: int = 24) -> Lab:
    """Controls above one stacked bar, or two; the text gives every part, the cards that have room, and the largest
    batch that fits a card of so many GB.
    """
    if model not in PRESETS:
        raise ValueError(f"model={model!r}: choose one of {', '.join(PRESETS)}.")
    setting = BEGIN | {"model": model, "length": min(BEGIN["length"], PRESETS[model].context)}
    data = {"title": "memory calculator", "models": {name: of_a_model(sizes) for name, sizes in PRESETS.items()},
            "rules": {"recipes": {name: list(recipe) for name, recipe in RECIPES.items()},
                      "optimizers": {name: list(states) for name, states in OPTIMIZERS.items()}},
            "ranks": RANKS, "lengths": LENGTHS, "batches": BATCHES, "targets": list(TARGETS["llama"]),
            "parts": list(LOOKS), "cards": list(CARDS.items())}
    said = bill_of(setting)
    return Lab("memory_calculator", data, setting | {"card": card, "pinned": None}, in_words(said),
               plot_bills({"": said}, f"{model}: {bytes_in_words(said.total)}"))


def of_a_model(sizes: Sizes) -> dict:
    """What the page's formula needs to know of a model; `targets` are the names of the matrices of a block."""
    return {"kind": sizes.kind, "vocab": sizes.vocab, "hidden": sizes.hidden, "wide": sizes.wide, "heads": sizes.heads,
            "layers": sizes.layers, "head_dim": sizes.head_dim, "context": sizes.context, "linear": sizes.linear(),
            "parameters": sizes.parameters(),
            "matrices": {name: list(shape) for name, shape in sizes.matrices().items()},
            "targets": {name: list(sizes.adapted(chosen, 1)) for name, chosen in TARGETS[sizes.kind].items()}}


def bill_of(setting: dict) -> Bill:
    """The bill of what the controls say."""
    how = {name: setting[name] for name in BEGIN}
    return bill(setting["model"], **how | {"targets": TARGETS[PRESETS[setting["model"]].kind][setting["targets"]]})


def in_words(said: Bill) -> str:
    parts = ", ".join(f"{name} {bytes_in_words(value)}" for name, value in said.parts.items() if value)
    room = [f"{card} ({CARDS[card]} GB)" for card in fits_on(said.total)]
    return (f"{said.summary()}\n{parts}; total {bytes_in_words(said.total)} = {said.total:,.0f} bytes\n"
            + (f"fits on: {', '.join(room)}" if room else
               f"fits on none of these cards: {said.total / (80 * GB):.1f} times an 80 GB card"))
