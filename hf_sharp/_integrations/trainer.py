"""`SharpTrainer`: the transformers `Trainer` whose gradient comes from a sharpness-aware method."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_compiled_module
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from hf_sharp._engine.landscape import Landscape
from hf_sharp._engine.rows import SAMPLE_INDEX
from hf_sharp._engine.terms import like, term_of
from hf_sharp._integrations.attachment import Attachment, base_of
from hf_sharp._integrations.notes import seen_weights, uncompiled
from hf_sharp._integrations.record import card_section, columns_of, differences, record_of, tell_trackers
from hf_sharp._integrations.refusals import check_method, refuse, refuse_line_search
from hf_sharp._integrations.search import searched, settings_apart
from hf_sharp._integrations.signatures import seq2seq_arguments, shown_as, trainer_arguments
from hf_sharp._integrations.states import load_state, read_state, state_of
from hf_sharp._integrations.stepper import Stepper
from hf_sharp._integrations.trainer_host import TrainerHost
from hf_sharp._methods.base import added_by
from hf_sharp._methods.own import check_class
from hf_sharp._presets.config import MethodLike, read_method, read_record
from hf_sharp._tensors.types import Batch, is_mapping

logger = logging.getLogger(__name__)
CONFIG_NAME, STATE_NAME = "sharp_config.json", "sharp_state.safetensors"


if TYPE_CHECKING:
    Base = Trainer  # what the mixin's `super()` finds, once it is mixed into a Trainer
else:
    Base = object


class SharpMixin(Base):
    """Puts a sharpness-aware method into a Trainer; the class it is mixed into comes after it.

    It overrides `get_batch_samples` (to see the accumulation window), `training_step` (to run the method at the
    window's last micro-batch, through the Trainer's own `training_step`), `create_optimizer` (for methods that have
    parameters of their own or act right before an update), and, for what is written and read around them,
    `_inner_training_loop`, `_hp_search_setup`, `floating_point_ops`, `log`, `save_model`,
    `_save_optimizer_and_scheduler`, `_load_optimizer_and_scheduler` and `create_model_card`. Clipping, scaler,
    optimizer, scheduler, logging and saving stay the Trainer's.

    Its arguments are those of `SharpTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        method: MethodLike = None,
        rounding: str = "stochastic",
        check_repeats: bool = True,
        **kwargs: Any,
    ) -> None:
        self._sharp_rounding, self._sharp_check = rounding, check_repeats
        self._sharp_given = self.method, self.sharp_config = read_method(method)
        self._sharp_stepper: Stepper | None = None
        self._sharp_announced = self._sharp_warned = False
        super().__init__(*args, **kwargs)
        self._sharp_host = TrainerHost(self, super().training_step)
        self._sharp_attachment = Attachment()
        self._sharp_host.added = self._sharp_attachment.parameters
        if self.method is not None:
            check_class(self.method)
            refuse(self, self.method)
            self._sharp_stepper = Stepper(self.method, self._sharp_host, rounding, check_repeats)
            if self.model is not None:
                self._check_method()

    # --- the step ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The Trainer's, remembering the window."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._sharp_stepper is not None:
            self._sharp_stepper.begin_window(batches)
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's for each micro-batch, and the rest of the method at the window's last one.

        Args:
            model: the model, wrapped for training.
            inputs: the micro-batch, the next of the remembered window; without one, a window of its own.
            num_items_in_batch: the window's number of items.

        Returns:
            The micro-batch's loss, as the Trainer logs it.
        """
        stepper = self._sharp_stepper
        if stepper is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._sharp_host.wrapped, self._sharp_host.items = model, num_items_in_batch
        measuring = self._measures_next_step()
        if not stepper.expects_more:
            return stepper.single_micro_batch(inputs, measuring)
        return stepper.micro_batch(inputs, self.accelerator.sync_gradients, measuring)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """The Trainer's, without the rows' numbers, which are for the method and not for the model."""
        given = inputs
        if self._knows_samples() and is_mapping(given) and SAMPLE_INDEX in given:
            inputs = {key: value for key, value in given.items() if key != SAMPLE_INDEX}
        if term_of(given) is not None:
            inputs = dict(inputs)  # the Trainer rebuilds mappings by their class
        return like(super()._prepare_inputs(inputs), given)

    def _set_signature_columns_if_needed(self) -> None:
        """The Trainer's, keeping the column with the rows' numbers."""
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        assert columns is not None
        if self._knows_samples() and SAMPLE_INDEX not in columns:
            columns.append(SAMPLE_INDEX)

    def _knows_samples(self) -> bool:
        return self.method is not None and any("index" in part.needs for _, part in self.method.named_parts())

    def _measures_next_step(self) -> bool:
        """Whether the step being made is logged, or one of the method's period before that.

        So a method of every tenth step is measured at the sharp one among the last ten, whichever that is.

        Returns:
            True if its metrics are wanted.
        """
        assert self.method is not None
        args, state = self.args, self.state
        step = state.global_step + 1
        if step == 1 and args.logging_first_step:
            return True
        loader, every, rest = self.callback_handler.train_dataloader, 0, state.max_steps
        if args.logging_strategy == "steps":
            every = state.logging_steps
        elif args.logging_strategy == "epoch" and isinstance(loader, Sized):
            every, rest = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1), state.max_steps - step
        return bool(every) and min(-step % every, rest) < self.method.period

    def floating_point_ops(self, inputs: dict[str, Any]) -> Any:
        """The operations of all passes made since the last call, so that FLOs count what was computed: a float."""
        made, self._sharp_host.flops = self._sharp_host.flops, 0.0
        return made or super().floating_point_ops(inputs)

    # --- the start of training ---------------------------------------------------------------------------------------

    def _hp_search_setup(self, trial: Any) -> None:
        """The Trainer's; what a search names `sharp_...` are the method's settings, which the arguments lack."""
        if self.hp_search_backend is None or trial is None:
            return super()._hp_search_setup(trial)
        with settings_apart(self, trial) as (rest, own):
            super()._hp_search_setup(rest)
        self.method, self.sharp_config = searched(self._sharp_given, own)
        self._sharp_stepper, self._sharp_announced = None, False
        if self.method is not None:
            refuse(self, self.method)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.method is None:
            return super()._inner_training_loop(*args, **kwargs)
        self.method.reset()
        self._sharp_stepper = Stepper(self.method, self._sharp_host, self._sharp_rounding, self._sharp_check)
        self._sharp_host.flops, self._sharp_warned = 0.0, False
        self._check_method()
        if not self._sharp_announced and self.is_world_process_zero():
            self._sharp_announced = True
            print(self.describe_method())
        self._describe_arguments()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._sharp_attachment.detach()
            self._sharp_stepper.end()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, joined to the method."""
        optimizer = super().create_optimizer(*args, **kwargs)
        stepper = self._sharp_stepper
        if stepper is not None:
            self._check_method()  # once more, with what the optimizer is known to keep and to train
            refuse_line_search(base_of(self.optimizer))
            values = added_by(stepper.method, Landscape(self._sharp_host))
            around = (stepper.before_update, stepper.after_update)
            self._sharp_attachment.attach(self.optimizer, values, *around)
        return optimizer

    def _check_method(self) -> None:
        assert self.method is not None
        way_out = "Unfreeze some of the model's with requires_grad_(True), or add adapters."
        check_method(self.method, Landscape(self._sharp_host), way_out)

    def describe_method(self) -> str:
        """What the method moves in this model, in one line; printed when training starts.

        Returns:
            The method, its cost, and the number and share of tensors and entries that it moves.
        """
        if self.method is None:
            return "hf_sharp: plain training (no method)."
        landscape = Landscape(self._sharp_host)
        told = [text for _, part in self.method.named_parts() if (text := part.start_note(landscape)) is not None]
        compiled = self.args.torch_compile or (self.model is not None and is_compiled_module(self.model))
        note = f"at {self.method.cost:g} passes a step.{uncompiled(self.method) if compiled else ''}"
        if told:
            return f"hf_sharp: {self.method!r} {told[0]}, {note}"
        sizes = {name: p.numel() for name, p in landscape.facts.parameters.items()}
        moved = self.method.perturbed(landscape)
        entries, everything = round(sum(sizes[name] * share for name, share in moved.items())), sum(sizes.values())
        return (
            f"hf_sharp: {self.method!r} perturbs {len(moved)} of {len(sizes)} trainable tensors "
            f"({entries:,} of {everything:,} entries, {100 * entries / everything:.1f} %) {note}"
        )

    def _columns(self) -> dict[str, Any]:
        """What trackers and the model card are told of the method, by name."""
        return columns_of(self.method)

    def _describe_arguments(self) -> None:
        tell_trackers(self.callback_handler, self._columns())

    # --- logs --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the metrics of the step beside its loss."""
        stepper = self._sharp_stepper
        if stepper is not None and stepper.metrics and "loss" in logs:
            logs.update(self._read_metrics(stepper.pop_metrics()))
        super().log(logs, *args, **kwargs)

    def _read_metrics(self, metrics: dict[str, Any]) -> dict[str, float]:
        tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        if tensors:  # one wait for the device, on logging steps only
            stacked = torch.stack([t.to(self.args.device).float().reshape(()) for t in tensors.values()])
            if self.accelerator.num_processes > 1:
                stacked = cast("Tensor", self.accelerator.reduce(stacked, reduction="mean"))
            metrics = {**metrics, **dict(zip(tensors, stacked.tolist(), strict=True))}
        component, noise = metrics.get("sharp_component", 1.0), metrics.get("sharp_noise", 0.0)
        negligible = metrics.get("sharp_radius", 1.0) < 1e-4  # TRAM's radius starts at zero and may stay there
        if not self._sharp_warned and not negligible and (abs(component - 1) > 0.25 or noise > 2):
            self._sharp_warned = True
            where, way_out = seen_weights(self._sharp_host)
            warnings.warn(
                f"The weights take on {component:.2f} of the intended perturbation along its direction, with noise of "
                f"{noise:.2f} times its length: so small a step rounds away in weights {where}. {way_out}",
                stacklevel=2,
            )
        return metrics

    # --- what is written and read ------------------------------------------------------------------------------------

    def _record(self) -> dict[str, Any]:
        return record_of(self.method, self._sharp_rounding)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the record of the method beside the model, also where it leaves shards to later."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            path = Path(str(self.args.output_dir if output_dir is None else output_dir)) / CONFIG_NAME
            if self.method is None:
                path.unlink(missing_ok=True)  # of an earlier training into the same folder
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(self._record(), indent=2) + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {} if self.method is None else state_of(self.method, self._sharp_attachment)
        if self._remembers() and self.args.should_save:
            tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
            numbers = {key: json.dumps(value) for key, value in state.items() if not isinstance(value, Tensor)}
            save_file(tensors, os.path.join(output_dir, STATE_NAME), metadata={"format": "pt", **numbers})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        config, path = Path(checkpoint) / CONFIG_NAME, Path(checkpoint) / STATE_NAME
        device: torch.device = self.args.device
        place = "cpu" if device.type == "cpu" or self._sharp_host.sharded else str(device)
        state = read_state(path, place) if path.is_file() else {}
        self._sharp_attachment.check(state)
        super()._load_optimizer_and_scheduler(checkpoint)
        saved = read_record(config) if config.is_file() else {}
        for said in differences(saved, self.method, self._sharp_rounding):
            warnings.warn(said, stacklevel=2)
        if self.method is not None and path.is_file():
            load_state(state, self.method, self._sharp_attachment, Landscape(self._sharp_host))
        elif self._remembers():
            warnings.warn(f"{path} is missing: the method's state (its mask, for one) starts afresh.", stacklevel=2)

    def _remembers(self) -> bool:
        own = bool(self._sharp_attachment.parameters)
        return self.method is not None and (own or any(part.remembers for _, part in self.method.named_parts()))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with a section and a tag that say how the gradient was got."""
        super().create_model_card(*args, **kwargs)
        path = Path(str(self.args.output_dir)) / "README.md"
        if self.method is None or not self.is_world_process_zero() or not path.is_file():
            return
        card = ModelCard.load(path, ignore_metadata_errors=True)
        tags = card.data.to_dict().get("tags") or []
        card.data["tags"] = sorted({*([tags] if isinstance(tags, str) else tags), "sharpness-aware"})
        card.text += card_section(self.method, self._columns())
        card.save(path)


class SharpTrainer(SharpMixin, Trainer):
    """`transformers.Trainer` with one more argument, `method`, and two rarer ones.

    Args:
        *args: the Trainer's.
        method: a `Method`, a `SharpConfig`, a dict of its settings, a preset's name, or None for the Trainer as it is.
        rounding: how shifts are added where a forward sees 16-bit weights: "stochastic" (right on average, with noise)
            or "nearest" (most of a small shift is lost).
        check_repeats: whether the first step makes one pass more, to warn if a pass cannot be repeated.
        **kwargs: the Trainer's.

    Example:
        >>> from hf_sharp import sam
        >>> trainer = SharpTrainer(model, args, method=sam(rho=0.05), train_dataset=train)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    @shown_as(trainer_arguments)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class SharpSeq2SeqTrainer(SharpMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with one more argument, `method`; see `SharpMixin`."""

    @shown_as(seq2seq_arguments)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
