"""A model in pieces (FSDP2): every rank keeps a part of each weight, and a layer is whole only while its turn lasts.

torch's `fully_shard` cuts each decoder layer, and what lies outside of them as one more group, along the first
dimension. Its hooks gather a group before its turn and, where it is trained, add up its gradient and leave each rank
its own part. Adapters and vectors that are not trained (gains, biases) stay whole on every rank: they are small.

All ranks must run equally many passes through `Whole`, in the same order.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from welltuned.errors import RunError
from welltuned.models.full import FullParameters
from welltuned.models.lora import AdapterBank, Slot
from welltuned.models.parts import require_layers, within

T = TypeVar("T")
KEY = "fsdp"


class Whole(nn.Module):
    """The root: what runs in it finds embeddings and head whole, and every layer at its turn."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], T]) -> T:
        return run()

    def without_gradient(self, run: Callable[[], T]) -> T:
        """The same, after which the root's weights lie in pieces again: they may be others at the next pass."""
        with torch.no_grad():
            found: T = self(run)
        assert isinstance(self, FSDPModule)
        self.reshard()
        return found


def cut_adapted(bank: AdapterBank, device: torch.device) -> Whole:
    """Cut the frozen base under adapters, layer by layer, each on its way to the device."""
    bank.read_weights_anew(device)
    return _cut(bank.model, device, {*bank.parameters, *_small(bank.model, device)}, None, lambda _: None)


def _small(model: PreTrainedModel, device: torch.device) -> list[nn.Parameter]:
    """Frozen vectors, now on the device."""
    found = [p for p in model.parameters() if p.dim() < 2 and not p.requires_grad]
    for parameter in found:
        parameter.data = parameter.data.to(device)
    return found


def _cut(
    model: PreTrainedModel,
    device: torch.device,
    whole: Collection[nn.Parameter],
    dtype: torch.dtype | None,
    adopt: Callable[[nn.Module], None],
) -> Whole:
    """Args: whole: parameters that are not cut. adopt: called with each module whose parameters just were."""
    mesh, kept = mesh_of(device), set(whole)
    for layer in require_layers(model, KEY):
        _move(layer, kept, device, dtype)
        fully_shard(layer, mesh=mesh, ignored_params=kept)
        adopt(layer)
    root = Whole(model)
    _move(root, kept, device, dtype)
    fully_shard(root, mesh=mesh, ignored_params=kept, reshard_after_forward=False)
    adopt(root)
    for module in root.modules():
        if isinstance(module, FSDPModule):  # a sum: the loss is divided by the tokens of the whole update
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if "set_reduce_scatter_unused_params" in vars(FSDPModule):  # torch 2.13; experts are mostly one stack
                module.set_reduce_scatter_unused_params(True)  # an expert that no token of this rank was sent to
    return root


def _move(module: nn.Module, whole: Collection[nn.Parameter], device: torch.device, dtype: torch.dtype | None) -> None:
    """Bring the parameters that are about to be cut to the device, in the number format that they are trained in."""
    for parameter in module.parameters():
        if parameter not in whole and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device, dtype)


