"""What fable can do, a model of transformers can: the same functions on tiny random models, with their tokenizer."""
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_edu import apply_lora, evaluate, fit, load_pretrained, lora_off
from lora_edu.models import bridge
from lora_edu.models.pretrained import FABLE
from lora_edu.models.sampling import generate, stream
from lora_edu.training import bistro
from lora_edu.training.corpora import completions, tales_from, tokenize
from tests.lora.tiny import our_llama

SIZES = dict(vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1)
MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=512)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=16, n_layer=2, n_head=2, n_positions=512)),
    "Qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, max_position_embeddings=512)),      # biases on q, k and v
}
PROMPTS = ["Once upon a time", "A king", "The end of the"]


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.fixture(scope="module")
def theirs():
    return PreTrainedTokenizerFast(tokenizer_file=str(FABLE / "tokenizer.json"), eos_token="<|endoftext|>")


def test_both_tokenizers_say_the_same(theirs):
    ours = load_pretrained()[1]
    for text in ("Once upon a time there was a king.", " 123", "\n=>"):
        assert bridge.encode(ours, text) == bridge.encode(theirs, text) == ours.encode(text).ids
    assert bridge.end_token(ours) == bridge.end_token(theirs) == 0
    assert bridge.vocabulary(ours) == bridge.vocabulary(theirs) == 2048
    assert torch.equal(tokenize(ours, "A king.\n<|endoftext|>\nA queen."),
                       tokenize(theirs, "A king.\n<|endoftext|>\nA queen."))


def test_a_tokenizer_that_puts_a_start_in_front_is_asked_not_to(theirs):
    from tokenizers import processors
    ours = load_pretrained()[1]
    ours.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A",
                                                        special_tokens=[("<|endoftext|>", 0)])
    assert ours.encode("A king").ids[0] == 0 and bridge.encode(ours, "A king")[0] != 0


def test_no_end_token_is_said():
    with pytest.raises(ValueError, match="has no <|endoftext|> token"):
        bridge.end_token(PreTrainedTokenizerFast(tokenizer_file=str(FABLE / "tokenizer.json")))


def test_generation_is_that_of_transformers(model):
    """Oracle: its own `generate`, the likeliest token at every step; and the same without a cache."""
    ids = torch.randint(2048, (2, 7), generator=torch.Generator().manual_seed(1))
    want = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(model, ids, 9, temperature=0), want)
    assert torch.equal(generate(model, ids, 9, temperature=0, use_cache=False), want)
    assert [token.shape for token in stream(model, ids, 3, seed=1)] == [(2,)] * 3


def test_completions_are_each_prompt_alone(model, theirs):
    """Oracle: transformers' `generate` and `decode`, prompt by prompt."""
    want = []
    for prompt in PROMPTS:
        ids = torch.tensor([theirs.encode(prompt)])
        new = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
        want.append(theirs.decode(new, skip_special_tokens=True).strip())
    assert completions(model, theirs, PROMPTS, max_new_tokens=6) == want == completions(model, load_pretrained()[1],
                                                                                        PROMPTS,
                                                                                        max_new_tokens=6)


def test_the_whole_path_to_a_tuned_waiter(model, theirs):
    """Tales of the base, LoRA, training on cards, sentences judged slot by slot."""
    tales = tales_from(model, theirs, n=2, length=12, batch_size=2)
    assert tales[0][0].shape == (2, 12) and evaluate(model, tales) > 0
    heldout, before = bistro.heldout(theirs, 4), None
    before = evaluate(model, heldout)
    apply_lora(model, "all-linear", rank=4)
    steps = fit(model, bistro.batches(theirs, 8, batch_size=4), 8, lr=0.02)
    assert steps[-1].loss < steps[0].loss and evaluate(model, heldout) < before
    with lora_off(model):
        assert evaluate(model, heldout) == pytest.approx(before, rel=1e-5)
    cards = bistro.cards("test", 3)
    texts = bistro.write(model, theirs, cards, max_new_tokens=5)
    assert len(texts) == 3 and 0 <= bistro.slot_accuracy(texts, cards).slots <= 1


def test_a_prompt_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="do not fit a context of 512: ask for at most 2 new tokens"):
        generate(model, torch.zeros(1, 510, dtype=torch.long), 3)


def test_ours_is_read_as_it_is_and_a_stranger_is_refused():
    ours = our_llama()
    assert bridge.reader(ours) is ours
    with pytest.raises(TypeError, match="a Linear cannot write: give the course's Llama, or a causal"):
        generate(torch.nn.Linear(2, 2), torch.zeros(1, 1, dtype=torch.long))
