"""The same update beside a convolution, as PEFT's files hold it: a convolution to `rank` channels, then a 1 x 1 one.

Seen as a matrix (out, in * kernel) a convolution is a linear layer over patches, so all but the forward pass is
`LoRALinear`'s. `load_adapter` makes these where a file brings them (`extract_lora` writes such files); `apply_lora`
goes beside linear layers only.
"""
import torch
from torch.nn import functional as F

from lora_edu.lora.layer import LoRALinear, is_plain_conv


class LoRAConv(LoRALinear):
    """A frozen convolution plus a trainable update of rank ``rank``.

    Shapes:
        lora_A (rank, in_channels * kernel), lora_B (out_channels, rank)
        x (..., in_channels, *places) -> y (..., out_channels, *places)

    >>> conv = LoRAConv.wrap(torch.nn.Conv2d(3, 8, 3), rank=2)
    >>> _ = torch.nn.init.normal_(conv.lora_B)
    >>> x = torch.randn(5, 3, 9, 9)
    >>> weight = conv.base_layer.weight + conv.delta_weight().view(8, 3, 3, 3)
    >>> torch.allclose(conv(x), F.conv2d(x, weight, conv.bias), atol=1e-4)
    True
    """

    takes, TAKEN = staticmethod(is_plain_conv), "convolutions without groups, dilation or padding of their own"

    @property
    def file_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        _, channels, *kernel = self.base_layer.weight.shape
        return (self.rank, channels, *kernel), (self.out_features, self.rank, *(1 for _ in kernel))

    def _laid_out(self, update: torch.Tensor) -> torch.Tensor:
        return update.reshape(self.base_layer.weight.shape)

    def _add_update(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        A, B = (factor.reshape(shape) for factor, shape in zip((self.lora_A, self.lora_B), self.file_shapes))
        low = self.base_layer._conv_forward(x, A, None)              # its own stride and padding
        axis = 1 - B.ndim                                            # of the channels; a batch may come before it
        wide = (low.movedim(axis, -1) @ B.flatten(1).T).movedim(-1, axis)
        return (y.to(wide.dtype) + self.scaling * wide).to(y.dtype)

    def _plain_forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.base_layer._conv_forward(x, weight, self.bias)