def mesh_of(device: torch.device) -> DeviceMesh:
    """All ranks, in one row."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


class ShardedParameters(FullParameters):
    """This rank's pieces of all parameters as views of flat_KP [1, P / ranks], fp32, matrices first.

    A parameter of n rows is cut into pieces of ceil(n / ranks) rows, so the last ones may have fewer or none: what they
    leave of their slot is 0 and stays 0, since its gradient is. `slots` are those of the pieces, by the same names and
    in the same order on every rank.

    Attributes:
        whole: the shape of each parameter.
        root: what passes run in.
    """

    in_pieces = True

    def __init__(self, model: PreTrainedModel, device: torch.device, frozen: tuple[str, ...] = ()):
        self.model, self.mesh = model, mesh_of(device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not within(name, frozen))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # tied weights come once
        named.sort(key=lambda item: item[1].dim() < 2)
        self.whole = {name: tuple(p.shape) for name, p in named}
        self.slots, start = [], 0
        for name, shape in self.whole.items():
            self.slots.append(Slot(name, start, (-(-shape[0] // self.mesh.size()), *shape[1:])))
            start += self.slots[-1].size
        self.decayed = sum(slot.size for slot in self.slots if len(slot.shape) > 1)
        self.flat_KP = torch.zeros(1, start, dtype=torch.float32, device=device)
        self.grad_KP = torch.zeros_like(self.flat_KP)
        self._pieces: dict[str, Any] = {}  # FSDP2's record of each
        names = {id(p): name for name, p in named}
        self._names = {
            (id(module), leaf): names[id(p)]
            for module in model.modules()
            for leaf, p in module._parameters.items()
            if p is not None and id(p) in names
        }
        self.root = _cut(model, device, _small(model, device), torch.float32, self._take)
        self.claim_gradients()

    def _take(self, module: nn.Module) -> None:
        """Move the pieces that FSDP2 has just made into the flat buffer: their data, and what it gathers them from."""
        slots = {slot.name: slot for slot in self.slots}
        for piece in _pieces_of(module):
            name = self._names.get((id(piece._module_info.module), piece._module_info.param_name))
            if name is None:  # frozen
                continue
            local = piece.sharded_param.to_local().detach()
            view = _view(self.flat_KP, slots[name])
            view[: len(local)].copy_(local)
            piece._sharded_param_data = view.view(-1)
            piece.sharded_param._local_tensor = view[: len(local)]
            self._pieces[name] = piece

    def claim_gradients(self) -> None:
        """Have FSDP2 add the gradients of the pieces to grad_KP.

        Raises:
            RunError: this version of torch keeps the pieces elsewhere than in the flat buffer.
        """
        for slot in self.slots:
            piece, view = self._pieces[slot.name], _view(self.flat_KP, slot)
            if piece._sharded_param_data.data_ptr() != view.data_ptr():
                raise RunError(f"torch {torch.__version__} does not keep the pieces of {slot.name} where they were put")
            gradient = _view(self.grad_KP, slot)[: self.rows(slot.name)]
            piece.sharded_param.grad = piece.to_sharded_dtensor(gradient)

    def rows(self, name: str) -> int:
        """How many rows of a parameter lie here."""
        whole, most = self.whole[name][0], self._most(name)
        return max(0, min(most, whole - self.mesh.get_local_rank() * most))

    def _most(self, name: str) -> int:
        return -(-self.whole[name][0] // self.mesh.size())

    def first_row(self, name: str) -> int:
        """The number of the first of them."""
        return min(self.whole[name][0], self.mesh.get_local_rank() * self._most(name))

    def tensors(self, k: int = 0) -> dict[str, Tensor]:
        """This rank's rows of each parameter, as views of the flat buffer."""
        return self.pieces_of(self.flat_KP)

    def pieces_of(self, flat_KP: Tensor) -> dict[str, Tensor]:
        """The same of any buffer that is laid out like it."""
        return {slot.name: _view(flat_KP, slot)[: self.rows(slot.name)] for slot in self.slots}

    def dtensors(self, flat_KP: Tensor) -> dict[str, DTensor]:
        """The same as torch.distributed knows them: pieces of whole tensors."""
        found = {}
        for name, piece in self.pieces_of(flat_KP).items():
            shape = torch.Size(self.whole[name])
            stride = torch.empty(shape, device="meta").stride()
            found[name] = DTensor.from_local(piece, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return found


def _pieces_of(module: nn.Module) -> Iterator[Any]:
    """FSDP2's records of the parameters that it cut for this module; torch has no public name for them."""
    assert isinstance(module, FSDPModule)
    group = module._get_fsdp_state()._fsdp_param_group
    yield from () if group is None else group.fsdp_params


def _view(flat_KP: Tensor, slot: Slot) -> Tensor:
    return flat_KP[0, slot.start : slot.start + slot.size].view(slot.shape)
