"""The tasks, by name."""

from pipeline.errors import UserError
from pipeline.tasks import arithmetic, gsm8k, metrics, summarisation, translation
from pipeline.tasks.base import Example, Generator, Task

__all__ = ["TASKS", "Example", "Generator", "Task", "get_task"]

TASKS = {
    task.name: task
    for task in (
        Task(
            "arithmetic",
            1,
            (metrics.accuracy(arithmetic.extract),),
            Generator(arithmetic.example, arithmetic.lexicon),
            checked=True,
        ),
        Task("translation", 1, (metrics.bleu(), metrics.chrf()), Generator(translation.example, translation.lexicon)),
        Task(
            "summarisation",
            1,
            tuple(metrics.rouge(name) for name in ("rouge2", "rouge1", "rougeL")),
            Generator(summarisation.example, summarisation.lexicon),
        ),
        Task("gsm8k", 1, (metrics.accuracy(gsm8k.extract),), checked=True),
    )
}


def get_task(name: str) -> Task:
    """Raises UserError with the known names where `name` is none of them."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    return TASKS[name]
