"""Adapters in other programs' layouts. Oracles: loralib's own layers, and for the others the dense formula and PEFT."""
import json

import loralib
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lora_edu import cli, load_adapter
from lora_edu.checkpoints.convert import convert_adapter
from lora_edu.lora.factors import lora_layers
from lora_edu.models.pretrained import FABLE
from tests.lora.tiny import IDS, gpt2, hf_llama, our_llama

TARGETS = ("q_proj", "v_proj")


def modules():
    """Name -> (out, in) of the layers that the test adapters go on."""
    return {name: tuple(module.weight.shape) for name, module in hf_llama().named_modules()
            if name.endswith(TARGETS)}


def factors(rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator))
            for name, (out, into) in modules().items()}


def flat(name):
    return name.replace(".", "_")


LAYOUTS = {     # how each program calls them: pairs of names and tensors, for one module
    "loralib": lambda name, A, B: {f"{name}.lora_A": A, f"{name}.lora_B": B},
    "MLX": lambda name, A, B: {f"{name}.lora_a": A.T.contiguous(), f"{name}.lora_b": B.T.contiguous()},
    "kohya": lambda name, A, B: {f"lora_te_{flat(name)}.lora_down.weight": A,
                                 f"lora_te_{flat(name)}.lora_up.weight": B},
    "kohya, 1 x 1": lambda name, A, B: {f"lora_unet_{flat(name)}.lora_down.weight": A[..., None, None],
                                        f"lora_unet_{flat(name)}.lora_up.weight": B[..., None, None]},
    "diffusers": lambda name, A, B: {f"text_encoder.{name}.lora.down.weight": A,
                                     f"text_encoder.{name}.lora.up.weight": B},
    "old diffusers": lambda name, A, B: {f"{name}_lora.down.weight": A, f"{name}_lora.up.weight": B},
    "diffusers' encoder": lambda name, A, B: {f"text_encoder.{name}.lora_linear_layer.down.weight": A,
                                              f"text_encoder.{name}.lora_linear_layer.up.weight": B},
    "PEFT, without prefix": lambda name, A, B: {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B},
    "without model.": lambda name, A, B: {f"{name.removeprefix('model.')}.lora_A": A,
                                          f"{name.removeprefix('model.')}.lora_B": B},
}


def dense(pairs, scaling):
    model = hf_llama().eval()
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            model.get_submodule(name).weight += scaling * B @ A
        return model(IDS).logits


def said(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("end", [".safetensors", ".pt"])
def test_every_layout_computes_the_dense_formula(layout, end, tmp_path):
    pairs, file = factors(), tmp_path / f"lora{end}"
    tensors = {key: t for name, (A, B) in pairs.items() for key, t in LAYOUTS[layout](name, A, B).items()}
    (save_file if end == ".safetensors" else torch.save)(tensors, file)
    report = convert_adapter(file, hf_llama(), tmp_path / "peft", alpha=6)
    assert len(report.pairs) == len(pairs)
    ours = hf_llama()
    load_adapter(ours, tmp_path / "peft")
    torch.testing.assert_close(said(ours), dense(pairs, 2), atol=1e-4, rtol=1e-4)
    theirs = PeftModel.from_pretrained(hf_llama(), tmp_path / "peft")
    torch.testing.assert_close(said(theirs), said(ours), atol=1e-5, rtol=1e-5)


def test_loralibs_own_layers(tmp_path):
    """Oracle: loralib computes the logits itself; its state holds no alpha."""
    model = hf_llama().eval()
    for name in modules():
        old = model.get_submodule(name)
        new = loralib.Linear(old.in_features, old.out_features, r=4, lora_alpha=12, bias=False, merge_weights=False)
        new.weight = old.weight
        nn.init.normal_(new.lora_B, std=0.3)
        model.set_submodule(name, new)
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="says no alpha .*loralib's layers have 1"):
        convert_adapter(tmp_path / "lora.bin", hf_llama(), tmp_path / "peft")
    convert_adapter(tmp_path / "lora.bin", hf_llama(), tmp_path / "peft", alpha=12)
    ours = hf_llama()
    load_adapter(ours, tmp_path / "peft")
    torch.testing.assert_close(said(ours), said(model), atol=1e-5, rtol=1e-5)


def test_alphas_and_ranks_of_each_layer_own(tmp_path):
    pairs, tensors = factors(), {}
    for i, (name, (A, B)) in enumerate(pairs.items()):
        A, B = A[:1 + i % 3], B[:, :1 + i % 3]
        tensors |= LAYOUTS["kohya"](name, A.contiguous(), B.contiguous()) | {
            f"lora_te_{flat(name)}.alpha": torch.tensor(float(i + 1))}
        pairs[name] = (A, B, (i + 1) / (1 + i % 3))
    save_file(tensors, tmp_path / "lora.safetensors")
    convert_adapter(tmp_path / "lora.safetensors", hf_llama(), tmp_path / "peft")
    ours = hf_llama()
    load_adapter(ours, tmp_path / "peft")
    for name, layer in lora_layers(ours):
        A, B, scaling = pairs[name]
        torch.testing.assert_close(layer.delta_weight().detach(), scaling * B @ A)
    with pytest.raises(ValueError, match="says alpha 1 for .*, and alpha=5 was given"):
        convert_adapter(tmp_path / "lora.safetensors", hf_llama(), tmp_path / "other", alpha=5)


