"""fable in the page: the whole model in the reader's browser, with the adapter's strength under the finger.

The same module serves a web page, which fetches the weights from an address, and JupyterLab or Colab, where the kernel
sends them. The page's model is `fable_model.js`; a test compares its logits with PyTorch's.
"""
import functools
import json

from lora_edu.course.figures.curves import plot_two_losses
from lora_edu.course.labs.lab import Lab
from lora_edu.files import read_json
from lora_edu.lora.adapter_file import TENSORS, load_adapter
from lora_edu.lora.merge import set_strength
from lora_edu.models.pretrained import BISTRO_ADAPTER, FABLE, load_pretrained
from lora_edu.training import bistro, corpora
from lora_edu.training.loop import evaluate

TALE = "Once upon a time there was a king who"
STRENGTHS = [i / 10 for i in range(13)]


def fable_live(strength: float = 0.0, title: str = "Left a storyteller, right a waiter", address: str | None = None
               ) -> Lab:
    """A dial over the strength of notebook 00's adapter, and fable writing while it is turned, in the page alone.

    Args:
        strength: where the dial starts.
        address: where a web page finds fable's folder; None sends the weights from the kernel, 7.6 MB.
    """
    files = {"weights": FABLE / "model.safetensors", "bistro": BISTRO_ADAPTER / TENSORS}
    where = {name: f"{address}/{file.relative_to(FABLE)}" if address else file.read_bytes()
             for name, file in files.items()}
    card, sentence = bistro.examples("test", 8)[5]
    data = {"title": title, "strengths": STRENGTHS, "losses": curves(), "weights": where["weights"],
            "config": read_json(FABLE / "config.json", "fable's config"),
            "tokenizer": json.loads((FABLE / "tokenizer.json").read_text(encoding="utf-8")),
            "adapters": [{"config": read_json(BISTRO_ADAPTER / "adapter_config.json", "a config"),
                          "tensors": where["bistro"]}],
            "prompts": [[TALE, "a tale"], [bistro.in_words(card), "a card"]], "most": 120,
            "placeholder": "The old wolf …  or  name: Clover | food: Greek | price: cheap",
            "measured": [{"name": "a card's sentence", "prompt": bistro.prompt(card), "text": f" {sentence}"},
                         {"name": "a tale", "prompt": "Once", "text": " upon a time there was a king who had three "
                          "sons, and they went out into the wide world to seek their fortune."}],
            "megabytes": round(sum(file.stat().st_size for file in files.values()) / 1e6, 1)}
    at = min(range(len(STRENGTHS)), key=lambda i: abs(STRENGTHS[i] - strength))
    losses = data["losses"]
    said = f"strength {STRENGTHS[at]:.1f}; " + ", ".join(f"{name} {each[at]:.2f}" for name, each in losses.items())
    return Lab("fable_live", data, {"strength": STRENGTHS[at], "prompt": TALE}, f"{said} nats per token",
               plot_two_losses(STRENGTHS, *losses.values(), title, alpha=STRENGTHS[at]))


@functools.cache
def curves(cards: int = 32, tales: int = 8) -> dict[str, list[float]]:
    """Notebook 00's two losses at every strength, nats per token: restaurants nobody trained on, and fable's own
    tales.
    """
    model, tokenizer = load_pretrained()
    told = corpora.tales_from(model, tokenizer, n=tales, length=128)
    held = bistro.heldout(tokenizer, n=cards, split="test")
    load_adapter(model, BISTRO_ADAPTER)
    found: dict[str, list[float]] = {"restaurants": [], "tales": []}
    for strength in STRENGTHS:
        set_strength(model, strength)
        found["restaurants"].append(round(evaluate(model, held), 4))
        found["tales"].append(round(evaluate(model, told), 4))
    return found
