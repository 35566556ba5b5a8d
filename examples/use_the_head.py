"""The fused head in a plain PyTorch loop: DPO on a GRU, with neither the trainer nor transformers.

    python examples/use_the_head.py

A prompt is a word of random tokens. The chosen completion repeats it, the rejected completion is another word. The
head computes log-probs, the loss and its gradients tile by tile, so the (tokens, vocabulary) logits never exist whole.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from cpt_kernels import Pairs, build_loss, linear_logprobs, linear_preference_loss

VOCAB, HIDDEN, LENGTH, BETA = 2000, 64, 4, 0.1


class Decoder(nn.Module):
    """Turns tokens (B, T) into hidden rows (B, T, H). ``head`` is the weight of the output layer, (V, H)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Parameter(0.02 * torch.randn(VOCAB, HIDDEN))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens))[0]


def draw_batch(pairs: int) -> Tensor:
    """Returns sequences (2 * pairs, 2 * LENGTH): prompt and chosen completion, prompt and rejected completion, ..."""
    words = torch.randint(50, (pairs, 2, LENGTH))
    prompts = words[:, :1].expand(-1, 2, -1)
    return torch.cat([prompts, words], 2).flatten(0, 1)


def completion_rows(model: Decoder, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the hidden rows that predict the completions' tokens, (N, H), and these tokens, (N,)."""
    hidden = model(sequences[:, :-1])[:, LENGTH - 1 :]
    return hidden.reshape(-1, HIDDEN), sequences[:, LENGTH:].reshape(-1)


def pairs_of(count: int, ref_logps: Tensor) -> Pairs:
    """Returns the layout of ``count`` pairs: completion 2i is chosen over completion 2i + 1."""
    chosen = 2 * torch.arange(count)
    return Pairs(
        cu_completions=LENGTH * torch.arange(2 * count + 1),
        completion_lengths=[LENGTH] * (2 * count),
        chosen=chosen,
        rejected=chosen + 1,
        sft_targets=chosen,
        pair_blocks=[(2, 1)] * count,  # two completions and one pair per block
        ref_logps=ref_logps,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=32, help="per step")
    options = parser.parse_args()

    torch.manual_seed(0)
    policy, reference = Decoder(), Decoder()
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    loss = build_loss("sigmoid", beta=BETA)
    for step in range(options.steps):
        sequences = draw_batch(options.pairs)
        with torch.no_grad():
            rows, targets = completion_rows(reference, sequences)
            ref_logps = linear_logprobs(rows, reference.head, targets).logps.view(-1, LENGTH).sum(1)  # (S,)
        rows, targets = completion_rows(policy, sequences)
        pairs = pairs_of(options.pairs, ref_logps)
        out = linear_preference_loss(rows, policy.head, targets, pairs, loss)
        (out.loss / options.pairs).backward()  # out.loss is a sum over the pairs
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps - 1:
            margins = BETA * (out.completion_logps - ref_logps).view(-1, 2).diff(dim=1).neg()
            accuracy = (margins > 0).float().mean()
            print(f"step {step:3}  loss {out.loss.item() / options.pairs:.4f}  accuracy {accuracy.item():.2f}")


if __name__ == "__main__":
    main()
