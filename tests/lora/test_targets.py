"""Which layer is the head: what PEFT leaves out on models of transformers, names and shapes on others."""
import copy
import warnings

import peft
import pytest
import transformers as hf
from torch import nn

from lora_edu import apply_lora
from tests.lora.tiny import our_llama

warnings.filterwarnings("ignore", module="transformers")
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": hf.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **SMALL), "bert": hf.BertConfig(**SMALL),
    "mistral": hf.MistralConfig(num_key_value_heads=2, pad_token_id=0, **SMALL),
    "qwen2": hf.Qwen2Config(num_key_value_heads=2, pad_token_id=0, **SMALL),
    "gpt2": hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0),
    "t5": hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "roberta": hf.RobertaConfig(**SMALL),
    "opt": hf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                        word_embed_proj_dim=32),
    "vit": hf.ViTConfig(image_size=32, patch_size=8, **{k: v for k, v in SMALL.items() if k != "vocab_size"}),
    "gpt_neox": hf.GPTNeoXConfig(**SMALL),
}
CAUSAL = ("llama", "mistral", "qwen2", "gpt2", "opt", "gpt_neox")
CASES = [(kind, hf.AutoModel) for kind in CONFIGS] + [(kind, hf.AutoModelForCausalLM) for kind in CAUSAL] + [
    ("t5", hf.AutoModelForSeq2SeqLM), ("bert", hf.AutoModelForMaskedLM), ("roberta", hf.AutoModelForMaskedLM)]


@pytest.mark.parametrize("kind, auto", CASES, ids=lambda case: getattr(case, "__name__", case))
def test_all_linear_is_what_it_is_in_peft(kind, auto):
    """Oracle: PEFT's own choice on the same model."""
    model = auto.from_config(CONFIGS[kind])
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=1, target_modules="all-linear"))
    want = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    report = apply_lora(model, "all-linear", rank=1)
    assert set(report.matched) == want
    assert report.head == report.left_out and len(report.head) == (0 if auto is hf.AutoModel else 1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_a_classifiers_head_is_left_out_as_in_peft(kind):
    """Oracle: PEFT with the task said to be a classification, where it leaves the head out."""
    model = hf.AutoModelForSequenceClassification.from_config(CONFIGS[kind])
    config = peft.LoraConfig(r=1, target_modules="all-linear", task_type="SEQ_CLS")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    want = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    report = apply_lora(model, "all-linear", rank=1)
    assert set(report.matched) == want and report.head == ["score"]
    assert "Left out as the output head: score." in str(report)


class HeadFirst(nn.Module):
    def __init__(self, name="head"):
        super().__init__()
        setattr(self, name, nn.Linear(16, 3))
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 16)


class Blocks(nn.Module):
    """A transformer of one's own, without a head or with one of any name."""

    def __init__(self, blocks, head=None):
        super().__init__()
        if head:
            setattr(self, head, nn.Linear(16, 50))
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "q": nn.Linear(16, 16), "kv": nn.Linear(16, 20), "up": nn.Linear(16, 40), "down": nn.Linear(40, 16)})
            for _ in range(blocks))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm, self.value = our_llama(tied=False), nn.Linear(16, 1)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm, self.value = hf.LlamaForCausalLM(CONFIGS["llama"]), nn.Linear(32, 1)


@pytest.mark.parametrize("build, want", [
    (HeadFirst, ["head"]), (lambda: HeadFirst("answers"), ["answers"]), (lambda: Blocks(2), []),
    (lambda: Blocks(1), []), (lambda: Blocks(2, "to_words"), ["to_words"]), (our_llama, ["lm_head"]),
    (lambda: Blocks(1, "to_words"), ["to_words"]), (Wrapped, ["lm.lm_head", "value"]),
    (Wrapper, ["lm.lm_head", "value"]),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["1"]),
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))), ["2.1"]),
])
def test_heads_of_other_models(build, want):
    assert apply_lora(build(), "all-linear", rank=1).head == want
