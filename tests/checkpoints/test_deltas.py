"""deltas: the difference of two models, tensor by tensor; each is yielded or reported, and none of them is lost."""
import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_edu import apply_lora, save_adapter
from lora_edu.checkpoints.deltas import deltas, dot
from tests.lora.tiny import MODELS, gpt2, hf_llama, our_llama


def perturbed(model, size=0.1):
    """A copy with every parameter changed a little."""
    generator, tuned = torch.Generator().manual_seed(5), copy.deepcopy(model)
    for parameter in tuned.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return tuned


def saved(model, file):
    names = deltas(model, model).base.tied
    save_file({name: t.contiguous() for name, t in model.state_dict().items() if name not in names}, file)
    return file


class Zoo(nn.Module):
    """One of each sort of tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.codes = nn.Embedding(10, 6), nn.Embedding(4, 6)
        self.embed = nn.Linear(6, 4)
        self.fc, self.narrow = nn.Linear(6, 5), nn.Linear(6, 1)
        self.conv1, self.conv2 = nn.Conv1d(4, 6, 3), nn.Conv2d(3, 8, (2, 3))
        self.grouped, self.dilated, self.turned = (
            nn.Conv2d(4, 8, 3, groups=2),
            nn.Conv1d(4, 8, 3, dilation=2),
            nn.ConvTranspose1d(4, 8, 3),
        )
        self.norm, self.batch = nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.lstm, self.attention = nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)
        self.table, self.experts = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(2, 4, 5))
        self.head = nn.Linear(6, 10, bias=False)


def test_it_yields_name_before_and_difference_in_the_models_order():
    base = our_llama()
    tuned = perturbed(base)
    got = {name: (weight, delta) for name, weight, delta in deltas(base, tuned)}
    assert list(got) == [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    for name, (weight, delta) in got.items():
        assert torch.equal(weight, base.get_submodule(name).weight)
        torch.testing.assert_close(delta, tuned.get_submodule(name).weight - weight, rtol=0, atol=0)
    assert not any(t.requires_grad for pair in got.values() for t in pair)


@pytest.mark.parametrize("sort", ["model", "file"])
def test_every_tensor_is_yielded_or_reported(sort, tmp_path):
    base, tuned = Zoo(), perturbed(Zoo())
    sides = (base, tuned) if sort == "model" else (saved(base, tmp_path / "a.safetensors"),
                                                   saved(tuned, tmp_path / "b.safetensors"))
    pair = deltas(*sides)
    yielded = {d.name: tuple(d.delta.shape) for d in pair}
    others = {other.name: other.kind for other in pair.others}
    for name in base.state_dict():
        assert (name.removesuffix(".weight") in yielded) != (name in others), name
    assert yielded.items() >= {"fc": (5, 6), "conv1": (6, 12), "conv2": (8, 18), "head": (10, 6),
                               "lstm.weight_ih_l0": (16, 4),
                               "table": (3, 7), "attention.in_proj_weight": (12, 4)}.items()
    assert others.items() >= {"embed_tokens.weight": "embedding", "fc.bias": "bias", "lstm.bias_ih_l0": "bias",
                              "norm.weight": "norm",
                              "narrow.weight": "vector", "batch.num_batches_tracked": "int64 numbers" if sort == "model"
                              else "I64 numbers",
                              "experts": "stack of matrices (3 axes)"}.items()
    assert ("embed" in yielded) == (sort == "model")        # a linear layer of that name
    if sort == "model":     # the modules know what names and shapes do not
        assert others.items() >= {"codes.weight": "embedding", "turned.weight": "transposed convolution",
                                  "batch.weight": "norm",
                                  "grouped.weight": "convolution with groups, dilation or padding of its own",
                                  "dilated.weight": "convolution with groups, dilation or padding of its own"}.items()
        assert pair.matrices["attention.out_proj.weight"] == pair.matrices["table"] == "matrix outside a linear layer"


@pytest.mark.parametrize("name, kind", [
    ("model.embed_tokens.weight", "embedding"), ("transformer.wpe.weight", "embedding"), ("shared.weight", "embedding"),
    ("bert.embeddings.word_embeddings.weight", "embedding"),
    ("bert.embeddings.position_embeddings.weight", "embedding"),
    ("tok_embeddings.weight", "embedding"), ("embedding.embeddings", "embedding"),
    ("gpt_neox.embed_in.weight", "embedding"),
    ("lm_head.weight", None), ("embed_out.weight", None), ("time_embedding.linear_1.weight", None),
    ("patch_embed.proj.weight", None),
])
def test_embeddings_in_files_are_known_by_name(name, kind, tmp_path):
    for i, file in enumerate("ab"):
        save_file({name: torch.full((4, 5), 1.0 + i)}, tmp_path / f"{file}.safetensors")
    pair = deltas(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [o.kind for o in pair.others] == ([kind] if kind else []) and len(pair) == (0 if kind else 1)


@pytest.mark.parametrize("kind", MODELS)
def test_models_and_files_agree(kind, tmp_path):
    """GPT-2's Conv1D too: seen as (out, in), known by its class or by the shapes in the file."""
    base = MODELS[kind]()
    tuned = perturbed(base)
    a, b = saved(base, tmp_path / "a.safetensors"), saved(tuned, tmp_path / "b.safetensors")
    want = {d.name: d for d in deltas(base, tuned)}
    for sides in ((a, b), (base, b), (a, tuned)):
        pair = deltas(*sides)
        got = {d.name: d for d in pair}
        assert got.keys() == want.keys()
        for name in want:
            assert torch.equal(got[name].weight, want[name].weight) and torch.equal(got[name].delta, want[name].delta)
        assert pair.report().others_share == pytest.approx(deltas(base, tuned).report().others_share)


