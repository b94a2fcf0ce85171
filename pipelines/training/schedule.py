"""The learning rate of every step, from the scheduler that training uses, drawn as text."""

from collections.abc import Sequence

from pipelines.recipe import Recipe

WIDTH, HEIGHT = 56, 6
BARS = " ▁▂▃▄▅▆▇█"


def warmup_steps(recipe: Recipe, steps: int) -> int:
    """Return the steps of warmup as TrainingArguments.get_warmup_steps does: below 1 a share."""
    given = recipe.training.warmup_steps
    return int(given) if given >= 1 else -int(-steps * given // 1)


def schedule_problems(recipe: Recipe, steps: int) -> list[str]:
    """Say what is odd about warmup and schedule over a number of steps."""
    training, warmup = recipe.training, warmup_steps(recipe, steps)
    problems = []
    if warmup >= steps == 1 and training.lr_scheduler_type != "constant":
        problems.append(
            "training.warmup_steps: 1 of 1 steps are warmup, which begins at 0: nothing is "
            "learned; set it to 0, or raise max_steps or num_train_epochs"
        )
    elif warmup >= steps:
        problems.append(
            f"training.warmup_steps: {warmup} of {steps} steps are warmup, so that learning_rate "
            f"{training.learning_rate:g} is never reached; set it below 1 for a share, e.g. 0.03"
        )
    elif warmup > steps / 2:
        problems.append(
            f"training.warmup_steps: {warmup} of {steps} steps are warmup, more than half"
        )
    if warmup and training.lr_scheduler_type == "constant":
        problems.append(
            f"training.warmup_steps: {warmup} steps, but lr_scheduler_type constant has no "
            "warmup; use constant_with_warmup"
        )
    return problems


def learning_rates(recipe: Recipe, steps: int, at: Sequence[int]) -> list[float]:
    """Return the learning rate at some steps, from transformers.get_scheduler as Trainer calls it.

    Step 0 is the first. Imports torch.
    """
    import torch
    from transformers import get_scheduler

    training = recipe.training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(recipe, steps),
        num_training_steps=steps,
    )
    factor = scheduler.lr_lambdas[0]
    return [training.learning_rate * factor(step) for step in at]


def draw_schedule(recipe: Recipe, steps: int) -> list[str]:
    """Return the learning rate over all steps as lines of text, with the steps that matter."""
    columns = [round(i * (steps - 1) / (WIDTH - 1)) for i in range(WIDTH)]
    warmup = warmup_steps(recipe, steps)
    highest = min(warmup, steps - 1)
    *rates, first, peak, last = learning_rates(recipe, steps, [*columns, 0, highest, steps - 1])
    top = max(*rates, peak)
    lines = []
    for level in range(HEIGHT, 0, -1):
        cells = (max(0.0, min(1.0, rate / (top or 1.0) * HEIGHT - (level - 1))) for rate in rates)
        label = f"{top:8.1e}" if level == HEIGHT else f"{0:8g}" if level == 1 else " " * 8
        lines.append(f"{label} |" + "".join(BARS[round(cell * 8)] for cell in cells))
    lines.append(f"{'':8} +{'-' * WIDTH}")
    lines.append(f"{'':9} 1{f'{steps:,}'.rjust(WIDTH - 1)}  steps")
    lines.append(
        f"{'':9} first {first:.1e}, warmup {warmup:,} steps, peak {peak:.1e} at step "
        f"{highest + 1:,}, last {last:.1e}, {recipe.training.lr_scheduler_type}"
    )
    return lines