@pytest.mark.parametrize("up_first", [True, False])
@pytest.mark.parametrize("end", [".pt", ".safetensors"])
def test_a_bare_list(up_first, end, tmp_path):
    pairs = factors()
    listed = [t for A, B in pairs.values() for t in ((B, A) if up_first else (A, B))]
    file = tmp_path / f"lora{end}"
    torch.save(listed, file) if end == ".pt" else save_file({str(i): t for i, t in enumerate(listed)}, file)
    with pytest.raises(ValueError, match="bare list of .* give targets="):
        convert_adapter(file, hf_llama(), tmp_path / "peft", alpha=3)
    with pytest.raises(ValueError, match="holds 8 tensors, and targets"):
        convert_adapter(file, hf_llama(), tmp_path / "peft", alpha=3, targets=["q_proj"])
    with pytest.raises(ValueError, match="beside its weight"):
        convert_adapter(file, hf_llama(), tmp_path / "peft", alpha=3, targets=["v_proj", "q_proj"])
    convert_adapter(file, hf_llama(), tmp_path / "peft", alpha=3, targets=["q_proj", "v_proj"])
    ours = hf_llama()
    load_adapter(ours, tmp_path / "peft")
    torch.testing.assert_close(said(ours), dense(pairs, 1), atol=1e-4, rtol=1e-4)


def test_convolutions_of_a_unet(tmp_path):
    base = nn.ModuleDict({"down": nn.ModuleList([nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 5, 1)])})
    A, B = torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    save_file({"lora_unet_down_0.lora_down.weight": A, "lora_unet_down_0.lora_up.weight": B,
               "lora_unet_down_0.alpha": torch.tensor([4.0])}, tmp_path / "lora.safetensors")
    convert_adapter(tmp_path / "lora.safetensors", base, tmp_path / "peft")
    x = torch.randn(1, 4, 7, 7)
    update = 2 * torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    want = nn.functional.conv2d(x, base["down"][0].weight + update, base["down"][0].bias, padding=1)
    load_adapter(base, tmp_path / "peft")
    torch.testing.assert_close(base["down"][0](x), want, atol=1e-4, rtol=1e-4)


def test_gpt2s_transposed_matrices(tmp_path):
    base = gpt2()
    A, B = torch.randn(2, 16), torch.randn(48, 2)
    save_file({"h.1.attn.c_attn.lora_A": A, "h.1.attn.c_attn.lora_B": B}, tmp_path / "lora.safetensors")
    convert_adapter(tmp_path / "lora.safetensors", base, tmp_path / "peft", alpha=2)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    load_adapter(base, tmp_path / "peft")
    torch.testing.assert_close(base.transformer.h[1].attn.c_attn.delta_weight(), B @ A)


def broken(**change):
    tensors = {key: t for name, (A, B) in factors().items() for key, t in LAYOUTS["loralib"](name, A, B).items()}
    first = next(iter(modules()))
    return tensors, first, change


@pytest.mark.parametrize("spoil, message", [
    (lambda t, n: t.update({"model.layers.9.self_attn.q_proj.lora_A": torch.ones(3, 16),
                            "model.layers.9.self_attn.q_proj.lora_B": torch.ones(16, 3)}),
     "1 of 5 pairs of factors find no place in LlamaForCausalLM: model.layers.9"),
    (lambda t, n: t.pop(f"{n}.lora_B"), "has no factor B"),
    (lambda t, n: t.update({f"{n}.lora_A": torch.ones(3, 15)}), "are 3 x 15 and 16 x 3"),
    (lambda t, n: t.update({f"{n}.lora_A": torch.ones(6, 16)}), "are 6 x 16 and 16 x 3.*MergedLinear"),
    (lambda t, n: t.update({f"{n}.lora_A": torch.ones(()), f"{n}.lora_B": torch.ones(())}), "beside its weight"),
    (lambda t, n: t.update({f"{n}.weight": torch.ones(16, 16)}), "1 of 9 tensors are no factor.*q_proj.weight"),
    (lambda t, n: t.update({f"{n}.hada_w1_a": torch.ones(2)}), "LoHa"),
    (lambda t, n: t.update({f"{n}.lora_A": torch.full((3, 16), float("nan"))}), "not finite"),
])
def test_what_finds_no_place_is_named_and_nothing_is_written(spoil, message, tmp_path):
    tensors, first, _ = broken()
    spoil(tensors, first)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_adapter(tmp_path / "lora.safetensors", hf_llama(), tmp_path / "peft", alpha=1)
    assert not (tmp_path / "peft").exists()


