"""Files go to PEFT and back, and come from PEFT and go back: the same tensors, the same logits. Oracle: PEFT itself."""
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_edu import apply_lora, load_adapter, remove_lora, save_adapter
from lora_edu.lora import adapter_file
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.inspection import inspect_adapter
from tests.lora.tiny import IDS, gpt2, hf_llama, names, shake

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3)).eval()


def qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                        num_attention_heads=2, num_key_value_heads=1)).eval()


BASES = {"Llama": (hf_llama, ["q_proj", "down_proj"]), "GPT-2": (gpt2, ["c_attn", "mlp.c_proj"]),
         "BERT": (bert, ["query", "value"]), "Qwen2": (qwen, ["q_proj", "v_proj"])}
KINDS = {"plain": {}, "rsLoRA": {"use_rslora": True},
         "patterns": {"rank_pattern": {r"layers?\.0\..*": 3, r"h\.0\..*": 3}, "alpha_pattern": {r".*\.1\..*": 11}}}


def said(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def shake_peft(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def with_whole_modules(base, folder, **how):
    """PEFT's model, saved: factors and whole modules that say something."""
    theirs = get_peft_model(base, LoraConfig(r=2, **how))
    shake_peft(theirs)
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    return theirs


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_peft_to_us_to_peft(base, kind, tmp_path):
    build, targets = BASES[base]
    theirs = get_peft_model(build(), LoraConfig(r=2, lora_alpha=8, target_modules=targets, **KINDS[kind]))
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path / "a")
    ours = build()
    load_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(said(ours), said(theirs), atol=1e-5, rtol=1e-5)
    save_adapter(ours, tmp_path / "b")
    equal(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    again = PeftModel.from_pretrained(build(), tmp_path / "b")
    torch.testing.assert_close(said(again), said(theirs), atol=1e-5, rtol=1e-5)
    assert inspect_adapter(tmp_path / "a").scalings == pytest.approx(
        {name: layer.scaling for name, layer in lora_layers(ours)})


@pytest.mark.parametrize("base", BASES)
def test_us_to_peft_to_us(base, tmp_path):
    build, targets = BASES[base]
    ours = build()
    apply_lora(ours, targets, rank=3, alpha=5, rslora=base == "Qwen2")
    shake(ours)
    save_adapter(ours, tmp_path / "a")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "a")
    torch.testing.assert_close(said(theirs), said(ours), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    equal(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    again = build()
    load_adapter(again, tmp_path / "b")
    assert torch.equal(said(again), said(ours))


@pytest.mark.parametrize("base, whole", [("Llama", ["lm_head"]), ("Llama", ["embed_tokens"]), ("BERT", ["classifier"]),
                                         ("GPT-2", ["wte"])])
def test_modules_that_are_saved_whole_come_back(base, whole, tmp_path):
    build, targets = BASES[base]
    theirs = with_whole_modules(build(), tmp_path, target_modules=targets, modules_to_save=whole)
    ours = build()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(said(ours), said(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_a_tied_embedding_that_was_trained(together, tmp_path):
    """Tied as it was trained, or parted as PEFT parts it: both ways the logits are the same on both sides."""
    theirs = get_peft_model(hf_llama(tied=True), LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=together))
    shake_peft(theirs)
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "a")
    ours = hf_llama(tied=True)
    load_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(said(ours), said(theirs), atol=1e-5, rtol=1e-5)
    mine = hf_llama(tied=True)
    apply_lora(mine, ["q_proj"], rank=2)
    shake(mine)
    mine.model.embed_tokens.requires_grad_(True)
    with torch.no_grad():
        mine.model.embed_tokens.weight.mul_(1.5)
    save_adapter(mine, tmp_path / "b")
    again = PeftModel.from_pretrained(hf_llama(tied=True), tmp_path / "b")
    torch.testing.assert_close(said(again), said(mine), atol=1e-5, rtol=1e-5)


# ways to say where a LoRA goes and how large it is there; the rules of each are PEFT's own
PATTERNS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "query_key_value", "c_attn"]},            # of which a Llama has one
    {"target_modules": ["self_attn.q_proj", "gate_proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj"]},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"model\.layers\.[12]\.self_attn\.v_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": r".*_proj", "exclude_modules": r"model\.layers\.0\..*"},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 5}},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "q_proj": 3}},
    {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {r"^model\.layers\.2.*": 24, "k_proj": 1}},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r".*\.1\..*": 4}, "alpha_pattern": {"proj": 7, "k_.*": 3},
     "use_rslora": True},
    {"target_modules": r".*(q_proj|lm_head)", "modules_to_save": ["lm_head"]},
    {"target_modules": ["down_proj", "lm_head"], "rank_pattern": {"lm_head": 1}, "alpha_pattern": {"lm_head": 9}},
]


