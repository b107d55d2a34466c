"""Sums of adapters. Oracles: the dense matrices added in float64, and PEFT's add_weighted_adapter."""
import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_edu import apply_lora, load_adapter, save_adapter
from lora_edu.lora.combine import combine_adapters
from lora_edu.lora.factors import lora_layers
from tests.lora.tiny import gpt2, hf_llama, logits, our_llama

KINDS = [dict(target_modules=["q_proj", "v_proj"], rank=2, alpha=4), dict(target_modules=["q_proj", "up_proj"], rank=3),
         dict(target_modules=["q_proj"], rank=4, rslora=True)]


def saved(tmp_path, kinds=KINDS, build=our_llama):
    folders, updates = [], []
    for i, how in enumerate(kinds):
        model = build()
        torch.manual_seed(i)
        apply_lora(model, **how)
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        save_adapter(model, tmp_path / str(i))
        folders.append(tmp_path / str(i))
        updates.append({name: layer.delta_weight().detach().double() for name, layer in lora_layers(model)})
    return folders, updates


def deltas_of(folder, build=our_llama):
    model = build()
    load_adapter(model, folder)
    return {name: layer.delta_weight().detach().double() for name, layer in lora_layers(model)}


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.25, 0.25), (1, -1, 0), (-2, 0.3, 1)])
def test_the_exact_sum_is_the_sum_of_the_dense_updates(weights, tmp_path):
    folders, updates = saved(tmp_path)
    report = combine_adapters(folders, weights, tmp_path / "sum")
    found = deltas_of(tmp_path / "sum")
    assert report.total_lost == 0 and max(report.ranks.values()) == 9
    for name in {name for each in updates for name in each}:
        wanted = sum(w * each[name] for w, each in zip(weights, updates) if name in each)
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("extra, named", [({}, True), ({"exclude_modules": ["k_proj"]}, False),
                                          ({"layers_to_transform": [0, 1]}, False)])
