"""`UnlearnTrainer`: a `SharpTrainer` whose loss is an unlearning objective, with a method for each of its terms."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from hf_sharp._engine.terms import part_of, term_of
from hf_sharp._integrations.labels import shifts_labels
from hf_sharp._integrations.record import record_of
from hf_sharp._integrations.trainer import SharpTrainer
from hf_sharp._methods import Sum
from hf_sharp._presets.config import MethodLike, read_record
from hf_sharp._tensors.vector import ParamVector
from hf_sharp.unlearning._data import EpochCallback
from hf_sharp.unlearning._objectives.models import Models
from hf_sharp.unlearning._objectives.names import ObjectiveLike, read_objective
from hf_sharp.unlearning._reference import fingerprint, place, reference_for
from hf_sharp.unlearning._smoothing import objective_record, smoothing_of, sum_of, unlearning_columns

RECORD_NAME = "unlearn_config.json"


class UnlearnTrainer(SharpTrainer):
    """Descends an objective of named terms, such as NPO on `forget` and cross-entropy on `retain`.

    Batches are dicts of batches, {"forget": {...}, "retain": {...}}; their columns are those of
    `unlearning/_objectives/base.py`. Each term is normalised over its own tokens or sequences, in the whole window and
    on all ranks. Logs have the terms' losses, as `loss_forget` and so on, averaged as `loss` is.

    Beyond what `SharpTrainer` overrides: `compute_loss`, `_get_num_items_in_batch`, `prediction_step` and
    `evaluation_loop`. `args.remove_unused_columns` is set to False, since such batches would be emptied else, and
    `EpochCallback` is added, so that a `ForgetRetainDataset` draws other rows to retain in every epoch.

    Args:
        *args: the Trainer's.
        objective: an `Objective`, its name, or a dict of its name under "objective" and its settings.
        method: how the gradient of the forget term is got, in any form that `SharpTrainer` takes; the other terms'
            gradients are plain. A `Sum` says it for every term and is taken as it is. None: plain everywhere.
        reference: what NPO, DPO, RMU and KL terms compare with. None: the model as it stands now, as a frozen copy,
            or for PEFT models as the model with its adapter switched off. A module: that one. "precomputed": none is
            kept, and every batch has the columns that stand for it.
        **kwargs: the Trainer's.

    Raises:
        ValueError: if the objective, the method and the reference do not go together; the message says why.

    Example:
        >>> trainer = UnlearnTrainer(model, args, objective="npo", method="sam", train_dataset=pairs)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        objective: ObjectiveLike,
        method: MethodLike = None,
        reference: nn.Module | str | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = read_objective(objective)
        self._term_losses: dict[str, Tensor] = {}
        self._term_steps = 0
        self._term_counted: set[str] = set()
        self._evaluated: dict[str, Tensor] = {}
        super().__init__(*args, method=sum_of(method, self.objective), **kwargs)
        self.args.remove_unused_columns = False
        self.add_callback(EpochCallback())
        self._refuse_settings()
        module = self._sharp_host.model
        frozen = reference_for(module, self.objective, reference)
        self._adapter_off, self._frozen = frozen is module, None if frozen is module else frozen
        self._mark = None if frozen is None else fingerprint(frozen, module)
        if self._frozen is not None and not self.is_fsdp_enabled:
            place(self._frozen, self.args.device)

    def _refuse_settings(self) -> None:
        reasons = {
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
        }
        for setting, holds in reasons.items():
            if holds:
                raise ValueError(f"The objective is the loss, so {setting} would change nothing. Leave it out.")
        unreached = self.objective.unreached(self._sharp_host.model)
        if unreached and self._sharp_host.ranks > 1:
            raise ValueError(
                f"{self.objective!r} gives {len(unreached)} trainable parameters no gradient, {unreached[0]} for one, "
                "which DDP takes for an error. Freeze them with requires_grad_(False)."
            )

    @property
    def _models(self) -> Models:
        module = self._sharp_host.model
        takes_labels = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        frozen = module if self._adapter_off else self._frozen
        return Models(module, module, shifts_labels(module), frozen, lambda: self.accelerator.autocast(), takes_labels)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._term_losses, self._term_steps, self._term_counted = {}, 0, set()
        if self._frozen is not None and self._sharp_host.sharded:
            fsdp2_prepare_model(self.accelerator, self._frozen)  # a second call does nothing
        return super()._inner_training_loop(*args, **kwargs)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The Trainer's, with what the reference says of the rows, computed once for all passes of the step."""
        return super().get_batch_samples(map(self._prepared, epoch_iterator), *args, **kwargs)

    def _prepared(self, batch: Any) -> dict[str, Any]:
        parts: dict[str, Any] = {name: self._prepare_input(part_of(batch, name)) for name in self.objective.terms}
        terms = self.objective.terms.items()
        return {**batch, **{name: term.prepared(parts[name], self._models) for name, term in terms}}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """How many units the present term has in these batches, on all ranks; counted once a window."""
        name = term_of(batch_samples[0]) if batch_samples else None
        if name is None:
            return None  # of a batch of several terms; each is counted when its turn comes
        term = self.objective.terms[name]
        units = torch.stack([term.units(part, self._models).sum() for part in batch_samples]).sum()
        count = self.accelerator.reduce(units.to(device), reduction="sum")
        self._refuse_nothing(name, count)
        return count

    def _refuse_nothing(self, name: str, count: Any) -> None:
        if name in self._term_counted:
            return
        self._term_counted.add(name)  # once a training, since it waits for the device
        if int(count) == 0:
            raise ValueError(
                f"In the first step's batches no label of the term '{name}' counts: all are -100, or stand where "
                "nothing predicts them. Its rows need labels other than -100 after the prompt."
            )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the term that is being passed through; outside of terms, the Trainer's loss.

        Args:
            model: the model, wrapped for training.
            inputs: the term's part of a batch.
            return_outputs: whether to return the model's outputs too.
            num_items_in_batch: the term's units in the window; None for a mean over these inputs.

        Returns:
            The loss, such that what the Trainer makes of it adds up, over the window, to the window's loss.
        """
        name = term_of(inputs)
        if name is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        models, term = self._models.called(model), self.objective.terms[name]
        losses, outputs = term.losses(inputs, models)
        if num_items_in_batch is None:
            loss = losses.sum() / term.units(inputs, models).sum().clamp_min(1)
        else:
            factor = self._sharp_host.ranks * self._sharp_host.divisor_for(num_items_in_batch)  # which divide it later
            loss = losses.sum() * factor / num_items_in_batch.clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    # --- the step ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in `SharpTrainer`; after a window's last micro-batch, the terms' losses are noted and looked at.

        Args:
            model: the model, wrapped for training.
            inputs: the micro-batch.
            num_items_in_batch: nothing, for batches of several terms.

        Returns:
            The micro-batch's loss, as the Trainer logs it.
        """
        stepper = self._sharp_stepper
        assert stepper is not None
        if not stepper.expects_more:
            inputs = self._prepared(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if stepper.losses:
            losses, stepper.losses = stepper.losses, {}
            self._refuse_divergence(losses)
            for name, value in losses.items():
                self._term_losses[name] = self._term_losses[name] + value if name in self._term_losses else value
            self._term_steps += 1
        return loss

    def _refuse_divergence(self, losses: Mapping[str, Tensor]) -> None:
        watched = list(losses.values())
        facts = self._sharp_host.facts()
        if not facts.skips_overflows:  # with a scaler, an overflow now and then is how it works
            watched.append(ParamVector(p.grad for p in facts.parameters.values()).norm())
        device = watched[0].device
        if bool(torch.stack([value.to(device, torch.float32) for value in watched]).isfinite().all()):
            return
        step, said = self.state.global_step + 1, ", ".join(f"{n} {v.item():.4g}" for n, v in losses.items())
        self._sharp_host.model.zero_grad()
        raise FloatingPointError(
            f"Unlearning has diverged: at step {step} a loss or the gradient is not finite ({said}). The model holds "
            f"the weights of step {step - 1}, and checkpoints are as they were. Gradient ascent has no lower bound: "
            "take fewer steps, a smaller learning rate, max_nll=..., a larger retain_weight, or a bounded objective "
            "such as NPO."
        )

    # --- logs and evaluation -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the mean of each term's loss since the last log."""
        if self._term_losses and "loss" in logs:
            names, values = list(self._term_losses), list(self._term_losses.values())
            means: Any = self.accelerator.reduce(torch.stack(values).float() / self._term_steps, reduction="mean")
            logs.update({f"loss_{name}": mean for name, mean in zip(names, means.tolist(), strict=True)})
            self._term_losses, self._term_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """The objective's loss of a batch of named terms; of other batches, what the Trainer makes of them.

        Args:
            model: the model.
            inputs: a batch.
            prediction_loss_only: the Trainer's; batches of named terms have neither logits nor labels in any case.
            *args: the Trainer's.
            **kwargs: the Trainer's.

        Returns:
            The loss, the logits and the labels.
        """
        if not all(isinstance(inputs.get(name), Mapping) for name in self.objective.terms):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        models, loss = self._models.called(model), torch.zeros((), device=self.args.device)
        batch = self._prepared(inputs)
        for name, term in self.objective.terms.items():
            with torch.no_grad(), self.compute_loss_context_manager():
                each = term.losses(batch[name], models)[0]
            rows: Any = torch.stack([each, term.units(batch[name], models).to(each)], dim=1)
            if self.accelerator.num_processes > 1:
                rows = self.accelerator.gather_for_metrics(rows)  # without the rows that fill up the last batch
            both = rows.double().sum(dim=0)
            self._evaluated[name] = self._evaluated[name] + both if name in self._evaluated else both
            loss = loss + self.term_weights[name] * both[0] / both[1].clamp_min(1)
        return loss, None, None

    @property
    def term_weights(self) -> dict[str, float]:
        """The weights of the objective's terms."""
        assert isinstance(self.method, Sum)
        return self.method.weights

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with each term's mean loss over the data set, and their weighted sum as the loss."""
        self._evaluated = {}
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = {name: (both[0] / both[1].clamp_min(1)).item() for name, both in self._evaluated.items()}
        if means:
            output.metrics[f"{prefix}_loss"] = sum(self.term_weights[name] * mean for name, mean in means.items())
            output.metrics.update({f"{prefix}_loss_{name}": mean for name, mean in means.items()})
        return output

    # --- what is written and read ------------------------------------------------------------------------------------

    def describe_method(self) -> str:
        """What is descended and how, printed when training starts.

        Returns:
            Two lines: the objective with its reference, and the method.
        """
        kept = "none" if self._frozen is None else "a frozen model"
        reference = "this model with its adapter switched off" if self._adapter_off else kept
        return f"hf_sharp: {self.objective!r}, reference: {reference}.\n{super().describe_method()}"

    def _columns(self) -> dict[str, Any]:
        assert isinstance(self.method, Sum)
        return unlearning_columns(self.method, self.objective)

    def _record(self) -> dict[str, Any]:
        assert isinstance(self.method, Sum)
        smoothing = record_of(smoothing_of(self.method), self._sharp_rounding)
        return {**smoothing, "repr": repr(self.method), "objective": objective_record(self.objective)}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            record = {"objective": repr(self.objective), "reference": self._mark}
            path = Path(output_dir) / RECORD_NAME
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = None if checkpoint is None else Path(checkpoint) / RECORD_NAME
        if path is None or not path.is_file():
            return
        record = read_record(path)
        trained, here = record.get("objective", repr(self.objective)), repr(self.objective)
        if trained != here:
            warnings.warn(f"The checkpoint was trained with {trained}, and goes on with {here}.", stacklevel=2)
        saved = record.get("reference")
        differs = [saved is not None and self._mark is not None and saved != self._mark]
        broadcast_object_list(differs)  # where the first rank alone loads the weights, it alone knows
        if differs[0]:
            raise ValueError(
                f"The reference model is not the one that {checkpoint} was trained against. Build the trainer from "
                "the model as it was before unlearning; train(resume_from_checkpoint=...) loads the later weights."
            )