@pytest.mark.parametrize("config", PATTERNS, ids=range(len(PATTERNS)))
def test_ways_to_say_where(config, tmp_path):
    """The same layers, scalings and logits as PEFT, from PEFT's file; and once more from ours."""
    theirs = get_peft_model(qwen_untied(), LoraConfig(r=2, lora_alpha=6, **config))
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path / "a")
    ours = qwen_untied()
    load_adapter(ours, tmp_path / "a")
    adapted = {name.removeprefix("base_model.model."): module.scaling["default"]
               for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert {name: layer.scaling for name, layer in lora_layers(ours)} == pytest.approx(adapted)
    torch.testing.assert_close(said(ours), said(theirs), atol=1e-5, rtol=1e-5)
    save_adapter(ours, tmp_path / "b")
    again = PeftModel.from_pretrained(qwen_untied(), tmp_path / "b")
    torch.testing.assert_close(said(again), said(theirs), atol=1e-5, rtol=1e-5)


def qwen_untied():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                        num_attention_heads=2, num_key_value_heads=1,
                                        tie_word_embeddings=False)).eval()


def test_the_names_of_nested_adapters(tmp_path):
    """PEFT keeps an adapter of another name in a folder of that name; and in memory, its name in the tensors'."""
    theirs = get_peft_model(hf_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="waiter")
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json.*folders waiter are such"):
        load_adapter(hf_llama(), tmp_path)
    folder = tmp_path / "waiter"
    ours = hf_llama()
    load_adapter(ours, folder)
    torch.testing.assert_close(said(ours), said(theirs), atol=1e-5, rtol=1e-5)
    as_in_memory = {name.replace(".weight", ".waiter.weight"): t for name, t in tensors(folder).items()}
    save_file(as_in_memory, folder / "adapter_model.safetensors")
    again = hf_llama()
    load_adapter(again, folder)
    assert torch.equal(said(again), said(ours))


@pytest.mark.parametrize("keys, message", [
    ({"exclude_modules": "["}, "no regular expression"), ({"exclude_modules": 3}, "exclude_modules=3"),
    ({"layers_to_transform": [0.5]}, "layers_to_transform"), ({"layers_to_transform": "1"}, "layers_to_transform"),
    ({"layers_pattern": 1}, "layers_pattern=1"), ({"layers_to_transform": [7]}, "have no place")])
def test_what_says_where_and_does_not_fit_is_refused(keys, message, tmp_path):
    model = hf_llama()
    apply_lora(model, ["q_proj"], rank=2)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    plain = hf_llama()
    with pytest.raises(ValueError, match=message):
        load_adapter(plain, tmp_path)
    assert not names(plain)


def real_base(which):
    if "gpt2" in which:         # its own shapes, but for the vocabulary
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32))
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=2048, num_hidden_layers=24,
                                            num_attention_heads=16, intermediate_size=8, max_position_embeddings=32))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["adapter_gpt2_tigrinya_r8", "adapter_open_calm_1b_r1"])
def test_two_adapters_that_people_published(which, tmp_path):
    """On bases of the right shapes: the numbers are PEFT's, and what is saved again is the same tensors."""
    folder = SHARED / which
    if not folder.exists():
        pytest.skip(f"needs the adapter shared/data/{which} beside the project")
    torch.manual_seed(0)
    base = real_base(which)
    ours = base                     # a gigabyte: once, plain again between the two
    load_adapter(ours, folder)
    loaded = said(ours)
    save_adapter(ours, tmp_path, dtype=next(iter(tensors(folder).values())).dtype)
    equal(tensors(folder), tensors(tmp_path))
    remove_lora(ours, merge=False)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(loaded, said(theirs), atol=1e-3, rtol=1e-4)


# -- whole modules: what PEFT's classifiers save, and what it calls them ----------------------------------------------

def distilbert():
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32, num_labels=3)).eval()


def classifying_llama():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_labels=3, pad_token_id=0)).eval()


HEADED = {"BERT": (bert, ["query"], dict(task_type="SEQ_CLS")),
          "Llama": (classifying_llama, ["q_proj"], dict(task_type="SEQ_CLS")),
          "tokens": (bert, ["query"], dict(task_type="TOKEN_CLS")),
          "an ending": (hf_llama, ["q_proj"], dict(modules_to_save=["head"])),
          "norms": (hf_llama, ["q_proj"], dict(modules_to_save=["norm"])),
          "DistilBERT": (distilbert, ["q_lin"], dict(modules_to_save=["classifier"])),
          "embedding": (hf_llama, ["q_proj"], dict(modules_to_save=["embed_tokens"]))}


