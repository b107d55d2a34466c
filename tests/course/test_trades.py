"""Two more trades: cards that no split shares, sentences that say the card, and the adapters that came of them."""
import re

import pytest

from lora_edu import evaluate, load_adapter, load_pretrained
from lora_edu.course.records.stored import load_record
from lora_edu.course.trades import SHIPPED, TRADES
from lora_edu.lora.inspection import inspect_adapter


@pytest.mark.parametrize("trade", TRADES.values(), ids=TRADES)
def test_every_slot_is_said_and_nothing_else(trade):
    for card, text in trade.pairs("test", 200) + trade.pairs("train", 200):
        given = dict(part.split(": ") for part in card.split(" | "))
        for slot, values in trade.slots.items():
            said = {value for value, phrases in values.items()
                    if any(re.search(rf"\b{re.escape(p.rstrip('.!'))}\b", text) for p in phrases)}
            assert given.get(slot) in said if slot in given else not said, (card, text)
        assert re.fullmatch(r"[A-Z].*[.!]", text) and "  " not in text and " ." not in text and ",." not in text


@pytest.mark.parametrize("trade", TRADES.values(), ids=TRADES)
def test_a_card_is_in_one_split_and_a_seed_says_all(trade):
    train, test = ({card for card, _ in trade.pairs(split, 2000)} for split in ("train", "test"))
    assert not train & test and len(test) > 150
    assert trade.pairs("train", 20, seed=3) == trade.pairs("train", 20, seed=3) != trade.pairs("train", 20, seed=4)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_adapter_has_its_trade_and_its_size(name):
    """245 kB each; the record's loss, measured again on a part of its cards."""
    model, tokenizer = load_pretrained()
    load_adapter(model, SHIPPED[name])
    facts = inspect_adapter(SHIPPED[name])
    assert facts.file_bytes == 244_944 and set(facts.ranks.values()) == {6}
    if name in TRADES:
        stored = load_record("trade_adapters")["trades"][name]
        assert evaluate(model, TRADES[name].heldout(tokenizer, 50)) == pytest.approx(stored["test"], abs=0.03)
        assert stored["before"] > 4 and stored["bytes"] == facts.file_bytes


def test_the_mixer_s_record_is_the_exact_sum():
    """A point of the grid again: the record's losses, by another way to the sum (each update added to the weights)."""
    record = load_record("adapter_mixer")
    weights = [0.5, 0.25, 0.0]
    point = next(run for run in record["runs"] if run["weights"] == weights)
    model, tokenizer = load_pretrained()
    for (name, folder), weight in zip(SHIPPED.items(), weights):
        other, _ = load_pretrained()
        load_adapter(other, folder)
        for key, module in other.named_modules():
            if hasattr(module, "delta_weight"):
                model.get_submodule(key).weight.data += weight * module.delta_weight().detach()
    assert evaluate(model, TRADES["herald"].heldout(tokenizer, 64)) == pytest.approx(point["herald"], abs=2e-3)
    assert len(record["runs"]) == 125 and record["settings"]["adapters"] == list(SHIPPED)