def test_conv1d_is_turned_to_out_in(tmp_path):
    base = gpt2()
    got = {d.name: d.weight for d in deltas(base, perturbed(base))}
    assert torch.equal(got["transformer.h.0.attn.c_attn"], base.transformer.h[0].attn.c_attn.weight.T)
    assert got["transformer.h.0.mlp.c_fc"].shape == (64, 16)
    # the same names on nn.Linear
    linear = {"h.0.attn.c_attn.weight": torch.randn(48, 16), "h.0.attn.c_proj.weight": torch.randn(16, 16)}
    save_file(linear, tmp_path / "x.safetensors")
    for name, weight, _ in deltas(tmp_path / "x.safetensors", tmp_path / "x.safetensors"):
        assert torch.equal(weight, linear[name + ".weight"])


def test_a_model_that_is_one_layer_has_no_module_name():
    """It is yielded as a loose matrix: there is no parent in which an adapter could put anything."""
    pair = deltas(nn.Linear(3, 4), nn.Linear(3, 4))
    assert [d.name for d in pair] == ["weight"] and pair.matrices == {"weight": "matrix outside a linear layer"}


def test_squared_changes_are_those_of_the_definition():
    base, tuned = hf_llama(), perturbed(hf_llama())
    pair = deltas(base, tuned)
    report = pair.report()
    squares = {name: (tuned.state_dict()[name] - t).double().square().sum().item()
               for name, t in base.state_dict().items()}
    others = {o.name: o.squared for o in pair.others}
    assert "model.embed_tokens.weight" in others
    assert "lm_head.weight" not in others          # untied: a matrix like others
    for name, squared in (others | {name: m.squared for name, m in pair.measured.items()}).items():
        assert squared == pytest.approx(squares.pop(name), rel=1e-5)
    assert not squares
    assert report.others_share == pytest.approx(sum(others.values()) / (sum(others.values()) + report.squared))
    assert report.changed == report.matrices == len(pair) == 15


@pytest.mark.parametrize("dtypes, want", [
    ((torch.bfloat16, torch.bfloat16), torch.float32), ((torch.float32, torch.float16), torch.float32),
    ((torch.float64, torch.float32), torch.float64), ((torch.float16, torch.float64), torch.float64),
])
def test_dtypes(dtypes, want):
    base, tuned = (nn.Sequential(nn.Linear(3, 4)).to(dtype) for dtype in dtypes)
    (name, weight, delta), = deltas(base, tuned)
    assert weight.dtype == delta.dtype == want
    assert torch.equal(delta, tuned[0].weight.to(want) - base[0].weight.to(want))


