"""The smallest policies that preference and reinforcement learning can train: a table of logits, in plain torch.

They give the events that a run of DPO or GRPO gives, with measures that are computed and not made up.
"""

import math

import torch

from welltuned.training.events import Updated


def updated(step, total, loss, norm, rate, measures):
    return Updated(
        step=step, total_steps=total, loss=loss, learning_rate=rate, grad_norm=norm, tokens=100, supervised_tokens=100,
        tokens_per_second=1e5, epoch=step / total, memory_bytes=0, seconds_left=0.0, evaluation_follows=False,
        measures=measures,
    )  # fmt: skip


def preference(rate, updates=60, beta=0.1, pairs=64, tokens=12, seed=0):
    """DPO of a table [context, token] on answers of several tokens; the chosen ones prefer token 0."""
    draw = torch.Generator().manual_seed(seed)
    reference = torch.randn(8, 16, generator=draw)
    table = reference.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=rate)
    context = torch.randint(8, (pairs, tokens), generator=draw)
    rejected = torch.randint(1, 16, (pairs, tokens), generator=draw)
    chosen = torch.where(torch.rand(pairs, tokens, generator=draw) < 0.5, 0, rejected.roll(1, 0))

    def logps(of, rows, answers):
        return of.log_softmax(-1)[context[rows], answers[rows]].sum(-1)

    for step in range(1, updates + 1):
        rows = torch.randint(pairs, (8,), generator=draw)
        won, lost = (beta * (logps(table, rows, a) - logps(reference, rows, a)) for a in (chosen, rejected))
        loss = -torch.nn.functional.logsigmoid(won - lost).mean()
        optimizer.zero_grad()
        loss.backward()
        measures = {
            "rewards/chosen": won.mean().item(),
            "rewards/rejected": lost.mean().item(),
            "rewards/accuracies": float((won > lost).float().mean()),
            "rewards/margins": (won - lost).mean().item(),
        }
        yield updated(step, updates, loss.item(), float(table.grad.norm()), rate, measures)
        optimizer.step()


def rollouts(rate, reward, updates=100, prompts=8, group=8, length=6, limit=None, kl_of=None, seed=0):
    """GRPO of a table [prompt, token]: answers of up to `length` tokens, of which the last ends one.

    `reward(prompt, answer)` judges an answer; `limit` cuts answers there.
    """
    draw = torch.Generator().manual_seed(seed)
    vocabulary, limit = 8, limit or length
    end = vocabulary - 1
    reference = 0.1 * torch.randn(prompts, vocabulary, generator=draw)
    table = reference.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=rate)
    for step in range(1, updates + 1):
        logps = table.log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1).mean()
        kl = (logps.exp() * (logps - reference.log_softmax(-1))).sum(-1).mean()
        tokens = torch.multinomial(logps.exp().repeat_interleave(group, 0), limit, replacement=True, generator=draw)
        ends = tokens == end
        lengths = torch.where(ends.any(1), ends.float().argmax(1) + 1, limit)
        rows = torch.arange(prompts).repeat_interleave(group)
        answers = [t[: int(n)].tolist() for t, n in zip(tokens, lengths, strict=True)]
        rewards = torch.tensor([reward(int(p), a) for p, a in zip(rows, answers, strict=True)]).view(prompts, group)
        spread = rewards.std(1)
        advantage = ((rewards - rewards.mean(1, keepdim=True)) / (spread[:, None] + 1e-4)).flatten()
        kept = (torch.arange(limit) < lengths[:, None]).float()
        chosen = logps[rows].gather(1, tokens)
        loss = -(advantage[:, None] * chosen * kept).sum() / kept.sum()
        optimizer.zero_grad()
        loss.backward()
        measures = {
            "reward": float(rewards.mean()),
            "reward_std": float(spread.mean()),
            "kl": kl.item(),
            "entropy": entropy.item(),
            "completions/mean_length": float(lengths.float().mean()),
            "completions/clipped_ratio": float((~ends.any(1)).float().mean()),
            "frac_reward_zero_std": float((spread < 1e-9).float().mean()),
        }
        assert all(math.isfinite(value) for value in measures.values())
        yield updated(step, updates, loss.item(), float(table.grad.norm()), rate, measures)
        optimizer.step()
