"""The built-in tasks, by name."""

from pipeline.errors import UserError
from pipeline.tasks import arithmetic, metrics, summarisation, translation
from pipeline.tasks.base import Example, Task

__all__ = ["TASKS", "Example", "Task", "get_task"]

TASKS = {
    task.name: task
    for task in (
        Task("arithmetic", 1, arithmetic.example, arithmetic.lexicon, (metrics.accuracy(arithmetic.extract),)),
        Task("translation", 1, translation.example, translation.lexicon, (metrics.bleu(), metrics.chrf())),
        Task(
            "summarisation",
            1,
            summarisation.example,
            summarisation.lexicon,
            tuple(metrics.rouge(name) for name in ("rouge2", "rouge1", "rougeL")),
        ),
    )
}


def get_task(name: str) -> Task:
    """Raises UserError with the known names where `name` is none of them."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    return TASKS[name]
