"""A device that is not the CPU, on a torch without a GPU: the dry run of the device.

Every operator runs on the CPU, under the device name "dry". A tensor that was made without a device, or on the wrong
one, meets one on dry:0 and the call fails, as it would on a GPU. Numbers are real; there is no speed, no stream and no
16-bit unit. It has no float64, as Apple's GPUs have none. torch.inference_mode does not take such a wrapper, so here it
is no_grad.

To be imported before a model is made, in a process of its own that ends with os._exit: it changes torch for good, and
torch's own way out does not know the device. Made with torch.utils.backend_registration (experimental; torch 2.13): a
wrapper subclass with __torch_dispatch__, and the boxed fallback for factories such as torch.empty.
"""
import torch
from torch.utils import backend_registration as registration
from torch.utils._pytree import tree_map

CPU, DRY = torch.device("cpu"), "dry:0"
# what a GPU, too, takes from the CPU: copies, numbers, and the positions of an index
MIXED = {"aten::_copy_from", "aten::copy_", "aten::_to_copy", "aten::_local_scalar_dense",
         "aten::index", "aten::index_put_", "aten::_index_put_impl_"}


class DryTensor(torch.Tensor):
    """A tensor on dry:0; its numbers are in `raw`, on the CPU."""

    @staticmethod
    def __new__(cls, raw, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=DRY, requires_grad=requires_grad)

    def __init__(self, raw, requires_grad=False):
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, *args, **(kwargs or {}))

    def data_ptr(self):
        return self.raw.data_ptr()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def tolist(self):
        return self.raw.tolist()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self, **_):
        return f"DryTensor({self.raw})"


def run(op, *args, **kwargs):
    """Any operator: take the CPU tensors out, run it there, wrap what comes back."""
    name, seen = op._schema.name, {}

    def unwrap(x):
        if isinstance(x, DryTensor):
            seen[id(x.raw)] = x
            return x.raw
        if isinstance(x, torch.Tensor) and x.ndim and name not in MIXED:
            raise RuntimeError(f"{name}: a tensor of shape {tuple(x.shape)} on {x.device} meets one on dry:0")
        return CPU if isinstance(x, torch.device) and x.type == "dry" else x

    if kwargs.get("dtype") is torch.float64 or any(each is torch.float64 for each in args):
        raise TypeError(f"{name}: dry:0 has no float64")
    asked = kwargs.get("device")
    to_cpu = name == "aten::_to_copy" and asked is not None and torch.device(asked).type == "cpu"
    found = op(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if name in ("aten::copy_", "aten::_copy_from"):
        return args[0 if name == "aten::copy_" else 1]

    def wrap(x):
        if id(x) in seen:                                     # an in-place operator gives its argument back
            return seen[id(x)]
        return DryTensor(x) if isinstance(x, torch.Tensor) and not to_cpu else x
    return tree_map(wrap, found)


class Module(registration._DummyBackendModule):
    """What torch.dry offers: autocast's types, and the CPU's random state."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        pass


class Generator:
    """torch.Generator, on the CPU where dry is asked for."""

    made_by = torch.Generator

    def __new__(cls, device="cpu"):
        return cls.made_by("cpu" if torch.device(device).type == "dry" else device)


def on_the_cpu_first(make):
    """torch.tensor and torch.as_tensor build in C++ below the dispatcher: build on the CPU, then move."""
    def made(data, *, device=None, **kwargs):
        dry = device is not None and torch.device(device).type == "dry"
        tensor = make(data, **kwargs) if dry or device is None else make(data, device=device, **kwargs)
        return tensor.to(device) if dry else tensor
    return made


registration._setup_privateuseone_for_python_backend("dry", backend_module=Module())
library = torch.library.Library("_", "IMPL")
library.fallback(run, "PrivateUse1")
torch.__future__.set_swap_module_params_on_conversion(True)   # module.to() keeps the Python objects
torch.Generator = Generator
torch.inference_mode = torch.no_grad
torch.tensor, torch.as_tensor = on_the_cpu_first(torch.tensor), on_the_cpu_first(torch.as_tensor)
