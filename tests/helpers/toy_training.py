"""A training of milliseconds with the form of ours: what the emulator claims can be compared with what torch does."""

from __future__ import annotations

import math

import torch
from transformers import get_scheduler

from isaerft_sweep.search.emulator import Anchor, Recipe


class Toy:
    """A loss with curvature and its own batches, of a vector v = b @ decoder, trained by torch."""

    def __init__(self, latents: int = 40, width: int = 12, steps: int = 24) -> None:
        random = torch.Generator().manual_seed(1)
        self.decoder = torch.randn(latents, width, generator=random) / 6
        # batches pull in about the same direction, as pairs with one preference do; the NLL's in part in another one
        preference, fluency = torch.nn.functional.normalize(torch.randn(2, width, generator=random))
        noise = 0.03 * torch.randn(2, steps, width, generator=random)
        self.nll = noise[0] - 0.4 * preference - 0.6 * fluency
        self.odds = noise[1] - preference
        self.steps = steps

    def parts(self, v: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        nll = torch.nn.functional.softplus(v @ self.nll[step]) + 0.02 * (v**2).sum()
        return nll, -torch.nn.functional.logsigmoid(-v @ self.odds[step])

    def gain(self, v: torch.Tensor) -> float:
        return float(torch.tanh(-v @ self.odds.mean(0) / 4) - 0.01 * (v**2).sum())

    def train(self, recipe: Recipe) -> Anchor:
        b = torch.nn.Parameter(torch.zeros(len(self.decoder)))
        optimizer = torch.optim.AdamW([b], lr=recipe.learning_rate, weight_decay=0.0)
        schedule = get_scheduler(recipe.schedule, optimizer, recipe.warmup_steps, recipe.steps)
        gradients, vectors = [], []
        for step in range(recipe.steps):
            v = b @ self.decoder
            vectors.append(v.detach())
            parts = [torch.autograd.grad(part, b, retain_graph=True)[0] for part in self.parts(v, step)]
            gradients.append(torch.stack(parts))
            b.grad = parts[0] + recipe.beta * parts[1]
            torch.nn.utils.clip_grad_norm_([b], recipe.max_grad_norm or math.inf)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            if recipe.l1:
                b.data = torch.nn.functional.softshrink(b.data, rate * recipe.l1)
        vectors.append((b @ self.decoder).detach())
        seen = torch.stack(vectors)
        evaluations = {
            step: {"eval/log_odds_chosen": self.gain(seen[step]), "eval/kl_base": 0.01 * float((seen[step] ** 2).sum())}
            for step in {0, *(part * recipe.steps // 4 for part in (1, 2, 3, 4))}
        }
        return Anchor(recipe, torch.stack(gradients).numpy(), seen.numpy(), (seen @ self.decoder.T).numpy(), evaluations)