def test_names_that_fit_two_ways_are_refused(tmp_path):
    """The base says encoder.0 and decoder.0, the file says 0: nobody can tell."""
    base = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(6, 4)), "decoder": nn.Sequential(nn.Linear(6, 4))})
    save_file({"0.lora_A": torch.ones(1, 6), "0.lora_B": torch.ones(4, 1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="'0' may be encoder.0 or decoder.0|'0' may be decoder.0 or encoder.0"):
        convert_adapter(tmp_path / "lora.safetensors", base, tmp_path / "peft", alpha=1)


def test_the_command_line(tmp_path, capsys):
    q = FABLE / "model.safetensors"
    shape = load_file(q)["model.layers.0.self_attn.q_proj.weight"].shape
    save_file({"layers.0.self_attn.q_proj.lora_a": torch.randn(shape[1], 2),
               "layers.0.self_attn.q_proj.lora_b": torch.randn(2, shape[0])}, tmp_path / "adapters.safetensors")
    command = ["convert", str(tmp_path / "adapters.safetensors"), "--base", "fable", "--out", str(tmp_path / "peft")]
    assert cli.main(command) == 1
    assert "give alpha=" in capsys.readouterr().err
    assert cli.main([*command, "--alpha", "40"]) == 0
    assert "MLX: 1 pairs of factors" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "peft")]) == 0
    out = capsys.readouterr().out
    assert "q_proj" in out and "scaling" in out and "Made for" in out and "max_lora_rank" in out
    assert cli.main([*command, "--alpha", "40"]) == 1
    assert "no empty folder" in capsys.readouterr().err
    from lora_edu import load_pretrained
    model = load_pretrained()[0]
    assert load_adapter(model, tmp_path / "peft").scaling == 20
    with pytest.raises(ValueError, match="does not fit|matches no"):
        load_adapter(our_llama(), tmp_path / "peft")


@pytest.mark.parametrize("twice", [
    lambda name, A, B: {f"{name}.lora_{end}.{which}.weight": t.clone() for end, t in (("A", A), ("B", B))
                        for which in ("default", "other")},
    lambda name, A, B: {f"{name}.lora_A": A, f"{name}.lora_A.weight": A.clone(), f"{name}.lora_B": B}])
def test_two_adapters_in_one_file_are_refused(twice, tmp_path):
    tensors = {}
    for name, (A, B) in factors().items():
        tensors |= twice(name, A, B)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="holds more than one A for .*: are there several adapters in it"):
        convert_adapter(tmp_path / "lora.safetensors", hf_llama(), tmp_path / "peft", alpha=4)
    assert not (tmp_path / "peft").exists()


def test_two_names_for_one_module_are_refused(tmp_path):
    base = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(6, 4)}), "c": nn.Linear(6, 4)})
    save_file({f"{name}.lora_{end}": torch.ones(shape) for name in ("a.b", "a_b")
               for end, shape in (("A", (1, 6)), ("B", (4, 1)))}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="2 of 2 pairs of factors find no place"):
        convert_adapter(tmp_path / "lora.safetensors", base, tmp_path / "peft", alpha=4)


@pytest.mark.parametrize("change, message", [
    (dict(alpha=torch.tensor(torch.nan)), "is no finite number"), (dict(alpha=torch.empty(0)), "is no finite number"),
    (dict(alpha=torch.tensor([1.0, 2.0])), "is no finite number"),
    (dict(lora_A=torch.ones(2, 16, dtype=torch.int8)), "torch.int8 numbers, and no floating ones"),
    (dict(lora_B=torch.ones(16, 2, dtype=torch.complex64)), "torch.complex64 numbers, and no floating ones")])
def test_what_could_not_be_loaded_is_not_written(change, message, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    pair = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)} | change
    torch.save({f"{name}.{end}": t for end, t in pair.items()}, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=message):
        convert_adapter(tmp_path / "lora.bin", hf_llama(), tmp_path / "peft", alpha=None if "alpha" in change else 2)
    assert not (tmp_path / "peft").exists()


def test_factors_in_eight_bits_become_floats(tmp_path):
    name, A = "model.layers.0.self_attn.q_proj", torch.randn(2, 16).to(torch.float8_e4m3fn)
    save_file({f"{name}.lora_A": A, f"{name}.lora_B": torch.ones(16, 2)}, tmp_path / "lora.safetensors")
    convert_adapter(tmp_path / "lora.safetensors", hf_llama(), tmp_path / "peft", alpha=2)
    model = hf_llama()
    load_adapter(model, tmp_path / "peft")
    assert torch.equal(model.get_submodule(name).lora_A, A.float())


def test_a_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder: give the file of tensors in it"):
        convert_adapter(tmp_path, hf_llama(), tmp_path / "peft", alpha=2)
    (tmp_path / "adapters.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a NumPy file"):
        convert_adapter(tmp_path / "adapters.npz", hf_llama(), tmp_path / "peft", alpha=2)
