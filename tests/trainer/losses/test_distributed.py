import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from trainer.losses import bmc_loss

ROWS = (5, 8)  # ranks may hold batches of different length


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    pred, target = torch.randn(2, ROWS[rank], generator=generator, dtype=torch.float64)
    return pred, target


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        pred, target = batch(rank)
        pred.requires_grad_()
        memory = torch.tensor([0.3, -2.0], dtype=torch.float64)
        plain = bmc_loss(pred, target, 0.5)
        weighted = bmc_loss(pred, target, 0.5, memory=memory, memory_log_weights=torch.tensor([0.0, -1.0]))
        plain.backward()
        torch.save((plain.detach(), weighted.detach(), pred.grad), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_the_sum_runs_over_the_labels_of_all_ranks(tmp_path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2, join=True)
    for rank in range(2):
        pred, target = batch(rank)
        pred.requires_grad_()
        others = batch(1 - rank)[1]
        right = bmc_loss(pred, target, 0.5, memory=others)
        right.backward()
        memory = torch.cat([others, torch.tensor([0.3, -2.0], dtype=torch.float64)])
        log_weights = torch.tensor([0.0] * len(others) + [0.0, -1.0])
        plain, weighted, grad = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(plain, right.detach())
        torch.testing.assert_close(grad, pred.grad)
        expected = bmc_loss(pred.detach(), target, 0.5, memory=memory, memory_log_weights=log_weights)
        torch.testing.assert_close(weighted, expected)
