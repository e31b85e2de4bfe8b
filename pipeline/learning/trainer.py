"""A transformers Trainer whose loss is a weighted sum of terms, each a global mean.

A learner returns the sum of every term over its micro-batch; the sums are divided by counts over the whole batch (all
accumulation steps and processes), so that neither changes the loss.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pipeline import console, interrupts
from pipeline.errors import UserError
from pipeline.learning import processes
from pipeline.learning.checkpoints import (
    ASIDE,
    StopAtSignal,
    finished,
    is_stopping,
    keeps_up_to,
    step_of,
    whole_checkpoint,
)
from pipeline.learning.finite import require_finite, require_finite_weights
from pipeline.learning.job import Job, Trained, Training
from pipeline.learning.learner import COUNTS, Learner, count
from pipeline.learning.sharing import SharedLoader, in_memory
from pipeline.provenance import seconds_since_start

_SUMS = "sums.safetensors"  # in a checkpoint: what there is of the next point of the training curve


class TermTrainer(Trainer):
    """Trains a Learner; logs and evaluates every term by itself."""

    def __init__(self, what: str, model: Learner, loader: Callable | None = None, **options):
        """what: is trained, as messages call it. loader: makes the batches to train on, see `Training`."""
        super().__init__(model=model, **options)
        self.what, self.loader = what, loader
        self.loss_is_scaled_for_ga = True  # by the counts
        self._logged: dict[str, list[Tensor]] = {}
        self._steps = 0  # optimiser steps since the last log
        self._aside = False  # whether the checkpoint that is being written lies aside

    def get_train_dataloader(self):
        rows, seed, collate = self.train_dataset, self.args.data_seed, self.data_collator
        micro, alone = self.args.per_device_train_batch_size, processes.count() == 1
        if self.loader is None:
            return super().get_train_dataloader() if alone else SharedLoader(in_memory(rows, micro, seed, collate))
        parts, workers = self.args.gradient_accumulation_steps, self.args.dataloader_num_workers
        loader = self.loader(rows, micro * parts, seed, collate, workers, parts)
        return loader if alone else SharedLoader(loader)

    def get_eval_dataloader(self, eval_dataset=None):
        if processes.count() == 1:
            return super().get_eval_dataloader(eval_dataset)
        size, rows = self.args.per_device_eval_batch_size, self.eval_dataset if eval_dataset is None else eval_dataset
        return SharedLoader(DataLoader(rows, size, collate_fn=self.data_collator))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._steps += 1
        counts = sum(count(batch, self._learner.terminal) for batch in batches).to(device)
        return batches, processes.summed(counts)

    @property
    def _learner(self) -> Learner:
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counts = count(inputs, self._learner.terminal) if num_items_in_batch is None else num_items_in_batch
        loss, sums = model(counts, **inputs)
        for name, mean in self._learner.means.items():
            size = counts[COUNTS.index(mean.over)].clamp_min(1)
            self._logged.setdefault(name, []).append(sums[name] / size)
        shares = {name: values[-1] for name, values in self._logged.items()}
        require_finite(loss.detach(), f"{self._at(1)}: the loss", shares)
        loss = loss * processes.count()  # gradients are averaged over them
        return (loss, sums) if return_outputs else loss

    def _at(self, further: int) -> str:
        return f"{self.what}, step {self.state.global_step + further}"

    def log(self, logs, start_time=None, **options):
        if "loss" in logs and self._logged:
            # Every micro-batch logged its share of its step's mean.
            shares = {name: torch.stack(values).sum() for name, values in self._logged.items()}
            logs |= {name: float(processes.summed(share) / self._steps) for name, share in shares.items()}
            self._logged, self._steps = {}, 0
        super().log(logs, start_time, **options)

    def _clip_grad_norm(self, model):
        """Each of the learner's models by its own norm, so that one does not shrink the steps of another."""
        norms = [
            self.accelerator.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)
            for part in self._learner.children()
            if any(True for _ in part.parameters())
        ]
        require_finite(torch.stack(norms), f"{self._at(1)}: the gradient")
        return max(norms)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Exact held-out means of all terms and of the loss."""
        means = held_out(self._learner, self.get_eval_dataloader(eval_dataset), self.args.device)
        parts = {name: mean for name, mean in means.items() if name != "loss"}
        require_finite(torch.tensor(means["loss"]), f"{self._at(0)}: the held-out loss", parts)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model, trial):
        """The Trainer's own. A checkpoint between two regular steps lies aside, and never counts as the best.

        So a run that is resumed from it ends as if it had not been interrupted.
        """
        step = self.state.global_step
        self._sums = self._sums_so_far()
        self._aside = step % self.args.save_steps != 0 and step < self.args.max_steps
        if self._aside:
            self.state.best_global_step = None  # best_model_checkpoint is the best of those that have a checkpoint
        super()._save_checkpoint(model, trial)
        if not self._aside:
            shutil.rmtree(Path(self.args.output_dir) / ASIDE, ignore_errors=True)
        self._aside = False

    def _get_output_dir(self, trial):
        run = super()._get_output_dir(trial)
        return str(Path(run) / ASIDE) if self._aside else run

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self._learner, str(folder / "model.safetensors"))
        safetensors.torch.save_file(self._sums, str(folder / _SUMS))

    def _sums_so_far(self) -> dict[str, Tensor]:
        """Of all processes."""
        sums = {f"term {name}": processes.summed(torch.stack(values)).cpu() for name, values in self._logged.items()}
        loss = processes.summed(self._tr_loss).cpu() / processes.count()
        return sums | {"loss": loss, "steps": torch.tensor([self._steps, self._globalstep_last_logged])}

    def load_sums(self, checkpoint: str) -> None:
        """Go on in the middle of a point of the training curve; the Trainer itself would begin a new one."""
        sums = safetensors.torch.load_file(str(Path(checkpoint) / _SUMS))
        sums = {name: value.to(self.args.device) for name, value in sums.items()}
        self._tr_loss = sums.pop("loss")
        self._steps, self._globalstep_last_logged = sums.pop("steps").tolist()
        share = 1.0 if processes.rank() == 0 else 0.0
        self._logged = {name.removeprefix("term "): list(values * share) for name, values in sums.items()}

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        processes.wait()  # the state, which makes a checkpoint whole, is written after it

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        safetensors.torch.load_model(self._learner, str(Path(resume_from_checkpoint) / "model.safetensors"))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@torch.no_grad()
def held_out(learner: Learner, batches, device) -> dict[str, float]:
    """Means of all terms and of the loss over batches."""
    was_training = learner.training
    learner.eval()
    sums, counts = {}, torch.zeros(len(COUNTS), dtype=torch.float64)
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        size = count(batch, learner.terminal)
        for name, value in learner(size, **batch)[1].items():
            sums[name] = sums.get(name, 0.0) + value.double().cpu()
        counts += size.cpu()
    learner.train(was_training)
    sums, counts = {name: processes.summed(value) for name, value in sums.items()}, processes.summed(counts)
    means = {
        name: float(sums[name] / counts[COUNTS.index(mean.over)].clamp_min(1)) for name, mean in learner.means.items()
    }
    counted = {name: mean.weight for name, mean in learner.means.items() if not mean.auxiliary}
    return means | {"loss": sum(weight * means[name] for name, weight in counted.items())}


class _Watch(TrainerCallback):
    """The project's progress bar in place of the Trainer's, and how long the first step took.

    The Trainer itself, resumed, would log as often as the checkpoint says, and set the sums of a point to zero.
    """

    seconds_to_first_step: float | None = None  # since the process began: what a cached experiment waits for

    def __init__(self, trainer: TermTrainer, checkpoint: str | None, advance):
        self.trainer, self.checkpoint, self.advance = trainer, checkpoint, advance

    def on_train_begin(self, args, state, control, **_):
        state.logging_steps = args.logging_steps
        if self.checkpoint:
            self.trainer.load_sums(self.checkpoint)
        self.advance(state.global_step)

    def on_step_begin(self, args, state, control, **_):
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = seconds_since_start()

    def on_step_end(self, args, state, control, **_):
        self.advance(1)

    def on_log(self, args, state, control, logs=None, **_):
        shown = {name: logs[name] for name in ("loss", "eval_loss") if name in (logs or {})}
        if shown:
            self.advance(0, note="  ".join(f"{name} {value:.4g}" for name, value in shown.items()))


def run(job: Job, training: Training | None = None) -> Trained:
    """Train in this process. training: what the job would make, where the caller has made it already.

    Where processes were started together (see `launch`) each of them calls this.

    A signal ends it after the running step, with a checkpoint of that step: then `Interrupted` is raised. Raises
    UserError where loss, gradients or weights are no longer finite.
    """
    training = training or job.training()
    _require_trackers(job.report_to)
    checkpoint, learner, optimisation = whole_checkpoint(job.run), training.learner, job.optimisation
    if checkpoint:
        console.say(f"{job.what}: resuming from {checkpoint}")
        keeps_up_to(step_of(checkpoint), job.what)
        if (history := finished(learner, checkpoint, optimisation.steps)) is not None:
            require_finite_weights(learner, job.what)
            return Trained(learner, history)
    if "tensorboard" in job.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.run.parents[1] / "logs" / job.run.name))
    if job.train.gradient_checkpointing:
        _checkpoint_blocks(learner)
    evaluate_every = job.evaluate_every if training.held_out else None
    arguments = TrainingArguments(
        output_dir=str(job.run),
        max_steps=optimisation.steps,
        per_device_train_batch_size=optimisation.batch_size // optimisation.accumulation,
        gradient_accumulation_steps=optimisation.accumulation,
        per_device_eval_batch_size=optimisation.batch_size,
        learning_rate=optimisation.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=job.seed,
        data_seed=job.seed,
        logging_steps=job.log_every,
        logging_nan_inf_filter=False,  # such a loss is an error
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every,
        save_strategy="steps" if job.save_every else "no",
        save_steps=job.save_every or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(job.best),
        metric_for_best_model=f"eval_{job.best}" if job.best else None,
        greater_is_better=False,
        remove_unused_columns=False,
        report_to=job.report_to,
        disable_tqdm=True,
        dataloader_num_workers=job.workers,
        bf16=optimisation.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if processes.launched() > 1 and not torch.cuda.is_available() else None,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would multiply the batch
    trainer = TermTrainer(
        job.what,
        learner,
        args=arguments,
        train_dataset=training.rows,
        eval_dataset=training.held_out or None,
        data_collator=training.collate,
        callbacks=[EarlyStoppingCallback(job.patience)] if job.patience else [],
        loader=training.loader,
    )
    torch.manual_seed(job.seed + processes.rank())  # dropout of its own for each process
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StopAtSignal(job.what))
    stopping = f"{job.what}: interrupted; the step that is running is finished and kept in a checkpoint"
    try:
        with console.progress(job.what, optimisation.steps) as advance, interrupts.deferred(stopping):
            watch = _Watch(trainer, checkpoint, advance)
            trainer.add_callback(watch)
            trainer.train(resume_from_checkpoint=checkpoint)
            if is_stopping():  # also where the signal came to another process
                raise interrupts.interrupted()
    except Exception as error:
        if interrupts.noted():  # a process of the loader's got the signal too
            raise interrupts.interrupted() from error
        raise
    learner.to("cpu")
    require_finite_weights(learner, job.what)
    return Trained(learner, trainer.state.log_history, watch.seconds_to_first_step)


def _checkpoint_blocks(learner: Learner) -> None:
    """Have every language model, or backbone, of a learner keep what its blocks get, and compute the rest again."""
    seen: list[str] = []
    for name, module in learner.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in seen):
            module.gradient_checkpointing_enable({"use_reentrant": False})
            seen.append(name)


def _require_trackers(names: Sequence[str]) -> None:
    """Raises UserError for trackers that are unknown or not installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"report_to: unknown tracker '{name}'; known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to: {name} is not installed: pip install {name}")


def seed_everything(seed: int) -> None:
    """One seed for weights, dropout and shuffling."""
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