@pytest.mark.parametrize("name", HEADED)
def test_a_head_is_read_by_pefts_rules_and_goes_on_from_folder_to_folder(name, tmp_path):
    """`task_type` makes PEFT name "classifier" and "score", of which a model has one; and an entry is any ending."""
    build, targets, how = HEADED[name]
    theirs = with_whole_modules(build(), tmp_path / "a", target_modules=targets, **how)
    ours = build()
    load_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(said(ours), said(theirs), atol=1e-5, rtol=1e-5)
    assert any("lora" not in name and p.requires_grad for name, p in ours.named_parameters()), "as the factors do"
    ours.requires_grad_(False)                               # and frozen it is written again all the same
    save_adapter(ours, tmp_path / "b")
    equal(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    again = build()
    load_adapter(again, tmp_path / "b")
    assert torch.equal(said(again), said(ours))
    torch.testing.assert_close(said(PeftModel.from_pretrained(build(), tmp_path / "b")), said(ours), atol=1e-5,
                               rtol=1e-5)


def test_a_head_stays_with_the_next_adapter(tmp_path):
    with_whole_modules(bert(), tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS")
    ours = bert()
    load_adapter(ours, tmp_path / "a")
    remove_lora(ours, merge=False)
    apply_lora(ours, ["value"], rank=2)
    shake(ours)
    save_adapter(ours, tmp_path / "b")
    again = bert()
    load_adapter(again, tmp_path / "b")
    assert torch.equal(said(again), said(ours))


@pytest.mark.parametrize("build, targets, trained", [
    (distilbert, ["q_lin"], ["classifier"]), (lambda: hf_llama().model, ["q_proj"], ["norm"])])
def test_what_an_entry_chooses_beside_is_written_too(build, targets, trained, tmp_path):
    """"norm" chooses input_layernorm as well, in PEFT: without its tensors PEFT raises KeyError."""
    def output(model):
        with torch.no_grad():
            return model.eval()(IDS)[0]
    ours = build()
    apply_lora(ours, targets, rank=2)
    shake(ours)
    for name in trained:
        ours.get_submodule(name).requires_grad_(True)
        nn.init.normal_(ours.get_submodule(name).weight, 1.0, 0.3)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(output(theirs), output(ours), atol=1e-5, rtol=1e-5)
    again = build()
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(ours))


def test_a_whole_module_whose_name_ends_an_adapted_one_is_refused_when_it_is_saved(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 3))
    apply_lora(model, ["0.0", "0.1"], rank=2)
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match="0.1 ends so and has factors. Give the module a name of its own"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def bert_lm():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=2, max_position_embeddings=32)).eval()


@pytest.mark.parametrize("build, targets, whole", [(gpt2, ["c_attn"], ["wte"]), (gpt2, ["c_attn"], ["wte", "lm_head"]),
                                                   (bert_lm, ["query"], ["word_embeddings"])])
