"""Seven methods by name: what trains, at an equal budget where one can be had, and what is refused."""
import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.rivals.methods import BOTTLENECK, METHODS, POSITIONS, prepare, solved_cards
from lora_edu.training import bistro
from lora_edu.training.corpora import END

COUNTS = {"full": 4 * (4 * 256**2 + 3 * 256 * 688), "lora": 4 * 8 * (4 * 512 + 3 * 944), "prefix": 2 * 4 * 76 * 256,
          "prompt": 76 * 256,
          "adapters (two a block)": 8 * (2 * 256 * 38 + 38 + 256),
          "adapters (one a block)": 4 * (2 * 256 * 76 + 76 + 256),
          "BitFit": 4 * (4 * 256 + 2 * 688 + 256)}


@pytest.fixture(scope="module")
def start():
    return solved_cards(load_pretrained()[1])


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_is_counted_by_hand_and_the_budget_is_equal_where_it_can_be(method, start):
    model = load_pretrained()[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert prepare(model, method, start=start) == COUNTS[method] == sum(p.numel() for p in model.parameters()
                                                                        if p.requires_grad)
    if method not in ("full", "prompt", "BitFit"):
        assert abs(COUNTS[method] - COUNTS["lora"]) < 0.02 * COUNTS["lora"]
    changed = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(changed[name], value) for name, value in before.items()), "nothing has learned yet"
    assert (BOTTLENECK, POSITIONS) == (38, 76)


@pytest.mark.parametrize("method", ["lora", "adapters (two a block)"])
def test_the_seed_decides_what_starts_at_random(method):
    def values(seed):
        model = load_pretrained()[0]
        prepare(model, method, seed=seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])
    assert torch.equal(values(1), values(1)) and not torch.equal(values(1), values(2))


def test_the_start_is_a_text_of_cards_with_their_sentences():
    tokenizer = load_pretrained()[1]
    ids = solved_cards(tokenizer, 200, seed=3)
    record, sentence = bistro.examples("train", 11, 3)[0]
    text = tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)
    assert ids.shape == (1, 200) and text.startswith(f"{bistro.prompt(record)} {sentence}{END}")
    assert text.count(END) >= 2
    assert torch.equal(ids[:, :50], solved_cards(tokenizer, 50, seed=3))
    assert not torch.equal(ids, solved_cards(tokenizer, 200))


@pytest.mark.parametrize("method, sentence", [("prefix", r"a prefix starts from tokens: pass start=solved_cards"),
                                              ("prompt", "a prompt starts from tokens"),
                                              ("LoRA", "method='LoRA': choose one of 'full', 'lora'")])
def test_what_cannot_be_prepared(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(load_pretrained()[0], method)
