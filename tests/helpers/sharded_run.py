"""Takes AdamW steps on packed batches, in one process or as a rank of test_sharding.py under FSDP2 or ZeRO.

On a CPU, accelerate replaces both by DDP. So this module shards the model itself, as accelerate does on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.losses import build_loss
from cpt_kernels.model.conditions import gathered
from cpt_kernels.model.packed_model import PackedModel
from tests.helpers.architectures import tiny_model
from tests.helpers.exactness import make_batch, make_rows

MODELS = ("llama", "llama-tied")
STEPS = 20
UNEVEN = 5  # in every fifth step the last rank has no rows


class FullySharded:
    """FSDP2: ``fully_shard`` on layers, head (unless tied) and root, over a mesh of CPUs."""

    def __init__(self, model: nn.Module, offload: bool = False) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
        for layer in model.model.layers:
            fully_shard(layer, **options)
        if not model.config.tie_word_embeddings:
            fully_shard(model.lm_head, **options)
        self.wrapped = fully_shard(model, **options)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        loss.backward()
        gradients = {name: p.grad.full_tensor().clone() for name, p in self.wrapped.named_parameters()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gradients


class ZeRO:
    """DeepSpeed's engine at a ZeRO stage. In stage 3, every parameter is gathered for its module and then freed."""

    def __init__(self, model: nn.Module, stage: int) -> None:
        import deepspeed

        self.wrapped, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # the default is 1
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        self.wrapped.backward(loss)
        gradients = {name: safe_get_full_grad(p).clone() for name, p in self.wrapped.module.named_parameters()}
        self.wrapped.step()
        return gradients


class Alone:
    """One process without sharding."""

    def __init__(self, model: nn.Module) -> None:
        self.wrapped = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.wrapped.named_parameters()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gradients


ENGINES = {
    "alone": Alone,
    "fsdp2": FullySharded,
    "fsdp2 with offload": lambda model: FullySharded(model, offload=True),
    "zero2": lambda model: ZeRO(model, 2),
    "zero3": lambda model: ZeRO(model, 3),
}


def rows_of(step: int, rank: int, world: int) -> list[dict]:
    rows = make_rows("sigmoid", seed=step + 1)
    if world > 1 and step % UNEVEN == UNEVEN - 1:
        return rows if rank == 0 else []
    return rows[rank::world]


def train(engine: str, name: str, rank: int = 0, world: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Returns the mean loss over all ranks' pairs at every step, and the unsharded gradients of the first step."""
    model = tiny_model(name)
    packed = PackedModel(model)
    sharded = ENGINES[engine](model)
    loss = build_loss("sigmoid", beta=0.3)
    losses, first = [], None
    for step in range(STEPS):
        batch = make_batch(rows_of(step, rank, world))
        scores = packed(batch, loss, wrapped=sharded.wrapped)
        total = torch.stack([torch.tensor(float(batch["num_pairs"])), scores.losses.sum()])
        if world > 1:
            dist.all_reduce(total)
        pairs, step_loss = total.tolist()
        gradients = sharded.step(scores.loss * (world / pairs))  # the engines average gradients over ranks
        first = gradients if first is None else first
        losses.append(step_loss / pairs)
    return losses, first


def prove(engine: str) -> dict[str, object]:
    """Proves models that the engine has sharded already. Returns whether each is packed, and log-probs of a batch."""
    from tests.model.test_proof import SEQUENCES, HiddenConvolution, OwnAttention, alone, build, faint

    models = {"llama": tiny_model("llama"), "faint": faint(tiny_model("llama")).float()}
    models |= {"attention": build(OwnAttention), "convolution": build(HiddenConvolution)}
    found: dict[str, object] = {}
    for name, model in models.items():
        expected = alone(model).detach()
        if engine == "fsdp2":
            FullySharded(model)
        else:
            import deepspeed

            deepspeed.zero.Init(module=model)
        before = [
            p.detach().to_local().clone() if engine == "fsdp2" else p.ds_tensor.clone() for p in model.parameters()
        ]
        packed = PackedModel(model)
        after = [p.detach().to_local() if engine == "fsdp2" else p.ds_tensor for p in model.parameters()]
        assert all(map(torch.equal, before, after)), "weights have changed"
        packed.agree()
        found[name] = packed.padded
        batch = PackedCollator(padded=packed.padded).pack(SEQUENCES, [], [], [])
        with torch.no_grad(), gathered(model):
            torch.testing.assert_close(packed(batch).tokens.logps, expected, rtol=1e-4, atol=1e-5)
    return found


def _shards(model: nn.Module) -> list[Tensor]:
    parts = (p.ds_tensor if hasattr(p, "ds_tensor") else p.detach().to_local() for p in model.parameters())
    return [part.clone() for part in parts]


def take_over(rank: int) -> tuple[bool, str]:
    """The first rank alone has weights. Returns what a rank decides for a model that must run padded rows."""
    from tests.model.test_proof import OwnAttention, build

    model = build(OwnAttention) if rank == 0 else build(OwnAttention).to("meta")
    packed = PackedModel(model)
    packed.agree()
    plain = PackedModel(tiny_model("llama") if rank == 0 else tiny_model("llama").to("meta"))
    plain.agree()
    assert packed.padded and packed.options == plain.options
    return plain.padded, plain.model.config._attn_implementation


def main(folder: Path, engines: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    PartialState(cpu=True)
    for engine in [name for name in engines if name in ("fsdp2", "zero3")]:
        torch.save(prove(engine), folder / f"{engine}-proof-{rank}.pt")
    torch.save(take_over(rank), folder / f"taken-over-{rank}.pt")
    for engine in engines:
        for model in MODELS:
            torch.save(train(engine, model, rank, world), folder / f"{engine}-{model}-{rank}.pt")