def test_targets_are_named_as_the_parts_name_them_where_all_do_so_plainly(extra, named, tmp_path):
    folders, _ = saved(tmp_path, [KINDS[0], KINDS[0]])
    file = folders[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    report = combine_adapters(folders, (1, 1), tmp_path / "sum")
    targets = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["target_modules"]
    assert targets == (["q_proj", "v_proj"] if named else "|".join(map(re.escape, report.ranks)))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_cut_back_it_is_the_best_of_that_rank_and_says_what_it_lost(rank, tmp_path):
    """Oracle: the dense sum's own SVD in float64."""
    folders, updates = saved(tmp_path)
    report = combine_adapters(folders, (1, 1, 1), tmp_path / "sum", rank=rank)
    found, missed, whole = deltas_of(tmp_path / "sum"), 0.0, 0.0
    for name in found:
        dense = sum(each[name] for each in updates if name in each)
        U, S, Vh = torch.linalg.svd(dense)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(found[name], best, atol=1e-5, rtol=1e-4)
        lost = ((dense - best).norm() / dense.norm()).item()
        assert report.lost[name] == pytest.approx(lost, abs=1e-5)
        missed, whole = missed + (dense - best).square().sum(), whole + dense.square().sum()
    assert report.total_lost == pytest.approx((missed / whole).sqrt().item(), abs=1e-5)


def peft_deltas(model, name):
    return {key.removeprefix("base_model.model."): module.get_delta_weight(name).detach().double()
            for key, module in model.named_modules() if hasattr(module, "get_delta_weight") and name in module.lora_A}


@pytest.mark.parametrize("build", [hf_llama, gpt2])
def test_the_same_as_pefts_cat_and_svd_and_not_its_linear(build, tmp_path):
    """And its "linear" adds the factors: on random adapters it is off by about the whole sum."""
    targets = ["c_attn"] if build is gpt2 else ["q_proj", "v_proj"]
    kinds = [dict(target_modules=targets, rank=3, alpha=6), dict(target_modules=targets, rank=3, alpha=3)]
    folders, updates = saved(tmp_path, kinds, build)
    theirs = get_peft_model(build(), LoraConfig(r=3, lora_alpha=6, target_modules=targets), adapter_name="a")
    theirs.load_adapter(tmp_path / "0", "one")
    theirs.load_adapter(tmp_path / "1", "two")
    for kind, more in (("cat", {}), ("svd", {"svd_rank": 3}), ("linear", {})):
        theirs.add_weighted_adapter(["one", "two"], [0.7, 0.4], kind, combination_type=kind, **more)
    combine_adapters(folders, [0.7, 0.4], tmp_path / "cat")
    combine_adapters(folders, [0.7, 0.4], tmp_path / "svd", rank=3)
    for kind in ("cat", "svd"):
        found, wanted = deltas_of(tmp_path / kind, build), peft_deltas(theirs, kind)
        for name in found:
            torch.testing.assert_close(found[name], wanted[name].T if build is gpt2 else wanted[name], atol=2e-5,
                                       rtol=1e-4)
    exact, linear = peft_deltas(theirs, "cat"), peft_deltas(theirs, "linear")
    off = [((linear[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact]
    assert 0.5 < sum(off) / len(off) < 1.5


def test_names_that_all_adapters_gave_are_kept_and_the_file_is_the_base_s(tmp_path):
    folders, _ = saved(tmp_path, [KINDS[0], KINDS[0]])
    combine_adapters(folders, [1, 1], tmp_path / "sum")
    assert '"q_proj",\n    "v_proj"' in (tmp_path / "sum" / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match="made for another base"):
        load_adapter(our_llama(vocab_size=51), tmp_path / "sum")


def refused(tmp_path, folders, weights, message, error=ValueError, **how):
    with pytest.raises(error, match=message):
        combine_adapters(folders, weights, tmp_path / "new", **how)
    assert not (tmp_path / "new").exists()


def test_what_does_not_add_is_refused(tmp_path):
    folders, _ = saved(tmp_path)
    refused(tmp_path, folders, [1, 1], "one finite number for each")
    refused(tmp_path, [], [], "one finite number for each")
    refused(tmp_path, folders, [1, 1, float("nan")], "one finite number for each")
    refused(tmp_path, folders, [1, 1, 1], "no rank", rank=0)
    torch.manual_seed(5)
    other = our_llama(vocab_size=51)
    apply_lora(other, ["q_proj"], rank=2)
    save_adapter(other, tmp_path / "other")
    refused(tmp_path, [folders[0], tmp_path / "other"], [1, 1], "different bases")
    headed = our_llama(tied=False)
    apply_lora(headed, ["q_proj"], rank=2)
    headed.lm_head.requires_grad_(True)
    save_adapter(headed, tmp_path / "headed")
    refused(tmp_path, [tmp_path / "headed"], [1], "brings lm_head.weight, and only updates of linear")
    with pytest.raises(FileExistsError, match="no empty folder"):
        combine_adapters(folders, [1, 1, 1], folders[0])


def test_taken_away_from_itself_nothing_is_left(tmp_path):
    folders, _ = saved(tmp_path)
    combine_adapters([folders[0]] * 2, [1, -1], tmp_path / "none")
    model = our_llama()
    base = logits(model.eval())
    load_adapter(model, tmp_path / "none")
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)
    combine_adapters([folders[0]] * 2, [1, -1], tmp_path / "cut", rank=2)
    assert all(t.isfinite().all() for t in load_file(tmp_path / "cut" / "adapter_model.safetensors").values())


def test_more_than_factors_of_linear_layers_is_refused(tmp_path):
    """PEFT's LoRA on an embedding, a factor without its other, a bias of the factors: left out, the sum would be less
    than was said.
    """
    torch.manual_seed(0)
    theirs = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn", "wte"]))
    theirs.save_pretrained(tmp_path / "embedding")
    refused(tmp_path, [tmp_path / "embedding"], [1], "wte.lora_embedding_A.* only updates of linear layers")
    folders, _ = saved(tmp_path)
    file = folders[0] / "adapter_model.safetensors"
    stored = load_file(file)
    first = next(name for name in stored if ".lora_A." in name)
    for change in ({first: None}, {first.replace("lora_A.weight", "lora_B.bias"): torch.ones(16)}):
        save_file({name: t for name, t in (stored | change).items() if t is not None}, file)
        refused(tmp_path, folders[:1], [1], "only updates of linear layers")
    save_file({name: t for name, t in stored.items() if name != first.replace("_A", "_B")}, file)
    refused(tmp_path, folders[:1], [1], "do not fit each other")
    save_file(stored | {first: stored[first][0]}, file)
    refused(tmp_path, folders[:1], [1], "do not fit each other")
    save_file({"x.weight": torch.ones(2, 2)}, file)
    refused(tmp_path, folders[:1], [1], "only updates of linear layers")


def test_targets_that_only_a_whole_name_tells(tmp_path):
    """Two modules whose names end alike, one of them adapted: the sum goes where its part went."""
    def build():
        torch.manual_seed(0)
        layer = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        return nn.ModuleDict({"model": layer, "vision": nn.ModuleDict({"model": copy.deepcopy(layer)}),
                              "norm": nn.LayerNorm(8)})
    model = build()
    apply_lora(model, r"model\.q_proj", rank=2)
    save_adapter(model, tmp_path / "one")
    combine_adapters([tmp_path / "one"], [1], tmp_path / "sum")
    again = build()
    load_adapter(again, tmp_path / "sum")
    assert [name for name, _ in lora_layers(again)] == ["model.q_proj"]


def test_the_base_of_a_sum(tmp_path):
    """Loaded in another type it is the same base; and of a base that a part does not tell nothing is claimed."""
    def build():
        torch.manual_seed(0)
        return our_llama(vocab_size=3000)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = build().to(dtype)
        apply_lora(model, ["q_proj"], rank=2)
        save_adapter(model, tmp_path / str(dtype))
    parts = [tmp_path / str(dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16)]
    combine_adapters(parts, [1, 1, 1], tmp_path / "sum")
    assert not load_adapter(build(), tmp_path / "sum").note
    file = parts[1] / "adapter_model.safetensors"
    save_file(load_file(file), file)                                         # the fingerprint is gone
    combine_adapters(parts, [1, 1, 1], tmp_path / "unknown")
    assert "no fingerprint" in load_adapter(build(), tmp_path / "unknown").note
