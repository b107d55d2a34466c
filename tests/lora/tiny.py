"""What the tests of lora/ share: our Llama, transformers' Llama and GPT-2, all tiny, and what they say."""
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_edu import LoRALinear
from lora_edu.models import llama


def our_llama(tied=True, vocab_size=50, positions=32, layers=2, kv_heads=1):
    torch.manual_seed(0)
    return llama.Llama(llama.LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=24,
                                         num_hidden_layers=layers,
                                         num_attention_heads=2, num_key_value_heads=kv_heads,
                                         max_position_embeddings=positions,
                                         tie_word_embeddings=tied))


def hf_llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=2,
                                        num_key_value_heads=1, tie_word_embeddings=tied))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


MODELS = {"ours": our_llama, "transformers' Llama": hf_llama, "GPT-2": gpt2}
IDS = torch.arange(10).view(2, 5)


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def shake(model):
    """Give every B something to say."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)


def names(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
