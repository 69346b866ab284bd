"""The plain torch loop that trainings are held against, and the batches that both sides see."""

import torch


def first_batches(task, count, rows):
    """The first `count` batches of a task, whole, of `rows` rows."""
    task.encode({}, set())
    stream = task.train.batches(0, slice(0, rows))
    return [next(stream) for _ in range(count)]


def train(parameters, losses, *, lr, decay, warmup=1):
    """What each loss was: AdamW that decays matrices alone, a warm-up, gradients clipped at 1.

    `losses` is read lazily, so that each is of the weights that the step before left.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    seen = []
    for k, loss in enumerate(losses):
        loss.backward()
        for p in parameters:  # torch would skip one that nothing reads, decay too
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (k + 1) / warmup)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def weights(model):
    """Every tensor of a model's state as numpy."""
    return {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}
