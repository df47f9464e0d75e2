"""Gathered tensors: rows of all processes in order, and gradients that come back to where they belong."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from hdcache.distill.collective import gather, gather_rows, world_size

WORKER = """
import json, sys
import torch
from torch import distributed
from hdcache.distill.collective import gather, gather_rows
from hdcache.distill.projectors import LayerMLPs
from hdcache.distill.contrast import contrasted_parts
distributed.init_process_group("gloo")
rank = distributed.get_rank()
counts = [3, 1]
rows = torch.arange(8.0).view(4, 2).split(counts)[rank].requires_grad_()
every, start = gather_rows(rows)
# Each rank weighs all rows by its own number: a row's gradient is the sum over ranks.
(gradient,) = torch.autograd.grad(((rank + 1) * every * torch.arange(4.0)[:, None]).sum(), rows)
stacked = gather(torch.tensor([float(rank)]))
# A network with batch norms and a contrast over all rows: DDP's mean of the gradients is that of one process.
mlps = LayerMLPs(2, [5, 8, 4], normalised=True, generator=torch.Generator().manual_seed(0))
views = [torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
model = torch.nn.parallel.DistributedDataParallel(mlps)
mine = slice(rank * 4, rank * 4 + 4)
both = model(torch.cat([view[:, mine] for view in views], dim=1))
parts = contrasted_parts((both[:, :4], both[:, 4:]), 0.2)
(parts["out"] + parts["mid"]).backward()
total = torch.stack([parts["out"].detach(), parts["mid"].detach()])
distributed.all_reduce(total)
alone = LayerMLPs(2, [5, 8, 4], normalised=True, generator=torch.Generator().manual_seed(0))
distributed.barrier()
distributed.destroy_process_group()
whole = alone(torch.cat(views, dim=1))
expected = contrasted_parts((whole[:, :8], whole[:, 8:]), 0.2)
(expected["out"] + expected["mid"]).backward()
for name, parameter in alone.named_parameters():
    torch.testing.assert_close(mlps.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
for name, buffer in alone.named_buffers():
    torch.testing.assert_close(mlps.get_buffer(name), buffer)
torch.testing.assert_close(total / 2, torch.stack([expected["out"], expected["mid"]]).detach())
print(json.dumps([every.tolist(), start, gradient.tolist(), stacked.tolist()]))
"""


def test_a_lone_process_gathers_its_own_rows() -> None:
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    assert world_size() == 1
    assert torch.equal(gather(x), x.unsqueeze(0))
    rows, start = gather_rows(x)
    assert torch.equal(rows, x)
    assert start == 0


def test_two_processes_see_the_rows_and_gradients_of_one(together: Callable[..., list[str]]) -> None:
    """Unequal numbers of rows; and a network with batch norms and a contrast under DistributedDataParallel."""
    outputs = together(WORKER)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    rows = torch.arange(8.0).view(4, 2).tolist()
    assert [rank[:2] for rank in found] == [[rows, 0], [rows, 3]]
    assert [row for rank in found for row in rank[2]] == [[3 * i, 3 * i] for i in range(4)]
    assert [rank[3] for rank in found] == [[[0.0], [1.0]]] * 2
