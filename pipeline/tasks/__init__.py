"""The tasks, by name.

To add one: a module in `shipped` beside the others, with what makes its examples (`Generator`) or how its answers are
checked; its `Task` in the table below; its name in `Prepare.task` (pipeline/params/data.py); and params.yaml and
docs/parameters.md made anew. tests/tasks/test_tasks.py asks the same of every generator in the table.
"""

from pipeline.errors import UserError
from pipeline.tasks import metrics
from pipeline.tasks.base import Example, Generator, Task
from pipeline.tasks.shipped import arithmetic, gsm8k, summarisation, translation

__all__ = ["TASKS", "Example", "Generator", "Task", "get_task"]


def _tasks(stemmer: bool) -> dict[str, Task]:
    strict = metrics.accuracy(gsm8k.strict, gsm8k.target, rule="lm-eval gsm8k 3.0|filter:strict-match")
    rule = "lm-eval gsm8k 3.0|filter:flexible-extract"
    flexible = metrics.accuracy(gsm8k.flexible, gsm8k.target, "flexible", rule)
    rouges = tuple(metrics.rouge(name, stemmer) for name in ("rouge2", "rouge1", "rougeL"))
    sums = Generator(arithmetic.example, arithmetic.lexicon)
    tasks = (
        Task("arithmetic", 1, (metrics.accuracy(arithmetic.extract),), sums, checked=True),
        Task("translation", 2, (metrics.bleu(), metrics.chrf()), Generator(translation.example, translation.lexicon)),
        Task("summarisation", 2, rouges, Generator(summarisation.example, summarisation.lexicon)),
        Task("gsm8k", 2, (strict, flexible), checked=True),
    )
    return {task.name: task for task in tasks}


TASKS = _tasks(stemmer=True)


def get_task(name: str, stemmer: bool = True) -> Task:
    """A task; `stemmer`: whether its ROUGE stems. Raises UserError with the known names for an unknown one."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    return TASKS[name] if stemmer else _tasks(stemmer)[name]