def test_what_has_no_difference_says_why(tmp_path):
    same = {"a.weight": torch.randn(3, 4)}
    save_file(same | {"old.weight": torch.randn(3, 4), "embed_tokens.weight": torch.randn(32, 6)},
              tmp_path / "a.safetensors")
    save_file(same | {"new.bias": torch.randn(3), "embed_tokens.weight": torch.randn(34, 6)},
              tmp_path / "b.safetensors")
    pair = deltas(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert {o.name: (o.kind, o.squared) for o in pair.others} == {
        "old.weight": ("only in the base model", None), "new.bias": ("only in the tuned model", None),
        "embed_tokens.weight": ("32 x 6 became 34 x 6", None)}
    text = str(pair.report())
    assert "32 x 6 became 34 x 6" in text and "no difference" in text and "0 of 1 matrices changed" in text
    assert "3 tensors could not be compared (first: embed_tokens.weight" in text and "%" not in text
    assert ">embed_tokens.weight</td>" in pair.report()._repr_html_()


def test_ties(tmp_path):
    tied, untied = our_llama(tied=True), our_llama(tied=False)
    file = saved(perturbed(tied), tmp_path / "x.safetensors")           # holds one of the two names
    for tuned in (perturbed(tied), file):
        assert [o.kind for o in deltas(tied, tuned).others
                if o.name == "lm_head.weight"] == ["tied to model.embed_tokens.weight"]
    untied.load_state_dict(perturbed(tied).state_dict())
    other, = (o for o in deltas(tied, untied).others if o.name == "lm_head.weight")
    assert other.kind == "tied in the base model only" and other.squared > 0
    assert "lm_head" in [d.name for d in deltas(untied, perturbed(untied))]


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name, value",
                         [("fc.weight", float("nan")), ("fc.bias", float("inf")),
                          ("embed_tokens.weight", float("-inf"))])
def test_nan_and_infinity_are_named_with_their_side(side, name, value):
    models = {"base": Zoo(), "tuned": nn.Sequential(Zoo())[0]}
    models[side].state_dict()[name].view(-1)[1] = value
    models[side].name_or_path = "the broken one"
    with pytest.raises(ValueError, match=f"{name} of the broken one has NaN or infinity"):
        deltas(models["base"], models["tuned"]).report()


def test_numbers_whose_squares_leave_float32_are_fine():
    base, tuned = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    for model, value in ((base, 1e25), (tuned, 2e25)):
        nn.init.constant_(model[0].weight, value)
    pair = deltas(base, tuned)
    assert next(iter(pair)).delta[0, 0] == torch.tensor(2e25) - torch.tensor(1e25)
    assert pair.measured["0.weight"].squared == pytest.approx(16e50, rel=1e-5)
    assert pair.measured["0.weight"].cosine == pytest.approx(1)
    assert dot(torch.full((5,), 1e-30), torch.full((5,), 1e-30)) == pytest.approx(5e-60, rel=1e-6, abs=0)


