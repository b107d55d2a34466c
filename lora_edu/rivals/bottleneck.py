"""Bottleneck adapters: two small layers in sequence behind a frozen one. Read `BottleneckAdapter.forward`: it makes the
model deeper.

Sources: Houlsby et al. (2019), arXiv:1902.00751; Lin et al. (2020), arXiv:2004.03829; Pfeiffer et al. (2021),
arXiv:2005.00247.
"""
import torch
from torch import nn
from torch.nn import functional as F

from lora_edu.lora.inject import replace
from lora_edu.rivals.rival import Rival, refuse_adapted, trainable

# the layers that write into the residual stream
PLACES = {"houlsby": ("o_proj", "down_proj"), "lin": ("down_proj",)}


class BottleneckAdapter(Rival):
    """``y = h + up(gelu(down(h)))`` with ``h = base_layer(x)``: two small layers in sequence behind a frozen one.

    `up` starts at zero, so a new adapter is the identity, bit for bit (Houlsby et al., section 2.1, ask for nearly
    that).

    Shapes: down (r, d) and up (d, r), both with a bias: 2dr + r + d numbers; h and y (..., d).
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int):
        super().__init__()
        size, like = base_layer.out_features, dict(device=base_layer.weight.device, dtype=base_layer.weight.dtype)
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(size, bottleneck, **like), nn.Linear(bottleneck, size, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base_layer(x)
        return h + self.up(F.gelu(self.down(h)))


def apply_adapters(model: nn.Module, bottleneck: int, kind: str = "houlsby") -> int:
    """Put adapters into every block, in front of its residual sums, and freeze the rest; the model is changed in place.

    Args:
        bottleneck: r, the width of the narrow place.
        kind: "houlsby": two a block, behind attention and behind the MLP. "lin": one, behind the MLP (Pfeiffer's, in a
            model that norms first as a LLaMA does).

    Returns:
        What trains: 2dr + r + d numbers an adapter, d being hidden_size. The papers train the norms as well; here they
            stay frozen.

    Raises:
        ValueError: a bottleneck under 1, a kind that is neither, a model without such layers, or one that is adapted
            already.
    """
    refuse_adapted(model)
    if bottleneck < 1:
        raise ValueError(f"bottleneck={bottleneck}: choose a whole number, 1 or more.")
    if kind not in PLACES:
        raise ValueError(f"kind={kind!r}: choose 'houlsby' (two adapters a block) or 'lin' (one).")
    places = [name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PLACES[kind]]
    if not places:
        raise ValueError(f"this {type(model).__name__} has no linear layer called {' or '.join(PLACES[kind])}, and "
                         "adapters go behind these: give a LLaMA.")
    model.requires_grad_(False)
    for name in places:
        replace(model, name, BottleneckAdapter(model.get_submodule(name), bottleneck))
    return trainable(model)