def test_together_or_apart_as_peft_has_them(build, targets, whole, tmp_path):
    """`ensure_weight_tying` counts in PEFT only beside an entry embed_tokens or lm_head."""
    theirs = with_whole_modules(build(), tmp_path, target_modules=targets, modules_to_save=whole,
                                ensure_weight_tying=True)
    ours = build()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(said(ours), said(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alone", ["model.embed_tokens", "lm_head"])
def test_one_of_two_tied_tensors_that_nobody_asked_for_is_put_into_both(alone, tmp_path):
    theirs = get_peft_model(hf_llama(tied=True), LoraConfig(r=2, target_modules=["q_proj"]))
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(7)
    save_file(tensors(tmp_path) | {f"base_model.model.{alone}.weight": torch.randn(50, 16)},
              tmp_path / "adapter_model.safetensors")
    ours = hf_llama(tied=True)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(said(ours), said(PeftModel.from_pretrained(hf_llama(tied=True), tmp_path)), atol=1e-5,
                               rtol=1e-5)


def test_a_head_with_a_counter(tmp_path):
    """A batch norm's num_batches_tracked is a whole number."""
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model = build()
    apply_lora(model, ["0"], rank=2)
    shake(model)
    model[1].requires_grad_(True)
    model(torch.randn(6, 8))
    save_adapter(model, tmp_path)
    again = build()
    load_adapter(again, tmp_path)
    x = torch.randn(4, 8)
    assert torch.equal(again(x), model.eval()(x)) and again[1].num_batches_tracked == 1


@pytest.mark.parametrize("change", [lambda t: t.to(torch.float8_e4m3fn), lambda t: t.double()])
def test_factors_in_other_floating_types(change, tmp_path):
    theirs = get_peft_model(hf_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    shake_peft(theirs)
    theirs.save_pretrained(tmp_path)
    save_file({name: change(t) for name, t in tensors(tmp_path).items()}, tmp_path / "adapter_model.safetensors")
    ours = hf_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(said(ours), said(PeftModel.from_pretrained(hf_llama(), tmp_path)), atol=1e-5, rtol=1e-5)


def test_a_layer_with_a_negative_alpha_of_its_own(tmp_path):
    model = hf_llama()
    apply_lora(model, ["q_proj"], rank=2)
    shake(model)
    next(layer for _, layer in lora_layers(model)).set_strength(-1)
    save_adapter(model, tmp_path)
    again = hf_llama()
    load_adapter(again, tmp_path)
    assert torch.equal(said(again), said(model))
    torch.testing.assert_close(said(PeftModel.from_pretrained(hf_llama(), tmp_path)), said(model), atol=1e-5, rtol=1e-5)


# -- an adapter on disk that is odd ------------------------------------------------------------------------------------

def odd_folder(folder, config=(), **changes):
    """Rank 2 on q_proj of two layers; `changes`: what becomes of a factor of the first ("A", "B"), None: it is left
    out.
    """
    theirs = get_peft_model(hf_llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    shake_peft(theirs)
    theirs.save_pretrained(folder)
    found = tensors(folder)
    for end, change in changes.items():
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{end}.weight"
        found[name] = change(found[name]).contiguous() if change else None
    save_file({name: t for name, t in found.items() if t is not None}, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(config)))
    return folder


@pytest.mark.parametrize("how, note", [
    (dict(B=None), "layers.0.self_attn.q_proj: no pair of a lora_A and a lora_B"),
    (dict(A=None), "q_proj.lora_B.weight: no pair of a lora_A and a lora_B"),
    (dict(A=lambda t: t * torch.nan), "q_proj.lora_A.weight hold numbers that are not finite"),
    (dict(A=lambda t: t.to(torch.int8)), "q_proj.lora_A.weight hold no floating numbers"),
    (dict(A=lambda t: t[:1]), "gives model.layers.0.self_attn.q_proj another rank than the file has"),
    (dict(A=lambda t: t[:0], B=lambda t: t[:, :0]), "another rank than the file has"),
    (dict(A=lambda t: t.sum()), "another rank than the file has")])
def test_what_is_odd_is_noted_and_nothing_else_is_said_of_it(how, note, tmp_path):
    facts = inspect_adapter(odd_folder(tmp_path, **how))
    said = "\n".join(facts.notes)
    assert note in said and "exactly zero" not in said and str(facts)
    good = facts.norms["model.layers.1.self_attn.q_proj"]
    A, B = (tensors(tmp_path)[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{end}.weight"] for end in "AB")
    assert good == pytest.approx((2 * B @ A).norm().item(), rel=1e-5)


@pytest.mark.parametrize("config, scaling", [
    ({"lora_alpha": -8}, -4), ({"use_dora": True, "alpha_pattern": {"q_proj": 100}}, 50),
    ({"use_dora": True, "lora_alpha": 0}, 0)])
def test_scalings_are_the_configs_and_a_size_has_no_sign(config, scaling, tmp_path):
    facts = inspect_adapter(odd_folder(tmp_path, config))
    assert set(facts.scalings.values()) == {scaling} and min(facts.norms.values()) >= 0


@pytest.mark.parametrize("config", [{"lora_alpha": ["x"]}, {"lora_alpha": 10**400}, {"r": 10**20}, {"r": "2"},
                                    {"rank_pattern": {"q_proj": 10**20}}])
def test_a_config_with_impossible_numbers(config, tmp_path):
    folder, model = odd_folder(tmp_path, config), hf_llama()
    with pytest.raises(ValueError, match="adapter_config.json has|is no regular expression"):
        load_adapter(model, folder)
    assert "It is not loaded here" in "\n".join(inspect_adapter(folder).notes) and not names(model)


def test_a_file_where_the_folder_should_be(tmp_path):
    model = hf_llama()
    apply_lora(model, ["q_proj"], rank=2)
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file, and an adapter is a folder"):
        save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        inspect_adapter(tmp_path)


def test_stopped_while_it_loads_a_tied_head_nothing_has_moved(tmp_path, monkeypatch):
    theirs = get_peft_model(hf_llama(tied=True), LoraConfig(r=2, target_modules=["q_proj"],
                                                            modules_to_save=["embed_tokens"]))
    theirs.save_pretrained(tmp_path)
    model = hf_llama(tied=True)
    before, parts = said(model), list(model.named_parameters())

    def stopped(tensors, places):
        raise KeyboardInterrupt
    monkeypatch.setattr(adapter_file, "copy_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tmp_path)
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parts, strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(said(model), before)