def test_unrelated_models_are_warned_about_after_the_iteration():
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)) for _ in range(2))
    pair = deltas(one, two)
    walk = iter(pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(walk), next(walk)
    with pytest.warns(UserWarning, match="look unrelated: the mean cosine of their matrices is"):
        next(walk, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(pair)) == 2                                 # said once
        assert len(list(deltas(one, perturbed(one, 0.02)))) == 2


def test_no_common_name_is_refused():
    with pytest.raises(ValueError, match="no tensor name in common: Llama begins with model.embed_tokens.weight, "
                                         "Linear with weight"):
        deltas(our_llama(), nn.Linear(2, 3))
    with pytest.raises(ValueError, match="begins with nothing at all"):
        deltas(nn.ReLU(), nn.ReLU())


def test_models_and_files_are_left_as_they_are(tmp_path):
    base = our_llama()
    files = saved(base, tmp_path / "a.safetensors"), saved(perturbed(base), tmp_path / "b.safetensors")
    before = [file.read_bytes() for file in files], copy.deepcopy(base.state_dict())
    for _, weight, delta in deltas(*files):
        delta.zero_(), weight.zero_()
    for _ in deltas(base, files[1]):
        pass
    assert [file.read_bytes() for file in files] == before[0]
    assert all(torch.equal(t, before[1][name]) for name, t in base.state_dict().items())


def headed(body: nn.Module, head: int | None = None) -> nn.Module:
    """The body under the name "bert", as transformers calls it where there is a head."""
    return nn.ModuleDict({"bert": body} | ({"classifier": nn.Linear(4, head)} if head else {}))


@pytest.mark.parametrize("sort", ["model", "file", "pickled"])
def test_a_prefix_on_one_side_is_matched_and_said(sort, tmp_path):
    """Oracle: the same pair without a prefix. Both ways round; a head stays what it is, on one side only."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    tuned = perturbed(base)
    want = {name: delta for name, _, delta in deltas(base, tuned)}

    def given(model, name):
        if sort == "model":
            return model
        file = tmp_path / f"{name}.{'safetensors' if sort == 'file' else 'bin'}"
        return saved(model, file) if sort == "file" else torch.save(model.state_dict(), file) or file
    with pytest.warns(UserWarning, match="'bert.' is taken from the front of 6 names"):
        pair = deltas(given(base, "a"), given(headed(tuned, head=2), "b"))
    found = {name: delta for name, _, delta in pair}
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert {other.name: other.kind for other in pair.others if "classifier" in other.name} == dict.fromkeys(
        ("classifier.weight", "classifier.bias"), "only in the tuned model")
    with pytest.warns(UserWarning, match="'bert.' is put before 6 names"):
        pair = deltas(given(headed(base, head=3), "c"), given(tuned, "d"))
    assert {name.removeprefix("bert."): delta for name, _, delta in pair}.keys() == want.keys()
    assert pair.report().matrices == 2 and all(name.startswith(("bert.", "classifier.")) for name in pair.base.names)


def test_names_that_fit_as_they_are_are_left_alone():
    """Without a word, also where a part of one side fits under a prefix: fits are counted, by name and shape."""
    base = nn.ModuleDict({"0": nn.Linear(3, 3), "block": nn.ModuleDict({"0": nn.Linear(3, 3), "1": nn.Linear(3, 3)})})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [name for name, _, _ in deltas(base, perturbed(base))] == ["0", "block.0", "block.1"]
        other = nn.ModuleDict({"block": nn.ModuleDict({"bert": nn.Linear(5, 5)}), "bert": nn.Linear(3, 3)})
        assert [name for name, _, _ in deltas(other, perturbed(nn.ModuleDict({"bert": other["bert"]})))] == ["bert"]


def test_no_tensor_is_lost_where_a_name_is_taken(tmp_path):
    """The longer side has a "q" of its own, too: its "bert.q" keeps its name."""
    torch.manual_seed(0)
    held = {name: torch.randn(3, 3) for name in ("q.weight", "k.weight", "v.weight")}
    save_file(held, tmp_path / "a.safetensors")
    save_file({f"bert.{name}": tensor + 1 for name, tensor in held.items()} | {"q.weight": held["q.weight"] + 2},
              tmp_path / "b.safetensors")
    with pytest.warns(UserWarning, match="'bert.' is taken from the front of 2 names"):
        pair = deltas(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert sorted(pair.tuned.names) == ["bert.q.weight", "k.weight", "q.weight", "v.weight"]
    assert {name: round(delta.mean().item()) for name, _, delta in pair} == {"q": 2, "k": 1, "v": 1}


def test_a_tie_is_kept_under_the_other_sides_names():
    base = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tuned = copy.deepcopy(base)
    base["b"].weight = base["a"].weight
    tuned["b"].weight = tuned["a"].weight
    with pytest.warns(UserWarning, match="'bert.' is put before"):
        pair = deltas(headed(base), tuned)
    assert list(pair.matrices) == ["bert.a.weight"]
    assert pair.without_difference == {"bert.b.weight": "tied to bert.a.weight"}


def test_stored_positions_are_no_weights(tmp_path):
    """Versions of transformers differ in storing 0, 1, 2, …: that is no tensor that could not be compared."""
    model = nn.Sequential(nn.Linear(3, 2))
    held = {"0.weight": model[0].weight.detach(), "embeddings.position_ids": torch.arange(5)[None]}
    save_file(held, tmp_path / "a.safetensors")
    save_file({"0.weight": held["0.weight"] + 1}, tmp_path / "b.safetensors")
    for sides in (("a", "b"), ("b", "a")):
        report = deltas(*(tmp_path / f"{side}.safetensors" for side in sides)).report()
        assert not report.not_compared and report.others_share == 0
    save_file({"0.weight": held["0.weight"], "q.qweight": torch.arange(5)[None]}, tmp_path / "c.safetensors")
    assert deltas(tmp_path / "c.safetensors", tmp_path / "b.safetensors").report().not_compared


def test_an_adapter_is_no_side(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    apply_lora(model, ["0"], rank=1)
    with pytest.raises(ValueError, match=r"carries a LoRA.*remove_lora\(model, merge=True\)"):
        deltas(plain, model)
    save_adapter(model, tmp_path)
    for side in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match="is a LoRA adapter and no model"):
            deltas(plain, side)
