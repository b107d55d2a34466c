"""Questions and answers as batches: against a count by hand, and against the bistro's batches as they always were."""
import random

import pytest
import torch

from lora_edu.models.bridge import ask, encode
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training import bistro
from lora_edu.training.corpora import completions
from lora_edu.training.pairs import collate, row

TEMPLATE = "{% for m in messages %}<u>{{ m.content }}</u>\n{% endfor %}{% if add_generation_prompt %}<a>\n{% endif %}"


@pytest.fixture
def tokenizer():
    return load_pretrained()[1]


def test_the_bistros_batch_by_hand(tokenizer):
    """Oracle: the rows spelled out, as fable has always been taught."""
    pairs = bistro.examples("train", 3, seed=5)
    inputs, targets = bistro.collate(tokenizer, pairs)
    for (card, text), read, wanted in zip(pairs, inputs.tolist(), targets.tolist()):
        before, after = encode(tokenizer, bistro.prompt(card)), encode(tokenizer, " " + text) + [0]
        ids = before + after
        assert read == ids[:-1] + [0] * (len(read) - len(ids) + 1)
        assert wanted == [-100] * (len(before) - 1) + after + [-100] * (len(read) - len(ids) + 1)


def test_a_template_stands_around_the_question_and_the_loss_counts_on_the_answer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert ask(tokenizer, "Who?") == "<u>Who?</u>\n<a>\n"
    ids, before, cut = row(tokenizer, ("Who?", "A king."))
    assert tokenizer.decode(ids[:before], skip_special_tokens=False) == "<u>Who?</u>\n<a>\n" and not cut
    assert tokenizer.decode(ids[before:-1]) == "A king." and ids[-1] == 0
    _, targets = collate(tokenizer, [("Who?", "A king."), ("Who is it that speaks?", "A queen.")])
    assert [tokenizer.decode(line[line != -100].tolist()) for line in targets] == ["A king.", "A queen."]


def test_an_answer_ends_with_the_token_that_the_folder_names(tokenizer):
    tokenizer.eos_token = "!"
    ids, *_ = row(tokenizer, ("Who?", "A king."))
    assert ids[-1] == tokenizer.token_to_id("!") != 0
    assert completions(Says(tokenizer, "A king!And more"), tokenizer, ["Who?"]) == ["A king"]


class Says(torch.nn.Module):
    """Writes one text, whatever it is asked."""

    def __init__(self, tokenizer, text):
        super().__init__()
        self.weight, self.ids = torch.nn.Parameter(torch.zeros(1)), torch.tensor([encode(tokenizer, text)])

    def generate(self, ids, max_new_tokens, **how):
        return torch.cat([ids, self.ids], dim=1)


def test_what_is_too_long_is_cut_and_has_no_end_to_learn(tokenizer):
    ids, before, cut = row(tokenizer, ("Who?", "A king who had three sons and a garden."), longest=12)
    whole, _, _ = row(tokenizer, ("Who?", "A king who had three sons and a garden."))
    assert cut and ids == whole[:12] and ids[-1] != 0 and len(whole) > 12
    assert row(tokenizer, ("Who?", "A king who had three sons and a garden."), longest=len(whole)) == (
        whole, before, False)


def test_plain_text_counts_from_its_first_token_on(tokenizer):
    inputs, targets = collate(tokenizer, [("", "Once upon a time")])
    assert inputs.tolist() == [[0, *encode(tokenizer, "Once upon a time")]]
    assert targets.tolist() == [[*encode(tokenizer, "Once upon a time"), 0]]


def test_a_batch_is_shifted_by_one_wherever_it_counts(tokenizer):
    rng = random.Random(3)
    words = "king queen castle river stone and the of old".split()
    pairs = [(" ".join(rng.choices(words, k=rng.randint(1, 9))), " ".join(rng.choices(words, k=rng.randint(1, 9))))
             for _ in range(20)]
    inputs, targets = collate(tokenizer, pairs)
    counted = targets[:, :-1] != -100
    assert torch.equal(inputs[:, 1:][counted], targets[:, :-1][counted]) and counted.any(dim=1).all()


def test_a_template_may_refuse_a_chat_and_may_ask_for_the_date(tokenizer):
    """As the templates of Mistral and Llama 3 do."""
    tokenizer.chat_template = ("{{ strftime_now('%Y') }}{% if messages[0].content == 'x' %}"
                               "{{ raise_exception('no x') }}{% endif %}")
    assert ask(tokenizer, "Who?").startswith("20")
    with pytest.raises(ValueError, match="the model's chat template takes no such chat: no x"):
        ask(tokenizer, "x")
